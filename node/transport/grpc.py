"""Links, calls and transfers between daemons: gRPC over TLS 1.3, both ends proved and admitted.

One bidirectional stream per pair of neighbours carries their gossip; peers without a link are
called; payloads come over server streams as raw bytes. What arrives goes through node/wire/ and
then to the `Handler`; nothing that a peer sends raises past this file.
"""

import asyncio
import errno
import logging
import os
import socket
import urllib.parse
from collections import Counter, OrderedDict
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Iterator, Sequence
from contextlib import aclosing, contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, TypeVar

import grpc
import grpc.aio

from shoal.gossip.limits import Limits
from shoal.gossip.messages import Message, Push
from shoal.gossip.names import Hash, PeerId
from shoal.node.addresses import Address, Listen, own, parse_bare, socket_text
from shoal.node.admission import Admission, peer_of
from shoal.node.errors import ConfigError, PeerError
from shoal.node.identity import Identity, peer_text
from shoal.node.transport import dial
from shoal.node.transport.bucket import Bucket
from shoal.node.transport.channels import SLACK, Channel, Channels
from shoal.node.transport.handler import Buffer, Handler
from shoal.node.transport.link import Link, Outbox, Stream
from shoal.node.wire import fields, frames, requests
from shoal.node.wire.fields import WireError
from shoal.node.wire.frames import FrameReader
from shoal.node.wire.records import RecordReader

log = logging.getLogger(__name__)

SERVICE = "shoal.proto.v1.GossipService"
CROSSING = 2.0
"""Seconds for which the losing stream of two that crossed is still read."""
SWEEP = 5.0
"""Seconds between looks for idle connections."""

Context = grpc.aio.ServicerContext[bytes, bytes]
Unary = grpc.aio.UnaryUnaryMultiCallable[bytes, bytes]
T = TypeVar("T")

_peer_of = lru_cache(maxsize=1024)(peer_of)

_REASONS = {
    grpc.StatusCode.NOT_FOUND: "not found",
    grpc.StatusCode.RESOURCE_EXHAUSTED: "busy",
    grpc.StatusCode.DEADLINE_EXCEEDED: "timeout",
    grpc.StatusCode.FAILED_PRECONDITION: "refused",
    grpc.StatusCode.PERMISSION_DENIED: "refused",
    grpc.StatusCode.INVALID_ARGUMENT: "refused",
    grpc.StatusCode.UNAUTHENTICATED: "refused",
    grpc.StatusCode.ALREADY_EXISTS: "crossed",
    grpc.StatusCode.OUT_OF_RANGE: "truncated",
}

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


