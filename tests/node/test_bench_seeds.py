"""What the benchmarks of seeds promise, and that they run."""

import json
from dataclasses import replace
from typing import Any

import pytest

from shoal.node import cli
from shoal.node.bench import finetune
from shoal.node.bench._lockstep import Lockstep
from shoal.node.bench.finetune import Row
from shoal.node.errors import ConfigError
from shoal.training.exchange import Arrived

ROWS = [
    Row("the base", 4.0, 0, 0, 0, 0),
    Row("MeZO in one place", 3.0, 4000, 4000, 0, 0),
    Row("fedkseed", 3.06, 1000, 4000, 1600, 16384),
    Row("ferret", 3.06, 100, 400, 1e6, 1e6),
]


def test_what_finetune_promises() -> None:
    assert finetune.promises(ROWS) == []
    start, mezo, pool, ferret = ROWS
    broken = {
        "fedkseed ends": [start, mezo, replace(pool, loss=3.061), ferret],
        "ferret ends": [start, mezo, pool, replace(ferret, loss=float("nan"))],
        "ferret computes": [start, mezo, pool, replace(ferret, passes=101)],
        "fedkseed sends": [start, mezo, replace(pool, up=1601), ferret],
        "takes in": [start, mezo, replace(pool, down=16385), ferret],
    }
    for said, rows in broken.items():
        (complaint,) = finetune.promises(rows)
        assert said in complaint


def test_onebyte_counts_what_is_published(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["bench", "onebyte", "--seeds", "5", "--peers", "2", "--turns", "3"]
    assert cli.main([*argv, "--perturbations", "2", "--json"]) == 1  # it has not learnt much
    said = capsys.readouterr()
    (row,) = json.loads(said.out)["rows"]
    assert row["bytes"] == 2 * 3 * 2
    assert 0 <= row["before"] <= 1
    assert "promised: 94% with 16000" in said.err


@pytest.mark.parametrize(
    ("argv", "remedy"),
    [
        (["onebyte", "--seeds", "a"], "give whole numbers"),
        (["onebyte", "--turns", "0"], "above zero"),
        (["finetune", "--base", "x", "--rates", "fast"], "give numbers"),
        (["finetune", "--base", "x", "--steps", "0"], "above zero"),
        (["finetune", "--base", "/nowhere/at/all"], "/nowhere/at/all"),
    ],
)
def test_a_mistake_is_named(
    argv: list[str], remedy: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["bench", *argv]) == 2
    assert remedy in capsys.readouterr().err


def run(**update: Any) -> dict[str, Any]:
    return {
        "run": {"name": "a", "turns": 4},
        "task": {"name": "digits"},
        "local": {"steps": 2, "evaluate_every": 0},
        "exchange": {"update": {"kind": "scalar", "lr": 0.02, **update}},
    }


@pytest.mark.parametrize("sampling", ["uniform", "pro"])
def test_peers_in_lockstep_hold_what_each_would_by_itself(sampling: str) -> None:
    """Copying integers stands for applying: models and what is drawn next are the same."""
    update = {"directions": "pool", "pool": 32, "perturbations": 8, "sampling": sampling}
    one, other = Lockstep(run(**update), 3), Lockstep(run(**update), 3)
    for turn in range(1, 4):
        said = [turned.payload for turned in one.take()]
        mine = [trainer.turn(turn, 3).payload for trainer in other.trainers]
        assert mine == said
        arrived = [
            Arrived((trainer.exchange.peer, 0, turn), turn, "scalar", payload, len(payload or b""))
            for trainer, payload in zip(other.trainers, mine, strict=True)
        ]
        for trainer in other.trainers:
            trainer.commit(0, turn)
            assert not any(outcome.refused for outcome in trainer.apply(arrived))
    found = {trainer.exchange.snapshot() for swarm in (one, other) for trainer in swarm.trainers}
    assert len(found) == 1
    assert found != {one.trainers[0].initial_bytes()}


def test_a_run_that_cannot_be_is_refused() -> None:
    with pytest.raises(ConfigError, match="perturbations = 0"):
        Lockstep(run(perturbations=0), 2)
