"""Real daemons for tests: started, looked at, killed, brought back."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from shoal.node import client
from shoal.node.client import Client, UnreachableError
from shoal.node.errors import ConfigError
from shoal.node.status import EventRow, Status

PATIENCE = 5
"""How many times as busy a machine may be as those for which the waits were written."""
DIGITS = """
[run]
name = "digits"
seed = 3
turns = {turns}
[task]
name = "digits"
[local]
optimizer = {{ name = "adamw", lr = 3e-3 }}
{pace}
[exchange]
update = {{ kind = "dense", levels = 3, momentum = 0.6, outer_lr = 0.7 }}
[swarm]
admission = "{admission}"
min_peers = {peers}
"""


def run_file(
    folder: Path,
    *,
    turns: int = 0,
    peers: int = 4,
    admission: str = "open",
    pace: str = "turn_seconds = 1.0",
) -> Path:
    """Write a run of the digits task that trains gently, so that the machine stays usable."""
    path = folder / "run.toml"
    path.write_text(DIGITS.format(turns=turns, peers=peers, admission=admission, pace=pace))
    return path


@dataclass
class Daemon:
    """One daemon process, found again by its directory."""

    directory: Path
    argv: Sequence[str] = ()
    prefix: Sequence[str] = ()
    process: subprocess.Popen[bytes] | None = None
    threads: int = 1
    says_in: Path | None = None
    """Where its logs lie; None: beside its directory."""
    logs: list[Path] = field(default_factory=list)

    def start(self, *argv: str) -> "Daemon":
        """Start it with the given command line, or again with `start DIR`."""
        command = argv or ("start", str(self.directory))
        folder = self.says_in or self.directory.parent
        log = folder / f"{self.directory.name}.{len(self.logs)}.log"
        self.logs.append(log)
        with log.open("wb") as out:
            self.process = subprocess.Popen(
                [*self.prefix, sys.executable, "-m", "shoal.node.cli", *command],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        return self

    def client(self) -> Client:
        """Return a client of the daemon that this object started."""
        # Until it is up its directory tells of the one before, whose port may be anybody's by now.
        assert self.process is not None
        assert self._publisher() == self.process.pid, self.log()
        found = client.from_file(self.directory)
        assert found is not None, self.log()
        return found

    def _publisher(self) -> int | None:
        try:
            pid = json.loads((self.directory / "status.json").read_bytes())["pid"]
        except (OSError, ValueError, KeyError):
            return None
        return pid if isinstance(pid, int) else None

    def status(self) -> Status | None:
        """Return its status; None while it does not answer."""
        assert self.process is None or self.process.poll() is None, self.log()
        try:
            return self.client().status()
        except (ConfigError, AssertionError, msgspec.DecodeError, OSError):
            return None

    def wait(self, what: str, good: Callable[[Status], object], seconds: float = 60.0) -> Status:
        """Wait until its status is as wanted."""
        end = time.monotonic() + PATIENCE * seconds
        last = None
        while time.monotonic() < end:
            last = self.status()
            with suppress(UnreachableError):  # it was asked for more, and was busy
                if last is not None and good(last):
                    return last
            time.sleep(0.2)
        raise AssertionError(f"not {what} within {PATIENCE * seconds:.0f} s: {last}\n{self.log()}")

    def events(self, seconds: float = 60.0) -> list[EventRow]:
        """Return what it remembers to have happened, as soon as it answers."""
        found: list[EventRow] = []

        def asked(_: Status) -> bool:
            found[:] = self.client().events()
            return True

        self.wait("telling what happened", asked, seconds)
        return found

    def said(self) -> str:
        """Return all that it has said since it was last started."""
        return self.logs[-1].read_text(errors="replace") if self.logs else ""

    def log(self) -> str:
        """Return the end of its last log."""
        return self.said()[-4000:]

    def kill(self) -> None:
        """Kill the daemon alone with -9; its worker must notice by itself."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def end(self) -> None:
        """Kill it if it still runs: whatever became of the test."""
        if self.process is not None and self.process.poll() is None:
            self.kill()

    def stop(self) -> int:
        """Let it end as by Ctrl-C; return its exit code."""
        if self.process is None:
            return 0
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            try:
                self.process.wait(PATIENCE * 30)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait()
                raise AssertionError(f"did not end on SIGINT\n{self.log()}") from None
        return self.process.returncode


def agree(daemons: Sequence[Daemon], seconds: float = 60.0) -> str:
    """Wait until all hold one model at one frontier for good; return the fingerprint.

    They have been paused or have finished: who has measured its model is in no turn any more.
    """
    end = time.monotonic() + PATIENCE * seconds
    seen: list[tuple[str, str, int, bool] | None] = []
    while time.monotonic() < end:
        states = [daemon.status() for daemon in daemons]
        seen = [s and (s.fingerprint, s.frontier.hash, s.lag, s.measured) for s in states]
        first = seen[0]
        if first is not None and len(set(seen)) == 1 and first[2:] == (0, True):
            return first[0]
        time.sleep(0.3)
    raise AssertionError(f"no agreement within {PATIENCE * seconds:.0f} s: {seen}")
