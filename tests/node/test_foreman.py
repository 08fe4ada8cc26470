"""The foreman: jobs in order, nothing of a dead worker's left over, nobody who waits for ever.

The log is real; the worker is a fake that sums what it is given, and dies or errs when told.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from shoal.gossip import events as ev
from shoal.gossip.limits import Limits
from shoal.gossip.names import Author, PeerId, RunId, digest
from shoal.gossip.records import Record, Report, Update
from shoal.node import foreman as foreman_module
from shoal.node import pipe
from shoal.node.errors import ConfigError
from shoal.node.foreman import Foreman, Progress
from shoal.node.segments import HEAD_BYTES
from shoal.node.store import Store
from shoal.node.supervisor import WorkerDied, WorkerGone, WorkerRefused

RUN = RunId(digest(b"run"))
ME, BOB = PeerId(b"m" * 32), PeerId(b"b" * 32)
BOBS = Author(BOB, 7)
LANE = 1 << 64


def value_of(payload: bytes) -> tuple[int, int]:
    name = digest(payload)
    return int.from_bytes(name[:8], "big"), int.from_bytes(name[8:16], "big")


def payload(number: int) -> bytes:
    return b"payload %d " % number * 9


class FakeWorker:
    """Stands in for the supervisor and its process."""

    def __init__(self) -> None:
        self.reason, self.starts = "", 0
        self.pid: int | None = None
        self.asked: list[pipe.Request] = []
        self.end: Exception | None = None
        self.hang = self.gone = False
        self.flipped = 0
        self.measure: float | None = 2.5
        self.looks = True
        """Turns measure, and find 3.5."""
        self._death = asyncio.Event()

    async def start(self) -> None:
        if self.pid is None:
            if self.gone:
                raise WorkerGone("it died too often")
            self.starts += 1
            self.pid, self._death = self.starts, asyncio.Event()

    def die(self, end: Exception) -> None:
        self.end, self.reason, self.pid = end, str(end), None
        self._death.set()

    async def dead(self) -> str:
        await self._death.wait()
        return self.reason

    async def ask(self, request: pipe.Request, expect: type, *bodies: bytes) -> Any:
        return (await self.ask_body(request, expect, bodies))[0]

    async def ask_body(self, request: pipe.Request, expect: Any, bodies: Any = ()) -> Any:
        if self.pid is None:
            raise WorkerDied("not started")
        self.asked.append(request)
        if self.hang and not isinstance(request, pipe.Open):
            await self._death.wait()
        await asyncio.sleep(0)
        if self.pid is None:
            assert self.end is not None
            raise self.end
        return self._answer(request, list(bodies))

    def _answer(self, request: pipe.Request, bodies: list[bytes]) -> tuple[pipe.Answer, bytes]:
        match request:
            case pipe.Open():
                self.counts: dict[tuple[bytes, int], int] = {}
                self.value = (0, 0)
                return pipe.Opened([], (0, 0), "fake", kept=False), b""
            case pipe.Apply(items):
                assert [len(b) for b in bodies] == [i.length for i in items]
                return self._done([self._add(i, b) for i, b in zip(items, bodies, strict=True)])
            case pipe.Recompute():
                flipped = (self.value[0] ^ self.flipped, self.value[1])
                return self._done([], flipped)
            case pipe.Turn(turn, _):
                found = 3.5 if self.looks else None
                turned = pipe.Turned("fake", 1.0, found, 3, 0.1, skipped=turn, measured=self.looks)
                return turned, payload(turn)
            case pipe.Evaluate():
                return pipe.Measured(self.measure), b""
            case _:
                return pipe.Ready(), b""

    def _add(self, item: pipe.Item, body: bytes) -> pipe.Result:
        author = item.peer, item.log
        assert item.number == self.counts.get(author, 0) + 1, "in order, each once"
        self.counts[author] = item.number
        delta = value_of(body)
        self.value = tuple((a + b) % LANE for a, b in zip(self.value, delta, strict=True))
        return pipe.Result(delta)

    def _done(self, results: list[pipe.Result], value: Any = None) -> tuple[pipe.Answer, bytes]:
        frontier = sorted((*a, n) for a, n in self.counts.items())
        return pipe.Done(results, frontier, value or self.value), b""


def about(applied: Mapping[Author, int]) -> dict[str, str]:
    return {"updates": str(sum(applied.values()))}


class Scene:
    """A foreman with a log of some updates of Bob's; what it tells the core goes into a list."""

    def __init__(self, directory: Path, updates: int) -> None:
        self.store = Store.open(directory, Limits(), run=RUN)
        self.read: dict[bytes, Update] = {}
        for number in range(1, updates + 1):
            self.put(number)
        self.worker, self.now = FakeWorker(), 0.0
        self.told: list[ev.Event] = []
        self.heard = asyncio.Event()
        self.foreman = Foreman(
            self.worker,  # type: ignore[arg-type]
            self.store,
            pipe.Open(pipe.Setup({}, ME), 1, b"", b"", ""),
            feed=self.feed,
            read=lambda raw: self.read[raw],
            initial=self._never,
            hold=lambda payload, data: None,
            report=lambda now: Report(now.turn),
            turned=lambda answer, size: None,
            limits=Limits(inline_bytes=16),
            clock=lambda: self.now,
        )

    async def _never(self) -> None:
        raise AssertionError("the worker makes the initial model itself")

    def put(self, number: int) -> None:
        data = payload(number)
        update = Update(BOBS, number, number, "fake", digest(data), len(data))
        raw = b"record %d" % number
        self.read[raw] = update
        self.store.append(Record(digest(raw), raw, update), data)

    def feed(self, event: ev.Event) -> None:
        self.told.append(event)
        self.heard.set()

    async def until(self, kind: type[ev.Event], count: int = 1) -> Any:
        """Wait until the core was told `count` such events; return the last."""
        while len(found := [e for e in self.told if isinstance(e, kind)]) < count:
            self.heard.clear()
            await self.heard.wait()
        return found[count - 1]


