"""Everybody is linked to the next on both sides: few links, long ways."""

from collections.abc import Sequence

from shoal.gossip.names import PeerId
from shoal.gossip.topology import beside, topology


@topology("ring")
class Ring:
    """The two peers beside us."""

    def neighbours(self, ring: Sequence[PeerId], me: PeerId, most: int) -> list[PeerId]:
        """Return the peers one place away."""
        return beside(ring, me, 1)[:most]
