"""Find out what is missing and ask for it: anti-entropy with one random peer at a time.

A round costs two hashes when both hold the same. Otherwise both state their frontier: on a link the
lines that changed since the last statement (checked by the hash of the whole, so that a lost one
shows), else all of it. Holes are asked for by number; where running hashes differ the author has
equivocated, and bisection finds the number. Views are compared by bucket. Every answer may be lost:
nothing is remembered but what the next round may ask again.
"""

import random
from bisect import bisect_left
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field

from shoal.gossip.arrivals import Arrivals
from shoal.gossip.dissemination import Dissemination
from shoal.gossip.frontier import Frontier, Rows, entries_hash
from shoal.gossip.limits import Limits
from shoal.gossip.membership import Membership
from shoal.gossip.messages import (
    AskDigest,
    AskHashes,
    Digest,
    Entry,
    Graft,
    Hashes,
    Message,
    Push,
    ViewDigest,
    ViewIds,
    Want,
)
from shoal.gossip.names import Author, Hash, Key, PeerId
from shoal.gossip.outbox import Outbox
from shoal.gossip.records import Alive, Record, Standing, Update
from shoal.gossip.snapshot import Line
from shoal.gossip.timers import Timers
from shoal.gossip.view import BUCKETS, View

SMALL_VIEW = 64
"""Views of so many records are compared by their ids at once, without buckets."""
MOST_BUCKETS = 32
"""Buckets compared in one round."""
PROBES = 16
"""Running hashes asked for in one step of a bisection."""
ANSWER_BYTES = 1 << 20
"""Records sent in one answer."""


@dataclass(slots=True)
class Link:
    """What both ends of a link have stated to each other."""

    stated: dict[Author, tuple[int, int]] = field(default_factory=dict)
    """Author → (count, closed) as we stated it last."""
    heard: dict[Author, Entry] = field(default_factory=dict)


