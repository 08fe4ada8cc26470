"""The driver between core, log and worker: a real core and a real log; links and worker are fakes.

What it must never do: let a payload get lost between arriving and being stored, since the update
would count zero here and something elsewhere; and use a number of ours twice.
"""

import asyncio
import errno
import os
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import replace
from pathlib import Path

from shoal.gossip import events as ev
from shoal.gossip.limits import Limits
from shoal.gossip.messages import Message, Push, Want
from shoal.gossip.names import Author, Hash, Key, PeerId, RunId, digest
from shoal.gossip.protocol import Protocol
from shoal.gossip.records import Record, Report, Statement, Update
from shoal.gossip.run import Held, Run
from shoal.gossip.snapshot import Line, Snapshot
from shoal.node.driver import Driver
from shoal.node.errors import PeerError
from shoal.node.journal import Journal
from shoal.node.metrics import Counters
from shoal.node.segments import HEAD_BYTES, Disk
from shoal.node.store import DamagedError, Store

RUN = Run(RunId(digest(b"run")), most_bytes={"fake": 1 << 20})
ME, BOB, EVE = (PeerId(bytes([i]) * 32) for i in (1, 2, 3))
LIMITS = replace(Limits(), inline_bytes=16)


def seal(statement: Statement) -> Record:
    raw = repr(statement).encode()
    return Record(digest(raw), raw, statement)


def update(peer: PeerId, number: int, payload: bytes, log: int = 7) -> Record:
    return seal(Update(Author(peer, log), number, number, "fake", digest(payload), len(payload)))


class SickDisk(Disk):
    """A disk that can be full for a while."""

    full = False

    def write(self, fd: int, buffers: list[memoryview], offset: int) -> int:
        if self.full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write(fd, buffers, offset)


class Links:
    """What is sent goes into a list; payloads come from a dict."""

    def __init__(self) -> None:
        self.sent: list[tuple[PeerId, Message]] = []
        self.payloads: dict[Hash, bytes] = {}

    def connect(self, peer: PeerId, addresses: Sequence[str]) -> None: ...
    def disconnect(self, peer: PeerId, reason: str, ban: float = 0.0) -> None: ...
    def know(self, peer: PeerId, addresses: Sequence[str]) -> None: ...

    def send(self, peer: PeerId, message: Message) -> None:
        self.sent.append((peer, message))

    async def pull(
        self, peer: PeerId, payload: Hash, size: int, offset: int
    ) -> AsyncIterator[bytes]:
        await asyncio.sleep(0)
        if payload not in self.payloads:
            raise PeerError("unreachable", "gone")
        yield self.payloads[payload][offset:]


async def no_snapshot() -> bytes:
    return b""


class Hands:
    """A worker's foreman that only notes what it is told."""

    def __init__(self) -> None:
        self.told: list[object] = []

    def give(self, request: object) -> None:
        self.told.append(request)

    def commit(self, update: Update) -> None:
        self.told.append(("commit", update.author, update.number))

    def discard(self) -> None:
        self.told.append("discard")

    def forget_snapshot(self) -> None:
        self.told.append("forget snapshot")


