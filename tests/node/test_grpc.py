"""The transport over real sockets: links, calls, and everybody it refuses."""

import asyncio
import os
import signal
import socket
import ssl
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path

import grpc
import grpc.aio
import pytest
from support.transports import (
    GENESIS,
    LIMITS,
    OPEN,
    RUN,
    Node,
    Owner,
    link,
    linked,
    node,
    on_a_loop,
    outcome,
    raw,
    running,
    until,
)

from shoal.gossip import messages as m
from shoal.gossip import records as r
from shoal.gossip.limits import Limits
from shoal.gossip.names import Author, Hash, PeerId, RunId, digest
from shoal.node.addresses import Address, Listen, parse
from shoal.node.admission import Admission, Credentials
from shoal.node.errors import PeerError
from shoal.node.identity import Identity, peer_text
from shoal.node.transport import dial
from shoal.node.transport.rpc import SERVICE
from shoal.node.transport.server import loud
from shoal.node.wire import frames, requests
from shoal.node.wire.records import Sealer
from shoal.proto.v1 import gossip_pb2 as pb
from shoal.proto.v1.gossip_pb2_grpc import GossipServiceStub

# ---------------------------------------------------------------- links and messages


@on_a_loop
async def test_three_peers_link_and_talk() -> None:
    a, b, c = nodes = (node(), node(), node())
    async with running(*nodes):
        await link(a, b)
        await link(b, c)
        await link(c, a)
        for one in nodes:
            for two in nodes:
                if one is not two:
                    one.send(two.peer, m.Ping(7))
        for one in nodes:
            others = {two.peer for two in nodes if two is not one}
            await until(lambda o=one, w=others: {p for p, x in o.owner.heard if x == m.Ack(7)} == w)  # type: ignore[misc]
            assert len(one.owner.of("up")) == 2
            assert one.bytes_in["probes"] > 0
            assert one.bytes_out["probes"] > 0


@on_a_loop
async def test_records_arrive_checked_and_counted() -> None:
    a, b = node(), node()
    update = r.Update(Author(a.peer, 1), 1, 1, "dense", digest(b"x"), 100)
    record = Sealer(a.identity, RUN).seal(update)
    async with running(a, b):
        await link(a, b)
        for _ in range(300):
            a.send(b.peer, m.Push((record,)))
        await until(lambda: len(b.owner.heard) == 300)
        assert b.owner.heard[0] == (a.peer, m.Push((record,)))
        assert b.bytes_in["records"] >= 300 * len(record.raw)


@on_a_loop
async def test_a_peer_without_a_link_is_called_and_answers() -> None:
    a, b = node(), node()
    async with running(a, b):
        a.send(b.peer, m.Ping(1))
        assert a.dropped["no link"] == 1
        a.know(b.peer, b.addresses)
        for nonce in range(50):
            a.send(b.peer, m.Ping(nonce))
        await until(lambda: len(a.owner.heard) == 50)
        assert a.owner.heard[-1] == (b.peer, m.Ack(49))
        assert not a.links()
        assert not b.links()


@on_a_loop
async def test_a_peer_that_dialled_can_be_called_back_after_the_link() -> None:
    a, b = node(), node()
    async with running(a, b):
        await link(a, b)
        a.disconnect(b.peer, "enough")
        await until(lambda: b.owner.of("down"))
        assert a.owner.of("down") == ["enough"]
        b.send(a.peer, m.Ping(1))
        await until(lambda: b.owner.heard)
        assert b.owner.heard == [(a.peer, m.Ack(1))]


@on_a_loop
async def test_the_reason_of_a_closed_link_reaches_the_dialler() -> None:
    a, b = node(), node()
    async with running(a, b):
        await link(a, b)
        b.disconnect(a.peer, "not a neighbour")
        await until(lambda: a.owner.of("down"))
        assert "not a neighbour" in a.owner.of("down")[0]