@dataclass(slots=True)
class Repair:
    """Anti-entropy of frontiers and views."""

    limits: Limits
    rng: random.Random
    timers: Timers
    out: Outbox
    frontier: Frontier
    rows: Rows
    view: View
    membership: Membership
    arrivals: Arrivals
    dissemination: Dissemination
    recall: Callable[[Key], Record | None]
    dispute: Callable[[PeerId], None] = lambda peer: None
    """Called when `peer` holds other updates where the snapshot ends that we began with."""
    links: dict[PeerId, Link] = field(default_factory=dict)
    rounds: int = 0
    """Statements of others taken in whole: 0 means that we know nothing yet."""
    targets: dict[Author, int] = field(default_factory=dict)
    """What the first of them held: a joiner trains when it holds as much."""
    _teacher: PeerId | None = None
    """Who that was."""
    _asked: dict[Author, tuple[int, float]] = field(default_factory=dict)
    _answers: dict[PeerId, float] = field(default_factory=dict)
    """Until when pushes of a peer are answers to us, not gossip."""

    # ------------------------------------------------------------ rounds

    def on_time(self, what: str, now: float) -> bool:
        """Do what is due; say whether it was ours to do."""
        if what != "repair":
            return False
        pace = max(1.0, len(self.view.ring) / 1024)
        jitter = 0.75 + self.rng.random() / 2
        self.timers.set("repair", now + self.limits.repair_interval * pace * jitter)
        self._answers = {p: t for p, t in self._answers.items() if t > now}
        self._asked = {a: v for a, v in self._asked.items() if v[1] > now}
        if peer := self._partner():
            self.out.send(peer, self._statement(peer, reply=True))
        return True

    def _partner(self) -> PeerId | None:
        """Draw a neighbour, whom differences suffice, or anybody."""
        if self.links and self.rng.random() < 0.5:
            return self.rng.choice(sorted(self.links))
        some = self.membership.sample(1, without=self.membership.me)
        return some[0] if some else next(iter(sorted(self.links)), None)

    def link_up(self, peer: PeerId) -> None:
        """Begin with a whole new comparison."""
        self.links[peer] = Link()
        self.out.send(peer, self._statement(peer, reply=True))

    def link_down(self, peer: PeerId) -> None:
        """Forget what was stated on the link."""
        self.links.pop(peer, None)

    def _statement(self, peer: PeerId, *, reply: bool) -> Digest:
        """State what changed on a link, hashes alone to others."""
        link = self.links.get(peer)
        # The first word on a link, and any to strangers, is the hash: mostly that suffices.
        entries = self._difference(link) if link is not None and link.stated else ()
        return Digest(entries, False, self.frontier.hash, self.view.hash, reply)

    def _whole(self, peer: PeerId, *, reply: bool) -> Digest:
        link, entries = self.links.get(peer), self.frontier.entries()
        if link is not None:
            link.stated = {e.author: (e.count, e.closed) for e in entries}
        return Digest(entries, True, self.frontier.hash, self.view.hash, reply)

    def _difference(self, link: Link) -> tuple[Entry, ...]:
        changed = []
        for author in self.frontier.authors():
            log = self.frontier.logs[author]
            if link.stated.get(author, (0, 0)) != (log.count, log.closed):
                link.stated[author] = (log.count, log.closed)
                changed.append(self.frontier.entry(author))
        return tuple(changed)

    # ------------------------------------------------------------ statements of others

    def on_message(self, peer: PeerId, message: Message, now: float) -> None:
        """Answer a question or learn from a statement."""
        match message:
            case Digest():
                self._on_digest(peer, message, now)
            case AskDigest():
                self.out.send(peer, self._whole(peer, reply=False))
            case Want():
                self._on_want(peer, message)
            case AskHashes():
                self._on_ask_hashes(peer, message)
            case Hashes():
                self._on_hashes(peer, message, now)
            case ViewDigest():
                self._on_view_digest(peer, message, now)
            case ViewIds():
                self._on_view_ids(peer, message, now)
            case _:
                pass

    def _on_digest(self, peer: PeerId, digest: Digest, now: float) -> None:
        if len(digest.entries) > self.limits.logs:
            self.out.count("digest-oversize")
            return
        follows = self._note(peer, digest)
        same = digest.frontier_hash == self.frontier.hash
        entries: Collection[Entry] = digest.entries
        if follows and not same and (link := self.links.get(peer)) is not None:
            # What we asked for may be lost, or too much for one answer: look at all it has stated.
            entries = link.heard.values()
        self._learn(peer, entries, now)
        if same:
            self._same(peer)
        else:
            self._differ(peer, digest, entries, follows=follows)
        if digest.view_hash != self.view.hash and digest.reply:
            self._compare_views(peer, now)

    def _note(self, peer: PeerId, digest: Digest) -> bool:
        """Keep what a neighbour stated; say whether we now know all that it holds."""
        link = self.links.get(peer)
        if link is None:
            return digest.full
        if digest.full:
            link.heard = {e.author: e for e in digest.entries}
            return True
        for entry in digest.entries:
            link.heard[entry.author] = entry
        if len(link.heard) > self.limits.logs:
            # No frontier is so long: forget what it says, ask for the whole.
            link.heard = {}
        return entries_hash(link.heard[a] for a in sorted(link.heard)) == digest.frontier_hash

    def _same(self, peer: PeerId) -> None:
        """`peer` holds exactly what we hold."""
        for author, count in self.frontier.counts():
            self.rows.state(peer, author, count)
        if (link := self.links.get(peer)) is not None:
            # It may have said more before, and dropped it with the snapshot that it stood on.
            ours = self.frontier.count
            link.heard = {a: e for a, e in link.heard.items() if e.count <= ours(a)}
        self._first_round(peer, {})

    def _differ(
        self, peer: PeerId, digest: Digest, entries: Iterable[Entry], *, follows: bool
    ) -> None:
        if follows or digest.full:
            self._first_round(peer, self._ahead(entries))
        linked = peer in self.links
        if digest.reply:
            stranger = not digest.full and not linked
            link = self.links.get(peer)
            whole = not linked or (link is not None and not link.stated)
            answer = self._whole if whole else self._statement
            self.out.send(peer, answer(peer, reply=stranger))
        if linked and not follows:
            self.out.send(peer, AskDigest())

    def _ahead(self, entries: Iterable[Entry]) -> dict[Author, int]:
        return {e.author: e.count for e in entries if e.count > self.frontier.count(e.author)}

    def _first_round(self, peer: PeerId, ahead: dict[Author, int]) -> None:
        if not ahead and not self.frontier.logs and self._joins(peer):
            return  # two who know nothing yet: that there is nothing is not their word to give
        if not self.rounds:
            self.targets, self._teacher = ahead, peer
        elif peer == self._teacher:  # it may hold less now
            left = self.targets.items()
            self.targets = {a: min(n, ahead[a]) for a, n in left if a in ahead}
        self.rounds += 1

    def _joins(self, peer: PeerId) -> bool:
        return self.membership.standing_of(peer) is Standing.JOINING

    def caught_up(self) -> bool:
        """Say whether we hold what the first peer that told us held."""
        frontier = self.frontier
        self.targets = {
            a: n
            for a, n in self.targets.items()
            if frontier.count(a) < n and not (0 < frontier.closed(a) <= frontier.count(a) + 1)
        }
        return self.rounds > 0 and not self.targets

    def _learn(self, peer: PeerId, entries: Iterable[Entry], now: float) -> None:
        """Ask for what `peer` has and we lack; find forks."""
        wants: list[Want] = []
        for entry in entries:
            log = self.frontier.logs.get(entry.author)
            count = log.count if log is not None else 0
            if entry.count <= count and log is not None:
                if entry.count < log.summed:
                    continue  # nothing is known of these one by one
                if log.hash_at(entry.count) == entry.hash:
                    self.rows.state(peer, entry.author, entry.count)
                elif entry.count == log.summed:
                    self.dispute(peer)
                else:  # below a closing too: the smallest number of a fork must stand
                    self._seek_fork(peer, entry.author, log.summed, entry.count)
                continue
            self.arrivals.holds(peer, entry.author, entry.count, entry.summed)
            wants += self._wants(entry, now)
        for want in wants[: self.limits.wants]:
            last = max(want.last, self._asked.get(want.author, (0, 0.0))[0])
            self._asked[want.author] = (last, now + 4 * self.limits.graft_timeout)
            self.ask(peer, want, now)

    def _wants(self, theirs: Entry, now: float) -> list[Want]:
        author = theirs.author
        asked, until = self._asked.get(author, (0, 0.0))
        ranges = self.frontier.missing(author, theirs.count)
        waiting = self.arrivals.waiting.get(author, {})
        wants = []
        for first, last in ranges:
            first = max(first, theirs.summed + 1)
            if until > now:
                first = max(first, asked + 1)
            while first <= last and first in waiting:
                first += 1
            if first <= last:
                wants.append(Want(author, first, last))
        return wants

    def begin_again(self) -> None:
        """Hold less than was stated: state all anew, and catch up as a joiner does."""
        for link in self.links.values():
            link.stated = {}
        self.rounds, self.targets, self._asked = 0, {}, {}

    def go_on(self, peer: PeerId, records: Sequence[Record], now: float) -> None:
        """`peer` filled an answer with news: ask at once for what did not fit into it."""
        if len(records) < self.limits.push_records or not self.arrivals.roomy():
            return
        match records[0].statement, records[-1].statement:
            case Update(author=first), Update(author=author, number=number) if first == author:
                last = self._asked.get(author, (0, 0.0))[0]
                if number < last:
                    self._asked[author] = (last, now + 4 * self.limits.graft_timeout)
                    self.ask(peer, Want(author, number + 1, last), now)
            case _:
                pass

    def ask(self, peer: PeerId, question: Message, now: float) -> None:
        """Ask, and take what `peer` pushes in the next seconds for the answer."""
        self._answers[peer] = now + 4 * self.limits.graft_timeout
        self.out.send(peer, question)

    def answering(self, peer: PeerId, now: float) -> bool:
        """Say whether what `peer` pushes now may be an answer to us."""
        return self._answers.get(peer, 0.0) > now

    def holders(self, author: Author, number: int) -> set[PeerId]:
        """Return the neighbours that have stated to hold this update."""
        return {
            peer
            for peer, link in self.links.items()
            if (entry := link.heard.get(author)) and entry.summed < number <= entry.count
        }

    def lacks(self, peer: PeerId, lines: Iterable[Line]) -> bool:
        """Say whether a neighbour has stated what it holds, and that is less than these."""
        heard = self.links[peer].heard if peer in self.links else {}
        return bool(heard) and any(
            self.rows.holds(peer, line.author) < line.count
            and ((entry := heard.get(line.author)) is None or entry.count < line.count)
            for line in lines
        )

    def out_of_reach(self) -> int:
        """Return how many updates we lack that all neighbours who hold them have as a sum alone."""
        sums: dict[Author, int] = {}
        for link in self.links.values():
            for author, entry in link.heard.items():
                if entry.count > self.frontier.count(author):
                    sums[author] = min(sums.get(author, entry.summed), entry.summed)
        lacking = ((n, self.frontier.count(a), self.frontier.closed(a)) for a, n in sums.items())
        return sum(max(0, (min(n, end - 1) if end else n) - have) for n, have, end in lacking)

    def lag(self) -> int:
        """Return how many updates our neighbours state to hold that we do not."""
        frontier, most = self.frontier, dict[Author, int]()
        for link in self.links.values():
            for author, entry in link.heard.items():
                if entry.count > frontier.count(author):
                    most[author] = max(most.get(author, 0), entry.count)
        return sum(
            max(0, (min(n, c - 1) if (c := frontier.closed(a)) else n) - frontier.count(a))
            for a, n in most.items()
        )

    def cost(self, question: Message) -> int:
        """Return about how many records it takes to answer."""
        match question:
            case Want(author, first, last):
                last = min(last, self.frontier.count(author))
                return 1 + max(0, min(last - first + 1, self.limits.push_records))
            case Digest() | AskDigest():
                return 1 + len(self.frontier.authors()) // 16
            case ViewDigest() | ViewIds():
                return 1 + self.view.size() // 4
            case _:
                return 1

    # ------------------------------------------------------------ updates asked for

    def _on_want(self, peer: PeerId, want: Want) -> None:
        records: list[Record] = []
        size, last = 0, min(want.last, self.frontier.count(want.author))
        for number in range(max(want.first, self.frontier.summed(want.author) + 1), last + 1):
            record = self.recall(Key(want.author, number))
            if record is None:
                continue
            records.append(record)
            size += len(record.raw)
            if len(records) == self.limits.push_records or size > ANSWER_BYTES:
                break
        if records:
            self.out.send(peer, Push(tuple(records)))

    # ------------------------------------------------------------ forks

    def _seek_fork(self, peer: PeerId, author: Author, low: int, high: int) -> None:
        """Our running hashes agree after `low` updates and differ after `high`."""
        summed = self.frontier.summed(author)
        steps = min(PROBES, high - low - 1)
        if steps < 1 and (low > summed or not summed):
            self.out.send(peer, Want(author, high, high))
            return
        counts = {low + (high - low) * i // (steps + 1) for i in range(1, steps + 1)}
        if low == summed > 0:
            counts.add(summed)  # it may be here that we part
        self.out.send(peer, AskHashes(author, tuple(sorted({*counts, high} - {0}))))

    def _on_ask_hashes(self, peer: PeerId, ask: AskHashes) -> None:
        log = self.frontier.logs.get(ask.author)
        if log is None:
            return
        first = max(log.summed, 1)
        counts = tuple(n for n in ask.counts[: 2 * PROBES] if first <= n <= log.count)
        self.out.send(peer, Hashes(ask.author, counts, tuple(log.hash_at(n) for n in counts)))

    def _on_hashes(self, peer: PeerId, answer: Hashes, now: float) -> None:
        log = self.frontier.logs.get(answer.author)
        if log is None:
            return
        low, high = log.summed, 0
        for count, theirs in sorted(zip(answer.counts, answer.hashes, strict=False)):
            if not max(log.summed, 1) <= count <= log.count:
                break
            if log.hash_at(count) != theirs:
                high = count
                break
            low = count
        if high and high == log.summed:
            self.dispute(peer)
        elif high == low + 1:
            self.ask(peer, Want(answer.author, high, high), now)
        elif high:
            self._seek_fork(peer, answer.author, low, high)

    # ------------------------------------------------------------ views

    def _compare_views(self, peer: PeerId, now: float) -> None:
        if self.view.size() <= SMALL_VIEW:
            self.ask(peer, ViewIds((), tuple(self.view.within(()))), now)
        else:
            self.ask(peer, ViewDigest(tuple(self.view.buckets)), now)

    def _on_view_digest(self, peer: PeerId, theirs: ViewDigest, now: float) -> None:
        pairs = enumerate(zip(theirs.buckets, self.view.buckets, strict=False))
        differ = [i for i, (a, b) in pairs if a != b]
        # Start anywhere, so that a bucket that cannot be repaired does not hide the others.
        start = bisect_left(differ, self.rng.randrange(BUCKETS))
        chosen = sorted((differ[start:] + differ[:start])[:MOST_BUCKETS])
        if chosen:
            self.ask(peer, ViewIds(tuple(chosen), tuple(self.view.within(chosen))), now)

    def _on_view_ids(self, peer: PeerId, theirs: ViewIds, now: float) -> None:
        """Push what `peer` lacks, ask for what we lack."""
        ours = self.view.within(theirs.buckets)
        known = set(theirs.ids)
        for record in [r for i, r in ours.items() if i not in known]:
            self.out.push(peer, record)
            match record.statement:
                case Alive(peer=subject):
                    if doubt := self.membership.doubt_record(subject):
                        self.out.push(peer, doubt)
        lacking = [i for i in theirs.ids if i not in ours and not self._outdated(i)]
        if lacking:
            self.ask(peer, Graft(tuple(lacking[: self.limits.push_records])), now)

    def _outdated(self, record: Hash) -> bool:
        """Say whether we had this record and have a newer one now."""
        return self.dissemination.seen(record)

    def on_graft(self, peer: PeerId, ids: tuple[Hash, ...]) -> None:
        """Send the records asked for by id, as far as we still have them."""
        recent, absent = self.dissemination.recent, []
        for record in ids[: self.limits.push_records]:
            if record in recent:
                self.out.push(peer, recent[record])
            else:
                absent.append(record)
        if absent:
            view = self.view.within(())
            for record in absent:
                if record in view:
                    self.out.push(peer, view[record])