class Scene:
    """A daemon's middle."""

    def __init__(
        self, directory: Path, limits: Limits = LIMITS, snapshot: Snapshot | None = None
    ) -> None:
        self.disk = SickDisk()
        summed = {} if snapshot is None else dict(snapshot.counts())
        self.store = Store.open(directory, limits, run=RUN.id, disk=self.disk, summed=summed)
        records = {s.key: s.raw for s in self.store.records()}
        self.read: dict[bytes, Record] = {}
        self.links, self.hands = Links(), Hands()
        self.core = Protocol(
            RUN,
            ME,
            self.store.log,
            1,
            seal,
            random.Random(5),
            limits,
            Held(
                [self._record(raw) for raw in records.values()],
                recall=self._recall,
                snapshot=snapshot,
            ),
        )
        self.driver = Driver(
            self.core,
            self.store,
            Journal(100),
            Counters(),
            limits,
            genesis=b"genesis",
            initial=lambda: None,
            snapshot=no_snapshot,
        )
        self.driver.links, self.driver.hands = self.links, self.hands  # type: ignore[assignment]

    def _record(self, raw: bytes) -> Record:
        return seal(eval(raw))  # our own words, written by `seal`

    def _recall(self, key: Key) -> Record | None:
        try:
            raw = self.store.record(*key)
        except DamagedError as error:
            self.driver.lost(error.key)
            return None
        return None if raw is None else self._record(raw)

    def start(self, *, alone: bool = True) -> None:
        self.driver.feed(ev.Start((), b"proof", alone))
        self.driver.feed(ev.WorkerReady((), (0, 0)))

    async def hear(self, peer: PeerId, *records: Record) -> None:
        """Let `peer` push these; wait until their payloads were pulled."""
        self.driver.feed(ev.Received(peer, Push(records)))
        while self.driver._tasks:
            await asyncio.sleep(0)

    def train(self, payload: bytes) -> None:
        """Answer the `StartTurn` that was given last."""
        turn = [t for t in self.hands.told if isinstance(t, ev.StartTurn)][-1].turn
        self.driver.hold(digest(payload), payload)
        self.driver.feed(
            ev.TurnDone(turn, "fake", digest(payload), len(payload), None, Report(turn))
        )

    def own(self) -> list[tuple[Author, int]]:
        """Return what of our own was ever committed, which is what others may have."""
        return [(t[1], t[2]) for t in self.hands.told if isinstance(t, tuple)]


def play(
    directory: Path, scenario: Callable[[Scene], Awaitable[None]], limits: Limits = LIMITS
) -> Scene:
    async def main() -> Scene:
        scene = Scene(directory, limits)
        scene.start()
        for peer in (BOB, EVE):
            scene.driver.on_link_up(peer, b"proof")
        await scenario(scene)
        scene.driver.close()
        return scene

    return asyncio.run(main())


LARGE = b"a payload that is pulled " * 20


def test_a_pulled_update_that_the_disk_refuses_is_kept_whole_in_memory(tmp_path: Path) -> None:
    async def scenario(scene: Scene) -> None:
        scene.links.payloads[digest(LARGE)] = LARGE
        scene.disk.full = True
        await scene.hear(BOB, update(BOB, 1, LARGE))
        assert scene.store.degraded
        assert scene.core.frontier.count(Author(BOB, 7)) == 1
        assert scene.store.get(Author(BOB, 7), 1) == (update(BOB, 1, LARGE).raw, LARGE)

    play(tmp_path, scenario)


def test_a_snapshot_that_is_dropped_is_forgotten_by_all(tmp_path: Path) -> None:
    line = Line(Author(BOB, 7), 3, digest(b"hash"), 2)
    scene = Scene(tmp_path, snapshot=Snapshot(BOB, (line,), (5, 6)))
    assert scene.store.counts() == {line.author: 3}

    async def start() -> None:
        scene.start()

    asyncio.run(start())
    assert scene.store.counts() == {line.author: 0}
    told = [t for t in scene.hands.told if t == "forget snapshot" or isinstance(t, ev.Rebuild)]
    assert told == ["forget snapshot", ev.Rebuild()]
    assert scene.core.frontier.counts() == ()


def test_two_updates_with_one_payload_are_both_stored_with_it(tmp_path: Path) -> None:
    async def scenario(scene: Scene) -> None:
        scene.links.payloads[digest(LARGE)] = LARGE
        await scene.hear(BOB, update(BOB, 1, LARGE), update(EVE, 1, LARGE))
        for peer in (BOB, EVE):
            assert scene.core.frontier.count(Author(peer, 7)) == 1
            assert scene.store.get(Author(peer, 7), 1) == (update(peer, 1, LARGE).raw, LARGE)

    play(tmp_path, scenario)


