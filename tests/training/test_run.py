"""Run files: every default filled in, every mistake answered with the nearest known name."""

import json
import tomllib
from importlib import resources
from typing import Any

import pytest

from shoal.training.run import RunError, RunSpec


def built_in(name: str) -> dict[str, Any]:
    return tomllib.loads((resources.files("shoal.training") / "runs" / f"{name}.toml").read_text())


@pytest.mark.parametrize("name", ["text", "digits"])
def test_a_filled_run_file_is_plain_complete_and_stable(name: str) -> None:
    filled = RunSpec.parse(built_in(name)).filled()
    again = RunSpec.parse(json.loads(json.dumps(filled))).filled()
    assert again == filled
    assert set(filled) == {"run", "task", "local", "exchange", "swarm"}
    for table, given in built_in(name).items():
        assert given.keys() <= filled[table].keys()


def test_defaults_are_filled_in() -> None:
    filled = RunSpec.parse({"run": {"name": "a"}, "task": {"name": "text"}}).filled()
    assert filled["task"]["model"] == {"layers": 2, "width": 64, "heads": 4, "context": 128}
    assert filled["exchange"]["update"] == {
        "kind": "sparse",
        "momentum": 0.0,
        "outer_lr": 1.0,
        "decay": 0.95,
        "density": 1 / 64,
        "bits": 1,
        "chunk": 4096,
        "entropy": "auto",
    }
    dense = RunSpec.parse(
        {
            "run": {"name": "a"},
            "task": {"name": "text", "model": {"width": 32}},
            "exchange": {"update": {"kind": "dense", "momentum": 0.6}},
        }
    ).filled()
    assert dense["exchange"]["update"]["decay"] == 1.0
    assert dense["task"]["model"]["width"] == 32
    assert dense["task"]["model"]["layers"] == 2


MISTAKES: list[tuple[str, str, Any, str]] = [
    ("swarms", "", {}, "did you mean 'swarm'"),
    ("run", "sed", 1, "did you mean 'seed'"),
    ("run", "name", "Bad Name", "must match"),
    ("run", "seed", "x", "must be int"),
    ("run", "turns", True, "must be int"),
    ("run", "buffers", "loca", "refuse, local"),
    ("task", "name", "txt", "did you mean 'text'"),
    ("task", "modle", {}, "did you mean 'model'"),
    ("task", "model", {"widht": 3}, "did you mean 'width'"),
    ("task", "model", {"width": 60, "heads": 8}, "multiple"),
    ("task", "model", 3, "must be a table"),
    ("local", "batches", 3, "did you mean 'batch'"),
    ("local", "batch", 0, "at least 1"),
    ("local", "min_steps", 0, "min_steps"),
    ("local", "optimizer", {"name": "moun"}, "did you mean 'muon'"),
    ("local", "optimizer", {"name": "sgd", "momentun": 0.9}, "did you mean 'momentum'"),
    ("local", "optimizer", {"name": "sgd", "lr": -1}, "lr"),
    ("local", "optimizer", {"name": "sgd", "schedule": "cosin"}, "did you mean 'cosine'"),
    ("local", "optimizer", {"name": "sgd", "schedule": "wsd"}, "run.turns"),
    ("exchange", "mode", "mixing", "not built yet"),
    ("exchange", "staleness", {"curve": "hing"}, "curve = 'hing' is unknown"),
    ("exchange", "staleness", {"curve": "hinge", "a": -1}, "0 <= a"),
    ("exchange", "fragments", 0, "fragments = 0; use 1 to 1024"),
    ("exchange", "preset", "sparselocco", "did you mean 'sparseloco'"),
    ("exchange", "control", "scallion", "cannot be used with the ledger"),
    ("exchange", "preset", "scafcom", "cannot be used with the ledger"),
    ("exchange", "pace", "lockstep", "local.steps"),
    ("exchange", "pace", "fast", "free, lockstep"),
    ("exchange", "rule", "summ", "did you mean 'sum'"),
    ("exchange", "participation", 0, "participation"),
    ("exchange", "quantum_bits", 40, "quantum_bits"),
    ("exchange", "clip", "a/b", "neither a number"),
    ("exchange", "clip", 0, "above 0"),
    ("exchange", "clip", 10**400, "exchange.clip is too large"),
    ("exchange", "clip", "1e999999999999", "exponent"),
    ("exchange", "clip", "1e-999999999999", "exponent"),
    ("exchange", "update", "sparse", "exchange.update must be a table"),
    ("exchange", "update", 3, "exchange.update must be a table"),
    ("exchange", "update", {"kind": "dense", "outer_lr": float("inf")}, "update.outer_lr = inf"),
    ("exchange", "update", {"kind": "topk", "density": float("nan")}, "update.density = nan"),
    ("exchange", "update", {"kind": "topk", "shapes": [[3, 4]]}, "unknown setting .* 'shapes'"),
    ("exchange", "staleness", {"a": float("nan")}, "staleness.a = nan"),
    ("local", "optimizer", "adamw", "local.optimizer must be a table, got 'adamw'"),
    ("local", "optimizer", {"schedule": []}, "unknown local.optimizer.schedule"),
    ("local", "optimizer", {"name": "adamw", "lr": float("inf")}, "optimizer.lr = inf"),
    ("exchange", "update", {"kind": "dens"}, "did you mean 'dense'"),
    ("exchange", "update", {"kind": "dense", "level": 3}, "did you mean 'levels'"),
    ("exchange", "update", {"kind": "dense", "momentm": 0.5}, "did you mean 'momentum'"),
    ("exchange", "update", {"kind": "dense", "levels": 5}, "levels = 5"),
    ("exchange", "update", {"kind": "dense", "momentum": 1.0}, "momentum = 1.0"),
    ("swarm", "admission", "invite", "not built yet"),
    ("swarm", "topology", "star", "exponential"),
    ("swarm", "min_peers", 0, "min_peers"),
]


