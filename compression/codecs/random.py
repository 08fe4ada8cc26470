"""One element of each stratum, drawn from a seed: values travel, indices do not.

The vector is cut into k = ⌊size · density⌋ strata (one at least), stratum i from ⌊i·size/k⌋ up to
the next, and of each the element start + ⌊u·length⌋ is kept, with u from SplitMix64 under the seed
(`selection.one_of_each`). Payload: a zero byte (version), the seed (u64, little-endian), one byte
of scale for each 256 kept values, squeezed, and their mantissas of `bits` bits, squeezed
(`mantissas.py`). Bits per element ≈ density · (bits + 1/32), whatever the values.

Random-k as published (Stich et al., "Sparsified SGD with memory", 2018, def. 2.2; Wangni et al.
2018) draws a uniform subset of k. A subset costs a sort of `size` random words at both ends; a
stratum costs one word, any part of the vector can be had alone, and the number kept is exact. What
is lost: two elements of one stratum never travel together. Every element of a stratum is as likely
as the others, and strata differ in length by one at most, so the two forms keep their constants:

    contractive  C(x) = x_I            E‖C(x) - x‖² ≤ (1 - δ)‖x‖², 1/δ the longest stratum
    unbiased     Q(x) = length · x_I   E Q(x) = x, E‖Q(x) - x‖² ≤ ω‖x‖², ω = longest stratum - 1

and Q's variance is smaller than that of subsets by the spread between strata, as always with
stratified sampling. `unbiased` rounds to integers and mantissas by chance as well, so that its
mean is exact; never feed it to error feedback, which its variance would blow up.
"""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from shoal.compression import bits, entropy, mantissas, selection, splitmix, symbols
from shoal.compression.codec import (
    INT32_MAX,
    Decoded,
    Encoded,
    PayloadError,
    codec,
    to_integers,
)

VERSION = 0
BLOCK = 256
"""Kept values that share a scale."""


class Drawn(NamedTuple):
    """What a payload says."""

    seed: int
    """Unsigned 64 bits: where the kept elements are."""
    groups: mantissas.Groups
    """What they are."""


