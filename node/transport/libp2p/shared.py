"""What the daemon's loop and libp2p's thread tell each other."""

import threading
from dataclasses import dataclass, field


@dataclass(slots=True)
class Shared:
    """Values are replaced whole and never changed, so that neither side needs a lock."""

    answer: bytes | None = None
    """What peers of the swarm are told (`contact.py`); None: nothing yet."""
    bootstrap: tuple[str, ...] = ()
    """libp2p multiaddrs through which to enter the DHT."""
    stopping: threading.Event = field(default_factory=threading.Event)
    """The daemon wants no more of libp2p."""
    state: str = "off: not started"
    """One line for `/status`."""
    addresses: tuple[str, ...] = ()
    """Own libp2p multiaddrs with /p2p while running."""
    counts: dict[str, int] = field(default_factory=dict)
    """found, connected, routing: sizes for `/status`."""
