"""Runs trained side by side: each recipe and seed in a process of its own, with a curve each.

A child trains all peers of one run in process, as `shoal simulate` does: the cores, turns, codecs
and ledger of daemons on a simulated network. The same seed gives the same numbers, whatever else
the machine does. The command that starts the children never imports torch.
"""

import contextlib
import json
import math
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import mean, stdev
from typing import IO, Any

from shoal.node.errors import ConfigError
from shoal.node.swarm import end_with_parent, reference_bytes

HORIZON = 1e6
"""Simulated seconds after which a run that does not end is given up."""
LOOK = 0.2
"""Seconds between looks for Ctrl-C."""
ENDING = 5.0
"""Seconds that a child has to end when it is told to."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One run to train with one seed."""

    name: str
    tables: dict[str, Any]
    peers: int
    seed: int
    """Added to the run's own; 0 trains it as the file says."""
    data: str | None = None
    base: str | None = None
    allow_task: str | None = None


@dataclass(frozen=True, slots=True)
class Point:
    """The state of a run when every peer has taken `turn` turns: means over the peers."""

    turn: int
    loss: float | None
    """Of the turn's local steps; None before the first."""
    held_out: float | None
    """The task's measure of the shared model, by the quick look that turns take."""
    published: float
    """Payload bytes of a peer's own updates until then."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What came of one job."""

    name: str
    seed: int
    failed: str = ""
    """Why there are no numbers, or why they are not to be trusted; empty: there are."""
    unit: str = ""
    peers: int = 0
    parameters: int = 0
    steps: float = 0.0
    """Local steps of a peer, mean."""
    before: float | None = None
    after: float | None = None
    """By the thorough look."""
    points: tuple[Point, ...] = ()

    @property
    def published(self) -> float:
        """Payload bytes of a peer's own updates, mean over the peers."""
        return self.points[-1].published if self.points else 0.0

    @property
    def turns(self) -> int:
        """Turns that were taken."""
        return self.points[-1].turn if self.points else 0

    @property
    def fewer(self) -> float | None:
        """How many times fewer bytes a peer sends than in float32 gradient all-reduce.

        Each payload counts once for every other peer, as `shoal swarm` counts it.
        """
        carried = self.published * (self.peers - 1)
        reference = reference_bytes(self.peers, self.parameters, self.steps)
        return reference / carried if carried and reference else None


# ---------------------------------------------------------------- many jobs


