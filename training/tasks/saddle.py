"""A game of two players with a known equilibrium: min over x, max over y, of a bilinear function.

    f(x, y) = (x - x*)ᵀ A (y - y*) + μ/2·‖x - x*‖² - μ/2·‖y - y*‖²

A is square with singular values between 1/2 and 1, the equilibrium (x*, y*) Gaussian; both follow
from the run's seed. One loss gives both players' gradients: y goes through a gradient reversal
(Ganin and Lempitsky, 2015), so descending on it is (∇_x f, -∇_y f). Plain gradient steps spiral
outwards when μ is small; extragradient converges (Korpelevich, 1976), which is what this task is
for. A batch is noise on the two gradients, of standard deviation `noise`/√batch.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from shoal.compression.settings import SettingError
from shoal.training.task import Place, task


class Players(nn.Module):
    """Both players' vectors, [size] each; they start at Gaussian values."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.randn(size))
        self.y = nn.Parameter(torch.randn(size))


class _Reverse(torch.autograd.Function):
    """The identity whose gradient has the other sign."""

    @staticmethod
    def forward(ctx: Any, y: Tensor) -> Tensor:
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return -gradient


@task("saddle")
class Saddle:
    """Find the equilibrium; the measure is the distance to it, about 1.4 at the start."""

    unit = "distance to the equilibrium"

    def __init__(
        self, place: Place, *, size: int = 16, curvature: float = 0.0, noise: float = 0.0
    ) -> None:
        """`size`: of each player; `curvature`: μ, which damps the spiral; `noise`: see above."""
        if size < 1 or curvature < 0 or noise < 0:
            raise ValueError("use size >= 1, curvature >= 0 and noise >= 0")
        self._place = place
        self._size, self._curvature, self._noise = size, curvature, noise
        chance = torch.Generator().manual_seed(place.seed)
        left, right = (
            torch.linalg.qr(torch.randn(size, size, generator=chance, dtype=torch.float64)).Q
            for _ in range(2)
        )
        strengths = 0.5 + 0.5 * torch.rand(size, generator=chance, dtype=torch.float64)
        self._a = ((left * strengths) @ right).float()
        self._x, self._y = torch.randn(2, size, generator=chance)

    def model(self) -> nn.Module:
        """Return both players."""
        return Players(self._size)

    def batches(self, generator: torch.Generator) -> Iterator[Tensor]:
        """Yield the noise on both gradients, [2, size]."""
        if self._place.data is not None:
            raise SettingError(f"task saddle has no data: leave out {self._place.data}")
        scale = self._noise / self._place.batch**0.5
        while True:
            yield scale * torch.randn(2, self._size, generator=generator)

    def loss(self, model: nn.Module, batch: Tensor) -> Tensor:
        """Return f, whose gradient is x's own and y's reversed."""
        assert isinstance(model, Players)
        device = model.x.device
        x = model.x - self._x.to(device)
        reversed_y: Tensor = _Reverse.apply(model.y)  # type: ignore[no-untyped-call]
        y = reversed_y - self._y.to(device)
        noise_2S = batch.to(device)
        value = x @ self._a.to(device) @ y + noise_2S[0] @ x + noise_2S[1] @ y
        loss: Tensor = value + self._curvature / 2 * (x.square().sum() - y.square().sum())
        return loss

    @torch.no_grad()
    def evaluate(self, model: nn.Module, *, thorough: bool = False) -> float:
        """Return the root mean square of (x, y) - (x*, y*)."""
        assert isinstance(model, Players)
        here = torch.cat((model.x, model.y)).cpu()
        there = torch.cat((self._x, self._y))
        return float((here - there).square().mean().sqrt())
