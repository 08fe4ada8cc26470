"""Exchange by ledger: the shared model is the exact sum of everybody's updates (design 3)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from shoal.training.exchange import Arrived, Outcome
from shoal.training.feedback import Feedback, FeedbackSettings
from shoal.training.fingerprint import Lanes
from shoal.training.ledger import Ledger
from shoal.training.rules import TURN_RULES, RuleError, Rules


class LedgerExchange:
    """The ledger tensor, the rules of the run, and this author's memory."""

    def __init__(
        self,
        initial_D: Tensor,
        rules: Rules,
        feedback: FeedbackSettings,
        *,
        quantum_bits: int,
        turn_rule: str = "sum",
    ) -> None:
        self.ledger = Ledger(initial_D, TURN_RULES[turn_rule]())
        self.rules = rules
        self.feedback = Feedback(feedback, rules, quantum_bits=quantum_bits)
        self.owner: tuple[int, int] | None = None
        """Log and number of the update that residual and momentum belong to."""
        self._quantum_bits = quantum_bits

    def model(self) -> Tensor:
        """Return q · integers."""
        return self.ledger.floats(self._quantum_bits)

    def publish(self, delta_D: Tensor, weight: float, *, key: int) -> bytes:
        """Return the payload of the residual after this turn; the ledger does not change."""
        return self.feedback.publish(delta_D, weight, key=key).payload

    def commit(self, log: int, number: int) -> None:
        """Let residual and momentum belong to this update."""
        self.feedback.commit()
        self.owner = (log, number)

    def discard(self) -> None:
        """Let residual and momentum be as before the turn."""
        self.feedback.discard()

    def apply(self, updates: Sequence[Arrived]) -> list[Outcome]:
        """Add updates, one after the other."""
        return [self._one(update, 1) for update in updates]

    def subtract(self, updates: Sequence[Arrived]) -> list[Outcome]:
        """Subtract updates, one after the other."""
        return [self._one(update, -1) for update in updates]

    def fingerprint(self) -> Lanes:
        """Return the running fingerprint."""
        return self.ledger.fingerprint()

    def recompute(self) -> Lanes:
        """Return the fingerprint of the tensor."""
        return self.ledger.recompute()

    def snapshot(self) -> bytes:
        """Return the integers."""
        return self.ledger.to_bytes()

    def restore(self, data: bytes) -> None:
        """Set the integers."""
        self.ledger.restore(data)

    def take_back(
        self, owner: tuple[int, int] | None, residual: Tensor | None, momentum: Tensor | None
    ) -> None:
        """Set the author's memory as a checkpoint held it."""
        device = self.ledger.model.device
        self.feedback.reset()
        self.feedback.residual = None if residual is None else residual.to(device)
        self.feedback.momentum = None if momentum is None else momentum.to(device)
        self.owner = owner

    def _one(self, update: Arrived, sign: int) -> Outcome:
        device: torch.device = self.ledger.model.device
        try:
            decoded = self.rules.judge(
                update.turn, update.kind, update.size, update.payload, device
            )
        except RuleError as error:
            return Outcome(update.key, (0, 0), str(error))
        change = self.ledger.add if sign > 0 else self.ledger.subtract
        return Outcome(update.key, change(update.key, update.turn, decoded), None)
