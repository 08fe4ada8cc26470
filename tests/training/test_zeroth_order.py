"""Steps along directions from two losses each: what they measure, and that nothing stays behind."""

import itertools
import math
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import seeds
from support.walks import BITS, PEER, Point, Rig, Valley
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from shoal.compression import perturbation
from shoal.compression.codec import Combination
from shoal.training import parameters
from shoal.training.exchange import Arrived
from shoal.training.lesson import Steps
from shoal.training.method import TrainingError
from shoal.training.parameters import Parameters
from shoal.training.run import RunError, RunSpec
from shoal.training.trainer import Setup, Trainer
from shoal.training.turn import Turned
from shoal.training.walk import WalkSettings

STILL = WalkSettings(lr=0.01, walk=False, reach=1e9)
MOVING = WalkSettings(lr=0.01, walk=True, reach=1e9)
numbers = st.lists(st.floats(-4, 4, width=32), min_size=1, max_size=40)


def sizes(lesson: Any) -> Any:
    assert isinstance(lesson.brought, Steps)
    return lesson.brought.sizes.numpy()


# ---- what is measured


@settings(max_examples=40, deadline=None)
@given(numbers, st.integers(1, 9))
def test_the_slope_of_half_a_square_is_the_direction_times_where_it_is(
    x: list[float], count: int
) -> None:
    """F = ½‖x‖² gives ρ = zᵀx but for the rounding of x ± ε: 2.4e-7 · 4 / ε an element at most."""
    one = Rig(Valley(), Point(x), settings=STILL, perturbations=count)
    lesson = one.learn(turn=3)
    expected = [-0.01 * float(one.signs(3, s) @ np.array(x)) for s in range(count)]
    np.testing.assert_allclose(sizes(lesson), expected, atol=4e-4)
    assert lesson.loss == pytest.approx(0.5 * sum(v * v for v in x) + len(x) * 5e-7, abs=1e-5)
    assert (lesson.steps, lesson.skipped, lesson.problem) == (count, 0, None)


@settings(max_examples=40, deadline=None)
@given(numbers, st.integers(1, 9))
def test_a_walk_goes_on_from_where_the_step_before_it_led(x: list[float], count: int) -> None:
    """By hand, in the integers that the walk is kept in."""
    one = Rig(Valley(), Point(x), settings=MOVING, perturbations=count)
    at = one.exchange.integers().numpy().astype(np.int64)
    found = sizes(one.learn(turn=2))
    for s, step in enumerate(found):
        z = one.signs(2, s)
        np.testing.assert_allclose(step, -0.01 * float(z @ (at / 2**BITS)), atol=4e-4)
        at = at + round(step * 2**BITS) * z


def test_steps_follow_the_schedule_and_are_cut_at_the_reach() -> None:
    one = Rig(
        Valley(),
        Point([1.0, 2.0, 3.0]),
        settings=WalkSettings(lr=0.5, walk=False, reach=3.0),
        turns=10,
        rate=lambda progress: 1 - progress,
        perturbations=16,
    )
    for s, step in enumerate(sizes(one.learn(turn=4))):
        slope = float(one.signs(4, s) @ np.array([1.0, 2.0, 3.0]))
        expected = -0.5 * max(-3.0, min(3.0, slope)) * (1 - (3 + s / 16) / 10)
        assert step == pytest.approx(expected, abs=1e-3)


def test_every_step_has_a_batch_of_its_own_and_the_same_chance_on_both_sides() -> None:
    task = Valley(noise=True)
    one = Rig(task, Point([1.0, 2.0, 3.0]), settings=STILL, perturbations=7)
    noisy = sizes(one.learn(seed=5))
    assert (task.batches_drawn, task.losses) == (7, 14)
    calm = sizes(Rig(Valley(), Point([1.0, 2.0, 3.0]), settings=STILL, perturbations=7).learn())
    np.testing.assert_allclose(noisy, calm, atol=1e-9)


