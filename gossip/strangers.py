"""Records of peers we never met, kept until we know how they were admitted. Bounded in all ways."""

from dataclasses import dataclass, field

from shoal.gossip.limits import Limits
from shoal.gossip.names import PeerId
from shoal.gossip.records import Record

ASK_AGAIN = 2.0
"""Seconds until an admission is asked for again."""
SHARE = 8
"""One sender may fill this part of the room, so that a liar does not keep out what others say."""
BYTES = 4 << 20


@dataclass(slots=True)
class Stranger:
    """One of them: who told us what, and when we last asked how it was admitted."""

    records: list[tuple[PeerId, Record]] = field(default_factory=list)
    asked: float = float("-inf")


@dataclass(slots=True)
class Strangers:
    """What waits, the first come first to go when there is no room."""

    limits: Limits
    peers: dict[PeerId, Stranger] = field(default_factory=dict)
    held: int = 0
    size: int = 0
    _by_sender: dict[PeerId, int] = field(default_factory=dict)

    def __contains__(self, peer: PeerId) -> bool:
        return peer in self.peers

    def hold(self, subject: PeerId, sender: PeerId, record: Record) -> bool:
        """Keep a record; say whether there was room."""
        share = self._by_sender.get(sender, 0)
        if share >= max(1, self.limits.held_records // SHARE):
            return False
        stranger = self.peers.get(subject)
        if stranger is None:
            stranger = self.peers[subject] = Stranger()
        if any(record.id == other.id for _, other in stranger.records):
            return True
        stranger.records.append((sender, record))
        self._count(sender, +1, len(record.raw))
        while self.held > self.limits.held_records or self.size > BYTES:
            self.take(next(iter(self.peers)))
        return subject in self.peers

    def ask(self, subject: PeerId, now: float) -> bool:
        """Say whether it is time to ask how `subject` was admitted."""
        stranger = self.peers[subject]
        if now - stranger.asked < ASK_AGAIN:
            return False
        stranger.asked = now
        return True

    def take(self, subject: PeerId) -> list[tuple[PeerId, Record]]:
        """Hand over what was kept about `subject`, and forget it."""
        stranger = self.peers.pop(subject, None)
        if stranger is None:
            return []
        for sender, record in stranger.records:
            self._count(sender, -1, -len(record.raw))
        return stranger.records

    def _count(self, sender: PeerId, records: int, size: int) -> None:
        self.held += records
        self.size += size
        self._by_sender[sender] = self._by_sender.get(sender, 0) + records
        if not self._by_sender[sender]:
            del self._by_sender[sender]
