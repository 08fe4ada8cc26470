"""Real daemons on this machine: start them as child processes, look at them, end them.

The children are ordinary `shoal start` and `shoal join` processes: they find each other by address,
speak TLS and keep their directories, from which `shoal start DIR` brings any of them back.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from shoal.node import client, config, shipped
from shoal.node.client import UnreachableError
from shoal.node.errors import ConfigError
from shoal.node.status import Sockets, State, Status
from shoal.training import presets

PEERS = 64
"""Most daemons on one machine."""
STARTING = 180.0
"""Seconds a daemon may take until it answers: the worker imports torch on a busy machine."""
ENDING = 40.0
"""Seconds a daemon may take to leave cleanly before it is killed."""

_REFUSED = 2
"""Exit code of a daemon that the operator asked for what can't be."""

# ---------------------------------------------------------------- the run file


def read_run(name: str) -> dict[str, Any]:
    """Read a run file, or a shipped one by its bare name."""
    if name in shipped.names() and not Path(name).exists():
        return shipped.read(name)
    if not Path(name).exists():
        known = ", ".join(shipped.names())
        raise ConfigError(f"{name} does not exist; give a run file, or one of: {known}")
    return config.read_toml(Path(name))


def adapt(
    run: dict[str, Any],
    *,
    peers: int,
    turns: int | None = None,
    secret: bool = False,
    preset: str | None = None,
) -> dict[str, Any]:
    """Return the run file for a swarm of `peers`: the number expected, what else was asked for."""
    changed = {name: dict(table) for name, table in run.items() if isinstance(table, dict)}
    changed |= {name: value for name, value in run.items() if name not in changed}
    if preset is not None:
        changed = presets.apply(changed, preset)
    changed.setdefault("swarm", {})["min_peers"] = peers
    if turns is not None:
        changed.setdefault("run", {})["turns"] = turns
    if secret:
        changed["swarm"]["admission"] = "secret"
    return changed


def new_directory(asked: Path | None, name: str) -> Path:
    """Return an empty directory for the swarm: the one asked for, or a free `swarm-NAME`."""
    if asked is None:
        asked = Path(f"swarm-{name}")
        number = 1
        while asked.exists():
            number += 1
            asked = Path(f"swarm-{name}-{number}")
    elif asked.exists() and (not asked.is_dir() or any(asked.iterdir())):
        raise ConfigError(
            f"{asked} is not empty; name a new directory, "
            f"or go on with its peers: shoal start {asked}/peer-1"
        )
    try:
        asked.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot make {asked}: {error.strerror}") from error
    return asked.absolute()


