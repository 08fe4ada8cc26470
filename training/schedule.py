"""How the learning rate changes over the whole run, as a factor of the run's progress in [0, 1]."""

import math
from collections.abc import Callable

COOLDOWN = 0.2
"""Fraction of the run over which `wsd` falls to zero."""


def constant(progress: float) -> float:
    """Return 1."""
    return 1.0


def cosine(progress: float) -> float:
    """Return half a cosine from 1 to 0."""
    return 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def wsd(progress: float) -> float:
    """Return 1, then a line to 0 over the last fifth (warm-up, stable, decay; no warm-up here)."""
    return max(0.0, min(1.0, (1 - progress) / COOLDOWN))


SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": constant,
    "cosine": cosine,
    "wsd": wsd,
}
