"""What a daemon finds after things went wrong on its disk, in its memory, with its worker."""

import os
import random
import resource
from collections.abc import Callable
from pathlib import Path

import pytest

from shoal.gossip import events as ev
from shoal.gossip.limits import Limits
from shoal.gossip.messages import Push
from shoal.gossip.names import NO_HASH, Author, Hash, PeerId, RunId, digest
from shoal.gossip.protocol import Protocol
from shoal.gossip.records import Alive, Progress, Record, Report, Standing, Statement, Update
from shoal.gossip.run import Held, Run
from shoal.node.store import Store

RUN = RunId(digest(b"run"))
ME, BOB = PeerId(b"m" * 32), PeerId(b"b" * 32)
BOBS = Author(BOB, 7)


def seal(statement: Statement) -> Record:
    raw = repr(statement).encode()
    return Record(digest(raw), raw, statement)


def update(author: Author, number: int, turn: int = 0) -> Record:
    return seal(Update(author, number, turn or number, "fake", Hash(NO_HASH), 4, b"four"))


# ---------------------------------------------------------------- the log


def test_a_sealed_segment_that_lost_its_end_means_a_fresh_log_id(tmp_path: Path) -> None:
    """Only the last segment can be torn by a crash: sealed ones were synced whole."""

    def opened() -> Store:
        return Store.open(tmp_path, Limits(), run=RUN, segment_bytes=2000)

    store = opened()
    log, mine = store.log, Author(ME, store.log)
    for number in range(1, 9):
        store.append(update(mine, number), own=True)
    for number in range(1, 30):
        store.append(update(BOBS, number))
    store.close()
    segments = sorted(tmp_path.glob("*.seg"))
    assert len(segments) > 3
    os.truncate(segments[0], segments[0].stat().st_size - 1)
    store = opened()
    assert store.counts()[mine] < 8, "numbers that others have are lost here"
    assert store.log != log


def test_a_process_short_of_descriptors_forgets_no_update(tmp_path: Path) -> None:
    store = Store.open(tmp_path, Limits(), run=RUN, segment_bytes=2000)
    for number in range(1, 40):
        store.append(update(BOBS, number))
    assert len(list(tmp_path.glob("*.seg"))) > 4
    assert store.record(BOBS, 39) is not None  # one segment is open for reading
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.dup(0)  # the lowest number that is free
    os.close(lowest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, hard))
    try:
        with pytest.raises(OSError, match="Too many open files"):
            os.open(tmp_path, os.O_RDONLY)
        found = [store.record(BOBS, number) for number in range(1, 40)]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert found == [update(BOBS, number).raw for number in range(1, 40)]


# ---------------------------------------------------------------- the core and its worker


def core(run: Run, records: list[Record] | None = None) -> Protocol:
    held = Held(records or [])
    return Protocol(run, ME, 5, 1, seal, random.Random(1), Limits(), held)


class Worker:
    """Answers the core's requests as a worker whose updates all count nothing would."""

    def __init__(self, made: Protocol) -> None:
        self.core, self.now = made, 0.0
        self.turns: list[int] = []
        self.asked: list[ev.Effect] = []
        self.fingerprint = (0, 0)

    def feed(self, event: ev.Event) -> None:
        waiting = [event]
        while waiting:
            self.now += 0.5
            for effect in self.core.handle(waiting.pop(0), self.now):
                match effect:
                    case ev.Store(record):
                        waiting.append(ev.Stored(record))
                    case ev.StartTurn() | ev.Apply() | ev.Subtract() | ev.Rebuild():
                        self.asked.append(effect)

    def answer(self, publish: Callable[[int], bool] = lambda turn: True) -> ev.Effect:
        """Do what was asked last."""
        asked = self.asked[-1]
        match asked:
            case ev.Apply(frontier):
                self.feed(ev.Applied(frontier, self.fingerprint, ()))
            case ev.Rebuild():
                self.fingerprint = (0, 0)
                self.feed(ev.Rebuilt(ev.Applied((), (0, 0), ())))
            case ev.StartTurn(turn, _, frontier):
                self.feed(ev.Applied(frontier, self.fingerprint, ()))
                good = digest(b"four") if publish(turn) else None
                size, inline = (4, b"four") if good else (0, None)
                self.feed(ev.TurnDone(turn, "fake", good, size, inline, Report(turn)))
        return asked


def test_after_its_last_turn_in_lockstep_a_peer_takes_in_what_came_before_that_turn() -> None:
    """The last turn trains on the turns before it alone: the rest must still be asked for."""
    run = Run(RUN, turns=2, pace="lockstep", most_bytes={"fake": 99})
    worker = Worker(core(run))
    worker.feed(ev.Start((), b"proof", alone=True))
    worker.feed(ev.WorkerReady((), (0, 0)))
    worker.core.handle(ev.LinkUp(BOB, b"proof"), worker.now)
    # Bob is done with both turns before we begin the second …
    worker.feed(ev.Received(BOB, Push((update(BOBS, 1, turn=1), update(BOBS, 2, turn=2)))))
    worker.answer()
    second = worker.answer(lambda turn: False)  # … which is dropped: nothing of ours comes in
    assert isinstance(second, ev.StartTurn)
    assert (BOBS, 1) in second.frontier
    worker.feed(ev.Tick())
    assert worker.asked[-1] == ev.Apply(worker.core.frontier.counts())
    assert (BOBS, 2) in worker.core.frontier.counts()
    worker.answer()
    worker.feed(ev.Tick())
    assert worker.core.turns.idle()


def test_a_peer_that_once_rebuilt_its_model_rebuilds_it_again_when_it_drifts_again() -> None:
    run = Run(RUN, turns=1, observe=True, most_bytes={"fake": 99})
    worker = Worker(core(run))
    worker.feed(ev.Start((), b"proof", alone=True))
    worker.feed(ev.WorkerReady((), (0, 0)))
    worker.core.handle(ev.LinkUp(BOB, b"proof"), worker.now)
    worker.feed(ev.Received(BOB, Push((seal(Alive(BOB, 1, 9, Standing.TRAINING)),))))
    for number, sequence in ((1, 1), (2, 3)):
        worker.now += 1000
        worker.fingerprint = (1, 0)  # a bit flips
        worker.feed(ev.Received(BOB, Push((update(BOBS, number),))))
        worker.answer()
        assert worker.asked[-1] == ev.Rebuild()
        worker.answer()
        worker.answer()
        assert worker.fingerprint == (0, 0)
        worker.feed(ev.Received(BOB, Push((progress(worker.core, (0, 0), sequence),))))
        assert worker.core.agrees()
    worker.now += 1000
    # Later the model differs from the others' without a drift that shows here.
    worker.core.agreement.fingerprint = (1, 0)
    worker.feed(ev.Received(BOB, Push((progress(worker.core, (0, 0), 4),))))
    assert worker.core.agrees() is False
    assert worker.asked[-1] == ev.Rebuild()


def progress(made: Protocol, value: tuple[int, int], sequence: int) -> Record:
    frontier = tuple(sorted(made.agreement.applied.items()))
    at = made.frontier.hash_at(dict(frontier))
    assert at is not None
    return seal(Progress(BOB, sequence, frontier, at, value, Report()))
