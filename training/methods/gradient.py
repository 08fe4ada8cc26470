"""Steps along gradients, by the inner optimizer: θ ← q·model + drift → H steps → Δ = θ_end - θ."""

import math
from typing import Any

import torch
from torch import Tensor

from shoal.compression.codec import Codec
from shoal.training import generators, parameters
from shoal.training.exchange import Exchange
from shoal.training.lesson import Lesson
from shoal.training.method import Tools, TrainingError, drawn
from shoal.training.optimizer import Inner


class Gradient:
    """First-order training; the inner optimizer's state lives from turn to turn."""

    remedy = "lower local.optimizer.lr"
    carries = True

    def __init__(self, tools: Tools, inner: Inner) -> None:
        self.inner = inner
        self._tools = tools
        self._before: list[dict[str, Any]] = []

    def learn(
        self, exchange: Exchange, codec: Codec, *, turn: int, steps: int, seed: int
    ) -> Lesson:
        """Train from `exchange.start()`; the lesson brings Δ, or a problem."""
        start_D = exchange.start()
        self._tools.parameters.write(start_D)
        self._before = self.inner.remember()
        return self.walk(start_D, turn, steps, seed)

    def forget(self) -> None:
        """Restore the inner optimizer."""
        self.inner.restore(self._before)

    def walk(self, start_D: Tensor, turn: int, steps: int, seed: int) -> Lesson:
        """Take the local steps of a turn from the model as it is, which is `start_D`."""
        tools, device = self._tools, start_D.device
        batches = tools.task.batches(torch.Generator().manual_seed(seed))
        buffers = parameters.floating_buffers(tools.model)
        losses, problem, started = [], None, tools.clock()
        tools.model.train()
        self.inner.clear()
        with generators.seeded(seed, device):
            for step in range(steps):
                self.inner.scale(tools.factor(turn - 1 + step / steps))
                loss = tools.task.loss(tools.model, drawn(batches))
                losses.append(loss.detach())
                loss.backward()  # type: ignore[no-untyped-call]
                self.step()
        self.inner.finish()
        mean = float(torch.stack(losses).mean())
        seconds = tools.clock() - started
        delta_D = self.change(start_D)
        if tools.buffers == "refuse" and (
            changed := parameters.changed_buffers(tools.model, buffers)
        ):
            raise TrainingError(parameters.buffers_refused(changed))
        if not math.isfinite(mean):
            problem = f"the loss became {mean} in turn {turn}"
        elif not bool(torch.isfinite(delta_D).all()):
            problem = f"the model left the finite numbers in turn {turn}"
        if problem:
            parameters.restore_buffers(tools.model, buffers)
        return Lesson(delta_D, mean, steps, seconds, problem)

    def step(self) -> None:
        """Move the model by the gradients that it has, and clear them."""
        self.inner.step()

    def change(self, start_D: Tensor) -> Tensor:
        """Return by how much the model moved."""
        return self._tools.parameters.read() - start_D
