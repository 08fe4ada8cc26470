"""1-bit Adam, extragradient, and the game that shows what the latter is for."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from shoal.compression.settings import SettingError
from shoal.training import optimizer
from shoal.training.exchange import Arrived
from shoal.training.optimizer import Inner
from shoal.training.run import RunSpec
from shoal.training.task import Place
from shoal.training.tasks.saddle import Saddle
from shoal.training.trainer import Setup, Trainer


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Vectors are tiny: threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def inner(name: str, parameters: list[nn.Parameter], **options: Any) -> Inner:
    named = {str(i): p for i, p in enumerate(parameters)}
    return Inner(optimizer.make(name, options).build(named, frozenset()))


def gradient(step: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(step))


def walk(one: Inner, p: nn.Parameter, steps: range) -> None:
    for step in steps:
        p.grad = gradient(step, *p.shape)
        one.step()


# ---------------------------------------------------------------- 1-bit Adam


def test_the_warm_up_is_adam() -> None:
    ours, theirs = (nn.Parameter(gradient(99, 4, 3)) for _ in range(2))
    walk(inner("one-bit-adam", [ours], lr=0.01, warmup=100, beta2=0.9), ours, range(50))
    adam = torch.optim.Adam([theirs], lr=0.01, betas=(0.9, 0.9))
    for step in range(50):
        theirs.grad = gradient(step, 4, 3)
        adam.step()
    torch.testing.assert_close(ours.data, theirs.data, rtol=1e-5, atol=1e-6)


def test_after_it_a_step_is_linear_in_the_momentum() -> None:
    """By hand: the variance is what Adam's corrected one was at the end of the warm-up."""
    beta1, beta2, lr, warmup = 0.8, 0.9, 0.01, 7
    p = nn.Parameter(gradient(99, 5))
    m, v, x = torch.zeros(5), torch.zeros(5), p.detach().clone()
    frozen = torch.zeros(5)
    walk(inner("one-bit-adam", [p], lr=lr, beta1=beta1, beta2=beta2, warmup=warmup), p, range(20))
    for step in range(20):
        g = gradient(step, 5)
        m = beta1 * m + (1 - beta1) * g
        if step < warmup:
            v = beta2 * v + (1 - beta2) * g * g
            frozen = v / (1 - beta2 ** (step + 1))
        x = x - lr * m / (1 - beta1 ** (step + 1)) / (frozen.sqrt() + 1e-8)
    torch.testing.assert_close(p.data, x, rtol=1e-4, atol=1e-6)


def frozen(one: Inner) -> bool:
    numbers = one.tensors()[1]
    found = {value for name, value in numbers.items() if name.endswith("frozen")}
    assert len(found) == 1
    return bool(found.pop())


def test_all_parameters_freeze_at_once_when_the_warm_up_is_over() -> None:
    parameters = [nn.Parameter(gradient(i, 3)) for i in range(3)]
    one = inner("one-bit-adam", parameters, warmup=5)
    for step in range(6):
        assert frozen(one) is (step >= 5) if step else True
        for i, p in enumerate(parameters):
            p.grad = gradient(10 * step + i, 3)
        one.step()
    variances = {n: t.clone() for n, t in one.tensors()[0].items() if n.endswith("/v")}
    for p in parameters:
        p.grad = torch.full((3,), 1e3)
    one.step()
    assert all(torch.equal(one.tensors()[0][n], t) for n, t in variances.items())


def test_with_settle_a_variance_that_still_moves_is_not_frozen() -> None:
    """1/(1 - 0.9) = 10 steps apart; gradients that grow tenfold, then stay as large."""
    p = nn.Parameter(torch.zeros(4))
    one = inner("one-bit-adam", [p], beta2=0.9, warmup=10, settle=True)
    for step in range(40):
        p.grad = torch.full((4,), 10.0 ** (step / 10))
        one.step()
    assert not frozen(one)
    for _ in range(60):
        p.grad = torch.full((4,), 1e4)
        one.step()
    assert frozen(one)


