"""What a finder is told when it is made, and every bound that it keeps."""

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class FinderLimits:
    """Every bound of the finder. Durations are float seconds."""

    hints: int = 256
    """Hints waiting for the daemon; beyond it the oldest is dropped."""
    candidates: int = 1024
    """Peers found and not yet (or not lately) asked; beyond it the longest unseen is dropped."""
    bootstrap: int = 32
    """libp2p addresses dialled to enter the DHT."""
    addresses: int = 16
    """Addresses of one peer that are tried, and gRPC addresses taken from one answer."""
    address_bytes: int = 256
    contact_bytes: int = 16 << 10
    """Largest contact record told or taken."""
    asking: int = 8
    """Peers asked at the same time."""
    answering: int = 32
    """Peers answered at the same time; more are turned away."""
    ask_timeout: float = 10.0
    """For one address: dialling, proving, answering."""
    retry: float = 3.0
    """First pause after a failed ask, and after entering the DHT failed; doubles up to the next."""
    retry_max: float = 3600.0
    connections: int = 64
    """libp2p connections kept; more are pruned."""
    keep_connections: int = 8
    """After asking, a connection is closed at once when more than this are open."""
    linger: float = 10.0
    """A connection on which nothing was said for so long is closed."""
    longest: float = 120.0
    """No connection is older, whatever is said on it."""
    entries: int = 4
    """Bootstrap addresses in use at the same time: one would do if it never failed."""
    rendezvous: float = 2.0
    """First pause between two rounds of providing and looking up; triples up to the next."""
    rendezvous_max: float = 3600.0
    """Provider records live for 48 h, but the peers that hold them do not."""
    provider_keys: int = 2048
    """Keys of which we hold provider records for others."""
    interfaces: float = 15.0
    """How often the machine's own addresses are looked at; a change restarts mDNS."""
    restart: float = 2.0
    """Pause before libp2p is started again after a failure; doubles up to `restart_max`."""
    restart_max: float = 300.0


@dataclass(frozen=True, slots=True)
class FinderSettings:
    """Who we are, in which swarm, and what may be used to find others."""

    identity: bytes = field(repr=False)
    """The raw 32-byte Ed25519 private key."""
    seed: bytes = field(repr=False)
    """The seed of the swarm CA's key (design 6): scopes mDNS, the rendezvous key and the proofs."""
    port: int | None = 0
    """libp2p's own TCP port; 0 takes any free one; None: no libp2p at all."""
    mdns: bool = True
    rendezvous: bool = True
    advertise: tuple[str, ...] = ()
    """libp2p multiaddrs told to others; default: every non-loopback address of the machine."""
    limits: FinderLimits = FinderLimits()
