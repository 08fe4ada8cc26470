"""`shoal simulate`: real training on a simulated network."""

import json
from pathlib import Path

import pytest

from shoal.node import cli, rehearsal
from shoal.node.config import to_toml
from shoal.node.errors import ConfigError
from shoal.node.simulation.faults import Fault, Network
from shoal.node.swarm import adapt, read_run

pytestmark = pytest.mark.sim


def simulated(capsys: pytest.CaptureFixture[str], *flags: str) -> dict[str, object]:
    assert cli.main(["simulate", "digits", "--json", *flags]) == 0
    answer: dict[str, object] = json.loads(capsys.readouterr().out)
    return answer


def test_peers_learn_together_and_end_with_one_model(capsys: pytest.CaptureFixture[str]) -> None:
    summary = simulated(capsys, "--peers", "4", "--turns", "8")
    assert summary["equal"]
    assert summary["updates"] == 32
    assert summary["evaluation"] > 0.7 > summary["first_evaluation"]  # accuracy of ten classes


def test_the_same_seed_gives_the_same_trace_and_model(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--peers", "3", "--turns", "2", "--loss", "0.1")
    first, again = simulated(capsys, *flags), simulated(capsys, *flags)
    other = simulated(capsys, *flags, "--seed", "1")
    assert first == again
    assert other["trace"] != first["trace"]


def test_fake_peers_need_no_training(capsys: pytest.CaptureFixture[str]) -> None:
    summary = simulated(capsys, "--fake", "--peers", "8", "--turns", "3")
    assert summary["equal"]
    assert summary["updates"] == 24
    assert summary["evaluation"] is None
    assert summary["published_bytes"] is None
    assert cli.main(["simulate", "digits", "--fake", "--turns", "1"]) == 0
    assert "payload" not in capsys.readouterr().out, "there are none"


@pytest.mark.parametrize(
    ("table", "said", "complaint"),
    [
        ("exchange", {"control": "nope"}, "unknown method of error control 'nope'"),
        ("exchange", {"update": {"kind": "dens"}}, "did you mean 'dense'?"),
        ("local", {"stesp": 3}, "'stesp'"),
        ("task", {"name": "nope"}, "unknown task 'nope'"),
    ],
)
def test_fake_peers_need_a_run_file_all_the_same(
    table: str,
    said: dict[str, object],
    complaint: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "run.toml"
    tables = read_run("digits")
    path.write_text(to_toml({**tables, table: {**tables[table], **said}}))
    assert cli.main(["simulate", str(path), "--fake", "--turns", "3"]) == 2
    assert complaint in capsys.readouterr().err


def test_before_is_measured_as_after_is_and_of_the_initial_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tables = adapt(read_run("digits"), peers=2, turns=1)
    tables["local"] = {**tables["local"], "evaluate_every": 0}
    path = tmp_path / "run.toml"
    path.write_text(to_toml(tables))
    assert cli.main(["simulate", str(path), "--peers", "2", "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    simulator = rehearsal.rehearse(tables, 2, seed=0, network=Network())
    assert summary["first_evaluation"] == simulator.peers[0].worker.evaluate()
    assert cli.main(["simulate", str(path), "--peers", "2", "--turns", "1"]) == 0
    assert f"held out: {summary['first_evaluation']:.3f} before" in capsys.readouterr().out


def test_a_peer_whose_worker_starts_anew_holds_the_same_model() -> None:
    """Everything is applied again from the log: sums do not depend on when."""
    tables = adapt(read_run("digits"), peers=3, turns=4)
    simulator = rehearsal.rehearse(tables, 3, seed=5, network=Network(duplicate=0.1))
    for fault in Fault.kill_worker(peer=1, at=1.0, to=2.0):
        simulator._push(fault.at, fault.peer, fault)
    assert simulator.run(300.0, rehearsal.done)
    prints = {peer.worker.fingerprint() for peer in simulator.living()}
    assert len(prints) == 1
    assert {peer.worker.trainer.recompute() for peer in simulator.living()} == prints


FAILING = """
from shoal.training.tasks.digits import Digits

class Failing(Digits):
    def loss(self, model, batch):
        self.losses = getattr(self, "losses", 0) + model.training
        if self.losses > 3:
            raise LookupError("no such label")
        return super().loss(model, batch)

class Ending(Digits):
    def batches(self, generator):
        given = super().batches(generator)
        for _ in range(2):
            yield next(given)
"""


@pytest.mark.parametrize(
    ("factory", "said"),
    [("Failing", "LookupError: no such label ("), ("Ending", "batches() came to an end")],
)
def test_a_task_that_fails_is_told_in_one_line(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    factory: str,
    said: str,
) -> None:
    name = f"{factory.lower()}_task"
    (tmp_path / f"{name}.py").write_text(FAILING)
    monkeypatch.syspath_prepend(tmp_path)
    run = adapt(read_run("digits"), peers=2, turns=2)
    run["task"] = {"name": f"{name}:{factory}"}
    path = tmp_path / "run.toml"
    path.write_text(to_toml(run))
    assert cli.main(["simulate", str(path), "--allow-task", f"{name}:{factory}"]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("shoal: ")
    assert said in last


def test_a_run_that_follows_the_clock_cannot_be_simulated() -> None:
    tables = adapt(read_run("digits"), peers=2, turns=1)
    tables["local"] = {**tables["local"], "steps": 0, "turn_seconds": 1.0}
    with pytest.raises(ConfigError, match=r"local\.steps"):
        rehearsal.rehearse(tables, 2, seed=0, network=Network())


@pytest.mark.parametrize(
    ("change", "remedy"),
    [
        ('[run]\nname = "x"\n[task]\nname = "digits"\n[local]\nsteps = 1\n', "--turns"),
        ('[run]\nname = "x"\nturns = 1\n[task]\nname = "digit"\n', "digits"),
        ('[run]\nname = "x"\nturns = 1\n[task]\nname = "digits"\nalhpa = 1.0\n', "alpha"),
    ],
)
def test_a_wrong_run_file_is_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, change: str, remedy: str
) -> None:
    path = tmp_path / "run.toml"
    path.write_text(change)
    assert cli.main(["simulate", str(path)]) == 2
    error = capsys.readouterr().err
    assert remedy in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("loss", ["1", "-0.1", "x", "nan"])
def test_a_share_that_is_none_is_refused(capsys: pytest.CaptureFixture[str], loss: str) -> None:
    assert cli.main(["simulate", "digits", "--loss", loss]) == 2
    assert "--loss" in capsys.readouterr().err
