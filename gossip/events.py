"""Everything that can happen to the core, and everything it can ask for.

`Protocol.handle(event, now) -> effects`. Whoever drives the core performs the effects in order,
at once, and reports results as further events. `now` is float seconds of a monotonic clock.

The worker has one request at a time: after `StartTurn`, `Apply`, `Subtract` or `Rebuild` the core
asks for nothing more until the answer, which always comes (or `WorkerDown`, which cancels it):

    Apply, Subtract   Applied
    Rebuild           Rebuilt
    StartTurn         Applied (what was applied first, maybe nothing), then TurnDone

A finished turn waits for its number: the core answers `TurnDone` that has a payload with
`Store(own=True)` and asks the worker for nothing until `Stored` or `StoreFailed`. With `Stored` the
driver lets the worker commit the turn under the record's (log, number); with `Discard` it lets it
forget the turn. After `WorkerReady` the core starts from the frontier stated there, be it empty.
"""

from dataclasses import dataclass, field

from shoal.gossip.messages import Message
from shoal.gossip.names import Author, Hash, Key, PeerId
from shoal.gossip.records import Record, Report

# ---------------------------------------------------------------- events: what happened


@dataclass(frozen=True, slots=True)
class Start:
    """The daemon is up: `addresses` are its own (without /p2p), `admission` its own proof.

    `alone`: nobody else is known (a founder's first start), so there is nobody to wait for. Else
    training starts after one round of anti-entropy, or after `Limits.join_patience` without one.
    """

    addresses: tuple[str, ...]
    admission: bytes
    alone: bool = False


@dataclass(frozen=True, slots=True)
class Tick:
    """The time asked for by `Wake` has come (early and spare ticks are harmless)."""


@dataclass(frozen=True, slots=True)
class LinkUp:
    """A link to `peer` is open; both ends are authenticated and admitted."""

    peer: PeerId
    admission: bytes


@dataclass(frozen=True, slots=True)
class LinkDown:
    """The link to `peer` is gone, or could not be opened."""

    peer: PeerId
    reason: str


@dataclass(frozen=True, slots=True)
class Received:
    """`peer` said `message`; its bytes, signatures and hashes are already checked."""

    peer: PeerId
    message: Message


@dataclass(frozen=True, slots=True)
class Misbehaved:
    """The driver dropped something of `peer`: a key of `score.WEIGHTS` says what."""

    peer: PeerId
    reason: str


@dataclass(frozen=True, slots=True)
class Pulled:
    """The payload with this hash has arrived and is verified; the driver holds it."""

    payload: Hash


@dataclass(frozen=True, slots=True)
class PullFailed:
    """The payload could not be had from `peer`."""

    peer: PeerId
    payload: Hash
    reason: str


@dataclass(frozen=True, slots=True)
class Stored:
    """The record (and its payload) asked for by `Store` is on disk."""

    record: Record


@dataclass(frozen=True, slots=True)
class StoreFailed:
    """It is not, and nothing half-written counts. `reason`: "log full" or "disk: …".

    After "disk: …" the driver keeps the log in memory: own updates go on under a fresh log id.
    """

    record: Record
    reason: str


@dataclass(frozen=True, slots=True)
class StoreMended:
    """What was in memory is on the disk as well, and what comes will be."""


@dataclass(frozen=True, slots=True)
class Lost:
    """The log can't give this update any more, though it was held: it must be fetched anew."""

    key: Key


@dataclass(frozen=True, slots=True)
class WorkerReady:
    """The worker holds the model at `frontier` with this fingerprint, and waits."""

    frontier: tuple[tuple[Author, int], ...]
    fingerprint: tuple[int, int]


@dataclass(frozen=True, slots=True)
class WorkerDown:
    """The worker died; the driver decides about restarting it."""

    reason: str


@dataclass(frozen=True, slots=True)
class TurnDone:
    """The worker finished `turn`; its update waits to be numbered (`payload` None: dropped)."""

    turn: int
    kind: str
    payload: Hash | None
    size: int
    inline: bytes | None
    report: Report


