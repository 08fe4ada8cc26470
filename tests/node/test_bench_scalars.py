"""`shoal bench scalars`: replay is that of a peer, and what is too slow is said."""

import json
from collections.abc import Iterator

import pytest
import torch

from shoal.compression import perturbation, splitmix
from shoal.node import cli
from shoal.node.bench import _speed, scalars
from shoal.node.bench.scalars import Replay


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Time no longer than needed, and leave torch as many threads as it had."""
    monkeypatch.setattr(_speed, "LEAST_SECONDS", 0.0)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_replay_adds_every_direction_by_its_coefficient() -> None:
    total = torch.zeros(1000, dtype=torch.int32)
    replay = scalars.replaying(total, 5)
    replay()
    wanted = torch.zeros(1000, dtype=torch.int64)
    words = zip(splitmix.words(1, 5).tolist(), splitmix.words(2, 5).tolist(), strict=True)
    for key, word in words:
        wanted += (word >> 40) * perturbation.signs(key % 2**64, 1000).long()
    assert torch.equal(total.long(), wanted)
    replay()
    assert torch.equal(total.long(), 2 * wanted)


def test_the_usual_way_draws_as_many_directions_of_the_same_size() -> None:
    x, z = torch.zeros(500), torch.zeros(500)
    scalars.draw(x, z, 3)
    drawn = [torch.randn(500, generator=torch.Generator().manual_seed(s)) for s in range(3)]
    assert torch.allclose(x, 1e-4 * torch.stack(drawn).sum(0), atol=1e-9)


def test_one_thread_is_one_thread_and_then_all_again() -> None:
    torch.set_num_threads(3)
    seen = []
    scalars.on_one_thread(lambda: seen.append(torch.get_num_threads()))()
    assert seen == [1]
    assert torch.get_num_threads() == 3


def test_acts_take_turns() -> None:
    done: list[str] = []
    found = scalars.in_turn([lambda: done.append("a"), lambda: done.append("b")], 2, "cpu")
    assert len(found) == 2
    assert all(0 < seconds < 60 for seconds in found)
    changes = [x for x, before in zip(done, ["", *done], strict=False) if x != before]
    assert changes == ["a", "b"] * 3  # once to compile, and two rounds


def test_speeds_stand_beside_both_yardsticks() -> None:
    rows = list(Replay(2_000_000, {1: 6e9, 16: 3e10}, randn=2e8, copied=4e9).rows())
    assert [row.name for row in rows] == [
        "2 M parameters, 1 seed, beside torch.randn",
        "2 M parameters, 1 seed, beside copied float32",
        "2 M parameters, 16 seeds, beside torch.randn",
        "2 M parameters, 16 seeds, beside copied float32",
    ]
    assert [row.ratio for row in rows] == pytest.approx([30, 1.5, 150, 7.5])


def test_many_seeds_are_to_be_eight_times_as_fast() -> None:
    """One seed is bound by memory and promises nothing."""
    fast = Replay(1_000_000, {1: 1e8, 16: 1.7e9}, randn=2e8, copied=1e9)
    slow = Replay(1_000_000, {1: 1e8, 16: 1.5e9}, randn=2e8, copied=1e9)
    (said,) = scalars.too_slow([fast, slow])
    assert "16 seeds along 1 M parameters is 7.5 times as fast" in said


@pytest.mark.parametrize(("speed", "code", "said"), [(1e10, 0, ""), (1e9, 1, "less than 8 times")])
def test_the_command_prints_rows_and_answers(
    speed: float,
    code: int,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    asked = []

    def measure(size: int, device: str, rounds: int) -> Replay:
        asked.append((size, device, rounds, torch.get_num_threads()))
        return Replay(size, {16: speed}, randn=1e9, copied=1e9)

    monkeypatch.setattr(Replay, "measure", measure)
    monkeypatch.setattr(scalars, "TRAINED", scalars.QUICK)
    assert cli.main(["bench", "scalars", "--sizes", "20k,3M", "--threads", "1", "--json"]) == code
    assert asked == [(20_000, "cpu", scalars.ROUNDS, 1), (3_000_000, "cpu", scalars.ROUNDS, 1)]
    shown = capsys.readouterr()
    found = json.loads(shown.out)
    assert found["bench"] == "scalars"
    assert found["machine"].endswith(", 1 thread")
    replays, training = found["rows"][:4], found["rows"][4:]
    assert [row["ratio"] for row in replays] == pytest.approx([speed / 1e9] * 4)
    assert 0.01 < training[0]["ratio"] < 10  # passes a second, beside bare ones
    assert training[-2]["value"] == 1  # byte of payload a step
    assert 1 < training[-1]["value"] < 64  # of a signed record
    assert said in shown.err


def test_a_real_measurement_has_a_speed_for_everything() -> None:
    found = Replay.measure(10_000, "cpu", 1)
    assert set(found.speeds) == set(scalars.SEEDS)
    assert all(row.value > 0 and row.yardstick for row in found.rows())


@pytest.mark.parametrize(
    "options",
    [["--device", "cuda:99"], ["--device", "tpu"], ["--threads", "0"], ["--sizes", "big"]],
)
def test_options_that_cannot_be_met(
    options: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(["bench", "scalars", *options]) == 2
    assert options[0] in capsys.readouterr().err
