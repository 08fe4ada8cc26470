"""One simulated daemon: its disk, its core and its worker; ids and records without keys."""

from dataclasses import dataclass, field
from typing import Any

from shoal.gossip import events as ev
from shoal.gossip.frontier import Counts
from shoal.gossip.names import Author, Hash, Key, PeerId, digest
from shoal.gossip.protocol import Protocol
from shoal.gossip.records import Record, Statement, Update
from shoal.gossip.snapshot import Line, Snapshot
from shoal.node.simulation.workers import Arrived, Delta, SimWorker

MOST = (1 << 32) - 1
"""The largest number that fits into a u32."""


@dataclass(slots=True)
class SimPeer:
    """One simulated daemon: what would be on its disk, and its core while it is up."""

    index: int
    id: PeerId
    log: int
    core: Protocol
    worker: SimWorker
    everywhere: dict[Hash, bytes]
    """All payloads of the simulation."""
    records: dict[Key, Record] = field(default_factory=dict)
    proofs: list[Record] = field(default_factory=list)
    admissions: dict[PeerId, bytes] = field(default_factory=dict)
    payloads: set[Hash] = field(default_factory=set)
    up: bool = False
    life: int = 0
    """Events for an earlier life are dropped."""
    frozen: list[tuple[float, ev.Event]] | None = None
    applied: dict[Author, int] = field(default_factory=dict)
    links: set[int] = field(default_factory=set)
    disk: str = ""
    """Why nothing can be stored."""
    pulls: dict[Hash, int] = field(default_factory=dict)
    """How often each payload was transferred to us."""
    snapshot: Snapshot | None = None
    """What it began with in place of the log …"""
    sums: Any = None
    """… and the model there."""

    # ------------------------------------------------------------ what its worker does

    def begin(self, worker: SimWorker) -> None:
        """Let `worker` begin with the snapshot, or with nothing."""
        self.worker, self.applied = worker, {}
        if self.snapshot is not None:
            self.worker.begin(self.sums)
            self.applied = dict(self.snapshot.counts())

    def arrived(self, key: Key) -> Arrived:
        """Return an update and its payload, None where that is not here."""
        record = self.records[key]
        assert isinstance(record.statement, Update)
        name = record.statement.payload
        return record, self.everywhere[name] if name in self.payloads else None

    def apply(self, frontier: Counts) -> ev.Applied:
        """Add all updates up to `frontier` to the model."""
        updates = [
            self.arrived(Key(author, n))
            for author, count in frontier
            for n in range(self.applied.get(author, 0) + 1, count + 1)
        ]
        deltas, refused = self.worker.apply(updates, sign=+1)
        for author, count in frontier:
            self.applied[author] = max(count, self.applied.get(author, 0))
        return self._state(deltas, refused)

    def subtract(self, author: Author, first: int, last: int) -> ev.Applied:
        """Take the author's updates from `first` to `last` out of the model."""
        updates = [self.arrived(Key(author, n)) for n in range(first, last + 1)]
        self.worker.apply(updates, sign=-1)
        self.applied[author] = first - 1
        return self._state([], [])

    def _state(self, deltas: list[tuple[Key, Delta]], refused: list[tuple[Key, str]]) -> ev.Applied:
        frontier = tuple(sorted((a, n) for a, n in self.applied.items() if n))
        return ev.Applied(frontier, self.worker.fingerprint(), tuple(deltas), tuple(refused))

    # ------------------------------------------------------------ joining

    def take_snapshot(self, donor: "SimPeer", lie: str) -> None:
        """Begin with the donor's model in place of the log; its lies are `Fault.start`'s."""
        logs, sums = donor.core.frontier.logs, donor.worker.sums()
        fingerprint = donor.worker.fingerprint()
        steady = lie or donor.core.steady()
        if not steady or any(count > logs[a].count for a, count in donor.applied.items()):
            return  # as node/snapshots.py does
        if lie == "model":
            sums = fingerprint = (sums[0] ^ 1, sums[1])
        elif lie == "fingerprint":
            fingerprint = (fingerprint[0] ^ 1, fingerprint[1])
        self.sums = sums
        lines = [
            Line(
                author,
                MOST if lie == "counts" else count,
                digest(author.peer) if lie == "hashes" else logs[author].hash_at(count),
                MOST if lie == "turns" else logs[author].turn_at(count),
            )
            for author, count in donor.applied.items()
            if count
        ]
        if lie == "author":
            lines.append(Line(Author(self.id, 1), 3, digest(b"nothing"), MOST))
        by_author = sorted(lines, key=lambda line: line.author)
        self.snapshot = Snapshot(donor.id, tuple(by_author), fingerprint)


def fake_seal(statement: Statement) -> Record:
    """Make a record without a signature: its bytes are the statement written out."""
    raw = repr(statement).encode()
    return Record(digest(raw), raw, statement)


def fake_peer(index: int, seed: int = 0) -> PeerId:
    """Return an id spread over the ring like a public key."""
    return PeerId(digest(b"peer %d of %d" % (index, seed)))
