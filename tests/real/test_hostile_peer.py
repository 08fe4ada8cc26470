"""A hostile member against live daemons: every lie is counted, none of them stops the swarm."""

import asyncio
import contextlib
import os
import random
import re
import socket
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from support.daemons import PATIENCE, Daemon, agree, run_file

from shoal.gossip import messages as m
from shoal.gossip import records as r
from shoal.gossip.limits import Limits
from shoal.gossip.names import NO_HASH, Author, Hash, PeerId, RunId, digest
from shoal.node.addresses import Address, Listen, parse_join
from shoal.node.admission import Admission
from shoal.node.identity import Identity
from shoal.node.transport.grpc import Transport
from shoal.node.wire.frames import encode
from shoal.node.wire.records import Sealer, encode_body

pytestmark = [pytest.mark.real, pytest.mark.slow, pytest.mark.timeout(2400)]

GROWTH = 48 << 20
"""Bytes that all attacks together may cost a daemon for good."""


class Liar:
    """A member by its own fresh identity; implements the transport's `Handler`."""

    def __init__(self, run: RunId) -> None:
        self.identity = Identity.generate()
        self.peer = self.identity.peer
        self.run = run
        self.admission = Admission(run)
        self.proof = self.admission.prove(self.peer)
        self.seal = Sealer(self.identity, run).seal
        self.linked, self.unlinked = asyncio.Event(), asyncio.Event()
        self.payloads: dict[Hash, bytes] = {}
        self.served = 0
        self.transport = Transport(
            self.identity, self.admission, self, listen=Listen("127.0.0.1", 0), limits=Limits()
        )

    def me(self, n: int = 1) -> tuple[r.Record, r.Record]:
        contact = r.Contact(self.peer, n, self.transport.addresses, self.proof)
        return self.seal(contact), self.alive(n)

    def alive(self, n: int) -> r.Record:
        return self.seal(r.Alive(self.peer, n, 5, r.Standing.OBSERVING))

    def update(self, number: int = 1, **changes: object) -> r.Record:
        inline = changes.pop("inline", b"garbage")
        log = changes.pop("log", 1)
        assert isinstance(inline, bytes)
        assert isinstance(log, int)
        update = r.Update(
            Author(self.peer, log), number, 1, "dense", digest(inline), len(inline), inline
        )
        return self.seal(replace(update, **changes))  # type: ignore[arg-type]

    def on_link_up(self, peer: PeerId, admission: bytes) -> None:
        self.linked.set()

    def on_link_down(self, peer: PeerId, reason: str) -> None:
        self.unlinked.set()

    def on_message(self, peer: PeerId, message: m.Message) -> list[m.Message]:
        if isinstance(message, m.Ping):
            return [m.Ack(message.nonce)]
        if isinstance(message, m.AskAdmission):
            return [m.Vouch(self.peer, self.proof)] if self.peer in message.peers else []
        return []

    def on_misbehaviour(self, peer: PeerId, reason: str) -> None: ...

    def payload(self, payload: Hash) -> bytes | None:
        self.served += 1
        return self.payloads.get(payload)

    def genesis(self) -> bytes:
        return b""

    async def initial(self) -> None:
        return None

    async def snapshot(self) -> bytes:
        return b""


