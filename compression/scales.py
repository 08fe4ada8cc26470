"""Integer scales in one byte: a minifloat with three bits of mantissa, in units of q.

Code c below 8 stands for c, else for (8 + c mod 8) · 2^(⌊c/8⌋ - 1); codes above 231 would leave
int32 and are refused. Consecutive scales are at most 1/8 apart.
"""

import torch
from torch import Tensor

from shoal.compression.codec import INT32_MAX, PayloadError

_TABLE = [c if c < 8 else (8 + c % 8) << (c // 8 - 1) for c in range(256)]
SCALES = torch.tensor([s for s in _TABLE if s <= INT32_MAX], dtype=torch.int64)
"""What each byte stands for."""


def largest(most: int) -> int:
    """Return the code of the largest scale that is at most `most`."""
    return int(torch.searchsorted(SCALES, most, right=True)) - 1


def up(wanted_B: Tensor, *, most: int = INT32_MAX) -> Tensor:
    """Return codes (int64) of the smallest scales ≥ `wanted_B`, none above `most`."""
    return torch.searchsorted(SCALES.to(wanted_B.device), wanted_B).clamp(max=largest(most))


def nearest(twice_B: Tensor, *, most: int = INT32_MAX) -> Tensor:
    """Return codes of the scales nearest to `twice_B` / 2 (so that halves count), ties down."""
    table = SCALES.to(twice_B.device)
    return torch.searchsorted(table[:-1] + table[1:], twice_B).clamp(max=largest(most))


def of(codes_B: Tensor) -> Tensor:
    """Return the scales (int64) that uint8 codes stand for; raise PayloadError at unknown ones."""
    if len(codes_B) and int(codes_B.max()) >= len(SCALES):
        raise PayloadError("scale outside int32")
    return SCALES.to(codes_B.device)[codes_B.to(torch.int64)]
