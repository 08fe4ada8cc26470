"""`shoal bench liars`: who lies says the largest step against the honest, and a table shows it."""

import argparse
import json

import pytest
import torch

from shoal.node import cli
from shoal.node.bench import liars
from shoal.node.bench._lockstep import Lockstep
from shoal.node.bench.liars import Row


def asked(**changes: object) -> argparse.Namespace:
    """Return what the command line would say."""
    parser = argparse.ArgumentParser()
    liars.register(parser)
    args = parser.parse_args([])
    vars(args).update(changes)
    return args


def test_a_lie_is_as_large_as_can_be_and_against_the_median() -> None:
    args = asked(perturbations=5, turns=3)
    lockstep = Lockstep(liars.tables("median", args), 4)
    lockstep.turn = 1
    codec = lockstep.trainers[0].exchange.rules.codec(1, bytes(32))
    size = lockstep.trainers[0].exchange.rules.size
    directions = torch.arange(5)
    unit = 2.0**codec.exponent  # type: ignore[attr-defined]
    said = [
        codec.say(size, directions, torch.tensor(row, dtype=torch.float64) * unit, key=1).payload  # type: ignore[attr-defined]
        for row in ([5, -3, 0, 90, -1], [6, -2, 0, -127, -1], [-9, -1, 0, 3, 100])
    ]
    lie = codec.decode(liars.lie(lockstep, said), size)
    steps = (lie.coefficients / unit).tolist()  # type: ignore[union-attr]
    assert steps == [-127, 127, 127, -127, 127]


@pytest.mark.slow
def test_liars_stop_the_sum_and_not_the_median(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--turns", "60", "--perturbations", "8", "--rules", "sum,median", "--json"]
    assert cli.main(["bench", "liars", *flags, "--peers", "5", "--liars", "1"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["asked"]["liars"] == 1
    rows = {row["rule"]: row for row in found["rows"]}
    assert rows["sum"]["bytes"] == 60 * 8 * 5
    assert rows["sum"]["with_liars"] < rows["sum"]["without"] - 0.1
    assert rows["median"]["with_liars"] > rows["sum"]["with_liars"] + 0.1


def test_the_table_is_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--turns", "2", "--peers", "2", "--liars", "1", "--rules", "clip", "--alpha", "0.5"]
    assert cli.main(["bench", "liars", *flags]) == 0
    out = capsys.readouterr().out
    assert "1 of 2 lie" in out
    assert "labels by Dirichlet(0.5)" in out
    assert "8 bytes" in out


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--liars", "8"], "give 0 to 7 of 8 peers"),
        (["--liars", "-1"], "give 0 to 7"),
        (["--alpha", "-1"], "negative"),
        (["--alpha", "nan"], "negative"),
        (["--rules", "medium", "--turns", "1"], "did you mean 'median'"),
        (["--turns", "0"], "above zero"),
        (["--lr", "0"], "above zero"),
    ],
)
def test_what_cannot_be_asked_is_one_line(
    flags: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["bench", "liars", *flags]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert said in error


def test_the_promise_is_about_the_median_and_a_quarter_of_liars() -> None:
    lost = [Row(rule="median", without=0.93, with_liars=0.89, bytes=1)]
    held = [
        Row(rule="median", without=0.93, with_liars=0.91, bytes=1),
        Row(rule="sum", without=0.93, with_liars=0.5, bytes=1),
    ]
    assert liars.broken(lost, asked())
    assert not liars.broken(held, asked())
    assert not liars.broken(lost, asked(alpha=0.5))
    assert not liars.broken(lost, asked(turns=100))
    assert not liars.broken(lost, asked(liars=3))
