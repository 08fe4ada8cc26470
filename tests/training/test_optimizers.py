"""Inner optimizers: who gets which parameter, schedules, and state that is kept."""

import pytest
import torch
from torch import nn

from shoal.training import optimizer
from shoal.training.optimizer import Inner
from shoal.training.schedule import SCHEDULES
from shoal.training.task import Place
from shoal.training.tasks.text import Text


def perceptron() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 16), nn.Linear(16, 4))


def inner(name: str, model: nn.Module) -> Inner:
    named = dict(model.named_parameters())
    return Inner(optimizer.make(name, {}).build(named, optimizer.inner_matrices(model)))


def step(model: nn.Module, one: Inner, seed: int) -> None:
    x = torch.randn(32, 8, generator=torch.Generator().manual_seed(seed))
    model(x).square().mean().backward()
    one.step()


def test_muon_takes_the_matrices_inside_and_adamw_the_rest() -> None:
    made = Text(Place())
    model = made.model()
    named = dict(model.named_parameters())
    built = optimizer.make("muon", {}).build(named, frozenset(made.matrices(model)))
    assert [type(b) for b in built] == [torch.optim.Muon, torch.optim.AdamW]
    owned = [{id(p) for g in b.param_groups for p in g["params"]} for b in built]
    names = [{n for n, p in named.items() if id(p) in ids} for ids in owned]
    assert names[0] == {n for n, p in named.items() if "blocks." in n and p.ndim == 2}
    assert "embedding.weight" in names[1]
    assert names[0] | names[1] == set(named)
    assert not names[0] & names[1]


def test_without_a_hint_embeddings_and_head_are_not_matrices_inside() -> None:
    model = nn.ModuleDict(
        {"emb": nn.Embedding(5, 4), "mid": nn.Linear(4, 4), "head": nn.Linear(4, 5)}
    )
    assert optimizer.inner_matrices(model) == {"mid.weight"}


@pytest.mark.parametrize("name", optimizer.names())
def test_every_parameter_is_owned_once_and_moves(name: str) -> None:
    model = perceptron()
    before = [p.detach().clone() for p in model.parameters()]
    one = inner(name, model)
    for seed in range(3):
        step(model, one, seed)
    after = list(model.parameters())
    assert all(not torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("name", optimizer.names())
def test_a_restored_optimizer_goes_on_as_if_nothing_had_been(name: str) -> None:
    model = perceptron()
    one = inner(name, model)
    step(model, one, 0)
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    remembered, filed = one.remember(), one.tensors()
    filed = ({k: v.clone() for k, v in filed[0].items()}, filed[1])
    ends = []
    step(model, one, 1)
    ends.append([p.detach().clone() for p in model.parameters()])
    model.load_state_dict(weights)
    one.restore(remembered)
    step(model, one, 1)
    ends.append([p.detach().clone() for p in model.parameters()])
    model.load_state_dict(weights)
    fresh = inner(name, model)
    fresh.load(*filed)
    step(model, fresh, 1)
    ends.append([p.detach().clone() for p in model.parameters()])
    for end in ends[1:]:
        assert all(torch.equal(a, b) for a, b in zip(ends[0], end, strict=True))


@pytest.mark.parametrize("name", optimizer.names())
def test_a_factor_of_zero_stands_still_and_one_is_the_run_files_rate(name: str) -> None:
    model = perceptron()
    one = inner(name, model)
    before = [p.detach().clone() for p in model.parameters()]
    one.scale(0.0)
    step(model, one, 0)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    one.scale(1.0)
    step(model, one, 0)
    assert not all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_schedules_start_at_one_and_fall_as_they_say() -> None:
    assert [SCHEDULES["constant"](p) for p in (0, 0.5, 1)] == [1, 1, 1]
    assert [round(SCHEDULES["wsd"](p), 9) for p in (0, 0.8, 0.9, 1, 1.5)] == [1, 1, 0.5, 0, 0]
    assert [round(SCHEDULES["cosine"](p), 9) for p in (0, 0.5, 1, 2)] == [1, 0.5, 0, 0]
