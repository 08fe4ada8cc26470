"""A vector by its coordinates along few random directions, which all peers have in common.

Ferret (Shu et al., "Ferret: federated full-parameter tuning at scale for large language models",
2024, arXiv 2409.06277, sec. 4): learn by gradients, send K numbers c_k, and let everyone rebuild
Σ c_k z_k. Here the directions are ±1 instead of truncated Gaussians: direction k of a turn is
z(key(run, COMMON, turn, k, domain = PROJECTION)), of which a block of the vector, `block` elements,
takes the part where it lies. Block ℓ has K_ℓ of the K coefficients, in proportion to its norm, and

    c_k = ⟨x_ℓ, z_k⟩ / (d_ℓ + K_ℓ - 1)

which leaves the least expected square: 1 - δ of that of x_ℓ, δ = K_ℓ / (d_ℓ + K_ℓ - 1), where the
unbiased c = ⟨x, z⟩ / K would leave (d - 1) / K of it and more than x itself. So a vector arrives
after about d/K turns, and what is left waits in the residual, which is not to decay: fed the same
vector every turn (d = 4096), decay .95 let through 56, 23 and 7 % of it for K = 256, 64 and 16, in
a direction no truer (cosine .89, .86, .83; without decay all of it, .87). Coefficients are rounded
to the nearest of 255 levels: rounding by chance would add to the residual.

Payload: K_ℓ of every block in as few bits as hold the largest that is possible, the exponents e of
the blocks in 5 bits each, both LSB-first and padded with zeros to a byte; then q as int8, block by
block. A block is Σ_k q_k · 2^e · z_k. One form: the last q of a block is not zero; e is zero or one
|q| at least 64; q is not -128; Σ|q| · 2^e is below 2³¹.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from shoal.compression import bits, perturbation, seeded
from shoal.compression.codec import (
    INT32_MAX,
    Decoded,
    Encoded,
    Origin,
    PayloadError,
    codec,
    sum_of_squares,
)

TOP = 127
MOST = 1 << 16
"""Most coefficients."""
MOST_BLOCK = 1 << 24
_EXPONENT = 5
"""Bits of an exponent."""


class Coordinates(NamedTuple):
    """What a payload says."""

    counts: list[int]
    """Of each block: how many coefficients it has."""
    exponents: list[int]
    mantissas: Tensor
    """int64: q, block after block."""


@codec("projection")
@dataclass(frozen=True, slots=True)
class Projection:
    """Send a vector's coordinates along random directions: bytes do not grow with the model."""

    coefficients: int = 1024
    """K: bytes of an update, and passes over the model at both ends."""
    block: int = 1 << 20
    """Elements that have their own coefficients; where the vector is longer, at least one each."""
    origin: Origin = field(default=Origin(), init=False, repr=False)

    def __post_init__(self) -> None:
        """Refuse what has no layout."""
        if not 1 <= self.coefficients <= MOST:
            raise ValueError(f"coefficients = {self.coefficients}; use 1 to {MOST}")
        if not 64 <= self.block <= MOST_BLOCK:
            raise ValueError(f"block = {self.block}; use 64 to {MOST_BLOCK}")

    @property
    def inexact(self) -> str:
        """Return that nothing speaks against the ledger."""
        return ""

    def at(self, origin: Origin) -> "Projection":
        """Return the codec for payloads of this origin."""
        return seeded.with_origin(self, origin)

    def encode(self, x_D: Tensor, *, key: int = 0) -> Encoded:
        """Measure the blocks, then each along its directions, in one pass over it."""
        size, parts = len(x_D), self._blocks(len(x_D))
        norms = [_norm(x_D[part]) for part in parts]
        shares = apportioned(norms, [part.stop - part.start for part in parts], self._most(size))
        keys = self._keys(max(shares))
        counts, exponents, mantissas = [], [], []
        for part, count in zip(parts, shares, strict=True):
            along_K = perturbation.along(x_D[part], keys[:count], start=part.start)
            power, mantissa_K = _rounded(along_K / (part.stop - part.start + count - 1))
            counts.append(len(mantissa_K))
            exponents.append(power)
            mantissas.append(mantissa_K)
        found = Coordinates(counts, exponents, torch.cat(mantissas))
        return Encoded(self.pack(found, size), self._decoded(found, size, x_D.device))

    def decode(self, payload: bytes, size: int, device: torch.device | str = "cpu") -> Decoded:
        """Return the sum of the directions, as far as each is to be gone along."""
        return self._decoded(self.unpack(payload, size), size, device)

    def bound(self, size: int) -> int:
        """Return the bytes of all coefficients."""
        return self._head(size) + self._most(size)

    def pack(self, found: Coordinates, size: int) -> bytes:
        """Return the payload of coordinates."""
        counts = bits.pack(torch.tensor(found.counts), self._width(size))
        exponents = bits.pack(torch.tensor(found.exponents), _EXPONENT)
        return bits.join([counts, exponents, found.mantissas.to(torch.int8).view(torch.uint8)])

    def unpack(self, payload: bytes, size: int, device: torch.device | str = "cpu") -> Coordinates:
        """Return the coordinates; inverse of `pack`, refuses everything else."""
        if len(payload) > self.bound(size):
            raise PayloadError(f"{len(payload)} bytes where {self.bound(size)} are the most")
        reader, blocks, width = bits.Reader(payload), -(-size // self.block), self._width(size)
        counts = bits.unpack(reader.take(bits.packed_bytes(blocks, width)), blocks, width).tolist()
        exponents = bits.unpack(
            reader.take(bits.packed_bytes(blocks, _EXPONENT)), blocks, _EXPONENT
        ).tolist()
        mantissas = reader.take(sum(counts)).view(torch.int8).to(torch.int64)
        reader.end()
        found = Coordinates(counts, exponents, mantissas)
        self._check(found, size)
        return found

    def _check(self, found: Coordinates, size: int) -> None:
        """Refuse values outside int32, and all forms but one."""
        for part, power, mantissa_K in self._each(found, size):
            if len(mantissa_K) > part.stop - part.start:
                raise PayloadError("a block has more coefficients than elements")
            if not len(mantissa_K):
                if power:
                    raise PayloadError("a block without coefficients has an exponent")
                continue
            magnitude_K = mantissa_K.abs()
            largest = int(magnitude_K.max())
            if largest > TOP:
                raise PayloadError("a coefficient is -128")
            if not int(mantissa_K[-1]):
                raise PayloadError("the last coefficient of a block is zero")
            if power and largest <= TOP // 2:
                raise PayloadError("an exponent is larger than it need be")
            if int(magnitude_K.sum()) << power > INT32_MAX:
                raise PayloadError("value outside int32")

    def _decoded(self, found: Coordinates, size: int, device: torch.device | str) -> Decoded:
        value_D = torch.zeros(size, dtype=torch.int32, device=device)
        keys = self._keys(max(found.counts))
        for part, power, mantissa_K in self._each(found, size):
            here, step_K = keys[: len(mantissa_K)], mantissa_K << power
            perturbation.accumulate(value_D[part], here, step_K, start=part.start)
        return Decoded(size, value_D)

    def _each(self, found: Coordinates, size: int) -> Iterator[tuple[slice, int, Tensor]]:
        """Yield the place, exponent and mantissas of every block."""
        mantissas = torch.split(found.mantissas, found.counts)
        return zip(self._blocks(size), found.exponents, mantissas, strict=True)

    def _keys(self, count: int) -> list[int]:
        """Return the keys of the turn's first directions."""
        run, turn = self.origin.run, self.origin.turn
        common, domain = perturbation.COMMON, perturbation.PROJECTION
        return [perturbation.key(run, common, turn, k, domain=domain) for k in range(count)]

    def _blocks(self, size: int) -> list[slice]:
        return [slice(start, min(start + self.block, size)) for start in range(0, size, self.block)]

    def _most(self, size: int) -> int:
        """Return how many coefficients a payload may have."""
        return min(max(self.coefficients, -(-size // self.block)), size)

    def _width(self, size: int) -> int:
        """Return the bits of a count."""
        return min(self._most(size), self.block).bit_length()

    def _head(self, size: int) -> int:
        blocks = -(-size // self.block)
        return bits.packed_bytes(blocks, self._width(size)) + bits.packed_bytes(blocks, _EXPONENT)


def apportioned(weights: list[float], most: list[int], total: int) -> list[int]:
    """Return how many of `total` each gets: one, and of the rest in proportion to its weight.

    By largest remainders, the first of equals. None gets more than its `most`, what weighs nothing
    gets nothing, and something is left over only when all others have their most.
    """
    found = [int(weight > 0) for weight in weights]
    while left := total - sum(found):
        free = [i for i, weight in enumerate(weights) if weight > 0 and found[i] < most[i]]
        if not free:
            break
        whole = math.fsum(weights[i] for i in free)
        share = {i: left * weights[i] / whole for i in free}
        full = [i for i in free if share[i] >= most[i] - found[i]]
        if full:  # these are done; what they leave is shared again
            for i in full:
                found[i] = most[i]
            continue
        for i in free:
            found[i] += math.floor(share[i])
        by_rest = sorted(free, key=lambda i: (math.floor(share[i]) - share[i], i))
        for i in by_rest[: total - sum(found)]:
            found[i] += 1
    return found


def _norm(x_N: Tensor) -> float:
    """Return the 2-norm of a block, from sums of integers."""
    power = perturbation.exponent(x_N)
    return math.sqrt(sum_of_squares(perturbation.whole(x_N, power))) * 2.0**-power


def _rounded(c_K: Tensor) -> tuple[int, Tensor]:
    """Return e and q nearest to c / 2^e, as few as say something, within int32 all together."""
    while True:
        largest = float(c_K.abs().max()) if len(c_K) else 0.0
        power = max(0, math.frexp(largest / (TOP + 0.5))[1])
        mantissa_K = (c_K * 2.0**-power).round().to(torch.int64)
        reach = int(mantissa_K.abs().sum()) << power
        if reach <= INT32_MAX:
            last = int(mantissa_K.nonzero().max()) + 1 if reach else 0
            return power, mantissa_K[:last]
        c_K = c_K * (0.9 * INT32_MAX / reach)
