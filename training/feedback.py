"""What an author keeps between turns: the residual of its updates and its outer momentum.

With Δ = θ_end - θ_start of a turn (the direction to add), weight w, and everything linear (design
3.2), so that the sum over peers is the outer Nesterov step of their mean:

    m ← μ·m + Δ;   step = η·(Δ + μ·m)
    e ← β·e + step;   u = encode(w·e);   e ← e - decode(u)/w
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shoal.compression.codec import Codec, Encoded, subtract
from shoal.training.rules import Fragment, RuleError, Rules
from shoal.training.walk import WalkSettings

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

    def __init__(
        self,
        settings: Sequence[FeedbackSettings | WalkSettings],
        rules: Rules,
        *,
        quantum_bits: int,
    ) -> None:
        """Take the settings of each plane of the run; what is not sent yet is of them all."""
        self._settings = settings
        self._rules = rules
        self._quanta = 2.0**quantum_bits
        self.residual: Tensor | None = None
        self.momentum: Tensor | None = None
        self._pending: tuple[Fragment, Tensor | None, Tensor | None] | None = None

    def publish(
        self,
        delta_D: Tensor,
        weight: float,
        *,
        turn: int = 1,
        key: int = 0,
        codec: Codec | None = None,
    ) -> Encoded:
        """Return the update of a turn; `commit` or `discard` decides about the memory it leaves.

        `delta_D` is the whole model's; only the fragment whose turn it is goes into the update and
        changes the memory. `codec` is the fragment's, bound to this author and turn.
        Raises RuleError when no shrunken form of the update keeps the rules, or it is not finite.
        """
        part = self._rules.fragment(turn)
        mine = self._settings[self._rules.plane(turn)]
        assert isinstance(mine, FeedbackSettings)
        mu, eta, beta = mine.momentum, mine.outer_lr, mine.decay
        delta_F = delta_D[part.range]
        e_F, m_F = eta * delta_F, None
        if mu:
            m_F = delta_F.clone()
            if self.momentum is not None:
                m_F.add_(self.momentum[part.range], alpha=mu)
            e_F.add_(m_F, alpha=eta * mu)
        if self.residual is not None and beta:
            e_F.add_(self.residual[part.range], alpha=beta)
        # In units of q and back in place: a copy would be one more tensor of the model's size.
        scale = weight * self._quanta
        encoded, shrunk = self._encode(codec or part.codec, e_F.mul_(scale), key)
        left_F = None
        if beta:
            subtract(e_F if shrunk == 1 else e_F.mul_(1 / shrunk), encoded.decoded, 1.0)
            left_F = e_F.mul_(1 / scale)
        self._pending = (part, left_F, m_F)
        return encoded

    def commit(self) -> None:
        """Keep the pending turn's memory: its update was published."""
        if self._pending is None:
            return
        part, e_F, m_F = self._pending
        if e_F is not None:
            self.residual = self._kept(self.residual, part, e_F)
        if m_F is not None:
            self.momentum = self._kept(self.momentum, part, m_F)
        self._pending = None

    def discard(self) -> None:
        """Forget the pending turn: nobody will ever see its update."""
        self._pending = None

    def reset(self) -> None:
        """Start from zero, as after a restart whose memory belongs to another update."""
        self.residual = self.momentum = self._pending = None

    def _kept(self, whole_D: Tensor | None, part: Fragment, part_F: Tensor) -> Tensor:
        if part.size == self._rules.size:
            return part_F
        if whole_D is None:
            whole_D = part_F.new_zeros(self._rules.size)
        whole_D[part.range] = part_F
        return whole_D

    def _encode(self, codec: Codec, x_F: Tensor, key: int) -> tuple[Encoded, float]:
        """Return the update and by how much `x_F` had to be shrunk, in place, to keep the rules."""
        shrunk = 1.0
        for _ in range(SHRINKS):
            try:
                encoded = codec.encode(x_F, key=key)
                self._rules.judge_values(encoded.decoded)
            except RuleError:
                x_F.mul_(0.7)
                shrunk *= 0.7
            except ValueError as error:
                if bool(torch.isfinite(x_F).all()):
                    raise
                raise RuleError("the update is not finite in units of q") from error
            else:
                return encoded, shrunk
        raise RuleError("the update cannot be made small enough for exchange.clip; raise it")
