"""What goes wrong in a simulation, as data: faults at their times, and how messages fare."""

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Fault:
    """Something that happens to the swarm at a time. Make one with the methods below."""

    kind: str
    at: float
    peer: int = -1
    group: frozenset[int] = frozenset()
    rate: float = 0.0
    keep: int = -1
    donor: int = -1
    lie: str = ""

    @staticmethod
    def crash(*, peer: int, at: float) -> "Fault":
        """kill -9: memory is gone, the log stays."""
        return Fault("crash", at, peer)

    @staticmethod
    def restart(*, peer: int, at: float, keep: int = -1) -> "Fault":
        """Start again from the own log; `keep` rolls it back to its first so many records."""
        return Fault("restart", at, peer, keep=keep)

    @staticmethod
    def start(*, peer: int, at: float, donor: int = -1, lie: str = "") -> "Fault":
        """A peer that joins late: with the log, or with a snapshot of the peer `donor`.

        The donor may lie about the model ("model": its statement fits), the statement alone
        ("fingerprint"), the updates that it has summed ("hashes"), how many of them there are
        ("counts"), who they are of ("author") or of which turns ("turns").
        """
        return Fault("restart", at, peer, donor=donor, lie=lie)

    @staticmethod
    def freeze(*, peer: int, at: float, to: float) -> tuple["Fault", "Fault"]:
        """SIGSTOP and SIGCONT: what arrives meanwhile is handled afterwards."""
        return Fault("freeze", at, peer), Fault("thaw", to, peer)

    @staticmethod
    def partition(group: Iterable[int], *, at: float, to: float) -> tuple["Fault", "Fault"]:
        """`group` and the others cannot reach each other."""
        members = frozenset(group)
        return Fault("cut", at, group=members), Fault("heal", to, group=members)

    @staticmethod
    def lose(rate: float, *, at: float = 0.0) -> "Fault":
        """From now on lose this share of all messages."""
        return Fault("lose", at, rate=rate)

    @staticmethod
    def fill_disk(*, peer: int, at: float, reason: str = "log full") -> "Fault":
        """From now on nothing can be stored ("log full"), or but once ("disk: …")."""
        return Fault(reason, at, peer)

    @staticmethod
    def equivocate(*, peer: int, at: float) -> "Fault":
        """Somebody with a copied key signs another update under the last number of `peer`."""
        return Fault("equivocate", at, peer)

    @staticmethod
    def pause(*, peer: int, at: float) -> "Fault":
        """The operator pauses a peer."""
        return Fault("pause", at, peer)

    @staticmethod
    def resume(*, peer: int, at: float) -> "Fault":
        """The operator lets it train again."""
        return Fault("resume", at, peer)

    @staticmethod
    def depart(*, peer: int, at: float) -> "Fault":
        """The operator says good-bye for good."""
        return Fault("depart", at, peer)

    @staticmethod
    def kill_worker(*, peer: int, at: float, to: float) -> tuple["Fault", "Fault"]:
        """The worker dies; another one starts from nothing at `to`."""
        return Fault("worker-down", at, peer), Fault("worker-up", to, peer)


@dataclass(slots=True)
class Network:
    """How messages fare."""

    latency: tuple[float, float] = (0.005, 0.05)
    """Least and most seconds; drawn per message, so messages overtake each other."""
    loss: float = 0.0
    duplicate: float = 0.0
    bytes_per_second: float = 12.5e6
    """Of one payload transfer."""
    break_after: float = 4.0
    """Seconds until a silent link is noticed (keepalive)."""
