"""What a transport tells its owner, and asks of it: the seam to node/driver.py."""

from collections.abc import Sequence
from typing import Protocol

from shoal.gossip.messages import Message
from shoal.gossip.names import Hash, PeerId

Buffer = bytes | memoryview
"""Bytes to serve; a memoryview over a mapped file costs no memory."""


class Handler(Protocol):
    """The owner of a transport. All calls come on the transport's event loop."""

    def on_link_up(self, peer: PeerId, admission: bytes) -> None:
        """A link to `peer` is open; `admission` is its verified proof."""

    def on_link_down(self, peer: PeerId, reason: str) -> None:
        """The link to `peer` is gone, or `connect` failed; `reason` is a text for people."""

    def on_message(self, peer: PeerId, message: Message) -> Sequence[Message]:
        """`peer` said `message`; return what to answer at once."""

    def on_misbehaviour(self, peer: PeerId, reason: str) -> None:
        """Something of `peer` was dropped; `reason` is one of `MISBEHAVIOUR`."""

    def payload(self, payload: Hash) -> Buffer | None:
        """Return the payload with this hash, None when it is not here."""

    def genesis(self) -> bytes:
        """Return the run's genesis."""

    async def snapshot(self) -> bytes:
        """Return what a joiner may begin with in place of the log; empty when that is better."""

    async def initial(self) -> Buffer | None:
        """Return the initial model's integers (int32, little endian), None while there are none."""
