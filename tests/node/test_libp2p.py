"""Finding peers: what needs no libp2p, then real hosts on this machine and in namespaces."""

import asyncio
import base64
import gc
import importlib.util
import json
import random
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st
from support.netns import Host, network

from shoal.gossip.names import PeerId
from shoal.node.traffic import SocketMeter, supported
from shoal.node.transport import libp2p
from shoal.node.transport.libp2p import (
    MISSING,
    Candidates,
    Finder,
    FinderLimits,
    FinderSettings,
    Hint,
    mdns_type,
    own_addresses,
    proof,
    rendezvous_key,
)

LIMITS = FinderLimits()
SEED, OTHER = b"s" * 32, b"o" * 32

needs_libp2p = pytest.mark.skipif(
    importlib.util.find_spec("libp2p") is None,
    reason="libp2p is not installed: pip install 'shoal[libp2p]'",
)
guest = pytest.mark.filterwarnings("ignore")  # libp2p's own warnings are not ours to mend


# ---------------------------------------------------------------- values


def candidates(limits: FinderLimits = LIMITS) -> Candidates:
    return Candidates(limits, random.Random(3))


def test_candidates_are_asked_once_and_again_in_another_life() -> None:
    them = candidates()
    them.found(b"a", ["/ip4/1.1.1.1/tcp/1"], "mdns", now=0)
    assert them.due(0) == [(b"a", ("/ip4/1.1.1.1/tcp/1",), "mdns")]
    assert them.due(0) == []
    assert not them.answered(b"a")
    them.settle(b"a", True, now=1)
    assert them.answered(b"a")
    assert not them.answered(b"b")
    them.found(b"a", ["/ip4/1.1.1.1/tcp/1"], "mdns", now=2)
    assert them.due(1e9) == []  # libp2p only finds: who answered is found
    them.found(b"a", ["/ip4/1.1.1.1/tcp/1"], "mdns", now=3, anew=True)
    assert len(them.due(3)) == 1


def test_pauses_after_failures_double_and_new_addresses_end_them() -> None:
    them = candidates()
    them.found(b"a", ["/ip4/1.1.1.1/tcp/1"], "mdns", now=0)
    now, waits = 0.0, []
    for _ in range(14):
        began = now
        while not them.due(now):
            now += 0.5
        waits.append(now - began)
        them.settle(b"a", False, now=now)
    assert waits[1] <= LIMITS.retry + 0.5
    assert max(waits) <= LIMITS.retry_max + 0.5
    assert waits[-1] >= 0.75 * LIMITS.retry_max
    them.found(b"a", ["/ip4/1.1.1.1/tcp/1"], "mdns", now=now)
    assert them.due(now) == []
    them.found(b"a", ["/ip4/1.1.1.1/tcp/2"], "mdns", now=now)
    assert len(them.due(now)) == 1


def test_hurry_makes_everybody_due_who_is_not_linked() -> None:
    them = candidates()
    for peer in (b"a", b"b"):
        them.found(peer, ["x"], "mdns", now=0)
    for peer, _, _ in them.due(0):
        them.settle(peer, True, now=0)
    them.hurry({b"b"}, now=1)
    assert [peer for peer, _, _ in them.due(1)] == [b"a"]


def test_candidates_and_their_addresses_are_bounded() -> None:
    them = candidates(replace(LIMITS, candidates=10, addresses=2, asking=4))
    for n in range(100):
        them.found(bytes([n]), ["a", "b", "c"], "mdns", now=n)
    assert len(them) == 10
    asked = them.due(1000)
    assert [peer for peer, _, _ in asked] == [bytes([n]) for n in range(90, 94)]
    assert asked[0][1] == ("a", "b")
    them.settle(b"gone", True, now=0)


def test_an_answer_survives_packing() -> None:
    told = ("/ip4/203.0.113.5/tcp/7464", "/dns4/example.org/tcp/1")
    packed = libp2p._pack(told, b"\0\xff", LIMITS)
    assert libp2p._unpack(packed, LIMITS) == (told, b"\0\xff")
    assert len(packed) < LIMITS.contact_bytes


