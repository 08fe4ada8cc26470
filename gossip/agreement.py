"""Does the swarm agree? Fingerprints at frontiers stated by others, as sums of what updates added.

The fingerprint is linear: F(V) = F(own) − Σ F(updates above V). So a statement (V, F(V)) of another
peer is checked as soon as our model has passed V, although nobody is ever at one frontier at one
moment (design 3.4).

Under a turn rule (design 3.5) what an update adds depends on those of its turn that came before it:
only whole turns add up. So a statement is compared if it cuts through no turn of ours, and peers
state what their model is after the turns that all have published. Besides, a statement about a
frontier at which our own model once stood is compared in any case: at the latest when all is quiet,
and all stand at one.
"""

from array import array
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import islice

from shoal.gossip.events import Applied
from shoal.gossip.frontier import Counts, Frontier, Rows
from shoal.gossip.names import Author, Hash, Key, PeerId
from shoal.gossip.records import Progress

Fingerprint = tuple[int, int]
LANE = (1 << 64) - 1
MOST_RULES = 32
"""Rules counted one by one."""
MOST_CHECKS = 8
"""Statements compared after one step of the model: the check is spread, not skipped."""
MOST_STANDS = 512
"""Frontiers of our own model that are remembered under a turn rule."""
MOST_ABOVE = 4096
"""Updates by which we may be ahead of a statement that is compared by turns."""
STRIKES = 3
"""Disagreeing statements of one peer after our own rebuild before the swarm is `diverged`."""


