"""The model of a run rebuilt from the initial one and a log, and compared with what others say.

audit.py checks the log; here it is summed, in any order and in batches of any size, since neither
may matter. What says what the model should be: the running daemon (`/status`) and the worker's last
checkpoint. Nothing is written and no lock is taken.
"""

import json
import math
import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from shoal.gossip.names import Author, Hash, Key, PeerId
from shoal.gossip.snapshot import Snapshot
from shoal.node import client, offline
from shoal.node.audit import Audit, Counts, Wrong
from shoal.node.client import Client, UnreachableError
from shoal.node.config import NodeConfig
from shoal.node.errors import ConfigError
from shoal.node.genesis import Genesis
from shoal.node.home import Home
from shoal.node.identity import peer_text
from shoal.node.segments import DamageError
from shoal.node.status import Status

if TYPE_CHECKING:
    from torch import Tensor

    from shoal.training.exchange import Arrived
    from shoal.training.trainer import Trainer

Lanes = tuple[int, int]

BATCH = 512
"""Updates given to the ledger at once, when nothing else is asked for …"""
BATCH_BYTES = 32 << 20
"""… or fewer, with so many bytes of payload."""
PATIENCE = 10.0
"""Seconds in which a running daemon is asked for a fingerprint of all that it holds."""
PAUSE = 0.1
"""Seconds between two questions."""
ATTEMPTS = 3
"""Times that the log of a running daemon is read until it holds what the daemon says."""
EXAMPLES = 20
"""Refused updates that are named one by one."""
DAEMON, CHECKPOINT = "the running daemon", "the checkpoint"


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How to replay. The model depends on none of it."""

    shuffle: int | None = None
    """Seed of the order; None: as the updates were written."""
    batch: int = 0
    """Updates given to the ledger at once; 0: `BATCH`, or fewer of `BATCH_BYTES`."""
    threads: int = 0
    """Of torch, for the whole process; 0: leave them."""
    device: str = "cpu"
    evaluate: bool = False
    """Measure the model on held-out data."""
    data: str = ""
    """Folder or file with that data; empty: what node.toml names, else the task's own."""
    base: str = ""
    """The model that the task starts from; empty: what node.toml names."""
    allow_task: str = ""


@dataclass(frozen=True, slots=True)
class Compared:
    """What somebody says that the model is, beside what the log means."""

    who: str
    agrees: bool | None
    """None: it could not be compared, and that is no fault of the log."""
    text: str
    """For people: at which frontier they agree, or what differs."""
    updates: int = 0
    """In the frontier at which they were compared."""
    stated: str = ""
    """The fingerprint that was stated, hex."""
    rebuilt: str = ""
    """The log's fingerprint at that frontier, hex."""


@dataclass(slots=True, kw_only=True)
class Result:
    """What a replay found. Sizes are bytes, durations seconds, fingerprints and hashes hex."""

    directory: str
    run: str
    name: str
    parameters: int
    running: bool
    """A daemon runs there."""
    updates: int = 0
    """Those that count: of each author from 1 without a hole, below its closing."""
    summed: int = 0
    """Of these, how many are here as a snapshot alone: their sums, which its donor stated."""
    authors: int = 0
    turns: tuple[int, int] = (0, 0)
    """First and last."""
    segments: int = 0
    log_bytes: int = 0
    payload_bytes: int = 0
    signatures: int = 0
    """Records whose signature and id are good."""
    closed: list[str] = field(default_factory=list)
    """Logs that a proof closed."""
    wrong: list[Wrong] = field(default_factory=list)
    """In the order of the log; what is missing comes last."""
    notes: list[str] = field(default_factory=list)
    """What is odd, but right."""
    refused: dict[str, int] = field(default_factory=dict)
    """Updates that contribute zero, by the rule that they break."""
    refused_examples: list[str] = field(default_factory=list)
    examined_in: float = 0.0
    """Reading and hashing all, signatures included."""
    rebuilt_in: float = 0.0
    """Reading again, decoding and adding."""
    updates_per_second: float = 0.0
    """While rebuilding."""
    order: str = ""
    batch: int = 0
    device: str = ""
    threads: int = 0
    frontier: str = ""
    """Hash of the frontier of all that counts: equal ones must mean equal fingerprints."""
    fingerprint: str = ""
    """Of the model there."""
    out_of_range: int = 0
    """Values that have left half the range of int32."""
    compared: list[Compared] = field(default_factory=list)
    evaluation: float | None = None
    """The task's measure on held-out data."""
    unit: str = ""

    @property
    def agrees(self) -> bool:
        """Say whether nothing is wrong and nobody says otherwise."""
        return not self.wrong and all(each.agrees is not False for each in self.compared)

    def to_json(self) -> str:
        """Return all of it as one object."""
        return json.dumps({"agrees": self.agrees} | asdict(self), indent=1)