def test_payloads_that_nobody_waits_for_any_more_are_not_kept(tmp_path: Path) -> None:
    async def scenario(scene: Scene) -> None:
        other = b"another payload under this number" * 20
        scene.links.payloads[digest(LARGE)] = LARGE
        scene.driver.feed(ev.Received(BOB, Push((update(EVE, 1, LARGE),))))
        scene.driver.feed(ev.Received(BOB, Push((update(EVE, 1, other),))))  # so nobody wants it
        while scene.driver._tasks:
            await asyncio.sleep(0)
        assert scene.core.frontier.closed(Author(EVE, 7)) == 1
        assert scene.driver.fetcher.arrived == {}

    play(tmp_path, scenario)


def test_after_a_disk_error_with_anothers_update_ours_go_on_under_a_fresh_log_id(
    tmp_path: Path,
) -> None:
    async def scenario(scene: Scene) -> None:
        scene.train(b"first" * 9)
        scene.links.payloads[digest(LARGE)] = LARGE
        scene.disk.full = True
        await scene.hear(BOB, update(BOB, 1, LARGE))
        scene.train(b"second" * 9)
        scene.train(b"third" * 9)

    before = play(tmp_path, scenario)
    before.store.close()

    async def afterwards(scene: Scene) -> None:
        scene.train(b"fourth" * 9)

    after = play(tmp_path, afterwards)
    assert len(before.own()) == 3
    assert not set(before.own()) & set(after.own()), "a number was used twice"


def test_an_own_update_that_the_disk_refuses_is_published_once_under_a_fresh_log_id(
    tmp_path: Path,
) -> None:
    async def scenario(scene: Scene) -> None:
        scene.train(b"first" * 9)
        scene.disk.full = True
        scene.train(LARGE)
        (first, _), (author, number) = scene.own()
        assert number == 1
        assert author.log != first.log
        assert scene.store.get(author, 1) is not None
        assert scene.store.payload(digest(LARGE)) == LARGE
        assert scene.core.state == "degraded: disk"

    play(tmp_path, scenario)


def test_once_the_disk_has_room_again_the_log_is_on_it_and_training_goes_on_there(
    tmp_path: Path,
) -> None:
    async def scenario(scene: Scene) -> None:
        scene.train(b"first" * 9)
        scene.links.payloads[digest(LARGE)] = LARGE
        scene.disk.full = True
        scene.train(b"second" * 9)
        await scene.hear(BOB, update(BOB, 1, LARGE))
        scene.driver.mend()
        assert (scene.core.state, scene.store.waiting) == ("degraded: disk", 2)
        scene.disk.full = False
        scene.driver.mend()
        assert (scene.core.state, scene.store.waiting) == ("training", 0)
        assert [e.what for e in scene.driver.journal.after(0)][-1] == "log-mended"
        scene.train(b"third" * 9)
        (first, _), *later = scene.own()
        assert later == [(Author(ME, scene.core.log), 1), (Author(ME, scene.core.log), 2)]
        assert first.log != scene.core.log == scene.store.log

    before = play(tmp_path, scenario)
    before.store.close()
    again = Scene(tmp_path)
    assert again.core.log == before.core.log
    assert again.core.frontier.counts() == before.core.frontier.counts()
    assert again.store.payload(digest(LARGE)) == LARGE


def test_a_log_that_was_full_in_memory_too_goes_on_once_the_disk_has_room(tmp_path: Path) -> None:
    async def scenario(scene: Scene) -> None:
        scene.disk.full = True
        scene.train(b"first" * 9)
        scene.train(LARGE * 3)
        assert scene.core.state == "degraded: log full"
        scene.disk.full = False
        scene.driver.mend()
        assert scene.core.state == "training"
        scene.train(LARGE * 4)
        assert [number for _, number in scene.own()] == [1, 2]

    play(tmp_path, scenario, replace(LIMITS, staging_bytes=1000))


def spoil(store: Store, author: Author, number: int, *, record: bool) -> None:
    """Flip a bit of a stored update, in its record or in its payload."""
    place = store._place(Key(author, number))
    assert place is not None
    offset = place.offset + HEAD_BYTES + 3
    if not record:
        offset += store._segments.head(place).record_bytes
    path = store._segments.path(place.segment)
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


