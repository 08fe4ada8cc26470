"""The largest few of every chunk: where they are, which sign, and one magnitude a chunk.

Per chunk of 4096 (the last may be shorter) the k = ⌊chunk · density⌋ elements of largest |x|; among
equals the smaller index wins. Payload: a zero byte (version), one byte of mantissa per chunk, one
of exponent per chunk, then per kept element a sign bit (1 is minus), bits - 1 bits of level, and
the Rice code of its gap to the one before it in the chunk (design 3.2: SparseLoCo, ComPEFT). A
chunk's unit is u = mantissa · 2^exponent in units of q, mantissa at least 128 unless the exponent
is 0; an element of level j stands for ±(2j + 1)·u. With one bit u is the mean magnitude. At 1/64
density and one bit this takes ≈ 0.137 bits an element on Gaussian input (entropy bound 0.1307).
"""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shoal.compression import old_bits as bits
from shoal.compression import old_entropy as entropy
from shoal.compression.codec import (
    INT32_MAX,
    Decoded,
    Encoded,
    PayloadError,
    codec,
    to_integers,
)

VERSION = 0
TOP_EXPONENT = 23
"""255 · 2^23 is the largest unit within int32."""


class Kept(NamedTuple):
    """What a payload says: per chunk a unit, per kept element its index, sign and level."""

    mantissa: NDArray[np.uint8]
    exponent: NDArray[np.uint8]
    place: NDArray[np.int64]
    """Index in the whole vector."""
    minus: NDArray[np.uint8]
    level: NDArray[np.int64]


