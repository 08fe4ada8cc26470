"""A vector as far as it lies in one random subspace of D dimensions, the same for the whole run.

Li et al., "Measuring the intrinsic dimension of objective landscapes", 2018, arXiv 1804.08838,
sec. 2: train u of D numbers in θ = θ_0 + P·u, with P fixed. Here P has one entry a row: parameter i
belongs to one of D buckets, h(i), with a sign,

    x_i = σ_i · u_h(i),   h(i) = below(word i, D),   σ_i = 1 - 2 · bit 0 of word i

of SplitMix64 keyed by key(run, COMMON, 0, 0, domain = PROJECTION). So columns are at right angles,
making x costs one operation an element, and `encode` is the orthogonal projection: u_b is the mean
of σ_i · x_i over the bucket. What is at right angles to the subspace is never sent. Sums of updates
are sums of u: everyone trains in the same D dimensions. A vector of fewer than D elements has as
many buckets as elements.

Payload: u as `dense` says it, with `bits` a number. Where no parameter belongs to a bucket, its
number is zero.
"""

from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from shoal.compression import entropy, perturbation, seeded, splitmix
from shoal.compression.codec import Decoded, Encoded, Origin, PayloadError, codec
from shoal.compression.codecs.dense import Content, Dense

MOST = 1 << 24
"""Most dimensions."""
TABLES = 2
"""Tables of buckets that are kept, 4 bytes a parameter each."""
_SLAB = 1 << 22
"""Elements at a time, so that no temporary is as large as the model."""


class Buckets(NamedTuple):
    """Which element belongs where."""

    place: Tensor
    """int32[d]: the bucket; plus the number of buckets where the sign is -1."""
    sizes: Tensor
    """int64[D]: how many elements each has."""


@codec("subspace")
@dataclass(frozen=True, slots=True)
class Subspace:
    """Send D numbers whatever the model's size: for training in few dimensions."""

    dimension: int = 1024
    """D: how many numbers are trained and sent."""
    bits: int = 8
    """Bits of a number before entropy coding: 4 or 8."""
    block: int = 256
    """Numbers that share a scale, a multiple of 8; 0: all."""
    entropy: str = "auto"
    """How numbers are coded: auto, none or huffman; range, zstd or any only without a ledger."""
    origin: Origin = field(default=Origin(), init=False, repr=False)

    def __post_init__(self) -> None:
        """Refuse what has no layout."""
        if not 1 <= self.dimension <= MOST:
            raise ValueError(f"dimension = {self.dimension}; use 1 to {MOST}")
        if self.bits not in (4, 8):
            raise ValueError(f"bits = {self.bits}; use 4 or 8")
        _ = self._numbers  # refuses what else has no layout

    @property
    def inexact(self) -> str:
        """Say why a library's streams are not for the ledger."""
        return entropy.library(self.entropy)

    def at(self, origin: Origin) -> "Subspace":
        """Return the codec for payloads of this origin, of which the run alone matters."""
        return seeded.with_origin(self, origin)

    def dimensions(self, size: int) -> int:
        """Return how many numbers stand for a vector of `size` elements."""
        return min(self.dimension, size)

    def spread(self, u_D: Tensor, size: int) -> Tensor:
        """Return P·u: x of `size` elements, of the type and on the device of u."""
        if u_D.shape != (self.dimensions(size),):
            raise ValueError(f"wanted {self.dimensions(size)} numbers, got {tuple(u_D.shape)}")
        both = torch.cat((u_D, -u_D))
        return both.index_select(0, self._buckets(size, u_D.device).place)

    def gather(self, x_N: Tensor, *, mean: bool = False) -> Tensor:
        """Return Pᵀ·x (what a gradient in x is in u), or its orthogonal projection with `mean`.

        float32, the same on every device: sums are of integers, as `perturbation.along`. Then
        gather(spread(u), mean=True) is u but for one rounding of each element. Raise ValueError for
        NaN and infinity.
        """
        buckets, power = self._buckets(len(x_N), x_N.device), perturbation.exponent(x_N)
        dimensions = len(buckets.sizes)
        total = torch.zeros(2 * dimensions, dtype=torch.int64, device=x_N.device)
        for start in range(0, len(x_N), _SLAB):
            whole = perturbation.whole(x_N[start : start + _SLAB], power).to(torch.int64)
            total.index_add_(0, buckets.place[start : start + _SLAB], whole)
        u_D = (total[:dimensions] - total[dimensions:]).to(torch.float64) * 2.0**-power
        if mean:
            u_D = u_D / buckets.sizes.clamp(min=1)
        return u_D.to(torch.float32)

    def encode(self, x_D: Tensor, *, key: int = 0) -> Encoded:
        """Project, and round the numbers."""
        payload, found = self._numbers.encode(self.gather(x_D, mean=True), key=key)
        return Encoded(payload, Decoded(len(x_D), self.spread(found.dense(), len(x_D))))

    def decode(self, payload: bytes, size: int, device: torch.device | str = "cpu") -> Decoded:
        """Return the vector whose projection was sent."""
        return Decoded(size, self.spread(self._read(payload, size, device), size))

    def bound(self, size: int) -> int:
        """Return the most bytes that so many numbers can have."""
        return self._numbers.bound(self.dimensions(size))

    def pack(self, content: Content, size: int) -> bytes:
        """Return the payload of the numbers as `dense` holds them."""
        return self._numbers.pack(content, self.dimensions(size))

    def unpack(self, payload: bytes, size: int, device: torch.device | str = "cpu") -> Content:
        """Return the numbers as `dense` holds them; inverse of `pack`, refuses everything else."""
        self._read(payload, size, device)
        return self._numbers.unpack(payload, self.dimensions(size), device)

    def _read(self, payload: bytes, size: int, device: torch.device | str) -> Tensor:
        """Return u, or refuse it."""
        u_D = self._numbers.decode(payload, self.dimensions(size), device).values
        empty_D = self._buckets(size, u_D.device).sizes == 0
        if bool((empty_D & (u_D != 0)).any()):
            raise PayloadError("a bucket without parameters has a number")
        return u_D

    def _buckets(self, size: int, device: torch.device) -> Buckets:
        return _buckets(self.origin.run[:16], size, self.dimensions(size), device)

    @property
    def _numbers(self) -> Dense:
        """Return the codec of u."""
        return Dense(bits=self.bits, block=self.block, entropy=self.entropy)


@lru_cache(maxsize=TABLES)
def _buckets(run: bytes, size: int, dimensions: int, device: torch.device) -> Buckets:
    key = perturbation.key(run, perturbation.COMMON, 0, 0, domain=perturbation.PROJECTION)
    place = torch.empty(size, dtype=torch.int32, device=device)
    for start in range(0, size, _SLAB):
        words = splitmix.words(key, min(_SLAB, size - start), start=start, device=device)
        minus = (words & 1) * dimensions
        place[start : start + _SLAB] = splitmix.below(words, dimensions) + minus
    both = torch.zeros(2 * dimensions, dtype=torch.int64, device=device)
    both.index_add_(0, place, torch.ones((), dtype=torch.int64, device=device).expand(size))
    return Buckets(place, both[:dimensions] + both[dimensions:])
