"""What the core needs to know of a run and of what the store held at start. Plain values."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from shoal.gossip.names import Key, PeerId, RunId
from shoal.gossip.records import Record
from shoal.gossip.snapshot import Snapshot
from shoal.gossip.view import View


@dataclass(frozen=True, slots=True)
class Run:
    """The part of a run file that decides who does what when; `observe` alone is local."""

    id: RunId
    turns: int = 0
    """0: for ever."""
    min_peers: int = 1
    participation: float = 1.0
    pace: str = "free"
    combined: bool = False
    """There is a turn rule: what an update adds to the model depends on the others of its turn."""
    topology: str = "exponential"
    most_bytes: Mapping[str, int] = field(default_factory=dict)
    """Kind of update → most bytes of its payload. Other kinds and larger sizes count zero."""
    observe: bool = False

    def fetched(self, kind: str, size: int) -> bool:
        """Say whether a payload like this is worth having: decided by the record alone."""
        return size <= self.most_bytes.get(kind, -1)


@dataclass(frozen=True, slots=True)
class Held:
    """What the store held at start."""

    records: Iterable[Record] = ()
    """Updates in file order."""
    proofs: Iterable[Record] = ()
    admissions: Mapping[PeerId, bytes] = field(default_factory=dict)
    recall: Callable[[Key], Record | None] = lambda key: None
    """Read the record of an update back from the log; None if it is not there."""
    snapshot: Snapshot | None = None
    """What this peer began with in place of the updates below it."""
    view: View | None = None
    """Members known beforehand (the simulator starts large swarms so)."""