@dataclass(frozen=True, slots=True)
class Claim:
    """What somebody says that the model is."""

    who: str
    counts: Counts
    fingerprint: Lanes
    ledger: "Tensor | None" = None
    """The integers themselves."""
    again: Callable[[], Lanes | None] = lambda: None
    """Ask once more about the same frontier."""


def replay(directory: Path, options: Options) -> Result:
    """Check the log of a run's directory and rebuild its model.

    Raises ConfigError for what the operator can mend: no run there, or one that can't be built or
    measured here.
    """
    home = Home(directory, readonly=True)
    genesis = offline.read_genesis(home)
    trainer = offline.make_trainer(
        home,
        genesis,
        device=options.device,
        threads=options.threads,
        data=_data(home, options),
        base=options.base,
        allow_task=options.allow_task,
    )
    snapshot = offline.begin(home, genesis.run_id, trainer)
    # In this order: what the checkpoint holds and the daemon counts was in the log before.
    claims = [_checkpoint(home.checkpoint, trainer)] if home.checkpoint.exists() else []
    daemon = _daemon(directory, genesis)
    log, said, seconds = _examine(home.log, genesis, daemon, snapshot)
    try:
        result = _result(directory, genesis, log)
        result.running, result.examined_in = daemon is not None, seconds
        if snapshot is not None:
            result.summed = sum(line.count for line in snapshot.lines)
            result.notes.append(
                f"{result.summed} updates are not here: the run was joined with their sums, from "
                f"{peer_text(snapshot.donor)} (--whole-log fetches all)"
            )
        _Rebuilding(log, trainer, options, result, snapshot).run([*claims, *said])
    finally:
        log.close()
    if options.evaluate:
        _evaluate(result, trainer)
    return result


def _data(home: Home, options: Options) -> str:
    if not options.evaluate:
        return ""
    return options.data or NodeConfig.load(home.node_toml).data


def _result(directory: Path, genesis: Genesis, log: Audit) -> Result:
    frontier = log.frontier
    return Result(
        directory=str(directory),
        run=genesis.run_id.hex(),
        name=genesis.run_file.run.name,
        parameters=genesis.parameters,
        running=False,
        updates=frontier.total(),
        authors=len(frontier.counts()),
        turns=log.turns,
        segments=log.segments,
        log_bytes=log.size,
        payload_bytes=log.payload_bytes,
        signatures=log.signatures,
        closed=[
            f"log {author.log:016x} of {peer_text(author.peer)} is closed at {closed}: "
            "its author signed two updates of that number"
            for author in frontier.authors()
            if (closed := frontier.closed(author))
        ],
        wrong=list(log.wrong),
        notes=list(log.notes),
        frontier=frontier.hash.hex(),
    )


def _evaluate(result: Result, trainer: "Trainer") -> None:
    from shoal.training.run import RunError

    try:
        value = trainer.evaluate()
    except RunError as error:
        raise ConfigError(str(error)) from error
    result.unit = trainer.unit
    if math.isfinite(value):
        result.evaluation = value
    elif hasattr(trainer.task, "evaluate"):
        result.notes.append(f"the model's measure on held-out data is no number: {value}")
    else:
        result.notes.append("the task has no measure on held-out data")


# ---------------------------------------------------------------- what others say


def _checkpoint(path: Path, trainer: "Trainer") -> Claim | Compared:
    from shoal.training.trainer import CheckpointError

    try:
        stated = trainer.stated(path)
        counts = {Author(PeerId(bytes.fromhex(p)), log): n for p, log, n in stated.frontier}
    except (CheckpointError, ValueError, TypeError) as error:
        return Compared(CHECKPOINT, False, f"can't be used: {error}")
    return Claim(CHECKPOINT, counts, stated.fingerprint, stated.ledger)


def _daemon(directory: Path, genesis: Genesis) -> Client | None:
    """Return a client of the daemon that runs this run there, if one does."""
    found = client.connect_if_running(directory)
    if found is None or _status(found, genesis.run_id.hex()) is None:
        return None
    return found