def test_all_chance_comes_from_the_seed_and_torchs_own_is_left_alone() -> None:
    def found(seed: int) -> tuple[float, list[float]]:
        one = Rig(Valley(noise=True), Point([1.0, 2.0, 3.0]), perturbations=4)
        lesson = one.learn(seed=seed)
        return lesson.loss, sizes(lesson).tolist()

    torch.manual_seed(1)
    before = torch.get_rng_state()
    assert found(3) == found(3)
    assert found(3)[0] != found(4)[0]
    assert torch.equal(torch.get_rng_state(), before)


def test_fewer_steps_than_an_update_may_hold_and_never_more() -> None:
    one = Rig(Valley(), Point([1.0, 2.0]), perturbations=6)
    assert len(sizes(one.learn(steps=2))) == 2
    assert len(sizes(one.learn(steps=60))) == 6


def test_frozen_parameters_stay_and_others_are_perturbed_alone() -> None:
    class Half(Valley):
        def loss(self, model: nn.Module, batch: Any) -> Tensor:
            assert torch.equal(model.parts[1].detach(), torch.tensor([5.0, 6.0]))  # type: ignore[index]
            assert not model.training
            assert not torch.is_grad_enabled()
            return super().loss(model, batch)

    model = Point([1.0, 2.0], [5.0, 6.0], [3.0])
    model.parts[1].requires_grad_(False)
    one = Rig(Half(), model, settings=STILL, perturbations=4)
    x = np.array([1.0, 2.0, 3.0])
    expected = [-0.01 * float(one.signs(1, s) @ x) for s in range(4)]
    np.testing.assert_allclose(sizes(one.learn()), expected, atol=4e-4)


# ---- nothing stays behind


class Fails(Valley):
    """Raises at the given loss."""

    def __init__(self, at: int, error: BaseException) -> None:
        super().__init__()
        self.at, self.error = at, error

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        if self.losses == self.at:
            raise self.error
        return super().loss(model, batch)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=30),
    st.integers(0, 20),
    st.sampled_from([None, KeyError("labels"), KeyboardInterrupt(), StopIteration()]),
)
def test_the_ledger_is_as_before_bit_for_bit_whatever_happens(
    values: list[int], at: int, error: BaseException | None
) -> None:
    """Also where the walk wraps around."""
    task = Valley() if error is None else Fails(at, error)
    big = WalkSettings(lr=30.0, reach=1e9)
    one = Rig(task, Point([1.0] * len(values)), settings=big, perturbations=9)
    ints = one.exchange.integers()
    ints.copy_(torch.tensor(values, dtype=torch.int32))
    before, lanes = ints.clone(), one.exchange.recompute()
    raised = None
    try:
        one.learn()
    except BaseException as caught:
        raised = caught
    assert raised is (error if at < 18 else None)
    assert torch.equal(ints, before)
    assert one.exchange.recompute() == lanes


def test_a_step_beyond_int32_is_cut_in_the_walk_and_no_error() -> None:
    one = Rig(Valley(), Point([60.0] * 9), settings=WalkSettings(lr=1e9, reach=1e9))
    before = one.exchange.integers().clone()
    one.learn()
    assert torch.equal(one.exchange.integers(), before)


