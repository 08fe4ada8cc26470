"""Links to both sides and over 1/2, 1/4, 1/8 … of the ring: few links and short ways."""

from collections.abc import Sequence

from shoal.gossip.names import PeerId
from shoal.gossip.topology import SPACE, across, beside, topology


@topology("exponential")
class Exponential:
    """±1 by place, ±2ᵏ by number."""

    def neighbours(self, ring: Sequence[PeerId], me: PeerId, most: int) -> list[PeerId]:
        """Return the peers beside us, then those across ever shorter distances."""
        if len(ring) <= 4:
            return beside(ring, me, 2)[:most]
        found = dict.fromkeys(beside(ring, me, 1))
        for power in _powers(len(ring), most):
            for peer in across(ring, me, SPACE >> power):
                if len(found) < most:
                    found[peer] = None
        return list(found)


def _powers(size: int, most: int) -> list[int]:
    """Return which halvings of the ring to cross, spread evenly when there is no room for all."""
    longest = max(size.bit_length() - 2, 1)  # an arc of 2**-longest holds two to four peers
    room = max((most - 2) // 2, 1)
    if longest <= room:
        return list(range(1, longest + 1))
    return sorted({1 + round(i * (longest - 1) / max(room - 1, 1)) for i in range(room)})