@on_a_loop
async def test_two_that_dial_each_other_at_once_keep_one_link() -> None:
    for _ in range(5):
        a, b = node(), node()
        async with running(a, b):
            a.connect(b.peer, b.addresses)
            b.connect(a.peer, a.addresses)
            await linked(a, b)
            smaller, larger = sorted((a, b), key=lambda each: each.peer)
            await until(lambda s=smaller, r=larger: both_keep_the_dial_of(s, r))
            for _ in range(100):
                if a.owner.heard and b.owner.heard:
                    break
                for one, two in ((a, b), (b, a)):
                    one.send(two.peer, m.Ping(1))
                await asyncio.sleep(0.1)
            assert a.owner.heard
            assert b.owner.heard
            # On a busy machine the switch may show as a link that went down and came up again.
            for one, two in ((a, b), (b, a)):
                assert one.owner.events[-1] == ("up", two.peer, "")
                assert len(one.links()) == 1


def both_keep_the_dial_of(smaller: Node, larger: Node) -> bool:
    ours, theirs = smaller.links(), larger.links()
    return bool(ours and theirs and ours[0].dialled and not theirs[0].dialled)


@on_a_loop
async def test_a_caller_that_goes_away_while_it_is_refused_is_no_bug_of_ours() -> None:
    # What gRPC raises then must not reach the loop's exception handler, which ends the daemon.
    with pytest.raises(grpc.aio.InternalError), loud():
        raise grpc.aio.InternalError("the call is gone")


@on_a_loop
async def test_the_losing_stream_of_two_is_closed_without_anybody_noticing() -> None:
    a, b = sorted((node(), node()), key=lambda each: each.peer)
    async with running(a, b):
        await link(b, a)
        first = a._links.open.pop(b.peer)  # as if `a` had dialled before it heard of the link
        a.connect(b.peer, b.addresses)
        await until(lambda: not b.links()[0].dialled)
        b.send(a.peer, m.Ping(1))
        first.put(m.Ping(2), frame=1 << 20)  # still on its way in the losing stream
        await until(lambda: len(b.owner.heard) == 2)
        assert set(b.owner.heard) == {(a.peer, m.Ack(1)), (a.peer, m.Ping(2))}
        await until(lambda: a.owner.of("down"))
        await asyncio.sleep(0.2)
        assert b.owner.events == [("up", a.peer, "")]
        assert len(a.links()) == len(b.links()) == 1


@on_a_loop
async def test_a_peer_that_comes_back_gets_a_new_link() -> None:
    a, b = node(), node()
    async with running(a):
        async with running(b):
            await link(a, b)
        await until(lambda: a.owner.of("down"))
        again = node(listen=Listen("127.0.0.1", b.port), identity=b.identity)
        async with running(again):
            a.connect(b.peer, again.addresses)
            await until(lambda: len(a.owner.of("up")) == 2)


@on_a_loop
async def test_messages_to_a_peer_that_does_not_read_are_dropped_within_bounds() -> None:
    a, b = node(limits=replace(LIMITS, link_queue_bytes=10_000)), node()
    async with running(a, b):
        await link(a, b)
        ids = tuple(Hash(bytes([i]) * 32) for i in range(100))
        for _ in range(50):
            a.send(b.peer, m.Announce(ids))
        (view,) = a.links()
        assert view.waiting <= 10_000
        assert view.dropped >= 40
        a.disconnect(b.peer, "done")


@on_a_loop
async def test_who_sends_too_much_is_read_more_slowly() -> None:
    a, b = node(), node(limits=replace(LIMITS, records_per_second=100.0))
    seal = Sealer(a.identity, RUN).seal
    async with running(a, b):
        await link(a, b)
        records = [seal(r.Leave(a.peer, number)) for number in range(500)]
        began = time.monotonic()
        for i in range(0, 500, 10):
            a.send(b.peer, m.Push(tuple(records[i : i + 10])))
            await asyncio.sleep(0)
        await until(lambda: len(b.owner.heard) == 50)
        assert time.monotonic() - began > 0.5
        assert b.owner.of("bad") == []


@on_a_loop
async def test_ipv6_works() -> None:
    a, b = node(listen=Listen("::1", 0)), node(listen=Listen("::1", 0))
    async with running(a, b):
        assert a.addresses == (f"/ip6/::1/tcp/{a.port}",)
        await link(a, b)
        assert b.links()[0].host == "::1"