@codec("random")
@dataclass(frozen=True, slots=True)
class Random:
    """Send a random part: cheap to choose, no bytes for places, but blind to what matters."""

    sparsifies: ClassVar[bool] = True

    density: float = 1 / 64
    """Fraction of the elements that are kept; at least one is."""
    scaling: str = "contractive"
    """`contractive`: values as they are (for residuals); `unbiased`: times the stratum's length."""
    bits: int = 8
    """Bits per kept value; 1: a sign and the block's mean magnitude."""
    entropy: str = "auto"
    """How symbols are coded: auto, none or huffman; range, zstd or any only without a ledger."""

    def __post_init__(self) -> None:
        """Refuse what has no layout."""
        if not 0 < self.density <= 0.5:
            raise ValueError(f"density = {self.density}; use one in (0, 0.5], or kind = 'dense'")
        if self.scaling not in ("contractive", "unbiased"):
            raise ValueError(f"scaling = {self.scaling!r}; use 'contractive' or 'unbiased'")
        if not 1 <= self.bits <= 8:
            raise ValueError(f"bits = {self.bits}; use 1 to 8")
        entropy.check(self.entropy)

    @property
    def inexact(self) -> str:
        """Say why a library's streams are not for the ledger."""
        return entropy.library(self.entropy)

    @property
    def unbiased(self) -> bool:
        """Return whether the mean of what is decoded, over keys, is what was encoded."""
        return self.scaling == "unbiased"

    def encode(self, x_D: Tensor, *, key: int = 0) -> Encoded:
        """Draw one element of each stratum; seed and rounding come from `key`."""
        size = len(x_D)
        # Words of `key`: the seed, and the key of what rounding draws (two words a value).
        seed, rounding = splitmix.words(key, 2).tolist()
        index_K, length_K = self._drawn(seed, size, x_D.device)
        _refuse_non_finite(x_D)
        lengths_B = self._blocks(size, x_D.device)
        if self.unbiased:
            words = splitmix.words(rounding, 2 * len(index_K), device=x_D.device).reshape(2, -1)
            scaled_K = (_by_chance(x_D[index_K], words[0]) * length_K).clamp(-INT32_MAX, INT32_MAX)
            groups = mantissas.stochastic(scaled_K, lengths_B, self.bits, words[1])
        else:
            groups = mantissas.nearest(to_integers(x_D[index_K]), lengths_B, self.bits)
        values_K = mantissas.values(groups, lengths_B, self.bits).to(torch.int32)
        payload = self.pack(Drawn(seed & (2**64 - 1), groups), size)
        return Encoded(payload, Decoded(size, values_K, index_K))

    def decode(self, payload: bytes, size: int, device: torch.device | str = "cpu") -> Decoded:
        """Return the kept elements where the seed puts them; the rest is not touched."""
        drawn, values_K = self._read(payload, size, device)
        index_K, _ = self._drawn(drawn.seed, size, values_K.device)
        return Decoded(size, values_K.to(torch.int32), index_K)

    def bound(self, size: int) -> int:
        """Return the size when nothing is gained by entropy coding."""
        count = self._keep(size)
        scale_bytes = entropy.squeezed_bound(-(-count // BLOCK), self.entropy)
        return 9 + scale_bytes + symbols.squeezed_bound(count, self._alphabet, self.entropy)

    def pack(self, drawn: Drawn, size: int) -> bytes:
        """Return the payload of seed and values."""
        return bits.join(
            (
                bytes([VERSION]),
                drawn.seed.to_bytes(8, "little"),
                *entropy.squeeze_parts(drawn.groups.codes, self.entropy),
                *symbols.squeezed(drawn.groups.symbols, self._alphabet, self.entropy),
            )
        )

    def unpack(self, payload: bytes, size: int, device: torch.device | str = "cpu") -> Drawn:
        """Return seed and values; inverse of `pack`, refuses everything else."""
        return self._read(payload, size, device)[0]

    def _read(self, payload: bytes, size: int, device: torch.device | str) -> tuple[Drawn, Tensor]:
        """Return what the payload says, and the values that its mantissas stand for."""
        reader = bits.Reader(payload, device)
        if (version := reader.number(1)) != VERSION:
            raise PayloadError(f"unknown version {version}")
        seed, count = reader.number(8), self._keep(size)
        codes_B = entropy.expand(reader, -(-count // BLOCK), self.entropy)
        symbols_K = symbols.expanded(reader, count, self._alphabet, self.entropy)
        reader.end()
        groups = mantissas.Groups(codes_B, symbols_K)
        values_K = mantissas.values(groups, self._blocks(size, codes_B.device), self.bits)
        return Drawn(seed, groups), values_K

    def _drawn(self, seed: int, size: int, device: torch.device) -> tuple[Tensor, Tensor]:
        return selection.one_of_each(seed, size, self._keep(size), device)

    def _keep(self, size: int) -> int:
        return max(1, int(size * self.density)) if size else 0

    def _blocks(self, size: int, device: torch.device) -> Tensor:
        """Return how many kept values share each scale."""
        whole, rest = divmod(self._keep(size), BLOCK)
        return torch.tensor([BLOCK] * whole + [rest] * bool(rest), device=device)

    @property
    def _alphabet(self) -> int:
        return mantissas.alphabet(self.bits)


def _by_chance(x_K: Tensor, words_K: Tensor) -> Tensor:
    """Return integers (int64) next to x, whose mean over random words is x within 2⁻²⁵."""
    x_K = x_K.clamp(-2147483520.0, 2147483520.0)
    floor_K = x_K.floor()
    chance_K = ((x_K - floor_K) * 2.0**24).round().to(torch.int64)
    up_K = (splitmix.shift(words_K, 40) < chance_K).to(torch.int64)
    return floor_K.to(torch.int64) + up_K


def _refuse_non_finite(x_D: Tensor) -> None:
    """Refuse vectors that error feedback would keep infinite, though only a part is sent."""
    if len(x_D):
        low, high = torch.aminmax(x_D)  # one pass; NaN wins both
        if not bool(torch.isfinite(low) & torch.isfinite(high)):
            raise ValueError("cannot encode a vector with NaN or infinite elements")
