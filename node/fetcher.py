"""Payloads on their way here: pulled in chunks, resumed elsewhere when a source fails, verified."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from hashlib import blake2b

from shoal.gossip.events import Misbehaved, Pull, Pulled, PullFailed
from shoal.gossip.limits import Limits
from shoal.gossip.names import Hash, PeerId
from shoal.node.errors import PeerError

log = logging.getLogger(__name__)


SLOWEST = 8 << 10
"""Bytes a second below which a source counts as one that does not deliver."""

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
        self.partial: dict[Hash, bytearray] = {}
        self.bytes_in = 0

    def take(self, payload: Hash) -> bytes | None:
        """Hand over a payload that has arrived, and forget it."""
        return self.arrived.pop(payload, None)

    async def fetch(self, pull: Pull) -> str:
        """Perform one `Pull`, which ends in `Pulled` or `PullFailed`; return how it went."""
        if self._staged() + pull.size > self.limits.staging_bytes and self.partial:
            self._drop_oldest_partial(without=pull.payload)
        buffer = self.partial.setdefault(pull.payload, bytearray())
        try:
            await self._read(pull, buffer)
        except PeerError as error:
            return self._failed(pull, error.reason)
        except TimeoutError:
            return self._failed(pull, "timeout")
        return self._verify(pull, bytes(buffer))

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

    def _verify(self, pull: Pull, data: bytes) -> str:
        self.partial.pop(pull.payload, None)
        if blake2b(data, digest_size=32).digest() == pull.payload:
            self.arrived[pull.payload] = data
            self.feed(Pulled(pull.payload))
            return "done"
        self.feed(Misbehaved(pull.peer, "hash"))
        return self._failed(pull, "hash")

    def _failed(self, pull: Pull, reason: str) -> str:
        self.feed(PullFailed(pull.peer, pull.payload, reason))
        return reason

    def _staged(self) -> int:
        return sum(map(len, self.arrived.values())) + sum(map(len, self.partial.values()))

    def _drop_oldest_partial(self, *, without: Hash) -> None:
        for payload in self.partial:
            if payload != without:
                del self.partial[payload]
                return