class Largest(TorchDispatchMode):
    """Remembers the largest tensor that is made."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        given = {x.untyped_storage().data_ptr() for x in args if isinstance(x, Tensor)}
        if isinstance(made, Tensor) and made.untyped_storage().data_ptr() not in given:
            self.elements = max(self.elements, made.numel())
        return made


def test_no_tensor_of_the_models_size_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (parameters, perturbation):
        monkeypatch.setattr(module, "_SLAB", 1 << 8)

    class Flat(Valley):
        def loss(self, model: nn.Module, batch: Any) -> Tensor:
            return sum((p[:9].sum() for p in model.parameters()), torch.zeros(()))

    size = 1 << 11
    one = Rig(Flat(), Point(torch.zeros(size), torch.ones(size)), perturbations=2)
    with Largest() as watched:
        one.learn()
    assert 1 << 8 <= watched.elements < 1 << 10


def test_a_model_whose_buffers_change_is_refused_or_set_back() -> None:
    class Counts(Valley):
        def loss(self, model: nn.Module, batch: Any) -> Tensor:
            model.count += 1.0  # type: ignore[operator]
            return super().loss(model, batch)

    def model() -> Point:
        made = Point([1.0, 2.0])
        made.register_buffer("count", torch.zeros(()))
        return made

    with pytest.raises(TrainingError, match=r"buffers count, .* run\.buffers = 'local'"):
        Rig(Counts(), model()).learn()
    one = Rig(Counts(), model(), buffers="local", perturbations=3)
    assert one.learn().problem is None
    assert float(one.model.count) == 0


# ---- losses that are not finite


class Holes(Valley):
    """NaN or infinite where the test says so."""

    def __init__(self, holes: dict[int, float]) -> None:
        super().__init__()
        self.holes = holes

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        height = super().loss(model, batch)
        return torch.tensor(self.holes.get(self.losses - 1, float(height)))


@given(st.dictionaries(st.integers(0, 11), st.sampled_from([math.nan, math.inf, -math.inf])))
@settings(max_examples=40, deadline=None)
def test_a_step_without_a_finite_loss_is_skipped_and_counted(holes: dict[int, float]) -> None:
    one = Rig(Holes(holes), Point([1.0, 2.0, 3.0]), settings=STILL, perturbations=6)
    lesson = one.learn()
    bad = {loss // 2 for loss in holes}
    assert [bool(np.isnan(step)) for step in sizes(lesson)] == [s in bad for s in range(6)]
    assert lesson.skipped == len(bad)
    assert (lesson.problem is not None) == (len(bad) == 6)
    if len(bad) < 6:
        assert lesson.loss == pytest.approx(7.0, abs=1e-4)
        payload = one.exchange.publish_steps(lesson.brought, 1.0, turn=1, key=0)
        said = np.frombuffer(payload, np.int8)
        assert all((said[s] == 0) for s in bad)


def test_a_skipped_step_does_not_move_the_walk() -> None:
    x = [1.0, 2.0, 3.0]
    walked = sizes(Rig(Holes({0: math.nan}), Point(x), settings=MOVING, perturbations=2).learn())
    one = Rig(Valley(), Point(x), settings=STILL, perturbations=2)
    assert walked[1] == pytest.approx(sizes(one.learn())[1], abs=2e-5)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 10**5), st.integers(1, 6))
def test_steps_are_shortened_until_the_clip_lets_them_count(most: int, count: int) -> None:
    """100 quanta each, by three tenths at a time: what is left is 70 % of what may be, or more."""
    one = Rig(Valley(), Point([1.0, 2.0, 3.0]), exponent=0, perturbations=8)
    rules = replace(one.exchange.rules, clip=Fraction(1), initial_squares=3 * most)
    one.exchange.rules = rules
    steps = Steps(torch.arange(count), torch.full((count,), 100 * 2.0**-BITS).double())
    payload = one.exchange.publish_steps(steps, 1.0, turn=1, key=7)
    found = rules.judge(1, "scalar", len(payload), payload, author=PEER)
    assert isinstance(found, Combination)
    said = found.coefficients.tolist()
    assert sum(a * a for a in said) <= most
    assert min(said) >= math.floor(min(100, 0.7 * (math.sqrt(most / count) - 1)))


# ---- weights from integers


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_weights_are_the_integers_times_q_plus_the_perturbation(data: st.DataObject) -> None:
    shape = st.lists(st.integers(0, 7), min_size=0, max_size=3).map(tuple)
    shapes = data.draw(st.lists(shape, min_size=1, max_size=6))
    types = [
        data.draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]))
        for _ in shapes
    ]
    count = sum(math.prod(shape) for shape in shapes)
    start, key = data.draw(st.integers(0, 200)), data.draw(st.integers(0, 2**64 - 1))
    scale = data.draw(st.sampled_from([0.0, 1e-3, -1e-3, 0.7]))
    slab = data.draw(st.integers(1, 50))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    values = rng.integers(-(2**31), 2**31, count, dtype=np.int64)
    tensors = [
        torch.full(shape, math.nan, dtype=kind) for shape, kind in zip(shapes, types, strict=True)
    ]
    turned = [t.transpose(0, -1).contiguous().transpose(0, -1) if t.ndim else t for t in tensors]
    ints = torch.from_numpy(values).to(torch.int32)
    before, parameters._SLAB = parameters._SLAB, slab
    try:
        parameters.write_integers(turned, ints, 20, start=start, key=key, scale=scale)
    finally:
        parameters._SLAB = before
    expected = values.astype(np.float32) * np.float32(2.0**-20)
    if scale:
        expected += np.float32(scale) * seeds.signs(key, count, start).astype(np.float32)
    at = 0
    for tensor, shape in zip(turned, shapes, strict=True):
        part = torch.from_numpy(expected[at : at + math.prod(shape)]).reshape(shape)
        assert torch.equal(tensor, part.to(tensor.dtype))
        at += math.prod(shape)


def test_a_model_written_from_integers_is_the_ledgers() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2, bias=False))
    one = Parameters(model)
    ints = torch.randint(-(2**31), 2**31, (one.layout.size,)).to(torch.int32)
    one.write_integers(ints, 24)
    assert torch.equal(one.read(), ints.to(torch.float32) * 2.0**-24)


# ---- in a run

RUN: dict[str, Any] = {
    "run": {"name": "digits", "seed": 1, "turns": 20},
    "task": {"name": "digits", "width": 16},
    "local": {"batch": 64, "steps": 1},
    "exchange": {"update": {"kind": "scalar", "perturbations": 8}},
    "swarm": {"min_peers": 2},
}


def trainer(index: int = 0, run: dict[str, Any] = RUN, **setup: Any) -> Trainer:
    ticks = itertools.count()
    allowed = setup.get("allow_task")
    spec = RunSpec.parse(run, allow_task=allowed)
    setup = {"shard": (index, 2), "threads": 1, "run_id": b"r" * 32, **setup}
    made = Setup(run=spec, peer=bytes([index]) * 32, **setup)
    return Trainer(made, clock=lambda: float(next(ticks)))


def changed(**tables: dict[str, Any]) -> dict[str, Any]:
    return {name: {**RUN.get(name, {}), **tables.get(name, {})} for name in {*RUN, *tables}}


def arrived(index: int, turn: int, turned: Turned) -> Arrived:
    assert turned.payload is not None
    key = (bytes([index]) * 32, 7, turn)
    return Arrived(key, turn, turned.kind, turned.payload, len(turned.payload))


def take(one: Trainer, index: int, turn: int) -> Arrived:
    update = arrived(index, turn, one.turn(turn, 2))
    one.commit(7, turn)
    one.apply([update])
    return update


@pytest.mark.parametrize(
    "update",
    [
        {},
        {"directions": "common"},
        {"directions": "pool", "pool": 64},
        {"directions": "pool", "pool": 64, "sampling": "pro", "unbiased": True},
        {"walk": False},
    ],
    ids=lambda update: "-".join(map(str, update.values())) or "own",
)
def test_two_peers_learn_in_a_byte_a_step_and_end_equal(update: dict[str, Any]) -> None:
    whole = {"kind": "scalar", "perturbations": 16, "lr": 0.04, **update}
    run = changed(exchange={"update": whole})
    peers = [trainer(i, run) for i in range(2)]
    before = peers[0].evaluate()
    log = []
    for turn in range(1, 21):
        made = [arrived(i, turn, one.turn(turn, 2)) for i, one in enumerate(peers)]
        for one in peers:
            one.commit(7, turn)
            assert all(outcome.refused is None for outcome in one.apply(made))
        log += made
    assert len({one.exchange.snapshot() for one in peers}) == 1
    assert peers[0].recompute() == peers[0].fingerprint()
    named = 6 * 16 // 8 if update.get("sampling") == "pro" else 0
    assert {update.size for update in log} == {16 + named}
    # Processors round differently, and the walks part: 0.2 to 0.45 more was seen.
    assert peers[0].evaluate() > before + 0.1
    late = trainer(0, run)
    late.apply(log[::-1])
    assert late.fingerprint() == peers[0].fingerprint()


def test_a_turn_leaves_the_shared_model_until_it_is_applied() -> None:
    one = trainer()
    before = one.fingerprint()
    one.turn(1, 2)
    assert one.fingerprint() == before == one.recompute()


@pytest.mark.parametrize("sampling", ["uniform", "pro"])
def test_a_saved_peer_goes_on_bit_for_bit(tmp_path: Path, sampling: str) -> None:
    update = {"kind": "scalar", "directions": "pool", "pool": 16, "sampling": sampling}
    run = changed(exchange={"update": update})
    one = trainer(run=run)
    for turn in range(1, 6):
        take(one, 0, turn)
    one.save(tmp_path / "state")
    other = trainer(run=run)
    assert other.load(tmp_path / "state", own=(7, 5)).kept
    for turn in (6, 7, 8):
        assert take(one, 0, turn) == take(other, 0, turn)
    assert one.fingerprint() == other.fingerprint() == other.recompute()


def test_there_are_as_many_steps_as_an_update_may_say() -> None:
    for steps in (0, 3, 30):
        assert trainer(run=changed(local={"steps": steps})).turn(1, 2).steps == 8


def test_planes_keep_their_own_time() -> None:
    update = [{"kind": "dense", "every": 2}, {"kind": "scalar", "perturbations": 8}]
    local = {"steps": 0, "turn_seconds": 3.0, "min_steps": 2, "max_steps": 40}
    one = trainer(run=changed(local=local, exchange={"update": update}))
    assert [one.turn(t, 2).steps for t in (1, 2, 3, 4)] == [8, 2, 8, 6]


def test_a_plane_of_scalars_between_gradients_leaves_what_those_remember() -> None:
    update = [{"kind": "dense", "every": 2}, {"kind": "scalar", "perturbations": 8}]
    one = trainer(run=changed(exchange={"update": update}))
    take(one, 0, 1)
    assert one.exchange.feedback.residual is None
    take(one, 0, 2)
    residual = one.exchange.feedback.residual
    assert residual is not None
    kept = residual.clone()
    take(one, 0, 3)
    assert one.exchange.feedback.residual is not None
    assert torch.equal(one.exchange.feedback.residual, kept)


@pytest.mark.parametrize("kind", ["scalar", "sparse"])
def test_a_turn_seeds_no_device_that_it_does_not_use(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes as long as some passes of a small model."""
    one = trainer(run=changed(exchange={"update": {"kind": kind}}))

    def everywhere(seed: int) -> None:
        raise AssertionError

    monkeypatch.setattr(torch, "manual_seed", everywhere)
    assert one.turn(1, 2).payload is not None