@pytest.mark.parametrize("before", [3, 8])
def test_its_state_survives_a_checkpoint(before: int) -> None:
    p = nn.Parameter(gradient(99, 4))
    one = inner("one-bit-adam", [p], warmup=5)
    walk(one, p, range(before))
    tensors, numbers = one.tensors()
    tensors = {name: t.clone() for name, t in tensors.items()}
    assert all(isinstance(value, int | float) for value in numbers.values())
    other = nn.Parameter(p.detach().clone())
    again = inner("one-bit-adam", [other], warmup=5)
    again.load(tensors, numbers)
    walk(one, p, range(before, 15))
    walk(again, other, range(before, 15))
    assert torch.equal(p, other)


# ---------------------------------------------------------------- extragradient


def spin(one: Inner, p: nn.Parameter, calls: int) -> None:
    """The game x·y: its field turns (x, y) by a right angle."""
    for _ in range(calls):
        x, y = p.detach()
        p.grad = torch.stack((y, -x))
        one.step()


def test_two_calls_are_one_step_of_the_method() -> None:
    """z ← z - γ·F(z - γ·F(z)) with F = rotation J: (1 - γ²·I - γ·J)·z."""
    p = nn.Parameter(torch.tensor([1.0, 2.0]))
    spin(inner("extragradient", [p], lr=0.1), p, 2)
    expected = 0.99 * torch.tensor([1.0, 2.0]) - 0.1 * torch.tensor([2.0, -1.0])
    torch.testing.assert_close(p.data, expected)


def test_gradient_steps_spiral_out_and_these_in() -> None:
    ends = {}
    for name in ("sgd", "extragradient"):
        p = nn.Parameter(torch.tensor([1.0, 0.0]))
        spin(inner(name, [p], lr=0.2), p, 200)
        ends[name] = float(p.detach().norm())
    assert ends["sgd"] > 10
    assert ends["extragradient"] < 0.2


def test_an_odd_call_is_given_back_at_the_end_of_a_turn() -> None:
    even, odd = (nn.Parameter(torch.tensor([1.0, 2.0])) for _ in range(2))
    one, other = inner("extragradient", [even]), inner("extragradient", [odd])
    spin(one, even, 4)
    spin(other, odd, 5)
    assert not torch.equal(even, odd)
    other.finish()
    assert torch.equal(even, odd)
    other.finish()
    assert torch.equal(even, odd)
    spin(one, even, 2)
    spin(other, odd, 2)
    assert torch.equal(even, odd)


# ---------------------------------------------------------------- the game


def play(name: str, steps: int, turns: int = 25, **task: Any) -> list[float]:
    """Let two trainers play through the ledger; return the measure before and after each turn."""
    run: dict[str, Any] = {
        "task": {"name": "saddle", **task},
        "run": {"name": "saddle", "turns": turns, "seed": 1},
        "local": {"steps": steps, "optimizer": {"name": name, "lr": 0.3}},
        "exchange": {"update": {"kind": "dense", "bits": 8, "decay": 1.0}, "clip": 100},
        "swarm": {"min_peers": 2},
    }
    ticks = itertools.count()
    trainers: list[Trainer] = []
    for i in range(2):
        setup = Setup(
            run=RunSpec.parse(run, allow_task=None),
            peer=bytes([i]) * 32,
            shard=(i, 2),
            threads=1,
        )
        initial = trainers[0].initial_bytes() if trainers else None
        trainers.append(Trainer(setup, initial=initial, clock=lambda: float(next(ticks))))
    path = [trainers[0].evaluate()]
    for turn in range(1, turns + 1):
        updates = []
        for i, one in enumerate(trainers):
            turned = one.turn(turn, 2)
            one.commit(7, turn)
            assert turned.payload is not None
            key = (bytes([i]) * 32, 7, turn)
            updates.append(Arrived(key, turn, turned.kind, turned.payload, len(turned.payload)))
        for one in trainers:
            assert all(outcome.refused is None for outcome in one.apply(updates))
        path.append(trainers[0].evaluate())
    assert trainers[0].fingerprint() == trainers[1].fingerprint()
    return path


