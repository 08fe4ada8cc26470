"""The records about members that everybody should hold, hashed by bucket to compare them fast.

Latest-wins: one `Alive` or `Leave`, and one `Contact` per peer. Grow-only: one `Proof` per accused
log, the smallest number. A bucket is the first byte of the peer; its hash the XOR of what the ids
of its records begin with. An entry costs two references per dictionary: records are shared.
"""

from array import array
from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator

from shoal.gossip.names import Author, Hash, PeerId
from shoal.gossip.records import Alive, Contact, Leave, Proof, Record

BUCKETS = 256


class View:
    """Who is known, and by which records."""

    __slots__ = ("alive", "buckets", "contacts", "left", "proofs", "ring")

    def __init__(self) -> None:
        self.alive: dict[PeerId, Record] = {}
        self.left: dict[PeerId, Record] = {}
        self.contacts: dict[PeerId, Record] = {}
        self.proofs: dict[Author, Record] = {}
        self.ring: list[PeerId] = []
        """Members that live as far as we know, ourselves included, sorted."""
        self.buckets = array("Q", bytes(8 * BUCKETS))

    def copy(self) -> "View":
        """Return a view that shares this one's records."""
        other = View()
        other.alive, other.left = dict(self.alive), dict(self.left)
        other.contacts, other.proofs = dict(self.contacts), dict(self.proofs)
        other.ring, other.buckets = list(self.ring), array("Q", self.buckets)
        return other

    @property
    def hash(self) -> int:
        """u64 over all records of the view."""
        total = 0
        for bucket in self.buckets:
            total ^= bucket
        return total

    # ------------------------------------------------------------ records

    def put(self, record: Record) -> None:
        """Let `record` replace what the view holds for the same peer."""
        match record.statement:
            case Alive(peer=peer):
                self._swap(peer, self.alive.get(peer), record)
                self._swap(peer, self.left.pop(peer, None), None)
                self.alive[peer] = record
            case Leave(peer=peer):
                self._swap(peer, self.left.get(peer), record)
                self._swap(peer, self.alive.pop(peer, None), None)
                self.left[peer] = record
            case Contact(peer=peer):
                self._swap(peer, self.contacts.get(peer), record)
                self.contacts[peer] = record
            case Proof(author=author):
                self._swap(author.peer, self.proofs.get(author), record)
                self.proofs[author] = record

    def drop(self, peer: PeerId) -> None:
        """Forget a peer's latest-wins records."""
        for records in (self.alive, self.left, self.contacts):
            self._swap(peer, records.pop(peer, None), None)
        self.unlist(peer)

    def of(self, peer: PeerId) -> Iterator[Record]:
        """Yield what the view holds about a peer, proofs apart."""
        for records in (self.alive, self.left, self.contacts):
            if record := records.get(peer):
                yield record

    def peers(self) -> list[PeerId]:
        """Return everybody the view holds a record of, sorted."""
        return sorted({*self.alive, *self.left, *self.contacts})

    def within(self, buckets: Iterable[int]) -> dict[Hash, Record]:
        """Return the records of these buckets (none given: all) by id, sorted by peer."""
        chosen = set(buckets) or set(range(BUCKETS))
        found = {r.id: r for p in self.peers() if p[0] in chosen for r in self.of(p)}
        for author in sorted(self.proofs):
            if author.peer[0] in chosen:
                found[self.proofs[author].id] = self.proofs[author]
        return found

    def size(self) -> int:
        """Return the number of records."""
        return len(self.alive) + len(self.left) + len(self.contacts) + len(self.proofs)

    def _swap(self, peer: PeerId, old: Record | None, new: Record | None) -> None:
        for record in (old, new):
            if record is not None:
                self.buckets[peer[0]] ^= int.from_bytes(record.id[:8], "big")

    # ------------------------------------------------------------ the ring of the living

    def list(self, peer: PeerId) -> bool:
        """Count `peer` among the living; say whether that is new."""
        if self.lives(peer):
            return False
        insort(self.ring, peer)
        return True

    def unlist(self, peer: PeerId) -> bool:
        """Count `peer` no more; say whether that is new."""
        i = bisect_left(self.ring, peer)
        if i < len(self.ring) and self.ring[i] == peer:
            del self.ring[i]
            return True
        return False

    def lives(self, peer: PeerId) -> bool:
        """Say whether `peer` is counted among the living."""
        i = bisect_left(self.ring, peer)
        return i < len(self.ring) and self.ring[i] == peer

    def incarnation(self, peer: PeerId) -> int:
        """Return the incarnation that this peer last stated, 0 if it never did."""
        record = self.alive.get(peer) or self.left.get(peer)
        if record is None or not isinstance(record.statement, Alive | Leave):
            return 0
        return record.statement.incarnation
