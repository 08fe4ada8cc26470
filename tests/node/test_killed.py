"""A peer that is killed at any point: no number is used twice, and the log means one model.

Core, driver, log, foreman and the worker's duties are the real ones; only the process around the
worker and the network are missing. A kill ends everything at once, as kill -9 does: what was not
on the disk is gone.
"""

import asyncio
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from shoal.gossip import events as ev
from shoal.gossip.limits import Limits
from shoal.gossip.messages import Push
from shoal.gossip.names import Author, Hash, Key, PeerId, RunId, digest
from shoal.gossip.protocol import Protocol
from shoal.gossip.records import Proof, Record, Report, Statement, Update
from shoal.gossip.run import Held, Run
from shoal.node import duties, pipe
from shoal.node.driver import Driver
from shoal.node.duties import Duties
from shoal.node.foreman import Foreman
from shoal.node.journal import Journal
from shoal.node.metrics import Counters
from shoal.node.segments import Disk
from shoal.node.store import Store
from shoal.node.supervisor import WorkerDied

ME, BOB, EVE = (PeerId(bytes([i]) * 32) for i in (1, 2, 3))
BOBS, EVES = Author(BOB, 7), Author(EVE, 8)
TURNS = 4
TABLES: dict[str, Any] = {
    "run": {"name": "tiny", "seed": 3, "turns": TURNS},
    "task": {"name": "digits", "width": 4},
    "local": {"steps": 1, "batch": 4, "optimizer": {"name": "sgd", "lr": 0.1}},
    "exchange": {"update": {"kind": "dense", "levels": 3}},
    "swarm": {"min_peers": 2},
}


class KilledError(BaseException):
    """kill -9: nobody catches it."""


def seal(statement: Statement) -> Record:
    raw = repr(statement).encode()
    return Record(digest(raw), raw, statement)


def unseal(raw: bytes) -> Record:
    return seal(eval(raw))  # our own words


class Fate:
    """Counts what could be interrupted, and kills at the point chosen."""

    def __init__(self, at: int = -1, *, worker: bool = False) -> None:
        self.at, self.worker, self.passed = at, worker, 0
        self.dead = False

    def point(self, *, in_worker: bool = False) -> None:
        if self.dead:
            raise KilledError
        self.passed += 1
        if self.passed == self.at:
            if self.worker and in_worker:
                raise WorkerDied("worker: killed")
            self.dead = True
            raise KilledError


