"""One gRPC call: its status as a PeerError, its frames at either end."""

import asyncio
import urllib.parse

import grpc
import grpc.aio

from shoal.node.errors import PeerError
from shoal.node.wire import fields

SERVICE = "shoal.proto.v1.GossipService"

Context = grpc.aio.ServicerContext[bytes, bytes]
Unary = grpc.aio.UnaryUnaryMultiCallable[bytes, bytes]

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


def told(error: grpc.aio.AioRpcError) -> PeerError:
    """Return what a failed call says."""
    return _failure(error.code(), error.details())


def _failure(code: grpc.StatusCode, details: str | None) -> PeerError:
    """Return what a status says; its text may be the other end's, so it is cut and cleaned."""
    reason = _REASONS.get(code, "unreachable")
    text = "".join(c for c in (details or "") if c.isprintable())[:300]
    return PeerError(reason, text or reason)


# ---------------------------------------------------------------- the end that calls


async def read_call(call: "grpc.aio.StreamStreamCall[bytes, bytes]") -> bytes | None:
    """Return the next frame, None at the end; raises PeerError."""
    try:
        frame = await call.read()
        if isinstance(frame, bytes):
            return frame
        if await call.code() is grpc.StatusCode.OK:
            return None
        raise _failure(await call.code(), await call.details())
    except grpc.aio.AioRpcError as error:
        raise told(error) from None


async def write_call(call: "grpc.aio.StreamStreamCall[bytes, bytes]", frame: bytes) -> None:
    """Write a frame; raises PeerError."""
    try:
        await call.write(frame)
    except grpc.aio.AioRpcError as error:
        raise told(error) from None
    except asyncio.InvalidStateError:
        # The call ended before the write; its status says why.
        await read_call(call)
        raise PeerError("unreachable", "the link is closed") from None


# ---------------------------------------------------------------- the end that is called


async def read_context(context: Context) -> bytes | None:
    """Return the next frame, None at the end; raises PeerError."""
    try:
        frame: object = await context.read()
    except (grpc.aio.BaseError, asyncio.InvalidStateError):
        raise PeerError("unreachable", "the connection broke") from None
    return frame if isinstance(frame, bytes) else None


async def write_context(context: Context, frame: bytes) -> None:
    """Write a frame; raises PeerError."""
    try:
        await context.write(frame)
    except (grpc.aio.BaseError, asyncio.InvalidStateError):
        raise PeerError("unreachable", "the link is closed") from None


async def same_version(version: int, context: Context) -> None:
    """Refuse a call of another protocol version."""
    if version != fields.VERSION:
        text = f"protocol version {fields.VERSION} is spoken here, {version} there: update Shoal"
        await context.abort(grpc.StatusCode.FAILED_PRECONDITION, text)


def host_of(context: Context) -> str:
    """Return the caller's IP address: gRPC says ipv4:127.0.0.1:5000 or ipv6:%5B::1%5D:5000."""
    _, _, place = urllib.parse.unquote(context.peer()).partition(":")
    host = place.rpartition(":")[0].strip("[]")
    return host.removeprefix("::ffff:")