@on_a_loop
async def test_names_are_resolved() -> None:
    a, b = node(), node()
    async with running(a, b):
        a.connect(b.peer, [f"/dns4/localhost/tcp/{b.port}"])
        await until(lambda: a.links())
        a.disconnect(b.peer, "next")
        c = PeerId(bytes(32))
        a.connect(c, ["/dns4/no-such-name.invalid/tcp/7"])
        await until(lambda: len(a.owner.of("down")) == 2)
        assert a.owner.of("down")[1].startswith("unreachable")


@on_a_loop
async def test_dead_addresses_do_not_hide_the_living_one() -> None:
    a, b, c = node(limits=replace(LIMITS, dial_timeout=60.0)), node(), node()
    async with running(a, b, c):
        with socket.socket() as deaf:
            deaf.bind(("127.0.0.1", 0))
            deaf.listen(1)
            silent = f"/ip4/127.0.0.1/tcp/{deaf.getsockname()[1]}"
            a.connect(b.peer, ["/ip4/127.0.0.1/tcp/1", silent, *c.addresses, *b.addresses])
            await until(lambda: a.links())


# ---------------------------------------------------------------- refusals


async def refusal(one: Node, two: Node, peer: PeerId | None = None) -> str:
    one.connect(peer or two.peer, two.addresses)
    await until(lambda: one.owner.of("down"))
    assert one.owner.of("up") == []
    assert two.owner.events == []
    assert two.owner.heard == []
    return one.owner.of("down")[0]


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
                code, _ = await outcome(
                    GossipServiceStub(channel).Genesis(pb.GenesisRequest(version=1))
                )
            assert code is grpc.StatusCode.UNAVAILABLE
            assert b.owner.events == []

    test()


async def hello_outcome(to: Node, who: Identity, first: bytes) -> tuple[grpc.StatusCode, str]:
    async with raw(to, OPEN.credentials(who)) as channel:
        call: grpc.aio.StreamStreamCall[bytes, bytes] = channel.stream_stream(f"/{SERVICE}/Link")(
            timeout=5
        )
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
    async with running(b), raw(b, OPEN.credentials(who)) as channel:
        call: grpc.aio.StreamStreamCall[bytes, bytes] = channel.stream_stream(f"/{SERVICE}/Link")(
            timeout=60
        )
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
async def test_a_banned_peer_is_refused_on_every_call_and_its_link_closed() -> None:
    a, b = node(), node()
    async with running(a, b):
        await link(a, b)
        b.disconnect(a.peer, "enough", ban=1.0)
        await until(lambda: a.owner.of("down"))
        a.send(b.peer, m.Ping(1))
        a.connect(b.peer)
        await until(lambda: len(a.owner.of("down")) == 2)
        assert "banned" in a.owner.of("down")[1]
        with pytest.raises(PeerError, match="banned"):
            await anext(a.pull(b.peer, Hash(bytes(32)), 1))
        b.send(a.peer, m.Ping(1))
        assert b.owner.heard == []
        await asyncio.sleep(1.0)
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
        assert "all links are taken" in await asyncio.wait_for(_down(d, b), 5)


async def _down(one: Node, two: Node) -> str:
    one.connect(two.peer, two.addresses)
    await until(lambda: one.owner.of("down"))
    return one.owner.of("down")[0]


# ---------------------------------------------------------------- TLS


@on_a_loop
async def test_a_man_in_the_middle_is_refused() -> None:
    """He shows the server's true certificate to the probe, but has only his own key."""
    b, who = node(), Identity.generate()
    async with running(b):
        mallory = node()
        async with running(mallory):
            found = await dial.find(OPEN, b.peer, [b.address], timeout=2)
            hijacked = replace(found, target=f"ipv4:127.0.0.1:{mallory.port}")
            async with dial.channel(hijacked, OPEN.credentials(who), 1 << 20) as channel:
                code, _ = await outcome(
                    GossipServiceStub(channel).Genesis(pb.GenesisRequest(version=1))
                )
            assert code is grpc.StatusCode.UNAVAILABLE
            assert mallory.owner.events == []