class Front:
    """Liars at one daemon's door."""

    def __init__(self, daemon: Daemon) -> None:
        self.daemon = daemon
        self.address: Address = parse_join(daemon.wait("up", lambda s: s.join).join[0])
        assert self.address.peer is not None
        assert self.address.run is not None
        self.peer, self.run = self.address.peer, self.address.run

    @contextlib.asynccontextmanager
    async def liar(self, *, known: bool = True) -> AsyncIterator[Liar]:
        liar = Liar(self.run)
        await liar.transport.start()
        try:
            liar.transport.connect(self.peer, [self.address])
            async with asyncio.timeout(20 * PATIENCE):
                await liar.linked.wait()
            if known:
                self.push(liar, *liar.me())
            yield liar
        finally:
            await liar.transport.stop()

    def push(self, liar: Liar, *records: r.Record) -> None:
        liar.transport.send(self.peer, m.Push(records))

    def raw(self, liar: Liar, *frames: bytes) -> None:
        """Write bytes on the link as they are, each as a frame of its own."""
        if link := liar.transport._links.open.get(self.peer):
            for frame in frames:
                link.outbox._waiting.append(("lies", frame))
                link.outbox.size += len(frame)
            link.wake()

    async def counted(self, family: str, label: str, above: int = 0) -> int:
        """Wait until /metrics has counted this, more often than `above`; return how often."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(20 * PATIENCE):
                while (
                    found := await asyncio.to_thread(metric, self.daemon, family, label)
                ) <= above:
                    await asyncio.sleep(0.25)
                return found
        raise AssertionError(f"{family} {label} was not counted\n{metrics(self.daemon)}")


def metrics(daemon: Daemon) -> str:
    status = (daemon.directory / "status.json").read_text()
    port = re.search(r'"port": ?(\d+)', status)
    assert port is not None
    url = f"http://127.0.0.1:{port[1]}/metrics"
    with urllib.request.urlopen(url, timeout=20 * PATIENCE) as answer:
        text: str = answer.read().decode()
    return text


def metric(daemon: Daemon, family: str, label: str) -> int:
    found = re.search(rf'^shoal_{family}_total{{\w+="{label}"}} (\d+)', metrics(daemon), re.M)
    return int(found[1]) if found else 0


def resident(daemon: Daemon) -> int:
    assert daemon.process is not None
    pages = int(Path(f"/proc/{daemon.process.pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def turn(daemon: Daemon) -> int:
    return daemon.wait("answering", bool).turn


# ---------------------------------------------------------------- the attacks


async def unreadable_frames(front: Front) -> None:
    async with front.liar() as liar:
        async with asyncio.timeout(20 * PATIENCE):  # a few are enough: misdeeds are soon forgotten
            while not liar.unlinked.is_set():
                front.raw(liar, b"\xff" * 100)
                await asyncio.sleep(0.2)
        await front.counted("dropped", "malformed")
        await front.counted("events", "banned")
    async with front.liar() as liar:
        front.raw(liar, bytes((4 << 20) + 1000))
        large = await front.counted("dropped", "oversize")
    async with front.liar() as liar:
        front.raw(liar, encode(m.Ping(1)) * 100_000)
        await front.counted("dropped", "oversize", above=large)
    async with front.liar() as liar:
        front.raw(liar, bytes(8 << 20))  # gRPC itself ends this one


async def false_records(front: Front) -> None:
    async with front.liar() as liar:
        good = liar.alive(3)
        forged = replace(good, raw=bytes(64) + good.raw[64:])
        front.push(liar, forged)
        await front.counted("dropped", "signature")
        elsewhere = Sealer(liar.identity, RunId(bytes(32)))
        front.push(liar, elsewhere.seal(r.Alive(liar.peer, 4, 5, r.Standing.OBSERVING)))
        bad = r.Contact(Identity.generate().peer, 1, (), bytes(64))
        body = encode_body(bad)
        front.push(liar, r.Record(NO_HASH, bytes(64) + body, bad))
    async with front.liar() as liar:
        top = 2**64 - 1
        front.push(liar, liar.seal(r.Suspect(liar.peer, front.peer, top)))
        await front.counted("dropped", "malformed")
        front.push(liar, liar.seal(r.Suspect(liar.peer, front.peer, r.HIGHEST)))
        liar.transport.send(front.peer, m.Ping(1, top))


async def replays_and_floods(front: Front) -> None:
    async with front.liar() as liar:
        for _ in range(20):
            front.push(liar, *liar.me())
        await front.counted("gossip", "duplicate")
    async with front.liar() as liar:
        # At once, not one after the other: who reads slowly is not flooded.
        front.push(liar, *(liar.alive(n) for n in range(2, 4000)))
        await front.counted("turned_away", "slowed")


async def strangers(front: Front) -> None:
    async with front.liar() as liar:
        ghosts = [Liar(front.run).update() for _ in range(400)]
        for start in range(0, len(ghosts), 100):
            front.push(liar, *ghosts[start : start + 100])
        await front.counted("gossip", "stranger-dropped")


async def lawless_updates(front: Front) -> None:
    async with front.liar() as liar:
        garbage = random.Random(1).randbytes(1100)
        liar.payloads[digest(garbage)] = garbage
        front.push(
            liar,
            liar.update(1),
            liar.update(2, kind="sparse"),
            liar.update(3, turn=0),
            liar.update(4, turn=2**32 - 1),
            _named(liar, 5, digest(garbage), 1100),
            _named(liar, 6, digest(b"endless"), 1 << 50),
            _named(liar, 7, digest(garbage), 1100, kind="secret"),
        )
        for rule in ("kind", "turn", "size", "payload"):
            await front.counted("refused_updates", rule)
        await front.counted("pulls", "done")
        assert liar.served == 1, "what the record alone decides is never fetched"


def _update(record: r.Record) -> r.Update:
    assert isinstance(record.statement, r.Update)
    return record.statement


def _named(liar: Liar, number: int, payload: Hash, size: int, kind: str = "dense") -> r.Record:
    update = _update(liar.update(number, kind=kind))
    return liar.seal(replace(update, inline=None, payload=payload, size=size))


async def false_transfers(front: Front) -> None:
    async with front.liar() as liar:
        wrong = digest(b"what it is not")
        liar.payloads[wrong] = bytes(1100)
        front.push(liar, _named(liar, 1, wrong, 1100))
        await front.counted("pulls", "hash")
        await front.counted("gossip", "misbehaved:hash")
    async with front.liar() as liar:
        data = random.Random(2).randbytes(1100)
        liar.payloads[digest(data)] = data[:600]
        front.push(liar, _named(liar, 1, digest(data), 1100))
        await front.counted("pulls", "truncated")
        await front.counted("dropped", "truncated")
    async with front.liar() as liar:
        never = [_named(liar, n, digest(b"never %d" % n), 1100) for n in range(1, 60)]
        front.push(liar, *never)
        await front.counted("pulls", "not found")
        await front.counted("gossip", "misbehaved:not found")


async def equivocation(front: Front) -> None:
    async with front.liar() as liar:
        front.push(liar, liar.update(1), liar.update(2, inline=b"one"))
        front.push(liar, liar.update(2, inline=b"another"))
        await front.counted("events", "equivocation")


async def odd_questions(front: Front) -> None:
    top = 2**32 - 1
    async with front.liar() as liar:
        me, host = Author(liar.peer, 2**64 - 1), Author(front.peer, 7)
        entries = tuple(m.Entry(Author(liar.peer, i), top, digest(b"x"), top) for i in range(500))
        told: list[m.Message] = [
            m.Digest(entries, True, digest(b"y"), 1, True),
            m.Digest(entries, False, digest(b"y"), 1, True),
            m.AskDigest(),
            m.Want(me, 1, top),
            m.Want(host, 1, top),
            m.AskHashes(host, (top,) * 1000),
            m.Hashes(host, (1, top), (digest(b"a"), digest(b"b"))),
            m.Hashes(host, (), ()),
            m.ViewDigest((1,) * 256),
            m.ViewDigest(()),
            m.ViewIds(tuple(range(256)), tuple(digest(b"%d" % i) for i in range(2000))),
            m.Graft(tuple(digest(b"%d" % i) for i in range(2000))),
            m.Announce(tuple(digest(b"%d" % i) for i in range(5000))),
            m.AskAdmission(tuple(PeerId(digest(b"%d" % i)) for i in range(1000))),
            m.PingRequest(2**64 - 1, front.peer),
            m.PingRequest(2**64 - 1, PeerId(bytes(32))),
            m.Ack(0),
            m.Nack(0),
            m.Prune(),
        ]
        for message in told * 3:
            liar.transport.send(front.peer, message)
        oversize = m.Digest(
            tuple(m.Entry(Author(liar.peer, i), 1, digest(b"x"), 0) for i in range(10_000)),
            False,
            digest(b"z"),
            0,
            True,
        )
        liar.transport.send(front.peer, oversize)
        await front.counted("gossip", "digest-oversize")
        progress = r.Progress(
            liar.peer,
            5,
            tuple((Author(liar.peer, i), top) for i in range(3000)),
            NO_HASH,
            (1, 2),
            r.Report(turn=2**64 - 1, steps=2**64 - 1, loss=float("inf"), evaluation=float("nan")),
        )
        front.push(liar, liar.seal(progress))
        await front.counted("gossip", "progress-ahead")


def fake_member(run: RunId) -> tuple[r.Record, r.Record]:
    fake = Identity.generate()
    seal = Sealer(fake, run).seal
    contact = r.Contact(fake.peer, 1, ("/ip4/127.0.0.1/tcp/9",), Admission(run).prove(fake.peer))
    return seal(contact), seal(r.Alive(fake.peer, 1, 5, r.Standing.TRAINING))


async def many_logs_and_members(front: Front) -> None:
    async with front.liar() as liar:
        front.push(liar, *(liar.update(log=i) for i in range(200)))
        await front.counted("gossip", "log-delayed")
    async with front.liar() as liar:
        for _ in range(8):
            front.push(liar, *(record for _ in range(120) for record in fake_member(front.run)))
            await asyncio.sleep(0.3)
        await front.counted("gossip", "view-full")


async def noise_on_the_port(front: Front) -> None:
    sockets = []
    for i in range(100):
        connection = socket.create_connection((front.address.host, front.address.port), timeout=60)
        with contextlib.suppress(ConnectionError):  # it may have been turned away by now
            noise = random.Random(i).randbytes(50)
            connection.sendall(noise if i % 2 else b"GET / HTTP/1.1\r\n\r\n")
        sockets.append(connection)
    await asyncio.sleep(1)
    for connection in sockets:
        connection.close()


ATTACKS = [
    unreadable_frames,
    false_records,
    replays_and_floods,
    strangers,
    lawless_updates,
    false_transfers,
    equivocation,
    odd_questions,
    noise_on_the_port,
    many_logs_and_members,
]


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[tuple[Daemon, Daemon]]:
    # The C library keeps pools of freed memory, more of them the more cores there are.
    a = Daemon(tmp_path / "a", prefix=("env", "MALLOC_ARENA_MAX=2"))
    b = Daemon(tmp_path / "b")
    local = ("--listen", "127.0.0.1:0", "--threads", "1")
    try:
        run = run_file(tmp_path, peers=2, turns=10_000)
        wide = 'name = "digits"\nwidth = 128\n[local]'  # payloads that do not fit into a record
        run.write_text(run.read_text().replace('name = "digits"\n[local]', wide))
        a.start("start", str(run), "--dir", str(a.directory), *local)
        up = a.wait("up", lambda s: s.join)
        b.start("join", up.join[0], "--dir", str(b.directory), *local)
        for daemon in (a, b):
            daemon.wait("training", lambda s: s.turn > 0 and s.members == 2)
        yield a, b
    finally:
        for daemon in (a, b):
            daemon.end()


def test_no_lie_stops_the_swarm(pair: tuple[Daemon, Daemon]) -> None:
    a, b = pair
    front = Front(a)
    before, began = resident(a), turn(a)

    for attack in ATTACKS:
        at = turn(b)
        asyncio.run(attack(front))
        print(f"{attack.__name__}: {(resident(a) - before) >> 20} MiB, turn {turn(a)}")
        for daemon in pair:
            daemon.wait(f"alive after {attack.__name__}", lambda s: s.turn > 0)
        b.wait("training on", lambda s, at=at: s.turn > at, 30)
    a.wait("training on", lambda s: s.turn > began + 5)
    assert resident(a) - before < GROWTH

    # Honest peers still hear each other, and hold one model.
    for daemon in pair:
        daemon.client().post("pause")
    assert agree([a, b], 60)
    for daemon in pair:
        assert "Traceback" not in daemon.said()
        assert daemon.stop() == 0
