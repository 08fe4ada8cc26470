"""Transports on loopback, with owners that note everything."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager

import grpc
import grpc.aio

from shoal.gossip import messages as m
from shoal.gossip.limits import Limits
from shoal.gossip.names import Hash, PeerId, RunId, digest
from shoal.node.addresses import Address, Listen, parse_bare
from shoal.node.admission import Admission, Credentials
from shoal.node.identity import Identity
from shoal.node.transport import dial
from shoal.node.transport.grpc import Transport
from shoal.node.transport.handler import Buffer

GENESIS = b"a genesis" * 100
RUN = RunId(digest(GENESIS))
OPEN = Admission(RUN)
LOOPBACK = Listen("127.0.0.1", 0)
LIMITS = Limits(dial_timeout=20.0, handshake_timeout=10.0, call_timeout=20.0)


class Owner:
    """A handler that notes everything, and answers pings."""

    def __init__(self) -> None:
        self.events: list[tuple[str, PeerId, str]] = []
        self.heard: list[tuple[PeerId, m.Message]] = []
        self.payloads: dict[Hash, Buffer] = {}
        self.model: Buffer | None = None
        self.sums = b""

    def on_link_up(self, peer: PeerId, admission: bytes) -> None:
        assert Admission(RUN).verify(peer, admission) or len(admission) == 64
        self.events.append(("up", peer, ""))

    def on_link_down(self, peer: PeerId, reason: str) -> None:
        self.events.append(("down", peer, reason))

    def on_message(self, peer: PeerId, message: m.Message) -> Sequence[m.Message]:
        self.heard.append((peer, message))
        return [m.Ack(message.nonce)] if isinstance(message, m.Ping) else []

    def on_misbehaviour(self, peer: PeerId, reason: str) -> None:
        self.events.append(("bad", peer, reason))

    def payload(self, payload: Hash) -> Buffer | None:
        return self.payloads.get(payload)

    def genesis(self) -> bytes:
        return GENESIS

    async def initial(self) -> Buffer | None:
        return self.model

    async def snapshot(self) -> bytes:
        return self.sums

    def of(self, what: str) -> list[str]:
        return [reason for kind, _, reason in self.events if kind == what]


class Node(Transport):
    """A transport and its owner."""

    owner: Owner

    @property
    def peer(self) -> PeerId:
        return self.identity.peer

    @property
    def address(self) -> Address:
        return parse_bare(self.addresses[0]).of(self.peer, self.admission.run)


def node(
    admission: Admission = OPEN,
    limits: Limits = LIMITS,
    listen: Listen = LOOPBACK,
    identity: Identity | None = None,
) -> Node:
    owner = Owner()
    made = Node(identity or Identity.generate(), admission, owner, listen=listen, limits=limits)
    made.owner = owner
    return made


@asynccontextmanager
async def running(*nodes: Node) -> AsyncIterator[None]:
    try:
        for each in nodes:
            await each.start()
        yield
    finally:
        for each in nodes:
            await each.stop()


async def until(true: Callable[[], object], seconds: float = 200.0) -> None:
    async with asyncio.timeout(seconds):
        while not true():
            await asyncio.sleep(0.01)


async def link(one: Node, two: Node) -> None:
    one.connect(two.peer, two.addresses)
    await linked(one, two)


async def linked(one: Node, two: Node) -> None:
    def both() -> bool:
        return any(v.peer == two.peer for v in one.links()) and any(
            v.peer == one.peer for v in two.links()
        )

    await until(both)


Test = Callable[[], Coroutine[None, None, None]]


def on_a_loop(test: Test) -> Callable[[], None]:
    """Run an async test; what a callback raises fails it too."""

    def run() -> None:
        failures: list[dict[str, object]] = []

        async def watched() -> None:
            loop = asyncio.get_running_loop()
            loop.set_exception_handler(lambda _, context: failures.append(context))
            async with asyncio.timeout(30):
                await test()

        asyncio.run(watched())
        assert not failures

    run.__name__, run.__doc__ = test.__name__, test.__doc__
    return run


@asynccontextmanager
async def raw(to: Node, credentials: Credentials) -> AsyncIterator[grpc.aio.Channel]:
    """A channel with anybody's certificate, as somebody else's program would make it."""
    found = await dial.find(to.admission, to.peer, [to.address], timeout=2)
    async with dial.channel(found, credentials, 64 << 20) as channel:
        yield channel


async def outcome(call: Awaitable[object]) -> tuple[grpc.StatusCode, str]:
    try:
        await asyncio.wait_for(call, 5)
    except grpc.aio.AioRpcError as error:
        return error.code(), error.details() or ""
    return grpc.StatusCode.OK, ""
