"""Two updates under one number: the smallest number of a log stands, whatever comes first."""

import random

import pytest

from shoal.gossip import events as ev
from shoal.gossip.limits import Limits
from shoal.gossip.messages import Push
from shoal.gossip.names import Author, Key, PeerId, RunId, digest
from shoal.gossip.protocol import Protocol
from shoal.gossip.records import Proof, Record, Statement, Update
from shoal.gossip.run import Held, Run

ONE, TWO, THREE = (PeerId(digest(name)) for name in (b"one", b"two", b"three"))
LIAR = Author(TWO, 3)


def seal(statement: Statement) -> Record:
    raw = repr(statement).encode()
    return Record(digest(raw), raw, statement)


def update(number: int, payload: bytes, *, large: bool = False) -> Record:
    inline = None if large else payload
    return seal(Update(LIAR, number, number, "fake", digest(payload), len(payload), inline))


def proof(number: int) -> Record:
    first, second = sorted(update(number, each).raw for each in (b"x", b"y"))
    return seal(Proof(LIAR, number, first, second))


def started() -> tuple[Protocol, dict[Key, Record]]:
    """Return a core with links to the liar and to another, and its log."""
    log: dict[Key, Record] = {}
    run = Run(RunId(digest(b"run")), most_bytes={"fake": 1000})
    one = Protocol(run, ONE, 7, 1, seal, random.Random(1), Limits(), Held((), recall=log.get))
    one.handle(ev.Start(("a",), b"admitted", alone=True), 0.0)
    for peer in (TWO, THREE):
        one.handle(ev.LinkUp(peer, b"admitted"), 0.1)
    return one, log


def take(
    one: Protocol, log: dict[Key, Record], *records: Record, sender: PeerId = THREE
) -> list[Record]:
    """Push records; return what was stored."""
    stored = []
    for effect in one.handle(ev.Received(sender, Push(records)), 1.0):
        if isinstance(effect, ev.Store):
            stored.append(effect.record)
            if isinstance(effect.record.statement, Update):
                log[Key(LIAR, effect.record.statement.number)] = effect.record
            one.handle(ev.Stored(effect.record), 1.0)
    return stored


@pytest.mark.parametrize("order", [(4, 2, 3), (2, 3, 4), (3, 4, 2)])
def test_the_smallest_number_stands_and_each_smaller_one_is_news(order: tuple[int, ...]) -> None:
    one, log = started()
    take(one, log, *(update(n, b"x") for n in range(1, 6)))
    assert one.frontier.count(LIAR) == 5
    smallest = 6
    for number in order:
        kept = take(one, log, proof(number))
        assert kept == ([proof(number)] if number < smallest else [])
        smallest = min(smallest, number)
        assert one.view.proofs[LIAR] == proof(smallest)
        assert (one.frontier.closed(LIAR), one.frontier.count(LIAR)) == (smallest, smallest - 1)


def test_a_second_update_under_a_number_makes_a_proof_that_is_kept_and_passed_on() -> None:
    one, log = started()
    take(one, log, *(update(n, b"x") for n in (1, 2, 3)))
    (kept,) = take(one, log, update(2, b"y"))
    statement = kept.statement
    assert isinstance(statement, Proof)
    assert {statement.first, statement.second} == {update(2, b"x").raw, update(2, b"y").raw}
    assert one.frontier.counts() == ((LIAR, 1),)
    assert take(one, log, update(3, b"x")) == [], "it counts for nobody"


def test_what_waits_for_its_payload_is_not_stored_once_its_log_is_closed() -> None:
    one, log = started()
    waiting = [update(n, b"%d" % n * 900, large=True) for n in (1, 2, 3)]
    assert take(one, log, *waiting) == []
    take(one, log, proof(2))
    stored = [
        effect.record
        for number in (3, 2, 1)
        for effect in one.handle(ev.Pulled(digest(b"%d" % number * 900)), 2.0)
        if isinstance(effect, ev.Store)
    ]
    assert stored == waiting[:1]


def test_nothing_is_taken_from_who_is_accused_and_its_link_ends() -> None:
    one, log = started()
    take(one, log, proof(2))
    other = Update(Author(THREE, 1), 1, 1, "fake", digest(b"z"), 1, b"z")
    assert take(one, log, seal(other), sender=TWO) == []
    assert take(one, log, seal(other), sender=THREE) == [seal(other)]
    ended = [e for e in one.handle(ev.Tick(), 5.0) if isinstance(e, ev.Disconnect)]
    assert [e.peer for e in ended] == [TWO]
