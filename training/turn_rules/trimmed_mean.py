"""The mean of what peers say along each direction, without the largest and the smallest."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from shoal.compression.codec import Contribution
from shoal.training.turn_rule import Said, check_quorum, column_by_column, exactly, turn_rule


@turn_rule("trimmed_mean")
@dataclass(frozen=True, slots=True)
class TrimmedMean:
    """n · mean of those of n votes that are neither among the ⌊n · cut⌋ smallest nor the ⌊n · cut⌋
    largest, coordinate by coordinate, rounded down to an integer (Yin et al. 2018, as `median`).

    Zeros that fill a quorum are among those that are cut or kept. With at most ⌊n · cut⌋ liars all
    that is left lies between honest numbers.

    Costs: the share of the honest that is cut with the liars, so more noise than the mean and less
    than the median; under data that differ from peer to peer, accuracy, though less than the
    median. Guarantees nothing against more liars than `cut` says, which a small turn has soon: of
    three voters a quarter is none at all.
    """

    cut: float = 0.25
    """Share of the voters cut off at each end, below a half: a bound on the share of liars."""

    quorum: int = 0
    """Votes that a turn needs: those that are missing count as zero. 0: more than half of
    `swarm.min_peers`."""

    alone: ClassVar[bool] = False
    along: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        if not 0 <= self.cut < 0.5:
            raise ValueError(f"cut = {self.cut}; use a share from 0 to less than 0.5")
        check_quorum(self.quorum)

    def total(self, updates: Sequence[Contribution]) -> Contribution | None:
        """Return n times the trimmed mean."""
        return column_by_column(updates, self.quorum, self._trimmed)

    def _trimmed(self, said_NK: Said, votes: int) -> Said:
        count, cut = len(said_NK), exactly(self.cut)
        off = count * cut.numerator // cut.denominator
        left = count - 2 * off
        sum_K: Said = np.sort(said_NK, axis=0)[off : count - off].sum(0)
        # ⌊votes · sum / left⌋ in two steps, since n · sum may not fit 64 bits.
        return votes * (sum_K // left) + votes * (sum_K % left) // left
