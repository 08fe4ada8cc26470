"""The kinds of signed record that peers tell each other. Values; node/wire/ has the bytes.

Three classes (design 5). *Gapless*: `Update`, repaired by frontier. *Latest-wins* by (author, kind,
subject): `Alive`, `Suspect`, `Leave`, `Contact`, `Progress`. *Grow-only*, true by itself: `Proof`.
"""

from dataclasses import dataclass
from enum import Enum

from shoal.gossip.names import Author, Hash, PeerId

HIGHEST = (1 << 63) - 1
"""Largest incarnation and sequence number: what is above is no record."""


class Standing(Enum):
    """What a member says it is doing; only `TRAINING` members publish and count in the weight w."""

    JOINING = 1
    TRAINING = 2
    PAUSED = 3
    FINISHED = 4
    OBSERVING = 5
    DEGRADED = 6


@dataclass(frozen=True, slots=True)
class Update:
    """One turn's update by `author`, never changed. Signed by the author."""

    author: Author
    number: int
    """From 1, without gaps per author."""
    turn: int
    kind: str
    """The codec that made the payload."""
    payload: Hash
    size: int
    """Bytes of the payload."""
    inline: bytes | None = None
    """The payload itself when it is at most `Limits.inline_bytes` long."""


@dataclass(frozen=True, slots=True)
class Alive:
    """`peer` is here. SWIM's alive message: a higher incarnation refutes suspicion."""

    peer: PeerId
    incarnation: int
    boot: int
    """Random u64 of the process, so that a daemon can tell its twin from its own past."""
    standing: Standing
    against: int = 0
    """The boot of another process under this key that this one has heard of; 0: of none.

    Only a process that runs now can name our boot: whoever does is our twin, not our past.
    """


@dataclass(frozen=True, slots=True)
class Suspect:
    """`accuser` could not reach `peer` while `peer` was at `incarnation`. Signed by the accuser."""

    accuser: PeerId
    peer: PeerId
    incarnation: int


@dataclass(frozen=True, slots=True)
class Leave:
    """`peer` says good-bye for good."""

    peer: PeerId
    incarnation: int


@dataclass(frozen=True, slots=True)
class Contact:
    """Where `peer` can be reached, and the proof that it was admitted to the swarm."""

    peer: PeerId
    sequence: int
    addresses: tuple[str, ...]
    """gRPC multiaddrs without the trailing /p2p part, most useful first."""
    admission: bytes
    """The swarm CA's signature over the peer's identity; checked in node/wire/."""


@dataclass(frozen=True, slots=True)
class Report:
    """What a peer tells about itself for everybody's status table. Information only."""

    turn: int = 0
    steps: int = 0
    loss: float = 0.0
    """Training loss of its last turn in the task's unit; NaN when there is none."""
    evaluation: float = 0.0
    """The task's held-out measure at the shared model; NaN when there is none."""
    bytes_out: int = 0
    bytes_in: int = 0


@dataclass(frozen=True, slots=True)
class Progress:
    """`peer` holds frontier V and its model has fingerprint F(V) (design 3.4)."""

    peer: PeerId
    sequence: int
    frontier: tuple[tuple[Author, int], ...]
    """(author, count), sorted."""
    frontier_hash: Hash
    """Hash of the frontier with its running hashes and closings: see gossip/frontier.py."""
    fingerprint: tuple[int, int]
    report: Report


@dataclass(frozen=True, slots=True)
class Proof:
    """Two genuine updates of one author under one number. Nobody signs it: it is true by itself."""

    author: Author
    number: int
    first: bytes
    """The raw record with the smaller id."""
    second: bytes


Statement = Update | Alive | Suspect | Leave | Contact | Progress | Proof


@dataclass(frozen=True, slots=True)
class Record:
    """A statement with the bytes that carry it. Forwarded unchanged."""

    id: Hash
    """BLAKE2b-256 of the signed bytes, without the signature."""
    raw: bytes
    """Body and signature as they travel."""
    statement: Statement
