"""Whom finders ask, and when: candidates."""

import random
from dataclasses import replace

from support.finders import LIMITS

from shoal.node.transport.libp2p.candidates import Candidates
from shoal.node.transport.libp2p.settings import FinderLimits


def candidates(limits: FinderLimits = LIMITS) -> Candidates:
    return Candidates(limits, random.Random(3))


def test_candidates_are_asked_once_and_again_in_another_life() -> None:
    them = candidates()
    them.found(b"a", ["/ip4/1.1.1.1/tcp/1"], "mdns", now=0)
    assert them.due(0) == [(b"a", ("/ip4/1.1.1.1/tcp/1",), "mdns")]
    assert them.due(0) == []
    assert not them.answered(b"a")
    them.settle(b"a", True, now=1)
    assert them.answered(b"a")
    assert not them.answered(b"b")
    them.found(b"a", ["/ip4/1.1.1.1/tcp/1"], "mdns", now=2)
    assert them.due(1e9) == []  # libp2p only finds: who answered is found
    them.found(b"a", ["/ip4/1.1.1.1/tcp/1"], "mdns", now=3, anew=True)
    assert len(them.due(3)) == 1


def test_pauses_after_failures_double_and_new_addresses_end_them() -> None:
    them = candidates()
    them.found(b"a", ["/ip4/1.1.1.1/tcp/1"], "mdns", now=0)
    now, waits = 0.0, []
    for _ in range(14):
        began = now
        while not them.due(now):
            now += 0.5
        waits.append(now - began)
        them.settle(b"a", False, now=now)
    assert waits[1] <= LIMITS.retry + 0.5
    assert max(waits) <= LIMITS.retry_max + 0.5
    assert waits[-1] >= 0.75 * LIMITS.retry_max
    them.found(b"a", ["/ip4/1.1.1.1/tcp/1"], "mdns", now=now)
    assert them.due(now) == []
    them.found(b"a", ["/ip4/1.1.1.1/tcp/2"], "mdns", now=now)
    assert len(them.due(now)) == 1


def test_hurry_makes_everybody_due_who_is_not_linked() -> None:
    them = candidates()
    for peer in (b"a", b"b"):
        them.found(peer, ["x"], "mdns", now=0)
    for peer, _, _ in them.due(0):
        them.settle(peer, True, now=0)
    them.hurry({b"b"}, now=1)
    assert [peer for peer, _, _ in them.due(1)] == [b"a"]


def test_candidates_and_their_addresses_are_bounded() -> None:
    them = candidates(replace(LIMITS, candidates=10, addresses=2, asking=4))
    for n in range(100):
        them.found(bytes([n]), ["a", "b", "c"], "mdns", now=n)
    assert len(them) == 10
    asked = them.due(1000)
    assert [peer for peer, _, _ in asked] == [bytes([n]) for n in range(90, 94)]
    assert asked[0][1] == ("a", "b")
    them.settle(b"gone", True, now=0)
