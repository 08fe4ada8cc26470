"""The median of what peers say along each direction."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from shoal.compression.codec import Contribution
from shoal.training.turn_rule import Said, check_quorum, column_by_column, turn_rule


@turn_rule("median")
@dataclass(frozen=True, slots=True)
class Median:
    """n · median of n votes, coordinate by coordinate (Yin, Chen, Ramchandran & Bartlett,
    "Byzantine-robust distributed learning: towards optimal statistical rates", 2018,
    arXiv 1803.01498).

    The median of an even number is the mean of the two in the middle, so n · median is an integer;
    it is rounded down where zeros that fill a quorum have made it none. With fewer than half of the
    votes lies, it lies between two honest numbers.

    Costs: it uses the middle alone, so that without liars it is as noisy as a mean of two thirds of
    the voters (for normal noise: π/2 times the variance), and where honest slopes are skewed it is
    not their mean. So under data that differ from peer to peer it loses accuracy without any liar.
    Guarantees nothing once liars and false identities are half of a turn's voters, nor against a
    bias within the spread of the honest.
    """

    quorum: int = 0
    """Votes that a turn needs: those that are missing count as zero. 0: more than half of
    `swarm.min_peers`."""

    alone: ClassVar[bool] = False
    along: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        check_quorum(self.quorum)

    def total(self, updates: Sequence[Contribution]) -> Contribution | None:
        """Return n times the median."""
        return column_by_column(updates, self.quorum, _medians)


def _medians(said_NK: Said, votes: int) -> Said:
    count, sorted_NK = len(said_NK), np.sort(said_NK, axis=0)
    total_K: Said = votes * (sorted_NK[(count - 1) // 2] + sorted_NK[count // 2]) // 2
    return total_K
