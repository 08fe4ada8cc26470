"""Which links to open and close, so that the neighbours become those of the topology."""

from dataclasses import dataclass, field

from shoal.gossip.events import Connect, Disconnect
from shoal.gossip.limits import Limits
from shoal.gossip.membership import Membership
from shoal.gossip.names import PeerId
from shoal.gossip.outbox import Outbox
from shoal.gossip.records import Contact
from shoal.gossip.timers import Timers
from shoal.gossip.topology import Topology, wanted

LAST_WORD = 1.0
"""Seconds that a peer has on a link for which there is no room."""
TWIN = "another process runs under this key"
BACKOFF_MAX = 60.0
PATIENCE = 3
"""Topology intervals before we dial who should dial us, and before a surplus link is closed."""


@dataclass(slots=True)
class Neighbours:
    """Dial whom the topology names, let go who is too many."""

    me: PeerId
    limits: Limits
    timers: Timers
    out: Outbox
    membership: Membership
    shape: Topology
    links: dict[PeerId, float] = field(default_factory=dict)
    """Open links and since when."""
    _wanted: list[PeerId] = field(default_factory=list)
    _since: dict[PeerId, float] = field(default_factory=dict)
    """Since when a peer has been wanted."""
    _dialling: dict[PeerId, float] = field(default_factory=dict)
    _failures: dict[PeerId, int] = field(default_factory=dict)
    _not_before: dict[PeerId, float] = field(default_factory=dict)
    _changes: int = -1

    def up(self, peer: PeerId, now: float) -> bool:
        """A link is open; say whether there is room for it."""
        self._dialling.pop(peer, None)
        self._failures.pop(peer, None)
        self._not_before.pop(peer, None)
        if len(self.links) >= self.limits.neighbours and peer not in self.links:
            # It may know nobody else: let it ask who is here before the link closes.
            self.timers.set("refuse", now + LAST_WORD, peer)
            return False
        self.links[peer] = now
        return True

    def refuse(self, peer: PeerId) -> None:
        """Close a link for which there is no room."""
        if peer not in self.links:
            self.out.add(Disconnect(peer, "no room for more links"))

    def down(self, peer: PeerId, now: float) -> bool:
        """A link is gone or could not be opened; say whether there was one."""
        was_open = self.links.pop(peer, None) is not None
        if self._dialling.pop(peer, None) is not None or was_open:
            tries = self._failures[peer] = self._failures.get(peer, 0) + 1
            self._not_before[peer] = now + min(2.0**tries / 2, BACKOFF_MAX)
        return was_open

    def on_time(self, what: str, now: float) -> bool:
        """Do what is due; say whether it was ours to do."""
        if what != "topology":
            return False
        self.timers.set("topology", now + self.limits.topology_interval)
        if self.membership.retired:
            # Each end keeps one link a key: ours would take the place of the earlier process's.
            for peer in sorted(self.links):
                self.out.add(Disconnect(peer, TWIN))
            return True
        self._refresh(now)
        self._dial(now)
        self._let_go(now)
        return True

    def _refresh(self, now: float) -> None:
        if self._changes == self.membership.changes:
            return
        self._changes = self.membership.changes
        self._wanted = wanted(self.shape, self.membership.view.ring, self.me, self.limits)
        self._since = {p: self._since.get(p, now) for p in self._wanted}
        lives = self.membership.view.lives
        self._failures = {p: n for p, n in self._failures.items() if lives(p)}
        self._not_before = {p: t for p, t in self._not_before.items() if p in self._failures}

    def _dial(self, now: float) -> None:
        interval = self.limits.topology_interval
        for peer in self._wanted:
            if peer in self.links or self._not_before.get(peer, 0.0) > now:
                continue
            # Both ends want the link: the smaller id dials, the other only if nothing comes.
            if peer < self.me and now - self._since[peer] < PATIENCE * interval:
                continue
            if now - self._dialling.get(peer, float("-inf")) < 10 * interval:
                continue
            contact = self.membership.view.contacts.get(peer)
            if contact is not None and isinstance(contact.statement, Contact):
                self._dialling[peer] = now
                self.out.add(Connect(peer, contact.statement.addresses))

    def _let_go(self, now: float) -> None:
        surplus = len(self.links) - self.limits.degree_max
        if surplus <= 0:
            return
        ring = self.membership.view.ring
        keep = set(self.shape.neighbours(ring, self.me, self.limits.neighbours)) | set(self._wanted)
        age = PATIENCE * self.limits.topology_interval
        old = [p for p, since in self.links.items() if p not in keep and now - since >= age]
        for peer in sorted(old)[:surplus]:
            self.out.add(Disconnect(peer, "not a neighbour"))
