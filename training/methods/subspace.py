"""Steps along gradients in a few dimensions: θ = start + P·u, and only u is trained.

Li et al. 2018, arXiv 1804.08838, sec. 2; P is the codec's (`compression/codecs/subspace.py`), the
same in every turn, so that all that is learnt can be sent. The inner optimizer sees u alone: its
state is D numbers too, and goes on from turn to turn although u starts at zero in each.
"""

from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from shoal.compression.codec import Codec
from shoal.training.exchange import Exchange
from shoal.training.lesson import Lesson
from shoal.training.method import Tools
from shoal.training.methods.gradient import Gradient
from shoal.training.optimizer import Inner


@runtime_checkable
class Spanning(Protocol):
    """A codec that sends what lies in one subspace."""

    def dimensions(self, size: int) -> int:
        """Return D for a model of this size."""
        ...

    def spread(self, u_D: Tensor, size: int) -> Tensor:
        """Return P·u, of `size` elements."""
        ...

    def gather(self, x_N: Tensor) -> Tensor:
        """Return Pᵀ·x; raises ValueError if x is not finite."""
        ...


class Subspace(Gradient):
    """First-order training in a subspace."""

    def __init__(self, tools: Tools, inner: Inner, u_D: nn.Parameter) -> None:
        """`inner` is to own `u_D` alone."""
        super().__init__(tools, inner)
        self._u = u_D

    def learn(
        self, exchange: Exchange, codec: Codec, *, turn: int, steps: int, seed: int
    ) -> Lesson:
        """Train from `exchange.start()`; the lesson brings a Δ in the subspace."""
        assert isinstance(codec, Spanning)
        self._codec, self._start = codec, exchange.start()
        with torch.no_grad():
            self._u.zero_()
        lesson = super().learn(exchange, codec, turn=turn, steps=steps, seed=seed)
        del self._start
        return lesson

    def step(self) -> None:
        """Move u by its gradient, and the model with it."""
        with torch.no_grad():
            try:
                self._u.grad = self._codec.gather(self._tools.parameters.gradients())
            except ValueError:  # not finite: the turn is lost, and Δ is to show it
                self._u.fill_(float("nan"))
            self.inner.step()
            self._tools.parameters.write(self._start + self.change(self._start))

    def change(self, start_D: Tensor) -> Tensor:
        """Return P·u."""
        return self._codec.spread(self._u.detach(), len(start_D))
