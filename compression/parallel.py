"""When a vector is worth compiled loops (kernels.py), and how they are spread over threads.

Numba takes most of a second to import and its loops run on the CPU alone, so only large vectors
that lie there use it; everything else takes the torch code beside it, which gives equal results.
"""

import importlib
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

LARGE = 1 << 18
"""Elements from which it pays to load the compiled loops."""
LOADED = 1 << 13
"""Elements from which they are used once they are there."""

_MODULE = "shoal.compression.kernels"

T = TypeVar("T")


def kernels(count: int, *vectors: Tensor) -> Any:
    """Return the module of compiled loops if it serves `count` elements of these, else None."""
    least = LOADED if _MODULE in sys.modules else LARGE
    if count < least or any(v.device.type != "cpu" for v in vectors):
        return None
    return _compiled()


def ranges(work: Callable[..., T], count: int, *arguments: object) -> list[T]:
    """Call `work(start, end, *arguments)` on equal parts of [0, count), one a thread, in order."""
    threads = max(min(torch.get_num_threads(), count), 1)
    ends = [count * i // threads for i in range(threads + 1)]
    if threads == 1:
        return [work(0, count, *arguments)]
    calls = [_pool(threads).submit(work, start, end, *arguments) for start, end in pairwise(ends)]
    return [call.result() for call in calls]


def empty(count: int, dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
    """Return an unset vector. On the CPU it comes from numpy, which asks for huge pages.

    First touching 200 MB took 0.016 s so, and 0.09 s in the memory that torch gets.
    """
    if torch.device(device).type != "cpu":
        return torch.empty(count, dtype=dtype, device=device)
    return torch.from_numpy(np.empty(count, str(dtype).removeprefix("torch.")))


def zeros(count: int, dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
    """Return a vector of zeros. On the CPU it comes from numpy, which lets the system make them.

    Torch writes them with all its threads, and on a machine whose cores are in use they wait for
    each other: 3 ms for 300,000 where one thread takes 0.02.
    """
    if torch.device(device).type != "cpu":
        return torch.zeros(count, dtype=dtype, device=device)
    return torch.from_numpy(np.zeros(count, str(dtype).removeprefix("torch.")))


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="shoal-kernel")


@cache
def _compiled() -> Any:
    try:
        return importlib.import_module(_MODULE)
    except ImportError:  # numba is not there for this machine; torch serves
        return None
