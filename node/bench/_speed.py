"""How quickly something is done, beside this machine's own speed of copying."""

import math
import time
from collections.abc import Callable

from shoal.node.bench._device import wait

LEAST_SECONDS = 0.2
"""The best is taken of so many repetitions as are asked for, or of more until they took so long."""
COPIED = 1 << 25
"""Elements in the yardstick: more than caches hold."""


def best(
    act: Callable[[], object],
    repeats: int,
    device: str,
    *,
    before: Callable[[], object] = lambda: None,
) -> float:
    """Return the seconds of the quickest of several, each after an untimed `before`."""
    least, total, count = math.inf, 0.0, 0
    while count < repeats or (repeats > 1 and total < LEAST_SECONDS):
        before()
        wait(device)
        begun = time.perf_counter()
        act()
        wait(device)
        seconds = time.perf_counter() - begun
        least, total, count = min(least, seconds), total + seconds, count + 1
    return least


def copying(device: str) -> float:
    """Return how many float32 are copied per second, from memory to memory."""
    import torch

    x_D, y_D = torch.ones(COPIED, device=device), torch.ones(COPIED, device=device)
    return COPIED / best(lambda: y_D.copy_(x_D), 5, device)
