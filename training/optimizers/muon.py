"""Muon for the matrices inside the model, AdamW for embeddings, head, biases and norms."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from shoal.training.optimizer import check_positive, optimizer


@optimizer("muon")
@dataclass(frozen=True, slots=True)
class Muon:
    """torch.optim.Muon (momentum orthogonalised by Newton-Schulz) beside torch.optim.AdamW."""

    lr: float = 0.02
    """Of the matrices."""
    adamw_lr: float = 3e-3
    """Of everything else."""
    momentum: float = 0.95
    weight_decay: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.99

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        check_positive(self, "lr", "adamw_lr")

    def build(
        self, parameters: Mapping[str, torch.nn.Parameter], matrices: frozenset[str]
    ) -> list[torch.optim.Optimizer]:
        """Split the parameters between the two."""
        inside = [p for name, p in parameters.items() if name in matrices]
        others = [p for name, p in parameters.items() if name not in matrices]
        built: list[torch.optim.Optimizer] = []
        if inside:
            built.append(
                torch.optim.Muon(
                    inside, lr=self.lr, momentum=self.momentum, weight_decay=self.weight_decay
                )
            )
        if others:
            built.append(
                torch.optim.AdamW(
                    others,
                    lr=self.adamw_lr,
                    betas=(self.beta1, self.beta2),
                    weight_decay=self.weight_decay,
                )
            )
        return built
