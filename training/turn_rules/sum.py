"""Each update by itself: the default."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from shoal.compression.codec import Contribution
from shoal.training import contribution
from shoal.training.turn_rule import turn_rule


@turn_rule("sum")
@dataclass(frozen=True, slots=True)
class Sum:
    """The updates added up.

    Costs nothing: no update is ever looked at again. Guarantees nothing against liars but `clip`:
    each can push by so much an update, always in the same direction, as often as it publishes.
    """

    alone: ClassVar[bool] = True
    along: ClassVar[bool] = False

    def total(self, updates: Sequence[Contribution]) -> Contribution | None:
        """Return the sum."""
        return contribution.added(updates)
