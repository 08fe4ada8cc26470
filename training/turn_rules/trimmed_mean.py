"""The mean of what peers say along each direction, without the largest and the smallest."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from shoal.compression.codec import Contribution
from shoal.training.turn_rule import Said, column_by_column, exactly, turn_rule


@turn_rule("trimmed_mean")
@dataclass(frozen=True, slots=True)
class TrimmedMean:
    """n · mean of those n voters that are neither among the ⌊n · cut⌋ smallest nor the ⌊n · cut⌋
    largest, coordinate by coordinate, rounded down to an integer (Yin et al. 2018, as `median`).

    With at most ⌊n · cut⌋ liars all that is left lies between honest numbers.

    Costs: the share of the honest that is cut with the liars, so more noise than the mean and less
    than the median; under data that differ from peer to peer, accuracy, though less than the
    median. Guarantees nothing against more liars than `cut` says, which a small turn has soon: of
    three voters a quarter is none at all.
    """

    cut: float = 0.25
    """Share of the voters cut off at each end, below a half: a bound on the share of liars."""

    alone: ClassVar[bool] = False
    along: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        if not 0 <= self.cut < 0.5:
            raise ValueError(f"cut = {self.cut}; use a share from 0 to less than 0.5")

    def total(self, updates: Sequence[Contribution]) -> Contribution | None:
        """Return n times the trimmed mean."""
        return column_by_column(updates, self._trimmed)

    def _trimmed(self, said_NK: Said) -> Said:
        count, cut = len(said_NK), exactly(self.cut)
        off = count * cut.numerator // cut.denominator
        left = count - 2 * off
        sum_K: Said = np.sort(said_NK, axis=0)[off : count - off].sum(0)
        # ⌊n · sum / left⌋ in two steps, since n · sum may not fit 64 bits.
        return count * (sum_K // left) + count * (sum_K % left) // left
