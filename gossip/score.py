"""How well a peer behaves towards us: a decaying score, and token buckets. Never validity."""

from dataclasses import dataclass, field

from shoal.gossip.limits import Limits
from shoal.gossip.names import PeerId

WEIGHTS = {
    "signature": -20.0,
    "hash": -20.0,
    "malformed": -20.0,
    "truncated": -5.0,
    "version": -1.0,
    "oversize": -20.0,
    "run": -10.0,
    "admission": -20.0,
    "payload": -10.0,
    "rules": -5.0,
    "flood": -2.0,
    "replay": -1.0,
    "timeout": -5.0,
    "not found": -5.0,
}
"""What a misdeed costs, by reason; an unknown reason costs `OTHER`."""
OTHER = -5.0


@dataclass(slots=True)
class Bucket:
    """Tokens that come back at a steady rate."""

    tokens: float
    at: float

    def take(self, amount: float, rate: float, burst: float, now: float) -> bool:
        """Take `amount` tokens if they are there."""
        self.tokens = min(burst, self.tokens + (now - self.at) * rate)
        self.at = now
        if self.tokens < amount:
            return False
        self.tokens -= amount
        return True


@dataclass(slots=True)
class Rates:
    """A token bucket per peer, for so many peers: the ones not heard of longest are forgotten."""

    rate: float
    burst: float
    most: int
    peers: dict[PeerId, Bucket] = field(default_factory=dict)

    def take(self, peer: PeerId, amount: float, now: float) -> bool:
        """Take `amount` of this peer's tokens if they are there."""
        bucket = self.peers.pop(peer, None) or Bucket(self.burst, now)
        self.peers[peer] = bucket
        if len(self.peers) > self.most:
            del self.peers[next(iter(self.peers))]
        return bucket.take(amount, self.rate, self.burst, now)


@dataclass(slots=True)
class Standing:
    """One peer's score at a time, and its buckets."""

    score: float
    at: float
    records: Bucket
    bytes: Bucket
    banned: float = float("-inf")


@dataclass(slots=True)
class Scores:
    """Score peers, throttle them, ban them for a while."""

    limits: Limits
    peers: dict[PeerId, Standing] = field(default_factory=dict)

    def _of(self, peer: PeerId, now: float) -> Standing:
        standing = self.peers.get(peer)
        if standing is None:
            while len(self.peers) >= self.limits.members:
                del self.peers[next(iter(self.peers))]
            standing = self.peers[peer] = Standing(
                0.0,
                now,
                Bucket(4 * self.limits.records_per_second, now),
                Bucket(4 * self.limits.bytes_per_second, now),
            )
        return standing

    def blame(self, peer: PeerId, reason: str, now: float) -> bool:
        """Count a misdeed; say whether the peer is to be banned now."""
        standing = self._of(peer, now)
        standing.score = self.score(peer, now) + WEIGHTS.get(reason, OTHER)
        standing.at = now
        if standing.score > self.limits.score_ban or self.banned(peer, now):
            return False
        standing.banned = now + self.limits.ban
        standing.score = 0.0
        return True

    def score(self, peer: PeerId, now: float) -> float:
        """Return what is left of a peer's misdeeds."""
        standing = self.peers.get(peer)
        if standing is None or standing.score == 0.0:
            return 0.0
        return float(standing.score * 0.5 ** ((now - standing.at) / self.limits.score_halflife))

    def banned(self, peer: PeerId, now: float) -> bool:
        """Say whether we refuse this peer."""
        standing = self.peers.get(peer)
        return standing is not None and standing.banned > now

    def admit(self, peer: PeerId, records: int, size: int, now: float) -> bool:
        """Say whether a message with so many records and bytes is within the peer's rate."""
        standing, limits = self._of(peer, now), self.limits
        slow = 0.1 if self.score(peer, now) < limits.score_throttle else 1.0
        per_second, bytes_per_second = limits.records_per_second, limits.bytes_per_second
        return standing.records.take(
            records, slow * per_second, 4 * per_second, now
        ) and standing.bytes.take(size, slow * bytes_per_second, 4 * bytes_per_second, now)
