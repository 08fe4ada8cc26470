"""The links of this peer: dialled, served, crossed and closed; at most one per neighbour."""

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from functools import partial
from typing import Any

import grpc
import grpc.aio

from shoal.gossip.messages import Message
from shoal.gossip.names import PeerId
from shoal.node.addresses import Address, parse_bare
from shoal.node.errors import PeerError
from shoal.node.identity import peer_text
from shoal.node.transport.channels import Channel
from shoal.node.transport.link import Link, Outbox, Stream
from shoal.node.transport.local import Local, now
from shoal.node.transport.rpc import (
    SERVICE,
    Context,
    host_of,
    read_call,
    read_context,
    write_call,
    write_context,
)
from shoal.node.wire import fields, requests

log = logging.getLogger(__name__)

CROSSING = 2.0
"""Seconds for which the losing stream of two that crossed is still read."""

_FINAL = {
    "another run",
    "certificate",
    "malformed",
    "no TLS 1.3",
    "not admitted",
    "refused",
    "self",
    "wrong peer",
}
"""Why dialling the same address again is of no use."""


@dataclass(frozen=True, slots=True)
class LinkView:
    """One open link, for the status page."""

    peer: PeerId
    dialled: bool
    host: str
    seconds: float
    """How long it has been open."""
    waiting: int
    """Bytes in its queue."""
    dropped: int
    """Messages that did not fit into its queue."""


