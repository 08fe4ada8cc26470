"""The largest few of every chunk: where they are, which sign, and one magnitude a chunk.

Per chunk of 4096 (the last may be shorter) the k = ⌊chunk · density⌋ elements of largest |x|; among
equals the smaller index wins. Payload: a zero byte (version), one byte of mantissa per chunk, one
of exponent per chunk (both squeezed, see entropy.py), then per kept element a sign bit (1 is
minus), its level of bits - 1 bits, and the Rice code of its gap to the one before it in the chunk
(design 3.2: SparseLoCo, ComPEFT). Levels are packed as they are with `entropy = "none"`, else as
many to a byte as go without splitting one, and squeezed. A chunk's unit is u = mantissa ·
2^exponent in units of q, mantissa at least 128 unless the exponent is 0; an element of level j
stands for ±(2j + 1)·u. With one bit u is the mean magnitude. At 1/64 density and one bit this takes
≈ 0.135 bits an element on Gaussian input (entropy bound 0.1307).
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from shoal.compression import bits, entropy, parallel, places
from shoal.compression.codec import INT32_MAX, Decoded, Encoded, PayloadError, codec

VERSION = 0
NOT_FINITE = "cannot encode a vector with NaN or infinite elements"
TOP_EXPONENT = 23
"""255 · 2^23 is the largest unit within int32."""
_PROBLEMS = {
    1: "an index leaves its chunk",
    2: "a chunk's unit is not in normal form",
    3: "value outside int32",
    4: "a chunk of magnitude zero must keep its first elements, unsigned",
}


class Kept(NamedTuple):
    """What a payload says: per chunk a unit, per kept element its index, sign and level."""

    mantissa_C: Tensor
    """uint8."""
    exponent_C: Tensor
    """uint8."""
    index_K: Tensor
    """int64, in the whole vector."""
    minus_K: Tensor
    """uint8: 0 or 1."""
    level_K: Tensor
    """uint8."""


@codec("sparse")
@dataclass(frozen=True, slots=True)
class Sparse:
    """Send the elements that matter most; the others wait in the author's residual."""

    sparsifies: ClassVar[bool] = True

    density: float = 1 / 64
    """Fraction of the elements of a chunk that are kept; at least one is."""
    bits: int = 1
    """Bits per kept value, the sign among them; 1: all of a chunk have one magnitude."""
    chunk: int = 4096
    """Elements per chunk; larger chunks choose better and cost the same."""
    entropy: str = "auto"
    """How units and levels are coded: auto, none, huffman; range, zstd, any without a ledger."""

    def __post_init__(self) -> None:
        """Refuse what has no layout."""
        if not 0 < self.density <= 0.5:
            raise ValueError(f"density = {self.density}; use one in (0, 0.5], or kind = 'dense'")
        if not 1 <= self.bits <= 8:
            raise ValueError(f"bits = {self.bits}; use 1 to 8")
        if not 64 <= self.chunk <= 1 << 20:
            raise ValueError(f"chunk = {self.chunk}; use 64 to 1048576")
        entropy.check(self.entropy)

    @property
    def inexact(self) -> str:
        """Say why a library's streams are not for the ledger."""
        return entropy.library(self.entropy)

    def encode(self, x_D: Tensor, *, key: int = 0) -> Encoded:
        """Keep the top of each chunk."""
        size = len(x_D)
        loops = parallel.kernels(size, x_D)
        choose = self._choose if not loops else partial(self._choose_compiled, loops)
        kept, values_K = choose(x_D)
        return Encoded(self.pack(kept, size), Decoded(size, values_K, kept.index_K))

    def decode(self, payload: bytes, size: int, device: torch.device | str = "cpu") -> Decoded:
        """Return the kept elements; the rest is not touched."""
        kept, values_K = self._read(payload, size, device)
        return Decoded(size, values_K, kept.index_K)

    def bound(self, size: int) -> int:
        """Return the size under the worst placing of the kept elements."""
        count, b = self._kept(size), self._rice()
        levels = 0
        if self.bits > 1 and self.entropy == "none":
            levels = bits.packed_bytes(count, self.bits - 1)
        elif self.bits > 1:
            levels = entropy.squeezed_bound(bits.digit_bytes(count, self._levels), self.entropy)
        return (
            1
            + 2 * entropy.squeezed_bound(self._chunks(size), self.entropy)
            + bits.packed_bytes(count, 1)
            + levels
            + entropy.rice_bound(count, b, max(size - count, 0))
        )

    def pack(self, kept: Kept, size: int) -> bytes:
        """Return the payload of what is kept."""
        levels: list[bytes | Tensor] = []
        if self.bits > 1 and self.entropy == "none":
            levels = [bits.pack(kept.level_K, self.bits - 1)]
        elif self.bits > 1:
            levels = entropy.squeeze_parts(
                bits.pack_digits(kept.level_K, self._levels), self.entropy
            )
        return bits.join(
            [
                bytes([VERSION]),
                *entropy.squeeze_parts(kept.mantissa_C, self.entropy),
                *entropy.squeeze_parts(kept.exponent_C, self.entropy),
                bits.pack_bits(kept.minus_K),
                *levels,
                entropy.rice_encode(self._gaps(kept.index_K, size), self._rice()),
            ]
        )

    def unpack(self, payload: bytes, size: int, device: torch.device | str = "cpu") -> Kept:
        """Return what is kept; inverse of `pack`, refuses everything else."""
        return self._read(payload, size, device)[0]

    def _read(self, payload: bytes, size: int, device: torch.device | str) -> tuple[Kept, Tensor]:
        """Return what is kept, and the values that stand for it."""
        reader = bits.Reader(payload, device)
        if (version := reader.number(1)) != VERSION:
            raise PayloadError(f"unknown version {version}")
        chunks, count = self._chunks(size), self._kept(size)
        mantissa_C = entropy.expand(reader, chunks, self.entropy)
        exponent_C = entropy.expand(reader, chunks, self.entropy)
        minus_K = bits.unpack_bits(reader.take(bits.packed_bytes(count, 1)), count)
        level_K = torch.zeros_like(minus_K)
        if self.bits > 1 and self.entropy == "none":
            packed = reader.take(bits.packed_bytes(count, self.bits - 1))
            level_K = bits.unpack(packed, count, self.bits - 1).to(torch.uint8)
        elif self.bits > 1:
            packed = entropy.expand(reader, bits.digit_bytes(count, self._levels), self.entropy)
            level_K = bits.unpack_digits(packed, count, self._levels)
        gap_K = entropy.rice_decode(reader, count, self._rice(), max(size - count, 0))
        if loops := parallel.kernels(size, gap_K):
            index_K, values_K = (
                parallel.empty(count, torch.int64),
                parallel.empty(count, torch.int32),
            )
            kept = Kept(mantissa_C, exponent_C, index_K, minus_K, level_K)
            wrong = parallel.ranges(
                loops.sparse_decode,
                chunks,
                self.chunk,
                self._keep(self.chunk),
                size,
                gap_K.numpy(),
                *(part.numpy() for part in kept),
                values_K.numpy(),
            )
            for problem in filter(None, wrong):
                raise PayloadError(_PROBLEMS[problem])
            return kept, values_K
        counts_C = self._counts(size, gap_K.device)
        index_K = self._indices(gap_K, counts_C, size)
        kept = Kept(mantissa_C, exponent_C, index_K, minus_K, level_K)
        return kept, self._check(kept, counts_C)

    def _gaps(self, index_K: Tensor, size: int) -> Tensor:
        """Return the gap before each kept element, from the one before it or the chunk's start."""
        if loops := parallel.kernels(size, index_K):
            gaps = parallel.empty(len(index_K), torch.int64)
            keep, chunks = self._keep(self.chunk), self._chunks(size)
            arguments = index_K.contiguous().numpy(), self.chunk, keep, gaps.numpy()
            parallel.ranges(loops.sparse_gaps, chunks, *arguments)
            return gaps
        counts_C = self._counts(size, index_K.device)
        gap_K = index_K.diff(prepend=index_K.new_tensor([-1])) - 1
        start_C = torch.cumsum(counts_C, 0) - counts_C
        chunk_C = torch.arange(len(counts_C), device=counts_C.device)
        gap_K[start_C] = index_K[start_C] - self.chunk * chunk_C
        return gap_K

    def _choose(self, x_D: Tensor) -> tuple[Kept, Tensor]:
        """Return what to keep of a vector, and the values that stand for it."""
        size = len(x_D)
        if not bool(torch.isfinite(x_D).all()):
            raise ValueError(NOT_FINITE)
        index_K = self._top(x_D.abs())
        x_K = x_D[index_K]
        twice_K = (2 * x_K.abs()).clamp(max=2.0**32).to(torch.int64)  # ⌊2|x|⌋: sums are exact
        counts_C = self._counts(size, x_D.device)
        chunk_K = torch.repeat_interleave(counts_C)
        mantissa_C, exponent_C = self._units(twice_K, counts_C, chunk_K)
        unit_K = (mantissa_C << exponent_C)[chunk_K]
        used_K = unit_K > 0
        level_K = (twice_K // (4 * unit_K).clamp(min=1)).clamp(max=self._levels - 1)
        level_K = torch.where(used_K, level_K, 0)
        minus_K = (x_K < 0) & used_K
        # A chunk whose unit rounds to zero keeps its first elements: one canonical form.
        index_K = torch.where(used_K, index_K, self._first(counts_C, chunk_K))
        kept = Kept(
            mantissa_C.to(torch.uint8),
            exponent_C.to(torch.uint8),
            index_K,
            minus_K.to(torch.uint8),
            level_K.to(torch.uint8),
        )
        return kept, _values(kept, unit_K)

    def _choose_compiled(self, loops: Any, x_D: Tensor) -> tuple[Kept, Tensor]:
        """Do the same, compiled; a last chunk that is shorter is left to torch."""
        whole = len(x_D) // self.chunk
        count, split = whole * self._keep(self.chunk), whole * self.chunk
        chunks, most = self._chunks(len(x_D)), self._kept(len(x_D))
        kept = Kept(
            parallel.empty(chunks, torch.uint8),
            parallel.empty(chunks, torch.uint8),
            parallel.empty(most, torch.int64),
            parallel.empty(most, torch.uint8),
            parallel.empty(most, torch.uint8),
        )
        values_K = parallel.empty(most, torch.int32)
        wrong = parallel.ranges(
            loops.sparse_encode,
            whole,
            x_D[:split].contiguous().numpy(),
            self.chunk,
            self._keep(self.chunk),
            self._levels,
            *(part.numpy() for part in kept),
            values_K.numpy(),
        )
        if any(wrong):
            raise ValueError(NOT_FINITE)
        if split < len(x_D):
            last, last_K = self._choose(x_D[split:])
            kept.mantissa_C[whole:], kept.exponent_C[whole:] = last.mantissa_C, last.exponent_C
            kept.index_K[count:] = last.index_K + split
            kept.minus_K[count:], kept.level_K[count:] = last.minus_K, last.level_K
            values_K[count:] = last_K
        return kept, values_K

    def _indices(self, gap_K: Tensor, counts_C: Tensor, size: int) -> Tensor:
        """Return the index of each kept element, refusing any that leaves its chunk."""
        start_C = torch.cumsum(counts_C, 0) - counts_C
        chunk_K = torch.repeat_interleave(counts_C)
        step_K = torch.cumsum(gap_K + 1, 0)
        before_C = step_K[start_C] - gap_K[start_C] - 1
        within_K = step_K - before_C[chunk_K] - 1
        index_K = within_K + chunk_K * self.chunk
        if bool((within_K >= self.chunk).any()) or bool((index_K[-1:] >= size).any()):
            raise PayloadError(_PROBLEMS[1])
        return index_K

    def _check(self, kept: Kept, counts_C: Tensor) -> Tensor:
        """Return the values; refuse odd units, values outside int32, and signs of zeros."""
        mantissa_C, exponent_C = kept.mantissa_C, kept.exponent_C
        low_C = (mantissa_C < 128) & (exponent_C > 0)
        if bool((exponent_C > TOP_EXPONENT).any()) or bool(low_C.any()):
            raise PayloadError(_PROBLEMS[2])
        chunk_K = torch.repeat_interleave(counts_C)
        unit_K = (mantissa_C.to(torch.int64) << exponent_C.to(torch.int64))[chunk_K]
        if bool(((2 * kept.level_K.to(torch.int64) + 1) * unit_K > INT32_MAX).any()):
            raise PayloadError(_PROBLEMS[3])
        first_K = self._first(counts_C, chunk_K)
        odd_K = (kept.minus_K == 1) | (kept.level_K > 0) | (kept.index_K != first_K)
        if bool((odd_K & (unit_K == 0)).any()):
            raise PayloadError(_PROBLEMS[4])
        return _values(kept, unit_K)

    def _top(self, magnitude_D: Tensor) -> Tensor:
        """Return the indices of the largest of every chunk, increasing."""
        size = len(magnitude_D)
        whole = size // self.chunk
        parts = []
        if whole:
            rows = magnitude_D[: whole * self.chunk].reshape(whole, self.chunk)
            parts.append(_top_of_rows(rows, self._keep(self.chunk)))
        if size % self.chunk:
            tail = magnitude_D[whole * self.chunk :].reshape(1, -1)
            parts.append(_top_of_rows(tail, self._keep(tail.shape[1])) + whole * self.chunk)
        empty = torch.zeros(0, dtype=torch.int64, device=magnitude_D.device)
        return torch.cat(parts) if parts else empty

    def _units(self, twice_K: Tensor, counts_C: Tensor, chunk_K: Tensor) -> tuple[Tensor, Tensor]:
        """Return each chunk's unit as mantissa and exponent, from integers alone."""
        zeros_C = torch.zeros_like(counts_C)
        if self.bits == 1:  # the mean magnitude
            sum_C = zeros_C.index_add(0, chunk_K, twice_K)
            unit_C = (sum_C + counts_C) // (2 * counts_C)
        else:  # the largest magnitude is the highest level
            largest_C = zeros_C.scatter_reduce(0, chunk_K, twice_K, "amax")
            unit_C = -(-largest_C // (2 * (2 * self._levels - 1)))
        limit = INT32_MAX // (2 * self._levels - 1)
        mantissa_C, exponent_C = _minifloat(unit_C)
        too_large = (mantissa_C << exponent_C) > limit
        low_C, low_exponent_C = _minifloat(torch.full_like(unit_C, limit), up=False)
        return (
            torch.where(too_large, low_C, mantissa_C),
            torch.where(too_large, low_exponent_C, exponent_C),
        )

    def _first(self, counts_C: Tensor, chunk_K: Tensor) -> Tensor:
        """Return the indices of the first elements of every chunk, as many as it keeps."""
        start_C = torch.cumsum(counts_C, 0) - counts_C
        rank_K = torch.arange(len(chunk_K), device=chunk_K.device) - start_C[chunk_K]
        return chunk_K * self.chunk + rank_K

    @property
    def _levels(self) -> int:
        """Return the number of magnitudes that an element can have."""
        return 1 << (self.bits - 1)

    def _rice(self) -> int:
        return places.parameter(self._keep(self.chunk), self.chunk)

    def _keep(self, length: int) -> int:
        return max(1, int(length * self.density))

    def _chunks(self, size: int) -> int:
        return -(-size // self.chunk)

    def _kept(self, size: int) -> int:
        whole, rest = divmod(size, self.chunk)
        return whole * self._keep(self.chunk) + (self._keep(rest) if rest else 0)

    def _counts(self, size: int, device: torch.device) -> Tensor:
        """Return how many elements each chunk keeps."""
        counts_C = torch.full((self._chunks(size),), self._keep(self.chunk), dtype=torch.int64)
        if size % self.chunk:
            counts_C[-1] = self._keep(size % self.chunk)
        return counts_C.to(device)


def _values(kept: Kept, unit_K: Tensor) -> Tensor:
    sign_K = 1 - 2 * kept.minus_K.to(torch.int64)
    return (sign_K * (2 * kept.level_K.to(torch.int64) + 1) * unit_K).to(torch.int32)


def _top_of_rows(rows_CN: Tensor, keep: int) -> Tensor:
    """Return flat indices of the `keep` largest of each row; ties go to the smaller index."""
    least_C1 = rows_CN.topk(keep, dim=1).values[:, -1:]
    above_CN = rows_CN > least_C1
    equal_CN = rows_CN == least_C1
    free_C1 = keep - above_CN.sum(1, keepdim=True)
    if bool((equal_CN.sum(1, keepdim=True) > free_C1).any()):
        equal_CN &= equal_CN.cumsum(1) <= free_C1
    return (above_CN | equal_CN).reshape(-1).nonzero().reshape(-1)


def _minifloat(value_C: Tensor, *, up: bool = True) -> tuple[Tensor, Tensor]:
    """Return 8-bit mantissa and exponent of integers, to the nearest (or down)."""
    length_C = torch.frexp(value_C.to(torch.float64)).exponent.to(torch.int64)
    exponent_C = (length_C - 8).clamp(min=0)
    half_C = (1 << exponent_C) >> 1 if up else torch.zeros_like(value_C)
    mantissa_C = (value_C + half_C) >> exponent_C
    carry_C = mantissa_C == 256
    return torch.where(carry_C, 128, mantissa_C), exponent_C + carry_C.to(torch.int64)
