"""This end of all connections: who it is, whom it knows and bans, what it counted, what runs."""

import asyncio
import logging
from collections import Counter, OrderedDict
from collections.abc import Coroutine, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any, TypeVar

from shoal.gossip.limits import Limits
from shoal.gossip.names import PeerId
from shoal.node.addresses import Address
from shoal.node.admission import Admission
from shoal.node.errors import PeerError
from shoal.node.identity import Identity, peer_text
from shoal.node.transport.channels import Channel, Channels
from shoal.node.transport.handler import Handler
from shoal.node.wire import fields

log = logging.getLogger(__name__)

SWEEP = 5.0
"""Seconds between looks for idle connections."""

T = TypeVar("T")


class Local:
    """What the links, messages and transfers of one transport share."""

    def __init__(
        self, identity: Identity, admission: Admission, handler: Handler, limits: Limits
    ) -> None:
        self.identity = identity
        self.admission = admission
        self.handler = handler
        self.limits = limits
        self.credentials = admission.credentials(identity)
        self.channels = Channels(admission, self.credentials, limits, self.spawn)
        self.bytes_in: Counter[str] = Counter()
        """By kind: records, digests, announcements, probes, admission, payloads, joining."""
        self.bytes_out: Counter[str] = Counter()
        self.dropped: Counter[str] = Counter()
        """Frames, transfers and links that were refused, by reason."""
        self.stopped = False
        self._known: OrderedDict[PeerId, tuple[Address, ...]] = OrderedDict()
        self._bans: OrderedDict[PeerId, float] = OrderedDict()
        self._tasks: set[asyncio.Task[Any]] = set()

    # ------------------------------------------------------------ other peers

    def remember(self, peer: PeerId, addresses: Sequence[Address]) -> None:
        """Remember where `peer` can be reached."""
        self._known[peer] = tuple(addresses[: fields.ADDRESSES + 1])
        self._known.move_to_end(peer)
        if len(self._known) > self.limits.members:
            self._known.popitem(last=False)

    def reachable(self, peer: PeerId) -> bool:
        """Say whether there is a channel to `peer`, or an address to open one at."""
        return peer in self._known or peer in self.channels

    def channel(self, peer: PeerId) -> AbstractAsyncContextManager[Channel]:
        """Lend the channel to `peer`; raises PeerError."""
        return self.channels.use(peer, self._known.get(peer, ()))

    def ban(self, peer: PeerId, seconds: float) -> None:
        """Refuse everything of `peer` for so long."""
        self._bans[peer] = now() + seconds
        self._bans.move_to_end(peer)
        if len(self._bans) > self.limits.members:
            self._bans.popitem(last=False)

    def banned(self, peer: PeerId) -> bool:
        """Say whether `peer` is banned now."""
        until = self._bans.get(peer)
        if until is not None and until <= now():
            del self._bans[peer]
            return False
        return until is not None

    def blame(self, peer: PeerId, reason: str) -> None:
        """Count what was dropped, and tell the owner whose it was."""
        self.dropped[reason] += 1
        log.info("dropped", extra={"peer": peer_text(peer), "reason": reason})
        if not self.stopped:
            self.handler.on_misbehaviour(peer, reason)

    # ------------------------------------------------------------ tasks

    def spawn(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Run `work` until it ends or everything stops; PeerErrors in it are nobody's fault."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if task.cancelled() or isinstance(task.exception(), PeerError | None):
            return
        crash(task.exception())

    async def sweep(self) -> None:
        """Close idle connections, for ever."""
        while True:
            await asyncio.sleep(SWEEP)
            await self.channels.sweep()

    async def stop(self) -> None:
        """End all tasks and close all channels."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self.channels.close()


def crash(error: BaseException | None) -> None:
    """Our own bug: loud; the daemon's exception handler decides."""
    context = {"message": "the transport failed", "exception": error}
    asyncio.get_running_loop().call_exception_handler(context)


def now() -> float:
    """Return the loop's clock, in seconds."""
    return asyncio.get_running_loop().time()
