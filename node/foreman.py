"""The worker's day: opened, given one job after the other in order, opened again when it died.

The core asks for one thing at a time; commits, discards and the operator's calls queue up beside
that. Payloads go from the log to the worker in batches; nothing else of the log is in memory.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import TypeVar

from shoal.gossip import events as ev
from shoal.gossip.limits import Limits
from shoal.gossip.names import Author, Hash, Key, PeerId, RunId
from shoal.gossip.records import Report, Update
from shoal.node import pipe, snapshots
from shoal.node.errors import ConfigError
from shoal.node.store import DamagedError, Store
from shoal.node.supervisor import Supervisor, WorkerDied, WorkerGone, WorkerRefused

log = logging.getLogger(__name__)

BATCH_BYTES = 32 << 20
"""Payload bytes given to the worker at once."""
BATCH_UPDATES = 512
RECOMPUTE = 600.0
"""Seconds between looks at the tensor itself: a bit that flipped in memory shows."""

Counts = tuple[tuple[Author, int], ...]
Job = Callable[[], Awaitable[None]]
Metadata = Callable[[Mapping[Author, int]], Mapping[str, str]]
"""What an exported file says about itself, from how many updates of each author it holds."""
Order = ev.StartTurn | ev.Apply | ev.Subtract | ev.Rebuild
Answered = TypeVar("Answered", bound=pipe.Answer)


@dataclass(slots=True)
class Progress:
    """What the worker said last; for status and reports."""

    device: str = ""
    unit: str = ""
    memory: int = 0
    steps: int = 0
    """Local steps of this peer in this run, restarts of the worker included."""
    seconds: float = 0.0
    """Spent in the local steps of the last turn."""
    last_steps: int = 0
    turn: int = 0
    loss: float | None = None
    evaluation: float | None = None
    first_evaluation: float | None = None
    measured: tuple[int, int] | None = None
    """Fingerprint of the model whose thorough measure `evaluation` is; None: a turn's quick one."""
    published_bytes: int = 0
    refused: int = 0
    skipped: int = 0
    """Local steps that taught nothing, since their loss was not finite."""
    out_of_range: int = 0
    applied: dict[Author, int] = field(default_factory=dict)
    fingerprint: tuple[int, int] = (0, 0)


