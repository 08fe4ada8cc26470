"""How fast an author may publish: what is delayed, and what never is."""

import random
from dataclasses import replace

from shoal.gossip.limits import Limits
from shoal.gossip.names import Author, PeerId, RunId, digest
from shoal.gossip.protocol import Protocol
from shoal.gossip.records import Record, Statement, Update
from shoal.gossip.run import Held, Run
from shoal.gossip.throttle import Throttle

ONE, TWO, THREE = (PeerId(digest(name)) for name in (b"one", b"two", b"three"))
HOUR = Limits().log_interval


def seal(statement: Statement) -> Record:
    raw = repr(statement).encode()
    return Record(digest(raw), raw, statement)


def update(author: Author, number: int = 1, *, large: bool = False) -> Update:
    payload = b"%d" % author.log
    return Update(author, number, 1, "fake", digest(payload), 1, None if large else payload)


def holding(*updates: Update, limits: Limits | None = None) -> tuple[Throttle, Protocol]:
    run, held = Run(RunId(digest(b"run"))), Held(tuple(map(seal, updates)))
    core = Protocol(run, ONE, 7, 1, seal, random.Random(1), limits or Limits(), held)
    return core.throttle, core


def test_an_author_gets_one_further_log_in_an_interval_from_its_neighbours() -> None:
    throttle, _ = holding(update(Author(TWO, 1)))
    first, second = update(Author(TWO, 2)), update(Author(TWO, 3))
    assert throttle.delays(first, TWO, 10.0, asked=False) == ""
    assert throttle.delays(second, TWO, 10.0, asked=False) == "log-delayed"
    assert throttle.delays(second, TWO, 9.9 + HOUR, asked=False) == "log-delayed"
    assert throttle.delays(second, TWO, 10.0 + HOUR, asked=False) == ""


def test_the_first_log_of_a_peer_and_what_goes_on_in_a_known_one_are_no_further_logs() -> None:
    throttle, _ = holding(update(Author(TWO, 1)))
    assert throttle.delays(update(Author(TWO, 2)), TWO, 10.0, asked=False) == ""
    assert throttle.delays(update(Author(TWO, 1), 2), TWO, 10.0, asked=False) == ""
    assert throttle.delays(update(Author(THREE, 1)), THREE, 10.0, asked=False) == ""


def test_a_log_whose_first_payload_is_on_its_way_is_a_log_already() -> None:
    throttle, core = holding()
    waiting = update(Author(TWO, 1), large=True)
    core.arrivals.waiting[waiting.author] = {1: seal(waiting)}
    assert throttle.delays(update(Author(TWO, 1), 2), TWO, 10.0, asked=False) == ""
    assert throttle.delays(update(Author(TWO, 2)), TWO, 10.0, asked=False) == ""
    assert throttle.delays(update(Author(TWO, 3)), TWO, 10.0, asked=False) == "log-delayed"


def test_logs_that_others_pass_on_are_not_delayed() -> None:
    """Its neighbours did that already: who hears of them later would only wait again."""
    throttle, _ = holding(update(Author(TWO, 1)))
    for log in range(2, 6):
        assert throttle.delays(update(Author(TWO, log)), THREE, 10.0, asked=False) == ""


def test_updates_beyond_the_rate_wait_unless_they_were_asked_for() -> None:
    """Repair brings what was delayed: were it delayed as well, nobody would ever catch up."""
    throttle, _ = holding(limits=replace(Limits(), updates_per_minute=3))
    author = Author(TWO, 1)
    said = [throttle.delays(update(author, n), THREE, 0.0, asked=False) for n in range(1, 6)]
    assert said == ["", "", "", "update-delayed", "update-delayed"]
    said = [throttle.delays(update(author, n), THREE, 0.0, asked=True) for n in range(1, 20)]
    assert set(said) == {""}
    assert throttle.delays(update(Author(THREE, 1)), THREE, 0.0, asked=False) == "", "its own rate"
    assert throttle.delays(update(author, 4), THREE, 21.0, asked=False) == ""
    assert throttle.delays(update(author, 5), THREE, 21.0, asked=False) == "update-delayed"
