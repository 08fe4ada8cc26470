"""Payloads and the initial model over real sockets: whole, resumed, cut off and refused."""

import asyncio
import os
from collections.abc import AsyncIterator
from dataclasses import replace

import grpc
import grpc.aio
import pytest
from support.transports import LIMITS, OPEN, link, node, on_a_loop, outcome, raw, running, until

from shoal.gossip import messages as m
from shoal.gossip.names import Hash, PeerId, digest
from shoal.node.errors import PeerError
from shoal.node.identity import Identity
from shoal.node.transport.rpc import SERVICE
from shoal.node.wire import requests


async def collect(chunks: AsyncIterator[bytes]) -> bytes:
    return b"".join([chunk async for chunk in chunks])


@on_a_loop
async def test_a_large_payload_is_pulled_and_resumed_anywhere() -> None:
    a, b, c = node(), node(), node()
    data = os.urandom(20 << 20)
    payload = digest(data)
    b.owner.payloads[payload] = data
    c.owner.payloads[payload] = memoryview(data)
    async with running(a, b, c):
        a.know(b.peer, b.addresses)
        a.know(c.peer, c.addresses)
        first = b""
        async for chunk in a.pull(b.peer, payload, len(data)):
            first += chunk
            if len(first) > 5 << 20:
                break
        rest = await collect(a.pull(c.peer, payload, len(data), len(first)))
        assert digest(first + rest) == payload
        assert a.bytes_in["payloads"] == len(data)
        assert await collect(a.pull(b.peer, payload, len(data), len(data))) == b""


@on_a_loop
async def test_the_dialled_end_of_a_link_can_pull_too() -> None:
    a, b = node(), node()
    a.owner.payloads[digest(b"data")] = b"data"
    async with running(a, b):
        await link(a, b)
        assert await collect(b.pull(a.peer, digest(b"data"), 4)) == b"data"


@pytest.mark.parametrize(
    ("held", "declared", "offset", "reason"),
    [
        (b"x" * 999, 1000, 0, "truncated"),
        (b"x" * 1001, 1000, 0, "oversize"),
        (b"x" * (3 << 20), 1000, 0, "oversize"),
        (b"", 1000, 0, "truncated"),
        (b"x" * 10, 1000, 500, "truncated"),
        (None, 1000, 0, "not found"),
        (b"x", 2 << 30, 0, "oversize"),
        (b"x", 10, 11, "oversize"),
    ],
)
def test_a_transfer_of_another_length_raises(
    held: bytes | None, declared: int, offset: int, reason: str
) -> None:
    @on_a_loop
    async def test() -> None:
        a, b = node(), node()
        payload = digest(b"wanted")
        if held is not None:
            b.owner.payloads[payload] = held
        async with running(a, b):
            a.know(b.peer, b.addresses)
            with pytest.raises(PeerError) as caught:
                await collect(a.pull(b.peer, payload, declared, offset))
            assert caught.value.reason == reason

    test()


@on_a_loop
async def test_a_peer_that_dies_in_the_middle_of_a_transfer_is_an_error_at_once() -> None:
    a, b = node(), node()
    data = bytes(30 << 20)
    b.owner.payloads[digest(data)] = data
    async with running(a):
        await b.start()
        a.know(b.peer, b.addresses)
        chunks = a.pull(b.peer, digest(data), len(data))
        await anext(chunks)
        await b.stop()
        with pytest.raises(PeerError) as caught:
            await collect(chunks)
        assert caught.value.reason in {"unreachable", "truncated"}


@on_a_loop
async def test_a_transfer_without_progress_times_out() -> None:
    a, b = node(limits=replace(LIMITS, pull_timeout=0.3)), node()

    async def forever(peer: PeerId, request: bytes, context: object) -> None:
        await asyncio.sleep(60)

    b._transfers.serve_pull = forever  # type: ignore[method-assign]
    async with running(a, b):
        a.know(b.peer, b.addresses)
        with pytest.raises(PeerError) as caught:
            await collect(a.pull(b.peer, Hash(bytes(32)), 1))
        assert caught.value.reason == "timeout"


@on_a_loop
async def test_one_peer_can_not_take_all_transfers() -> None:
    b, who = node(limits=replace(LIMITS, transfers=8)), Identity.generate()
    data = bytes(30 << 20)
    b.owner.payloads[digest(data)] = data
    async with running(b), raw(b, OPEN.credentials(who)) as channel:
        pull: grpc.aio.UnaryStreamMultiCallable[bytes, bytes] = channel.unary_stream(
            f"/{SERVICE}/Pull"
        )
        request = requests.encode_pull(digest(data), 0)
        calls = [pull(request), pull(request)]
        for call in calls:
            assert await call.read()
        code, _ = await outcome(pull(request).read())
        assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
        for call in calls:
            call.cancel()
        await until(lambda: not b._transfers._serving)


@on_a_loop
async def test_the_initial_model_is_served() -> None:
    a, b = node(), node()
    async with running(a, b):
        a.know(b.peer, b.addresses)
        with pytest.raises(PeerError) as caught:
            await collect(a.initial(b.peer, 4000))
        assert caught.value.reason == "not found"
        b.owner.model = bytes(range(250)) * 16
        assert await collect(a.initial(b.peer, 4000)) == b.owner.model
        assert await collect(a.initial(b.peer, 4000, 1000)) == b.owner.model[1000:]


@on_a_loop
async def test_nobody_can_be_pulled_from_without_an_address() -> None:
    a = node()
    async with running(a):
        with pytest.raises(PeerError, match="no address"):
            await collect(a.pull(PeerId(bytes(32)), Hash(bytes(32)), 1))


@on_a_loop
async def test_unused_connections_are_closed() -> None:
    a, b = node(limits=replace(LIMITS, channel_idle=0.0)), node()
    async with running(a, b):
        a.know(b.peer, b.addresses)
        a.send(b.peer, m.Ping(1))
        await until(lambda: a.owner.heard)
        assert b.peer in a.local.channels
        await asyncio.sleep(0.05)
        await a.local.channels.sweep()
        assert b.peer not in a.local.channels
        await link(a, b)
        await a.local.channels.sweep()
        assert a.links()
