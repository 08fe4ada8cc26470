"""Stochastic gradient descent with optional momentum."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from shoal.training.optimizer import check_positive, optimizer


@optimizer("sgd")
@dataclass(frozen=True, slots=True)
class Sgd:
    """torch.optim.SGD."""

    lr: float = 0.1
    momentum: float = 0.0
    nesterov: bool = False
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        check_positive(self, "lr")
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov = true needs momentum above 0")

    def build(
        self, parameters: Mapping[str, torch.nn.Parameter], matrices: frozenset[str]
    ) -> list[torch.optim.Optimizer]:
        """Put everything under SGD."""
        return [
            torch.optim.SGD(
                parameters.values(),
                lr=self.lr,
                momentum=self.momentum,
                nesterov=self.nesterov,
                weight_decay=self.weight_decay,
            )
        ]
