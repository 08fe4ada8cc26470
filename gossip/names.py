"""The value types everybody else uses: who a peer is, what an update is called, what a hash is."""

from hashlib import blake2b
from typing import NamedTuple, NewType

PeerId = NewType("PeerId", bytes)
"""A peer's Ed25519 public key, 32 raw bytes. As text: a libp2p peer id (node/addresses.py)."""

RunId = NewType("RunId", bytes)
"""BLAKE2b-256 of a genesis: 32 raw bytes."""

Hash = NewType("Hash", bytes)
"""A BLAKE2b-256: 32 raw bytes."""


class Author(NamedTuple):
    """Who numbered an update: a peer, and the log it kept at the time (design 3.4).

    `log` is a random u64 that is new whenever the peer's disk was lost, rolled back or degraded, so
    that an honest peer never uses one number twice.
    """

    peer: PeerId
    log: int


class Key(NamedTuple):
    """One update: its author and its number, from 1 without gaps."""

    author: Author
    number: int


NO_HASH = Hash(bytes(32))
"""The running hash before an author's first update."""


def digest(data: bytes) -> Hash:
    """Return the BLAKE2b-256 of `data`."""
    return Hash(blake2b(data, digest_size=32).digest())


def running(previous: Hash, record: Hash) -> Hash:
    """Return the running hash after `record`: BLAKE2b-256(previous ‖ id) (design 5)."""
    return digest(previous + record)
