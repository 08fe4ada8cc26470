"""A 128-bit linear hash of the model: two lanes of Σᵢ modelᵢ · rₗ(i) mod 2⁶⁴ (design 3.4).

Because it is linear, an update changes it by a sum over the elements it touches. The multipliers
are odd numbers from SplitMix64 in counter form, in wrapping 64-bit integers:
`r(i) = mix(key + (i + 1)·0x9E3779B97F4A7C15) | 1`, one key per lane.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

Lanes = tuple[int, int]

KEYS = (0x73686F616C2D6630, 0x73686F616C2D6631)
"""The bytes of `shoal-f0` and `shoal-f1`, read big-endian."""
MASK = 2**64 - 1
CHUNK = 1 << 20
CACHED = 1 << 22
"""Models up to so many parameters keep their multipliers in memory (16 bytes each)."""


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value


_STEP = _signed(0x9E3779B97F4A7C15)
_MUL1 = _signed(0xBF58476D1CE4E5B9)
_MUL2 = _signed(0x94D049BB133111EB)


def _shift(z: Tensor, by: int) -> Tensor:
    """Shift right without the sign."""
    return (z >> by) & ((1 << (64 - by)) - 1)


def multipliers(lane: int, indices: Tensor) -> Tensor:
    """Return r(i) of a lane for int64 indices."""
    z = (indices + 1) * _STEP + _signed(KEYS[lane])
    z = (z ^ _shift(z, 30)) * _MUL1
    z = (z ^ _shift(z, 27)) * _MUL2
    return (z ^ _shift(z, 31)) | 1


def add(a: Lanes, b: Lanes) -> Lanes:
    """Return a + b, lane by lane."""
    return (a[0] + b[0]) & MASK, (a[1] + b[1]) & MASK


def negate(a: Lanes) -> Lanes:
    """Return -a, lane by lane."""
    return -a[0] & MASK, -a[1] & MASK


class Fingerprint:
    """Computes fingerprints of int32 vectors of one size on one device."""

    def __init__(self, size: int, device: torch.device | str = "cpu") -> None:
        self._size = size
        self._device = device
        self._cache = self._generate(0, size) if size <= CACHED else None

    def of(self, values_D: Tensor) -> Lanes:
        """Return the fingerprint of a whole vector, or of a change that touches everything."""
        total: Lanes = (0, 0)
        for start, lanes in self._chunks():
            part = values_D[start : start + CHUNK].to(torch.int64)
            total = add(total, _dot(part, lanes))
        return total

    def at(self, indices: Tensor, values: Tensor) -> Lanes:
        """Return the fingerprint of a vector that is zero but for `values` at `indices`."""
        wide = values.to(torch.int64)
        if self._cache is not None:
            return _dot(wide, (self._cache[0][indices], self._cache[1][indices]))
        return _dot(wide, (multipliers(0, indices), multipliers(1, indices)))

    def _chunks(self) -> Iterator[tuple[int, tuple[Tensor, Tensor]]]:
        for start in range(0, self._size, CHUNK):
            end = min(start + CHUNK, self._size)
            if self._cache is None:
                yield start, self._generate(start, end)
            else:
                yield start, (self._cache[0][start:end], self._cache[1][start:end])

    def _generate(self, start: int, end: int) -> tuple[Tensor, Tensor]:
        indices = torch.arange(start, end, dtype=torch.int64, device=self._device)
        return multipliers(0, indices), multipliers(1, indices)


def _dot(values: Tensor, lanes: tuple[Tensor, Tensor]) -> Lanes:
    first, second = ((values * lane).sum() for lane in lanes)  # int64 wraps: mod 2^64
    return int(first) & MASK, int(second) & MASK