def test_training_alone_walks_the_same_way() -> None:
    update = {"kind": "scalar", "perturbations": 16, "lr": 0.02}
    one = trainer(run=changed(swarm={"min_peers": 1}, exchange={"update": update}), shard=(0, 1))
    before, untrained = one.fingerprint(), one.evaluate()
    assert one.alone(320) > untrained + 0.05
    assert one.fingerprint() == before == one.recompute()


# ---- turns that publish nothing


def test_who_is_not_drawn_takes_no_step_that_nobody_would_hold(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    one, other = trainer(), trainer()
    asked = []
    losses = one._forwards.losses
    monkeypatch.setattr(one._forwards, "losses", lambda *a: asked.append(1) or losses(*a))
    before, chance = one.fingerprint(), torch.get_rng_state()
    for turn in (1, 2, 3, 4):
        turned = one.turn(turn, 2, publish=False)
        assert (turned.payload, turned.steps, turned.dropped) == (None, 0, None)
        assert math.isnan(turned.loss)
        assert math.isfinite(turned.evaluation), "the run measures before each turn"
    assert asked == []
    assert one.exchange.drift is None
    assert one.fingerprint() == before == one.recompute()
    assert torch.equal(torch.get_rng_state(), chance)
    assert one.turn(5, 2).payload == other.turn(5, 2).payload
    assert len(asked) == 8


def test_the_fewer_are_drawn_the_farther_they_step() -> None:
    """What the two of eight say in a turn of their own weighs as much as the word of all eight."""
    peers = [
        trainer(run=changed(exchange={"participation": share}, swarm={"min_peers": 8}))
        for share in (1.0, 0.25)
    ]
    all_of_them, some = peers
    assert all_of_them.turn(1, 8).payload == some.turn(1, 8).payload
    exponents = [one.exchange.rules.planes[0].fragments[0].codec.exponent for one in peers]
    assert exponents[1] == exponents[0] + 2 > 2


def test_gradients_go_on_in_a_turn_that_publishes_nothing_and_scalars_beside_them_do_not() -> None:
    update = [{"kind": "dense", "every": 2}, {"kind": "scalar", "perturbations": 8}]
    one = trainer(run=changed(local={"steps": 3}, exchange={"update": update}))
    assert [one.turn(t, 2, publish=False).steps for t in (1, 2, 3)] == [0, 3, 0]
    assert one.exchange.drift is not None


def test_lag_is_that_of_turns_that_were_taken_by_peers_that_are_drawn() -> None:
    """At 0.5 an equal peer takes two of the others' turns for one, and skips one of its own."""
    stale = {"staleness": {"curve": "polynomial", "a": 1.0}, "participation": 0.5}
    run = changed(exchange={**RUN["exchange"], **stale})

    def said(lags: list[float]) -> bytes | None:
        one = trainer(run=run)
        for turn, lag in enumerate(lags, 1):
            turned = one.turn(turn, 2, lag=lag, publish=turn != 2)
            one.discard()
        return turned.payload

    at_weight = trainer(run=run).turn(3, 2).payload, trainer(run=run).turn(3, 4).payload
    assert at_weight[0] != at_weight[1]
    assert said([0, 1, 0]) == at_weight[0]
    assert said([0, 3, 0]) == at_weight[1], "a peer at half of the speed"


# ---- what can be wrong with a task

TASK = '''
"""A loss that knows no gradient."""
import torch


class Counts:
    def __init__(self, place): pass
    def model(self): return torch.nn.Linear(3, 1, bias=False)
    def batches(self, generator):
        while True:
            yield torch.randn(20, 3, generator=generator)
    def loss(self, model, batch):
        return int((model(batch).sign() != batch[:, :1].sign()).sum()) / len(batch)


class Vector(Counts):
    def loss(self, model, batch): return model(batch)


class Empty(Counts):
    def batches(self, generator): return iter(())


class Broken(Counts):
    def loss(self, model, batch): raise KeyError("labels")


class Text(Counts):
    def loss(self, model, batch): return "low"


class Nan(Counts):
    def loss(self, model, batch): return float("nan")
'''


@pytest.fixture
def user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    name = f"gradientless_{abs(hash(str(tmp_path)))}"
    (tmp_path / f"{name}.py").write_text(TASK)
    monkeypatch.syspath_prepend(str(tmp_path))

    def make(factory: str) -> Trainer:
        task = f"{name}:{factory}"
        update = {"kind": "scalar", "perturbations": 16, "lr": 0.1, "epsilon": 0.3}
        run = {**changed(exchange={"update": update}), "task": {"name": task}}
        return trainer(run=run, allow_task=task)

    return make


def test_a_task_needs_no_gradient(user: Any) -> None:
    one = user("Counts")
    one.founding()
    first = take(one, 0, 1)
    assert first.size == 16
    losses = []
    for turn in range(2, 30):
        turned = one.turn(turn, 1)
        losses.append(turned.loss)
        one.commit(7, turn)
        one.apply([arrived(0, turn, turned)])
    assert sum(losses[-5:]) < sum(losses[:5])


@pytest.mark.parametrize(
    ("factory", "answer"),
    [
        ("Vector", "a tensor of shape .20, 1., not a scalar"),
        ("Empty", "yields nothing"),
        ("Broken", "KeyError: 'labels'"),
        ("Text", "ValueError: could not convert"),
    ],
)
def test_no_run_is_founded_in_vain(user: Any, factory: str, answer: str) -> None:
    with pytest.raises(RunError, match=answer):
        user(factory).founding()


def test_three_turns_without_a_finite_loss_stop_the_training(user: Any) -> None:
    one = user("Nan")
    for turn in (1, 2):
        turned = one.turn(turn, 2)
        assert turned.payload is None
        assert turned.skipped == 16
        assert "nan along every direction" in turned.dropped
    with pytest.raises(TrainingError, match=r"lower exchange\.update\.lr"):
        one.turn(3, 2)
