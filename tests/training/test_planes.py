"""Several kinds of update in one run: whose turn it is, and what a run file may say."""

import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from shoal.compression import codec, perturbation
from shoal.compression.codec import Combination, Origin
from shoal.training.rules import Fragment, Plane, RuleError, Rules
from shoal.training.run import RunError, RunSpec
from shoal.training.trainer import Setup, Trainer
from shoal.training.walk import MOST_RATE, RATE, WalkSettings

RUN: dict[str, Any] = {"run": {"name": "a"}, "task": {"name": "digits"}}
SPARSE = {"kind": "sparse", "every": 10}
SCALAR = {"kind": "scalar", "lr": 0.01}


def spec(update: object, **exchange: object) -> RunSpec:
    return RunSpec.parse({**RUN, "exchange": {"update": update, **exchange}})


def rules(everies: list[int], fragments: int = 1, run: bytes = bytes(32)) -> Rules:
    part = codec.make("dense", {"bits": 4})
    parts = tuple(Fragment(10 * i, 10, part) for i in range(fragments))
    planes = tuple(Plane(f"kind{i}", parts, every) for i, every in enumerate(everies))
    return Rules(planes, turns=0, clip=Fraction(1), initial_squares=1, run=run)


@given(st.lists(st.integers(2, 9), max_size=3), st.integers(1, 5))
def test_every_plane_publishes_its_fragments_in_turn(everies: list[int], fragments: int) -> None:
    """The oracle counts turn by turn."""
    these = rules([*everies, 1], fragments)
    taken = [0] * len(these.planes)
    for turn in range(1, 60):
        expected = next(i for i, every in enumerate([*everies, 1]) if turn % every == 0)
        assert these.plane(turn) == expected
        assert these.fragment(turn).start == 10 * (taken[expected] % fragments)
        taken[expected] += 1


def test_an_update_must_be_of_the_kind_whose_turn_it_is() -> None:
    these = rules([3, 1])
    these.judge_record(3, "kind0", 1)
    these.judge_record(4, "kind1", 1)
    for turn, kind in ((3, "kind1"), (4, "kind0"), (4, "kind2")):
        with pytest.raises(RuleError, match=r"^kind: "):
            these.judge_record(turn, kind, 1)
    assert set(these.most_bytes()) == {"kind0", "kind1"}


def test_seeds_follow_from_run_author_and_turn() -> None:
    part = codec.make("scalar", {"perturbations": 2})
    run, author = b"r" * 32, b"a" * 32
    plane = Plane("scalar", (Fragment(0, 100, part),))
    these = Rules((plane,), turns=9, clip=Fraction(1), initial_squares=10**9, run=run)
    found = these.judge(7, "scalar", 2, b"\x05\xfb", author=author)
    assert isinstance(found, Combination)
    expected = torch.zeros(100, dtype=torch.int32)
    for sample, step in enumerate((5, -5)):
        key = perturbation.key(run, author, 7, sample)
        expected += step * perturbation.signs(key, 100).to(torch.int32)
    assert torch.equal(found.dense(), expected)
    others = [Origin(b"s" * 32, author, 7), Origin(run, b"b" * 32, 7), Origin(run, author, 8)]
    for origin in others:
        other = codec.at(part, origin).decode(b"\x05\xfb", 100)
        assert isinstance(other, Combination)
        assert not torch.equal(other.dense(), expected)


def test_more_perturbations_than_the_run_allows_are_never_fetched() -> None:
    part = codec.make("scalar", {"perturbations": 4})
    plane = Plane("scalar", (Fragment(0, 100, part),))
    these = Rules((plane,), turns=9, clip=Fraction(1), initial_squares=10**9)
    with pytest.raises(RuleError, match=r"^size: "):
        these.judge(1, "scalar", 5, bytes(5))
    with pytest.raises(RuleError, match=r"^payload: a step is -128"):
        these.judge(1, "scalar", 1, b"\x80")
    loud = b"\x7f" * 4
    quiet = Rules((plane,), turns=9, clip=Fraction(1), initial_squares=100 * 4 * 127**2 - 1)
    with pytest.raises(RuleError, match=r"^clip: "):
        quiet.judge(1, "scalar", 4, loud)


def test_a_list_of_kinds_survives_the_genesis() -> None:
    parsed = spec([SPARSE, SCALAR])
    assert [plane.every for plane in parsed.planes] == [10, 1]
    sized = parsed.sized(1000)
    again = RunSpec.parse(sized.filled())
    assert again.filled() == sized.filled()
    assert again.planes == sized.planes
    alone = spec({"kind": "sparse"})
    assert isinstance(alone.filled()["exchange"]["update"], dict)
    assert spec([{"kind": "sparse"}]).planes == alone.planes
    assert spec([SPARSE, {"kind": "scalar"}]).sized(1000).planes[1].author.lr == RATE / 1000


def test_a_handful_of_parameters_takes_steps_that_fit() -> None:
    sized = spec({"kind": "scalar", "perturbations": 4}).sized(5)
    assert sized.planes[0].author.lr == MOST_RATE
    with pytest.raises(RunError, match=r"lr = 20 .* perturbations = 4 of them to fit"):
        spec({"kind": "scalar", "perturbations": 4, "lr": 20.0})


