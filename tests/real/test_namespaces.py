"""Three hosts without a common loopback: found on one, joined from the others, cut and healed."""

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.daemons import PATIENCE, Daemon, run_file
from support.netns import Host, network

pytestmark = [pytest.mark.real, pytest.mark.slow, pytest.mark.timeout(3600)]

Json = dict[str, Any]


def shoal(host: Host, *argv: str) -> str:
    """Run a command on a host and return what it prints."""
    command = [sys.executable, "-m", "shoal.node.cli", *argv]
    return host.run(command, timeout=60 * PATIENCE).stdout


def status(host: Host, daemon: Daemon) -> Json:
    """Return its status; nothing while it does not answer."""
    assert daemon.process is not None
    assert daemon.process.poll() is None, daemon.log()
    try:
        found: Json = json.loads(shoal(host, "status", str(daemon.directory), "--json"))
    except subprocess.CalledProcessError:
        return {}
    return found.get("status", found)


def wait(
    host: Host, daemon: Daemon, what: str, good: Callable[[Json], bool], seconds: float = 60.0
) -> Json:
    end = time.monotonic() + PATIENCE * seconds
    last: Json = {}
    while time.monotonic() < end:
        last = status(host, daemon)
        if last and good(last):
            return last
        time.sleep(0.5)
    raise AssertionError(f"not {what} within {PATIENCE * seconds} s: {last}\n{daemon.log()}")


def at_one(seen: list[Json]) -> bool:
    """Say whether all are paused, none is in the middle of a turn, and all hold one model."""
    if not seen or not all(s and s["state"] == "paused" and s["measured"] for s in seen):
        return False
    return len({(s["fingerprint"], s["frontier"]["hash"]) for s in seen}) == 1


def join_address(daemon: Daemon, seconds: float = 60.0) -> str:
    """Return the address that the daemon printed."""
    end = time.monotonic() + PATIENCE * seconds
    while time.monotonic() < end:
        found = re.search(r"^join: shoal join (\S+)", daemon.said(), re.MULTILINE)
        if found:
            return found[1]
        time.sleep(0.2)
    raise AssertionError(daemon.log())


def test_a_run_founded_on_one_host_is_joined_from_others_by_the_printed_address(
    tmp_path: Path,
) -> None:
    run = run_file(tmp_path, peers=3, pace="turn_seconds = 2.0")
    with network(3, routed=True) as hosts:
        daemons = [
            Daemon(tmp_path / f"host{i}", prefix=host.command([])) for i, host in enumerate(hosts)
        ]
        common = ("--threads", "1", "--dir")
        daemons[0].start("start", str(run), *common, str(daemons[0].directory))
        address = join_address(daemons[0])
        assert hosts[0].address in address
        for daemon in daemons[1:]:
            daemon.start("join", address, *common, str(daemon.directory))
        for host, daemon in zip(hosts, daemons, strict=True):
            wait(
                host,
                daemon,
                "training with all three in agreement",
                lambda s: s["state"] == "training" and s["members"] == 3 and bool(s["agrees"]),
                120,
            )

        # The wire to one host is cut; both sides train on and unite when it is mended.
        hosts[2].cut()
        before = wait(hosts[2], daemons[2], "answering", bool)["turn"]
        wait(hosts[0], daemons[0], "missing one", lambda s: s["members"] == 2)
        wait(hosts[2], daemons[2], "training alone", lambda s: s["turn"] >= before + 2)
        hosts[2].heal()
        # The longer it was away, the more rarely it is looked for.
        for host, daemon in zip(hosts, daemons, strict=True):
            wait(host, daemon, "whole again", lambda s: s["members"] == 3, 180)
        for host, daemon in zip(hosts, daemons, strict=True):
            shoal(host, "pause", str(daemon.directory))
        seen: list[Json] = []
        end = time.monotonic() + PATIENCE * 180
        while time.monotonic() < end and not at_one(seen):
            time.sleep(0.5)
            seen = [status(h, d) for h, d in zip(hosts, daemons, strict=True)]
        assert at_one(seen), seen
        for daemon in daemons:
            assert daemon.stop() == 0
