"""Finders with real hosts on this machine, without mDNS."""

import asyncio
import gc
import socket
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from support.finders import LIMITS, OTHER, SEED, guest, identity, needs_libp2p, settings, until

from shoal.gossip.names import PeerId
from shoal.node.traffic import SocketMeter, supported
from shoal.node.transport.libp2p.finder import Finder
from shoal.node.transport.libp2p.hint import Hint
from shoal.node.transport.libp2p.interfaces import own_addresses
from shoal.node.transport.libp2p.seed import rendezvous_key


class Swarm:
    """Finders on this machine, without mDNS, and what each was told."""

    def __init__(self) -> None:
        self.finders: list[Finder] = []
        self.told: list[dict[PeerId, Hint]] = []
        self._takers: list[asyncio.Task[None]] = []

    async def add(self, seed: bytes = SEED, **more: Any) -> Finder:
        n = len(self.finders) + 1
        finder = Finder(settings(n, seed, mdns=False, **more))
        finder.start()
        finder.announce([f"/ip4/203.0.113.{n}/tcp/7464"], b"contact %d" % n)
        self.finders.append(finder)
        self.told.append({})
        self._takers.append(asyncio.create_task(self._take(finder, self.told[-1])))
        await until(lambda: finder.state == "running" and finder.addresses)
        return finder

    async def _take(self, finder: Finder, told: dict[PeerId, Hint]) -> None:
        while True:
            hint = await finder.hints.get()
            told[hint.peer] = hint

    async def stop(self) -> None:
        for taker in self._takers:
            taker.cancel()
        for finder in self.finders:
            await finder.stop(60)


def with_swarm(scenario: Callable[[Swarm], Any]) -> None:
    async def main() -> None:
        swarm = Swarm()
        try:
            await scenario(swarm)
        finally:
            await swarm.stop()

    asyncio.run(main())
    gc.collect()  # sockets that libp2p left open are complained about here and nowhere else


@needs_libp2p
@guest
def test_a_port_is_not_shared_with_another_process() -> None:
    async def scenario(swarm: Swarm) -> None:
        first = await swarm.add()
        port = int(first.addresses[0].split("/")[4])
        second = Finder(settings(9, mdns=False, port=port))
        second.start()
        try:
            await until(lambda: second.state not in ("starting", "running", "off"))
            assert "in use" in second.state
        finally:
            await second.stop(60)

    with_swarm(scenario)


@needs_libp2p
@guest
@pytest.mark.real
def test_peers_of_one_run_meet_through_a_node_of_another_run() -> None:
    async def scenario(swarm: Swarm) -> None:
        point = await swarm.add(OTHER)
        for _ in range(3):
            (await swarm.add()).bootstrap(point.addresses)
        await until(lambda: all(len(told) == 2 for told in swarm.told[1:]))
        hint = swarm.told[1][identity(3)]
        assert hint.addresses == ("/ip4/203.0.113.3/tcp/7464",)
        assert hint.contact == b"contact 3"
        assert hint.source == "rendezvous"
        assert hint.libp2p in swarm.finders[2].addresses
        # The meeting point belongs to nobody of them: no hint either way.
        assert swarm.told[0] == {}
        assert all(identity(1) not in told for told in swarm.told)

    with_swarm(scenario)


@needs_libp2p
@guest
@pytest.mark.real
def test_a_bootstrap_peer_of_the_same_run_is_a_hint_itself() -> None:
    async def scenario(swarm: Swarm) -> None:
        first, second = await swarm.add(rendezvous=False), await swarm.add(rendezvous=False)
        second.bootstrap(["/ip4/127.0.0.1/tcp/1/p2p/nonsense", *first.addresses])
        await until(lambda: identity(1) in swarm.told[1])
        assert swarm.told[1][identity(1)].source == "bootstrap"

    with_swarm(scenario)


