"""What codecs whose seeds follow from the run know: the update's origin, and the run's seeds."""

from dataclasses import replace
from functools import lru_cache
from typing import Any, TypeVar

import torch
from torch import Tensor

from shoal.compression import perturbation, splitmix
from shoal.compression.codec import Origin

P = TypeVar("P")

POOLS = 4
"""Pools that are kept: as many runs as one process could have something to do with."""


def with_origin(part: P, origin: Origin) -> P:
    """Return the codec for payloads of this origin: its field `origin`, which is no setting."""
    made: Any = replace(part)  # type: ignore[type-var]
    object.__setattr__(made, "origin", origin)
    return made  # type: ignore[no-any-return]


def pool(run: bytes, count: int) -> Tensor:
    """Return the keys of the run's pool of `count` seeds, int64[count]; not to be written to.

    Seed k has the key of sample k of turn 0, which no peer has. Deriving one takes microseconds, so
    they are kept.
    """
    return _pool(run[:16], count)


@lru_cache(maxsize=POOLS)
def _pool(run: bytes, count: int) -> Tensor:
    keys = (perturbation.key(run, perturbation.COMMON, 0, k) for k in range(count))
    return torch.tensor([splitmix.signed(key) for key in keys], dtype=torch.int64)