async def three_of_bob(scene: Scene) -> list[Record]:
    payloads = [LARGE + bytes([n]) for n in range(3)]
    scene.links.payloads |= {digest(p): p for p in payloads}
    records = [update(BOB, n, p) for n, p in enumerate(payloads, 1)]
    await scene.hear(BOB, *records)
    assert scene.core.frontier.count(Author(BOB, 7)) == 3
    return records


def test_a_damaged_record_that_others_ask_for_ends_nothing_and_is_fetched_anew(
    tmp_path: Path,
) -> None:
    async def scenario(scene: Scene) -> None:
        bobs = Author(BOB, 7)
        records = await three_of_bob(scene)
        spoil(scene.store, bobs, 2, record=True)
        assert scene.driver.on_message(EVE, Want(bobs, 2, 2)) == []
        await asyncio.sleep(0)
        assert scene.core.frontier.count(bobs) == 1, "what is above waits for the hole"
        await scene.hear(BOB, records[1])
        assert scene.core.frontier.count(bobs) == 3
        found = scene.store.get(bobs, 2)
        assert found == (records[1].raw, LARGE + bytes([1]))

    play(tmp_path, scenario)


def test_a_lost_update_of_ours_means_a_fresh_log_id(tmp_path: Path) -> None:
    async def scenario(scene: Scene) -> None:
        scene.train(b"first" * 9)
        ((author, _),) = scene.own()
        spoil(scene.store, author, 1, record=False)
        try:
            scene.store.get(author, 1)
        except DamagedError as error:
            scene.driver.lost(error.key)
        await asyncio.sleep(0)
        scene.train(b"second" * 9)
        assert scene.own()[1][0].log != author.log
        assert scene.store.log == scene.own()[1][0].log

    play(tmp_path, scenario)


def test_asking_for_records_reads_no_payloads(tmp_path: Path) -> None:
    async def scenario(scene: Scene) -> None:
        bobs = Author(BOB, 7)
        records = await three_of_bob(scene)
        spoil(scene.store, bobs, 2, record=False)  # would show if the payload were read
        (answer,) = scene.driver.on_message(EVE, Want(bobs, 1, 3))
        assert answer == Push(tuple(records))

    play(tmp_path, scenario)


def test_a_damaged_payload_is_not_served_but_fetched_anew(tmp_path: Path) -> None:
    async def scenario(scene: Scene) -> None:
        bobs = Author(BOB, 7)
        records = await three_of_bob(scene)
        name = digest(LARGE + bytes([1]))
        assert scene.driver.payload(name) == LARGE + bytes([1])
        spoil(scene.store, bobs, 2, record=False)
        assert scene.driver.payload(name) is None
        await asyncio.sleep(0)
        assert scene.core.frontier.count(bobs) == 1
        await scene.hear(BOB, records[1])
        assert scene.core.frontier.count(bobs) == 3
        assert scene.driver.payload(name) == LARGE + bytes([1])

    play(tmp_path, scenario)


def test_a_model_that_holds_a_lost_update_is_built_anew(tmp_path: Path) -> None:
    """What is fetched in its place may be another record, if its author equivocates."""

    async def scenario(scene: Scene) -> None:
        bobs = Author(BOB, 7)
        await three_of_bob(scene)
        scene.driver.feed(ev.Applied(((bobs, 2),), (0, 0), ()))
        scene.driver.feed(ev.Lost(Key(bobs, 3)))
        scene.train(b"a turn" * 9)
        assert ev.Rebuild() not in scene.hands.told, "the third was not in the model"
        scene.driver.feed(ev.Applied(((bobs, 2),), (0, 0), ()))
        scene.driver.feed(ev.Lost(Key(bobs, 1)))
        scene.train(b"another turn" * 9)
        assert scene.hands.told[-1] == ev.Rebuild()

    play(tmp_path, scenario)
