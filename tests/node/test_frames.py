"""What is said over links and calls: as the schema has it, or not as it should be."""

from dataclasses import replace

import grpc
import grpc.aio
from support.strangers import open_link
from support.transports import (
    GENESIS,
    LIMITS,
    OPEN,
    link,
    node,
    on_a_loop,
    outcome,
    raw,
    running,
    until,
)

from shoal.gossip import messages as m
from shoal.gossip import records as r
from shoal.gossip.names import Hash, PeerId, RunId
from shoal.node.identity import Identity
from shoal.node.wire import frames
from shoal.node.wire.records import Sealer
from shoal.proto.v1 import gossip_pb2 as pb
from shoal.proto.v1.gossip_pb2_grpc import GossipServiceStub


@on_a_loop
async def test_the_schema_says_what_is_on_the_wire() -> None:
    """A client generated from proto/v1 alone can call a daemon."""
    b, who = node(), Identity.generate()
    async with running(b), raw(b, OPEN.credentials(who)) as channel:
        stub = GossipServiceStub(channel)
        ping = pb.Message(ping=pb.Ping(nonce=5))
        answer = await stub.Deliver(pb.DeliverRequest(messages=[ping], version=1))
        assert answer.messages[0].ack.nonce == 5
        assert (await stub.Genesis(pb.GenesisRequest(version=1))).genesis == GENESIS
        assert b.owner.heard == [(who.peer, m.Ping(5))]


@on_a_loop
async def test_bad_frames_are_dropped_counted_once_and_the_link_goes_on() -> None:
    b, who = node(limits=replace(LIMITS, message_bytes=100_000)), Identity.generate()
    elsewhere = Sealer(who, RunId(bytes(32))).seal(r.Leave(who.peer, 1))
    async with running(b), open_link(b, who) as call:
        await call.write(b"\xff\xff garbage")
        await call.write(frames.encode(m.Push((elsewhere,))) + frames.encode(m.Ping(1)))
        await call.write(bytes(100_001))
        await call.write(frames.encode(m.Vouch(who.peer, bytes(64))))
        await call.write(frames.encode(m.Ping(2)))
        await until(lambda: b.owner.heard)
        assert b.owner.heard == [(who.peer, m.Ping(2))]
        reasons = ["malformed", "signature", "oversize", "admission"]
        assert b.owner.of("bad") == reasons
        assert b.dropped == dict.fromkeys(reasons, 1)
        assert len(b.links()) == 1


@on_a_loop
async def test_a_frame_beyond_grpcs_own_bound_ends_the_link_only() -> None:
    b, who, other = node(), Identity.generate(), node()
    async with running(b, other):
        async with open_link(b, who) as call:
            await call.write(bytes(LIMITS.message_bytes + (1 << 20)))
            await until(lambda: b.owner.of("down"))
        await link(other, b)


@on_a_loop
async def test_a_flood_of_calls_is_refused() -> None:
    b, who = node(limits=replace(LIMITS, bytes_per_second=1000.0)), Identity.generate()
    frame = frames.stamp() + frames.encode(m.Announce(tuple(Hash(bytes(32)) for _ in range(50))))
    async with running(b), raw(b, OPEN.credentials(who)) as channel:
        stub = GossipServiceStub(channel)
        codes = [await outcome(stub.Deliver(pb.DeliverRequest.FromString(frame))) for _ in range(5)]
        assert codes[0][0] is grpc.StatusCode.OK
        assert codes[-1][0] is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "flood" in b.owner.of("bad")


@on_a_loop
async def test_a_bad_answer_to_a_call_is_dropped() -> None:
    a, b = node(), node()

    async def garbage(peer: PeerId, request: bytes, context: object) -> bytes:
        return b"\xff garbage"

    b._messages.serve = garbage  # type: ignore[method-assign]
    async with running(a, b):
        a.know(b.peer, b.addresses)
        a.send(b.peer, m.Ping(1))
        await until(lambda: a.owner.of("bad"))
        assert a.owner.events == [("bad", b.peer, "malformed")]