def test_sgd_leaves_the_equilibrium_and_extragradient_finds_it() -> None:
    away, towards = play("sgd", 10), play("extragradient", 10)
    assert away[0] == towards[0] > 1
    assert away[-1] > 3 * away[0]
    assert towards[-1] < 0.1 * towards[0]


def test_a_turn_of_an_odd_number_of_steps_learns_what_one_step_fewer_does() -> None:
    assert play("extragradient", 5, turns=4) == play("extragradient", 4, turns=4)


def test_extragradient_bears_noise() -> None:
    assert play("extragradient", 10, noise=0.2)[-1] < 0.3


def test_one_loss_gives_both_players_their_gradients() -> None:
    """∇_x f and -∇_y f, by finite differences of f."""
    game = Saddle(Place(seed=4), size=3, curvature=0.5)
    model = game.model().double()
    game._a, game._x, game._y = game._a.double(), game._x.double(), game._y.double()
    silence = torch.zeros(2, 3, dtype=torch.float64)
    game.loss(model, silence).backward()  # type: ignore[no-untyped-call]
    for name, sign in (("x", 1.0), ("y", -1.0)):
        p = getattr(model, name)
        for i in range(3):
            values = []
            for shift in (1e-6, -1e-6):
                with torch.no_grad():
                    p[i] += shift
                    values.append(float(game.loss(model, silence)))
                    p[i] -= shift
            slope = (values[0] - values[1]) / 2e-6
            assert float(p.grad[i]) == pytest.approx(sign * slope, abs=1e-8)


def test_the_equilibrium_is_where_nobody_wants_to_move() -> None:
    game = Saddle(Place(seed=2), size=5)
    model = game.model()
    with torch.no_grad():
        model.x.copy_(game._x)  # type: ignore[operator, union-attr]
        model.y.copy_(game._y)  # type: ignore[operator, union-attr]
    game.loss(model, torch.zeros(2, 5)).backward()  # type: ignore[no-untyped-call]
    assert all(not p.grad.any() for p in model.parameters() if p.grad is not None)
    assert game.evaluate(model) == 0.0


def test_the_noise_is_this_peers_and_falls_with_the_batch() -> None:
    small, large = (
        next(Saddle(Place(batch=b), noise=1.0).batches(torch.Generator().manual_seed(1)))
        for b in (1, 100)
    )
    torch.testing.assert_close(large * 10, small)


def test_what_makes_no_game_is_refused() -> None:
    with pytest.raises(ValueError, match="size >= 1"):
        Saddle(Place(), size=0)
    with pytest.raises(SettingError, match="leave out"):
        next(Saddle(Place(data="x")).batches(torch.Generator()))
    for name, options in (("one-bit-adam", {"beta2": 1.0}), ("extragradient", {"lr": 0.0})):
        with pytest.raises(SettingError):
            optimizer.make(name, options)


def test_a_checkpoint_between_turns_goes_on_bit_by_bit(tmp_path: Path) -> None:
    for name in ("extragradient", "one-bit-adam"):
        run = {
            "task": {"name": "saddle"},
            "run": {"name": "saddle", "turns": 9, "seed": 1},
            "local": {"steps": 3, "optimizer": {"name": name, "lr": 0.1}},
            "exchange": {"update": {"kind": "dense", "bits": 8}},
        }
        spec = RunSpec.parse(run, allow_task=None)
        setup = Setup(run=spec, peer=bytes(32), shard=(0, 1), threads=1)
        one = Trainer(setup, clock=lambda: 0.0)
        turned = one.turn(1, 1)
        assert turned.payload is not None
        one.commit(7, 1)
        key = (bytes(32), 7, 1)
        one.apply([Arrived(key, 1, turned.kind, turned.payload, len(turned.payload))])
        one.save(tmp_path / "checkpoint")
        again = Trainer(setup, initial=one.initial_bytes(), clock=lambda: 0.0)
        again.load(tmp_path / "checkpoint", own=(7, 1))
        assert again.turn(2, 1).payload == one.turn(2, 1).payload