@on_a_loop
async def test_a_stolen_certificate_is_no_identity() -> None:
    """The copy passes as a certificate, but nobody finishes TLS 1.3 without its key."""
    b, thief = node(), Identity.generate()
    async with running(b):
        mine, theirs = OPEN.credentials(thief), OPEN.credentials(Identity.generate())
        stolen = Credentials(mine.key, mine.server, theirs.client, mine.root)
        async with raw(b, stolen) as channel:
            code, _ = await outcome(
                GossipServiceStub(channel).Genesis(pb.GenesisRequest(version=1))
            )
        assert code is not grpc.StatusCode.OK


@asynccontextmanager
async def tls_server(tmp: Path, version: ssl.TLSVersion, alpn: list[str]) -> AsyncIterator[Node]:
    """Something that is not ours behind a true certificate."""
    host = node()
    credentials = OPEN.credentials(host.identity)
    (tmp / "key").write_bytes(credentials.key)
    (tmp / "crt").write_bytes(credentials.server)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp / "crt", tmp / "key")
    context.maximum_version = version
    context.set_alpn_protocols(alpn)

    def serve(server: socket.socket) -> None:
        with suppress(OSError), server.accept()[0] as tcp, context.wrap_socket(tcp, True) as tls:
            tls.recv(1)

    with socket.create_server(("127.0.0.1", 0)) as server:
        host.port = server.getsockname()[1]
        serving = asyncio.get_running_loop().run_in_executor(None, serve, server)
        yield host
        await serving


def test_tls_older_than_1_3_is_not_spoken(tmp_path: Path) -> None:
    @on_a_loop
    async def test() -> None:
        a = node()
        async with running(a), tls_server(tmp_path, ssl.TLSVersion.TLSv1_2, ["h2"]) as old:
            assert "TLS 1.3" in await refusal(a, old)

    test()


def test_a_server_that_is_not_http2_is_refused(tmp_path: Path) -> None:
    @on_a_loop
    async def test() -> None:
        a = node()
        async with running(a), tls_server(tmp_path, ssl.TLSVersion.TLSv1_3, ["http/1.1"]) as odd:
            assert (await refusal(a, odd)).startswith("refused")

    test()


@on_a_loop
async def test_what_speaks_no_tls_is_told() -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"220 mail.example.org\r\n")
        await reader.read()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    a, b = node(), node()
    b.port = server.sockets[0].getsockname()[1]
    async with running(a):
        assert "no TLS 1.3" in await refusal(a, b)
    server.close()


@on_a_loop
async def test_garbage_at_the_port_and_silent_connections_change_nothing() -> None:
    a, b = node(), node()
    async with running(a, b):
        silent = [await asyncio.open_connection("127.0.0.1", b.port) for _ in range(20)]
        for garbage in (b"GET / HTTP/1.1\r\n\r\n", os.urandom(5000), b"\x16\x03\x01\xff\xff" * 99):
            _, writer = await asyncio.open_connection("127.0.0.1", b.port)
            writer.write(garbage)
            writer.close()
        await link(a, b)
        b.send(a.peer, m.Ping(1))
        await until(lambda: b.owner.heard)
        # gRPC closes who does not finish TLS in `handshake_timeout`.
        for reader, writer in silent:
            assert await asyncio.wait_for(reader.read(), 4) == b""
            writer.close()
        assert b.owner.of("bad") == []


# ---------------------------------------------------------------- bad frames


@asynccontextmanager
async def open_stream(
    to: Node, who: Identity
) -> AsyncIterator["grpc.aio.StreamStreamCall[bytes, bytes]"]:
    async with raw(to, OPEN.credentials(who)) as channel:
        call: grpc.aio.StreamStreamCall[bytes, bytes] = channel.stream_stream(f"/{SERVICE}/Link")(
            timeout=20
        )
        await call.write(
            requests.encode_hello(requests.Hello((1,), RUN, OPEN.prove(who.peer), (), 7))
        )
        await call.read()
        yield call


@on_a_loop
async def test_bad_frames_are_dropped_counted_once_and_the_link_goes_on() -> None:
    b, who = node(limits=replace(LIMITS, message_bytes=100_000)), Identity.generate()
    elsewhere = Sealer(who, RunId(bytes(32))).seal(r.Leave(who.peer, 1))
    async with running(b), open_stream(b, who) as call:
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
        async with open_stream(b, who) as call:
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


