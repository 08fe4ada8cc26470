"""Which updates are in, by turn, and how a turn's contribution changes as they come and go.

For runs with a turn rule. Most rules are asked for a turn's total before and after. Of one that
only scales updates by their norms (`Scaling`) those alone are looked at whose share changes, one
after another.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol

from shoal.compression.codec import Combination, Contribution, squares_of
from shoal.training import contribution
from shoal.training.turn_rule import Scaling, TurnRule

SMALL = 1 << 12
"""Bytes of an update that is kept as it is; larger ones are recalled."""
TOTALS = 2
"""Turns whose contribution is kept, those touched last: most updates are of these."""

Key = tuple[bytes, int, int]
"""Peer, log and number of an update."""
Recall = Callable[[Key], Contribution]
"""Decodes an update anew that was taken in before."""


class Turns:
    """The updates of every turn that are in; large ones are recalled if there is a `recall`."""

    def __init__(self, rule: TurnRule, recall: Recall | None) -> None:
        self._rule = rule
        self._recall = recall
        self._sums: _Sums = _Shares(rule) if isinstance(rule, Scaling) else _Totals(rule)
        self._members: dict[int, dict[Key, Contribution | None]] = {}
        """None: to be recalled."""

    def emptied(self) -> "Turns":
        """Return one that holds nothing."""
        return Turns(self._rule, self._recall)

    def take_in(self, turn: int, updates: Mapping[Key, Contribution]) -> Contribution | None:
        """Let updates be in; return by how much the turn's contribution changes."""
        members = self._members.setdefault(turn, {})
        before = _votes(members)
        news = {key: update for key, update in updates.items() if key not in members}
        members.update(news)
        change = self._change(turn, before, members, members)
        for key, update in news.items():
            if self._recall is not None and _bytes(update) > SMALL:
                members[key] = None
        return change

    def take_out(self, turn: int, keys: Iterable[Key]) -> Contribution | None:
        """Let updates be in no longer; return by how much the turn's contribution changes."""
        members, gone = self._members.pop(turn, {}), set(keys)
        left = {key: update for key, update in members.items() if key not in gone}
        if left:
            self._members[turn] = left
        return self._change(turn, _votes(members), left, members)

    def recalls(self, turn: int, key: Key) -> bool:
        """Say whether this update is in and may have to be recalled."""
        members = self._members.get(turn, {})
        return key in members and members[key] is None

    def _change(
        self,
        turn: int,
        before: list[Key],
        now: Iterable[Key],
        members: Mapping[Key, Contribution | None],
    ) -> Contribution | None:
        """Return what it changes that of these members others are in now."""

        def look(key: Key) -> Contribution:
            update = members[key]
            if update is None:
                assert self._recall is not None
                return self._recall(key)
            return update

        after = _votes(now)
        if set(before) == set(after):
            return None
        return self._sums.change(turn, before, after, look)


class _Sums(Protocol):
    """What turns contribute."""

    def change(
        self, turn: int, before: Sequence[Key], after: Sequence[Key], look: Recall
    ) -> Contribution | None:
        """Return by how much a turn's contribution changes when other updates count."""
        ...


class _Totals:
    """By the totals of the turns touched last."""

    def __init__(self, rule: TurnRule) -> None:
        self._rule = rule
        self._totals: dict[int, Contribution | None] = {}
        """The latest at the end."""

    def change(
        self, turn: int, before: Sequence[Key], after: Sequence[Key], look: Recall
    ) -> Contribution | None:
        """Return total - total."""
        if turn in self._totals:
            old = self._totals.pop(turn)
        else:
            old = self._rule.total([look(key) for key in before])
        new = self._totals[turn] = self._rule.total([look(key) for key in after])
        if len(self._totals) > TOTALS:
            del self._totals[next(iter(self._totals))]
        return contribution.difference(new, old)


class _Shares:
    """By the squared norms of all updates: one integer each, kept as long as they count."""

    def __init__(self, rule: Scaling) -> None:
        self._rule = rule
        self._squares: dict[int, dict[Key, int]] = {}

    def change(
        self, turn: int, before: Sequence[Key], after: Sequence[Key], look: Recall
    ) -> Contribution | None:
        """Return the sum of what changes of each update."""
        squares = self._squares.pop(turn, {})
        old = self._shares(before, squares)
        for key in after:
            if key not in squares:
                squares[key] = squares_of(look(key))
        new = self._shares(after, squares)
        if after:
            self._squares[turn] = {key: squares[key] for key in after}
        total = contribution.Adding()
        for key in {**old, **new}:
            parts = new.get(key, 0), old.get(key, 0)
            if parts[0] != parts[1]:
                total.add(contribution.rescaled(look(key), *parts))
        return total.sum()

    def _shares(self, keys: Sequence[Key], squares: Mapping[Key, int]) -> dict[Key, int]:
        return dict(zip(keys, self._rule.shares([squares[key] for key in keys]), strict=True))


def _votes(keys: Iterable[Key]) -> list[Key]:
    """Return of each peer's updates the one that counts: that of the smallest log and number."""
    votes: dict[bytes, Key] = {}
    for key in keys:
        votes[key[0]] = min(key, votes.get(key[0], key))
    return list(votes.values())


def _bytes(update: Contribution) -> int:
    if isinstance(update, Combination):
        return update.keys.nbytes + update.coefficients.nbytes
    return update.values.nbytes + (0 if update.indices is None else update.indices.nbytes)
