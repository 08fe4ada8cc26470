"""Training u in θ = start + P·u: what a step is, what is remembered, and runs that do it."""

import itertools
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from support import seeds
from support.walks import BITS, PEER, RUN, Point, Valley
from torch import Tensor, nn

from shoal.compression import codec
from shoal.training import ledger, optimizer
from shoal.training.exchange import Arrived
from shoal.training.exchanges.ledger import LedgerExchange
from shoal.training.feedback import FeedbackSettings
from shoal.training.method import Tools
from shoal.training.methods.subspace import Subspace
from shoal.training.optimizer import Inner
from shoal.training.parameters import Parameters
from shoal.training.rules import Fragment, Plane, Rules
from shoal.training.run import RunError, RunSpec
from shoal.training.trainer import Setup, Trainer

X = np.linspace(-3, 3, 40).astype(np.float32)
D = 7


def matrix(size: int, dimensions: int) -> NDArray[np.float64]:
    """Return P, by the specification."""
    words = seeds.words(seeds.key(RUN, seeds.COMMON, 0, 0, domain=3), size)
    P = np.zeros((size, dimensions))
    P[np.arange(size), seeds.below(words, dimensions)] = 1 - 2 * (words & np.uint64(1)).astype(int)
    return P


class Rig:
    """A method in the valley ½‖x‖², and the ledger it starts from."""

    def __init__(self, task: Any = None, **options: Any) -> None:
        model = Point(X[:15], X[15:])
        self.parameters = Parameters(model)
        part = codec.make("subspace", {"dimension": D})
        rules = Rules(
            (Plane("subspace", (Fragment(0, len(X), part),)),),
            turns=0,
            clip=Fraction(10**9),
            initial_squares=1 << 60,
            run=RUN,
        )
        initial_D = ledger.from_floats(torch.from_numpy(X), BITS)
        self.exchange = LedgerExchange(
            initial_D, rules, [FeedbackSettings()], quantum_bits=BITS, peer=PEER
        )
        u_D = nn.Parameter(torch.zeros(D))
        self.inner = Inner(optimizer.make("sgd", options).build({"u": u_D}, frozenset()))
        ticks = itertools.count()
        tools = Tools(
            task=task or Valley(),
            model=model,
            parameters=self.parameters,
            rate=lambda progress: 1.0,
            turns=0,
            clock=lambda: float(next(ticks)),
            buffers="refuse",
        )
        self.method = Subspace(tools, self.inner, u_D)

    def learn(self, turn: int = 1, steps: int = 1) -> Any:
        bound = self.exchange.rules.codec(turn, PEER)
        return self.method.learn(self.exchange, bound, turn=turn, steps=steps, seed=0)


def test_a_step_is_the_gradients_share_of_the_subspace() -> None:
    """∇½‖x‖² = x, so Δ = -lr · P Pᵀ x."""
    P = matrix(len(X), D)
    lesson = Rig(lr=0.05).learn()
    np.testing.assert_allclose(lesson.brought.numpy(), -0.05 * P @ (P.T @ X), rtol=1e-5, atol=1e-6)
    assert lesson.loss == pytest.approx(0.5 * float((X**2).sum()), rel=1e-5)


def test_steps_go_on_in_the_subspace_and_the_optimizer_from_turn_to_turn() -> None:
    """Momentum by hand, in seven dimensions; u begins at zero in each turn."""
    P, one = matrix(len(X), D), Rig(lr=0.01, momentum=0.9)
    m = np.zeros(D)
    for turn in (1, 2):
        u = np.zeros(D)
        for _ in range(5):
            m = 0.9 * m + P.T @ (X + P @ u)
            u = u - 0.01 * m
        lesson = one.learn(turn, steps=5)
        np.testing.assert_allclose(lesson.brought.numpy(), P @ u, rtol=1e-4, atol=1e-5)
        one.exchange.publish(lesson.brought, 1.0, turn=turn, key=0)
        one.exchange.commit(1, turn)
    state = one.inner.tensors()[0]
    assert [t.numel() for t in state.values()] == [D]