def play(directory: Path, scenario: Callable[[Scene], Awaitable[None]], updates: int = 0) -> Scene:
    async def main() -> Scene:
        scene = Scene(directory, updates)
        running = asyncio.create_task(scene.foreman.run())
        try:
            async with asyncio.timeout(200):
                await scene.until(ev.WorkerReady)
                await scenario(scene)
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
        return scene

    return asyncio.run(main())


def test_a_turn_is_what_arrived_then_training(tmp_path: Path) -> None:
    async def scenario(scene: Scene) -> None:
        scene.foreman.give(ev.StartTurn(4, 2.0, ((BOBS, 3),)))
        applied = await scene.until(ev.Applied)
        assert applied.frontier == ((BOBS, 3),)
        assert [key.number for key, _ in applied.deltas] == [1, 2, 3]
        assert [delta for _, delta in applied.deltas] == [value_of(payload(n)) for n in (1, 2, 3)]
        done = await scene.until(ev.TurnDone)
        assert (done.turn, done.payload, done.size) == (4, digest(payload(4)), len(payload(4)))
        assert scene.told[-2:] == [applied, done]

    play(tmp_path, scenario, updates=5)


def test_a_long_log_goes_in_batches_each_update_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(foreman_module, "BATCH_UPDATES", 7)
    monkeypatch.setattr(foreman_module, "BATCH_BYTES", 5 * len(payload(1)))

    async def scenario(scene: Scene) -> None:
        scene.foreman.give(ev.Apply(((BOBS, 23),)))
        applied = await scene.until(ev.Applied)
        assert len(applied.deltas) == 23
        batches = [r for r in scene.worker.asked if isinstance(r, pipe.Apply)]
        assert max(len(b.items) for b in batches) <= 5

    play(tmp_path, scenario, updates=23)


def test_no_checkpoint_is_asked_for_while_the_log_on_disk_lacks_updates(tmp_path: Path) -> None:
    async def scenario(scene: Scene) -> None:
        update = Update(Author(ME, 1), 1, 1, "fake", digest(b""), 0)
        scene.foreman.commit(update)
        scene.store.degrade("disk: full")
        scene.put(1)
        scene.foreman.commit(update)
        scene.foreman.give(ev.Apply(()))
        await scene.until(ev.Applied)
        assert scene.store.mend()
        scene.foreman.commit(update)
        scene.foreman.give(ev.Apply(()))
        await scene.until(ev.Applied, 2)
        commits = [r for r in scene.worker.asked if isinstance(r, pipe.Commit)]
        assert [c.save for c in commits] == [False, False, True], "as it is when they are made"

    play(tmp_path, scenario, updates=0)


