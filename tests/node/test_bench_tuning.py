"""`shoal bench tuning`: two halves, what compressing a tuning costs, at once and in rounds."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from shoal.node import cli
from shoal.node.bench import _rounds, _tuned, tuning
from shoal.node.bench._rounds import Round
from shoal.node.bench._tuned import Plan, Series, Tuned
from shoal.node.bench.tuning import Row, Trial
from shoal.training import data
from shoal.training.method import TrainingError
from shoal.training.tasks import text

pytestmark = pytest.mark.usefixtures("one_thread")
TINY = Plan(1, 16, 10, 10, 8, 8, (Series(2, 1e-3, (0.05,), (1.0,)),))


def test_the_halves_share_nothing_and_lack_nothing(tmp_path: Path) -> None:
    first, second = (sorted(half.iterdir()) for half in _tuned.split(tmp_path))
    assert not {p.name for p in first} & {p.name for p in second}
    assert len(first) + len(second) == len(list(data.files(None)))
    assert 0.6 < len(first) / len(second) < 1.6  # another library, another draw


def test_windows_are_spread_over_the_blocks() -> None:
    blocks = [bytes([n]) * 400 for n in range(6)]  # three windows of 129 bytes each
    assert _tuned.windows(blocks, 6).tolist() == [[n] * 129 for n in range(6)]
    assert _tuned.windows(blocks, 100).shape == (18, 129)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Let tiny tensors be worked on by one thread: two would wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def real(one_thread: None, tmp_path_factory: pytest.TempPathFactory) -> Tuned:
    """Return a tiny model tuned on a little text."""
    folder = tmp_path_factory.mktemp("text")
    for half in ("first", "second"):
        (folder / half).mkdir()
        (folder / half / "x").write_text("".join(f"{half} {n * n}\n" for n in range(10_000)))
    halves = folder / "first", folder / "second"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_tuned, "split", lambda folder: halves)
        patch.setattr(text, "THOROUGH", 8)
        return _tuned.tune(TINY, folder, 1)


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
    return Tuned(
        task=task,  # type: ignore[arg-type]
        model=model,
        shapes=((64, 64),),
        base_D=base,
        tuned_D=flat,
        validation_NT=windows,
        test_NT=windows,
        seconds=0.0,
        bits=24,
        again=_tuned.trainer,
    )


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
    rows = {row.name: row for row in tuning.measure(tuned(), trials, 3)}
    before, after = rows["before tuning"], rows["tuned, 32 bits"]
    assert (before.kept, after.kept) == (0, 1)
    assert {row.seed for row in rows.values()} == {3}
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
        seed=1,
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
    other = replace(row, seed=2, name="dense")
    assert tuning.claims_hold([row, replace(row, name="dense")])
    assert not tuning.claims_hold([row, other])
    assert tuning.claims_hold([row, other, replace(row, seed=2)])
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


# ---------------------------------------------------------------- in rounds


def fedzip(density: float, decay: float) -> dict[str, Any]:
    return {"kind": "kmeans", "density": density, "decay": decay}


def test_uncompressed_rounds_are_the_training_of_one_alone(
    real: Tuned, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text, "THOROUGH", 8)
    sizes, model_D = _rounds.take(real, 3, 2, 1e-3, None)
    assert sizes == 3 * [4 * len(real.base_D)]
    alone = real.again(turns=3, steps=2, rate=1e-3)
    alone.alone(6)
    expected_D = torch.cat([p.detach().reshape(-1) for p in by_name(alone.model)])
    torch.testing.assert_close(model_D, expected_D, atol=1e-6, rtol=0)
    assert float((model_D - real.base_D).abs().max()) > 1e-3


def by_name(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    return [p for _, p in sorted(model.named_parameters())]


def test_every_round_reaches_the_model(real: Tuned) -> None:
    _, full_D = _rounds.take(real, 3, 2, 1e-3, None)
    sizes, model_D = _rounds.take(real, 3, 2, 1e-3, {"kind": "dense", "bits": 8, "decay": 1.0})
    assert len(sizes) == 3
    assert max(sizes) < 1.2 * len(full_D)
    # Adam moves little where the gradient is about zero, and there its sign is chance.
    assert float((model_D - full_D).norm() / (full_D - real.base_D).norm()) < 0.1


def test_a_round_changes_what_its_payload_keeps_and_the_next_the_rest(real: Tuned) -> None:
    kept = sum(max(1, int(torch.Size(shape).numel() * 0.05)) for shape in real.shapes)
    (size,), model_D = _rounds.take(real, 1, 2, 1e-3, fedzip(0.05, 1.0))
    assert 0.9 * kept <= int((model_D != real.base_D).sum()) <= kept
    assert size < 3 * kept + 12 * len(real.shapes)
    _, with_D = _rounds.take(real, 2, 2, 1e-3, fedzip(0.05, 1.0))
    _, without_D = _rounds.take(real, 2, 2, 1e-3, fedzip(0.05, 0.0))
    # What the first round left behind is of the second's size, and most of it adds up.
    assert float((with_D - real.base_D).norm()) > 1.05 * float((without_D - real.base_D).norm())


def test_a_round_that_fails_ends_the_bench(real: Tuned) -> None:
    with pytest.raises(TrainingError, match="round 1: "):
        _rounds.take(real, 2, 2, 1e30, fedzip(0.05, 1.0))


def test_rounds_are_compared_with_the_same_rounds_uncompressed(real: Tuned) -> None:
    plan = replace(
        TINY, series=(Series(2, 1e-3, (0.5,), (1.0, 0.95)), Series(5, 3e-4, (0.5,), (1.0,)))
    )
    rows = list(_rounds.measure(real, plan, 4))
    assert [(r.rounds, r.density, r.decay) for r in rows] == [
        *((2, None, None), (2, 0.5, 1.0), (2, 0.5, 0.95)),
        *((5, None, None), (5, 0.5, 1.0)),
    ]
    for full in (rows[0], rows[3]):
        assert (full.kept, full.above, full.of_32_bit, full.no_worse) == (1, 0, 1, True)
        assert full.loss < tuning.loss(real, real.base_D, real.test_NT)
    for row, full in ((rows[1], rows[0]), (rows[2], rows[0]), (rows[4], rows[3])):
        assert row.above == pytest.approx(row.loss / full.loss - 1)
        assert row.no_worse == (row.above <= 0.01)
        assert row.of_32_bit == pytest.approx(4 * len(real.base_D) / row.bytes)
        assert row.of_one_change == pytest.approx(row.of_32_bit / row.rounds)
        assert 0 < row.kept < 1.5
    assert {row.seed for row in rows} == {4}


def test_seeds_are_summed_up_by_their_worst() -> None:
    row = Round(
        seed=1,
        rounds=40,
        rate=1e-3,
        density=0.01,
        decay=1.0,
        bytes=1234.4,
        of_32_bit=300.2,
        of_one_change=7.5,
        validation=1.0,
        loss=1.5,
        kept=0.8,
        above=0.0098,
        no_worse=True,
    )
    full = replace(row, density=None, decay=None, of_32_bit=1.0, above=0.0)
    second = replace(row, seed=2, of_32_bit=290.0, above=0.012, no_worse=False)
    said = _rounds.summary([full, row, replace(full, seed=2), second]).splitlines()
    assert len(said) == 2
    assert said[1].split()[-7:] == ["290", "×", "1.20", "%", "1", "of", "2"]
    shown = [line.split() for line in _rounds.table([full, row]).splitlines()[1:]]
    assert shown[0][:4] == ["40", "0.001", "32", "bits"]
    assert shown[1][8:] == [
        *("1,234", "300", "×", "7.5", "×", "1.5000", "80", "%", "0.98", "%", "within", "1", "%")
    ]


# ---------------------------------------------------------------- the command


def test_it_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(tuning, "QUICK", TINY)
    monkeypatch.setattr(text, "THOROUGH", 8)
    monkeypatch.setattr(tuning, "trials", lambda: [Trial("dense", "dense", [{"bits": 8}])])
    code = cli.main(["bench", "tuning", "--quick", "--json", "--threads", "1"])
    assert code == 1  # ComPEFT was not tried
    found = json.loads(capsys.readouterr().out)
    rows = {row["name"]: row for row in found["rows"]}
    assert list(rows) == ["before tuning", "tuned, 32 bits", "tuned, 16 bits", "dense"]
    assert rows["tuned, 32 bits"]["bytes"] == 4 * found["parameters"]
    assert rows["dense"]["no_worse"]
    assert 1 < rows["tuned, 32 bits"]["loss"] < 8
    assert [(row["rounds"], row["density"]) for row in found["rounds"]] == [(2, None), (2, 0.05)]


@pytest.mark.parametrize(
    ("options", "remedy"),
    [
        (["--seeds", "0"], "--seeds 0"),
        (["--threads", "0"], "--threads 0"),
        (["--seed", "4294967295", "--seeds", "2"], "use 0 to 4294967294"),
    ],
)
def test_options_are_checked_before_anything_is_trained(
    options: list[str], remedy: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["bench", "tuning", *options]) == 2
    assert remedy in capsys.readouterr().err


@pytest.mark.slow
def test_compeft_keeps_its_claim_on_a_real_tuning(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "tuning", "--quick", "--json", "--threads", "1"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert rows[0]["loss"] > rows[1]["loss"]
