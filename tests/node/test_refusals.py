"""Everybody whom a transport turns away, and what they are told."""

import asyncio
from dataclasses import replace

import grpc
import grpc.aio
import pytest
from support.strangers import genesis, link_call, refusal, turned_down
from support.transports import (
    LIMITS,
    OPEN,
    RUN,
    Node,
    link,
    node,
    on_a_loop,
    outcome,
    raw,
    running,
    until,
)

from shoal.gossip import messages as m
from shoal.gossip.names import Hash, RunId
from shoal.node.admission import Admission
from shoal.node.errors import PeerError
from shoal.node.identity import Identity, peer_text
from shoal.node.wire import frames, requests
from shoal.proto.v1 import gossip_pb2 as pb
from shoal.proto.v1.gossip_pb2_grpc import GossipServiceStub


@on_a_loop
async def test_another_peer_at_the_address_is_refused_showing_both_ids() -> None:
    a, b = node(), node()
    wanted = Identity.generate().peer
    async with running(a, b):
        said = await refusal(a, b, wanted)
        assert said.startswith("refused")
        assert peer_text(wanted) in said
        assert peer_text(b.peer) in said


@on_a_loop
async def test_own_address_is_refused() -> None:
    a = node()
    async with running(a):
        a.connect(a.peer, a.addresses)
        await until(lambda: a.owner.of("down"))
        assert "itself" in a.owner.of("down")[0]


@pytest.mark.parametrize(
    ("ours", "theirs", "said"),
    [
        (OPEN, Admission(RunId(bytes(32))), "another run"),
        (OPEN, Admission(RUN, b"s" * 20), "needs a secret"),
        (Admission(RUN, b"s" * 20), Admission(RUN, b"t" * 20), "does not hold the secret"),
        (Admission(RUN, b"s" * 20), OPEN, "does not hold the secret"),
    ],
)
def test_another_swarm_is_refused(ours: Admission, theirs: Admission, said: str) -> None:
    @on_a_loop
    async def test() -> None:
        a, b = node(ours), node(theirs)
        async with running(a, b):
            assert said in await refusal(a, b)

    test()


@pytest.mark.parametrize("stranger", [Admission(RunId(bytes(32))), Admission(RUN, b"s" * 20)])
def test_a_client_of_another_swarm_does_not_get_through_tls(stranger: Admission) -> None:
    @on_a_loop
    async def test() -> None:
        b = node()
        async with running(b):
            who = Identity.generate()
            async with raw(b, stranger.credentials(who)) as channel:
                assert await genesis(channel) is grpc.StatusCode.UNAVAILABLE
            assert b.owner.events == []

    test()


async def hello_outcome(to: Node, who: Identity, first: bytes) -> tuple[grpc.StatusCode, str]:
    async with link_call(to, who, 200) as call:
        await call.write(first)
        got = await outcome(call.read())
        if got[0] is grpc.StatusCode.OK:
            got = (await call.code(), await call.details() or "")
        return got


@on_a_loop
async def test_a_hello_that_does_not_fit_is_refused_with_the_reason() -> None:
    b, who = node(), Identity.generate()
    good = requests.Hello((1,), RUN, OPEN.prove(who.peer), (), 7)
    precondition, malformed = (
        grpc.StatusCode.FAILED_PRECONDITION,
        grpc.StatusCode.INVALID_ARGUMENT,
    )
    cases = [
        (requests.encode_hello(replace(good, versions=(2, 3))), precondition, "2, 3 there"),
        (requests.encode_hello(replace(good, versions=())), precondition, "none there"),
        (requests.encode_hello(replace(good, run=RunId(bytes(32)))), precondition, "00000000"),
        (requests.encode_hello(replace(good, admission=bytes(64))), precondition, "admission"),
        (requests.encode_hello(replace(good, addresses=("x",))), malformed, "no address"),
        (frames.encode(m.Ping(1)), malformed, "Hello"),
        (b"garbage", malformed, ""),
        (bytes(requests.HELLO_BYTES + 1), malformed, "bytes"),
    ]
    async with running(b):
        for first, code, said in cases:
            got = await hello_outcome(b, who, first)
            assert got[0] is code
            assert said in got[1]
        assert b.owner.of("up") == []
        assert b.owner.heard == []