class Foreman:
    """Turns the core's requests into the worker's, and its answers into events."""

    def __init__(
        self,
        supervisor: Supervisor,
        store: Store,
        opening: pipe.Open,
        *,
        feed: Callable[[ev.Event], object],
        read: Callable[[bytes], Update],
        initial: Callable[[], Awaitable[None]],
        hold: Callable[[Hash, bytes], None],
        report: Callable[[Progress], Report],
        turned: Callable[[pipe.Turned, int], None],
        limits: Limits,
        snapshot: Path | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Prepare.

        `read` turns a stored record into its update; `initial` fetches the initial integers into
        the file named in `opening`; `hold` keeps a payload until the store takes it; `report` makes
        what others are told; `turned` is called after each turn with its payload's size. The model
        begins with what the file `snapshot` holds, if there is one.
        """
        self.supervisor = supervisor
        self.store = store
        self.opening = opening
        self.limits = limits
        self.now = Progress()
        self._feed = feed
        self._read = read
        self._initial = initial
        self._hold = hold
        self._report = report
        self._turned = turned
        self._clock = clock
        self._snapshot = snapshot
        self._computed = 0.0
        """When the fingerprint was last computed from the tensor."""
        self._jobs: asyncio.Queue[Job] = asyncio.Queue()
        self._asked: set[asyncio.Future[None]] = set()
        """Requests of the operator that wait for the worker."""

    # ---------------------------------------------------------------- what others call

    def give(self, request: Order) -> None:
        """Let the worker do what the core asks; the answer comes as an event."""
        self._jobs.put_nowait(lambda: self._do(request))

    def commit(self, update: Update) -> None:
        """Tell the worker that its pending update got a number.

        No checkpoint is to hold more than the log on disk: the next start could not use it.
        """
        self.now.published_bytes += update.size
        log, number = update.author.log, update.number
        self._jobs.put_nowait(
            lambda: self._plain(pipe.Commit(log, number, save=not self.store.waiting))
        )

    def discard(self) -> None:
        """Tell the worker that its pending update is not published."""
        self._jobs.put_nowait(lambda: self._plain(pipe.Discard()))

    def forget_snapshot(self) -> None:
        """Let the model begin at the initial one from now on; a `Rebuild` follows."""
        if self._snapshot is not None:
            snapshots.forget(self._snapshot)
        self._snapshot = None

    async def sums(self) -> snapshots.Sums:
        """Return what the run added to the initial model; raises ConfigError without a worker."""
        answer, body = await self._ask(pipe.Sums, pipe.Summed)
        return _counts(_applied(answer.frontier)), answer.fingerprint, body

    async def export(self, path: Path, metadata: Metadata) -> None:
        """Write the shared model; raises ConfigError when that can't be done.

        `metadata` is asked when the worker comes to it, about the updates that its model then has.
        """
        answer, _ = await self._ask(
            lambda: pipe.Export(str(path), dict(metadata(self.now.applied))), pipe.Ready
        )
        if answer.problem:
            raise ConfigError(answer.problem)

    async def evaluate(self) -> None:
        """Measure the shared model on held-out data as well as can be, into `now.evaluation`."""
        await self._ask(pipe.Evaluate, pipe.Measured, self._thoroughly)

    async def run(self) -> None:
        """Open the worker and do its jobs, until cancelled or until no worker can be had."""
        try:
            while True:
                try:
                    await self.supervisor.start()
                    await self._open()
                    while True:
                        await self._next_job()
                except (WorkerGone, WorkerRefused) as end:
                    self._down(str(end))
                    return
                except WorkerDied as death:
                    self._down(death.reason)
        finally:
            self._refuse("the daemon is stopping")

    async def _next_job(self) -> None:
        """Do the next job, or notice that the worker died while there was none."""
        get = asyncio.create_task(self._jobs.get())
        death = asyncio.create_task(self.supervisor.dead())
        try:
            await asyncio.wait({get, death}, return_when=asyncio.FIRST_COMPLETED)
            if not get.done():
                raise WorkerDied(death.result())
            await get.result()()
        finally:
            get.cancel()
            death.cancel()

    def _down(self, reason: str) -> None:
        log.warning("worker down", extra={"reason": reason})
        self._jobs = asyncio.Queue()
        self._refuse(f"the worker died: {reason}")
        self._feed(ev.WorkerDown(reason.removeprefix("worker: ")))

    def _refuse(self, why: str) -> None:
        """Tell the operator, who waits, that his requests will not be done."""
        for asked in self._asked:
            if not asked.done():
                asked.set_exception(ConfigError(why))
        self._asked.clear()

    # ---------------------------------------------------------------- opening

    async def _open(self) -> None:
        opening, sums = self._opening()
        kinds = (pipe.Opened, pipe.NeedInitial)
        answer, _ = await self.supervisor.ask_body(opening, kinds, [sums])
        if isinstance(answer, pipe.NeedInitial):
            await self._initial()
            answer = await self.supervisor.ask(opening, pipe.Opened, sums)
        assert isinstance(answer, pipe.Opened)
        if answer.note:
            log.warning("checkpoint not used", extra={"reason": answer.note})
        self.now.device, self.now.unit = answer.device, answer.unit
        self._moved(answer.frontier, answer.fingerprint)
        self._computed = self._clock()
        self._feed(ev.WorkerReady(_counts(self.now.applied), self.now.fingerprint))

    def _opening(self) -> tuple[pipe.Open, bytes]:
        counts = self.store.counts()
        run = RunId(self.opening.setup.run_id)
        held = snapshots.begin_with(self._snapshot, run) if self._snapshot is not None else None
        snapshot, sums = held or (None, b"")
        own = Author(PeerId(self.opening.setup.peer), self.store.log)
        opening = pipe.Open(
            setup=self.opening.setup,
            parameters=self.opening.parameters,
            layout=self.opening.layout,
            initial_root=self.opening.initial_root,
            initial=self.opening.initial,
            checkpoint=self.opening.checkpoint,
            held=sorted((a.peer, a.log, n) for a, n in counts.items()),
            own=(own.log, counts[own]) if counts.get(own) else None,
            summed=[(a.peer, a.log, n) for a, n in snapshot.counts()] if snapshot else [],
        )
        return opening, sums

    # ---------------------------------------------------------------- the core's requests

    async def _do(self, request: Order) -> None:
        match request:
            case ev.Apply(frontier):
                self._feed(await self._apply(frontier))
            case ev.StartTurn():
                self._feed(await self._apply(request.frontier))
                self._feed(await self._turn(request))
            case ev.Subtract(author, first, last):
                self._feed(await self._subtract(author, first, last))
            case ev.Rebuild():
                answer = await self.supervisor.ask(
                    pipe.Reset(whole=self._snapshot is None), pipe.Done
                )
                self._moved(answer.frontier, answer.fingerprint)
                self._feed(ev.Rebuilt(self._applied([], [])))

    async def _apply(self, frontier: Counts) -> ev.Applied:
        deltas: list[tuple[Key, tuple[int, int]]] = []
        refused: list[tuple[Key, str]] = []
        for items, bodies in self._batches(self._missing(frontier)):
            answer = await self.supervisor.ask(pipe.Apply(items), pipe.Done, *bodies)
            for item, result in zip(items, answer.results, strict=True):
                key = _key(item)
                deltas.append((key, result.delta))
                if result.refused is not None:
                    refused.append((key, result.refused))
            self._moved(answer.frontier, answer.fingerprint)
            self.now.out_of_range = answer.out_of_range
        if self._clock() - self._computed >= RECOMPUTE:
            answer = await self.supervisor.ask(pipe.Recompute(), pipe.Done)
            self._moved(answer.frontier, answer.fingerprint)
            self._computed = self._clock()
        self.now.refused += len(refused)
        return self._applied(deltas, refused)

    async def _subtract(self, author: Author, first: int, last: int) -> ev.Applied:
        keys = (Key(author, number) for number in range(last, first - 1, -1))
        for items, bodies in self._batches(keys):
            answer = await self.supervisor.ask(pipe.Subtract(items), pipe.Done, *bodies)
            self._moved(answer.frontier, answer.fingerprint)
        return self._applied([], [])

    async def _turn(self, request: ev.StartTurn) -> ev.TurnDone:
        asked = pipe.Turn(request.turn, request.members, request.lag, request.publish)
        answer, data = await self.supervisor.ask_body(asked, pipe.Turned)
        now = self.now
        now.turn, now.loss, now.memory = request.turn, answer.loss, answer.memory
        now.steps += answer.steps
        now.skipped += answer.skipped
        now.last_steps, now.seconds = answer.steps, answer.seconds
        if answer.measured:
            self._measured(answer.evaluation)
        self._turned(answer, len(data))
        if answer.dropped is not None:
            log.warning("turn dropped", extra={"turn": request.turn, "reason": answer.dropped})
        if answer.dropped is not None or not request.publish:
            return ev.TurnDone(request.turn, answer.kind, None, 0, None, self._report(now))
        payload_hash = Hash(blake2b(data, digest_size=32).digest())
        inline = data if len(data) <= self.limits.inline_bytes else None
        if inline is None:
            self._hold(payload_hash, data)
        report = self._report(now)
        return ev.TurnDone(request.turn, answer.kind, payload_hash, len(data), inline, report)

    # ---------------------------------------------------------------- updates from the log

    def _missing(self, frontier: Counts) -> Iterator[Key]:
        for author, count in sorted(frontier):
            for number in range(self.now.applied.get(author, 0) + 1, count + 1):
                yield Key(author, number)

    def _batches(self, keys: Iterator[Key]) -> Iterator[tuple[list[pipe.Item], list[bytes]]]:
        items: list[pipe.Item] = []
        bodies: list[bytes] = []
        size = 0
        for key in keys:
            item, body = self._item(key)
            items.append(item)
            bodies.append(body)
            size += len(body)
            if size >= BATCH_BYTES or len(items) >= BATCH_UPDATES:
                yield items, bodies
                items, bodies, size = [], [], 0
        if items:
            yield items, bodies

    def _item(self, key: Key) -> tuple[pipe.Item, bytes]:
        try:
            found = self.store.get(*key)
        except DamagedError as error:
            raise self._lost(key, f"the log is damaged: {error}") from error
        if found is None:
            why = f"update {key.number} of a log in the frontier is not in the store"
            raise self._lost(key, why)
        raw, payload = found
        update = self._read(raw)
        payload = payload if payload is not None else update.inline
        item = pipe.Item(
            peer=key.author.peer,
            log=key.author.log,
            number=key.number,
            turn=update.turn,
            kind=update.kind,
            size=update.size,
            length=-1 if payload is None else len(payload),
        )
        return item, payload or b""

    def _lost(self, key: Key, why: str) -> WorkerDied:
        """Let the core fetch it anew; the worker starts again from what the log has now."""
        self._feed(ev.Lost(key))
        return WorkerDied(why)

    # ---------------------------------------------------------------- helpers

    async def _plain(self, request: pipe.Commit | pipe.Discard) -> None:
        await self.supervisor.ask(request, pipe.Ready)

    async def _ask(
        self,
        request: Callable[[], pipe.Request],
        expect: type[Answered],
        then: Callable[[Answered], None] = lambda _: None,
    ) -> tuple[Answered, bytes]:
        """Let the operator's request wait its turn; its failure is the operator's to know.

        It is made when its turn has come, and `then` is called before anything else is done.
        """
        if self.supervisor.pid is None:
            raise ConfigError(f"no worker runs: {self.supervisor.reason or 'it is starting'}")
        asked: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        answers: list[tuple[Answered, bytes]] = []

        async def job() -> None:
            answers.append(await self.supervisor.ask_body(request(), expect))
            then(answers[0][0])
            if not asked.done():
                asked.set_result(None)

        self._asked.add(asked)
        self._jobs.put_nowait(job)
        try:
            await asked
        finally:
            self._asked.discard(asked)
        return answers[0]

    def _applied(
        self,
        deltas: list[tuple[Key, tuple[int, int]]],
        refused: list[tuple[Key, str]],
    ) -> ev.Applied:
        return ev.Applied(
            _counts(self.now.applied), self.now.fingerprint, tuple(deltas), tuple(refused)
        )

    def _moved(self, frontier: pipe.Frontier, fingerprint: pipe.Lanes) -> None:
        self.now.applied = _applied(frontier)
        self.now.fingerprint = fingerprint

    def _measured(self, value: float | None, of: pipe.Lanes | None = None) -> None:
        """Note a measure; one that is no number (None) must not leave an older one standing."""
        self.now.evaluation, self.now.measured = value, of
        if self.now.first_evaluation is None:
            self.now.first_evaluation = value

    def _thoroughly(self, answer: pipe.Measured) -> None:
        self._measured(answer.value, self.now.fingerprint)


def _applied(frontier: pipe.Frontier) -> dict[Author, int]:
    return {Author(PeerId(peer), log): n for peer, log, n in frontier}


def _counts(applied: Mapping[Author, int]) -> Counts:
    return tuple(sorted(applied.items()))


def _key(item: pipe.Item) -> Key:
    return Key(Author(PeerId(item.peer), item.log), item.number)
