"""What a joiner may begin with instead of the log: a frontier whose updates somebody has summed.

A snapshot stands for the updates below its frontier, which are then known by their running hashes
alone. Whoever gave it may lie, so it is believed only while others' statements of fingerprints and
hashes do not speak against it (design 3.4), and others hold as much: else it is dropped, and the
log is fetched after all. The sums themselves are the worker's affair.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from shoal.gossip.names import Author, Hash, PeerId

BEHIND = 60.0
"""Seconds for which a peer may lack updates that a snapshot stands for: it may be late itself."""


@dataclass(frozen=True, slots=True)
class Line:
    """One author's updates, summed."""

    author: Author
    count: int
    """How many from 1 on; at least one."""
    hash: Hash
    """Running hash after `count` updates."""
    turn: int
    """The largest turn of them."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A frontier and the fingerprint of the model there."""

    donor: PeerId
    lines: tuple[Line, ...]
    """Sorted by author."""
    fingerprint: tuple[int, int]

    def counts(self) -> tuple[tuple[Author, int], ...]:
        """Return the version vector."""
        return tuple((line.author, line.count) for line in self.lines)


@dataclass(slots=True)
class Footing:
    """The snapshot that our model stands on, if there is one, and what others make of it."""

    snapshot: Snapshot | None = None
    _agree: set[PeerId] = field(default_factory=set)
    _differ: set[PeerId] = field(default_factory=set)
    """By their fingerprints, at the last look."""
    _disputes: set[PeerId] = field(default_factory=set)
    """By their running hashes."""
    _behind: dict[PeerId, float] = field(default_factory=dict)
    """Who lacks some of its updates, and since when: nobody but the donor may ever have had them,
    or they may be made up."""
    _gone: set[PeerId] = field(default_factory=set)
    """Whose word for it does not count any more."""
    _doubted: float | None = None
    """Since when more speak against it than for it."""

    def heard(self, verdicts: Mapping[PeerId, bool]) -> None:
        """Take in whose models equal ours; the donor can't speak for its own snapshot."""
        if self.snapshot is not None:
            self._agree = {p for p, same in verdicts.items() if same and p != self.snapshot.donor}
            self._differ = {p for p, same in verdicts.items() if not same}

    def dispute(self, peer: PeerId) -> None:
        """`peer` holds other updates where the snapshot ends."""
        self._disputes.add(peer)

    def present(self, peers: Collection[PeerId]) -> None:
        """Only these may dispute it: not who came, spoke and left, time and again."""
        self._disputes &= set(peers)

    def lacking(self, peers: Collection[PeerId], now: float) -> None:
        """These, of whom we know what they hold, lack some of it."""
        self._behind = {peer: self._behind.get(peer, now) for peer in peers}

    def contested(self) -> set[PeerId]:
        """Return who speaks for the snapshot, where anybody does not; else nobody."""
        return self._agree if self._behind or self._differ or self._disputes else set()

    def take_back(self, peers: Collection[PeerId]) -> None:
        """These spoke for it, and state by now to hold less: they have dropped it themselves."""
        self._gone = set(peers)

    def refuted(self, now: float = 0.0) -> bool:
        """Say whether more speak against the snapshot than for it."""
        late = {peer for peer, since in self._behind.items() if now - since >= BEHIND}
        agree = self._agree - self._gone - late
        against = self._differ | late | (self._disputes - agree)
        return self.snapshot is not None and len(against) > len(agree)

    def doubted(self, now: float) -> float | None:
        """Return since when more speak against it; None: they do not."""
        if not self.refuted(now):
            self._doubted = None
        elif self._doubted is None:
            self._doubted = now
        return self._doubted

    def firm(self, others: Collection[PeerId]) -> bool:
        """Say whether to build on it: somebody confirms it, or nobody but the donor is there."""
        return self.snapshot is None or bool(self._agree) or set(others) <= {self.snapshot.donor}

    def lose(self) -> None:
        """Stand on the log alone."""
        self.snapshot = None
        self._agree, self._differ, self._disputes = set(), set(), set()
        self._behind, self._gone, self._doubted = {}, set(), None