@pytest.mark.parametrize(("table", "key", "value", "answer"), MISTAKES)
def test_a_mistake_is_named(table: str, key: str, value: Any, answer: str) -> None:
    given: dict[str, Any] = {"run": {"name": "a"}, "task": {"name": "text"}}
    given.setdefault(table, {})
    if key:
        given[table][key] = value
    with pytest.raises(RunError, match=answer) as caught:
        RunSpec.parse(given)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("table", ["run", "task", "local", "exchange", "swarm"])
@pytest.mark.parametrize("value", [3, "x", [], None])
def test_a_table_that_is_none_is_named_whatever_the_preset(table: str, value: Any) -> None:
    given = {"run": {"name": "a"}, "task": {"name": "text"}, "exchange": {"preset": "one-bit-adam"}}
    with pytest.raises(RunError, match=rf"\[?{table}\]?.* (must be a table|is missing)"):
        RunSpec.parse({**given, table: value})


def test_clip_is_read_as_it_is_written() -> None:
    def ratio(clip: Any) -> tuple[int, int]:
        spec = RunSpec.parse(
            {"run": {"name": "a"}, "task": {"name": "text"}, "exchange": {"clip": clip}}
        )
        return spec.exchange.clip_ratio().as_integer_ratio()

    assert ratio(2) == (2, 1)
    assert ratio(0.1) == (1, 10)
    assert ratio("1/3") == (1, 3)


def test_code_is_named_only_by_the_local_operator() -> None:
    given = {"run": {"name": "a"}, "task": {"name": "os:system"}}
    with pytest.raises(RunError, match="--allow-task os:system"):
        RunSpec.parse(given)
    with pytest.raises(RunError, match="--allow-task"):
        RunSpec.parse(given, allow_task="os:remove")
    with pytest.raises(RunError, match="cannot import"):
        RunSpec.parse(
            {"run": {"name": "a"}, "task": {"name": "no_such_module:Task"}},
            allow_task="no_such_module:Task",
        )
    with pytest.raises(RunError, match="not something to call"):
        RunSpec.parse({"run": {"name": "a"}, "task": {"name": "os:name"}}, allow_task="os:name")