# ---------------------------------------------------------------- the processes


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Who is to be started, and how."""

    run: dict[str, Any]
    directory: Path
    peers: int
    threads: int
    """Of each worker."""
    host: str = "127.0.0.1"
    secret: Path | None = None
    extra: tuple[str, ...] = ()
    """Flags passed on to every daemon."""

    @property
    def run_file(self) -> Path:
        """Where the adapted run file lies."""
        return self.directory / "run.toml"

    def folder(self, index: int) -> Path:
        """Return the directory of peer `index`, counted from 0."""
        return self.directory / f"peer-{index + 1}"

    def argv(self, index: int, join: str | None) -> list[str]:
        """Return the command line of peer `index`; the first founds, the others join."""
        what = ["start", str(self.run_file)] if join is None else ["join", join]
        argv = [sys.executable, "-m", "shoal.node.cli", *what]
        argv += ["--dir", str(self.folder(index)), "--listen", f"{self.host}:0"]
        argv += ["--shard", f"{index}/{self.peers}", "--threads", str(self.threads)]
        argv += ["--paused", "--parent", str(os.getpid())]
        if self.secret is not None:
            argv += ["--secret-file", str(self.secret)]
        return [*argv, *self.extra]


def threads_each(cores: int, peers: int) -> int:
    """Return the threads of each worker: more of them than cores make every step slower."""
    return max(1, cores // peers)


@dataclass(slots=True)
class Child:
    """One daemon process with its directory and log."""

    index: int
    folder: Path
    log: Path
    process: subprocess.Popen[bytes]
    _client: client.Client | None = None

    @property
    def name(self) -> str:
        """What people call it."""
        return f"peer {self.index + 1}"

    def status(self) -> Status | None:
        """Ask it; None while it does not answer."""
        try:
            self._client = self._client or client.from_file(self.folder)
            return self._client.status() if self._client else None
        except UnreachableError:
            self._client = None  # it may come back under another port
            return None

    def call(self, what: str, body: dict[str, str] | None = None) -> None:
        """Make it pause, resume, leave or export."""
        found = self._client or client.connect(self.folder)
        found.post(what, body, timeout=60.0)

    def last_words(self) -> str:
        """Return the last line of its log."""
        try:
            with self.log.open("rb") as file:
                file.seek(max(0, os.fstat(file.fileno()).st_size - 8192))
                lines = file.read().decode(errors="replace").splitlines()
        except OSError:
            lines = []
        said = [line.strip() for line in lines if line.strip()]
        return said[-1] if said else "it said nothing"

    def epitaph(self) -> str:
        """Say how it ended."""
        code = self.process.returncode
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with {code}"
        return f"{self.name} {how}: {self.last_words()} (all of it: {self.log})"


@dataclass(slots=True)
class Swarm:
    """The running daemons; leaving the `with` block ends every one of them."""

    plan: Plan
    children: list[Child] = field(default_factory=list)
    buried: set[int] = field(default_factory=set)
    """Peers whose end was already reported."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.end()

    def start(self) -> str:
        """Start all, paused; return the founder's join address once everybody answers."""
        self.plan.run_file.write_text(config.to_toml(self.plan.run), "utf-8")
        founder = self._launch(0, None)
        join = self._wait_for_address(founder)
        for index in range(1, self.plan.peers):
            self._launch(index, join)
        self._wait_until_all_hold_the_run()
        return join

    def unfounded(self) -> bool:
        """Return whether the founder refused the run, with a reason that no file here explains."""
        if len(self.children) != 1 or self.children[0].process.poll() != _REFUSED:
            return False
        return str(self.plan.directory) not in self.children[0].last_words()

    def begin(self) -> None:
        """Let everybody train at once, so that no peer is turns ahead before the last is up."""
        for child in self.children:
            child.call("resume")

    def pause(self) -> None:
        """Let nobody begin another turn."""
        for child in self.living():
            child.call("pause")

    def living(self) -> list[Child]:
        """Return the children that still run."""
        return [child for child in self.children if child.process.poll() is None]

    def look(self) -> list[Status | None]:
        """Ask every daemon at once; None for those that do not answer."""
        with ThreadPoolExecutor(max_workers=16) as pool:
            return list(pool.map(Child.status, self.children))

    def newly_dead(self) -> list[Child]:
        """Return the children that ended since the last call."""
        dead = [c for c in self.children if c.process.poll() is not None]
        new = [child for child in dead if child.index not in self.buried]
        self.buried |= {child.index for child in new}
        return new

    def end(self) -> None:
        """Ask all to stop, wait, then kill what is left, workers included."""
        for child in self.living():
            child.process.terminate()
        until = time.monotonic() + ENDING
        for child in self.children:
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.process.wait(max(0.1, until - time.monotonic()))
            _kill_group(child.process.pid)
            child.process.wait()

    def _launch(self, index: int, join: str | None) -> Child:
        log = self.plan.directory / f"peer-{index + 1}.log"
        with log.open("wb") as out:
            process = _spawn(self.plan.argv(index, join), out)
        child = Child(index, self.plan.folder(index), log, process)
        self.children.append(child)
        return child

    def _wait_for_address(self, founder: Child) -> str:
        until = time.monotonic() + STARTING
        while time.monotonic() < until:
            self._refuse_early_death()
            status = founder.status()
            if status is not None and status.join:
                return status.join[0]
            time.sleep(0.1)
        raise ConfigError(f"{founder.name} does not answer: {founder.last_words()}")

    def _wait_until_all_hold_the_run(self) -> None:
        until = time.monotonic() + STARTING
        waiting = self.children
        while waiting and time.monotonic() < until:
            self._refuse_early_death()
            waiting = [child for child in waiting if not _is_up(child.status())]
            time.sleep(0.2)
        if waiting:
            child = waiting[0]
            raise ConfigError(
                f"{child.name} is not up after {STARTING:.0f} s: {child.last_words()} "
                f"(all of it: {child.log})"
            )

    def _refuse_early_death(self) -> None:
        for child in self.newly_dead():
            said = child.last_words()
            if child.process.returncode == _REFUSED:  # pass it on as our own
                raise ConfigError(said.removeprefix("shoal: "))
            raise ConfigError(child.epitaph())


