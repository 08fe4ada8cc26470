"""Groups of values as mantissas of few bits times one integer scale a group.

A group of values v shares a scale s (one byte, `scales.py`); with b bits a value becomes

    b = 1   ±s,             s near mean |v|
    b = 2   m·s, |m| ≤ 1,   s near 1.5 · mean |v|
    b > 2   m·s, |m| < 2^(b-1),   s the smallest scale that reaches the largest |v|

and the symbol m + 2^(b-1) - 1 (b = 1: 0 is -s, 1 is +s). Rounding to the nearest of levels that
have 0 among them never makes an element's error larger than the element, whatever else is in its
group; levels without 0 would, beside one large value. Stochastic rounding is unbiased: s reaches
the largest |v| for every b, and the chance to round up is the distance from the level below, in
steps (QSGD: Alistarh et al. 2017, sec. 3.1).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from shoal.compression import scales, splitmix
from shoal.compression.codec import INT32_MAX, PayloadError


class Groups(NamedTuple):
    """Values as mantissas."""

    codes: Tensor
    """uint8, one per group: its scale."""
    symbols: Tensor
    """uint8, one per value."""


def alphabet(width: int) -> int:
    """Return the number of symbols of `width` bits."""
    return 2 if width == 1 else 2 * top(width) + 1


def top(width: int) -> int:
    """Return the largest mantissa of `width` bits."""
    return max(1, (1 << (width - 1)) - 1)


def nearest(values_K: Tensor, lengths_G: Tensor, width: int) -> Groups:
    """Round int64 values within int32 to their groups' nearest levels, ties to the smaller."""
    magnitude_K, group_K = values_K.abs(), torch.repeat_interleave(lengths_G)
    if width > 2:
        codes_G = _reaching(magnitude_K, group_K, len(lengths_G), width)
    else:
        sum_G = lengths_G.new_zeros(len(lengths_G)).index_add(0, group_K, magnitude_K)
        codes_G = scales.nearest((width + 1) * sum_G // lengths_G)
    scale_K = scales.of(codes_G)[group_K]
    if width == 1:
        symbols_K = ((values_K >= 0) | (scale_K == 0)).to(torch.uint8)
    else:
        size_K = (2 * magnitude_K + scale_K - 1) // (2 * scale_K).clamp(min=1)
        size_K = torch.where(scale_K > 0, size_K, 0).clamp(max=top(width))
        symbols_K = (size_K * values_K.sign() + top(width)).to(torch.uint8)
    return Groups(codes_G.to(torch.uint8), symbols_K)


def stochastic(values_K: Tensor, lengths_G: Tensor, width: int, words_K: Tensor) -> Groups:
    """Round int64 values up or down so that the mean over random words is the value.

    Values that no scale reaches are cut off: those within 1/15 of 2³¹, or beyond it.
    """
    group_K = torch.repeat_interleave(lengths_G)
    codes_G = _reaching(values_K.abs(), group_K, len(lengths_G), width)
    scale_K = scales.of(codes_G)[group_K]
    step_K = (2 * scale_K if width == 1 else scale_K).clamp(min=1)
    reach_K = scale_K * top(width)
    above_K = (values_K + reach_K).clamp(min=0).minimum(2 * reach_K)
    level_K = above_K // step_K
    # ⌊u · step⌋ with u = 31 bits of the word / 2³¹: the product stays within int64.
    draw_K = (splitmix.shift(words_K, 33) * step_K) >> 31
    level_K += (draw_K < above_K - level_K * step_K).to(torch.int64)
    symbols_K = torch.where(scale_K > 0, level_K, top(width))
    return Groups(codes_G.to(torch.uint8), symbols_K.to(torch.uint8))


def values(groups: Groups, lengths_G: Tensor, width: int) -> Tensor:
    """Return m·s as int64, or raise PayloadError: outside int32, or symbols under scale zero."""
    symbols_K = groups.symbols.to(torch.int64)
    scale_K = scales.of(groups.codes)[torch.repeat_interleave(lengths_G)]
    mantissa_K = 2 * symbols_K - 1 if width == 1 else symbols_K - top(width)
    idle = 1 if width == 1 else top(width)
    if bool(((scale_K == 0) & (symbols_K != idle)).any()):
        raise PayloadError("a group of scale zero has symbols")
    values_K = mantissa_K * scale_K
    if bool((values_K.abs() > INT32_MAX).any()):
        raise PayloadError("value outside int32")
    return values_K


def _reaching(magnitude_K: Tensor, group_K: Tensor, groups: int, width: int) -> Tensor:
    """Return codes of the smallest scales whose largest mantissa reaches each group's largest."""
    largest_G = magnitude_K.new_zeros(groups).scatter_reduce(0, group_K, magnitude_K, "amax")
    return scales.up(-(-largest_G // top(width)), most=INT32_MAX // top(width))
