"""Who should be whose neighbour: the contract, and the registry of the shapes in topologies/.

A shape is computed by each peer alone from the sorted ring of the living, and two peers with the
same ring agree: `b in neighbours(ring, a)` if and only if `a in neighbours(ring, b)`, bounds aside.
To add one, put a file into topologies/ with a class under `@topology("name")`.
"""

import pkgutil
from bisect import bisect_left
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Protocol, TypeVar

from shoal.gossip import topologies
from shoal.gossip.limits import Limits
from shoal.gossip.names import PeerId

SPACE = 1 << 256
"""Peer ids lie evenly on a ring of 256-bit numbers."""


class Topology(Protocol):
    """One shape."""

    def neighbours(self, ring: Sequence[PeerId], me: PeerId, most: int) -> list[PeerId]:
        """Return at most `most` neighbours of `me`, which is on the sorted ring; dearest first."""
        ...


T = TypeVar("T", bound=Callable[[], Topology])

_makers: dict[str, Callable[[], Topology]] = {}


def topology(name: str) -> Callable[[T], T]:
    """Register a shape under `name`."""

    def register(maker: T) -> T:
        _makers[name] = maker
        return maker

    return register


def names() -> list[str]:
    """Return the known shapes."""
    for module in pkgutil.iter_modules(topologies.__path__):
        import_module(f"{topologies.__name__}.{module.name}")
    return sorted(_makers)


def make(name: str) -> Topology:
    """Return the shape called `name`."""
    if name not in names():
        raise ValueError(f"unknown topology {name!r}; known are {', '.join(names())}")
    return _makers[name]()


def wanted(shape: Topology, ring: Sequence[PeerId], me: PeerId, limits: Limits) -> list[PeerId]:
    """Return whom `me` should dial: the shape's neighbours, with the next on the ring if too few.

    The degrees bound whom we dial. Who points at us dials us, and is accepted up to `neighbours`.
    """
    found = dict.fromkeys(shape.neighbours(ring, me, limits.degree_max))
    for steps in range(1, limits.degree_min + 1):
        if len(found) < limits.degree_min:
            found.update(dict.fromkeys(beside(ring, me, steps)))
    return list(found)


def beside(ring: Sequence[PeerId], me: PeerId, steps: int) -> list[PeerId]:
    """Return the peers up to `steps` places away on both sides, nearest first."""
    at, size = bisect_left(ring, me), len(ring)
    found: dict[PeerId, None] = {}
    for step in range(1, steps + 1):
        found[ring[(at + step) % size]] = None
        found[ring[(at - step) % size]] = None
    found.pop(me, None)
    return list(found)


def across(ring: Sequence[PeerId], me: PeerId, distance: int) -> list[PeerId]:
    """Return whom `me` points at `distance` further on the number ring, and who points at `me`.

    Pointing is by number, not by place: when a peer comes or goes, only the pointers at that peer
    move, not everybody's.
    """
    at, size = bisect_left(ring, me), len(ring)
    target = ring[bisect_left(ring, _plus(me, distance)) % size]
    # Those point at me whose target number lies in (predecessor, me].
    low, high = _plus(ring[at - 1], 1 - distance), _plus(me, 1 - distance)
    first = bisect_left(ring, low)
    span = bisect_left(ring, high) - first + (size if low > high else 0)
    found = dict.fromkeys([target, *(ring[(first + i) % size] for i in range(span))])
    found.pop(me, None)
    return list(found)


def _plus(peer: PeerId, distance: int) -> bytes:
    return ((int.from_bytes(peer, "big") + distance) % SPACE).to_bytes(32, "big")
