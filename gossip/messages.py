"""What cores say to each other. Best effort: any of these may be lost, doubled or late.

The driver carries a message over an open link when there is one and as a unary call otherwise; the
simulator carries the same objects over its seeded network.
"""

from dataclasses import dataclass

from shoal.gossip.names import Author, Hash, PeerId
from shoal.gossip.records import Record


@dataclass(frozen=True, slots=True)
class Push:
    """Here are records you may not have (Plumtree's GOSSIP; also the answer to a question)."""

    records: tuple[Record, ...]


@dataclass(frozen=True, slots=True)
class Announce:
    """I have these records; ask if they do not reach you another way (Plumtree's IHAVE)."""

    ids: tuple[Hash, ...]


@dataclass(frozen=True, slots=True)
class Graft:
    """Send me these records and push to me from now on (Plumtree's GRAFT)."""

    ids: tuple[Hash, ...]


@dataclass(frozen=True, slots=True)
class Prune:
    """I get your records from somebody else already: only announce to me (Plumtree's PRUNE)."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One author's line of a frontier."""

    author: Author
    count: int
    """How many updates are held without a hole."""
    hash: Hash
    """Running hash after `count` updates."""
    closed: int = 0
    """The number from which the log is closed by a proof; 0 while it is open."""
    summed: int = 0
    """How many of them, from 1 on, the sender can't send: it began with a snapshot of them."""


@dataclass(frozen=True, slots=True)
class Digest:
    """My frontier, for anti-entropy: whole, or the difference to what I last stated to you."""

    entries: tuple[Entry, ...]
    full: bool
    frontier_hash: Hash
    """Of the whole frontier, so that a lost difference is noticed and the whole is asked for."""
    view_hash: int
    """u64 over the latest-wins records of the view; differs ⇒ `ViewDigest` follows."""
    reply: bool
    """Please state yours too."""


@dataclass(frozen=True, slots=True)
class AskDigest:
    """I could not follow your difference: state your whole frontier."""


@dataclass(frozen=True, slots=True)
class Want:
    """Send me the update records `first`..`last` of `author`."""

    author: Author
    first: int
    last: int


@dataclass(frozen=True, slots=True)
class AskHashes:
    """Our running hashes of `author` differ: tell me yours after each of `counts`."""

    author: Author
    counts: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Hashes:
    """Running hashes of `author` after each of `counts`: the asker finds where we part."""

    author: Author
    counts: tuple[int, ...]
    hashes: tuple[Hash, ...]


@dataclass(frozen=True, slots=True)
class ViewDigest:
    """u64 hash of each bucket of my view (bucket = first byte of the record's peer)."""

    buckets: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ViewIds:
    """The ids I hold in these buckets: send me what I lack, ask for what you lack."""

    buckets: tuple[int, ...]
    ids: tuple[Hash, ...]


@dataclass(frozen=True, slots=True)
class AskAdmission:
    """I hold records of peers I never met: how were they admitted?"""

    peers: tuple[PeerId, ...]


@dataclass(frozen=True, slots=True)
class Vouch:
    """The admission proof of a peer, already verified when the core sees it."""

    peer: PeerId
    admission: bytes


@dataclass(frozen=True, slots=True)
class Ping:
    """Are you there? `suspected`: others think you are not, at that incarnation; refute."""

    nonce: int
    suspected: int | None = None


@dataclass(frozen=True, slots=True)
class Ack:
    """Yes: answers `Ping`, or `PingRequest` on behalf of its target."""

    nonce: int


@dataclass(frozen=True, slots=True)
class PingRequest:
    """I cannot reach `target`; can you? Answer `Ack` or `Nack`."""

    nonce: int
    target: PeerId


@dataclass(frozen=True, slots=True)
class Nack:
    """I am well, but `target` did not answer me either (Lifeguard)."""

    nonce: int


Message = (
    Push
    | Announce
    | Graft
    | Prune
    | Digest
    | AskDigest
    | Want
    | AskHashes
    | Hashes
    | ViewDigest
    | ViewIds
    | AskAdmission
    | Vouch
    | Ping
    | Ack
    | PingRequest
    | Nack
)
