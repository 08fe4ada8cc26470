"""Push records along eager links, announce them on lazy ones, graft and prune (Plumtree).

The eager links form a tree that repairs itself: a record that arrives twice prunes the second link;
one that is announced but does not arrive in `graft_timeout` is fetched and makes its link eager.
"""

import random
from dataclasses import dataclass, field

from shoal.gossip.limits import Limits
from shoal.gossip.messages import Announce, Graft, Prune, Push
from shoal.gossip.names import Hash, PeerId
from shoal.gossip.outbox import Outbox
from shoal.gossip.records import Record
from shoal.gossip.score import Rates
from shoal.gossip.timers import Timers

PUSH_INTERVAL = 0.05
"""Seconds between two pushes on a link when records come fast: they travel together."""
FIRST_EAGER = 3
"""New links start eager while there are fewer eager ones."""
DUPLICATES = 6
"""Surplus of duplicates at which a link is pruned."""
NEWS_WEIGHT = 2
"""Duplicates that one new record excuses."""
PRUNE_INTERVAL = 0.05
"""Seconds between two prunes of ours."""
RECENT_BYTES = 2 << 20
"""Of records remembered to answer grafts; parsed they weigh up to six times as much."""
MOST_SOURCES = 4
"""Announcers remembered for one missing record."""