@on_a_loop
async def test_the_version_of_another_protocol_reaches_the_dialler_as_text() -> None:
    a, b = node(), node()
    async with running(a, b):
        hello = a._links.hello()
        a._links.hello = lambda: replace(hello, versions=(9,))
        a.connect(b.peer, b.addresses)
        await until(lambda: a.owner.of("down"))
        assert "protocol version 1 is spoken here, 9 there" in a.owner.of("down")[0]
        assert a.owner.of("down")[0].startswith("refused")
        assert b.owner.events == []


@on_a_loop
async def test_a_link_without_a_hello_does_not_last() -> None:
    b, who = node(limits=replace(LIMITS, handshake_timeout=0.3)), Identity.generate()
    async with running(b), link_call(b, who, 60) as call:
        async with asyncio.timeout(30):
            status = (await outcome(call.read()))[0]
        assert status is grpc.StatusCode.DEADLINE_EXCEEDED


@on_a_loop
async def test_calls_of_another_version_are_refused() -> None:
    b, who = node(), Identity.generate()
    async with running(b), raw(b, OPEN.credentials(who)) as channel:
        stub = GossipServiceStub(channel)
        for call in (
            stub.Deliver(pb.DeliverRequest(version=2)),
            stub.Genesis(pb.GenesisRequest(version=2)),
            stub.Pull(pb.PullRequest(payload=bytes(32), version=2)).read(),
            stub.Initial(pb.InitialRequest(version=2)).read(),
        ):
            code, said = await outcome(call)
            assert code is grpc.StatusCode.FAILED_PRECONDITION
            assert "2 there" in said
        assert b.owner.heard == []


@on_a_loop
async def test_a_banned_peer_is_refused_on_every_call_and_its_link_closed() -> None:
    a, b = node(), node()
    async with running(a, b):
        await link(a, b)
        b.disconnect(a.peer, "enough", ban=3600.0)
        await until(lambda: a.owner.of("down"))
        a.send(b.peer, m.Ping(1))
        a.connect(b.peer)
        await until(lambda: len(a.owner.of("down")) == 2)
        assert "banned" in a.owner.of("down")[1]
        with pytest.raises(PeerError, match="banned"):
            await anext(a.pull(b.peer, Hash(bytes(32)), 1))
        b.send(a.peer, m.Ping(1))
        assert b.owner.heard == []
        b.local.ban(a.peer, 0.0)  # it is over
        a.connect(b.peer)
        await until(lambda: len(a.owner.of("up")) == 2)


@on_a_loop
async def test_links_are_capped_in_number_and_per_address() -> None:
    few = replace(LIMITS, neighbours=3, links_per_address=2)
    b, others = node(limits=few), [node() for _ in range(5)]
    async with running(b, *others):
        for each in others:
            each.connect(b.peer, b.addresses)
        await until(lambda: all(each.owner.events for each in others))
        assert len(b.links()) == 2
        refused = [said for each in others for said in each.owner.of("down")]
        assert len(refused) == 3
        assert all("too many links from 127.0.0.1" in said for said in refused)
        # Whoever goes makes room.
        linked = next(each for each in others if each.links())
        linked.disconnect(b.peer, "room")
        await until(lambda: len(b.links()) == 1)
        waiting = next(each for each in others if each.owner.of("down") and each is not linked)
        waiting.connect(b.peer)
        await until(lambda: len(b.links()) == 2)


@on_a_loop
async def test_all_links_taken_is_told() -> None:
    b, c, d = node(limits=replace(LIMITS, neighbours=1)), node(), node()
    async with running(b, c, d):
        await link(c, b)
        assert "all links are taken" in await turned_down(d, b)