def test_what_a_dead_worker_was_told_is_not_told_to_the_next(tmp_path: Path) -> None:
    async def scenario(scene: Scene) -> None:
        scene.worker.hang = True
        scene.foreman.give(ev.StartTurn(1, 1.0, ()))
        scene.foreman.commit(Update(Author(ME, 1), 1, 1, "fake", digest(b""), 0))
        scene.foreman.discard()
        while not any(isinstance(r, pipe.Turn) for r in scene.worker.asked):
            await asyncio.sleep(0)
        scene.worker.hang = False
        scene.worker.die(WorkerDied("worker: killed"))
        await scene.until(ev.WorkerReady, 2)
        scene.foreman.give(ev.Apply(()))
        await scene.until(ev.Applied, 2)
        asked = [type(r) for r in scene.worker.asked]
        assert pipe.Commit not in asked
        assert pipe.Discard not in asked
        assert [e.reason for e in scene.told if isinstance(e, ev.WorkerDown)] == ["killed"]

    play(tmp_path, scenario)


def test_a_death_while_nothing_is_asked_is_noticed(tmp_path: Path) -> None:
    async def scenario(scene: Scene) -> None:
        scene.worker.die(WorkerDied("worker: killed"))
        await scene.until(ev.WorkerDown)
        await scene.until(ev.WorkerReady, 2)
        assert scene.worker.starts == 2

    play(tmp_path, scenario)


@pytest.mark.parametrize("end", [WorkerDied("worker: killed"), WorkerRefused("no such data")])
def test_an_export_that_the_worker_does_not_survive_is_refused(
    tmp_path: Path, end: Exception
) -> None:
    async def scenario(scene: Scene) -> None:
        scene.worker.hang = True
        export = asyncio.create_task(scene.foreman.export(tmp_path / "model", about))
        while not any(isinstance(r, pipe.Export) for r in scene.worker.asked):
            await asyncio.sleep(0)
        scene.worker.hang = False
        scene.worker.die(end)
        with pytest.raises(ConfigError, match="the worker died"):
            await export

    play(tmp_path, scenario)


def test_an_export_when_no_worker_can_be_had_any_more_is_refused(tmp_path: Path) -> None:
    async def scenario(scene: Scene) -> None:
        scene.worker.gone = True
        scene.worker.die(WorkerDied("worker: killed"))
        await scene.until(ev.WorkerDown, 2)
        with pytest.raises(ConfigError, match="no worker runs"):
            await scene.foreman.export(tmp_path / "model", about)

    play(tmp_path, scenario)


def test_an_export_that_waits_while_the_daemon_stops_is_refused(tmp_path: Path) -> None:
    waiting: list[asyncio.Task[None]] = []

    async def scenario(scene: Scene) -> None:
        scene.worker.hang = True
        waiting.append(asyncio.create_task(scene.foreman.export(tmp_path / "model", about)))
        while not any(isinstance(r, pipe.Export) for r in scene.worker.asked):
            await asyncio.sleep(0)

    async def main() -> None:
        scene = Scene(tmp_path, 0)
        running = asyncio.create_task(scene.foreman.run())
        await scene.until(ev.WorkerReady)
        await scenario(scene)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        with pytest.raises(ConfigError, match="stopping"):
            await asyncio.wait_for(waiting[0], 200)

    asyncio.run(main())


def test_the_measure_waits_for_its_turn_and_reaches_the_status(tmp_path: Path) -> None:
    async def scenario(scene: Scene) -> None:
        scene.foreman.give(ev.StartTurn(1, 1.0, ()))
        await scene.foreman.evaluate()
        kinds = [type(r) for r in scene.worker.asked]
        assert kinds == [pipe.Open, pipe.Turn, pipe.Evaluate]
        assert scene.foreman.now.evaluation == 2.5

    play(tmp_path, scenario)


