"""The run files that send seeds, as shipped: one model on all daemons, and in every log."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.daemons import Daemon, agree

from shoal.gossip.limits import Limits
from shoal.node import cli, snapshots
from shoal.node.home import Home
from shoal.node.replay import Options, replay
from shoal.node.status import State
from shoal.node.wire import requests

pytestmark = [pytest.mark.real, pytest.mark.slow, pytest.mark.timeout(2400)]
RUNS = ["mezo", "one-byte", "fedkseed", "ferret", "subspace", "two-planes"]
JOINED = """
[run]
name = "pool"
seed = 4
turns = {turns}
[task]
name = "digits"
[exchange.update]
kind = "scalar"
directions = "pool"
perturbations = 200
pool = {pool}
sampling = "{sampling}"
[swarm]
min_peers = 3
"""


@pytest.mark.parametrize("name", RUNS)
def test_a_shipped_run_ends_with_one_model_that_every_log_rebuilds(
    name: str, tmp_path: Path
) -> None:
    turns = {"mezo": "10", "one-byte": "10", "two-planes": "5", "fedkseed": "1"}.get(name, "2")
    swarm = ("swarm", name, "--peers", "4", "--turns", turns, "--dir", str(tmp_path / "swarm"))
    done = subprocess.run(
        [sys.executable, "-m", "shoal.node.cli", *swarm],
        capture_output=True,
        text=True,
        timeout=1800,
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
    run.write_text(JOINED.format(turns=0, pool=256, sampling="pro"))
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
            daemon.wait("training together", lambda s: s.turn >= 3 and s.frontier.authors == 3, 120)
        for daemon in daemons:
            daemon.client().post("pause")
        found = agree(daemons)
        assert {replay(d.directory, Options()).fingerprint for d in daemons} == {found}
    finally:
        for daemon in daemons:
            daemon.end()


def test_who_joins_late_begins_with_the_sums_of_a_peer_that_stays_alone(tmp_path: Path) -> None:
    """A joiner, killed and started again, outlives all that have the log, and gives its own."""
    run = tmp_path / "run.toml"
    # For ever: whenever the joiner comes, there is more to be learnt, and some of that by itself.
    run.write_text(JOINED.format(turns=0, pool=64, sampling="uniform"))
    a, b, c, d, e = daemons = [Daemon(tmp_path / name) for name in "abcde"]
    local = ("--listen", "127.0.0.1:0", "--threads", "1", "--libp2p", "off")
    try:
        a.start("start", str(run), "--dir", str(a.directory), *local)
        address = a.wait("up", lambda s: s.join).join[0]
        b.start("join", address, "--whole-log", "--dir", str(b.directory), *local)
        a.wait("in the middle", lambda s: s.turn >= 6 and s.frontier.updates >= 10, 120)
        c.start("join", address, "--dir", str(c.directory), *local)
        c.wait("confirmed", lambda s: s.agrees, 120)
        assert (c.directory / "snapshot").exists()
        d.directory.mkdir()  # as after a join that was killed before it had the genesis
        shutil.copy(c.directory / "snapshot", d.directory)
        d.start("join", address, "--whole-log", "--observe", "--dir", str(d.directory), *local)
        d.wait("up", lambda s: s.join)
        assert not (d.directory / "snapshot").exists()
        c.kill()
        c.start()
        c.wait("training", lambda s: s.state is State.TRAINING and s.frontier.authors == 3, 120)
        for daemon in (a, b, c):
            daemon.client().post("pause")
        one = agree([a, b, c, d])
        for daemon in (a, b, d):
            assert daemon.stop() == 0
        e.start(
            "join",
            c.wait("up", lambda s: s.join).join[0],
            "--observe",
            "--dir",
            str(e.directory),
            *local,
        )
        assert agree([c, e]) == one
        again = {
            x.directory.name: replay(x.directory, Options(shuffle=3, batch=7)) for x in daemons
        }
        assert {found.fingerprint for found in again.values()} == {one}
        assert all(found.agrees for found in again.values())
        whole = {name for name, found in again.items() if not found.summed}
        assert whole == {"a", "b", "d"}
        assert again["e"].summed == again["e"].updates > again["c"].summed > 0
        assert c.stop() == e.stop() == 0
        models = [tmp_path / f"{x.directory.name}.safetensors" for x in (c, d, e)]
        for daemon, model in zip((c, d, e), models, strict=True):
            assert cli.main(["export", str(model), str(daemon.directory)]) == 0
        assert len({model.read_bytes() for model in models}) == 1
    finally:
        for daemon in daemons:
            daemon.end()


def test_who_has_been_given_what_is_no_snapshot_fetches_the_log(tmp_path: Path) -> None:
    """Sums that are none, and sums of another model: then there is one snapshot less."""
    run = tmp_path / "run.toml"
    text = JOINED.format(turns=12, pool=64, sampling="uniform")
    run.write_text(text.replace("min_peers = 3", "min_peers = 1"))
    a, b = Daemon(tmp_path / "a"), Daemon(tmp_path / "b")
    local = ("--listen", "127.0.0.1:0", "--threads", "1", "--libp2p", "off")
    kept = b.directory / "snapshot"
    try:
        a.start("start", str(run), "--dir", str(a.directory), *local)
        address = a.wait("up", lambda s: s.join).join[0]
        a.wait("finished", lambda s: s.state is State.FINISHED, 100)
        b.start("join", address, "--observe", "--dir", str(b.directory), *local)
        one = agree([a, b])
        assert kept.exists()
        genesis = Home(b.directory, readonly=True).genesis(Limits())
        assert genesis is not None
        held = snapshots.load(kept, genesis.run_id)
        assert held is not None
        (snapshot, sums), whole = held, kept.read_bytes()
        model = tmp_path / "model.safetensors"
        for wrong in (sums[:12], bytes(len(sums)), None):
            assert b.stop() == 0
            if wrong is None:
                kept.write_bytes(whole[:-1])
            else:
                told = requests.encode_snapshot(snapshot.lines, snapshot.fingerprint, wrong)
                kept.write_bytes(snapshots._sealed(genesis.run_id, bytes(snapshot.donor) + told))
            assert cli.main(["export", str(model), str(b.directory)]) == 2
            assert not model.exists()
            b.start()
            assert agree([a, b]) == one
            assert not kept.exists()
        assert b.stop() == 0
        again = replay(b.directory, Options())
        assert (again.summed, again.fingerprint) == (0, one)
    finally:
        for daemon in (a, b):
            daemon.end()