def _is_up(status: Status | None) -> bool:
    # The fingerprint comes from the worker's model: a worker that states one can begin at once.
    return status is not None and status.state is not State.JOINING and bool(status.fingerprint)


def _spawn(argv: Sequence[str], out: IO[bytes]) -> subprocess.Popen[bytes]:
    # A process group of its own: Ctrl-C in the terminal reaches us alone, and we end the children
    # in order; whatever a daemon leaves behind can be killed with its group.
    return subprocess.Popen(
        argv, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, process_group=0
    )


def _kill_group(group: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):  # nobody is left in it
        os.killpg(group, signal.SIGKILL)


def end_with_parent(parent: int) -> None:
    """Let the kernel end this process when `parent` dies, however it dies (Linux)."""
    if sys.platform != "linux":
        return
    import ctypes

    pr_set_pdeathsig = 1
    ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != parent:  # it died before we asked
        os.kill(os.getpid(), signal.SIGTERM)


# ---------------------------------------------------------------- what came of it


def finished(rows: Sequence[Status | None], states: frozenset[State]) -> bool:
    """Return whether every daemon that answers is in one of `states`, and one does."""
    seen = [status for status in rows if status is not None]
    return bool(seen) and all(status.state in states for status in seen)


def one_model(rows: Sequence[Status | None]) -> bool:
    """Return whether all that answer have equal frontiers and equal fingerprints."""
    models = {(s.frontier.hash, s.fingerprint) for s in rows if s is not None}
    return len(models) == 1 and all(models.pop())


def differ(rows: Sequence[Status | None]) -> bool:
    """Return whether two that answer hold the same updates, and yet different models."""
    models: dict[str, set[str]] = {}
    for status in rows:
        if status is not None and status.fingerprint and not status.lag:
            models.setdefault(status.frontier.hash, set()).add(status.fingerprint)
    return any(len(found) > 1 for found in models.values())


def measured(rows: Sequence[Status | None]) -> bool:
    """Return whether all that answer, and have a worker, have measured the model they hold."""
    able = [s for s in rows if s is not None and s.worker.pid is not None]
    return all(status.measured for status in able)


def reference_bytes(peers: int, parameters: int, steps: float) -> float:
    """Return what a peer sends in ring all-reduce of float32 gradients at every step."""
    return 2 * (peers - 1) / peers * 4 * parameters * steps


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """The end of a swarm, as `summary.json` holds it."""

    run: str
    unit: str
    peers: int
    answering: int
    parameters: int
    steps: float
    """Per peer, mean."""
    seconds: float
    before: float | None
    after: float | None
    """Mean over those that have measured the model they ended with."""
    alone: float | None
    """One peer on its own shard, same optimizer, schedule and steps; with --baseline."""
    sent: float
    """Bytes that left a peer's sockets, mean."""
    reference: float
    """Bytes of all-reduce per peer."""
    published: float
    """Payload bytes of a peer's own updates, mean."""
    equal: bool
    differ: bool
    """Two hold the same updates and yet different models, which must not be."""
    fingerprint: str

    @property
    def fewer(self) -> float | None:
        """How many times fewer bytes left the sockets than all-reduce would have sent."""
        return self.reference / self.sent if self.sent and self.reference else None

    @property
    def fewer_by_payload(self) -> float | None:
        """The same by payloads alone, each sent to every other peer."""
        carried = self.published * (self.peers - 1)
        return self.reference / carried if carried and self.reference else None


def summarize(
    rows: Sequence[Status | None],
    *,
    before: float | None,
    alone: float | None,
    seconds: float,
) -> Summary:
    """Return what came of it, from the last look at every daemon."""
    seen = [status for status in rows if status is not None]
    peers = len(rows)
    steps = _mean([status.steps for status in seen])
    first = seen[0]
    after = [s.evaluation for s in seen if s.measured and s.evaluation is not None]
    return Summary(
        run=first.name,
        unit=first.unit,
        peers=peers,
        answering=len(seen),
        parameters=first.parameters,
        steps=steps,
        seconds=seconds,
        before=before,
        after=_mean(after) if after else None,
        alone=alone,
        sent=_mean([_sent(status.sockets) for status in seen]),
        reference=reference_bytes(peers, first.parameters, steps),
        published=_mean([status.published_bytes for status in seen]),
        equal=one_model(rows),
        differ=differ(rows),
        fingerprint=first.fingerprint,
    )


def _sent(sockets: Sockets) -> int:
    return sockets.bytes_out


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
