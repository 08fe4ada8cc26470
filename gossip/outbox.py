"""What one `handle` call asks for: effects in order, pushed records gathered by peer."""

from shoal.gossip.events import Effect, Happened, Send
from shoal.gossip.messages import Message, Push
from shoal.gossip.names import PeerId
from shoal.gossip.records import Record


class Outbox:
    """Collect effects; several records for one peer travel as one `Push`."""

    __slots__ = ("_effects", "_most", "_pushes", "counters")

    def __init__(self, most_records: int) -> None:
        self._effects: list[Effect] = []
        self._pushes: dict[PeerId, dict[bytes, Record]] = {}
        self._most = most_records
        self.counters: dict[str, int] = {}
        """How often what happened, by reason, since the start (bounded: reasons are ours)."""

    def add(self, effect: Effect) -> None:
        """Ask for `effect`."""
        self._effects.append(effect)

    def send(self, peer: PeerId, message: Message) -> None:
        """Say `message` to `peer`."""
        self._effects.append(Send(peer, message))

    def push(self, peer: PeerId, record: Record) -> None:
        """Let `peer` have `record`, together with what else it gets in this call."""
        self._pushes.setdefault(peer, {})[record.id] = record

    def happened(self, what: str, peer: PeerId | None = None, **details: str | int | float) -> None:
        """Tell the operator."""
        self._effects.append(Happened(what, peer, details))

    def count(self, reason: str, times: int = 1) -> None:
        """Count something worth a metric."""
        self.counters[reason] = self.counters.get(reason, 0) + times

    def drain(self) -> list[Effect]:
        """Return everything asked for and start anew."""
        for peer, records in self._pushes.items():
            everything = tuple(records.values())
            for i in range(0, len(everything), self._most):
                self._effects.append(Send(peer, Push(everything[i : i + self._most])))
        self._pushes = {}
        effects, self._effects = self._effects, []
        return effects