def test_a_contact_beyond_the_bound_is_our_bug() -> None:
    with pytest.raises(ValueError, match="exceeds"):
        libp2p._pack((), bytes(LIMITS.contact_bytes + 1), LIMITS)


@given(
    st.one_of(
        st.binary(max_size=200),
        st.recursive(
            st.none() | st.integers() | st.text(max_size=5) | st.floats(),
            lambda inner: (
                st.lists(inner, max_size=4)
                | st.dictionaries(st.sampled_from(["addresses", "contact", "x"]), inner, max_size=3)
            ),
        ).map(lambda value: json.dumps(value).encode()),
    )
)
def test_bytes_of_others_make_an_answer_or_nothing(data: bytes) -> None:
    answer = libp2p._unpack(data, LIMITS)
    assert answer is None or all(a.startswith("/") for a in answer[0])


@pytest.mark.parametrize(
    "answer",
    [
        {"addresses": [], "contact": ""},
        {"addresses": ["/x"] * 17, "contact": ""},
        {"addresses": ["/" + "x" * 256], "contact": ""},
        {"addresses": ["/a b"], "contact": ""},
        {"addresses": ["no slash"], "contact": ""},
        {"addresses": ["/x"], "contact": "not base64!"},
        {"addresses": ["/x"], "contact": base64.b64encode(bytes(16385)).decode()},
        {"addresses": [7], "contact": ""},
        {"addresses": ["/x"]},
    ],
)
def test_an_answer_out_of_bounds_is_none(answer: object) -> None:
    assert libp2p._unpack(json.dumps(answer).encode(), LIMITS) is None


def test_deeply_nested_answers_are_none() -> None:
    assert libp2p._unpack(b"[" * 30_000, LIMITS) is None


def test_a_proof_holds_for_one_swarm_one_teller_and_one_hearer() -> None:
    told = {proof(s, a, b) for s in (SEED, OTHER) for a in (b"a", b"ab") for b in (b"b", b"bb")}
    assert len(told) == 8
    assert proof(SEED, b"a", b"bc") != proof(SEED, b"ab", b"c")


def test_names_in_the_world_depend_on_the_seed_and_do_not_show_it() -> None:
    assert mdns_type(SEED) != mdns_type(OTHER)
    name = mdns_type(SEED).split(".")[0].removeprefix("_")
    assert len(name) <= 15  # RFC 6335
    assert rendezvous_key(SEED) != rendezvous_key(OTHER)
    assert rendezvous_key(SEED)[:2] == b"\x12\x20"  # a sha2-256 multihash: any DHT node takes it
    assert SEED not in rendezvous_key(SEED)


def test_a_seed_too_short_to_hide_a_swarm_is_refused() -> None:
    with pytest.raises(ValueError, match="16 bytes"):
        Finder(FinderSettings(identity=bytes(32), seed=b"short"))


# ---------------------------------------------------------------- the thread, without libp2p


def settings(n: int, seed: bytes = SEED, **more: Any) -> FinderSettings:
    return FinderSettings(identity=bytes([n]) * 32, seed=seed, **more)


def identity(n: int) -> PeerId:
    key = Ed25519PrivateKey.from_private_bytes(bytes([n]) * 32)
    return PeerId(key.public_key().public_bytes_raw())


async def until(done: Callable[[], Any], timeout: float = 200.0) -> None:
    async with asyncio.timeout(timeout):
        while not done():
            await asyncio.sleep(0.02)


def test_without_libp2p_the_state_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> ModuleType:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    async def main() -> None:
        finder = Finder(settings(1))
        assert finder.state.startswith("off")
        finder.start()
        finder.announce(["/ip4/203.0.113.5/tcp/7464"])
        finder.bootstrap(["/ip4/203.0.113.6/tcp/1/p2p/x"])
        finder.hurry()
        await until(lambda: finder.state == MISSING)
        assert finder._thread is not None
        finder._thread.join(5)
        assert not finder._thread.is_alive()
        await finder.stop()

    monkeypatch.setattr(libp2p, "import_module", absent)
    asyncio.run(main())


