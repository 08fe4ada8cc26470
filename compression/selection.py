"""Which elements of a vector are kept: the largest, those above a threshold, one of each stratum.

Magnitudes are compared as the bits of |x|, which order like the numbers: no rounding, the same on
every device; NaN and infinity are those from 0x7F800000 up. Among equals the smaller index wins.
"""

import importlib
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shoal.compression import parallel, splitmix

INFINITE = 0x7F800000
TRIES = 10
SAMPLES = 10_000


def top(x_D: Tensor, keep: int) -> Tensor:
    """Return the indices of the `keep` largest |x|, increasing; refuse non-finite elements."""
    if (loops := _loops(x_D)) is not None:
        found: Tensor = loops.top(x_D, keep)
        return found
    bits_D = _checked(magnitude_bits(x_D))
    return top_of_rows(bits_D[None], keep)


def top_of_rows(rows_CN: Tensor, keep: int) -> Tensor:
    """Return flat indices of the `keep` largest of each row, increasing; the smaller of equals."""
    least_C1 = rows_CN.topk(keep, dim=1, sorted=False).values.amin(1, keepdim=True)
    above_CN, equal_CN = rows_CN > least_C1, rows_CN == least_C1
    free_C1 = keep - above_CN.sum(1, keepdim=True)
    if bool((equal_CN.sum(1, keepdim=True) > free_C1).any()):
        equal_CN &= equal_CN.cumsum(1) <= free_C1
    return (above_CN | equal_CN).reshape(-1).nonzero().reshape(-1)


def least_kept(keep: int) -> int:
    """Return the fewest elements that `threshold` returns: 0.7 of what is asked for."""
    return -(-7 * keep // 10)


def most_kept(keep: int) -> int:
    """Return the most elements that `threshold` returns: 1.3 times what is asked for."""
    return 13 * keep // 10


def threshold(x_D: Tensor, keep: int, key: int) -> Tensor:
    """Return the indices of about the `keep` largest |x|, increasing, in one pass or few.

    A sample says where the threshold is about (Lin et al., "Deep gradient compression", 2018, sec.
    3.1), everything from there up is kept. Too many: exact `top`. Too few: the threshold is divided
    by 1.3 and tried again; after ten tries, exact `top`.
    """
    size = len(x_D)
    most = min(most_kept(keep), size)
    bits_D = x_D.view(torch.int32)
    samples = min(size, max(SAMPLES, size // 100))
    sample_S = bits_D[one_of_each(key, size, samples, x_D.device)[0]] & 0x7FFFFFFF
    rank = -(-keep * samples // size)
    least = int(sample_S.topk(rank, sorted=False).values.amin())
    for _ in range(1 + TRIES):
        index_K = _from(x_D, least, most)
        if index_K is None:
            break
        if len(index_K) >= least_kept(keep):
            return index_K
        lower = np.array(least, np.int32).view(np.float32) / np.float32(1.3)
        least = int(np.float32(lower).view(np.int32))
    return top(x_D, keep)


def one_of_each(
    key: int, size: int, strata: int, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """Return one random index of each of `strata` ≤ size equal parts, and the parts' lengths.

    Part i is from ⌊i·size/strata⌋ up to the next, so lengths differ by one at most; its index is
    word i of SplitMix64 times its length. O(strata) integers, each index had without the others.
    """
    edges = torch.arange(strata + 1, dtype=torch.int64, device=device) * size // strata
    lengths_K = edges.diff()
    return edges[:-1] + splitmix.below(
        splitmix.words(key, strata, device=device), lengths_K
    ), lengths_K


def magnitude_bits(x_D: Tensor) -> Tensor:
    """Return the bits of |x| as int32, which order like |x|."""
    return x_D.view(torch.int32) & 0x7FFFFFFF


def refuse_non_finite(largest_bits: int) -> None:
    """Raise ValueError if these bits of a magnitude are not a number's."""
    if largest_bits >= INFINITE:
        raise ValueError("cannot encode a vector with NaN or infinite elements")


def _from(x_D: Tensor, least: int, most: int) -> Tensor | None:
    """Return the indices of elements whose bits are `least` or more; None: more than `most` are."""
    if (loops := _loops(x_D)) is not None:
        found: Tensor | None = loops.between(x_D, least, INFINITE, most)
        return found
    kept_D = _checked(magnitude_bits(x_D)) >= least
    return None if int(kept_D.sum()) > most else kept_D.nonzero().reshape(-1)


def _checked(bits_D: Tensor) -> Tensor:
    refuse_non_finite(int(bits_D.amax()))
    return bits_D


def _loops(x_D: Tensor) -> Any:
    """Return the compiled loops if they serve this vector, else None."""
    if parallel.kernels(len(x_D), x_D) is None:
        return None
    return importlib.import_module("shoal.compression.kernels_topk")
