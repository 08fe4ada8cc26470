"""A swarm's life with real daemons: joined late, killed, resumed, cheated, orphaned, observed."""

import asyncio
import json
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from functools import partial
from hashlib import blake2b
from pathlib import Path

import pytest
import safetensors
from support.daemons import PATIENCE, Daemon, agree, run_file

from shoal.gossip.limits import Limits
from shoal.gossip.messages import Message, Push
from shoal.gossip.names import Author, Hash, PeerId, RunId
from shoal.gossip.records import Update
from shoal.node import identity
from shoal.node.addresses import Address, Listen, parse_join
from shoal.node.admission import Admission
from shoal.node.identity import Identity
from shoal.node.status import State, Status
from shoal.node.transport.grpc import Transport
from shoal.node.wire.records import Sealer

pytestmark = [pytest.mark.real, pytest.mark.slow, pytest.mark.timeout(2400)]


@pytest.fixture
def swarm(tmp_path: Path) -> Iterator["Swarm"]:
    swarm = Swarm(tmp_path)
    yield swarm
    swarm.stop()


class Swarm:
    """Daemons by name, in one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.daemons: dict[str, Daemon] = {}

    def found(self, name: str, run: Path, *more: str) -> Daemon:
        return self._add(name, "start", str(run), *more)

    def join(self, name: str, through: Daemon, *more: str) -> Daemon:
        address = through.wait("telling its address", lambda s: s.join).join[0]
        return self._add(name, "join", address, *more)

    def _add(self, name: str, *argv: str) -> Daemon:
        daemon = Daemon(self.folder / name)
        self.daemons[name] = daemon
        return daemon.start(
            *argv, "--dir", str(daemon.directory), "--listen", "127.0.0.1:0", "--threads", "1"
        )

    def stop(self) -> None:
        for daemon in self.daemons.values():
            daemon.end()


def trains(status: Status) -> bool:
    return status.state is State.TRAINING and status.turn > 0


def turned(daemon: Daemon) -> int:
    return daemon.wait("answering", bool).turn


def test_a_swarm_lives_through_what_happens_to_swarms(swarm: Swarm) -> None:
    run = run_file(swarm.folder, peers=4, pace="turn_seconds = 2.0")
    a = swarm.found("a", run)
    a.wait("up", lambda s: s.join)
    b, c, d = (swarm.join(name, a) for name in "bcd")
    four = [a, b, c, d]
    for daemon in four:
        daemon.wait("training with all four", lambda s: trains(s) and s.members == 4, 90)

    for daemon in four:
        assert daemon.process is not None
        assert "libtorch" not in Path(f"/proc/{daemon.process.pid}/maps").read_text()

    # A fifth joins a swarm that has been training for a while.
    b.wait("training for a while", lambda s: s.turn >= 5)
    e = swarm.join("e", b)
    e.wait("in agreement", lambda s: trains(s) and s.agrees, 60)

    # One is killed: nobody stalls, and it comes back from its own disk, no twin of itself.
    before = c.wait("publishing", lambda s: s.turn >= 2)
    logs = {log_of(c)}
    c.kill()
    turns = [turned(daemon) for daemon in (a, b, d)]
    c.start()
    again = c.wait("up again", lambda s: s.turn >= before.turn)
    for daemon, turn in zip((a, b, d), turns, strict=True):
        daemon.wait("training on", lambda s, turn=turn: s.turn >= turn + 2, 60)
    back = c.wait("back", lambda s: trains(s) and s.turn > again.turn and s.agrees, 60)
    assert back.peer == before.peer
    assert not any("another process" in warning for warning in back.warnings), back.warnings

    # Two updates under one number, made with a copy of d's key.
    author = Author(identity.load(d.directory / "identity.key").peer, log_of(d))
    asyncio.run(tell_a_lie(d, author, through=a, to=(a, b, c, e)))
    d.wait("degraded", lambda s: s.state is State.DEGRADED and "two updates" in s.why, 60)

    # The bootstrap peer is gone for good; somebody else opens the door.
    a.kill()
    f = swarm.join("f", b)
    f.wait("in agreement", lambda s: trains(s) and s.agrees, 90)

    # An observer holds, verifies and exports; the others train as before.
    g = swarm.join("g", e, "--observe")
    g.wait("observing", lambda s: s.state is State.OBSERVING and s.agrees, 90)
    out = swarm.folder / "model.safetensors"
    g.client().post("export", {"path": str(out)})
    with safetensors.safe_open(out, framework="numpy") as file:
        assert json.loads(file.metadata()["run"])["task"]["name"] == "digits"
        assert len(list(file.keys())) > 0
    turn = turned(b)
    b.wait("training as before", lambda s: s.turn >= turn + 2, 60)

    # When training pauses, all hold one model.
    alive = [b, c, e, f, g]
    for daemon in alive:
        daemon.client().post("pause")
    assert agree(alive, 60)
    # All who have published count but d, whose first number was used twice. Who finds nobody at
    # once when it comes back goes on under a fresh log id.
    logs |= {log_of(daemon) for daemon in (a, b, c, e, f)}
    assert g.wait("still observing", bool).frontier.authors == len(logs)
    for daemon in alive:
        daemon.wait("sure of it", lambda s: s.agrees, 60)
    for daemon in alive:  # the last would have nobody left to agree with
        assert daemon.stop() == 0


def log_of(daemon: Daemon) -> int:
    return int(json.loads((daemon.directory / "log" / "log.json").read_text())["log"], 16)


def knows_proof(daemon: Daemon, author: Author, _: Status) -> bool:
    return any(
        event.what == "equivocation" and event.peer == identity.peer_text(author.peer)
        for event in daemon.client().events()
    )


async def tell_a_lie(
    victim: Daemon, author: Author, *, through: Daemon, to: Sequence[Daemon]
) -> None:
    """Push a second update number 1 of the victim to one peer, signed with the victim's key.

    Stay until all of `to` know the proof: who hears it asks how the one who says it was admitted.
    """
    target = parse_join(through.wait("telling its address", lambda s: s.join).join[0])
    assert target.run is not None
    payload = b"not what the victim learnt"
    forged = Update(
        author=author,
        number=1,
        turn=1,
        kind="dense",
        payload=Hash(blake2b(payload, digest_size=32).digest()),
        size=len(payload),
        inline=payload,
    )
    record = Sealer(identity.load(victim.directory / "identity.key"), target.run).seal(forged)
    async with linked(target.run, target) as transport:
        assert target.peer is not None
        transport.send(target.peer, Push((record,)))
        for daemon in to:
            known = partial(knows_proof, daemon, author)
            await asyncio.to_thread(daemon.wait, "knowing the proof", known)


@asynccontextmanager
async def linked(run: RunId, target: Address) -> AsyncIterator[Transport]:
    """A link from a stranger of the run to one of its peers."""
    assert target.peer is not None
    stranger = Stranger()
    transport = Transport(
        Identity.generate(),
        Admission(run),
        stranger,
        listen=Listen("127.0.0.1", 0),
        limits=Limits(),
    )
    await transport.start()
    try:
        transport.connect(target.peer, [target])
        async with asyncio.timeout(20 * PATIENCE):
            await stranger.linked.wait()
        yield transport
    finally:
        await transport.stop()


class Stranger:
    """A peer that has something to say and nothing to serve."""

    def __init__(self) -> None:
        self.linked = asyncio.Event()

    def on_link_up(self, peer: PeerId, admission: bytes) -> None:
        self.linked.set()

    def on_link_down(self, peer: PeerId, reason: str) -> None: ...

    def on_message(self, peer: PeerId, message: Message) -> list[Message]:
        return []

    def on_misbehaviour(self, peer: PeerId, reason: str) -> None: ...

    def payload(self, payload: Hash) -> None:
        return None

    def genesis(self) -> bytes:
        return b""

    async def initial(self) -> None:
        return None

    async def snapshot(self) -> bytes:
        return b""
