"""Does the swarm agree? Fingerprints at frontiers stated by others, as sums of what updates added.

The fingerprint is linear: F(V) = F(own) − Σ F(updates above V). So a statement (V, F(V)) of another
peer is checked as soon as our model has passed V, although nobody is ever at one frontier at one
moment (design 3.4).
"""

from array import array
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import islice

from shoal.gossip.events import Applied
from shoal.gossip.frontier import Counts, Frontier, Rows
from shoal.gossip.names import Author, PeerId
from shoal.gossip.records import Progress

Fingerprint = tuple[int, int]
LANE = (1 << 64) - 1
MOST_RULES = 32
"""Rules counted one by one."""
MOST_CHECKS = 8
"""Statements compared after one step of the model: the check is spread, not skipped."""
STRIKES = 3
"""Disagreeing statements of one peer after our own rebuild before the swarm is `diverged`."""


@dataclass(slots=True)
class Agreement:
    """The worker's model as a sum, and what others say about theirs."""

    frontier: Frontier
    applied: dict[Author, int] = field(default_factory=dict)
    fingerprint: Fingerprint | None = None
    refused: dict[str, int] = field(default_factory=dict)
    """Updates that count zero, by the rule they break."""
    statements: dict[PeerId, Progress] = field(default_factory=dict)
    verdicts: dict[PeerId, bool] = field(default_factory=dict)
    strikes: dict[PeerId, int] = field(default_factory=dict)
    _base: dict[Author, int] = field(default_factory=dict)
    _deltas: dict[Author, "array[int]"] = field(default_factory=dict)
    _unchecked: dict[PeerId, int] = field(default_factory=dict)
    """Whose statement is still to be compared, and how many updates it counts."""

    # ------------------------------------------------------------ our model

    def start(self, counts: Counts, fingerprint: Fingerprint) -> None:
        """The worker holds this; what it summed before is not known one by one."""
        self.applied = dict(counts)
        self.fingerprint = fingerprint
        self._base, self._deltas = dict(counts), {}

    def stop(self) -> None:
        """There is no model at the moment."""
        self.applied, self.fingerprint = {}, None
        self._base, self._deltas = {}, {}

    def step(self, event: Applied) -> bool:
        """The worker's model moved; say whether its fingerprint moved by what was added."""
        if self.fingerprint is None:
            return True
        expected = self.fingerprint
        counts = dict(event.frontier)
        # What the worker started with is known as a whole only: a cut into it can't be foretold.
        known = all(counts.get(a, 0) >= n for a, n in self._base.items())
        for author in sorted(self.applied):
            expected = _add(expected, self._cut(author, counts.get(author, 0)), -1)
        for (author, number), delta in sorted(event.deltas):
            expected = _add(expected, self._append(author, number, delta), +1)
        for _, reason in event.refused:
            # What follows the colon is the author's doing: it may be different every time.
            rule = reason.partition(":")[0][:32]
            rule = rule if rule in self.refused or len(self.refused) < MOST_RULES else "other"
            self.refused[rule] = self.refused.get(rule, 0) + 1
        self.applied, self.fingerprint = counts, event.fingerprint
        return not known or expected == event.fingerprint

    def _cut(self, author: Author, count: int) -> Fingerprint:
        """Take out what lies above `count` (a closing was subtracted); return its sum."""
        if count >= self.applied.get(author, 0):
            return (0, 0)
        base = self._base.get(author, 0)
        total = self._above(author, max(count, base))
        del self._deltas.get(author, array("Q"))[2 * max(count - base, 0) :]
        self._base[author] = min(base, count)
        return total

    def _append(self, author: Author, number: int, delta: Fingerprint) -> Fingerprint:
        deltas = self._deltas.setdefault(author, array("Q"))
        place = number - 1 - self._base.get(author, 0)
        if place < len(deltas) // 2:
            return (0, 0)
        deltas.extend([0, 0] * (place - len(deltas) // 2))
        deltas.extend(delta)
        return delta

    def _above(self, author: Author, count: int) -> Fingerprint:
        deltas = self._deltas.get(author)
        if deltas is None:
            return (0, 0)
        first = 2 * (count - self._base.get(author, 0))
        return (sum(deltas[first::2]) & LANE, sum(deltas[first + 1 :: 2]) & LANE)

    def at(self, counts: Mapping[Author, int]) -> Fingerprint | None:
        """Return our model's fingerprint at an earlier frontier; None if it is not known."""
        value = self.fingerprint
        if value is None or any(n > self.applied.get(a, 0) for a, n in counts.items()):
            return None
        for author in self.applied:
            count = counts.get(author, 0)
            if count < self._base.get(author, 0):
                return None
            if count < self.applied[author]:
                value = _add(value, self._above(author, count), -1)
        return value

    def clean(self) -> bool:
        """Say whether the model holds nothing that a closing took out of the ledger."""
        closed = self.frontier.closed
        return not any((c := closed(a)) and n >= c for a, n in self.applied.items())

    # ------------------------------------------------------------ others' models

    def heard(self, progress: Progress, *, compare: bool) -> bool:
        """Take in a statement; say whether it is newer than the last of that peer."""
        last = self.statements.get(progress.peer)
        if last is not None and last.sequence >= progress.sequence:
            return False
        self.statements[progress.peer] = progress
        if compare:
            self._unchecked[progress.peer] = sum(count for _, count in progress.frontier)
        return True

    def check(self, rows: Rows) -> list[PeerId]:
        """Compare statements that we have passed; return who disagrees."""
        if self.fingerprint is None or not self.clean():
            return []
        wrong = []
        # Who states more than we have applied is certainly ahead of us: not worth a comparison.
        passed = sum(self.applied.values())
        ready = (p for p, total in self._unchecked.items() if total <= passed)
        for peer in list(islice(ready, MOST_CHECKS)):
            total = self._unchecked.pop(peer)
            agrees = self._compare(self.statements[peer])
            if agrees is None:
                self._unchecked[peer] = total  # to the end of the queue
                continue
            self.verdicts[peer] = agrees
            rows.state_all(peer, self.statements[peer].frontier)
            if agrees:
                self.strikes.pop(peer, None)
            else:
                wrong.append(peer)
        return wrong

    def _compare(self, progress: Progress) -> bool | None:
        counts = dict(progress.frontier)
        own = self.at(counts)
        if own is None or self.frontier.hash_at(counts) != progress.frontier_hash:
            return None
        return own == progress.fingerprint

    def agrees(self) -> bool | None:
        """Return whether all statements compared so far agree with us; None before the first."""
        return all(self.verdicts.values()) if self.verdicts else None

    def forget(self, peers: Iterable[PeerId]) -> None:
        """These peers no longer count."""
        for peer in peers:
            for known in (self.statements, self.verdicts, self.strikes, self._unchecked):
                known.pop(peer, None)


def _add(a: Fingerprint, b: Fingerprint, sign: int) -> Fingerprint:
    return ((a[0] + sign * b[0]) & LANE, (a[1] + sign * b[1]) & LANE)