def test_a_measure_is_of_the_model_that_it_was_made_of(tmp_path: Path) -> None:
    async def scenario(scene: Scene) -> None:
        now: Progress = scene.foreman.now
        scene.foreman.give(ev.Apply(((BOBS, 2),)))
        await scene.foreman.evaluate()
        assert (now.evaluation, now.measured) == (2.5, now.fingerprint)
        scene.foreman.give(ev.Apply(((BOBS, 3),)))
        await scene.until(ev.Applied, 2)
        assert now.measured != now.fingerprint, "the model moved on"
        await scene.foreman.evaluate()
        scene.worker.looks = False
        scene.foreman.give(ev.StartTurn(1, 1.0, ((BOBS, 3),)))
        await scene.until(ev.TurnDone)
        assert (now.evaluation, now.measured) == (2.5, now.fingerprint), "it was not measured anew"
        scene.worker.looks = True
        scene.foreman.give(ev.StartTurn(2, 1.0, ((BOBS, 3),)))
        await scene.until(ev.TurnDone, 2)
        assert (now.evaluation, now.measured) == (3.5, None), "a quick look is not a thorough one"

    play(tmp_path, scenario, updates=3)


def test_a_measure_that_is_no_number_replaces_the_last_good_one(tmp_path: Path) -> None:
    async def scenario(scene: Scene) -> None:
        await scene.foreman.evaluate()
        scene.worker.measure = None
        await scene.foreman.evaluate()
        assert scene.foreman.now.evaluation is None
        assert scene.foreman.now.measured == scene.foreman.now.fingerprint

    play(tmp_path, scenario)


def test_an_exported_file_says_what_the_model_in_it_holds(tmp_path: Path) -> None:
    async def scenario(scene: Scene) -> None:
        scene.foreman.give(ev.Apply(((BOBS, 2),)))
        export = asyncio.create_task(scene.foreman.export(tmp_path / "model", about))
        await asyncio.sleep(0)
        scene.foreman.give(ev.Apply(((BOBS, 3),)))  # too late for what is written
        await export
        [asked] = [r for r in scene.worker.asked if isinstance(r, pipe.Export)]
        assert asked.metadata == {"updates": "2"}

    play(tmp_path, scenario, updates=3)


def test_a_flipped_bit_shows_in_the_fingerprint_stated_after_a_while(tmp_path: Path) -> None:
    async def scenario(scene: Scene) -> None:
        scene.foreman.give(ev.Apply(((BOBS, 1),)))
        honest = (await scene.until(ev.Applied)).fingerprint
        assert honest == value_of(payload(1))
        scene.worker.flipped = 4
        scene.foreman.give(ev.Apply(((BOBS, 1),)))
        assert (await scene.until(ev.Applied, 2)).fingerprint == honest
        scene.now += foreman_module.RECOMPUTE
        scene.foreman.give(ev.Apply(((BOBS, 1),)))
        assert (await scene.until(ev.Applied, 3)).fingerprint == (honest[0] ^ 4, honest[1])

    play(tmp_path, scenario, updates=1)


def test_a_damaged_update_is_given_back_to_the_core_and_the_worker_starts_without_it(
    tmp_path: Path,
) -> None:
    async def scenario(scene: Scene) -> None:
        place = scene.store._numbers[BOBS].get(2)
        path = next(tmp_path.glob("*.seg"))
        data = bytearray(path.read_bytes())
        data[(place & ((1 << 40) - 1)) + HEAD_BYTES + len(b"record 2") + 5] ^= 1
        path.write_bytes(data)
        scene.foreman.give(ev.Apply(((BOBS, 3),)))
        await scene.until(ev.WorkerReady, 2)
        assert [e for e in scene.told if isinstance(e, ev.Lost)] == [
            ev.Lost(foreman_module.Key(BOBS, 2))
        ]
        scene.foreman.give(ev.Apply(((BOBS, 1),)))
        assert (await scene.until(ev.Applied)).frontier == ((BOBS, 1),)
        scene.put(2)  # fetched anew
        scene.foreman.give(ev.Apply(((BOBS, 3),)))
        assert (await scene.until(ev.Applied, 2)).frontier == ((BOBS, 3),)
        assert scene.worker.starts == 1, "the process lives on"

    play(tmp_path, scenario, updates=3)


def test_progress_survives_a_restart_of_the_worker(tmp_path: Path) -> None:
    async def scenario(scene: Scene) -> None:
        scene.foreman.give(ev.StartTurn(1, 1.0, ()))
        await scene.until(ev.TurnDone)
        scene.worker.die(WorkerDied("worker: killed"))
        await scene.until(ev.WorkerReady, 2)
        scene.foreman.give(ev.StartTurn(2, 1.0, ()))
        await scene.until(ev.TurnDone, 2)
        now: Progress = scene.foreman.now
        assert (now.turn, now.steps, now.skipped) == (2, 6, 1 + 2)

    play(tmp_path, scenario)
