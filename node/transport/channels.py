"""Open gRPC channels to other peers: few, reused, closed when nobody needs them."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

import grpc
import grpc.aio

from shoal.gossip.limits import Limits
from shoal.gossip.names import PeerId
from shoal.node.addresses import Address
from shoal.node.admission import Admission, Credentials
from shoal.node.errors import PeerError
from shoal.node.transport import dial

SLACK = 64 << 10
"""gRPC's own bound on a message lies so much above ours, which can say whose it was."""


@dataclass(eq=False, slots=True)
class Channel:
    """A channel to one peer and who uses it."""

    peer: PeerId
    found: dial.Found
    rpc: grpc.aio.Channel
    users: int = 0
    ready: bool = False
    """It was connected once: somebody answered a call."""
    used: float = 0.0
    dropped: bool = False


class Channels:
    """At most `Limits.channels` of them, one per peer."""

    def __init__(
        self,
        admission: Admission,
        credentials: Credentials,
        limits: Limits,
        spawn: Callable[..., asyncio.Task[Channel]],
    ) -> None:
        self.admission = admission
        self.credentials = credentials
        self.limits = limits
        self._spawn = spawn
        self._open: dict[PeerId, Channel] = {}
        self._opening: dict[PeerId, asyncio.Task[Channel]] = {}

    def __contains__(self, peer: PeerId) -> bool:
        return peer in self._open

    @asynccontextmanager
    async def use(self, peer: PeerId, addresses: Sequence[Address]) -> AsyncIterator[Channel]:
        """Lend the channel to `peer`, opening one at `addresses` if need be; raises PeerError."""
        channel = self._living(peer) or await self._shared(peer, addresses)
        channel.users += 1
        try:
            yield channel
        finally:
            channel.users -= 1
            channel.used = asyncio.get_running_loop().time()
            if channel.dropped and not channel.users:
                await channel.rpc.close()

    def _living(self, peer: PeerId) -> Channel | None:
        """Return the open channel to `peer`; one that lost its connection is dropped.

        gRPC would connect it again, but to whom? A peer that came back has another TLS key.
        """
        channel = self._open.get(peer)
        if channel is None:
            return None
        if channel.ready and channel.rpc.get_state() is not grpc.ChannelConnectivity.READY:
            self.drop(channel)
            return None
        return channel

    def drop(self, channel: Channel) -> None:
        """Open a new one next time: the peer is gone, or came back with another key."""
        if self._open.get(channel.peer) is channel:
            del self._open[channel.peer]
        channel.dropped = True
        if not channel.users:
            self._spawn(self._shut(channel))

    async def sweep(self) -> None:
        """Close what nobody used for `Limits.channel_idle`."""
        now = asyncio.get_running_loop().time()
        for channel in list(self._open.values()):
            if not channel.users and now - channel.used > self.limits.channel_idle:
                await self._close(channel)

    async def close(self) -> None:
        """Close all."""
        for channel in list(self._open.values()):
            await self._close(channel)

    async def _shared(self, peer: PeerId, addresses: Sequence[Address]) -> Channel:
        # Whoever asks meanwhile waits for the same attempt.
        opening = self._opening.get(peer)
        if opening is None:
            opening = self._opening[peer] = self._spawn(self._connect(peer, addresses))
            opening.add_done_callback(lambda _: self._opening.pop(peer, None))
        return await asyncio.shield(opening)

    async def _connect(self, peer: PeerId, addresses: Sequence[Address]) -> Channel:
        await self._make_room()
        timeout = self.limits.dial_timeout
        found = await dial.find(self.admission, peer, addresses, timeout=timeout)
        rpc = dial.channel(found, self.credentials, self.limits.message_bytes + SLACK)
        channel = Channel(peer, found, rpc, used=asyncio.get_running_loop().time())
        self._open[peer] = channel
        return channel

    async def _make_room(self) -> None:
        if len(self._open) + len(self._opening) <= self.limits.channels:
            return
        idle = [each for each in self._open.values() if not each.users]
        if not idle:
            raise PeerError("busy", "too many open connections")
        await self._close(min(idle, key=lambda each: each.used))

    async def _close(self, channel: Channel) -> None:
        if self._open.get(channel.peer) is channel:
            del self._open[channel.peer]
        channel.dropped = True
        await channel.rpc.close()

    async def _shut(self, channel: Channel) -> Channel:
        await channel.rpc.close()
        return channel
