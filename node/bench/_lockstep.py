"""Trainers of one run in one process, turn by turn: what peers exchange, without a network.

Everything that decides what is learnt is the product's own: `Trainer.turn`, payloads, rules,
ledger. Since the ledger is a function of what it holds, one of them takes in all updates and the
others take over its integers: that is what makes thousands of turns of eight peers take minutes.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from shoal.node.errors import ConfigError

if TYPE_CHECKING:
    from shoal.training.turn import Turned


class Lockstep:
    """Peers that take their turns one after the other and then all hold all updates."""

    def __init__(
        self,
        tables: Mapping[str, Any],
        peers: int,
        *,
        data: str | None = None,
        base: str | None = None,
        run_id: bytes = bytes(32),
    ) -> None:
        """Build the run once for each peer; raises ConfigError."""
        from shoal.training.run import RunError, RunSpec
        from shoal.training.trainer import Setup, Trainer

        self.trainers: list[Trainer] = []
        self.turn = 0
        """The last one taken."""
        self.payload = 0
        """Bytes of all payloads so far."""
        try:
            spec = RunSpec.parse(tables)
            initial: bytes | None = None
            for index in range(peers):
                setup = Setup(
                    run=spec,
                    peer=(index + 1).to_bytes(32, "big"),
                    data=data,
                    base=base,
                    shard=(index, peers),
                    run_id=run_id,
                )
                trainer = Trainer(setup, initial=initial, clock=lambda: 0.0)
                initial = initial or trainer.initial_bytes()
                self.trainers.append(trainer)
        except RunError as error:
            raise ConfigError(str(error)) from error

    def take(self) -> "Sequence[Turned]":
        """Take the next turn with every peer and let all hold its updates."""
        self.turn += 1
        turned = []
        for trainer in self.trainers:
            turned.append(trainer.turn(self.turn, len(self.trainers)))
            trainer.commit(0, self.turn)
        self.share([one.payload for one in turned])
        return turned

    def share(self, payloads: Sequence[bytes | None]) -> None:
        """Let all hold these updates of the turn, one of each peer; None: it published nothing."""
        from shoal.training.exchange import Arrived

        first, *others = (trainer.exchange for trainer in self.trainers)
        rules = first.rules
        kind = rules.planes[rules.plane(self.turn)].kind
        updates = [
            Arrived((trainer.exchange.peer, 0, self.turn), self.turn, kind, payload, len(payload))
            for trainer, payload in zip(self.trainers, payloads, strict=True)
            if payload is not None
        ]
        self.payload += sum(update.size for update in updates)
        for outcome in first.apply(updates):
            if outcome.refused is not None:
                raise AssertionError(f"turn {self.turn}: {outcome.refused}")
        for other in others:
            other.integers().copy_(first.integers())
            other.pool = first.pool