def test_our_own_bug_reaches_the_loop_s_exception_handler_at_either_end() -> None:
    class Broken(Owner):
        def on_message(self, peer: PeerId, message: m.Message) -> Sequence[m.Message]:
            raise ZeroDivisionError

    @on_a_loop
    async def test() -> None:
        a, b = node(), node()
        b.local.handler = Broken()
        failures: list[object] = []
        loop = asyncio.get_running_loop()
        before = loop.get_exception_handler()
        loop.set_exception_handler(lambda _, context: failures.append(context["exception"]))
        async with running(a, b):
            a.know(b.peer, b.addresses)
            a.send(b.peer, m.Ping(1))
            await until(lambda: len(failures) == 1)
            await link(a, b)
            a.send(b.peer, m.Ping(1))
            await until(lambda: len(failures) == 2)
            await until(lambda: not a.links())
            b.connect(a.peer, a.addresses)
            await linked(a, b)
            a.send(b.peer, m.Ping(1))
            await until(lambda: len(failures) == 3)
        assert all(isinstance(each, ZeroDivisionError) for each in failures)
        loop.set_exception_handler(before)

    test()


# ---------------------------------------------------------------- processes


CHILD = """
import asyncio, sys
from shoal.gossip.limits import Limits
from shoal.gossip.names import RunId
from shoal.node.addresses import Listen, parse
from shoal.node.admission import Admission
from shoal.node.identity import Identity
from shoal.node.transport.grpc import Transport

class Owner:
    def on_link_up(self, peer, admission): pass
    def on_link_down(self, peer, reason): pass

async def main():
    run = RunId(bytes.fromhex(sys.argv[1]))
    listen = Listen("127.0.0.1", 0)
    child = Transport(Identity.generate(), Admission(run), Owner(), listen=listen, limits=Limits())
    await child.start()
    print(child.addresses[0] + "/p2p/" + str(child.identity), flush=True)
    for text in sys.argv[2:]:
        address = parse(text)
        child.connect(address.peer, [str(address.bare())])
    await asyncio.sleep(60)

asyncio.run(main())
"""


@asynccontextmanager
async def child(*dial: str) -> AsyncIterator[tuple[asyncio.subprocess.Process, Address]]:
    """A peer in a process of its own, which dials the given addresses."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", CHILD, RUN.hex(), *dial, stdout=asyncio.subprocess.PIPE
    )
    try:
        assert process.stdout is not None
        line = await asyncio.wait_for(process.stdout.readline(), 20)
        yield process, parse(line.decode().strip())
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


@pytest.mark.real
def test_frozen_peers_on_idle_links_are_noticed_by_either_end() -> None:
    @on_a_loop
    async def test() -> None:
        a = node(limits=Limits())
        async with running(a):
            own = str(a.address.of(a.peer))
            async with child() as (dialled, address), child(own) as (dialler, _):
                assert address.peer is not None
                a.connect(address.peer, [str(address.bare())])
                await until(lambda: len(a.links()) == 2, seconds=10)
                assert {view.dialled for view in a.links()} == {True, False}
                await asyncio.sleep(1.0)
                for process in (dialled, dialler):
                    process.send_signal(signal.SIGSTOP)
                await until(lambda: len(a.owner.of("down")) == 2, seconds=60)

    test()


@pytest.mark.real
def test_a_killed_peer_is_noticed_at_once() -> None:
    @on_a_loop
    async def test() -> None:
        a = node(limits=Limits())
        async with running(a), child() as (process, address):
            assert address.peer is not None
            a.connect(address.peer, [str(address.bare())])
            await until(lambda: a.links())
            process.kill()
            await until(lambda: a.owner.of("down"))

    test()


@pytest.mark.real
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_identity_wire_and_transport_fit_in_a_small_process() -> None:
    code = (
        "import sys, shoal.node.transport.grpc;"
        "assert not {'torch', 'numpy'} & set(sys.modules);"
        "lines = open('/proc/self/status').read().splitlines();"
        "print(next(line.split()[1] for line in lines if line.startswith('VmHWM')))"
    )

    async def run() -> int:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", code, stdout=asyncio.subprocess.PIPE
        )
        out, _ = await process.communicate()
        return int(out)

    assert asyncio.run(run()) < 90 << 10
