"""Gossip messages: what arrives is checked, slowed and handed on; who has no link is called.

What waits for a peer without a link goes in one call of Deliver, which brings back the answers.
"""

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Callable
from functools import partial

import grpc
import grpc.aio

from shoal.gossip.messages import Message, Push
from shoal.gossip.names import PeerId
from shoal.node.errors import PeerError
from shoal.node.identity import peer_text
from shoal.node.transport.bucket import Bucket
from shoal.node.transport.channels import Channel
from shoal.node.transport.link import Outbox
from shoal.node.transport.local import Local, now
from shoal.node.transport.rpc import SERVICE, Context, Unary, same_version, told
from shoal.node.wire import frames
from shoal.node.wire.fields import WireError
from shoal.node.wire.frames import FrameReader
from shoal.node.wire.records import RecordReader

log = logging.getLogger(__name__)


class Messages:
    """What peers say to each other, whichever way it comes; `send` is how to answer."""

    def __init__(self, local: Local, send: Callable[[PeerId, Message], None]) -> None:
        self.local = local
        self.limits = local.limits
        admission = local.admission
        self.frames = FrameReader(RecordReader(admission.run, admission.verify), local.limits)
        self._send = send
        self._mail: dict[PeerId, Outbox] = {}
        self._buckets: OrderedDict[PeerId, tuple[Bucket, Bucket]] = OrderedDict()

    # ------------------------------------------------------------ in

    async def take(self, peer: PeerId, data: bytes) -> None:
        """Check a frame and hand its messages on; a frame with anything bad in it is dropped."""
        try:
            frame = self.frames.read(data)
        except WireError as error:
            self.local.blame(peer, error.reason)
            return
        # Whoever sends too much is read more slowly: TCP passes that on.
        if (toll := self._toll(peer, frame, len(data))) > 0:
            self.local.dropped["slowed"] += 1
            await asyncio.sleep(toll)
        self._dispatch(peer, frame, partial(self._send, peer))

    async def serve(self, peer: PeerId, request: bytes, context: Context) -> bytes:
        """Take the frame of a Deliver; return the frame of the answers."""
        try:
            frame = self.frames.read(request)
        except WireError as error:
            self.local.blame(peer, error.reason)
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, error.reason)
        await same_version(frame.version, context)
        if self._toll(peer, frame, len(request)) > 0:
            self.local.blame(peer, "flood")
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "you send too much")
        outbox = Outbox(self.limits.message_bytes)
        self._dispatch(peer, frame, partial(self._answer, outbox))
        answers = outbox.take(self.limits.message_bytes)
        for kind, data in answers:
            self.local.bytes_out[kind] += len(data)
        return b"".join(data for _, data in answers)

    def _answer(self, outbox: Outbox, message: Message) -> None:
        outbox.put(message, frame=self.limits.message_bytes)

    def _dispatch(
        self, peer: PeerId, frame: frames.Frame, answer: Callable[[Message], None]
    ) -> None:
        for message, size in zip(frame.messages, frame.sizes, strict=True):
            self.local.bytes_in[frames.kind_of(message)] += size
            if self.local.stopped or self.local.banned(peer):
                return
            for each in self.local.handler.on_message(peer, message):
                answer(each)

    def _toll(self, peer: PeerId, frame: frames.Frame, size: int) -> float:
        at = now()
        if peer not in self._buckets:
            self._buckets[peer] = (
                Bucket.full(self.limits.records_per_second, seconds=4, now=at),
                Bucket.full(self.limits.bytes_per_second, seconds=4, now=at),
            )
            if len(self._buckets) > self.limits.members:
                self._buckets.popitem(last=False)
        records, volume = self._buckets[peer]
        # A message takes time whatever it says.
        work = sum(len(m.records) if isinstance(m, Push) else 1 for m in frame.messages)
        return max(records.take(work, at), volume.take(size, at))

    # ------------------------------------------------------------ out, without a link

    def post(self, peer: PeerId, message: Message) -> None:
        """Call `peer` to say `message`, best effort."""
        if self.local.stopped or self.local.banned(peer):
            return
        outbox = self._mail.get(peer)
        if outbox is None:
            if not self.local.reachable(peer) or len(self._mail) >= self.limits.mails:
                self.local.dropped["no link"] += 1
                return
            outbox = self._mail[peer] = Outbox(self.limits.mail_bytes)
            outbox.put(message, frame=self.limits.message_bytes)
            self.local.spawn(self._deliver(peer, outbox))
        elif not outbox.put(message, frame=self.limits.message_bytes):
            self.local.dropped["no link"] += 1

    def forget(self, peer: PeerId) -> None:
        """Drop what waits to be said to `peer` by calls."""
        self._mail.pop(peer, None)

    async def _deliver(self, peer: PeerId, outbox: Outbox) -> None:
        try:
            async with self.local.channel(peer) as channel:
                while (batch := outbox.take()) and self._mail.get(peer) is outbox:
                    frame = frames.stamp() + b"".join(data for _, data in batch)
                    answers = await self._call(channel, "Deliver", frame)
                    for kind, data in batch:
                        self.local.bytes_out[kind] += len(data)
                    await self.take(peer, answers)
        except PeerError as error:
            # Gossip is best effort: who needs an answer has a timer.
            log.debug("not delivered", extra={"peer": peer_text(peer), "reason": str(error)})
        finally:
            if self._mail.get(peer) is outbox:
                del self._mail[peer]

    async def _call(self, channel: Channel, method: str, request: bytes) -> bytes:
        call: Unary = channel.rpc.unary_unary(f"/{SERVICE}/{method}")
        try:
            answer = await call(request, timeout=self.limits.call_timeout)
        except grpc.aio.AioRpcError as error:
            failure = told(error)
            if failure.reason in {"unreachable", "timeout"}:
                self.local.channels.drop(channel)
            raise failure from None
        channel.ready = True
        return answer
