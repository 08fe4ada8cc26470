"""What the overhead benchmark makes of its numbers, and, slowly, that it runs."""

import argparse
import json
import os

import pytest

from shoal.node.bench import overhead
from shoal.node.bench._report import Row, show
from shoal.node.bench.overhead import Speed


def test_the_slow_down_is_that_of_the_pairs(capsys: pytest.CaptureFixture[str]) -> None:
    bare = [Speed(100, 90), Speed(50, 45), Speed(100, 90)]
    swarm = [
        Speed(99, 80, 0.5, 20, (20, 10)),
        Speed(49, 40, 0.25, 20, (30, 20)),
        Speed(101, 85, 0.25, 60, (25, 5)),
    ]
    rows = overhead.rows(bare, swarm)
    assert [row.value for row in rows] == pytest.approx([99, 80, 1, 2, 1, 20, 30])
    assert rows[0].ratio == pytest.approx(0.99)
    assert rows[4].ratio == pytest.approx(0.01)
    assert rows[5].ratio == pytest.approx(0.4)
    show("overhead", rows, as_json=True)
    printed = json.loads(capsys.readouterr().out)
    assert set(printed) == {"bench", "machine", "rows"}
    assert set(printed["rows"][0]) == {"name", "value", "unit", "yardstick", "ratio"}
    show("overhead", [*rows, Row("x", 1.0, "y")], as_json=False)
    assert "beside 100 steps/s: 0.9900" in capsys.readouterr().out


def test_pinning_ends_with_its_block() -> None:
    before = os.sched_getaffinity(0)
    ours, theirs = overhead._cores()
    with overhead._pinned(ours):
        assert os.sched_getaffinity(0) == ours
    assert os.sched_getaffinity(0) == before
    assert ours | theirs <= before


@pytest.mark.slow
@pytest.mark.real
def test_it_measures_a_real_swarm(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {"PAIRS": 1, "TURNS": 3, "WARM": 1, "STEPS": 5, "ASKED": 3}.items():
        monkeypatch.setattr(overhead, name, value)
    assert overhead.run(argparse.Namespace(json=True)) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert rows[0]["ratio"] > 0  # what it is, says the machine
    assert rows[-1]["value"] >= rows[-2]["value"] > 0
