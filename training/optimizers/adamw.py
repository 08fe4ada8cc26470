"""AdamW."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from shoal.training.optimizer import check_positive, optimizer


@optimizer("adamw")
@dataclass(frozen=True, slots=True)
class AdamW:
    """torch.optim.AdamW."""

    lr: float = 3e-3
    beta1: float = 0.9
    beta2: float = 0.99
    weight_decay: float = 0.01

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        check_positive(self, "lr")

    def build(
        self, parameters: Mapping[str, torch.nn.Parameter], matrices: frozenset[str]
    ) -> list[torch.optim.Optimizer]:
        """Put everything under AdamW."""
        return [
            torch.optim.AdamW(
                parameters.values(),
                lr=self.lr,
                betas=(self.beta1, self.beta2),
                weight_decay=self.weight_decay,
            )
        ]