@needs_libp2p
@guest
@pytest.mark.real
@pytest.mark.skipif(not supported(), reason="this kernel does not count bytes per socket")
def test_who_was_found_costs_nothing_more() -> None:
    async def scenario(swarm: Swarm) -> None:
        patient = replace(LIMITS, linger=3600.0, longest=3600.0)
        first, second = await swarm.add(limits=patient), await swarm.add(limits=patient)
        both, meter = (first, second), SocketMeter()
        meter.sample()
        others, nothing = set(meter._last), meter.bytes_out

        def between() -> set[int]:
            """The sockets between the two, sampled."""
            meter.sample()
            return meter._last.keys() - others

        second.bootstrap(first.addresses)
        await until(lambda: identity(1) in swarm.told[1] and between())
        assert meter.bytes_out > nothing
        for finder in both:  # from now on they part as they do
            assert finder._life is not None
            finder._life.host.limits = replace(LIMITS, linger=1.0)
        await until(lambda: all(finder.counts["connected"] == 0 for finder in both))
        await until(lambda: not between())
        before = meter.bytes_out
        for _ in range(30):
            await asyncio.sleep(0.1)
            assert not between()
        assert meter.bytes_out == before
        for finder in both:  # its round comes only every 30 s: too long to wait for here
            assert finder._life is not None
            assert not finder._life.host.network.auto_connector._started

    with_swarm(scenario)


@needs_libp2p
@guest
@pytest.mark.real
def test_a_latecomer_meets_those_who_hold_no_connection_any_more() -> None:
    async def scenario(swarm: Swarm) -> None:
        quick = replace(LIMITS, linger=0.5)
        point = await swarm.add(OTHER, limits=quick)
        first = await swarm.add(limits=quick)
        first.bootstrap(point.addresses)
        key = rendezvous_key(SEED)
        await until(
            lambda: point._life is not None and key in point._life.host.dht.provider_store.providers
        )
        await until(lambda: first.counts["connected"] == 0 == point.counts["connected"])
        (await swarm.add(limits=quick)).bootstrap(point.addresses)
        await until(lambda: identity(2) in swarm.told[2])
        # The first looks only when it is told that links are missing.
        first.hurry()
        await until(lambda: identity(3) in swarm.told[1])

    with_swarm(scenario)


@needs_libp2p
@guest
@pytest.mark.real
def test_plaintext_is_not_offered() -> None:
    async def scenario(swarm: Swarm) -> None:
        finder = await swarm.add()
        port = int(finder.addresses[0].split("/")[4])
        answers = await asyncio.to_thread(negotiate, own_addresses()[0], port)
        assert answers == {"/plaintext/2.0.0": "na", "/noise": "/noise"}

    with_swarm(scenario)


def negotiate(address: str, port: int) -> dict[str, str]:
    """Speak multistream-select by hand: offer protocols one after the other."""
    answers = {}
    for offer in ("/plaintext/2.0.0", "/noise"):
        with socket.create_connection((address, port), 5) as wire, wire.makefile("rb") as reader:
            for line in ("/multistream/1.0.0", offer):
                wire.sendall(bytes([len(line) + 1]) + line.encode() + b"\n")
            for _ in range(2):
                answers[offer] = reader.read(reader.read(1)[0]).decode().strip()
    return answers


@needs_libp2p
@guest
@pytest.mark.real
def test_nobody_stores_values_with_us() -> None:
    async def scenario(swarm: Swarm) -> None:
        import trio
        from libp2p.peer.id import ID

        first, second = await swarm.add(), await swarm.add()
        second.bootstrap(first.addresses)
        await until(lambda: identity(1) in swarm.told[1])
        ours, theirs = first._life, second._life
        assert ours is not None
        assert theirs is not None

        async def store() -> bool:
            key = b"/pk/" + theirs.host.me
            return bool(
                await theirs.host.dht.value_store._store_at_peer(ID(ours.host.me), key, bytes(999))
            )

        def thread() -> bool:
            return bool(trio.from_thread.run(store, trio_token=theirs._bell._token))

        assert not await asyncio.to_thread(thread)
        assert ours.host.dht.value_store.size() == 0

    with_swarm(scenario)


@needs_libp2p
@guest
@pytest.mark.real
def test_a_port_in_use_is_said_and_tried_again() -> None:
    async def scenario(swarm: Swarm) -> None:
        blocker = socket.create_server(("0.0.0.0", 0))
        port = blocker.getsockname()[1]
        finder = Finder(
            settings(9, port=port, mdns=False, limits=replace(LIMITS, restart=0.2, restart_max=0.4))
        )
        finder.start()
        try:
            await until(lambda: finder.state.startswith("failed"))
            assert "starting again" in finder.state
            blocker.close()
            await until(lambda: finder.state == "running")
        finally:
            blocker.close()
            await finder.stop(60)

    with_swarm(scenario)
