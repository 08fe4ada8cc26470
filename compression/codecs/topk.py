"""The largest few of a whole vector or tensor: sign, level, place, and one magnitude a tensor.

Kept are the k = ⌊size · density⌋ elements (one at least) of largest |x|, the smaller index among
equals: the `exact` selection. A threshold estimated from a sample is quicker; it keeps between
⌈0.7 k⌉ and ⌊1.3 k⌋ (`selection.threshold`). Payload, little-endian: a zero byte (version), the
count per tensor (u32, only if select = "threshold"), the unit u per tensor (u32), one symbol
per kept element, squeezed (level j below 2^(bits-1); 2j + 1 if minus, else 2j), and the gaps
between places in the whole vector, Rice-coded. An element of level j stands for ±(2j + 1)·u.

With one bit this is ComPEFT's ternary form (Yadav et al. 2023, arXiv 2311.13171, sec. 3): sign and
one scalar for all. Two things differ from its published code, which keeps k + 1 entries, and which
takes the scalar α·σ of the whole vector: that is `magnitude = "std"` here, but the default is the
mean |x| of what is kept, the least-squares choice, with which the residual always shrinks by
(Σ|kept|)²/(k·Σx²) (error feedback needs that).

Bits per element ≈ H(p) + p·bits (+ 1-2 % of the first for Rice): 0.34 at p = 0.05 and one bit.
"""

import math
from dataclasses import dataclass, field
from fractions import Fraction
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from shoal.compression import bits, entropy, places, selection, shaped, splitmix, symbols
from shoal.compression.codec import (
    INT32_MAX,
    Decoded,
    Encoded,
    PayloadError,
    Shapes,
    codec,
    sum_of_squares,
    to_integers,
)

VERSION = 0
SLAB = 1 << 20
"""Elements that are held as int64 at a time."""
HALVINGS = 8
"""How many units below the one that reaches the largest element are tried (more than one bit)."""


class Kept(NamedTuple):
    """What a payload says: per tensor a count and a unit, per kept element place and symbol."""

    counts: list[int]
    units: list[int]
    places: Tensor
    """int64: index in the whole vector, increasing."""
    symbols: Tensor
    """uint8: 2 · level + (1 if minus)."""


