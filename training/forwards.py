"""Where two losses come from: forward passes at θ ± ε·z, θ = q · integers, nothing else kept.

Neither gradients nor activations, and no copy of the model: weights are converted anew from the
ledger's integers for every pass, since what was perturbed in place cannot be restored exactly.
Gradients are off, but tensors stay ordinary ones (no inference mode): a model that fills a cache in
a forward pass may be trained by gradients in the run's other turns.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from shoal.training.generators import Chance
from shoal.training.parameters import Parameters
from shoal.training.task import Task


class Forwards(Protocol):
    """A model that computes, wherever its weights are."""

    def losses(
        self, integers_D: Tensor, key: int, epsilon: float, batch: Any
    ) -> tuple[float, float]:
        """Return the task's loss of a batch at θ + ε·z(key) and at θ - ε·z(key).

        In eval mode; what the loss draws from torch's generators is the same in both.
        """
        ...

    def at(self, integers_D: Tensor) -> AbstractContextManager[nn.Module]:
        """Lend the model at θ for forward passes, in eval mode and without gradients."""
        ...

    def value(self, tensor: Tensor) -> Tensor:
        """Return what a tensor of the model holds that is not in the ledger."""
        ...


class Resident:
    """All of the model lies on its device."""

    def __init__(
        self, task: Task, model: nn.Module, parameters: Parameters, quantum_bits: int
    ) -> None:
        self._task, self._model = task, model
        self._parameters = parameters
        self._quantum_bits = quantum_bits

    def losses(
        self, integers_D: Tensor, key: int, epsilon: float, batch: Any
    ) -> tuple[float, float]:
        """Return the two losses; the model is left where the second was."""
        self._model.eval()
        chance = Chance(integers_D.device)
        found: list[Any] = []
        for scale in (epsilon, -epsilon):
            self._parameters.write_integers(integers_D, self._quantum_bits, key=key, scale=scale)
            chance.go_on()
            with torch.no_grad():
                found.append(self._task.loss(self._model, batch))
        return as_float(found[0]), as_float(found[1])  # a device computes both before it is asked

    @contextmanager
    def at(self, integers_D: Tensor) -> Iterator[nn.Module]:
        """Write the weights."""
        self._parameters.write_integers(integers_D, self._quantum_bits)
        self._model.eval()
        with torch.no_grad():
            yield self._model

    def value(self, tensor: Tensor) -> Tensor:
        """Return it."""
        return tensor


def as_float(loss: Any) -> float:
    """Return what a task said its loss is, or raise TypeError."""
    if isinstance(loss, Tensor) and loss.numel() != 1:
        raise TypeError(f"loss() returned a tensor of shape {tuple(loss.shape)}, not a scalar")
    return float(loss)
