"""The contract of every topology, also of the next file put into topologies/."""

import random

import pytest

from shoal.gossip.limits import Limits
from shoal.gossip.names import PeerId
from shoal.gossip.topology import make, names, wanted

SIZES = [1, 2, 3, 4, 5, 8, 33, 200]


def ring_of(size: int) -> list[PeerId]:
    rng = random.Random(size)
    return sorted(PeerId(rng.randbytes(32)) for _ in range(size))


def links(name: str, ring: list[PeerId], most: int) -> dict[PeerId, set[PeerId]]:
    shape = make(name)
    return {p: set(shape.neighbours(ring, p, most)) for p in ring}


@pytest.mark.parametrize("name", names())
@pytest.mark.parametrize("size", SIZES)
def test_without_bounds_links_are_symmetric_and_never_to_oneself(name: str, size: int) -> None:
    graph = links(name, ring_of(size), 1000)
    for peer, neighbours in graph.items():
        assert peer not in neighbours
        assert all(peer in graph[other] for other in neighbours)


@pytest.mark.parametrize("name", names())
@pytest.mark.parametrize("size", SIZES)
def test_the_swarm_is_connected_and_degrees_are_bounded(name: str, size: int) -> None:
    ring, limits, shape = ring_of(size), Limits(), make(name)
    graph: dict[PeerId, set[PeerId]] = {p: set() for p in ring}
    for peer in ring:
        dialled = wanted(shape, ring, peer, limits)
        assert len(dialled) <= limits.degree_max
        assert len(dialled) >= min(limits.degree_min, size - 1)
        for other in dialled:
            graph[peer].add(other)
            graph[other].add(peer)
    reached, todo = {ring[0]}, [ring[0]]
    while todo:
        new = graph[todo.pop()] - reached
        reached |= new
        todo += sorted(new)
    assert len(reached) == size
    assert max(map(len, graph.values())) <= limits.neighbours


@pytest.mark.parametrize("name", names())
def test_one_peer_less_moves_few_links(name: str) -> None:
    # Not at a power of two: there the exponential shape gains or loses its shortest distance.
    ring = ring_of(60)
    for gone in ring[::9]:
        before = links(name, ring, 1000)
        after = links(name, [p for p in ring if p != gone], 1000)
        touched = before[gone] | {gone}
        changed = [p for p in after if before[p] - {gone} != after[p]]
        # New links replace those to the one that left: at most its neighbours and theirs.
        assert len(changed) <= 2 * len(touched)


def test_an_unknown_shape_is_answered_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="complete, exponential, ring"):
        make("star")


def test_exponential_reaches_a_large_swarm_in_few_hops() -> None:
    ring = ring_of(1000)
    shape, limits = make("exponential"), Limits()
    graph: dict[PeerId, set[PeerId]] = {p: set() for p in ring}
    for peer in ring:
        for other in wanted(shape, ring, peer, limits):
            graph[peer].add(other)
            graph[other].add(peer)
    depth, frontier, reached = 0, {ring[0]}, {ring[0]}
    while frontier:
        frontier = {o for p in frontier for o in graph[p]} - reached
        reached |= frontier
        depth += bool(frontier)
    assert depth <= 10
