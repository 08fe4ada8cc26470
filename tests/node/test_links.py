"""Links between transports over real sockets: opened, used, slowed down, lost and found again."""

import asyncio
import socket
import time
from dataclasses import replace

from support.transports import LIMITS, RUN, Node, link, linked, node, on_a_loop, running, until

from shoal.gossip import messages as m
from shoal.gossip import records as r
from shoal.gossip.names import Author, Hash, PeerId, digest
from shoal.node.addresses import Listen
from shoal.node.wire.records import Sealer


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
