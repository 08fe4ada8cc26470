"""A 128-bit linear hash of the model: two lanes of Σᵢ modelᵢ · rₗ(i) mod 2⁶⁴ (design 3.4).

Because it is linear, an update changes it by a sum over the elements it touches. The multipliers
are odd numbers from SplitMix64 in counter form (compression/splitmix.py), one key per lane:
`r(i) = out(i) | 1`.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from shoal.compression import parallel, splitmix

Lanes = tuple[int, int]

KEYS = (0x73686F616C2D6630, 0x73686F616C2D6631)
"""The bytes of `shoal-f0` and `shoal-f1`, read big-endian."""
MASK = 2**64 - 1
CHUNK = 1 << 20
CACHED = 1 << 22
"""Models up to so many parameters keep their multipliers in memory (16 bytes each)."""


def multipliers(lane: int, indices: Tensor) -> Tensor:
    """Return r(i) of a lane for int64 indices."""
    return splitmix.at(KEYS[lane], indices) | 1


def keys() -> tuple[np.uint64, np.uint64]:
    """Return the keys as the compiled loops take them."""
    return np.uint64(KEYS[0]), np.uint64(KEYS[1])


def add(a: Lanes, b: Lanes) -> Lanes:
    """Return a + b, lane by lane."""
    return (a[0] + b[0]) & MASK, (a[1] + b[1]) & MASK


def negate(a: Lanes) -> Lanes:
    """Return -a, lane by lane."""
    return -a[0] & MASK, -a[1] & MASK


class Fingerprint:
    """Computes fingerprints of int32 vectors of one size, and of parts of them, on one device."""

    def __init__(self, size: int, device: torch.device | str = "cpu") -> None:
        self._size = size
        self._device = device
        self._cache: tuple[Tensor, Tensor] | None = None

    def of(self, values: Tensor, start: int = 0) -> Lanes:
        """Return the fingerprint of a vector that is zero but for `values` from index `start`."""
        total: Lanes = (0, 0)
        if values.dtype == torch.int32 and (loops := parallel.kernels(len(values), values)):
            parts = parallel.ranges(
                loops.lanes, len(values), values.contiguous().numpy(), start, *keys()
            )
            for first, second in parts:
                total = add(total, (int(first), int(second)))
            return total
        for at, lanes in self._chunks(start, start + len(values)):
            part = values[at - start : at - start + CHUNK].to(torch.int64)
            total = add(total, _dot(part, lanes))
        return total

    def at(self, indices: Tensor, values: Tensor) -> Lanes:
        """Return the fingerprint of a vector that is zero but for `values` at `indices`."""
        wide = values.to(torch.int64)
        if self._size <= CACHED:
            first, second = self._cached()
            return _dot(wide, (first[indices], second[indices]))
        return _dot(wide, (multipliers(0, indices), multipliers(1, indices)))

    def _chunks(self, start: int, end: int) -> Iterator[tuple[int, tuple[Tensor, Tensor]]]:
        for low in range(start, end, CHUNK):
            high = min(low + CHUNK, end)
            if self._size <= CACHED:
                first, second = self._cached()
                yield low, (first[low:high], second[low:high])
            else:
                yield low, self._generate(low, high)

    def _cached(self) -> tuple[Tensor, Tensor]:
        if self._cache is None:
            self._cache = self._generate(0, self._size)
        return self._cache

    def _generate(self, start: int, end: int) -> tuple[Tensor, Tensor]:
        indices = torch.arange(start, end, dtype=torch.int64, device=self._device)
        return multipliers(0, indices), multipliers(1, indices)


def _dot(values: Tensor, lanes: tuple[Tensor, Tensor]) -> Lanes:
    first, second = ((values * lane).sum() for lane in lanes)  # int64 wraps: mod 2^64
    return int(first) & MASK, int(second) & MASK
