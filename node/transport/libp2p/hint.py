"""What finding peers results in."""

from dataclasses import dataclass

from shoal.gossip.names import PeerId


@dataclass(frozen=True, slots=True)
class Hint:
    """Somebody of this run may be reached here. Whoever dials checks the peer id."""

    peer: PeerId
    addresses: tuple[str, ...]
    """gRPC multiaddrs without the trailing /p2p part."""
    contact: bytes
    """What the peer's daemon passed to `announce`; opaque here."""
    source: str
    """`mdns`, `rendezvous` or `bootstrap`."""
    libp2p: str
    """The libp2p multiaddr that answered, with /p2p: worth remembering for `bootstrap`."""