@dataclass(slots=True)
class Dissemination:
    """Links and what travels on them."""

    limits: Limits
    rng: random.Random
    timers: Timers
    out: Outbox
    links: dict[PeerId, bool] = field(default_factory=dict)
    """Open links: eager or not."""
    recent: dict[Hash, Record] = field(default_factory=dict)
    """The last records passed on, to answer grafts."""
    _recent_bytes: int = 0
    _budget: Rates = field(init=False)
    """What we may push to each link: who passes on a flood would be taken for its source."""
    _seen: set[Hash] = field(default_factory=set)
    _seen_before: set[Hash] = field(default_factory=set)
    _queued: dict[PeerId, list[Hash]] = field(default_factory=dict)
    _absent: dict[Hash, list[PeerId]] = field(default_factory=dict)
    """Announced, not yet here: who has it."""

    def __post_init__(self) -> None:
        """Stay below what receivers take, see `Scores.admit`."""
        rate = 0.8 * self.limits.records_per_second
        self._budget = Rates(rate, 4 * rate, 2 * self.limits.neighbours)

    def seen(self, record: Hash) -> bool:
        """Say whether this record was taken in lately."""
        return record in self._seen or record in self._seen_before

    def see(self, record: Hash) -> None:
        """Remember that this record was taken in, or that it need not be."""
        self._seen.add(record)
        if self._absent.pop(record, None):
            self.timers.cancel("graft", record)
        if len(self._seen) > self.limits.seen // 2:
            self._seen_before, self._seen = self._seen, set()

    def forget(self, record: Hash) -> None:
        """Take this record again when it comes again: what was to come with it did not."""
        self._seen.discard(record)
        self._seen_before.discard(record)

    def forget_all(self) -> None:
        """Let records that were taken in be taken in once more."""
        self._seen, self._seen_before = set(), set()

    def link_up(self, peer: PeerId) -> None:
        """A link is open; the first few start eager, more would only make cycles."""
        self.links[peer] = sum(self.links.values()) < FIRST_EAGER

    def link_down(self, peer: PeerId) -> None:
        """A link is gone."""
        self.links.pop(peer, None)
        self._queued.pop(peer, None)
        self._duplicates.pop(peer, None)

    def forward(self, record: Record, source: PeerId | None, holders: set[PeerId]) -> None:
        """Pass a new record on to every link but its source and those known to hold it."""
        self.remember(record)
        queued = False
        for peer, eager in self.links.items():
            if peer == source or peer in holders:
                continue
            if eager and self._budget.take(peer, 1, self.now):
                if self.now >= self._push_after:
                    self.out.push(peer, record)
                else:
                    self._batches.setdefault(peer, []).append(record)
            else:
                queue = self._queued.setdefault(peer, [])
                if len(queue) < self.limits.recent:
                    queue.append(record.id)
                    queued = True
        if queued:
            self._wake_announcer()
        if self._batches:
            self.timers.hurry("push", self._push_after)
        elif self.now >= self._push_after:
            self._push_after = self.now + PUSH_INTERVAL

    def _push(self) -> None:
        self._push_after = self.now + PUSH_INTERVAL
        batches, self._batches = self._batches, {}
        for peer, records in batches.items():
            if peer in self.links:
                most = self.limits.push_records
                for i in range(0, len(records), most):
                    self.out.send(peer, Push(tuple(records[i : i + most])))

    def remember(self, record: Record) -> None:
        """Keep a record to answer grafts."""
        if self.recent.setdefault(record.id, record) is record:
            self._recent_bytes += len(record.raw)
        while len(self.recent) > self.limits.recent or self._recent_bytes > RECENT_BYTES:
            self._recent_bytes -= len(self.recent.pop(next(iter(self.recent))).raw)

    def _wake_announcer(self) -> None:
        if not self.timers.pending("announce"):
            self.timers.set("announce", self.now + self.limits.announce_interval)

    _batches: dict[PeerId, list[Record]] = field(default_factory=dict)
    """What waits for the next push."""
    _push_after: float = 0.0
    _duplicates: dict[PeerId, int] = field(default_factory=dict)
    """Duplicates beyond what news excuse, by link."""
    _prune_after: float = 0.0
    now: float = 0.0
    """Time of the current event."""

    def on_time(self, what: str, whom: bytes) -> bool:
        """Do what is due; say whether it was ours to do."""
        match what:
            case "announce":
                for peer, ids in self._queued.items():
                    self.out.send(peer, Announce(tuple(ids)))
                self._queued = {}
            case "push":
                self._push()
            case "graft":
                self._graft(Hash(whom))
            case _:
                return False
        return True

    def judge(self, peer: PeerId, news: int, duplicates: int) -> None:
        """`peer` pushed so many records that we lacked and that we had.

        A link that mostly brings duplicates is pruned, one at a time: with many authors at once
        Plumtree's prune at the first duplicate cuts a cycle in two places, and grafts it again.
        """
        if peer not in self.links:
            return
        if news and not self.links[peer]:
            self.links[peer] = True
        score = max(0, self._duplicates.get(peer, 0) + duplicates - NEWS_WEIGHT * news)
        self._duplicates[peer] = score
        if score >= DUPLICATES and self.links[peer] and self.now >= self._prune_after:
            self._prune_after = self.now + PRUNE_INTERVAL
            self._duplicates[peer] = 0
            self.links[peer] = False
            self.out.send(peer, Prune())

    def on_prune(self, peer: PeerId) -> None:
        """`peer` gets our records from somebody else."""
        if peer in self.links:
            self.links[peer] = False

    def on_announce(self, peer: PeerId, ids: tuple[Hash, ...]) -> None:
        """`peer` has these; wait a little for those we lack to come along the tree."""
        for record in ids:
            if self.seen(record):
                continue
            sources = self._absent.get(record)
            if sources is None:
                if len(self._absent) >= self.limits.recent:
                    return
                self._absent[record] = [peer]
                # Drawn, so that of a branch cut off one peer asks first and passes on to the rest:
                # if all asked at once, all their links would join the tree and make cycles.
                wait = self.limits.graft_timeout * (1 + 3 * self.rng.random())
                self.timers.set("graft", self.now + wait, record)
            elif peer not in sources and len(sources) < MOST_SOURCES:
                sources.append(peer)

    def _graft(self, record: Hash) -> None:
        sources = self._absent.get(record)
        if sources is None:
            return
        if not sources:
            del self._absent[record]
            return
        peer = sources[0]
        # One question for all that this peer has and that is late.
        late = [r for r, s in self._absent.items() if s and s[0] == peer]
        for one in late[: self.limits.push_records]:
            self._absent[one].pop(0)
            self.timers.set("graft", self.now + self.limits.graft_timeout, one)
        if peer in self.links:
            self.links[peer] = True
        self.out.send(peer, Graft(tuple(late[: self.limits.push_records])))

    def on_graft(self, peer: PeerId) -> None:
        """`peer` wants our records pushed."""
        if peer in self.links:
            self.links[peer] = True