class Links:
    """One bidirectional stream per neighbour; `hello` is said first, `take` gets each frame."""

    def __init__(
        self,
        local: Local,
        hello: Callable[[], requests.Hello],
        take: Callable[[PeerId, bytes], Awaitable[None]],
    ) -> None:
        self.local = local
        self.limits = local.limits
        self.hello = hello
        self.take = take
        self.open: dict[PeerId, Link] = {}
        self._dials: dict[PeerId, asyncio.Task[None]] = {}
        self._hosts: Counter[str] = Counter()

    # ------------------------------------------------------------ what the owner calls

    def view(self) -> list[LinkView]:
        """Return the open links."""
        return [
            LinkView(
                peer=link.peer,
                dialled=link.stream.dialled,
                host=link.stream.host,
                seconds=now() - link.since,
                waiting=link.outbox.size,
                dropped=link.dropped,
            )
            for link in self.open.values()
        ]

    def put(self, peer: PeerId, message: Message) -> bool:
        """Queue a message on the link to `peer`; False when there is no link."""
        if link := self.open.get(peer):
            link.put(message, frame=self.limits.message_bytes)
        return link is not None

    def dial(self, peer: PeerId) -> None:
        """Open a link to `peer` unless there is one, or about to be."""
        if peer in self.open or peer in self._dials or self.local.stopped:
            return
        self._dials[peer] = dialling = self.local.spawn(self._dial(peer))
        dialling.add_done_callback(lambda _: self._dials.pop(peer, None))

    def close(self, peer: PeerId, reason: str) -> None:
        """Close the link to `peer`, or stop dialling."""
        if dialling := self._dials.get(peer):
            dialling.cancel()
        if link := self.open.get(peer):
            # The owner is in the middle of its effects: it hears of this one after them.
            self._take_down(link, reason, later=True)
            link.stream.close(reason)

    def stop(self) -> None:
        """Close the streams of all links."""
        for link in list(self.open.values()):
            link.stream.close("stopping")

    # ------------------------------------------------------------ dialled

    async def _dial(self, peer: PeerId) -> None:
        try:
            if peer == self.local.identity.peer:
                raise PeerError("self", "this is the address of this daemon itself")
            if self.local.banned(peer):
                raise PeerError("refused", "it is banned here for a while")
            await self._open_link(peer)
        except PeerError as error:
            # Both dialled at once and the other's stream won: it is there, or about to be.
            if error.reason == "crossed" and await self._appears(peer):
                return
            if peer not in self.open:
                self._tell_down(peer, _for_people(error))

    async def _open_link(self, peer: PeerId) -> None:
        async with self.local.channel(peer) as channel:
            if peer in self.open:
                return
            method: grpc.aio.StreamStreamMultiCallable[bytes, bytes] = channel.rpc.stream_stream(
                f"/{SERVICE}/Link"
            )
            call = method(timeout=self.limits.link_age)
            try:
                stream = await self._say_hello(channel, call)
                await self._run(stream)
            except PeerError as error:
                if error.reason != "crossed":
                    self.local.channels.drop(channel)
                raise
            finally:
                call.cancel()

    async def _say_hello(
        self, channel: Channel, call: "grpc.aio.StreamStreamCall[bytes, bytes]"
    ) -> Stream:
        read, write = partial(read_call, call), partial(write_call, call)

        def close(_: str) -> None:
            call.cancel()

        try:
            async with asyncio.timeout(self.limits.handshake_timeout):
                await write(requests.encode_hello(self.hello()))
                first = await read()
        except TimeoutError:
            raise PeerError("timeout", "connected, but it did not say Hello") from None
        if first is None:
            raise PeerError("refused", "it closed the link at once")
        channel.ready = True
        hello = requests.decode_hello(first)
        if refusal := self._judge(channel.peer, hello):
            raise PeerError("refused", refusal)
        return Stream(
            peer=channel.peer,
            dialled=True,
            session=hello.session,
            admission=hello.admission,
            host=channel.found.address.host,
            read=read,
            write=write,
            close=close,
        )

    async def _appears(self, peer: PeerId) -> bool:
        for _ in range(20):
            if peer in self.open:
                return True
            await asyncio.sleep(0.05)
        return False

    # ------------------------------------------------------------ served

    async def serve(self, peer: PeerId, context: Context) -> None:
        """Be the other end of a link that `peer` dialled, until it ends."""
        host = host_of(context)
        hello = await self._hear_hello(peer, host, context)
        ended = asyncio.Event()
        said = ""

        def close(reason: str) -> None:
            nonlocal said
            said = reason
            ended.set()

        stream = Stream(
            peer=peer,
            dialled=False,
            session=hello.session,
            admission=hello.admission,
            host=host,
            read=partial(read_context, context),
            write=partial(write_context, context),
            close=close,
        )
        self._hosts[host] += 1
        try:
            await write_context(context, requests.encode_hello(self.hello()))
            self._learn(peer, host, hello)
            await _first_of(self._run(stream), ended.wait())
        finally:
            self._hosts[host] -= 1
            if not self._hosts[host]:
                del self._hosts[host]
        if said:
            await context.abort(grpc.StatusCode.ABORTED, said)

    async def _hear_hello(self, peer: PeerId, host: str, context: Context) -> requests.Hello:
        try:
            async with asyncio.timeout(self.limits.handshake_timeout):
                first = await read_context(context)
            hello = requests.decode_hello(first or b"")
        except TimeoutError:
            await context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, "no Hello came")
        except PeerError as error:
            self.local.blame(peer, error.reason)
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        if refusal := self._judge(peer, hello):
            self.local.dropped["refused"] += 1
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, refusal)
        if peer == self.local.identity.peer:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "that is my own key")
        link = self.open.get(peer)
        if link is None and (full := self._full(host)):
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, full)
        if link is not None and self._crossed(link, hello.session, dialled=False) == "loses":
            await context.abort(grpc.StatusCode.ALREADY_EXISTS, "linked already")
        return hello

    def _full(self, host: str) -> str:
        if max(len(self.open), self._hosts.total()) >= self.limits.neighbours:
            return "all links are taken; try another member"
        if self._hosts[host] >= self.limits.links_per_address:
            return f"too many links from {host}"
        return ""

    def _learn(self, peer: PeerId, host: str, hello: requests.Hello) -> None:
        """Remember where a peer that dialled us says it listens, and where it came from."""
        told = [parse_bare(text) for text in hello.addresses]
        seen = [Address("ip6" if ":" in host else "ip4", host, a.port) for a in told[:1]]
        self.local.remember(peer, told + [address for address in seen if address not in told])

    # ------------------------------------------------------------ either

    def _judge(self, peer: PeerId, hello: requests.Hello) -> str:
        """Return why a link after this Hello is refused, "" when it is not."""
        if fields.VERSION not in hello.versions:
            theirs = ", ".join(map(str, hello.versions)) or "none"
            return f"protocol version {fields.VERSION} is spoken here, {theirs} there: update Shoal"
        if hello.run != self.local.admission.run:
            return f"this is run {self.local.admission.run.hex()}, you are in {hello.run.hex()}"
        if not self.local.admission.verify(peer, hello.admission):
            return "your proof of admission is not of this run"
        return ""

    def _crossed(self, link: Link, session: int, *, dialled: bool) -> str:
        """Say what a second stream to a linked peer means: it "wins", "loses" or is "anew"."""
        if session != link.stream.session or dialled == link.stream.dialled:
            return "anew"
        # Both dialled at once. Both ends keep the stream that the smaller id dialled.
        ours_wins = self.local.identity.peer < link.peer
        return "wins" if dialled == ours_wins else "loses"

    async def _run(self, stream: Stream) -> None:
        """Make `stream` the link to its peer, or part of it, and read it to its end."""
        link = self._adopt(stream)
        if link is None:
            return
        reason = "closed by the peer"
        try:
            while (frame := await stream.read()) is not None:
                await self.take(stream.peer, frame)
        except PeerError as error:
            reason = str(error)
        except asyncio.CancelledError:
            reason = "the connection broke"
            raise
        finally:
            if link.stream is stream:
                self._take_down(link, reason)

    def _adopt(self, stream: Stream) -> Link | None:
        link = self.open.get(stream.peer)
        if link is not None:
            match self._crossed(link, stream.session, dialled=stream.dialled):
                case "loses":
                    return None
                case "wins":
                    self._retire(link.stream)
                    link.stream = stream
                    return link
            self._take_down(link, "the peer opened it anew")
            link.stream.close("opened anew")
        outbox = Outbox(self.limits.link_queue_bytes)
        link = self.open[stream.peer] = Link(stream.peer, stream, outbox, now())
        self.local.spawn(self._write(link))
        log.info("link up", extra={"peer": peer_text(stream.peer), "host": stream.host})
        if not self.local.stopped:
            self.local.handler.on_link_up(stream.peer, stream.admission)
        return link

    def _retire(self, stream: Stream) -> None:
        # What the other end wrote into it before it saw the winner still arrives.
        asyncio.get_running_loop().call_later(CROSSING, stream.close, "crossed")

    async def _write(self, link: Link) -> None:
        while not link.down:
            batch = await link.take()
            while batch and not link.down:
                stream = link.stream
                try:
                    await stream.write(b"".join(data for _, data in batch))
                except PeerError:
                    if link.stream is stream:
                        # The reader tells; it knows why.
                        return stream.close("can't be written to")
                    continue
                for kind, data in batch:
                    self.local.bytes_out[kind] += len(data)
                break
        return None

    def _take_down(self, link: Link, reason: str, *, later: bool = False) -> None:
        if link.down:
            return
        link.down = True
        if self.open.get(link.peer) is link:
            del self.open[link.peer]
        link.wake()
        log.info("link down", extra={"peer": peer_text(link.peer), "reason": reason})
        if later:
            asyncio.get_running_loop().call_soon(self._tell_down, link.peer, reason)
        else:
            self._tell_down(link.peer, reason)

    def _tell_down(self, peer: PeerId, reason: str) -> None:
        if not self.local.stopped:
            self.local.handler.on_link_down(peer, reason)


async def _first_of(*works: Coroutine[Any, Any, object]) -> None:
    """Run all until one ends; cancel the others; raise what the first one raised."""
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    for task in done:
        task.result()


def _for_people(error: PeerError) -> str:
    """Return why a dial failed; it begins with "refused" when trying again is of no use."""
    return f"{'refused' if error.reason in _FINAL else error.reason}: {error}"