@codec("sparse")
@dataclass(frozen=True, slots=True)
class Sparse:
    """Send the elements that matter most; the others wait in the author's residual."""

    inexact: ClassVar[str] = ""

    density: float = 1 / 64
    """Fraction of the elements of a chunk that are kept; at least one is."""
    bits: int = 1
    """Bits per kept value, the sign among them; 1: all of a chunk have one magnitude."""
    chunk: int = 4096
    """Elements per chunk; larger chunks choose better and cost the same."""

    def __post_init__(self) -> None:
        """Refuse what has no layout."""
        if not 0 < self.density <= 0.5:
            raise ValueError(f"density = {self.density}; use one in (0, 0.5], or kind = 'dense'")
        if not 1 <= self.bits <= 8:
            raise ValueError(f"bits = {self.bits}; use 1 to 8")
        if not 64 <= self.chunk <= 1 << 20:
            raise ValueError(f"chunk = {self.chunk}; use 64 to 1048576")

    def encode(self, x_D: Tensor, *, key: int = 0) -> Encoded:
        """Keep the top of each chunk."""
        size = len(x_D)
        if not bool(torch.isfinite(x_D).all()):
            raise ValueError("cannot encode a vector with NaN or infinite elements")
        index_K = self._top(x_D.abs())
        x_K = to_integers(x_D[index_K])
        mantissa_C, exponent_C = self._units(x_K.abs(), size)
        unit_K = (mantissa_C << exponent_C).repeat_interleave(self._counts(size, x_D.device))
        top = 2 ** (self.bits - 1) - 1
        level_K = (x_K.abs() // (2 * unit_K).clamp(min=1)).clamp(max=top)
        minus_K = (x_K < 0) & (unit_K > 0)
        level_K = torch.where(unit_K > 0, level_K, 0)
        index_K = self._settle(index_K, unit_K, size)
        kept = Kept(
            mantissa_C.to(torch.uint8).cpu().numpy(),
            exponent_C.to(torch.uint8).cpu().numpy(),
            index_K.cpu().numpy(),
            minus_K.to(torch.uint8).cpu().numpy(),
            level_K.cpu().numpy(),
        )
        values_K = torch.where(minus_K, -1, 1) * (2 * level_K + 1) * unit_K
        return Encoded(self.pack(kept, size), Decoded(size, values_K.to(torch.int32), index_K))

    def decode(self, payload: bytes, size: int, device: torch.device | str = "cpu") -> Decoded:
        """Return the kept elements; the rest is not touched."""
        kept = self.unpack(payload, size)
        unit = kept.mantissa.astype(np.int64) << kept.exponent.astype(np.int64)
        unit = np.repeat(unit, self._counts_np(size))
        values = np.where(kept.minus == 1, -1, 1) * (2 * kept.level + 1) * unit
        return Decoded(
            size,
            torch.from_numpy(values.astype(np.int32)).to(device),
            torch.from_numpy(kept.place).to(device),
        )

    def bound(self, size: int) -> int:
        """Return the size under the worst placing of the kept elements."""
        count, b = self._kept(size), self._rice()
        fixed = 1 + 2 * self._chunks(size) + bits.packed_bytes(count, 1)
        return (
            fixed
            + bits.packed_bytes(count, self.bits - 1)
            + entropy.rice_bound(count, b, max(size - count, 0))
        )

    def pack(self, kept: Kept, size: int) -> bytes:
        """Return the payload of what is kept."""
        counts = self._counts_np(size)
        starts = np.cumsum(counts) - counts
        gaps = np.diff(kept.place, prepend=-1) - 1
        gaps[starts] = kept.place[starts] - self.chunk * np.arange(len(counts))
        return b"".join(
            (
                bytes([VERSION]),
                kept.mantissa.tobytes(),
                kept.exponent.tobytes(),
                bits.pack_bits(kept.minus),
                bits.pack(kept.level, self.bits - 1),
                entropy.rice_encode(gaps, self._rice()),
            )
        )

    def unpack(self, payload: bytes, size: int) -> Kept:
        """Return what is kept; inverse of `pack`, refuses everything else."""
        counts = self._counts_np(size)
        count, chunks = int(counts.sum()), len(counts)
        reader = bits.Reader(payload)
        if (version := reader.take(1)[0]) != VERSION:
            raise PayloadError(f"unknown version {version}")
        mantissa = np.frombuffer(reader.take(chunks), np.uint8)
        exponent = np.frombuffer(reader.take(chunks), np.uint8)
        minus = bits.unpack_bits(reader.take(bits.packed_bytes(count, 1)), count)
        level = np.zeros(count, np.int64)
        if self.bits > 1:
            packed = reader.take(bits.packed_bytes(count, self.bits - 1))
            level = bits.unpack(packed, count, self.bits - 1)
        gaps = entropy.rice_decode(reader.rest(), count, self._rice(), max(size - count, 0))
        kept = Kept(mantissa, exponent, self._indices(gaps, counts, size), minus, level)
        self._check(kept, counts)
        return kept

    def _indices(
        self, gaps: NDArray[np.int64], counts: NDArray[np.int64], size: int
    ) -> NDArray[np.int64]:
        """Return the index of each kept element, refusing any that leaves its chunk."""
        starts = np.cumsum(counts) - counts
        steps = np.cumsum(gaps + 1)
        before = np.repeat(steps[starts] - gaps[starts] - 1, counts)
        within = steps - before - 1
        chunk = np.repeat(np.arange(len(counts)), counts)
        index: NDArray[np.int64] = within + chunk * self.chunk
        if bool((within >= self.chunk).any()) or (len(index) and int(index[-1]) >= size):
            raise PayloadError("an index leaves its chunk")
        return index

    def _check(self, kept: Kept, counts: NDArray[np.int64]) -> None:
        """Refuse units that are not normal, values outside int32, and signs of zeros."""
        mantissa, exponent = kept.mantissa.astype(np.int64), kept.exponent.astype(np.int64)
        if bool((exponent > TOP_EXPONENT).any()) or bool(((mantissa < 128) & (exponent > 0)).any()):
            raise PayloadError("a chunk's unit is not in normal form")
        unit = np.repeat(mantissa << exponent, counts)
        if bool(((2 * kept.level + 1) * unit > INT32_MAX).any()):
            raise PayloadError("value outside int32")
        first = np.repeat(self.chunk * np.arange(len(counts)), counts)
        rank = np.arange(len(unit)) - np.repeat(np.cumsum(counts) - counts, counts)
        odd = (kept.minus == 1) | (kept.level > 0) | (kept.place != first + rank)
        if bool((odd & (unit == 0)).any()):
            raise PayloadError("a chunk of magnitude zero must keep its first elements, unsigned")

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

    def _units(self, magnitude_K: Tensor, size: int) -> tuple[Tensor, Tensor]:
        """Return each chunk's unit as mantissa and exponent, from integer sums alone."""
        counts_C = self._counts(size, magnitude_K.device)
        chunk_K = torch.repeat_interleave(counts_C)
        zeros_C = torch.zeros(len(counts_C), dtype=torch.int64, device=magnitude_K.device)
        if self.bits == 1:
            sum_C = zeros_C.index_add(0, chunk_K, magnitude_K)
            unit_C = (2 * sum_C + counts_C) // (2 * counts_C)
        else:
            largest_C = zeros_C.scatter_reduce(0, chunk_K, magnitude_K, "amax")
            unit_C = -(-largest_C // (2**self.bits - 1))
        limit = INT32_MAX // (2**self.bits - 1)
        mantissa_C, exponent_C = _minifloat(unit_C)
        too_large = (mantissa_C << exponent_C) > limit
        low_C, low_exponent_C = _minifloat(torch.full_like(unit_C, limit), up=False)
        return (
            torch.where(too_large, low_C, mantissa_C),
            torch.where(too_large, low_exponent_C, exponent_C),
        )

    def _settle(self, index_K: Tensor, unit_K: Tensor, size: int) -> Tensor:
        """Let chunks whose unit rounds to zero keep their first elements (one canonical form)."""
        counts_C = self._counts(size, index_K.device)
        chunk_K = torch.repeat_interleave(counts_C)
        start_K = (torch.cumsum(counts_C, 0) - counts_C)[chunk_K]
        rank_K = torch.arange(len(index_K), device=index_K.device) - start_K
        return torch.where(unit_K > 0, index_K, chunk_K * self.chunk + rank_K)

    def _rice(self) -> int:
        return entropy.rice_parameter(self._keep(self.chunk) / self.chunk)

    def _keep(self, length: int) -> int:
        return max(1, int(length * self.density))

    def _chunks(self, size: int) -> int:
        return -(-size // self.chunk)

    def _kept(self, size: int) -> int:
        whole, rest = divmod(size, self.chunk)
        return whole * self._keep(self.chunk) + (self._keep(rest) if rest else 0)

    def _counts_np(self, size: int) -> NDArray[np.int64]:
        counts = np.full(self._chunks(size), self._keep(self.chunk), np.int64)
        if size % self.chunk:
            counts[-1] = self._keep(size % self.chunk)
        return counts

    def _counts(self, size: int, device: torch.device) -> Tensor:
        return torch.from_numpy(self._counts_np(size)).to(device)


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
