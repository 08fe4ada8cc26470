"""Everybody is linked to everybody, up to the bound: for small swarms on good networks."""

from collections.abc import Sequence

from shoal.gossip.names import PeerId
from shoal.gossip.topology import beside, topology


@topology("complete")
class Complete:
    """All peers, the nearest on the ring first."""

    def neighbours(self, ring: Sequence[PeerId], me: PeerId, most: int) -> list[PeerId]:
        """Return everybody else, up to `most`."""
        return beside(ring, me, min(len(ring) // 2, (most + 1) // 2))[:most]
