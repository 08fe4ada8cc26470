"""Payloads on their way here: pulled in chunks, resumed elsewhere when a source fails, verified."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable

from shoal.gossip.events import Misbehaved, Pull, Pulled, PullFailed
from shoal.gossip.limits import Limits
from shoal.gossip.names import Hash, PeerId, digest
from shoal.node.errors import PeerError

log = logging.getLogger(__name__)


SLOWEST = 8 << 10
"""Bytes a second below which a source counts as one that does not deliver."""

LARGE = 4 << 20
"""Hashing more bytes than this would hold up the loop for more than some milliseconds."""

Source = Callable[[PeerId, Hash, int, int], AsyncIterator[bytes]]
"""The transport's `pull`: peer, payload, size, offset → chunks; raises PeerError."""


class Fetcher:
    """Pull payloads and hold them until the store takes them.

    Arrived and partial payloads together stay below `Limits.staging_bytes`. A partial payload
    survives the failure of its source: the next source goes on where it stopped.
    """

    def __init__(
        self,
        source: Source,
        feed: Callable[[Pulled | PullFailed | Misbehaved], object],
        limits: Limits,
    ) -> None:
        self.source = source
        self.feed = feed
        self.limits = limits
        self.arrived: dict[Hash, bytes] = {}
        self.partial: dict[tuple[Hash, int], bytearray] = {}
        """By payload and declared size: a record may declare a wrong one."""
        self._reading: dict[int, bytearray] = {}
        """What is being written to, by its id: each has one source."""
        self.bytes_in = 0

    def take(self, payload: Hash) -> bytes | None:
        """Hand over a payload that has arrived, and forget it."""
        return self.arrived.pop(payload, None)

    async def fetch(self, pull: Pull) -> str:
        """Perform one `Pull`, which ends in `Pulled` or `PullFailed`; return how it went."""
        if self._staged() + pull.size > self.limits.staging_bytes and self.partial:
            self._drop_oldest_partial(without=pull.payload)
        buffer = self.partial.pop((pull.payload, pull.size), bytearray())
        resumed = len(buffer) > 0
        self._reading[id(buffer)] = buffer
        try:
            await self._read(pull, buffer)
            data = bytes(buffer)
            genuine = await _matches(data, pull.payload)
        except (PeerError, TimeoutError) as error:
            if buffer:
                self.partial[pull.payload, pull.size] = buffer
            return self._failed(pull, error.reason if isinstance(error, PeerError) else "timeout")
        finally:
            del self._reading[id(buffer)]
        if not genuine and resumed:
            # Whose bytes are wrong is not known: take all of them from this source.
            return await self.fetch(pull)
        return self._verified(pull, data, genuine=genuine)

    async def _read(self, pull: Pull, buffer: bytearray) -> None:
        chunks = self.source(pull.peer, pull.payload, pull.size, len(buffer))
        left = pull.size - len(buffer)
        # Who sends a byte now and then would hold one of our few pulls for an hour.
        async with asyncio.timeout(2 * self.limits.pull_timeout + left / SLOWEST):
            await self._read_on(pull, buffer, chunks)

    async def _read_on(self, pull: Pull, buffer: bytearray, chunks: AsyncIterator[bytes]) -> None:
        while len(buffer) < pull.size:
            async with asyncio.timeout(self.limits.pull_timeout):
                chunk = await anext(chunks, b"")
            if not chunk:
                raise PeerError("truncated", "the transfer ended early")
            if len(buffer) + len(chunk) > pull.size:
                raise PeerError("oversize", "more bytes came than were declared")
            buffer += chunk
            self.bytes_in += len(chunk)

    def _verified(self, pull: Pull, data: bytes, *, genuine: bool) -> str:
        if genuine:
            self.arrived[pull.payload] = data
            self.feed(Pulled(pull.payload))
            return "done"
        self.feed(Misbehaved(pull.peer, "hash"))
        return self._failed(pull, "hash")

    def _failed(self, pull: Pull, reason: str) -> str:
        self.feed(PullFailed(pull.peer, pull.payload, reason))
        return reason

    def _staged(self) -> int:
        held = (self.arrived, self.partial, self._reading)
        return sum(len(data) for each in held for data in each.values())

    def _drop_oldest_partial(self, *, without: Hash) -> None:
        for key in self.partial:
            if key[0] != without:
                del self.partial[key]
                return


async def _matches(data: bytes, payload: Hash) -> bool:
    """Say whether these bytes are the payload; large ones are hashed beside the loop."""
    if len(data) <= LARGE:
        return digest(data) == payload
    return await asyncio.to_thread(digest, data) == payload