@codec("topk")
@dataclass(frozen=True, slots=True)
class TopK:
    """Send the largest of all; chunks without large elements send nothing."""

    sparsifies: ClassVar[bool] = True

    density: float = 1 / 64
    """Fraction of the elements that are kept; at least one of each tensor is."""
    select: str = "exact"
    """`exact`: precisely k. `threshold`: one pass over memory, 0.7 to 1.3 k."""
    bits: int = 1
    """Bits per kept value, the sign among them; 1: all of a tensor have one magnitude."""
    magnitude: str = "mean"
    """`mean` |x| of what is kept (least squares); `std`: alpha times the vector's (ComPEFT)."""
    alpha: float = 1.0
    """Factor on the standard deviation; ComPEFT tries 0.5 to 10 on held-out data."""
    scope: str = "vector"
    """`vector`: the largest of all tensors together; `tensor`: of each, with its own magnitude."""
    entropy: str = "auto"
    """Squeezing of signs and levels: auto, none, huffman; range, zstd, any are for mixing."""
    shapes: Shapes | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        """Refuse what has no layout."""
        if not 0 < self.density <= 0.5:
            raise ValueError(f"density = {self.density}; use one in (0, 0.5], or kind = 'dense'")
        if not 1 <= self.bits <= 8:
            raise ValueError(f"bits = {self.bits}; use 1 to 8")
        _one_of("select", self.select, ("exact", "threshold"))
        _one_of("magnitude", self.magnitude, ("mean", "std"))
        _one_of("scope", self.scope, ("vector", "tensor"))
        if self.magnitude == "std" and self.bits > 1:
            raise ValueError("magnitude = 'std' is one for all; use bits = 1 with it")
        if not 0 < self.alpha < math.inf:
            raise ValueError(f"alpha = {self.alpha} must be above 0")
        entropy.check(self.entropy)

    @property
    def inexact(self) -> str:
        """Say why a library's streams are not for the ledger."""
        return entropy.library(self.entropy)

    def shaped(self, shapes: Shapes) -> "TopK":
        """Return the codec for vectors of these tensors."""
        return shaped.with_shapes(self, shapes)

    def encode(self, x_D: Tensor, *, key: int = 0) -> Encoded:
        """Keep the largest, give them one magnitude a tensor."""
        size, x_D = len(x_D), x_D.contiguous()
        lengths = self._lengths(size)
        keys = splitmix.words(key, len(lengths)).tolist()
        counts, units = [], []
        at, said = [x_D.new_zeros(0, dtype=torch.int64)], [x_D.new_zeros(0, dtype=torch.uint8)]
        start = 0
        for length, tensor_key in zip(lengths, keys, strict=True):
            x_T = x_D[start : start + length]
            place_K, unit, symbol_K = self._tensor(x_T, tensor_key)
            counts.append(len(place_K))
            units.append(unit)
            at.append(place_K + start)
            said.append(symbol_K)
            start += length
        kept = Kept(counts, units, torch.cat(at), torch.cat(said))
        return Encoded(self.pack(kept, size), self._decoded(kept, size))

    def decode(self, payload: bytes, size: int, device: torch.device | str = "cpu") -> Decoded:
        """Return the kept elements; the rest is not touched."""
        return self._decoded(self.unpack(payload, size, device), size)

    def bound(self, size: int) -> int:
        """Return the size under the worst number and placing of kept elements."""
        lengths = self._lengths(size)
        keeps = [self._keep(n) for n in lengths]
        head, least, most = 1 + 4 * len(keeps), sum(keeps), sum(keeps)
        if self.select == "threshold":
            head += 4 * len(keeps)
            least = sum(selection.least_kept(k) for k in keeps)
            most = sum(min(selection.most_kept(k), n) for k, n in zip(keeps, lengths, strict=True))
        coded = symbols.squeezed_bound(most, 1 << self.bits, self.entropy)
        return head + coded + places.most_bytes(least, most, size)

    def pack(self, kept: Kept, size: int) -> bytes:
        """Return the payload of what is kept."""
        numbers = (kept.counts if self.select == "threshold" else []) + kept.units
        return bits.join(
            (
                bytes([VERSION]),
                b"".join(n.to_bytes(4, "little") for n in numbers),
                *symbols.squeezed(kept.symbols, 1 << self.bits, self.entropy),
                places.write(kept.places, size),
            )
        )

    def unpack(self, payload: bytes, size: int, device: torch.device | str = "cpu") -> Kept:
        """Return what is kept; inverse of `pack`, refuses everything else."""
        lengths = self._lengths(size)
        reader = bits.Reader(payload, device)
        if (version := reader.number(1)) != VERSION:
            raise PayloadError(f"unknown version {version}")
        counts = [self._keep(n) for n in lengths]
        if self.select == "threshold":
            stated = _numbers(reader, len(lengths))
            for n, k, count in zip(lengths, counts, stated, strict=True):
                if not selection.least_kept(k) <= count <= min(selection.most_kept(k), n):
                    raise PayloadError(f"{count} kept of {n}, where about {k} were expected")
            counts = stated
        units = _numbers(reader, len(lengths))
        symbol_K = symbols.expanded(reader, sum(counts), 1 << self.bits, self.entropy)
        kept = Kept(counts, units, places.read(reader, sum(counts), size), symbol_K)
        self._check(kept, lengths)
        return kept

    def _tensor(self, x_T: Tensor, key: int) -> tuple[Tensor, int, Tensor]:
        """Return places, unit and symbols of one tensor."""
        keep = self._keep(len(x_T))
        if self.select == "exact":
            place_K = selection.top(x_T, keep)
        else:
            place_K = selection.threshold(x_T, keep, key)
        x_K = _integers(x_T[place_K])
        unit = self._deviation(x_T) if self.magnitude == "std" else self._unit(x_K.abs())
        if unit == 0:  # one canonical form of nothing
            return torch.arange(keep, device=x_T.device), 0, x_K.new_zeros(keep, dtype=torch.uint8)
        symbol_K = (x_K < 0).to(torch.uint8)
        if self.bits > 1:
            symbol_K += 2 * self._levels(x_K.abs(), unit).to(torch.uint8)
        return place_K, unit, symbol_K

    def _unit(self, magnitude_K: Tensor) -> int:
        """Return the unit that leaves least behind of those tried, from integer sums alone."""
        count = len(magnitude_K)
        mean = (2 * int(magnitude_K.sum()) + count) // (2 * count)
        if self.bits == 1:
            return mean
        # The unit that reaches one huge element can leave more than there was. With the mean the
        # first level alone leaves less, so the best of all tried does.
        reach = -(-int(magnitude_K.amax()) // ((1 << self.bits) - 1))
        wanted = [mean, *(reach >> i for i in range(HALVINGS))]
        tried: set[int] = {min(unit, self._most) for unit in wanted if unit}
        left = {unit: self._left(magnitude_K, unit) for unit in sorted(tried)}
        return min(left, key=left.__getitem__, default=0)

    def _left(self, magnitude_K: Tensor, unit: int) -> int:
        level_K = self._levels(magnitude_K, unit)
        return sum_of_squares(magnitude_K - (2 * level_K + 1) * unit)

    def _deviation(self, x_T: Tensor) -> int:
        """Return alpha times the unbiased standard deviation, from integer sums alone."""
        count, total, squares = len(x_T), 0, 0
        for start in range(0, count, SLAB):
            values = to_integers(x_T[start : start + SLAB])
            total += int(values.sum())
            squares += sum_of_squares(values)
        alpha = Fraction(self.alpha)
        above = (count * squares - total * total) * alpha.numerator**2
        below = count * max(count - 1, 1) * alpha.denominator**2
        twice = math.isqrt(4 * above // below)
        return min((twice + 1) // 2, INT32_MAX)

    def _levels(self, magnitude_K: Tensor, unit: int) -> Tensor:
        return (magnitude_K // (2 * unit)).clamp(max=2 ** (self.bits - 1) - 1)

    def _decoded(self, kept: Kept, size: int) -> Decoded:
        return Decoded(size, _values(kept), kept.places)

    def _check(self, kept: Kept, lengths: list[int]) -> None:
        """Refuse places outside their tensor, values outside int32, and signs of zeros."""
        device = kept.places.device
        ends = torch.tensor([0, *lengths], device=device).cumsum(0)
        if torch.searchsorted(kept.places, ends).diff().tolist() != kept.counts:
            raise PayloadError("a tensor keeps more or fewer elements than stated")
        first = 0
        for start, n, unit, count in zip(
            ends.tolist()[:-1], lengths, kept.units, kept.counts, strict=True
        ):
            at, said = (v[first : first + count] for v in (kept.places, kept.symbols))
            if (int(said.max()) | 1) * unit > INT32_MAX:
                raise PayloadError("value outside int32")
            first_ones = count == self._keep(n) and int(at[-1]) == start + count - 1
            if unit == 0 and (not first_ones or bool(said.any())):
                raise PayloadError("magnitude zero must keep the first elements, unsigned")
            first += count

    @property
    def _most(self) -> int:
        """Return the largest unit whose top level is within int32."""
        return INT32_MAX // ((1 << self.bits) - 1)

    def _keep(self, length: int) -> int:
        return max(1, int(length * self.density))

    def _lengths(self, size: int) -> list[int]:
        shapes = shaped.tensors(self.shapes if self.scope == "tensor" else None, size)
        return [math.prod(shape) for shape in shapes]


def _values(kept: Kept) -> Tensor:
    """Return ±(2j + 1)·u as int32."""
    values_K = (kept.symbols | 1).to(torch.int32)  # 2j + 1, whatever the sign
    values_K *= 1 - 2 * (kept.symbols & 1).to(torch.int32)
    first = 0
    for unit, count in zip(kept.units, kept.counts, strict=True):
        values_K[first : first + count] *= unit
        first += count
    return values_K


def _integers(x_K: Tensor) -> Tensor:
    """Return `to_integers` as int32, a slab at a time."""
    values_K = torch.empty(len(x_K), dtype=torch.int32, device=x_K.device)
    for start in range(0, len(x_K), SLAB):
        values_K[start : start + SLAB] = to_integers(x_K[start : start + SLAB])
    return values_K


def _numbers(reader: bits.Reader, count: int) -> list[int]:
    data = reader.take(4 * count).cpu().numpy().tobytes()
    return [int.from_bytes(data[i : i + 4], "little") for i in range(0, len(data), 4)]


def _one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{name} = {value!r}; use one of {', '.join(known)}")
