"""Bytes in bulk, over server streams: payloads, the initial model, what joiners begin with."""

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing, suppress
from typing import TypeVar

import grpc
import grpc.aio

from shoal.gossip.names import Hash, PeerId
from shoal.node.errors import PeerError
from shoal.node.transport.handler import Buffer
from shoal.node.transport.local import Local
from shoal.node.transport.rpc import SERVICE, Context, same_version, told, write_context
from shoal.node.wire import requests
from shoal.node.wire.fields import WireError

T = TypeVar("T")


class Transfers:
    """What is fetched from others, and what they fetch here."""

    def __init__(self, local: Local) -> None:
        self.local = local
        self.limits = local.limits
        self._serving: Counter[PeerId] = Counter()

    # ------------------------------------------------------------ from others

    async def pull(
        self, peer: PeerId, payload: Hash, size: int, offset: int
    ) -> AsyncGenerator[bytes, None]:
        """Yield a payload's bytes from `offset` on; raises PeerError. The hash is not checked."""
        request = requests.encode_pull(payload, offset)
        async with aclosing(self._fetch(peer, "Pull", request, size - offset)) as chunks:
            async for chunk in chunks:
                self.local.bytes_in["payloads"] += len(chunk)
                yield chunk

    async def initial(self, peer: PeerId, size: int, offset: int) -> AsyncGenerator[bytes, None]:
        """Yield the initial model's `size` bytes from `offset` on; raises PeerError."""
        request = requests.encode_initial(offset)
        async with aclosing(self._fetch(peer, "Initial", request, size - offset)) as chunks:
            async for chunk in chunks:
                self.local.bytes_in["joining"] += len(chunk)
                yield chunk

    async def _fetch(
        self, peer: PeerId, method: str, request: bytes, left: int
    ) -> AsyncGenerator[bytes, None]:
        """Yield exactly `left` bytes of a server stream, or raise PeerError."""
        if not 0 <= left <= self.limits.payload_bytes and method == "Pull":
            raise PeerError("oversize", f"{left} bytes are more than a payload may have")
        async with self.local.channel(peer) as channel:
            rpc: grpc.aio.UnaryStreamMultiCallable[bytes, bytes] = channel.rpc.unary_stream(
                f"/{SERVICE}/{method}"
            )
            call = rpc(request, timeout=self.limits.transfer_timeout)
            try:
                while left:
                    chunk = await self._chunk(call)
                    channel.ready = True
                    if chunk is None:
                        self.local.blame(peer, "truncated")
                        raise PeerError("truncated", f"{left} bytes are missing")
                    left -= len(chunk)
                    if left < 0:
                        self.local.blame(peer, "oversize")
                        raise PeerError("oversize", f"{-left} bytes more came than were declared")
                    yield chunk
            except grpc.aio.AioRpcError as error:
                failure = told(error)
                if failure.reason in {"unreachable", "timeout"}:
                    self.local.channels.drop(channel)
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

    # ------------------------------------------------------------ to others

    async def serve_pull(self, peer: PeerId, request: bytes, context: Context) -> None:
        """Stream a payload."""
        payload, offset, version = await self._read(peer, requests.decode_pull, request, context)
        await same_version(version, context)
        data = self.local.handler.payload(payload)
        await self._pour(peer, data, offset, "payloads", context)

    async def serve_initial(self, peer: PeerId, request: bytes, context: Context) -> None:
        """Stream the initial model."""
        offset, version = await self._read(peer, requests.decode_initial, request, context)
        await same_version(version, context)
        await self._pour(peer, await self.local.handler.initial(), offset, "joining", context)

    async def serve_genesis(self, peer: PeerId, request: bytes, context: Context) -> bytes:
        """Return the genesis."""
        version = await self._read(peer, requests.decode_genesis_request, request, context)
        await same_version(version, context)
        answer = requests.encode_genesis_response(self.local.handler.genesis())
        self.local.bytes_out["joining"] += len(answer)
        return answer

    async def serve_snapshot(self, peer: PeerId, request: bytes, context: Context) -> bytes:
        """Return what a joiner may begin with in place of the log."""
        version = await self._read(peer, requests.decode_snapshot_request, request, context)
        await same_version(version, context)
        answer = await self.local.handler.snapshot()
        self.local.bytes_out["joining"] += len(answer)
        return answer

    async def _read(
        self, peer: PeerId, decode: Callable[[bytes], T], request: bytes, context: Context
    ) -> T:
        """Return what is asked; who asks what makes no sense is told so."""
        try:
            return decode(request)
        except WireError as error:
            self.local.blame(peer, error.reason)
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
                    await write_context(context, chunk)
                    self.local.bytes_out[kind] += len(chunk)
        finally:
            self._serving[peer] -= 1
            if not self._serving[peer]:
                del self._serving[peer]
