"""Extragradient: look ahead, then step from where one was along the gradient found there.

    z½ = z - γ·g(z);   z ← z - γ·g(z½)

Source: Korpelevich, "The extragradient method for finding saddle points and other problems", 1976.
On saddle-point problems (games, GANs: the task gives each player's gradient) plain gradient steps
spiral outwards; these converge. An odd call of `step()` looks ahead and remembers z, the even one
after it steps from z, so no closure is needed: two of `local.steps` are one step of the method. A
turn of an odd number of steps gives its last look-ahead back (`finish`), so use an even number.
Nothing is remembered beyond a pair of calls.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from shoal.training.optimizer import check_positive, optimizer


@optimizer("extragradient")
@dataclass(frozen=True, slots=True)
class Extragradient:
    """Two calls a step."""

    lr: float = 0.1

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        check_positive(self, "lr")

    def build(
        self, parameters: Mapping[str, torch.nn.Parameter], matrices: frozenset[str]
    ) -> list[torch.optim.Optimizer]:
        """Put everything under extragradient."""
        return [Korpelevich(parameters.values(), lr=self.lr)]


class Korpelevich(torch.optim.Optimizer):
    """The extragradient method; the point stepped from is kept in the state between two calls."""

    def __init__(self, parameters: Iterable[torch.nn.Parameter], lr: float) -> None:
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Look ahead, or step from the remembered point."""
        if closure is not None:
            raise ValueError("extragradient takes its two gradients in two calls, without closure")
        for p, lr in self._moving():
            point = self.state[p].pop("point", None)
            if point is None:
                self.state[p]["point"] = p.detach().clone()
            else:
                p.copy_(point)
            p.add_(p.grad, alpha=-lr)  # type: ignore[arg-type]

    @torch.no_grad()
    def finish(self) -> None:
        """Go back from a look-ahead that no step followed: it is no part of what was learnt."""
        for memory, p in [(self.state[p], p) for p in list(self.state)]:
            if (point := memory.pop("point", None)) is not None:
                p.copy_(point)

    def _moving(self) -> list[tuple[torch.nn.Parameter, float]]:
        groups: list[dict[str, Any]] = self.param_groups
        return [(p, float(g["lr"])) for g in groups for p in g["params"] if p.grad is not None]
