"""What the worker does when the daemon asks: one Trainer, its frontier, its checkpoint. Torch."""

import contextlib
import logging
import math
import os
import time
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path

import torch

from shoal.node import pipe
from shoal.node.genesis import another_model
from shoal.node.pipe import PipeError
from shoal.training import merkle
from shoal.training.exchange import Arrived
from shoal.training.run import RunError, RunSpec
from shoal.training.trainer import CheckpointError, Setup, Trainer

log = logging.getLogger(__name__)

CHECKPOINT_SECONDS = 60.0
"""Least time between two checkpoints."""
CHECKPOINT_SHARE = 0.02
"""Largest share of the worker's time that checkpoints may take."""


class Duties:
    """Answers requests, one at a time, with a Trainer that the first of them builds."""

    def __init__(self) -> None:
        self._trainer: Trainer | None = None
        self._setup: pipe.Setup | None = None
        self._counts: dict[tuple[bytes, int], int] = {}
        """How many updates of each (peer, log) the model holds."""
        self._snapshot: tuple[pipe.Frontier, bytes] | None = None
        """What it may begin with: a frontier, and what the updates below it add up to."""
        self._checkpoint: Path | None = None
        self._pending = False
        self._dirty = False
        self._saved_at = time.monotonic()
        self._saving_took = 0.0

    def answer(
        self, request: pipe.Request, body: memoryview
    ) -> tuple[pipe.Answer, Sequence[pipe.Buffer]]:
        """Do what is asked; return the answer and its body."""
        payload: list[pipe.Buffer] = []
        answer: pipe.Answer
        match request:
            case pipe.Found(setup):
                answer = self._found(setup)
            case pipe.Open():
                answer = self._open(request, bytes(body))
            case pipe.Apply(items):
                answer = self._apply(items, body)
            case pipe.Subtract(items):
                answer = self._subtract(items, body)
            case pipe.Reset(whole):
                answer = self._reset(whole=whole)
            case pipe.Turn():
                answer, payload = self._turn(request)
            case pipe.Commit(own_log, number, save):
                answer = self._commit(own_log, number, save=save)
            case pipe.Discard():
                answer = self._discard()
            case pipe.Evaluate():
                answer = pipe.Measured(_finite(self._ready().evaluate()))
            case pipe.Sums():
                answer, payload = self._sums()
            case pipe.Recompute():
                answer = self._done([], self._ready().recompute())
            case pipe.Export(path, metadata):
                answer = self._export(Path(path), metadata)
            case pipe.Stop(save=False):
                answer = pipe.Ready()
            case pipe.Save() | pipe.Stop():
                self._save()
                answer = pipe.Ready()
        return answer, payload

    # ------------------------------------------------------------------ building

    def _found(self, setup: pipe.Setup) -> pipe.Answer:
        trainer = self._build(setup, None)
        founding = trainer.founding()
        return pipe.Founded(
            parameters=founding.parameters,
            layout=founding.layout_hash,
            initial_root=founding.initial_root,
            initial_squares=f"{founding.initial_squares:x}",
            most=founding.most_bytes,
            run=founding.run,
        )

    def _open(self, request: pipe.Open, sums: bytes) -> pipe.Answer:
        """Build the trainer; take the initial integers from the file, or from the seed."""
        file = Path(request.initial)
        given = file.read_bytes() if file.exists() else None
        if given is not None and merkle.root_of(given) != request.initial_root:
            file.unlink()
            given = None
        trainer = self._build(request.setup, given)
        if (trainer.parameters, trainer.layout) != (request.parameters, request.layout):
            raise RunError(another_model(trainer.parameters, request.parameters))
        integers = trainer.initial_bytes()
        if merkle.root_of(integers) != request.initial_root:
            self._trainer = None
            return pipe.NeedInitial()
        if given is None:
            _write(file, integers)
        del given, integers  # as large as the model
        if file.exists():
            trainer.keep_initial(file)
        self._snapshot = (request.summed, sums) if request.summed else None
        note, kept = self._restore(request)
        self._checkpoint = Path(request.checkpoint) if request.checkpoint else None
        self._saved_at = time.monotonic()
        trainer = self._ready()
        return pipe.Opened(
            frontier=self._frontier(),
            fingerprint=trainer.fingerprint(),
            device=_device_name(trainer),
            kept=kept,
            note=note,
            unit=trainer.unit,
        )

    def _build(self, setup: pipe.Setup, initial: bytes | None) -> Trainer:
        spec = RunSpec.parse(setup.run, allow_task=setup.allow_task or None)
        self._setup = setup
        self._counts = {}
        self._pending = self._dirty = False
        made = Setup(
            run=spec,
            peer=setup.peer,
            run_id=setup.run_id,
            data=setup.data or None,
            base=setup.base or None,
            shard=setup.shard,
            device=setup.device,
            device_memory=setup.device_memory,
            threads=setup.threads,
            allow_task=setup.allow_task or None,
            directory=Path(setup.directory) if setup.directory else None,
        )
        self._trainer = Trainer(made, initial=initial, clock=time.perf_counter)
        return self._trainer

    def _ready(self) -> Trainer:
        if self._trainer is None:
            raise PipeError("the run was not opened")
        return self._trainer

    # ------------------------------------------------------------------ the ledger

    def _apply(self, items: Sequence[pipe.Item], body: memoryview) -> pipe.Answer:
        outcomes = self._ready().apply(_arrived(items, body))
        for item in items:
            author = (item.peer, item.log)
            self._counts[author] = max(self._counts.get(author, 0), item.number)
        return self._done([pipe.Result(o.delta, o.refused) for o in outcomes])

    def _subtract(self, items: Sequence[pipe.Item], body: memoryview) -> pipe.Answer:
        outcomes = self._ready().subtract(_arrived(items, body))
        for item in items:
            author = (item.peer, item.log)
            self._counts[author] = min(self._counts.get(author, 0), item.number - 1)
        return self._done([pipe.Result(o.delta, o.refused) for o in outcomes])

    def _reset(self, *, whole: bool) -> pipe.Answer:
        if whole:
            self._snapshot = None
        self._begin()
        return self._done([])

    def _begin(self) -> None:
        """Let the model be where the log goes on: the initial one, or a snapshot."""
        trainer, self._counts = self._ready(), {}
        if self._snapshot is not None:
            summed, sums = self._snapshot
            try:
                trainer.begin(sums)
            except ValueError as error:  # the core sees that it is not there
                log.warning("snapshot not used: %s", error)
                self._snapshot = None
            else:
                self._counts = {(peer, own_log): count for peer, own_log, count in summed}
                self._dirty = True
                return
        trainer.exchange.restore(trainer.initial_bytes())

    def _began(self) -> str:
        """Return what names the snapshot that the model begins with; empty without one."""
        if self._snapshot is None:
            return ""
        summed, sums = self._snapshot
        told = repr([tuple(each) for each in summed]).encode()
        return blake2b(told + sums, digest_size=16).hexdigest()

    def _sums(self) -> tuple[pipe.Answer, list[pipe.Buffer]]:
        trainer = self._ready()
        sums = trainer.exchange.sums()
        answer = pipe.Summed(self._frontier(), trainer.fingerprint())
        return answer, [] if sums is None else [sums]

    def _done(
        self, results: list[pipe.Result], fingerprint: pipe.Lanes | None = None
    ) -> pipe.Answer:
        trainer = self._ready()
        self._dirty = self._dirty or bool(results)
        return pipe.Done(
            results=results,
            frontier=self._frontier(),
            fingerprint=fingerprint or trainer.fingerprint(),
            out_of_range=trainer.out_of_range,
        )

    def _frontier(self) -> pipe.Frontier:
        return sorted((*author, count) for author, count in self._counts.items() if count)

    # ------------------------------------------------------------------ training

    def _turn(self, asked: pipe.Turn) -> tuple[pipe.Answer, list[pipe.Buffer]]:
        trainer = self._ready()
        self._discard()
        turned = trainer.turn(asked.turn, asked.members, lag=asked.lag, publish=asked.publish)
        self._pending = turned.payload is not None
        self._dirty = self._dirty or not (self._pending or turned.dropped)  # it is in the drift
        if turned.skipped:
            log.warning(
                "turn %d: %d of %d steps skipped, since their loss was not finite",
                *(asked.turn, turned.skipped, turned.steps),
            )
        answer = pipe.Turned(
            kind=turned.kind,
            loss=_finite(turned.loss),
            evaluation=_finite(turned.evaluation),
            steps=turned.steps,
            seconds=turned.seconds,
            dropped=turned.dropped,
            skipped=turned.skipped,
            memory=_memory(trainer),
            measured=trainer.measures(asked.turn),
        )
        return answer, [] if turned.payload is None else [turned.payload]

    def _commit(self, own_log: int, number: int, *, save: bool) -> pipe.Answer:
        """Let the pending update be published; without one (this process is new) do nothing."""
        if self._pending:
            self._ready().commit(own_log, number)
            self._pending, self._dirty = False, True
            if save:
                self._save_now_and_then()
        return pipe.Ready()

    def _discard(self) -> pipe.Answer:
        if self._pending:
            self._ready().discard()
            self._pending = False
        return pipe.Ready()

    def _export(self, path: Path, metadata: dict[str, str]) -> pipe.Answer:
        """Write the model; a disk that does not take it is the operator's affair, not ours."""
        try:
            self._ready().export(path, metadata)
        except OSError as error:
            return pipe.Ready(f"{path} can't be written: {error.strerror}")
        return pipe.Ready()

    # ------------------------------------------------------------------ checkpoints

    def _restore(self, request: pipe.Open) -> tuple[str, bool]:
        """Take the checkpoint if it is one of a past of this log; return why not, and `kept`."""
        path = Path(request.checkpoint)
        if not request.checkpoint or not path.exists():
            if self._snapshot is not None:
                self._begin()
            return "", False
        trainer = self._ready()
        try:
            loaded = trainer.load(path, request.own)
            counts = {(bytes.fromhex(p), log): n for p, log, n in loaded.frontier}
        except Exception as error:  # whatever is wrong with it, the log is enough to start from
            known = isinstance(error, CheckpointError)
            note = f"{error}" if known else f"{path}: {type(error).__name__}: {error}"
            return self._start_over(request, note)
        held = {(peer, log): count for peer, log, count in request.held}
        if loaded.began != self._began():
            # A model made with a snapshot that was dropped since is not the log's.
            return self._start_over(request, "the checkpoint is of a model that began elsewhere")
        if any(count > held.get(author, 0) for author, count in counts.items()):
            with contextlib.suppress(OSError):
                path.unlink()  # or it would seem to fit once the log is as long, with other updates
            return self._start_over(request, "the checkpoint goes beyond the log")
        self._counts = counts
        return "", loaded.kept

    def _start_over(self, request: pipe.Open, note: str) -> tuple[str, bool]:
        """Begin without the checkpoint; return what `_restore` does."""
        self._build(request.setup, self._ready().initial_bytes())
        self._begin()
        return note, False

    def _save_now_and_then(self) -> None:
        wait = max(CHECKPOINT_SECONDS, self._saving_took / CHECKPOINT_SHARE)
        if time.monotonic() - self._saved_at >= wait:
            self._save()

    def _save(self) -> None:
        """Write the checkpoint; a pending update is taken back first, since no number has it."""
        if self._trainer is None or self._checkpoint is None or not self._dirty:
            return
        self._discard()
        began = time.monotonic()
        frontier = [(peer.hex(), log, count) for peer, log, count in self._frontier()]
        try:
            self._checkpoint.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._trainer.save(self._checkpoint, frontier, self._began())
            self._dirty = False
        except OSError as error:  # the log is enough to start from
            log.warning("no checkpoint: %s", error.strerror)
        self._saved_at = time.monotonic()
        self._saving_took = self._saved_at - began


def _arrived(items: Sequence[pipe.Item], body: memoryview) -> list[Arrived]:
    return [
        Arrived((i.peer, i.log, i.number), i.turn, i.kind, payload, i.size)
        for i, payload in zip(items, pipe.split(items, body), strict=True)
    ]


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _device_name(trainer: Trainer) -> str:
    device = trainer.device
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return f"cpu ({torch.get_num_threads()} threads)"


def _memory(trainer: Trainer) -> int:
    device = trainer.device
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with contextlib.suppress(OSError, IndexError, ValueError):
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")
    return 0


def _write(path: Path, data: bytes) -> None:
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_bytes(data)
        partial.replace(path)
    except OSError as error:  # it is made anew at the next start; others fetch it elsewhere
        log.warning("initial model not kept: %s", error.strerror)
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