def test_what_is_sent_is_all_that_was_learnt() -> None:
    """But for the rounding of D numbers to 8 bits."""
    one = Rig(lr=0.05)
    lesson = one.learn(steps=3)
    payload = one.exchange.publish(lesson.brought, 1.0, turn=1, key=0)
    update = Arrived((PEER, 1, 1), 1, "subspace", payload, len(payload))
    before = one.exchange.model()
    assert one.exchange.apply([update])[0].refused is None
    moved = one.exchange.model() - before
    assert float((moved - lesson.brought).norm()) < 0.01 * float(lesson.brought.norm())


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_turn_that_is_not_finite_is_a_problem_and_forgotten(where: str) -> None:
    class Bad(Valley):
        def loss(self, model: nn.Module, batch: Any) -> Tensor:
            height = super().loss(model, batch)
            if self.losses != 3:
                return height
            if where == "loss":
                return height * float("nan")
            return height + (height - height.detach()).sqrt()  # finite, with an infinite slope

    one = Rig(Bad(), lr=0.01, momentum=0.9)
    one.learn(steps=1)
    before = repr(one.inner.remember())
    lesson = one.learn(turn=2, steps=2)
    assert lesson.problem
    one.method.forget()
    assert repr(one.inner.remember()) == before
    assert one.learn(turn=3, steps=2).problem is None


RUN_FILE: dict[str, Any] = {
    "run": {"name": "digits", "seed": 1, "turns": 10},
    "task": {"name": "digits", "width": 24},
    "local": {"optimizer": {"name": "adamw", "lr": 0.02}, "batch": 32, "steps": 8},
    "exchange": {"update": {"kind": "subspace", "dimension": 300}},
    "swarm": {"min_peers": 2},
}


def trainer(index: int = 0, **exchange: Any) -> Trainer:
    run = {**RUN_FILE, "exchange": {**RUN_FILE["exchange"], **exchange}}
    ticks = itertools.count()
    setup = Setup(
        run=RunSpec.parse(run),
        peer=bytes([index]) * 32,
        shard=(index, 2),
        threads=1,
        run_id=RUN,
    )
    return Trainer(setup, clock=lambda: float(next(ticks)))


def take(one: Trainer, index: int, turn: int) -> Arrived:
    turned = one.turn(turn, 2)
    assert turned.payload is not None
    one.commit(7, turn)
    key = (bytes([index]) * 32, 7, turn)
    return Arrived(key, turn, turned.kind, turned.payload, len(turned.payload))


def test_peers_learn_in_few_dimensions_and_a_restart_goes_on(tmp_path: Path) -> None:
    peers = [trainer(i) for i in range(2)]
    peers[0].founding()
    initial = peers[0].exchange.model()
    for turn in range(1, 11):
        if turn == 8:
            peers[0].save(tmp_path / "state")
            other = trainer(0)
            assert other.load(tmp_path / "state", own=(7, 7)).kept
            peers[0] = other
            expected = peers[1]
        made = [take(one, i, turn) for i, one in enumerate(peers)]
        assert max(update.size for update in made) <= 300 + 20
        for one in peers:
            one.apply(made)
    assert peers[0].fingerprint() == expected.fingerprint()
    assert peers[0].evaluate() > 0.8
    moved = (peers[0].exchange.model() - initial).numpy()
    P = matrix(len(moved), 300)
    inside = P @ (P.T @ moved / np.maximum(1, (P**2).sum(0)))
    np.testing.assert_allclose(inside, moved, atol=1e-6)


def test_a_restart_takes_the_same_turn(tmp_path: Path) -> None:
    one = trainer()
    for turn in (1, 2):
        one.apply([take(one, 0, turn)])
    one.save(tmp_path / "state")
    other = trainer()
    other.load(tmp_path / "state", own=(7, 2))
    assert take(one, 0, 3) == take(other, 0, 3)


def test_a_subspace_is_of_the_whole_model() -> None:
    with pytest.raises(RunError, match="leave fragments out"):
        trainer(fragments=2)


def test_two_planes_keep_optimizers_of_their_own() -> None:
    update = [{"kind": "dense", "every": 3}, {"kind": "subspace", "dimension": 50}]
    one = trainer(update=update)
    for turn in range(1, 7):
        one.apply([take(one, 0, turn)])
    numbers = {
        place: sum(t.numel() for name, t in inner.tensors()[0].items() if name.endswith("exp_avg"))
        for place, inner in one._inners.items()
    }
    assert sorted(numbers.values()) == [50, one.parameters]