def test_switched_off_it_does_nothing() -> None:
    async def main() -> None:
        finder = Finder(settings(1, port=None))
        finder.announce(["/ip4/203.0.113.5/tcp/7464"])
        finder.bootstrap(["/ip4/203.0.113.6/tcp/1/p2p/x"])
        finder.start()
        finder.hurry([identity(2)])
        assert finder.state == "off"
        assert finder._thread is None
        await finder.stop()

    asyncio.run(main())


def test_a_broken_shared_library_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> ModuleType:
        raise ImportError("libgmp.so.10: cannot open shared object file")

    async def main() -> None:
        finder = Finder(settings(1))
        finder.start()
        await until(lambda: "libgmp" in finder.state)
        assert finder.state.startswith("off: libp2p cannot be imported")
        await finder.stop()

    monkeypatch.setattr(libp2p, "import_module", broken)
    asyncio.run(main())


def test_a_failure_ends_only_that_life_and_pauses_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    lives = 0

    def fail(self: Finder, loop: asyncio.AbstractEventLoop) -> None:
        nonlocal lives
        lives += 1
        raise ExceptionGroup("nursery", [OSError("no route\nto anywhere")])

    class Noting(threading.Event):
        """Knows how long it was to be waited for."""

        def __init__(self) -> None:
            super().__init__()
            self.pauses: list[float] = []

        def wait(self, timeout: float | None = None) -> bool:
            assert timeout is not None
            self.pauses.append(timeout)
            return super().wait(timeout)

    async def main() -> None:
        quick = replace(LIMITS, restart=0.05, restart_max=0.2)
        finder = Finder(settings(1, limits=quick))
        finder._stopping = noting = Noting()
        finder.start()
        await until(lambda: len(noting.pauses) >= 5)
        assert finder.state.startswith("failed: OSError: no route to anywhere; starting again")
        assert noting.pauses[3] > 2 * noting.pauses[0]
        assert max(noting.pauses) <= 1.2 * quick.restart_max
        await finder.stop(60)
        assert finder.state == "off: stopped"
        ended = lives
        await asyncio.sleep(0.3)
        assert lives == ended

    monkeypatch.setattr(Finder, "_run", fail)
    asyncio.run(main())


def test_hints_beyond_the_bound_push_out_the_oldest() -> None:
    def hint(n: int) -> Hint:
        return Hint(PeerId(bytes([n]) * 32), ("/x",), b"", "mdns", "")

    async def main() -> None:
        finder = Finder(settings(1, limits=replace(LIMITS, hints=4)))
        loop = asyncio.get_running_loop()

        def flood() -> None:
            for n in range(100):
                finder._hand_over(loop, hint(n))

        # The loop hangs meanwhile: only as many as the bound wait for it.
        thread = threading.Thread(target=flood)
        thread.start()
        thread.join()
        await asyncio.sleep(0)
        assert [finder.hints.get_nowait() for _ in range(finder.hints.qsize())] == [
            hint(n) for n in range(4)
        ]
        for n in range(10):
            finder._hand_over(loop, hint(n))
            await asyncio.sleep(0)
        assert [finder.hints.get_nowait() for _ in range(4)] == [hint(n) for n in range(6, 10)]

    asyncio.run(main())


def test_a_hint_for_a_loop_that_has_ended_is_dropped() -> None:
    finder = Finder(settings(1))
    loop = asyncio.new_event_loop()
    loop.close()
    for _ in range(2 * LIMITS.hints):
        finder._hand_over(loop, Hint(PeerId(bytes(32)), ("/x",), b"", "mdns", ""))


