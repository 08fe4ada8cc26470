"""The median of what peers say along each direction."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from shoal.compression.codec import Contribution
from shoal.training.turn_rule import Said, column_by_column, turn_rule


@turn_rule("median")
@dataclass(frozen=True, slots=True)
class Median:
    """n · median of n voters, coordinate by coordinate (Yin, Chen, Ramchandran & Bartlett,
    "Byzantine-robust distributed learning: towards optimal statistical rates", 2018,
    arXiv 1803.01498).

    The median of an even number is the mean of the two in the middle, so n · median is an integer:
    nothing is rounded. With fewer than half of the voters lying it lies between two honest numbers.

    Costs: it uses the middle alone, so that without liars it is as noisy as a mean of two thirds of
    the voters (for normal noise: π/2 times the variance), and where honest slopes are skewed it is
    not their mean. So under data that differ from peer to peer it loses accuracy without any liar.
    Guarantees nothing once liars and false identities are half of a turn's voters, nor against a
    bias within the spread of the honest.
    """

    alone: ClassVar[bool] = False
    along: ClassVar[bool] = True

    def total(self, updates: Sequence[Contribution]) -> Contribution | None:
        """Return n times the median."""
        return column_by_column(updates, _medians)


def _medians(said_NK: Said) -> Said:
    count, sorted_NK = len(said_NK), np.sort(said_NK, axis=0)
    low_K, high_K = sorted_NK[(count - 1) // 2], sorted_NK[count // 2]
    total_K: Said = count * low_K if count % 2 else count // 2 * (low_K + high_K)
    return total_K
