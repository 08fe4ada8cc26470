"""The inner optimizer: its contract, its registry, and the state it keeps between turns.

Adding an optimizer is adding one file to `optimizers/`: a frozen dataclass whose fields are its
options, under `@optimizer("name")`, with a `build` that returns torch optimizers.
"""

import copy
import importlib
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from shoal.compression.settings import build, fill, unknown


class InnerOptimizer(Protocol):
    """Options that can make torch optimizers."""

    def build(
        self, parameters: Mapping[str, torch.nn.Parameter], matrices: frozenset[str]
    ) -> Sequence[torch.optim.Optimizer]:
        """Return optimizers that together own each parameter once.

        `matrices` names the two-dimensional weights inside the model: neither embeddings nor head.
        """
        ...


C = TypeVar("C", bound=type)
_optimizers: dict[str, Callable[..., InnerOptimizer]] = {}


def optimizer(name: str) -> Callable[[C], C]:
    """Register a frozen dataclass as the optimizer `name`."""

    def register(cls: C) -> C:
        _optimizers[name] = cls
        return cls

    return register


def names() -> list[str]:
    """Return the names of all optimizers."""
    _scan()
    return sorted(_optimizers)


def filled(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return all options of optimizer `name`, or raise SettingError."""
    _scan()
    if name not in _optimizers:
        raise unknown("local.optimizer.name", name, _optimizers)
    values = fill(_optimizers[name], options, where="local.optimizer")
    build(_optimizers[name], values, where="local.optimizer")
    return values


def make(name: str, options: Mapping[str, Any]) -> InnerOptimizer:
    """Return the optimizer `name` with these options, or raise SettingError."""
    values = filled(name, options)
    return build(_optimizers[name], values, where="local.optimizer")


def check_positive(part: object, *fields: str) -> None:
    """Refuse learning rates and the like that are not above zero."""
    for field in fields:
        if not getattr(part, field) > 0:
            raise ValueError(f"{field} = {getattr(part, field)} must be above 0")


def inner_matrices(model: torch.nn.Module) -> frozenset[str]:
    """Return the names of the matrices inside: all but embeddings, head and what is tied to them.

    The head is the last linear layer in order of registration. A task that knows better says so
    with `matrices(model)`.
    """
    linear = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
    outer = {id(p) for m in linear[-1:] for p in m.parameters()}
    for module in model.modules():
        if isinstance(module, torch.nn.Embedding):
            outer.add(id(module.weight))
    named = model.named_parameters()
    return frozenset(name for name, p in named if p.ndim == 2 and id(p) not in outer)


class Inner:
    """The torch optimizers of one peer; their state persists from turn to turn."""

    def __init__(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        self._optimizers = optimizers
        self._rates = [[float(g["lr"]) for g in o.param_groups] for o in optimizers]

    def scale(self, factor: float) -> None:
        """Set every learning rate to `factor` times the one in the run file."""
        for one, rates in zip(self._optimizers, self._rates, strict=True):
            for group, rate in zip(one.param_groups, rates, strict=True):
                group["lr"] = rate * factor

    def step(self) -> None:
        """Take one step and clear the gradients."""
        for one in self._optimizers:
            one.step()
            one.zero_grad(set_to_none=True)

    def finish(self) -> None:
        """End a turn: an optimizer that has left the model at a point on trial takes it back."""
        for one in self._optimizers:
            if (finish := getattr(one, "finish", None)) is not None:
                finish()

    def clear(self) -> None:
        """Clear the gradients."""
        for one in self._optimizers:
            one.zero_grad(set_to_none=True)

    def remember(self) -> list[dict[str, Any]]:
        """Return a copy of all state."""
        return [copy.deepcopy(one.state_dict()) for one in self._optimizers]

    def restore(self, state: Sequence[dict[str, Any]]) -> None:
        """Go back to a remembered state."""
        for one, saved in zip(self._optimizers, state, strict=True):
            one.load_state_dict(saved)

    def tensors(self) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Return the state of every parameter as named tensors and named numbers, for a file."""
        tensors: dict[str, Tensor] = {}
        numbers: dict[str, float] = {}
        for i, one in enumerate(self._optimizers):
            for j, entries in one.state_dict()["state"].items():
                for key, value in entries.items():
                    if isinstance(value, Tensor):
                        tensors[f"{i}/{j}/{key}"] = value
                    elif value is not None:
                        numbers[f"{i}/{j}/{key}"] = value
        return tensors, numbers

    def load(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, float]) -> None:
        """Inverse of `tensors`."""
        states: list[dict[int, dict[str, Any]]] = [{} for _ in self._optimizers]
        for name, value in (*tensors.items(), *numbers.items()):
            i, j, key = name.split("/", 2)
            states[int(i)].setdefault(int(j), {})[key] = value
        for one, state in zip(self._optimizers, states, strict=True):
            one.load_state_dict({**one.state_dict(), "state": state})


def _scan() -> None:
    package = importlib.import_module("shoal.training.optimizers")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{module.name}")