class MortalDisk(Disk):
    """A disk whose owner may die before, in the middle of, and after a write."""

    def __init__(self, fate: Fate) -> None:
        self.fate = fate

    def write(self, fd: int, buffers: list[memoryview], offset: int) -> int:
        self.fate.point()
        if len(data := b"".join(buffers)) > 1:
            super().write(fd, [memoryview(data)[: len(data) // 2]], offset)
            self.fate.point()
        return super().write(fd, buffers, offset)

    def sync(self, fd: int) -> None:
        self.fate.point()
        super().sync(fd)
        self.fate.point()


class Worker:
    """The supervisor and its process: the real duties, in this one."""

    restarts = 0

    def __init__(self, fate: Fate) -> None:
        self.fate = fate
        self.duties: Duties | None = None
        self.reason = ""

    @property
    def pid(self) -> int | None:
        return None if self.duties is None else 1

    async def start(self) -> None:
        if self.duties is None:
            self.duties = Duties()

    async def dead(self) -> str:
        await asyncio.Event().wait()
        return ""

    async def ask(self, request: pipe.Request, expect: Any, *bodies: bytes) -> Any:
        return (await self.ask_body(request, expect, bodies))[0]

    async def ask_body(
        self, request: pipe.Request, expect: Any, bodies: Sequence[bytes] = ()
    ) -> tuple[Any, bytes]:
        assert self.duties is not None
        try:
            self.fate.point(in_worker=True)
            answer, payload = self.duties.answer(request, memoryview(b"".join(bodies)))
            if isinstance(request, pipe.Commit):
                self.duties.answer(pipe.Save(), memoryview(b""))
            self.fate.point(in_worker=True)
        except WorkerDied:
            self.duties = None
            raise
        await asyncio.sleep(0)
        assert isinstance(answer, expect)
        return answer, b"".join(bytes(p) for p in payload)


async def no_snapshot() -> bytes:
    return b""


class Silent:
    """Links to nobody."""

    def connect(self, peer: PeerId, addresses: Sequence[str]) -> None: ...
    def disconnect(self, peer: PeerId, reason: str, ban: float = 0.0) -> None: ...
    def know(self, peer: PeerId, addresses: Sequence[str]) -> None: ...
    def send(self, peer: PeerId, message: object) -> None: ...


class Life:
    """One daemon from its start to its death or the end of the run."""

    def __init__(self, directory: Path, founded: pipe.Founded, fate: Fate) -> None:
        limits = Limits(inline_bytes=1 << 20)
        self.store = Store.open(directory / "log", limits, run=RUN, disk=MortalDisk(fate))
        held = Held(
            [unseal(stored.raw) for stored in self.store.records()],
            [unseal(raw) for raw in self.store.proofs.values()],
            recall=self._recall,
        )
        run = Run(RUN, turns=TURNS, most_bytes=founded.most)
        self.core = Protocol(run, ME, self.store.log, 1, seal, random.Random(), limits, held)
        self.driver = Driver(
            self.core,
            self.store,
            Journal(100),
            Counters(),
            limits,
            genesis=b"",
            initial=lambda: None,
            snapshot=no_snapshot,
        )
        self.worker = Worker(fate)
        self.foreman = Foreman(
            self.worker,  # type: ignore[arg-type]
            self.store,
            pipe.Open(
                pipe.Setup(founded.run, ME, device="cpu", threads=1),
                founded.parameters,
                founded.layout,
                founded.initial_root,
                str(directory / "initial.bin"),
                str(directory / "checkpoint" / "state"),
            ),
            feed=self.feed,
            read=self._read,
            initial=self._never,
            hold=self.driver.hold,
            report=lambda now: Report(now.turn),
            turned=lambda answer, size: None,
            limits=limits,
        )
        self.driver.links, self.driver.hands = Silent(), self.foreman  # type: ignore[assignment]
        self.fate = fate

    def feed(self, event: ev.Event) -> None:
        self.fate.point()
        self.driver.feed(event)
        self.fate.point()

    def _recall(self, key: Key) -> Record | None:
        raw = self.store.record(*key)
        return None if raw is None else unseal(raw)

    def _read(self, raw: bytes) -> Update:
        update = unseal(raw).statement
        assert isinstance(update, Update)
        return update

    async def _never(self) -> None:
        raise AssertionError

    def published(self) -> Iterator[tuple[Key, Hash]]:
        """Yield what others may have of ours: what the core holds, since it forwards just that."""
        for stored in self.store.records():
            key = stored.key
            if key.author.peer == ME and key.number <= self.core.frontier.count(key.author):
                yield key, unseal(stored.raw).id

    async def live(self, others: list[Record]) -> None:
        """Train all turns and hear `others` on the way."""
        self.driver.feed(ev.Start((), b"", alone=True))
        for peer in (BOB, EVE):
            self.driver.on_link_up(peer, b"")
        running = asyncio.create_task(self.foreman.run())
        try:
            async with asyncio.timeout(200):
                while others or not (self.core.turns.finished() and self.core.turns.idle()):
                    if others and self.core.turns.next > 1:
                        self.driver.feed(ev.Received(EVE, Push((others.pop(0),))))
                    self.driver.feed(ev.Tick())
                    await asyncio.sleep(0.005)
                    if running.done():
                        break
        finally:
            self.driver.close()
            running.cancel()
            await asyncio.wait({running})
            if not running.cancelled() and (error := running.exception()) is not None:
                raise error


RUN = RunId(digest(b"run"))


@pytest.fixture(scope="module")
def founded() -> pipe.Founded:
    setup = pipe.Setup(TABLES, ME, device="cpu", threads=1)
    answer = Duties().answer(pipe.Found(setup), memoryview(b""))[0]
    assert isinstance(answer, pipe.Founded)
    return answer


def others(founded: pipe.Founded, directory: Path) -> list[Record]:
    """Two updates of Bob's, two of Eve's, and the proof that her second was another, too."""
    w = Duties()
    setup = pipe.Setup(founded.run, BOB, device="cpu", threads=1)
    w.answer(
        pipe.Open(
            setup,
            founded.parameters,
            founded.layout,
            founded.initial_root,
            str(directory / "initial.bin"),
        ),
        memoryview(b""),
    )
    payloads = [bytes(w.answer(pipe.Turn(t, 2.0), memoryview(b""))[1][0]) for t in range(1, 6)]

    def record(author: Author, number: int, turn: int) -> Record:
        data = payloads[turn - 1] if turn <= 5 else b""
        return seal(Update(author, number, min(turn, 4), "dense", digest(data), len(data), data))

    records = [record(BOBS, 1, 1), record(EVES, 1, 2), record(EVES, 2, 3), record(BOBS, 2, 4)]
    twice = record(EVES, 2, 5)
    first, second = sorted((records[2], twice), key=lambda r: r.id)
    return [*records, seal(Proof(EVES, 2, first.raw, second.raw))]


def lives(
    directory: Path, founded: pipe.Founded, heard: list[Record], fates: list[Fate]
) -> tuple[dict[Key, Hash], tuple[int, int]]:
    """Live, be killed and live again; return what was published and the model at the end."""
    published: dict[Key, Hash] = {}
    for fate in [*fates, Fate()]:
        life: Life | None = None
        try:
            life = Life(directory, founded, fate)
            asyncio.run(life.live(list(heard)))
        except KilledError:
            pass
        if life is not None:
            for key, name in life.published():
                assert published.setdefault(key, name) == name, "a number was used twice"
    assert life is not None
    assert life.core.turns.finished()
    fingerprint = life.core.fingerprint
    assert fingerprint is not None
    # The same from nothing but the log.
    fresh = Duties()
    fresh.answer(life.foreman._opening()[0], memoryview(b""))
    fresh.answer(pipe.Reset(), memoryview(b""))
    for items, bodies in life.foreman._batches(
        Key(a, n) for a, c in life.core.frontier.counts() for n in range(1, c + 1)
    ):
        done = fresh.answer(pipe.Apply(items), memoryview(b"".join(bodies)))[0]
        assert isinstance(done, pipe.Done)
    assert fingerprint == done.fingerprint
    assert fresh.answer(pipe.Recompute(), memoryview(b""))[0].fingerprint == fingerprint  # type: ignore[union-attr]
    assert dict(life.core.frontier.counts()).keys() >= {BOBS, EVES}
    assert (life.core.frontier.count(EVES), life.core.frontier.closed(EVES)) == (1, 2)
    return published, fingerprint


def test_killed_at_any_point_and_twice(
    founded: pipe.Founded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(duties, "CHECKPOINT_SECONDS", 0.0)
    heard = others(founded, tmp_path)
    whole = Fate()
    (tmp_path / "whole").mkdir()
    asyncio.run(Life(tmp_path / "whole", founded, whole).live(list(heard)))
    assert whole.passed > 40
    points = [*range(1, whole.passed, 5)]
    for at in points:
        home = tmp_path / str(at)
        home.mkdir()
        fates = [Fate(at), Fate(1 + at * 7 % whole.passed)]
        published, _ = lives(home, founded, heard, fates)
        assert len(published) >= TURNS - 1


def test_its_worker_killed_at_any_point(
    founded: pipe.Founded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(duties, "CHECKPOINT_SECONDS", 0.0)
    heard = others(founded, tmp_path)
    for at in range(2, 60, 5):
        home = tmp_path / str(at)
        home.mkdir()
        published, _ = lives(home, founded, heard, [Fate(at, worker=True)])
        assert len(published) == TURNS
