"""Exchange by ledger: the shared model is the exact sum of everybody's updates (design 3)."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from shoal.compression import perturbation, seeded
from shoal.compression.codec import Codec, Combination, Contribution, Directed
from shoal.training.exchange import Arrived, Outcome
from shoal.training.feedback import SHRINKS, Feedback, FeedbackSettings
from shoal.training.fingerprint import Lanes
from shoal.training.ledger import Key, Ledger
from shoal.training.lesson import Steps
from shoal.training.payloads import Payloads
from shoal.training.pool import Pool, seeds
from shoal.training.rules import RuleError, Rules
from shoal.training.turn_rule import TurnRule
from shoal.training.turn_rules.sum import Sum
from shoal.training.walk import WalkSettings


class LedgerExchange:
    """The ledger tensor, the rules of the run, and this author's memory."""

    def __init__(
        self,
        initial_D: Tensor,
        rules: Rules,
        authors: Sequence[FeedbackSettings | WalkSettings],
        *,
        quantum_bits: int,
        turn_rule: TurnRule | None = None,
        peer: bytes = bytes(32),
        directory: Path | None = None,
    ) -> None:
        """Start from a model without updates.

        `turn_rule` is `sum` if nothing else is said; what others must look at again is kept in
        `directory`.
        """
        self.ledger = Ledger(initial_D, turn_rule or Sum(), self._recall)
        self._payloads = Payloads(directory)
        self.rules = rules
        self.feedback = Feedback(authors, rules, quantum_bits=quantum_bits)
        self.peer = peer
        """Whose updates `publish` returns."""
        self.owner: tuple[int, int] | None = None
        """Log and number of the update that residual and momentum belong to."""
        self.quantum_bits = quantum_bits
        codecs = [part.codec for plane in rules.planes for part in plane.fragments]
        self.pool = Pool(max(map(seeds, codecs)))
        """Of the seeds that all directions are from, where the run has such."""
        self._only_pool = self.ledger.rule.alone and all(map(seeds, codecs))
        self.drift: Tensor | None = None
        """What was learnt here and is in no update yet: of fragments whose turn it was not, and of
        turns for which this peer was not drawn. Local steps go on from shared model + drift."""
        self._pending_drift: Tensor | None = None

    def chances(self, codec: Directed) -> Tensor | None:
        """Return the weights of the pool's seeds if the codec names what it draws, else None."""
        if getattr(codec, "sampling", "") != "pro":
            return None
        return self.pool.weights(seeds(codec))

    def model(self) -> Tensor:
        """Return q · integers."""
        return self.ledger.floats(self.quantum_bits)

    def integers(self) -> Tensor:
        """Return the ledger's tensor itself."""
        return self.ledger.model

    def start(self) -> Tensor:
        """Return q · integers + drift."""
        return self.model() if self.drift is None else self.model().add_(self.drift)

    def publish(self, delta_D: Tensor, weight: float, *, turn: int, key: int) -> bytes:
        """Return the payload of the residual after this turn; the ledger does not change."""
        if self.drift is not None:
            delta_D = self.drift + delta_D
        codec = self.rules.codec(turn, self.peer)
        encoded = self.feedback.publish(delta_D, weight, turn=turn, key=key, codec=codec)
        part = self.rules.fragment(turn)
        self._pending_drift = None
        if part.size < self.rules.size:
            self._pending_drift = delta_D.clone()
            self._pending_drift[part.range] = 0
        return encoded.payload

    def publish_steps(self, steps: Steps, weight: float, *, turn: int, key: int) -> bytes:
        """Return the payload of these steps, made smaller until they keep the rules of the run.

        Nothing is kept of what rounding changes: its mean is zero. What was learnt here before and
        is in no update yet waits for a turn of another kind.
        """
        codec = self.rules.codec(turn, self.peer)
        assert isinstance(codec, Directed)
        self._pending_drift = self.drift
        scaled_S = steps.sizes * (weight * 2.0**self.quantum_bits)
        for _ in range(SHRINKS):
            encoded = codec.say(self.ledger.size, steps.directions, scaled_S, key=key)
            try:
                self.rules.judge_values(encoded.decoded)
            except RuleError:
                scaled_S = scaled_S * 0.7
            else:
                return encoded.payload
        raise RuleError("the update cannot be made small enough for exchange.clip; raise it")

    def carry(self, delta_D: Tensor) -> None:
        """Add to the drift; it lives on from turn to turn until its fragment is published."""
        self.drift = delta_D if self.drift is None else self.drift + delta_D

    def keep(self, brought: Tensor | Steps, codec: Codec) -> None:
        """Go on from what a turn brought as if nobody else were there: the model is ours alone."""
        if isinstance(brought, Tensor):
            self.carry(brought)
            return
        assert isinstance(codec, Directed)
        keys = [codec.key(direction) for direction in brought.directions.tolist()]
        quanta_S = (brought.sizes.nan_to_num() * 2.0**self.quantum_bits).round().to(torch.int64)
        perturbation.accumulate(self.ledger.model, keys, quanta_S)
        if seeds(codec):
            self.pool.change(brought.directions, quanta_S, 1)

    def commit(self, log: int, number: int) -> None:
        """Let residual, momentum and drift belong to this update."""
        self.feedback.commit()
        self.drift, self._pending_drift = self._pending_drift, None
        self.owner = (log, number)

    def discard(self) -> None:
        """Let residual, momentum and drift be as before the turn."""
        self.feedback.discard()
        self._pending_drift = None

    def apply(self, updates: Sequence[Arrived]) -> list[Outcome]:
        """Add updates: each by itself, under a turn rule those of a turn at once."""
        if self.ledger.rule.alone:
            return self._each(updates, 1)
        return self._by_turn(updates, 1)

    def subtract(self, updates: Sequence[Arrived]) -> list[Outcome]:
        """Subtract updates, in the same way."""
        if self.ledger.rule.alone:
            return self._each(updates, -1)
        return self._by_turn(updates, -1)

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
        """Set the integers: under a turn rule to those of a model without updates.

        A run's pool is as without updates, too; whoever restores others sets it afterwards.
        """
        self.ledger.restore(data)
        self._payloads.clear()
        self.pool.clear()

    def sums(self) -> bytes | None:
        """Return what the run added to the initial model as 4 bytes a seed of its pool.

        None when the model is more than that: another kind of update, or a turn rule.
        """
        return self.pool.to_bytes() if self._only_pool else None

    def rebuild(self, initial: bytes, sums: bytes) -> None:
        """Set the model to the initial one and `sums` of another peer; of no use with turn rules.

        How large the steps along each seed were is not known then. Raises ValueError for lengths
        that are not the run's, and where the model is more than that, and changes nothing.
        """
        if not self._only_pool:
            raise ValueError("this run is more than sums along the seeds of a pool")
        pool = Pool(self.pool.size)
        pool.from_bytes(sums)
        self.restore(initial)
        keys_K = seeded.pool(self.rules.run, pool.size)
        perturbation.accumulate(self.ledger.model, keys_K, pool.sums)
        self.restore(self.snapshot())
        self.pool = pool

    def memory(self) -> dict[str, Tensor]:
        """Return the author's memory by name, for a checkpoint."""
        named = {
            "residual": self.feedback.residual,
            "momentum": self.feedback.momentum,
            "drift": self.drift,
        }
        return {name: value for name, value in named.items() if value is not None}

    def take_back(self, owner: tuple[int, int] | None, memory: Mapping[str, Tensor]) -> None:
        """Set the author's memory as a checkpoint held it."""
        device = self.ledger.model.device
        held = {name: value.to(device) for name, value in memory.items()}
        self.feedback.reset()
        self.feedback.residual = held.get("residual")
        self.feedback.momentum = held.get("momentum")
        self.drift, self._pending_drift = held.get("drift"), None
        self.owner = owner

    def _each(self, updates: Sequence[Arrived], sign: int) -> list[Outcome]:
        """Change by one after the other, but by those that are steps along directions at once."""
        outcomes: dict[int, Outcome] = {}
        steps: dict[int, Combination] = {}
        change = self.ledger.add if sign > 0 else self.ledger.subtract
        for place, update in enumerate(updates):
            try:
                decoded = self._judged(update)
            except RuleError as error:
                outcomes[place] = Outcome(update.key, (0, 0), str(error))
                continue
            self._tell_pool(decoded, sign)
            if isinstance(decoded, Combination):
                steps[place] = decoded
            else:
                lanes = change(update.key, update.turn, decoded)
                outcomes[place] = Outcome(update.key, lanes, None)
        many = self.ledger.add_many(list(steps.values()), sign)
        for place, lanes in zip(steps, many, strict=True):
            outcomes[place] = Outcome(updates[place].key, lanes, None)
        return [outcomes[place] for place in range(len(updates))]

    def _by_turn(self, updates: Sequence[Arrived], sign: int) -> list[Outcome]:
        """Change turn after turn; what a turn changes stands with the last of its updates."""
        outcomes: dict[int, Outcome] = {}
        for turn, group in _turns(updates):
            good: dict[int, Contribution] = {}
            for place in group:
                update = updates[place]
                try:
                    good[place] = self._judged(update)
                except RuleError as error:
                    outcomes[place] = Outcome(update.key, (0, 0), str(error))
                else:
                    outcomes[place] = Outcome(update.key, (0, 0), None)
                    self._tell_pool(good[place], sign)
            delta = self._change(turn, {updates[i].key: one for i, one in good.items()}, sign)
            if good:
                last = max(good)
                outcomes[last] = Outcome(updates[last].key, delta, None)
                if sign > 0:
                    self._keep(updates[place] for place in good)
        return [outcomes[place] for place in range(len(updates))]

    def _change(self, turn: int, updates: Mapping[Key, Contribution], sign: int) -> Lanes:
        if sign > 0:
            return self.ledger.take_in(turn, updates)
        return self.ledger.take_out(turn, updates)

    def _tell_pool(self, update: Contribution, sign: int) -> None:
        if isinstance(update, Combination) and update.directions is not None:
            self.pool.change(update.directions, update.coefficients, sign)

    def _keep(self, updates: Iterable[Arrived]) -> None:
        """Let the ledger look again at what it does not keep itself."""
        for update in updates:
            if self.ledger.recalls(update.turn, update.key):
                self._payloads.keep(update)

    def _recall(self, key: Key) -> Contribution:
        return self._judged(self._payloads.recall(key))

    def _judged(self, update: Arrived) -> Contribution:
        return self.rules.judge(
            update.turn,
            update.kind,
            update.size,
            update.payload,
            self.ledger.model.device,
            author=update.key[0],
        )


def _turns(updates: Sequence[Arrived]) -> Iterable[tuple[int, list[int]]]:
    """Return turns, as they come first, with the places of their updates."""
    places: dict[int, list[int]] = {}
    for place, update in enumerate(updates):
        places.setdefault(update.turn, []).append(place)
    return places.items()