class Transport:
    """Everything that crosses the network for one peer in one run.

    All methods are called on the event loop that ran `start`; so are the handler's.
    `advertise`: addresses to tell others instead of the machine's own.
    """

    def __init__(
        self,
        identity: Identity,
        admission: Admission,
        handler: Handler,
        *,
        listen: Listen,
        limits: Limits,
        advertise: Sequence[Address] = (),
    ) -> None:
        self.identity = identity
        self.admission = admission
        self.handler = handler
        self.listen = listen
        self.limits = limits
        self.advertise = tuple(advertise)
        self.frames = FrameReader(RecordReader(admission.run, admission.verify), limits)
        self.proof = admission.prove(identity.peer)
        self.session = int.from_bytes(os.urandom(8), "big")
        self.port = 0
        self.bytes_in: Counter[str] = Counter()
        """By kind: records, digests, announcements, probes, admission, payloads, joining."""
        self.bytes_out: Counter[str] = Counter()
        self.dropped: Counter[str] = Counter()
        """Frames, transfers and links that were refused, by reason."""
        self._links: dict[PeerId, Link] = {}
        self._dials: dict[PeerId, asyncio.Task[None]] = {}
        self._mail: dict[PeerId, Outbox] = {}
        self._known: OrderedDict[PeerId, tuple[Address, ...]] = OrderedDict()
        self._bans: OrderedDict[PeerId, float] = OrderedDict()
        self._buckets: OrderedDict[PeerId, tuple[Bucket, Bucket]] = OrderedDict()
        self._hosts: Counter[str] = Counter()
        self._serving: Counter[PeerId] = Counter()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._credentials = admission.credentials(identity)
        self._channels = Channels(admission, self._credentials, limits, self._spawn)
        self._server: grpc.aio.Server | None = None
        self._stopped = False

    # ------------------------------------------------------------ what the owner calls

    async def start(self) -> None:
        """Listen; raises ConfigError when that can't be done."""
        self._server = grpc.aio.server(options=self._server_options())
        self._server.add_generic_rpc_handlers((self._service(),))
        tls = grpc.ssl_server_credentials(
            [(self._credentials.key, self._credentials.server)],
            root_certificates=self._credentials.root,
            require_client_auth=True,
        )
        host = self.listen.host or ("::" if _has_ipv6() else "0.0.0.0")
        try:
            self.port = self._server.add_secure_port(socket_text(host, self.listen.port), tls)
        except RuntimeError:
            raise _cannot_listen(host, self.listen.port) from None
        await self._server.start()
        self._spawn(self._sweep())

    async def stop(self) -> None:
        """Close everything; no callback comes any more."""
        self._stopped = True
        for link in list(self._links.values()):
            link.stream.close("stopping")
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._channels.close()
        if self._server is not None:
            await self._server.stop(0.2)

    @property
    def addresses(self) -> tuple[str, ...]:
        """Where others can reach this peer: multiaddrs without /p2p, most useful first."""
        told = self.advertise or own(self.listen.host, self.port)
        return tuple(str(address.bare()) for address in told[: fields.ADDRESSES])

    def links(self) -> list[LinkView]:
        """Return the open links."""
        now = _now()
        return [
            LinkView(
                peer=link.peer,
                dialled=link.stream.dialled,
                host=link.stream.host,
                seconds=now - link.since,
                waiting=link.outbox.size,
                dropped=link.dropped,
            )
            for link in self._links.values()
        ]

    def know(self, peer: PeerId, addresses: Sequence[str]) -> None:
        """Remember where `peer` can be reached, as its contact record says."""
        self._remember(peer, [parse_bare(text) for text in addresses])

    def connect(self, peer: PeerId, addresses: Sequence[str | Address] = ()) -> None:
        """Open a link unless there is one; ends in `on_link_up` or `on_link_down`."""
        given = [parse_bare(a) if isinstance(a, str) else a.bare() for a in addresses]
        if given:
            self._remember(peer, given)
        if peer in self._links or peer in self._dials or self._stopped:
            return
        self._dials[peer] = dialling = self._spawn(self._dial(peer))
        dialling.add_done_callback(lambda _: self._dials.pop(peer, None))

    def disconnect(self, peer: PeerId, reason: str, ban: float = 0.0) -> None:
        """Close the link; with `ban` refuse everything of the peer for so many seconds."""
        if ban > 0:
            self._bans[peer] = _now() + ban
            self._bans.move_to_end(peer)
            if len(self._bans) > self.limits.members:
                self._bans.popitem(last=False)
        if dialling := self._dials.get(peer):
            dialling.cancel()
        self._mail.pop(peer, None)
        if link := self._links.get(peer):
            # The owner is in the middle of its effects: it hears of this one after them.
            self._take_down(link, reason, later=True)
            link.stream.close(reason)

    def send(self, peer: PeerId, message: Message) -> None:
        """Say `message` to `peer`, best effort: over the link, else by a call."""
        if link := self._links.get(peer):
            link.put(message, frame=self.limits.message_bytes)
        elif not self._stopped and not self._banned(peer):
            self._post(peer, message)

    async def pull(
        self, peer: PeerId, payload: Hash, size: int, offset: int = 0
    ) -> AsyncGenerator[bytes, None]:
        """Yield a payload's bytes from `offset` on; raises PeerError. The hash is not checked."""
        request = requests.encode_pull(payload, offset)
        async with aclosing(self._fetch(peer, "Pull", request, size - offset)) as chunks:
            async for chunk in chunks:
                self.bytes_in["payloads"] += len(chunk)
                yield chunk

    async def initial(
        self, peer: PeerId, size: int, offset: int = 0
    ) -> AsyncGenerator[bytes, None]:
        """Yield the initial model's `size` bytes from `offset` on; raises PeerError."""
        request = requests.encode_initial(offset)
        async with aclosing(self._fetch(peer, "Initial", request, size - offset)) as chunks:
            async for chunk in chunks:
                self.bytes_in["joining"] += len(chunk)
                yield chunk

    # ------------------------------------------------------------ links

    async def _dial(self, peer: PeerId) -> None:
        try:
            if peer == self.identity.peer:
                raise PeerError("self", "this is the address of this daemon itself")
            if self._banned(peer):
                raise PeerError("refused", "it is banned here for a while")
            await self._open_link(peer)
        except PeerError as error:
            # Both dialled at once and the other's stream won: it is there, or about to be.
            if error.reason == "crossed" and await self._appears(peer):
                return
            if peer not in self._links:
                self._tell_down(peer, _for_people(error))

    async def _open_link(self, peer: PeerId) -> None:
        async with self._channels.use(peer, self._known.get(peer, ())) as channel:
            if peer in self._links:
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
                    self._channels.drop(channel)
                raise
            finally:
                call.cancel()

    async def _say_hello(
        self, channel: Channel, call: "grpc.aio.StreamStreamCall[bytes, bytes]"
    ) -> Stream:
        read, write = partial(_read_call, call), partial(_write_call, call)

        def close(_: str) -> None:
            call.cancel()

        try:
            async with asyncio.timeout(self.limits.handshake_timeout):
                await write(requests.encode_hello(self._hello()))
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

    async def _serve_link(self, peer: PeerId, context: Context) -> None:
        host = _host_of(context)
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
            read=partial(_read_context, context),
            write=partial(_write_context, context),
            close=close,
        )
        self._hosts[host] += 1
        try:
            await _write_context(context, requests.encode_hello(self._hello()))
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
                first = await _read_context(context)
            hello = requests.decode_hello(first or b"")
        except TimeoutError:
            await context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, "no Hello came")
        except PeerError as error:
            self._blame(peer, error.reason)
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        if refusal := self._judge(peer, hello):
            self.dropped["refused"] += 1
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, refusal)
        if peer == self.identity.peer:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "that is my own key")
        link = self._links.get(peer)
        if link is None and (full := self._full(host)):
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, full)
        if link is not None and self._crossed(link, hello.session, dialled=False) == "loses":
            await context.abort(grpc.StatusCode.ALREADY_EXISTS, "linked already")
        return hello

    def _judge(self, peer: PeerId, hello: requests.Hello) -> str:
        """Return why a link after this Hello is refused, "" when it is not."""
        if fields.VERSION not in hello.versions:
            theirs = ", ".join(map(str, hello.versions)) or "none"
            return f"protocol version {fields.VERSION} is spoken here, {theirs} there: update Shoal"
        if hello.run != self.admission.run:
            return f"this is run {self.admission.run.hex()}, you are in {hello.run.hex()}"
        if not self.admission.verify(peer, hello.admission):
            return "your proof of admission is not of this run"
        return ""

    def _full(self, host: str) -> str:
        if max(len(self._links), self._hosts.total()) >= self.limits.neighbours:
            return "all links are taken; try another member"
        if self._hosts[host] >= self.limits.links_per_address:
            return f"too many links from {host}"
        return ""

    def _crossed(self, link: Link, session: int, *, dialled: bool) -> str:
        """Say what a second stream to a linked peer means: it "wins", "loses" or is "anew"."""
        if session != link.stream.session or dialled == link.stream.dialled:
            return "anew"
        # Both dialled at once. Both ends keep the stream that the smaller id dialled.
        ours_wins = self.identity.peer < link.peer
        return "wins" if dialled == ours_wins else "loses"

    async def _run(self, stream: Stream) -> None:
        """Make `stream` the link to its peer, or part of it, and read it to its end."""
        link = self._adopt(stream)
        if link is None:
            return
        reason = "closed by the peer"
        try:
            while (frame := await stream.read()) is not None:
                await self._take(stream.peer, frame, partial(self.send, stream.peer))
        except PeerError as error:
            reason = str(error)
        except asyncio.CancelledError:
            reason = "the connection broke"
            raise
        finally:
            if link.stream is stream:
                self._take_down(link, reason)

    def _adopt(self, stream: Stream) -> Link | None:
        link = self._links.get(stream.peer)
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
        link = self._links[stream.peer] = Link(stream.peer, stream, outbox, _now())
        self._spawn(self._write(link))
        log.info("link up", extra={"peer": peer_text(stream.peer), "host": stream.host})
        if not self._stopped:
            self.handler.on_link_up(stream.peer, stream.admission)
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
                    self.bytes_out[kind] += len(data)
                break
        return None

    def _take_down(self, link: Link, reason: str, *, later: bool = False) -> None:
        if link.down:
            return
        link.down = True
        if self._links.get(link.peer) is link:
            del self._links[link.peer]
        link.wake()
        log.info("link down", extra={"peer": peer_text(link.peer), "reason": reason})
        if later:
            asyncio.get_running_loop().call_soon(self._tell_down, link.peer, reason)
        else:
            self._tell_down(link.peer, reason)

    def _tell_down(self, peer: PeerId, reason: str) -> None:
        if not self._stopped:
            self.handler.on_link_down(peer, reason)

    async def _appears(self, peer: PeerId) -> bool:
        for _ in range(20):
            if peer in self._links:
                return True
            await asyncio.sleep(0.05)
        return False

    # ------------------------------------------------------------ messages

    async def _take(self, peer: PeerId, data: bytes, answer: Callable[[Message], None]) -> None:
        """Check a frame and hand its messages on; a frame with anything bad in it is dropped."""
        try:
            frame = self.frames.read(data)
        except WireError as error:
            self._blame(peer, error.reason)
            return
        # Whoever sends too much is read more slowly: TCP passes that on.
        if (toll := self._toll(peer, frame, len(data))) > 0:
            self.dropped["slowed"] += 1
            await asyncio.sleep(toll)
        self._dispatch(peer, frame, answer)

    def _dispatch(
        self, peer: PeerId, frame: frames.Frame, answer: Callable[[Message], None]
    ) -> None:
        for message, size in zip(frame.messages, frame.sizes, strict=True):
            self.bytes_in[frames.kind_of(message)] += size
            if self._stopped or self._banned(peer):
                return
            for each in self.handler.on_message(peer, message):
                answer(each)

    def _toll(self, peer: PeerId, frame: frames.Frame, size: int) -> float:
        now = _now()
        if peer not in self._buckets:
            self._buckets[peer] = (
                Bucket.full(self.limits.records_per_second, seconds=4, now=now),
                Bucket.full(self.limits.bytes_per_second, seconds=4, now=now),
            )
            if len(self._buckets) > self.limits.members:
                self._buckets.popitem(last=False)
        records, volume = self._buckets[peer]
        # A message takes time whatever it says.
        work = sum(len(m.records) if isinstance(m, Push) else 1 for m in frame.messages)
        return max(records.take(work, now), volume.take(size, now))

    def _post(self, peer: PeerId, message: Message) -> None:
        outbox = self._mail.get(peer)
        if outbox is None:
            reachable = peer in self._known or peer in self._channels
            if not reachable or len(self._mail) >= self.limits.mails:
                self.dropped["no link"] += 1
                return
            outbox = self._mail[peer] = Outbox(self.limits.mail_bytes)
            outbox.put(message, frame=self.limits.message_bytes)
            self._spawn(self._deliver(peer, outbox))
        elif not outbox.put(message, frame=self.limits.message_bytes):
            self.dropped["no link"] += 1

    async def _deliver(self, peer: PeerId, outbox: Outbox) -> None:
        try:
            async with self._channels.use(peer, self._known.get(peer, ())) as channel:
                while (batch := outbox.take()) and self._mail.get(peer) is outbox:
                    frame = frames.stamp() + b"".join(data for _, data in batch)
                    answers = await self._call(channel, "Deliver", frame)
                    for kind, data in batch:
                        self.bytes_out[kind] += len(data)
                    await self._take(peer, answers, partial(self.send, peer))
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
                self._channels.drop(channel)
            raise failure from None
        channel.ready = True
        return answer

    async def _serve_deliver(self, peer: PeerId, request: bytes, context: Context) -> bytes:
        try:
            frame = self.frames.read(request)
        except WireError as error:
            self._blame(peer, error.reason)
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, error.reason)
        await _same_version(frame.version, context)
        if self._toll(peer, frame, len(request)) > 0:
            self._blame(peer, "flood")
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "you send too much")
        outbox = Outbox(self.limits.message_bytes)
        self._dispatch(peer, frame, partial(self._answer, outbox))
        answers = outbox.take(self.limits.message_bytes)
        for kind, data in answers:
            self.bytes_out[kind] += len(data)
        return b"".join(data for _, data in answers)

    def _answer(self, outbox: Outbox, message: Message) -> None:
        outbox.put(message, frame=self.limits.message_bytes)

    # ------------------------------------------------------------ transfers

    async def _fetch(
        self, peer: PeerId, method: str, request: bytes, left: int
    ) -> AsyncGenerator[bytes, None]:
        """Yield exactly `left` bytes of a server stream, or raise PeerError."""
        if not 0 <= left <= self.limits.payload_bytes and method == "Pull":
            raise PeerError("oversize", f"{left} bytes are more than a payload may have")
        async with self._channels.use(peer, self._known.get(peer, ())) as channel:
            rpc: grpc.aio.UnaryStreamMultiCallable[bytes, bytes] = channel.rpc.unary_stream(
                f"/{SERVICE}/{method}"
            )
            call = rpc(request, timeout=self.limits.transfer_timeout)
            try:
                while left:
                    chunk = await self._chunk(call)
                    channel.ready = True
                    if chunk is None:
                        self._blame(peer, "truncated")
                        raise PeerError("truncated", f"{left} bytes are missing")
                    left -= len(chunk)
                    if left < 0:
                        self._blame(peer, "oversize")
                        raise PeerError("oversize", f"{-left} bytes more came than were declared")
                    yield chunk
            except grpc.aio.AioRpcError as error:
                failure = told(error)
                if failure.reason in {"unreachable", "timeout"}:
                    self._channels.drop(channel)
                raise failure from None
            finally:
                call.cancel()

    async def _chunk(self, call: "grpc.aio.UnaryStreamCall[bytes, bytes]") -> bytes | None:
        try:
            async with asyncio.timeout(self.limits.pull_timeout):
                chunk = await call.read()
        except TimeoutError:
            raise PeerError("timeout", "the transfer came to a stop") from None
        return chunk if isinstance(chunk, bytes) and chunk else None

    async def _serve_pull(self, peer: PeerId, request: bytes, context: Context) -> None:
        payload, offset, version = await self._read(peer, requests.decode_pull, request, context)
        await _same_version(version, context)
        data = self.handler.payload(payload)
        await self._pour(peer, data, offset, "payloads", context)

    async def _serve_initial(self, peer: PeerId, request: bytes, context: Context) -> None:
        offset, version = await self._read(peer, requests.decode_initial, request, context)
        await _same_version(version, context)
        await self._pour(peer, await self.handler.initial(), offset, "joining", context)

    async def _serve_genesis(self, peer: PeerId, request: bytes, context: Context) -> bytes:
        version = await self._read(peer, requests.decode_genesis_request, request, context)
        await _same_version(version, context)
        answer = requests.encode_genesis_response(self.handler.genesis())
        self.bytes_out["joining"] += len(answer)
        return answer

    async def _serve_snapshot(self, peer: PeerId, request: bytes, context: Context) -> bytes:
        version = await self._read(peer, requests.decode_snapshot_request, request, context)
        await _same_version(version, context)
        answer = await self.handler.snapshot()
        self.bytes_out["joining"] += len(answer)
        return answer

    async def _read(
        self, peer: PeerId, decode: Callable[[bytes], T], request: bytes, context: Context
    ) -> T:
        """Return what is asked; who asks what makes no sense is told so."""
        try:
            return decode(request)
        except WireError as error:
            self._blame(peer, error.reason)
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, error.reason)

    async def _pour(
        self, peer: PeerId, data: Buffer | None, offset: int, kind: str, context: Context
    ) -> None:
        if data is None:
            await context.abort(grpc.StatusCode.NOT_FOUND, "not here")
        if offset > len(data):
            await context.abort(grpc.StatusCode.OUT_OF_RANGE, f"it has {len(data)} bytes")
        if (
            self._serving.total() >= self.limits.transfers
            or self._serving[peer] >= self.limits.transfers // 4
        ):
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "too many transfers at once")
        self._serving[peer] += 1
        try:
            # Whoever went away in the middle comes back for the rest.
            with suppress(PeerError):
                for start in range(offset, len(data), self.limits.chunk_bytes):
                    chunk = bytes(data[start : start + self.limits.chunk_bytes])
                    await _write_context(context, chunk)
                    self.bytes_out[kind] += len(chunk)
        finally:
            self._serving[peer] -= 1
            if not self._serving[peer]:
                del self._serving[peer]

    # ------------------------------------------------------------ below

    def _hello(self) -> requests.Hello:
        run, told = self.admission.run, self.addresses
        return requests.Hello((fields.VERSION,), run, self.proof, told, self.session)

    def _learn(self, peer: PeerId, host: str, hello: requests.Hello) -> None:
        """Remember where a peer that dialled us says it listens, and where it came from."""
        told = [parse_bare(text) for text in hello.addresses]
        seen = [Address("ip6" if ":" in host else "ip4", host, a.port) for a in told[:1]]
        self._remember(peer, told + [address for address in seen if address not in told])

    def _remember(self, peer: PeerId, addresses: Sequence[Address]) -> None:
        self._known[peer] = tuple(addresses[: fields.ADDRESSES + 1])
        self._known.move_to_end(peer)
        if len(self._known) > self.limits.members:
            self._known.popitem(last=False)

    def _banned(self, peer: PeerId) -> bool:
        until = self._bans.get(peer)
        if until is not None and until <= _now():
            del self._bans[peer]
            return False
        return until is not None

    def _blame(self, peer: PeerId, reason: str) -> None:
        self.dropped[reason] += 1
        log.info("dropped", extra={"peer": peer_text(peer), "reason": reason})
        if not self._stopped:
            self.handler.on_misbehaviour(peer, reason)

    def _service(self) -> grpc.GenericRpcHandler:
        stream, unary = grpc.unary_stream_rpc_method_handler, grpc.unary_unary_rpc_method_handler
        link = self._guarded_link
        return grpc.method_handlers_generic_handler(
            SERVICE,
            {
                "Link": grpc.stream_stream_rpc_method_handler(link),
                "Deliver": unary(self._guarded(self._serve_deliver)),
                "Genesis": unary(self._guarded(self._serve_genesis)),
                "Pull": stream(self._guarded(self._serve_pull)),
                "Initial": stream(self._guarded(self._serve_initial)),
                "Snapshot": unary(self._guarded(self._serve_snapshot)),
            },
        )

    async def _guarded_link(self, _: object, context: Context) -> None:
        with self._loud():
            await self._serve_link(await self._enter(context), context)

    def _guarded(
        self, serve: Callable[[PeerId, bytes, Context], Awaitable[T]]
    ) -> Callable[[bytes, Context], Coroutine[Any, Any, T]]:
        async def guarded(request: bytes, context: Context) -> T:
            with self._loud():
                return await serve(await self._enter(context), request, context)

        return guarded

    @contextmanager
    def _loud(self) -> Iterator[None]:
        """Let our own bugs in what serves a call out of gRPC, which would only log them."""
        try:
            yield
        except (grpc.aio.BaseError, PeerError):
            raise  # gRPC's own: aborted by us, or the caller went away while it was answered
        except Exception as error:
            _crash(error)
            raise

    async def _enter(self, context: Context) -> PeerId:
        """Return who calls. On every call: old connections outlive a ban."""
        certificates = list(context.auth_context().get("x509_pem_cert", ()))
        try:
            peer = _peer_of(certificates[0])
        except (IndexError, PeerError):
            self.dropped["certificate"] += 1
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "no Shoal certificate")
        if self._banned(peer):
            self.dropped["refused"] += 1
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, "banned here for a while")
        return peer

    def _server_options(self) -> list[tuple[str, int]]:
        most = self.limits.message_bytes + SLACK
        return [
            *dial.OPTIONS,
            ("grpc.server_handshake_timeout_ms", int(1000 * self.limits.handshake_timeout)),
            ("grpc.max_receive_message_length", most),
            ("grpc.max_send_message_length", most),
            # A link, what `Limits.transfers` allows, a few calls: each may hold a whole message.
            ("grpc.max_concurrent_streams", 32),
            # Who connects and asks for nothing shall not use up our files.
            ("grpc.max_connection_idle_ms", int(2000 * self.limits.channel_idle)),
            # Else a second daemon could share the port unnoticed.
            ("grpc.so_reuseport", 0),
        ]

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(SWEEP)
            await self._channels.sweep()

    def _spawn(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if task.cancelled() or isinstance(task.exception(), PeerError | None):
            return
        _crash(task.exception())


def _crash(error: BaseException | None) -> None:
    """Our own bug: loud; the daemon's exception handler decides."""
    context = {"message": "the transport failed", "exception": error}
    asyncio.get_running_loop().call_exception_handler(context)


def _now() -> float:
    return asyncio.get_running_loop().time()


def told(error: grpc.aio.AioRpcError) -> PeerError:
    """Return what a failed call says."""
    return _failure(error.code(), error.details())


def _failure(code: grpc.StatusCode, details: str | None) -> PeerError:
    """Return what a status says; its text may be the other end's, so it is cut and cleaned."""
    reason = _REASONS.get(code, "unreachable")
    text = "".join(c for c in (details or "") if c.isprintable())[:300]
    return PeerError(reason, text or reason)


def _for_people(error: PeerError) -> str:
    """Return why a dial failed; it begins with "refused" when trying again is of no use."""
    return f"{'refused' if error.reason in _FINAL else error.reason}: {error}"


async def _read_call(call: "grpc.aio.StreamStreamCall[bytes, bytes]") -> bytes | None:
    try:
        frame = await call.read()
        if isinstance(frame, bytes):
            return frame
        if await call.code() is grpc.StatusCode.OK:
            return None
        raise _failure(await call.code(), await call.details())
    except grpc.aio.AioRpcError as error:
        raise told(error) from None


async def _write_call(call: "grpc.aio.StreamStreamCall[bytes, bytes]", frame: bytes) -> None:
    try:
        await call.write(frame)
    except grpc.aio.AioRpcError as error:
        raise told(error) from None
    except asyncio.InvalidStateError:
        # The call ended before the write; its status says why.
        await _read_call(call)
        raise PeerError("unreachable", "the link is closed") from None


async def _read_context(context: Context) -> bytes | None:
    try:
        frame: object = await context.read()
    except (grpc.aio.BaseError, asyncio.InvalidStateError):
        raise PeerError("unreachable", "the connection broke") from None
    return frame if isinstance(frame, bytes) else None


async def _write_context(context: Context, frame: bytes) -> None:
    try:
        await context.write(frame)
    except (grpc.aio.BaseError, asyncio.InvalidStateError):
        raise PeerError("unreachable", "the link is closed") from None


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


async def _same_version(version: int, context: Context) -> None:
    if version != fields.VERSION:
        text = f"protocol version {fields.VERSION} is spoken here, {version} there: update Shoal"
        await context.abort(grpc.StatusCode.FAILED_PRECONDITION, text)


def _host_of(context: Context) -> str:
    """Return the caller's IP address: gRPC says ipv4:127.0.0.1:5000 or ipv6:%5B::1%5D:5000."""
    _, _, place = urllib.parse.unquote(context.peer()).partition(":")
    host = place.rpartition(":")[0].strip("[]")
    return host.removeprefix("::ffff:")


def _has_ipv6() -> bool:
    with suppress(OSError), socket.socket(socket.AF_INET6) as probe:
        probe.bind(("::1", 0))
        return True
    return False


def check_listen(listen: Listen) -> None:
    """Raise ConfigError when nobody could listen there now."""
    host = listen.host or ("::" if _has_ipv6() else "0.0.0.0")
    if (why := _why_not_listen(host, listen.port)) is not None:
        raise why


def _cannot_listen(host: str, port: int) -> ConfigError:
    """Find out why gRPC could not listen; it only says that it could not."""
    place = socket_text(host, port)
    return _why_not_listen(host, port) or ConfigError(
        f"can't listen on {place}: choose another (--listen HOST:PORT)"
    )


def _why_not_listen(host: str, port: int) -> ConfigError | None:
    place = socket_text(host, port)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
            probe.listen(1)
    except OSError as error:
        match error.errno:
            case errno.EADDRINUSE:
                why = "the port is in use: stop what listens there, or choose another"
            case errno.EADDRNOTAVAIL:
                why = "that is no address of this machine: use 0.0.0.0"
            case errno.EACCES:
                why = "that port needs more rights: choose one above 1023"
            case _:
                why = f"{error.strerror}: choose another"
        return ConfigError(f"can't listen on {place}: {why} (--listen HOST:PORT, 0 is any port)")
    return None