def _status(daemon: Client, run: str) -> Status | None:
    """Ask for the status; None when no daemon of this run answers."""
    try:
        status = daemon.status()
    except (UnreachableError, msgspec.DecodeError):
        return None
    return status if status.run == run else None


def _examine(
    directory: Path, genesis: Genesis, daemon: Client | None, snapshot: Snapshot | None
) -> tuple[Audit, list[Claim | Compared], float]:
    """Check the log; of a running daemon also find in it what the daemon says that it holds."""
    attempts = ATTEMPTS if daemon is not None else 1
    for attempt in range(1, attempts + 1):
        status = None if daemon is None else _at_rest(daemon, genesis)
        started = time.perf_counter()
        log = Audit(directory, genesis, snapshot=snapshot, running=daemon is not None)
        seconds = time.perf_counter() - started
        if daemon is None:
            return log, [], seconds
        if status is None:
            why = f"was never found with all applied that it holds, in {PATIENCE:.0f} s"
            return log, [Compared(DAEMON, None, why)], seconds
        claim = _claim(daemon, status, log)
        # A proof or a repair may have come between the question and the reading.
        if isinstance(claim, Claim) or attempt == attempts:
            break
        log.close()
    return log, [claim], seconds


def _at_rest(daemon: Client, genesis: Genesis) -> Status | None:
    """Return a status whose fingerprint is that of its frontier; None if there never is one."""
    run, last = genesis.run_id.hex(), None
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        status = _status(daemon, run)
        if status is None or status.lag or not status.fingerprint:
            last = None
        elif last is not None and _words(status) == _words(last):
            return status
        else:
            last = status
        time.sleep(PAUSE)
    return None


def _words(status: Status) -> tuple[str, str]:
    return status.frontier.hash, status.fingerprint


def _claim(daemon: Client, status: Status, log: Audit) -> Claim | Compared:
    def again() -> Lanes | None:
        now = _status(daemon, status.run)
        same = now is not None and now.frontier.hash == status.frontier.hash
        return _lanes(now.fingerprint) if now is not None and same else None

    frontier = status.frontier
    counts = log.at(frontier.updates, Hash(bytes.fromhex(frontier.hash)))
    if counts is not None:
        return Claim(DAEMON, counts, _lanes(status.fingerprint), again=again)
    in_memory = [text for text in status.warnings if "in memory only" in text]
    if in_memory:
        return Compared(DAEMON, None, f"can't be compared: {in_memory[0]}")
    return Compared(
        DAEMON,
        False,
        f"counts {frontier.updates} updates (frontier {frontier.hash[:16]}…), and the log never "
        "held just those",
        frontier.updates,
        status.fingerprint,
    )


def _lanes(text: str) -> Lanes:
    return int(text[:16], 16), int(text[16:], 16) if len(text) == 32 else 0


def _text(lanes: Lanes) -> str:
    return "".join(f"{lane:016x}" for lane in lanes)


# ---------------------------------------------------------------- the sum


