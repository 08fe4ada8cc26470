"""A peer whose losses are lies, in a real swarm under the median rule: the honest still learn.

Everything of the liar is genuine – its key, its records, its payloads – but what it trains for: its
task returns -1000 times the loss, so that every byte that it publishes is ∓127 against the slope.
"""

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.daemons import Daemon, agree

from shoal.node.status import State, Status

pytestmark = [pytest.mark.real, pytest.mark.slow, pytest.mark.timeout(2400)]

TURNS, PEERS = 100, 4
RUN = f"""
[run]
name = "liar"
seed = 5
turns = {TURNS}
[task]
name = "digits"
[local]
batch = 64
steps = 24
evaluate_every = 10
[exchange]
update = {{ kind = "scalar", directions = "common", perturbations = 24, lr = 0.03, walk = false }}
rule = "median"
pace = "lockstep"
[swarm]
min_peers = {PEERS}
"""
LIE = """
    import sys

    if any("shoal.node.worker" in word for word in sys.orig_argv):
        from shoal.training.tasks.digits import Digits

        honest = Digits.loss
        Digits.loss = lambda self, model, batch: -1000 * honest(self, model, batch)
        print("this worker lies", file=sys.stderr, flush=True)
"""


class Swarm:
    """Daemons in one folder; the last one may lie."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.daemons: list[Daemon] = []

    def start(self, *, liar: bool) -> None:
        """Found the run with an honest peer, let the others join it, and all begin at once.

        Lockstep waits a minute for the first turn of all: too little on a machine that is busy.
        """
        run, lies = self.folder / "run.toml", self.folder / "lies"
        run.write_text(RUN)
        lies.mkdir()
        (lies / "sitecustomize.py").write_text(textwrap.dedent(LIE))
        path = os.pathsep.join(filter(None, [str(lies), os.environ.get("PYTHONPATH", "")]))
        join = ""
        for index in range(PEERS):
            last = index == PEERS - 1
            prefix = ("env", f"PYTHONPATH={path}") if liar and last else ()
            daemon = Daemon(self.folder / f"peer-{index}", prefix=prefix)
            self.daemons.append(daemon)
            what = ("join", join) if join else ("start", str(run))
            local = ("--listen", "127.0.0.1:0", "--threads", "1", "--libp2p", "off")
            shard = ("--paused", "--shard", f"{index}/{PEERS}")
            daemon.start(*what, "--dir", str(daemon.directory), *local, *shard)
            if not join:
                join = daemon.wait("up", lambda s: s.join).join[0]
        for daemon in self.daemons:
            daemon.wait("ready", ready, 120)
        for daemon in self.daemons:
            daemon.client().post("resume")

    def stop(self) -> None:
        for daemon in self.daemons:
            daemon.end()


@pytest.fixture
def swarm(tmp_path: Path) -> Iterator[Swarm]:
    swarm = Swarm(tmp_path)
    yield swarm
    swarm.stop()


def ready(status: Status) -> bool:
    return status.state is State.PAUSED and status.members == PEERS and bool(status.fingerprint)


def finished(status: Status) -> bool:
    return status.state is State.FINISHED


def test_the_honest_learn_beside_a_liar(swarm: Swarm) -> None:
    swarm.start(liar=True)
    for daemon in swarm.daemons:
        daemon.wait("finished", finished, 120)
    fingerprint = agree(swarm.daemons)
    honest, liar = swarm.daemons[0], swarm.daemons[-1]
    assert "this worker lies" in (liar.directory / "worker.log").read_text()
    for daemon in swarm.daemons:
        status = daemon.wait("in agreement", lambda s: s.agrees, 60)
        assert status.fingerprint == fingerprint
        assert status.frontier.updates == PEERS * TURNS
    for daemon in swarm.daemons:
        assert daemon.stop() == 0

    # The logs say the same, in any order, and so do the checkpoints beside them.
    for daemon, flags in ((honest, ["--evaluate"]), (liar, ["--shuffle", "1", "--batch", "7"])):
        found = replayed(daemon, *flags)
        assert (found["agrees"], found["fingerprint"]) == (True, fingerprint)
        # A worker that is killed, since its end takes too long, may leave no checkpoint.
        killed = "worker killed" in daemon.said()
        assert [each["agrees"] for each in found["compared"]] == [True] or killed
        if found["evaluation"] is not None:
            print(f"accuracy {found['evaluation']:.3f}")
            assert found["evaluation"] > 0.3, "far from chance; their mere sum would learn nothing"


def replayed(daemon: Daemon, *flags: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "shoal.node.cli", "replay", str(daemon.directory), "--json"]
    said = subprocess.run([*command, *flags], capture_output=True, timeout=1200, check=True)
    found: dict[str, Any] = json.loads(said.stdout)
    return found
