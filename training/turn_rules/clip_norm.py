"""Updates scaled down to the median norm of their turn: for every kind of update."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import isqrt
from typing import ClassVar

from shoal.compression.codec import Contribution, squares_of
from shoal.training import contribution
from shoal.training.turn_rule import check_quorum, turn_rule


@turn_rule("clip_norm")
@dataclass(frozen=True, slots=True)
class ClipNorm:
    """The sum of n updates, each scaled down to the median norm of the turn if it is longer.

    Norms are compared by their exact squares s (those that `exchange.clip` bounds); the median m is
    of an even number the lower of the two in the middle, zeros that fill a quorum among them. A
    longer update is multiplied by ⌊2^30 · √(m/s)⌋ / 2^30, every number rounded toward zero, so that
    no result is longer than √m.
    (Sun et al., "Can you really backdoor federated learning?", 2019, arXiv 1911.07963, clip to a
    fixed norm; SparseLoCo's code clips to the median of the peers' norms.)

    Costs: honest updates above the median are shortened, and their authors never send what was cut
    off: their residuals believe it sent. The worker keeps every payload of the run, beyond 64 MiB
    in a file beside the log, and an integer for each, s. When one more arrives, those of its turn
    are decoded again, one by one, whose share changes: above the median, so at most n of them and
    usually half. That takes memory for some five vectors of the model's size. Guarantees a bound on
    length alone: a liar still chooses the direction of an honest step, and a quarter of liars
    pushing together weighs as much as a quarter of the honest. Half of the voters sending nothing
    stops the others.
    """

    quorum: int = 0
    """Votes that a turn needs: those that are missing count as zero; 0: none. With one, a peer
    trains on without its own last turn until the others have published theirs: what it learns
    twice counts twice."""

    alone: ClassVar[bool] = False
    along: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        check_quorum(self.quorum)

    def total(self, updates: Sequence[Contribution]) -> Contribution | None:
        """Return the sum of what is left."""
        shares = self.shares([squares_of(update) for update in updates])
        return contribution.added([*map(contribution.scaled, updates, shares)])

    def shares(self, squares: Sequence[int]) -> list[int]:
        """Return by how much each update is multiplied, in units of 2^-30."""
        silent = [0] * (self.quorum - len(squares))
        all_squares = sorted([*squares, *silent])
        middle = all_squares[(len(all_squares) - 1) // 2] if squares else 0
        return [_WHOLE if s <= middle else _fraction(middle, s) for s in squares]


_WHOLE = 1 << contribution.BITS


def _fraction(middle: int, squares: int) -> int:
    """Return ⌊2^30 · √(middle / squares)⌋."""
    return isqrt((middle << 2 * contribution.BITS) // squares)