class _Rebuilding:
    """Moves the model from frontier to frontier, beginning at the initial one or a snapshot."""

    def __init__(
        self,
        log: Audit,
        trainer: "Trainer",
        options: Options,
        result: Result,
        snapshot: Snapshot | None,
    ) -> None:
        self._log = log
        self._trainer = trainer
        self._options = options
        self._result = result
        self._random = None if options.shuffle is None else random.Random(options.shuffle)
        self._at: dict[Author, int] = {} if snapshot is None else dict(snapshot.counts())
        self._refused: dict[Key, str] = {}
        self._moved = 0

    def run(self, claims: Sequence[Claim | Compared]) -> None:
        """Compare at each frontier that somebody stated, then go on to all that counts."""
        result, trainer = self._result, self._trainer
        started = time.perf_counter()
        for claim in claims:
            result.compared.append(claim if isinstance(claim, Compared) else self._check(claim))
        known = [each for each in result.compared if each.agrees is not None]
        compared = [each.updates for each in known if each.updates]
        if compared and (rest := result.updates - max(compared)) > 0:
            what = "update" if rest == 1 else f"{rest} updates"
            result.notes.append(
                f"nobody has stated a fingerprint with the last {what} in it: the model was "
                f"compared as it was before {'it' if rest == 1 else 'them'}"
            )
        self._move(dict(self._log.frontier.counts()))
        seconds = time.perf_counter() - started
        if trainer.recompute() != trainer.fingerprint():
            what = "its values do not have the fingerprint that their changes add up to"
            result.compared.append(Compared("the model itself", False, what))
        result.rebuilt_in = seconds
        result.updates_per_second = self._moved / seconds if seconds > 0 else 0.0
        result.fingerprint = _text(trainer.fingerprint())
        result.out_of_range = trainer.out_of_range
        self._describe()

    def _describe(self) -> None:
        import torch

        result, options = self._result, self._options
        result.order = "as written" if options.shuffle is None else f"shuffled by {options.shuffle}"
        result.batch = options.batch or BATCH
        result.device = str(self._trainer.exchange.ledger.model.device)
        result.threads = torch.get_num_threads()
        for reason in self._refused.values():
            rule = reason.partition(":")[0]
            result.refused[rule] = result.refused.get(rule, 0) + 1
        result.refused_examples = [
            f"update {key.number} of {peer_text(key.author.peer)} (log {key.author.log:016x}): "
            f"{reason}"
            for key, reason in islice(sorted(self._refused.items()), EXAMPLES)
        ]

    # ------------------------------------------------------------------ comparing

    def _check(self, claim: Claim) -> Compared:
        missing = self._log.lacks(claim.counts)
        if missing is not None:
            (peer, log), number = missing
            what = (
                f"holds update {number} of {peer_text(peer)} (log {log:016x}), which the log lacks"
            )
            return Compared(claim.who, False, what, sum(claim.counts.values()))
        self._move(claim.counts)
        ours, theirs = self._trainer.fingerprint(), claim.fingerprint
        if ours != theirs:
            theirs = claim.again() or theirs
        updates = sum(claim.counts.values())
        agrees = ours == theirs
        what = f"has the same model after {updates} updates"
        if not agrees:
            what = (
                f"has another model after {updates} updates: fingerprint {_text(theirs)}, "
                f"by the log {_text(ours)}"
            )
        elif claim.ledger is not None and not self._equals(claim.ledger):
            agrees, what = False, f"has the fingerprint of {updates} updates and other values"
        return Compared(claim.who, agrees, what, updates, _text(theirs), _text(ours))

    def _equals(self, ledger: "Tensor") -> bool:
        import torch

        return torch.equal(self._trainer.exchange.ledger.model.cpu(), ledger.cpu())

    # ------------------------------------------------------------------ moving

    def _move(self, counts: Counts) -> None:
        """Add and subtract what lies between here and `counts`."""
        added = list(self._between(self._at, counts))
        taken = list(self._between(counts, self._at))
        if self._random is not None:
            self._random.shuffle(added)
        for batch in self._batches(added):
            outcomes = self._trainer.apply(batch)
            for update, outcome in zip(batch, outcomes, strict=True):
                if outcome.refused is not None:
                    self._refused[_key(update)] = outcome.refused
        for batch in self._batches(reversed(taken)):
            self._trainer.subtract(batch)
            for update in batch:
                self._refused.pop(_key(update), None)
        self._moved += len(added) + len(taken)
        self._at = dict(counts)

    def _between(self, low: Counts, high: Counts) -> Iterator[Key]:
        """Yield what is below `high` and not below `low`, as it was written."""
        for key in self._log.order:
            if low.get(key.author, 0) < key.number <= high.get(key.author, 0):
                yield key

    def _batches(self, keys: Iterable[Key]) -> Iterator[list["Arrived"]]:
        batch: list[Arrived] = []
        size = 0
        for key in keys:
            batch.append(self._arrived(key))
            size += len(batch[-1].payload or b"")
            if self._full(len(batch), size):
                yield batch
                batch, size = [], 0
        if batch:
            yield batch

    def _full(self, updates: int, size: int) -> bool:
        if self._options.batch:
            return updates >= self._options.batch
        return updates >= BATCH or size >= BATCH_BYTES

    def _arrived(self, key: Key) -> "Arrived":
        from shoal.training.exchange import Arrived

        try:
            update, payload = self._log.read(key)
        except DamageError as error:
            raise ConfigError(
                f"{self._result.directory}: the log was changed while it was read ({error}); "
                "replay it again"
            ) from error
        name = (key.author.peer, key.author.log, key.number)
        return Arrived(name, update.turn, update.kind, payload, update.size)


def _key(update: "Arrived") -> Key:
    peer, log, number = update.key
    return Key(Author(PeerId(peer), log), number)