# ---------------------------------------------------------------- real hosts on this machine


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
            assert finder._host is not None
            finder._host.limits = replace(LIMITS, linger=1.0)
        await until(lambda: all(finder.counts["connected"] == 0 for finder in both))
        await until(lambda: not between())
        before = meter.bytes_out
        for _ in range(30):
            await asyncio.sleep(0.1)
            assert not between()
        assert meter.bytes_out == before
        for finder in both:  # its round comes only every 30 s: too long to wait for here
            assert finder._host is not None
            assert not finder._host.host.get_network().auto_connector._started

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
            lambda: point._host is not None and key in point._host.dht.provider_store.providers
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
        ours, theirs = first._host, second._host
        assert ours is not None
        assert theirs is not None

        async def store() -> bool:
            key = b"/pk/" + theirs.me
            return bool(await theirs.dht.value_store._store_at_peer(ID(ours.me), key, bytes(999)))

        def thread() -> bool:
            return bool(trio.from_thread.run(store, trio_token=theirs.token))

        assert not await asyncio.to_thread(thread)
        assert ours.dht.value_store.size() == 0

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


# ---------------------------------------------------------------- processes and namespaces

PEER = """
import asyncio, json, os, resource, sys, time
import grpc
from shoal.node.transport.libp2p import Finder, FinderSettings

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize() / 1e6

async def main(n, seed):
    finder = Finder(FinderSettings(identity=bytes([n]) * 32, seed=seed.encode() * 32))
    began = time.monotonic()
    finder.start()
    finder.announce(["/ip4/203.0.113.%d/tcp/7464" % n], b"contact")
    async def tell():
        while True:
            hint = await finder.hints.get()
            at = round(time.monotonic() - began, 2)
            line = {"peer": hint.peer.hex(), "source": hint.source, "at": at, "libp2p": hint.libp2p}
            print(json.dumps(line), flush=True)
    task = asyncio.create_task(tell())
    await asyncio.to_thread(sys.stdin.read)
    task.cancel()
    used = time.process_time()
    print(json.dumps({"resident": resident(), "cpu": used, "state": finder.state,
                      "torch": "torch" in sys.modules}), flush=True)
    await finder.stop()

asyncio.run(main(int(sys.argv[1]), sys.argv[2]))
"""


def start(host: Host, n: int, seed: str = "s") -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", PEER, str(n), seed]
    pipe = subprocess.PIPE
    return host.start(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True)


def told(process: "subprocess.Popen[str]", peers: set[int]) -> list[dict[str, Any]]:
    """Read hints until all of `peers` were found; the test's own time-out bounds the wait."""
    assert process.stdout is not None
    hints: list[dict[str, Any]] = []
    while not {identity(n).hex() for n in peers} <= {hint["peer"] for hint in hints}:
        line = process.stdout.readline()
        assert line, process.communicate()[1]
        hints.append(json.loads(line))
    return hints


def rest(process: "subprocess.Popen[str]") -> list[dict[str, Any]]:
    """End a peer; return the hints not read yet and its last line."""
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    return [json.loads(line) for line in out.splitlines()]


@needs_libp2p
@pytest.mark.real
def test_mdns_finds_peers_of_the_run_across_namespaces_and_no_others() -> None:
    with network(3) as net:
        alone = start(net[2], 3, seed="o")
        peers = {1: start(net[0], 1), 2: start(net[1], 2), 4: start(net[0], 4)}
        hints = {n: told(process, peers.keys() - {n}) for n, process in peers.items()}
        ends = {n: hints[n] + rest(process) for n, process in peers.items()}
        stranger = rest(alone)
    for n, (*found, last) in ends.items():
        assert {hint["peer"] for hint in found} == {identity(m).hex() for m in ends if m != n}
        assert "mdns" in {hint["source"] for hint in found}
        assert last["state"] == "running"
        assert not last["torch"]
        assert last["resident"] < 200  # MB beside grpc, design 12
    assert len(stranger) == 1


@needs_libp2p
@pytest.mark.real
def test_a_peer_that_comes_back_elsewhere_is_found_again() -> None:
    with network(2) as net:
        stays, killed = start(net[0], 1), start(net[1], 2)
        [first] = told(stays, {2})
        killed.kill()
        killed.communicate()
        start(net[1], 2)
        [again] = told(stays, {2})
    assert again["peer"] == first["peer"] == identity(2).hex()
    assert again["libp2p"] != first["libp2p"]