@dataclass(frozen=True, slots=True)
class Applied:
    """The worker's model is now at `frontier`, with `fingerprint` read from its tensor.

    `deltas`: each applied update's own change of the fingerprint, so that F at any earlier frontier
    is a sum; under a turn rule they are no update's own, and only all of them together are what the
    fingerprint moved by. `refused`: updates that count zero because they break a rule of the run.
    """

    frontier: tuple[tuple[Author, int], ...]
    fingerprint: tuple[int, int]
    deltas: tuple[tuple[Key, tuple[int, int]], ...]
    refused: tuple[tuple[Key, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Rebuilt:
    """The worker rebuilt its model from the log after `Rebuild`; sums start anew."""

    applied: Applied


@dataclass(frozen=True, slots=True)
class Reported:
    """What this peer tells of itself changed, and not by a turn."""

    report: Report


@dataclass(frozen=True, slots=True)
class Pause:
    """The operator: stop training, go on serving."""


@dataclass(frozen=True, slots=True)
class Resume:
    """The operator: train again."""


@dataclass(frozen=True, slots=True)
class Depart:
    """The operator: leave for good."""


@dataclass(frozen=True, slots=True)
class Moved:
    """The daemon's own addresses changed."""

    addresses: tuple[str, ...]


Event = (
    Start
    | Tick
    | LinkUp
    | LinkDown
    | Received
    | Misbehaved
    | Pulled
    | PullFailed
    | Stored
    | StoreFailed
    | StoreMended
    | Lost
    | WorkerReady
    | WorkerDown
    | TurnDone
    | Applied
    | Rebuilt
    | Reported
    | Pause
    | Resume
    | Depart
    | Moved
)

# ---------------------------------------------------------------- effects: what the core asks for


@dataclass(frozen=True, slots=True)
class Send:
    """Say `message` to `peer`: over the link, else as one call to its known addresses."""

    peer: PeerId
    message: Message


@dataclass(frozen=True, slots=True)
class Connect:
    """Open a link to `peer` at one of `addresses`; ends in `LinkUp` or `LinkDown`."""

    peer: PeerId
    addresses: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Disconnect:
    """Close the link to `peer`; refuse new ones for `ban` seconds."""

    peer: PeerId
    reason: str
    ban: float = 0.0


@dataclass(frozen=True, slots=True)
class Pull:
    """Fetch a payload of `size` bytes from `peer`; ends in `Pulled` or `PullFailed`."""

    peer: PeerId
    payload: Hash
    size: int


@dataclass(frozen=True, slots=True)
class Store:
    """Keep this record and its payload (inline, pulled, or none when it is never fetched).

    `own`: fsync before answering `Stored`. Proofs are stored the same way.
    """

    record: Record
    own: bool = False


@dataclass(frozen=True, slots=True)
class KeepAdmission:
    """Keep this admission proof with the log."""

    peer: PeerId
    admission: bytes


@dataclass(frozen=True, slots=True)
class StartTurn:
    """Let the worker apply everything held up to `frontier`, then train `turn`.

    `members`: N_w of design 3.2; the author's weight is 1 / N_w.
    `publish` False: the peer is not drawn for this turn; what it learns goes into its next update.
    `lag`: how many turns the others made while we made our last one, beyond that one.
    """

    turn: int
    members: float
    frontier: tuple[tuple[Author, int], ...]
    publish: bool = True
    lag: float = 0.0


@dataclass(frozen=True, slots=True)
class Discard:
    """The last turn's update is not published: residual and momentum go back to its start."""


@dataclass(frozen=True, slots=True)
class Apply:
    """The worker is idle: let it apply everything held up to `frontier`."""

    frontier: tuple[tuple[Author, int], ...]


@dataclass(frozen=True, slots=True)
class Subtract:
    """A proof closed `author`'s log at `number`: take out what was applied from there on.

    `counts`: (first, last) of the numbers whose contribution the model holds.
    """

    author: Author
    first: int
    last: int


@dataclass(frozen=True, slots=True)
class Rebuild:
    """Fingerprints disagree: let the worker rebuild its model from the log."""


@dataclass(frozen=True, slots=True)
class DropSnapshot:
    """The snapshot that this peer began with is wrong, or of no more use: forget it for good.

    A `Rebuild` follows; the model then stands on the log alone.
    """


@dataclass(frozen=True, slots=True)
class Wake:
    """Call `handle(Tick())` at this time; a later `Wake` replaces the earlier one."""

    at: float


@dataclass(frozen=True, slots=True)
class Happened:
    """Something worth a line in /events: joined, failed, recovered, left, equivocation …"""

    what: str
    peer: PeerId | None = None
    details: dict[str, str | int | float] = field(default_factory=dict)


Effect = (
    Send
    | Connect
    | Disconnect
    | Pull
    | Store
    | KeepAdmission
    | StartTurn
    | Discard
    | Apply
    | Subtract
    | Rebuild
    | DropSnapshot
    | Wake
    | Happened
)