@pytest.mark.parametrize(
    ("update", "answer"),
    [
        ([], "lists 0 kinds; list 1 to 4"),
        ([SPARSE] * 5, "lists 5 kinds; list 1 to 4"),
        ([SPARSE, "scalar"], r"exchange.update\[1\] must be a table"),
        ([{"kind": "sparse"}, SCALAR], r"exchange.update\[0\].every = 1"),
        ([SPARSE, {**SCALAR, "every": 2}], r"exchange.update\[1\].every = 2"),
        ([{**SPARSE, "every": 0}, SCALAR], "every = 0"),
        ([{**SPARSE, "every": 2.5}, SCALAR], "every = 2.5"),
        ([{**SPARSE, "every": True}, SCALAR], "every = True"),
        ({"kind": "sparse", "every": 2}, "every = 2"),
        ({"kind": "scalar", "momentum": 0.5}, "'momentum'"),
        ({"kind": "scalar", "lr": -1.0}, "lr = -1.0"),
        ({"kind": "scalar", "epsilon": 0.0}, "epsilon = 0.0; use 1e-08 to"),
        ({"kind": "scalar", "epsilon": 1e-9}, "epsilon = 1e-09; use 1e-08 to 10000"),
        ({"kind": "scalar", "epsilon": 1e39}, r"epsilon = 1e\+39; use"),
        ({"kind": "scalar", "reach": 0.0}, "reach = 0.0 must be above 0"),
        ({"kind": "scalar", "reach": 1e300}, r"reach = 1e\+300 must be above 0, and at most"),
        ({"kind": "scalar", "lr": 1e300}, r"lr = 1e\+300; use 0"),
        ({"kind": "scalar", "lr": 1e-300, "reach": 1e-300}, "below the ledger's unit"),
        (
            {"kind": "scalar", "lr": 1e6},
            r"lr = 1e\+06 and reach = 4 make steps too long for perturbations = 16",
        ),
        ({"kind": "scalar", "lr": 1e-12}, "below the ledger's unit, 2.-24; raise lr"),
        ({"kind": "scalar", "lr": 1e-8}, r"set exchange.quantum_bits to 25 "),
        ({"kind": "scalar", "exponent": 3}, "give lr as well"),
        ({"kind": "scalar", "perturbations": 0}, "perturbations = 0"),
    ],
)
def test_a_mistake_is_named(update: object, answer: str) -> None:
    with pytest.raises(RunError, match=answer):
        spec(update)


def test_a_preset_says_what_one_kind_is() -> None:
    with pytest.raises(RunError, match="leave one of them out"):
        spec([SPARSE, SCALAR], preset="mezo")


def test_in_lockstep_every_plane_has_a_fixed_number_of_steps() -> None:
    planes = [{"kind": "sparse", "every": 2}, SCALAR]
    assert "steps" not in RUN.get("local", {})
    with pytest.raises(RunError, match=r"'lockstep' needs a fixed local\.steps"):
        spec(planes, pace="lockstep")
    assert spec(SCALAR, pace="lockstep").planes


def test_directions_of_the_whole_model_have_no_fragments() -> None:
    with pytest.raises(RunError, match="leave fragments out"):
        spec(SCALAR, fragments=2)


@given(st.integers(1, 10**9), st.integers(1, 512), st.sampled_from([24, 28, 30]))
def test_the_largest_step_is_that_of_the_steepest_slope(size: int, peers: int, bits: int) -> None:
    """127 · 2^e quanta reach what lr · reach / peers asks for, and e is the least that does."""
    settings = WalkSettings(lr=RATE / size)
    wanted = settings.lr * settings.reach / peers * 2.0**bits
    if wanted < 1:
        return
    exponent = settings.exponent(bits, peers)
    assert 127 * 2**exponent >= wanted
    assert exponent == 0 or 127 * 2 ** (exponent - 1) < wanted


def trainer(update: object, optimizer: str = "adamw") -> Trainer:
    tables = {
        **RUN,
        "local": {"steps": 2, "evaluate_every": 0, "optimizer": {"name": optimizer}},
        "exchange": {"update": update},
    }
    return Trainer(Setup(run=RunSpec.parse(tables)), clock=lambda: 0.0)


def test_what_waits_for_a_turn_of_its_kind_survives_a_turn_of_another() -> None:
    one = trainer([{"kind": "sparse", "every": 2}, SCALAR])
    assert one.turn(2, 1.0, publish=False).payload is None
    waiting = one.exchange.drift
    assert waiting is not None
    assert one.turn(3, 1.0).kind == "scalar"
    one.commit(1, 1)
    assert one.exchange.drift is waiting
    assert one.turn(4, 1.0).kind == "sparse"
    one.commit(1, 2)
    assert one.exchange.drift is None


def test_a_dropped_turn_leaves_the_inner_optimizer_as_it_was(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    one = trainer({"kind": "sparse"})
    one.turn(1, 1.0)
    one.commit(1, 1)
    one.save(tmp_path / "before")
    honest = one.task.loss
    monkeypatch.setattr(one.task, "loss", lambda model, batch: honest(model, batch) * math.nan)
    assert one.turn(2, 1.0).dropped is not None
    one.save(tmp_path / "after")
    before, after = (load_file(tmp_path / name) for name in ("before", "after"))
    assert before.keys() == after.keys()
    assert any(name.startswith("inner/") for name in before)
    assert all(torch.equal(before[name], after[name]) for name in before)
