"""What a daemon says about itself: the types behind `/status`, `/peers` and `/events`.

Values only; node/http.py serves them, node/client.py reads them back. Durations are float seconds,
sizes bytes; a number nobody knows yet is None, never NaN (JSON has no NaN).
"""

import math
from collections.abc import Mapping
from enum import StrEnum

import msgspec


class State(StrEnum):
    """What the daemon is doing. `Status.why` gives the reason of the last two."""

    JOINING = "joining"
    """Fetching the run or catching up; not training yet."""
    TRAINING = "training"
    PAUSED = "paused"
    FINISHED = "finished"
    """All turns are done; the peer goes on serving."""
    OBSERVING = "observing"
    LEAVING = "leaving"
    DEGRADED = "degraded"
    """It serves, but something keeps it from training or publishing."""
    DIVERGED = "diverged"
    """Two peers with equal frontiers hold different models, and both are consistent."""


READY = frozenset(
    {State.TRAINING, State.PAUSED, State.FINISHED, State.OBSERVING, State.DEGRADED},
)
"""States in which the peer holds the run and serves it: what `/readyz` answers."""


class Neighbour(msgspec.Struct, frozen=True, kw_only=True):
    """A peer with which a gossip link is open."""

    id: str
    rtt: float | None = None
    """Round-trip time, seconds."""


class Sockets(msgspec.Struct, frozen=True, kw_only=True):
    """What the TCP sockets carried: TLS, headers and probes included (node/traffic.py).

    Restarts included, but for what an earlier process carried after its last turn.
    """

    bytes_in: int = 0
    bytes_out: int = 0


class Frontier(msgspec.Struct, frozen=True, kw_only=True):
    """How much of the ledger is in, without a hole."""

    authors: int = 0
    updates: int = 0
    hash: str = ""
    """Hex; equal hashes are equal frontiers."""


class Worker(msgspec.Struct, frozen=True, kw_only=True):
    """The process that holds torch."""

    pid: int | None = None
    """None while no worker runs."""
    restarts: int = 0
    device: str = ""
    memory: int | None = None
    """At the end of the last turn: resident bytes, or the most allocated on the accelerator."""


class Status(msgspec.Struct, frozen=True, kw_only=True):
    """Everything `/status` holds."""

    version: str
    peer: str
    """This daemon's libp2p peer id."""
    run: str
    """Run id, hex."""
    name: str
    """The run's name."""
    join: tuple[str, ...] = ()
    """Addresses by which others can join through this peer."""
    state: State = State.JOINING
    why: str = ""
    turn: int = 0
    """The last that this peer has taken; 0 before the first."""
    turns: int = 0
    """0 = for ever."""
    steps: int = 0
    """Local steps of this peer in this run, restarts included."""
    steps_per_second: float | None = None
    """In the last turn's local steps; None while it does not train."""
    loss: float | None = None
    """Training loss of the last turn: the mean over its steps, in the loss's own unit."""
    evaluation: float | None = None
    """Held-out measure of the shared model: before the last turn by a quick look, or `measured`."""
    measured: bool = False
    """`evaluation` is of the model as it is now, and as thorough as the task can."""
    first_evaluation: float | None = None
    """The first since this daemon was started."""
    unit: str = ""
    """Of the held-out measure: "bits per byte", "accuracy" …"""
    parameters: int = 0
    members: int = 0
    """Peers believed to be here, this one included."""
    neighbours: tuple[Neighbour, ...] = ()
    bytes_in: dict[str, int] = {}
    """By kind of message, before TLS, since the daemon was started."""
    bytes_out: dict[str, int] = {}
    sockets: Sockets = Sockets()
    published_bytes: int = 0
    """Payload bytes of this peer's own updates, each counted once."""
    compression: float | None = None
    """Float32 gradients at every step, divided by `published_bytes`."""
    frontier: Frontier = Frontier()
    lag: int = 0
    """Updates that this peer or others hold and its model does not."""
    fingerprint: str = ""
    """128 bits, hex: equal frontiers must mean equal fingerprints."""
    agrees: bool | None = None
    """Does the swarm hold one model? None until somebody's fingerprint could be compared."""
    reproducible: bool | None = None
    """Lockstep runs: False once a deadline was missed. None in free pace."""
    worker: Worker = Worker()
    memory: int = 0
    """Resident bytes of the daemon."""
    uptime: float = 0.0
    libp2p: str = "off"
    """"on", "off" or "failed: why"; the daemon works without it."""
    warnings: tuple[str, ...] = ()


class PeerRow(msgspec.Struct, frozen=True, kw_only=True):
    """One line of `/peers`: what this daemon knows of a member.

    Turn, steps, loss, evaluation and bytes are its word, as of its last turn, or of the measure it
    took when it had nothing to do.
    """

    id: str
    me: bool = False
    state: str = "alive"
    """alive, suspected, failed or left: SWIM's view of it."""
    standing: str = ""
    """What it says it does: joining, training, paused, finished, observing, degraded."""
    neighbour: bool = False
    turn: int = 0
    steps: int = 0
    loss: float | None = None
    evaluation: float | None = None
    bytes_in: int | None = None
    bytes_out: int | None = None
    """None until it has told."""
    rtt: float | None = None
    agrees: bool | None = None
    addresses: tuple[str, ...] = ()


class EventRow(msgspec.Struct, frozen=True, kw_only=True):
    """One event: joined, failed, recovered, left, equivocation … Numbers have no gaps."""

    number: int
    at: float
    """Seconds since 1970 by this machine's clock; for people, nothing depends on it."""
    what: str
    peer: str | None = None
    details: dict[str, str | int | float] = {}


def known(value: float) -> float | None:
    """Return `value`, or None when it is not a finite number."""
    return value if math.isfinite(value) else None


def compression_ratio(parameters: int, steps: int, published: int) -> float | None:
    """Return how much less was published than float32 gradients at every step."""
    return 4 * parameters * steps / published if published else None


def headline(status: Status) -> str:
    """Return the state as one phrase: "training", "degraded: log full"."""
    return f"{status.state}: {status.why}" if status.why else str(status.state)


def total(by_kind: Mapping[str, int]) -> int:
    """Return the sum over kinds."""
    return sum(by_kind.values())
