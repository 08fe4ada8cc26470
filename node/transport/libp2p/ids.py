"""Peers' names as libp2p has them in bytes: longer, and not only of Ed25519 keys."""

from shoal.gossip.names import PeerId
from shoal.node.identity import MULTIHASH, PUBLIC_KEY

_ED25519 = MULTIHASH + PUBLIC_KEY


def to_bytes(peer: PeerId) -> bytes:
    """Return libp2p's name of one of our peers."""
    return _ED25519 + peer


def to_peer(name: bytes) -> PeerId | None:
    """Return the peer of this name; None when its key is no Ed25519 key: it is none of us."""
    key = name.removeprefix(_ED25519)
    return PeerId(key) if len(key) == 32 != len(name) else None
