"""May the next turn start, with what weight, and who is drawn for it? (design 3.2 and 3.3)"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median_low

from shoal.gossip.frontier import Counts, Frontier
from shoal.gossip.limits import Limits
from shoal.gossip.names import Author, PeerId, digest

MOST_ABSENT_LOOKBACK = 64


def drawn(turn: int, peer: PeerId, participation: float) -> bool:
    """Say whether `peer` publishes in `turn`: the same draw on every machine."""
    if participation >= 1:
        return True
    ticket = digest(turn.to_bytes(8, "big") + peer)
    return int.from_bytes(ticket[:8], "big") < int(participation * 2**64)


def first_turn(pace: str, stated: Sequence[int]) -> int:
    """Return the turn at which a joiner starts, from the latest turns its members have stated."""
    if not stated:
        return 1
    if pace == "lockstep":
        # The largest turn that a majority of the members has reached.
        return sorted(stated, reverse=True)[len(stated) // 2] + 1
    return median_low(stated) + 1


@dataclass(slots=True)
class Weight:
    """N_w: how many peers share the work. Rises at once, falls by at most 1 % a turn."""

    min_peers: int
    weight_turns: int
    heard: dict[PeerId, int] = field(default_factory=dict)
    """Author → our own turn when its last update came."""
    value: float = 0.0

    def hear(self, author: PeerId, own_turn: int) -> None:
        """An update of `author` came in during our `own_turn`."""
        self.heard[author] = own_turn

    def at(self, own_turn: int, publishing: int) -> float:
        """Return N_w for a turn that starts now; `publishing` members train, ourselves included."""
        oldest = own_turn - self.weight_turns
        self.heard = {p: t for p, t in self.heard.items() if t >= oldest}
        target = float(max(self.min_peers, len(self.heard), publishing, 1))
        self.value = max(target, 0.99 * self.value)
        return self.value


@dataclass(slots=True)
class Free:
    """Nobody waits."""

    frontier: Frontier
    reproducible: bool = False

    def ready(self, turn: int, members: Iterable[PeerId], now: float) -> bool:
        """Say that the turn may start."""
        return True

    def wake(self) -> float | None:
        """Nothing to wait for."""
        return None

    def begin(self, turn: int, applied: Mapping[Author, int]) -> Counts:
        """Return the frontier to train `turn` from: all there is."""
        return self.frontier.counts()


@dataclass(slots=True)
class Lockstep:
    """After turn t wait for the turn-t updates of those drawn, then train on turns ≤ t exactly."""

    frontier: Frontier
    limits: Limits
    min_peers: int
    participation: float
    _exact: bool = True
    """False once somebody was waited for in vain, or a model was not that of its turn."""
    _turn: int = 0
    _deadline: float | None = None
    _begun: tuple[int, Counts] = (0, ())
    """The last turn that began, and from where."""

    @property
    def reproducible(self) -> bool:
        """Whether every turn so far began from exactly the updates of the turns before."""
        turn, counts = self._begun
        # What came later than its turn's end was missing: from a joiner, or after a false alarm.
        return self._exact and (not turn or self.frontier.up_to_turn(turn - 1) == counts)

    def ready(self, turn: int, members: Iterable[PeerId], now: float) -> bool:
        """Say whether `turn` may start; `members` train or have finished, we among them."""
        if turn != self._turn:
            self._turn, self._deadline = turn, now + self.limits.lockstep_deadline
        complete = self._complete(turn - 1, list(members))
        late = self._deadline is not None and now >= self._deadline
        if not complete and late:
            self._exact = False
        return complete or late

    def wake(self) -> float | None:
        """Return when waiting ends."""
        return self._deadline

    def _complete(self, turn: int, members: list[PeerId]) -> bool:
        if turn < 1:
            return len(members) >= self.min_peers
        latest = latest_turns(self.frontier)
        awaited = (m for m in members if drawn(turn, m, self.participation))
        return all(latest.get(m, 0) >= turn for m in awaited if self._takes_part(m, turn, latest))

    def _takes_part(self, member: PeerId, turn: int, latest: dict[PeerId, int]) -> bool:
        """A member is waited for once it has published the last turn it was drawn for."""
        first = max(turn - MOST_ABSENT_LOOKBACK, 0)
        for earlier in range(turn - 1, first, -1):
            if drawn(earlier, member, self.participation):
                return latest.get(member, 0) >= earlier
        return first == 0 or member in latest

    def begin(self, turn: int, applied: Mapping[Author, int]) -> Counts:
        """Return the frontier to train `turn` from; the model holds `applied` by now."""
        self._exact = self.reproducible
        counts = self.frontier.up_to_turn(turn - 1)
        known = dict(counts)
        # Who joins or resumes has applied what there was, later turns too.
        self._exact &= all(n <= known.get(author, 0) for author, n in applied.items())
        self._begun = (turn, counts)
        return counts


def latest_turns(frontier: Frontier, *, signed: bool = False) -> dict[PeerId, int]:
    """Return the largest turn of each peer's updates; `signed`: of those that we hold ourselves."""
    latest: dict[PeerId, int] = {}
    for author in frontier.authors():
        log = frontier.logs[author]
        if turn := log.signed if signed else log.latest:
            latest[author.peer] = max(latest.get(author.peer, 0), turn)
    return latest


Pace = Free | Lockstep


def make(name: str, frontier: Frontier, limits: Limits, min_peers: int, part: float) -> Pace:
    """Return the pace called `name`."""
    if name == "free":
        return Free(frontier)
    if name == "lockstep":
        return Lockstep(frontier, limits, min_peers, part)
    raise ValueError(f"unknown pace {name!r}; known are free, lockstep")
