"""Daemons that turn others down, and programs that are not ours at a daemon's port."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc
import grpc.aio
from support.transports import OPEN, RUN, Node, outcome, raw, until

from shoal.gossip.names import PeerId
from shoal.node.identity import Identity
from shoal.node.transport.rpc import SERVICE
from shoal.node.wire import requests
from shoal.proto.v1 import gossip_pb2 as pb
from shoal.proto.v1.gossip_pb2_grpc import GossipServiceStub

LinkCall = grpc.aio.StreamStreamCall[bytes, bytes]


async def turned_down(one: Node, two: Node, peer: PeerId | None = None) -> str:
    """Let `one` dial `two` as `peer`; return why that failed."""
    one.connect(peer or two.peer, two.addresses)
    await until(lambda: one.owner.of("down"))
    return one.owner.of("down")[0]


async def refusal(one: Node, two: Node, peer: PeerId | None = None) -> str:
    """Do so; nobody hears anything else of it."""
    said = await turned_down(one, two, peer)
    assert one.owner.of("up") == []
    assert two.owner.events == []
    assert two.owner.heard == []
    return said


async def genesis(channel: grpc.aio.Channel) -> grpc.StatusCode:
    """Ask for the genesis; return how that ended."""
    code, _ = await outcome(GossipServiceStub(channel).Genesis(pb.GenesisRequest(version=1)))
    return code


@asynccontextmanager
async def link_call(to: Node, who: Identity, seconds: float) -> AsyncIterator[LinkCall]:
    """Call Link and leave it to the test what is said."""
    async with raw(to, OPEN.credentials(who)) as channel:
        yield channel.stream_stream(f"/{SERVICE}/Link")(timeout=seconds)


@asynccontextmanager
async def open_link(to: Node, who: Identity) -> AsyncIterator[LinkCall]:
    """Open a link by hand, hello and all."""
    async with link_call(to, who, 20) as call:
        hello = requests.Hello((1,), RUN, OPEN.prove(who.peer), (), 7)
        await call.write(requests.encode_hello(hello))
        await call.read()
        yield call
