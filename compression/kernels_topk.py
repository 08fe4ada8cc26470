"""The loops of `selection` over large vectors on the CPU: same results, one pass over memory each.

Threads take equal parts of the vector; what they find is put together in the order of the parts, so
their number changes nothing. Import this through `selection` alone.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shoal.compression import parallel, selection
from shoal.compression.kernels import compiled

Bits = NDArray[np.int32]
LOW = 15
"""Bits of a magnitude that the second histogram counts; the first counts the 16 above."""


def top(x_D: Tensor, keep: int) -> Tensor:
    """Return the indices of the `keep` largest |x|, increasing; refuse non-finite elements.

    Two histograms find the smallest magnitude that is kept, a third pass collects.
    """
    high = _histogram(x_D, LOW, 0, 1 << 31)
    selection.refuse_non_finite(int(high.nonzero()[0][-1]) << LOW)
    bucket, above = _bucket(high, keep)
    low = _histogram(x_D, 0, bucket << LOW, (bucket + 1) << LOW)
    rest, above_in_bucket = _bucket(low, keep - above)
    above, least = above + above_in_bucket, (bucket << LOW) + rest
    if above + int(low[rest]) == keep:
        return _collect(x_D, least, selection.INFINITE, keep)[0]
    larger_K = _collect(x_D, least + 1, selection.INFINITE, above)[0]
    equal_K = _collect(x_D, least, least + 1, keep - above)[0]
    return torch.cat((larger_K, equal_K)).sort().values


def between(x_D: Tensor, least: int, below: int, most: int) -> Tensor | None:
    """Return the indices of elements with `least` ≤ bits of |x| < `below`; None: above `most`."""
    index_K, count, largest = _collect(x_D, least, below, most)
    selection.refuse_non_finite(largest)
    return None if count > most else index_K


def _histogram(x_D: Tensor, shift: int, start: int, end: int) -> NDArray[np.int64]:
    """Count the magnitudes from `start` to `end` by their bits from `shift` up."""
    bits = x_D.view(torch.int32).numpy()

    def count(first: int, last: int) -> NDArray[np.int64]:
        counts = np.zeros(min(end - start, 1 << 31) >> shift, np.int64)
        _count(bits[first:last], shift, start, end - 1, counts)
        return counts

    return sum(parallel.ranges(count, len(bits)), np.zeros(1, np.int64))


def _bucket(counts: NDArray[np.int64], keep: int) -> tuple[int, int]:
    """Return which bucket holds the `keep`-th largest, and how many lie above that bucket."""
    from_top = np.cumsum(counts[::-1])
    bucket = int(np.searchsorted(from_top, keep))
    return len(counts) - 1 - bucket, int(from_top[bucket] - counts[len(counts) - 1 - bucket])


def _collect(x_D: Tensor, least: int, below: int, most: int) -> tuple[Tensor, int, int]:
    """Return the first `most` indices in range, how many there are in all, the largest bits."""
    bits = x_D.view(torch.int32).numpy()

    def pick(first: int, last: int) -> tuple[int, Bits, int, int]:
        # Pages that nothing is written to take no memory.
        found = np.empty(min(most, last - first) + 1, np.int32)
        count, largest = _pick(bits[first:last], least, below - 1, most, found)
        return first, found, count, largest

    parts = parallel.ranges(pick, len(bits))
    total = sum(count for _, _, count, _ in parts)
    index, at = np.empty(min(total, most), np.int64), 0
    for first, found, count, _ in parts:
        taken = min(count, len(index) - at)
        np.add(found[:taken], first, out=index[at : at + taken], dtype=np.int64)
        at += taken
    return torch.from_numpy(index), total, max(largest for _, _, _, largest in parts)


@compiled
def _count(bits: Bits, shift: int, start: int, last: int, counts: NDArray[np.int64]) -> None:
    for i in range(len(bits)):
        m = np.int64(bits[i] & 0x7FFFFFFF)
        if start <= m <= last:
            counts[(m - start) >> shift] += 1


@compiled
def _pick(
    bits: Bits, least: int, last: int, most: int, found: NDArray[np.int32]
) -> tuple[int, int]:
    """Fill `found` with the first indices in range, up to `most`; return their count, the largest.

    Blocks are looked at twice: all at once (vector instructions), and one by one if any counts.
    """
    low, high, mask = np.int32(least), np.int32(last), np.int32(0x7FFFFFFF)
    count, held, largest = 0, 0, 0
    for start in range(0, len(bits), 64):
        block = bits[start : start + 64]
        here, worst = np.int32(0), np.int32(0)
        for i in range(len(block)):
            m = block[i] & mask
            here += np.int32((m >= low) & (m <= high))
            worst = max(worst, m)
        count += int(here)
        largest = max(largest, int(worst))
        if here and held < most:
            for i in range(len(block)):
                m = block[i] & mask
                found[held] = start + i
                held += (m >= low) & (m <= high)
                if held == most:
                    break
    return count, largest
