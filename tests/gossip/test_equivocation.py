"""Two updates under one number: the smallest number of a log stands, whatever comes first."""

import random

import pytest

from shoal.gossip import events as ev
from shoal.gossip.limits import Limits
from shoal.gossip.messages import Push
from shoal.gossip.names import Author, Key, PeerId, RunId, digest
from shoal.gossip.protocol import Protocol
from shoal.gossip.records import Alive, Proof, Record, Report, Standing, Statement, Update
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


def started(*, pace: str = "free", observe: bool = False) -> tuple[Protocol, dict[Key, Record]]:
    """Return a core with links to the liar and to another, and its log."""
    log: dict[Key, Record] = {}
    run = Run(RunId(digest(b"run")), most_bytes={"fake": 1000}, pace=pace, observe=observe)
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


@pytest.mark.parametrize("number", [1, 2, 3])
def test_what_the_model_holds_from_a_closing_on_is_taken_out_the_last_of_it_as_well(
    number: int,
) -> None:
    one, log = started(observe=True)
    take(one, log, update(1, b"x"), update(2, b"x"))
    one.handle(ev.WorkerReady((), (0, 0)), 2.0)
    deltas = tuple((Key(LIAR, n), (n, n)) for n in (1, 2))
    one.handle(ev.Applied(((LIAR, 2),), (3, 3), deltas), 3.0)
    effects = one.handle(ev.Received(THREE, Push((proof(number),))), 4.0)
    asked = [e for e in effects if isinstance(e, ev.Subtract)]
    assert asked == ([ev.Subtract(LIAR, number, 2)] if number <= 2 else [])


def test_nobody_waits_for_the_turns_of_who_is_accused() -> None:
    one, _ = started(pace="lockstep")
    alive = seal(Alive(TWO, 1, 5, Standing.TRAINING))
    one.handle(ev.Received(TWO, Push((alive,))), 0.2)
    assert set(one.training()) == {ONE, TWO}

    def turns(event: ev.Event, now: float) -> list[int]:
        effects = one.handle(event, now)
        for store in [e for e in effects if isinstance(e, ev.Store)]:
            effects += one.handle(ev.Stored(store.record), now)
        return [e.turn for e in effects if isinstance(e, ev.StartTurn)]

    assert turns(ev.WorkerReady((), (0, 0)), 0.3) == [1]
    one.handle(ev.Applied((), (0, 0), ()), 0.4)
    done = ev.TurnDone(1, "fake", digest(b"z"), 1, b"z", Report(turn=1))
    assert turns(done, 0.5) == [], "the other one's first turn is still to come"
    assert turns(ev.Received(THREE, Push((proof(1),))), 0.6) == [2]
    assert one.training() == [ONE]
