"""`shoal bench tuning`: two halves, one task vector, and what compressing it costs."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from shoal.node import cli
from shoal.node.bench import tuning
from shoal.node.bench.tuning import Plan, Row, Trial, Tuned
from shoal.training import data
from shoal.training.tasks import text


def test_the_halves_share_nothing_and_lack_nothing(tmp_path: Path) -> None:
    first, second = (sorted(half.iterdir()) for half in tuning.split(tmp_path))
    assert not {p.name for p in first} & {p.name for p in second}
    assert len(first) + len(second) == len(list(data.files(None)))
    assert 0.8 < len(first) / len(second) < 1.25


def test_windows_are_spread_over_the_blocks() -> None:
    blocks = [bytes([n]) * 400 for n in range(6)]  # three windows of 129 bytes each
    assert tuning._windows(blocks, 6).tolist() == [[n] * 129 for n in range(6)]
    assert tuning._windows(blocks, 100).shape == (18, 129)


class Quadratic:
    """A task whose loss is the distance of the model from where it should be."""

    def loss(self, model: torch.nn.Linear, batch: torch.Tensor) -> torch.Tensor:
        return (model.weight - self.goal).square().mean() + 1

    def __init__(self, goal: torch.Tensor) -> None:
        self.goal = goal


def tuned() -> Tuned:
    goal = torch.randn(64, 64, generator=torch.Generator().manual_seed(1))
    windows = torch.zeros(2, 129, dtype=torch.uint8)
    model = torch.nn.Linear(64, 64, bias=False)
    base = torch.zeros(4096)
    task = Quadratic(goal)
    flat = goal.reshape(-1)
    return Tuned(task, model, ((64, 64),), base, flat, windows, windows, 0.0, 24)  # type: ignore[arg-type]


def compeft(density: float) -> Sequence[dict[str, Any]]:
    (trial,) = (t for t in tuning.trials() if t.name == f"ComPEFT, {100 * density:g} %")
    assert all(settings["density"] == density for settings in trial.settings)
    return trial.settings


def test_a_payload_is_added_to_the_base_and_measured() -> None:
    trials = [
        Trial("dense, 8 bits", "dense", [{"bits": 8}]),
        Trial("topk", "topk", [{"density": 0.5}]),
        Trial("ComPEFT, 20 %", "topk", compeft(0.2)),
    ]
    rows = {row.name: row for row in tuning.measure(tuned(), trials)}
    before, after = rows["before tuning"], rows["tuned, 32 bits"]
    assert (before.kept, after.kept) == (0, 1)
    assert after.loss == pytest.approx(1)
    dense = rows["dense, 8 bits"]
    assert dense.no_worse
    assert dense.kept == pytest.approx(1, abs=1e-3)
    assert dense.of_16_bit == pytest.approx(2 * 4096 / dense.bytes)
    assert dense.of_32_bit == pytest.approx(4 * 4096 / dense.bytes)
    # What is kept of a quadratic is the energy: of signs of the largest half, at their mean.
    share = tuned().tuned_D.abs().topk(2048).values
    expected = 2048 * share.mean() ** 2 / tuned().tuned_D.square().sum()
    assert rows["topk"].kept == pytest.approx(float(expected), abs=1e-3)
    # The largest fifth of Gaussian numbers are on average 1.75 deviations from zero.
    assert rows["ComPEFT, 20 %"].settings["alpha"] == 2.0


def test_the_claim_is_about_size_and_loss_of_compeft() -> None:
    row = Row(
        name="ComPEFT, 5 %",
        settings={"alpha": 2.0},
        bytes=10,
        of_16_bit=16.0,
        of_32_bit=32.0,
        loss=1.0,
        kept=0.9,
        no_worse=True,
    )
    assert tuning.keeps_the_claim(row)
    assert not tuning.keeps_the_claim(replace(row, name="FedZip, 5 %"))
    assert not tuning.keeps_the_claim(replace(row, of_16_bit=15.9))
    assert not tuning.keeps_the_claim(replace(row, no_worse=False))
    assert tuning.table([row]).splitlines()[1].split() == [
        *("ComPEFT,", "5", "%", "2", "10", "16.0", "×", "32.0", "×", "1.0000", "90", "%"),
        *("no", "worse"),
    ]


def test_the_densities_and_settings_that_are_tried_can_be_had() -> None:
    names = [trial.name for trial in tuning.trials()]
    assert len(set(names)) == len(names)
    for trial in tuning.trials():
        for settings in trial.settings:
            size, model = tuning.compressed(tuned(), trial.kind, settings)
            assert size > 0
            assert model.shape == (4096,)


def test_it_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(tuning, "QUICK", Plan(1, 16, 10, 10, 8, 8))
    monkeypatch.setattr(text, "THOROUGH", 8)
    monkeypatch.setattr(tuning, "trials", lambda: [Trial("dense", "dense", [{"bits": 8}])])
    threads = torch.get_num_threads()
    try:
        code = cli.main(["bench", "tuning", "--quick", "--json", "--threads", "1"])
    finally:
        torch.set_num_threads(threads)
    assert code == 1  # ComPEFT was not tried
    found = json.loads(capsys.readouterr().out)
    rows = {row["name"]: row for row in found["rows"]}
    assert list(rows) == ["before tuning", "tuned, 32 bits", "tuned, 16 bits", "dense"]
    assert rows["tuned, 32 bits"]["bytes"] == 4 * found["parameters"]
    assert rows["dense"]["no_worse"]
    assert 1 < rows["tuned, 32 bits"]["loss"] < 8


@pytest.mark.slow
def test_compeft_keeps_its_claim_on_a_real_tuning(capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    try:
        assert cli.main(["bench", "tuning", "--quick", "--json"]) == 0
    finally:
        torch.set_num_threads(threads)
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert rows[0]["loss"] > rows[1]["loss"]
