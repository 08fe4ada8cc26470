"""What `shoal join` shows of the run that it found."""

import tomllib

import pytest

from shoal.node import founding, shipped
from shoal.node.config import RunFile


def run_of(name: str, **local: object) -> RunFile:
    tables = shipped.read(name)
    tables["local"] = {**tables.get("local", {}), **local}
    return RunFile.parse(tables, where=name)


@pytest.mark.parametrize("steps", [0, 30])
def test_a_joiner_is_shown_what_counts(steps: int) -> None:
    shown = tomllib.loads(founding._shown(run_of("text", steps=steps, turn_seconds=3.0)))
    assert ("steps" in shown["local"]) == bool(steps)
    assert ("turn_seconds" in shown["local"]) == (not steps)
    assert "" not in [value for table in shown.values() for value in table.values()]
    assert shown["run"]["seed"] == 7


def test_only_a_run_whose_seeds_are_from_a_pool_may_come_as_a_snapshot() -> None:
    assert [name for name in shipped.names() if founding._pooled(run_of(name))] == ["fedkseed"]
