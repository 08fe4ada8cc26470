"""What peers say along each direction, cut to what most of them say."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from shoal.compression.codec import Contribution
from shoal.training.turn_rule import Said, check_quorum, column_by_column, exactly, turn_rule

INT32_MAX = 2**31 - 1


@turn_rule("clip")
@dataclass(frozen=True, slots=True)
class Clip:
    """The sum of n votes, each cut to ± ⌊factor · m⌋, where m is the median of the magnitudes
    along that direction (of an even number the lower of the two in the middle), zeros that fill a
    quorum among them.

    Clipping against the turn itself, as Allouah et al. do with norms ("Adaptive gradient clipping
    for robust federated learning", 2024, arXiv 2405.14432), one direction at a time.

    Costs: what honest peers say beyond the median magnitude is cut as well, so that steps get
    shorter and rare large slopes lose most; less accuracy than the median under data that differ
    from peer to peer, since everybody's sign counts. Guarantees less: a liar is not left out but
    made as small as the others, so that each of them cancels about one honest voter; of 8 voters
    two liars leave half of the sum. Nothing once liars are half of a turn's voters.
    """

    factor: float = 1.0
    """How many median magnitudes a voter may say; more trusts more."""

    quorum: int = 0
    """Votes that a turn needs: those that are missing count as zero. 0: more than half of
    `swarm.min_peers`."""

    alone: ClassVar[bool] = False
    along: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        if not 0 < self.factor <= 1e6:
            raise ValueError(f"factor = {self.factor}; use one above 0, at most a million")
        check_quorum(self.quorum)

    def total(self, updates: Sequence[Contribution]) -> Contribution | None:
        """Return the sum of what is left."""
        return column_by_column(updates, self.quorum, self._clipped)

    def _clipped(self, said_NK: Said, votes: int) -> Said:
        factor = exactly(self.factor)
        medians = np.sort(np.abs(said_NK), axis=0)[(len(said_NK) - 1) // 2].tolist()
        # In Python's integers: a factor of many digits times a magnitude may not fit 64 bits.
        most = [min(m * factor.numerator // factor.denominator, INT32_MAX) for m in medians]
        most_K = np.array(most, np.int64)
        clipped_K: Said = said_NK.clip(-most_K, most_K).sum(0)
        return clipped_K
