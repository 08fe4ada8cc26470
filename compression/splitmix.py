"""SplitMix64 in counter form: the one source of chance that peers agree on, bit for bit.

    out(i) = mix(key + (i + 1) · 0x9E3779B97F4A7C15)
    mix(z): z = (z ^ z>>30) · 0xBF58476D1CE4E5B9;  z = (z ^ z>>27) · 0x94D049BB133111EB;  z ^ z>>31

All in wrapping 64-bit integers, so that CPU, CUDA and numpy agree (Steele, Lea and Flood, "Fast
splittable pseudorandom number generators", 2014). Any word is had without those before it.
"""

import torch
from torch import Tensor


def signed(value: int) -> int:
    """Return the int64 with the bits of an unsigned 64-bit value."""
    value &= 2**64 - 1
    return value - 2**64 if value >= 2**63 else value


STEP = signed(0x9E3779B97F4A7C15)
MUL1 = signed(0xBF58476D1CE4E5B9)
MUL2 = signed(0x94D049BB133111EB)


def mix(z: Tensor) -> Tensor:
    """Return the finaliser of every int64."""
    z = (z ^ shift(z, 30)) * MUL1
    z = (z ^ shift(z, 27)) * MUL2
    return z ^ shift(z, 31)


def at(key: int, indices: Tensor) -> Tensor:
    """Return out(i) for int64 indices, as int64 with the same bits."""
    return mix((indices + 1) * STEP + signed(key))


def words(key: int, count: int, *, start: int = 0, device: torch.device | str = "cpu") -> Tensor:
    """Return out(start) … out(start + count - 1)."""
    return at(key, torch.arange(start, start + count, dtype=torch.int64, device=device))


def below(words_N: Tensor, bounds: int | Tensor) -> Tensor:
    """Return ⌊u · bound⌋ for u = the upper 32 bits of each word / 2³²; bounds below 2³¹."""
    return (shift(words_N, 32) * bounds) >> 32


def shift(z: Tensor, by: int) -> Tensor:
    """Shift right without the sign."""
    return (z >> by) & ((1 << (64 - by)) - 1)