@dataclass(slots=True)
class Agreement:
    """The worker's model as a sum, and what others say about theirs."""

    frontier: Frontier
    combined: bool = False
    """The run has a turn rule: what updates add is no sum of what each does."""
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
    _stands: dict[Hash, Fingerprint] = field(default_factory=dict)
    """Under a turn rule: frontiers at which our model stood, by hash, the latest at the end."""
    _turns: dict[int, tuple[int, Fingerprint]] | None = None
    """Under a turn rule: how many updates of each turn we have applied, and what they add; None:
    something was taken out, or was there before."""
    _over: int = 0
    """The last turn that we have stated as over."""

    # ------------------------------------------------------------ our model

    def start(self, counts: Counts, fingerprint: Fingerprint) -> None:
        """The worker holds this; what it summed before is not known one by one."""
        self.applied = dict(counts)
        self.fingerprint = fingerprint
        self._base, self._deltas = dict(counts), {}
        self._stands, self._turns = {}, None if counts else {}
        self._stand()

    def stop(self) -> None:
        """There is no model at the moment."""
        self.applied, self.fingerprint = {}, None
        self._base, self._deltas, self._stands = {}, {}, {}

    def step(self, event: Applied) -> bool:
        """The worker's model moved; say whether its fingerprint moved by what was added."""
        if self.fingerprint is None:
            return True
        counts = dict(event.frontier)
        expected = self._after(event, counts) if self.combined else self._sum(event, counts)
        for _, reason in event.refused:
            # What follows the colon is the author's doing: it may be different every time.
            rule = reason.partition(":")[0][:32]
            rule = rule if rule in self.refused or len(self.refused) < MOST_RULES else "other"
            self.refused[rule] = self.refused.get(rule, 0) + 1
        self.applied, self.fingerprint = counts, event.fingerprint
        self._stand()
        return expected is None or expected == event.fingerprint

    def _sum(self, event: Applied, counts: Mapping[Author, int]) -> Fingerprint | None:
        """Return what the fingerprint must be now; None if that can't be known."""
        assert self.fingerprint is not None
        expected = self.fingerprint
        # What the worker started with is known as a whole only: a cut into it can't be foretold.
        known = all(counts.get(a, 0) >= n for a, n in self._base.items())
        for author in sorted(self.applied):
            expected = _add(expected, self._cut(author, counts.get(author, 0)), -1)
        for (author, number), delta in sorted(event.deltas):
            expected = _add(expected, self._append(author, number, delta), +1)
        return expected if known else None

    def _after(self, event: Applied, counts: Mapping[Author, int]) -> Fingerprint | None:
        """Do the same under a turn rule: what is taken out has no change of its own."""
        expected = self.fingerprint
        if expected is None or any(counts.get(a, 0) < n for a, n in self.applied.items()):
            self._turns = None
            return None
        for key, delta in event.deltas:
            expected = _add(expected, delta, +1)
            self._add_to_turn(key, delta)
        return expected

    def _add_to_turn(self, key: Key, delta: Fingerprint) -> None:
        turn = self.frontier.turn(*key)
        if self._turns is None or key.number <= self.applied.get(key.author, 0):
            return
        if not turn:
            self._turns = None  # a closing came in between
            return
        count, total = self._turns.get(turn, (0, (0, 0)))
        self._turns[turn] = count + 1, _add(total, delta, +1)

    def _stand(self) -> None:
        """Remember, under a turn rule, at which frontier the model stands."""
        if not self.combined or self.fingerprint is None:
            return
        at = self.frontier.hash_at({a: n for a, n in self.applied.items() if n})
        if at is not None:
            self._stands.pop(at, None)
            self._stands[at] = self.fingerprint
            if len(self._stands) > MOST_STANDS:
                del self._stands[next(iter(self._stands))]

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
        if value is None or not self._passed(counts):
            return None
        if self.combined:
            at = self.frontier.hash_at(counts)
            return self._stands.get(at, self._without(counts)) if at is not None else None
        for author in self.applied:
            count = counts.get(author, 0)
            if count < self._base.get(author, 0):
                return None
            if count < self.applied[author]:
                value = _add(value, self._above(author, count), -1)
        return value

    def _without(self, counts: Mapping[Author, int]) -> Fingerprint | None:
        """Return the fingerprint without the turns above `counts`; None if one is there in part."""
        ahead = sum(self.applied.values()) - sum(counts.values())
        if self._turns is None or self.fingerprint is None or ahead > MOST_ABOVE:
            return None
        above: dict[int, int] = {}
        for author, count in self.applied.items():
            for number in range(counts.get(author, 0) + 1, count + 1):
                turn = self.frontier.turn(author, number)
                above[turn] = above.get(turn, 0) + 1
        value = self.fingerprint
        for turn, updates in above.items():
            count, change = self._turns.get(turn, (0, (0, 0)))
            if count != updates:
                return None
            value = _add(value, change, -1)
        return value

    def tell(self, over: int) -> tuple[Counts, Fingerprint] | None:
        """Return the frontier to tell others of and our fingerprint there; None if there is none.

        It is where the model stands; under a turn rule, if all who train have published their turns
        up to `over` and that is news, it is where these turns are in and no others.
        """
        if self.fingerprint is None or not self.clean():
            return None
        if self.combined and over > self._over:
            counts = self.frontier.up_to_turn(over)
            value = self.at(dict(counts))
            if value is not None:
                self._over = over
                return counts, value
        return tuple(sorted((a, n) for a, n in self.applied.items() if n)), self.fingerprint

    def _passed(self, counts: Mapping[Author, int]) -> bool:
        """Say whether our model holds all of this."""
        return all(n <= self.applied.get(a, 0) for a, n in counts.items())

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
            total, said = self._unchecked.pop(peer), self.statements[peer]
            agrees = self._compare(said)
            if agrees is None:
                if self.combined and self._holds(said):
                    # We were never there and never will be; its next statement may fare better.
                    rows.state_all(peer, said.frontier)
                else:
                    self._unchecked[peer] = total  # to the end of the queue
                continue
            self.verdicts[peer] = agrees
            rows.state_all(peer, said.frontier)
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

    def _holds(self, progress: Progress) -> bool:
        """Say whether our model holds the very updates that this statement is about."""
        counts = dict(progress.frontier)
        return self._passed(counts) and self.frontier.hash_at(counts) == progress.frontier_hash

    def forget(self, peers: Iterable[PeerId]) -> None:
        """These peers no longer count."""
        for peer in peers:
            for known in (self.statements, self.verdicts, self.strikes, self._unchecked):
                known.pop(peer, None)


def _add(a: Fingerprint, b: Fingerprint, sign: int) -> Fingerprint:
    return ((a[0] + sign * b[0]) & LANE, (a[1] + sign * b[1]) & LANE)