@dataclass(slots=True)
class Children:
    """Runs jobs in child processes, at most `most` at once; all end with the block."""

    most: int
    say: Callable[[str], None]
    """Gets a line whenever there is progress."""
    _running: "set[subprocess.Popen[str]]" = field(default_factory=set)
    _over: bool = False
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def check(self, jobs: Sequence[Job]) -> None:
        """Raise ConfigError for the first job whose run file says what cannot be."""
        for answer in self._ask({"check": [asdict(job) for job in jobs]}):
            if "refused" in answer:
                raise ConfigError(answer["refused"])

    def train(self, jobs: Sequence[Job]) -> list[Result]:
        """Return the results in the order of the jobs; Ctrl-C ends all children."""
        todo: queue.SimpleQueue[int] = queue.SimpleQueue()
        for place in range(len(jobs)):
            todo.put(place)
        found: dict[int, Result] = {}
        finished = threading.Semaphore(0)
        errors: list[BaseException] = []

        def work() -> None:
            try:
                while not self._over:
                    place = todo.get_nowait()
                    found[place] = self._train(jobs[place])
            except queue.Empty:
                pass
            except BaseException as error:  # handed to the thread that waits
                errors.append(error)
            finally:
                finished.release()

        threads = [threading.Thread(target=work) for _ in range(min(self.most, len(jobs)))]
        try:
            for thread in threads:
                thread.start()
            for _ in threads:
                # A signal may reach another thread, or this one just before it sleeps: then
                # nothing would wake it.
                while not finished.acquire(timeout=LOOK):
                    pass
        finally:
            self._end()
            for thread in threads:
                if thread.is_alive():
                    thread.join()
        if errors:
            raise errors[0]
        return [found[place] for place in range(len(jobs))]

    def _train(self, job: Job) -> Result:
        label = f"{job.name}, seed {job.seed}"
        try:
            for answer in self._ask({"train": asdict(job)}):
                if "turn" in answer:
                    self.say(f"{label}: turn {answer['turn']}, held out {answer['held_out']}")
                elif "failed" in answer:
                    return Result(name=job.name, seed=job.seed, failed=answer["failed"])
                else:
                    return result(answer["result"])
        except ConfigError as error:
            if self._over:
                raise
            return Result(name=job.name, seed=job.seed, failed=str(error))
        raise AssertionError("a child ended well and said nothing")

    def _ask(self, question: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """Yield what a child answers, line by line; raise ConfigError if it breaks down."""
        argv = [sys.executable, "-m", "shoal.node.compare", str(os.getpid())]
        with tempfile.TemporaryFile("w+") as complaints, self._child(argv, complaints) as child:
            assert child.stdin is not None
            assert child.stdout is not None
            with contextlib.suppress(BrokenPipeError):  # then its exit code says why
                child.stdin.write(json.dumps(question))
                child.stdin.close()
            for line in child.stdout:
                yield json.loads(line)
            if child.wait():
                complaints.seek(0)
                said = complaints.read().strip().splitlines() or ["it said nothing"]
                raise ConfigError(f"a training process ended with {child.returncode}: {said[-1]}")

    @contextlib.contextmanager
    def _child(self, argv: Sequence[str], complaints: IO[str]) -> "Iterator[subprocess.Popen[str]]":
        with self._lock:
            if self._over:
                raise ConfigError("interrupted")
            # A group of its own: Ctrl-C reaches us alone, and we end the children.
            child = subprocess.Popen(
                argv,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=complaints,
                text=True,
                process_group=0,
            )
            self._running.add(child)
        try:
            yield child
        finally:
            with self._lock:
                self._running.discard(child)
            _end(child)

    def _end(self) -> None:
        with self._lock:
            self._over, running = True, list(self._running)
        for child in running:
            _end(child)


def _end(child: "subprocess.Popen[str]") -> None:
    if child.poll() is None:
        child.terminate()
        try:
            child.wait(ENDING)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
    if child.stdout is not None:
        child.stdout.close()


def result(plain: Mapping[str, Any]) -> Result:
    """Return a result from the plain data that a child prints."""
    points = tuple(Point(**point) for point in plain["points"])
    return Result(**{**plain, "points": points})


# ---------------------------------------------------------------- what came of them


@dataclass(frozen=True, slots=True)
class Spread:
    """A number over several seeds."""

    mean: float
    deviation: float
    """Standard deviation of the sample; 0 for one seed."""

    @classmethod
    def of(cls, values: "Sequence[float | None]") -> "Spread | None":
        """Return mean and deviation of the numbers that are known; None without any."""
        known = [value for value in values if value is not None]
        if not known:
            return None
        return cls(mean(known), stdev(known) if len(known) > 1 else 0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One run over all its seeds."""

    name: str
    per_turn: float
    """Payload bytes per peer and turn."""
    published: float
    """Payload bytes per peer, all turns."""
    before: Spread | None
    after: Spread | None
    fewer: float | None
    failed: str = ""


def rows(results: Sequence[Result]) -> list[Row]:
    """Return one row per run, in the order of the results."""
    found = []
    for name in dict.fromkeys(r.name for r in results):
        own = [r for r in results if r.name == name]
        good = [r for r in own if not r.failed]
        fewer = [r.fewer for r in good if r.fewer is not None]
        turned = [r for r in good if r.turns]
        found.append(
            Row(
                name=name,
                per_turn=mean(r.published / r.turns for r in turned) if turned else 0.0,
                published=mean(r.published for r in good) if good else 0.0,
                before=Spread.of([r.before for r in good]),
                after=Spread.of([r.after for r in good]),
                fewer=mean(fewer) if fewer else None,
                failed="; ".join(f"seed {r.seed}: {r.failed}" for r in own if r.failed),
            )
        )
    return found


def curves(results: Sequence[Result]) -> dict[str, list[Point]]:
    """Return the points of each run that came to its end, means over the seeds that did."""
    found = {}
    for name in dict.fromkeys(r.name for r in results):
        good = [r for r in results if r.name == name and not r.failed]
        last = min((r.turns for r in good), default=0)
        if good:
            found[name] = [_averaged([r.points[turn] for r in good]) for turn in range(last + 1)]
    return found


def _averaged(points: Sequence[Point]) -> Point:
    return Point(
        points[0].turn,
        _mean([p.loss for p in points]),
        _mean([p.held_out for p in points]),
        mean(p.published for p in points),
    )


def _mean(values: "Sequence[float | None]") -> float | None:
    spread = Spread.of(values)
    return None if spread is None else spread.mean


# ---------------------------------------------------------------- the child's side: with torch


class Recorder:
    """A worker that remembers what each turn said and how much was published until then."""

    def __init__(self, worker: Any) -> None:
        self.worker = worker
        self.turns: dict[int, tuple[float | None, float | None, int]] = {}
        """By turn: loss of it, held-out measure before it, payload bytes with it."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self.worker, name)

    def turn(self, *arguments: Any) -> Any:
        """Let the worker take the turn."""
        turned = self.worker.turn(*arguments)
        last = self.worker.last
        self.turns[last.turn] = (
            _known(last.loss),
            _known(last.evaluation),
            self.worker.published,
        )
        return turned


def _main() -> None:
    end_with_parent(int(sys.argv[1]))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    question = json.load(sys.stdin)
    sys.stdout = sys.stderr  # a task is anybody's code, and may print
    try:
        if "check" in question:
            for job in question["check"]:
                _check(Job(**job))
        else:
            _tell({"result": asdict(_train(Job(**question["train"])))})
    except ConfigError as error:
        _tell({"refused" if "check" in question else "failed": str(error)})


def _check(job: Job) -> None:
    from shoal.training.run import RunError, RunSpec

    try:
        spec = RunSpec.parse(job.tables, allow_task=job.allow_task)
    except RunError as error:
        raise ConfigError(f"{job.name}: {error}") from error
    if not spec.run.turns:
        raise ConfigError(f"{job.name} goes on for ever; say where to stop: --turns 10")
    if not spec.local.steps and any(plane.by_time for plane in spec.planes):
        raise ConfigError(f"{job.name} takes turns by the clock; say how long one is: --steps 30")


def _train(job: Job) -> Result:
    from shoal.node import rehearsal
    from shoal.node.simulation.faults import Network
    from shoal.node.simulation.simulator import Simulator

    tables = {**job.tables, "run": dict(job.tables["run"])}
    tables["run"]["seed"] = tables["run"].get("seed", 0) + job.seed
    simulator = rehearsal.rehearse(
        tables,
        job.peers,
        seed=job.seed,
        network=Network(),
        data=job.data,
        base=job.base,
        allow_task=job.allow_task,
    )
    recorders = [Recorder(peer.worker) for peer in simulator.peers]
    for peer, recorder in zip(simulator.peers, recorders, strict=True):
        peer.worker = recorder
    before = _known(recorders[0].evaluate())
    shown = 0

    def over(simulator: Simulator) -> bool:
        nonlocal shown
        turn = min(max(recorder.turns, default=0) for recorder in recorders)
        if turn > shown:
            shown = turn
            _tell(_progress(recorders, turn))
        return rehearsal.done(simulator)

    ended = simulator.run(HORIZON, over)
    models = {recorder.fingerprint() for recorder in recorders}
    if not ended or len(models) > 1:
        raise ConfigError("the peers did not end with one model")
    trainer = recorders[0].trainer
    after = _known(trainer.evaluate())
    return Result(
        name=job.name,
        seed=job.seed,
        unit=trainer.unit,
        peers=job.peers,
        parameters=trainer.parameters,
        steps=mean(recorder.steps for recorder in recorders),
        before=before,
        after=after,
        points=tuple(_points(recorders, _quickly(trainer))),
    )


def _progress(recorders: Sequence[Recorder], turn: int) -> dict[str, Any]:
    """Return how far all are who have begun `turn`: what they measured before it."""
    measured = _mean([recorder.turns[turn][1] for recorder in recorders])
    return {"turn": turn - 1, "held_out": None if measured is None else round(measured, 4)}


def _points(recorders: Sequence[Recorder], final: float | None) -> list[Point]:
    """Return the curve; what is measured before turn t + 1 is the model after turn t."""
    last = max(max(recorder.turns, default=0) for recorder in recorders)
    points, published = [], [0] * len(recorders)
    for turn in range(last + 1):
        for place, recorder in enumerate(recorders):
            if turn in recorder.turns:
                published[place] = recorder.turns[turn][2]
        losses = [r.turns[turn][0] for r in recorders if turn in r.turns]
        measured = [r.turns[turn + 1][1] for r in recorders if turn + 1 in r.turns]
        held_out = _mean(measured) if turn < last else final
        points.append(Point(turn, _mean(losses), held_out, mean(published)))
    return points


def _quickly(trainer: Any) -> float | None:
    """Measure the model as the last `evaluate` left it by the look that turns take."""
    import torch

    if not hasattr(trainer.task, "evaluate"):
        return None
    trainer.model.eval()
    with torch.no_grad():
        return _known(float(trainer.task.evaluate(trainer.model)))


def _known(value: float) -> float | None:
    return value if math.isfinite(value) else None


_ANSWERS: IO[str] = sys.stdout


def _tell(answer: Mapping[str, Any]) -> None:
    print(json.dumps(answer), file=_ANSWERS, flush=True)


if __name__ == "__main__":
    _main()
