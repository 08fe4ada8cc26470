"""What an author keeps between turns: the residual of its updates and its outer momentum.

With Δ = θ_end - θ_start of a turn (the direction to add), weight w, and everything linear (design
3.2), so that the sum over peers is the outer Nesterov step of their mean:

    m ← μ·m + Δ;   step = η·(Δ + μ·m)
    e ← β·e + step;   u = encode(w·e);   e ← e - decode(u)/w
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from shoal.compression.codec import Encoded
from shoal.training.rules import RuleError, Rules

SHRINKS = 64
"""How often an update that breaks a rule is made smaller before the turn is given up."""


@dataclass(frozen=True, slots=True)
class FeedbackSettings:
    """The author's side of `exchange.update`."""

    momentum: float = 0.0
    """μ: outer momentum (DiLoCo); 0.6-0.9 for dense updates."""
    outer_lr: float = 1.0
    """η: how far the swarm follows a turn."""
    decay: float = 0.95
    """β: how much of the residual lives on to the next turn."""

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum = {self.momentum}; use one in [0, 1)")
        if not self.outer_lr > 0:
            raise ValueError(f"outer_lr = {self.outer_lr} must be above 0")
        if not 0 <= self.decay <= 1:
            raise ValueError(f"decay = {self.decay}; use one in [0, 1]")


class Feedback:
    """Residual and momentum of one author, with one pending turn at most."""

    def __init__(self, settings: FeedbackSettings, rules: Rules, *, quantum_bits: int) -> None:
        self.settings = settings
        self._rules = rules
        self._quanta = 2.0**quantum_bits
        self.residual: Tensor | None = None
        self.momentum: Tensor | None = None
        self._pending: tuple[Tensor, Tensor | None] | None = None

    def publish(self, delta_D: Tensor, weight: float, *, key: int = 0) -> Encoded:
        """Return the update of a turn; `commit` or `discard` decides about the memory it leaves.

        Raises RuleError when no shrunken form of the update keeps the rules of the run.
        """
        mu, eta, beta = self.settings.momentum, self.settings.outer_lr, self.settings.decay
        step_D, m_D = eta * delta_D, None
        if mu:
            m_D = delta_D.clone() if self.momentum is None else mu * self.momentum + delta_D
            step_D = eta * (delta_D + mu * m_D)
        e_D = step_D if self.residual is None else beta * self.residual + step_D
        encoded = self._encode(e_D * (weight * self._quanta), key)
        sent = encoded.decoded
        e_D = e_D.clone()
        values = sent.values.to(torch.float32) / (weight * self._quanta)
        if sent.indices is None:
            e_D -= values
        else:
            e_D[sent.indices] -= values
        self._pending = (e_D, m_D)
        return encoded

    def commit(self) -> None:
        """Keep the pending turn's memory: its update was published."""
        if self._pending is not None:
            self.residual, self.momentum = self._pending
        self._pending = None

    def discard(self) -> None:
        """Forget the pending turn: nobody will ever see its update."""
        self._pending = None

    def reset(self) -> None:
        """Start from zero, as after a restart whose memory belongs to another update."""
        self.residual = self.momentum = self._pending = None

    def _encode(self, x_D: Tensor, key: int) -> Encoded:
        for _ in range(SHRINKS):
            encoded = self._rules.codec.encode(x_D, key=key)
            try:
                self._rules.judge_values(encoded.decoded)
            except RuleError:
                x_D = x_D * 0.7
            else:
                return encoded
        raise RuleError("the update cannot be made small enough for exchange.clip; raise it")
