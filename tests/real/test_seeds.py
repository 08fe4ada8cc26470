"""The run files that send seeds, as shipped: one model on all daemons, and in every log."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from support.daemons import Daemon, agree

from shoal.node.replay import Options, replay
from shoal.node.status import State

pytestmark = [pytest.mark.real, pytest.mark.slow, pytest.mark.timeout(300)]
RUNS = ["mezo", "one-byte", "fedkseed", "ferret", "subspace", "two-planes"]
JOINED = """
[run]
name = "pool"
seed = 4
turns = 12
[task]
name = "digits"
[exchange]
update = { kind = "scalar", directions = "pool", pool = 256, perturbations = 200, sampling = "pro" }
[swarm]
min_peers = 3
"""


@pytest.mark.parametrize("name", RUNS)
def test_a_shipped_run_ends_with_one_model_that_every_log_rebuilds(
    name: str, tmp_path: Path
) -> None:
    turns = {"mezo": "6", "one-byte": "6", "two-planes": "5", "fedkseed": "1"}.get(name, "2")
    swarm = ("swarm", name, "--peers", "4", "--turns", turns, "--dir", str(tmp_path / "swarm"))
    done = subprocess.run(
        [sys.executable, "-m", "shoal.node.cli", *swarm],
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = re.search(r"fingerprints: all 4 equal \(([0-9a-f]{32})\)", done.stdout)
    assert found is not None, done.stdout
    measured = re.search(r"bits per byte: ([\d.]+) before, ([\d.]+) after", done.stdout)
    assert measured is not None, done.stdout
    assert float(measured[2]) < float(measured[1])
    for peer in range(1, 5):
        order = None if peer % 2 else peer
        again = replay(tmp_path / "swarm" / f"peer-{peer}", Options(shuffle=order, batch=3 * peer))
        assert again.agrees, again
        assert again.fingerprint == found[1]
        assert again.updates == 4 * int(turns)
        assert not again.refused


def test_who_joins_in_the_middle_holds_the_same_model(tmp_path: Path) -> None:
    """Seeds are drawn by what is in the ledger, so the joiner's history must be whole, too."""
    run = tmp_path / "run.toml"
    run.write_text(JOINED)
    daemons = [Daemon(tmp_path / name) for name in "abc"]
    local = ("--listen", "127.0.0.1:0", "--threads", "1")
    a, b, c = daemons
    try:
        a.start("start", str(run), "--dir", str(a.directory), *local)
        address = a.wait("up", lambda s: s.join).join[0]
        b.start("join", address, "--dir", str(b.directory), *local)
        a.wait("in the middle", lambda s: s.turn >= 3, 90)
        c.start("join", address, "--dir", str(c.directory), *local)
        for daemon in daemons:
            daemon.wait("finished", lambda s: s.state is State.FINISHED, 120)
        agree(daemons)
        found = {status.fingerprint for d in daemons if (status := d.status()) is not None}
        assert len(found) == 1
        assert {replay(d.directory, Options()).fingerprint for d in daemons} == found
    finally:
        for daemon in daemons:
            if daemon.process is not None and daemon.process.poll() is None:
                daemon.process.kill()
                daemon.process.wait(10)
