"""A disk that fills up while a daemon trains alone, and gets room again, or does not."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.daemons import PATIENCE, Daemon, run_file

from shoal.gossip.limits import Limits
from shoal.gossip.names import RunId
from shoal.node.status import Status
from shoal.node.store import Store

pytestmark = [pytest.mark.real, pytest.mark.slow, pytest.mark.timeout(2400)]

LOCAL = ("--listen", "127.0.0.1:0", "--threads", "1", "--libp2p", "off")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "disk"
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(path)]
    if subprocess.run(mount, check=False).returncode:
        pytest.skip("no disk can be mounted here")
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)


def fill(disk: Path) -> None:
    with contextlib.suppress(OSError), (disk / "filler").open("wb", buffering=0) as filler:
        while filler.write(bytes(4096)):
            pass


def waits(status: Status) -> bool:
    wanted = ("in memory only", "free some space in", "updates wait")
    return any(all(each in text for each in wanted) for text in status.warnings)


def held(directory: Path, run: str) -> int:
    """Return how many updates the log on disk holds without a hole."""
    store = Store.open(directory / "log", Limits(), run=RunId(bytes.fromhex(run)), readonly=True)
    return sum(store.counts().values())


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_a_disk_that_is_full_for_a_while_loses_nothing_and_one_that_stays_full_says_so(
    tmp_path: Path, disk: Path
) -> None:
    directory = disk / "d"
    daemon = Daemon(directory, says_in=tmp_path)  # what it says has room
    run = run_file(tmp_path, peers=1, pace="turn_seconds = 0.2")
    try:
        daemon.start("start", str(run), "--dir", str(directory), *LOCAL)
        started = daemon.wait("training", lambda s: s.turn > 2)
        fill(disk)
        full = daemon.wait("full", lambda s: s.state == "degraded" and waits(s))
        assert full.why == "disk"
        daemon.wait("going on in memory", lambda s: s.turn > full.turn + 5)
        (disk / "filler").unlink()
        daemon.wait("on disk", lambda s: s.state == "training" and not s.warnings)
        assert held(directory, started.run) > full.turn
        assert daemon.stop() == 0, daemon.log()

        known = held(directory, started.run)
        daemon.start("start", str(directory), *LOCAL)
        again = daemon.wait("on from there", lambda s: s.frontier.updates > known)
        assert again.run == started.run
        assert "checkpoint not used" not in daemon.said()

        fill(disk)
        daemon.wait("full", waits)
        leave = [sys.executable, "-m", "shoal.node.cli", "leave", str(directory)]
        said = subprocess.run(leave, capture_output=True, text=True, check=True, timeout=600)
        assert "updates wait" in said.stderr
        assert daemon.process is not None
        assert daemon.process.wait(60 * PATIENCE) == 2
        *_, last = daemon.log().splitlines()
        assert last.startswith("shoal: ")
        assert "updates are not on disk" in last
        assert f"free some space in {directory}" in last
        (disk / "filler").unlink()

        daemon.start("start", str(directory), *LOCAL)
        daemon.wait("on from there", lambda s: s.frontier.updates > known)
        assert "checkpoint not used" not in daemon.said()
        assert daemon.stop() == 0
    finally:
        daemon.end()
