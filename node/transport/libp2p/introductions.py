"""Two peers prove to each other that they are of one swarm, and say where their gRPC listens."""

import hmac
import logging
from collections.abc import Callable
from typing import Any

import trio
from libp2p.io.utils import read_exactly
from libp2p.peer.id import ID

from shoal.node.transport.libp2p import contact, ids
from shoal.node.transport.libp2p.candidates import Candidates
from shoal.node.transport.libp2p.cause import innermost
from shoal.node.transport.libp2p.hint import Hint
from shoal.node.transport.libp2p.host import Host
from shoal.node.transport.libp2p.seed import proof
from shoal.node.transport.libp2p.shared import Shared

log = logging.getLogger(__name__)

CONTACT = "/shoal/contact/1"
"""Asker: 32 bytes proof. Answerer: 32 bytes proof, u32 length, JSON {addresses, contact}."""


class Introductions:
    """Asks candidates who is due, and answers those who ask us."""

    def __init__(
        self, host: Host, candidates: Candidates, shared: Shared, found: Callable[[Hint], None]
    ) -> None:
        self._host, self._limits, self._seed = host, host.limits, host.settings.seed
        self._candidates, self._shared, self._found = candidates, shared, found
        self._answering = 0

    async def ask_all(self) -> None:
        """Ask every candidate when it is due, some at the same time; for ever."""
        busy = trio.CapacityLimiter(self._limits.asking)

        async def ask(peer: bytes, addresses: tuple[str, ...], source: str) -> None:
            async with busy:
                hint = None
                for address in addresses:
                    with trio.move_on_after(self._limits.ask_timeout):
                        hint = await self._ask(peer, address, source)
                    if hint is not None:
                        self._found(hint)
                        break
                    await self._host.close(ID(peer))
                self._candidates.settle(peer, hint is not None, trio.current_time())

        async with trio.open_nursery() as nursery:
            while True:
                if busy.available_tokens:
                    for due in self._candidates.due(trio.current_time()):
                        nursery.start_soon(ask, *due)
                await trio.sleep(0.25)

    async def _ask(self, peer: bytes, address: str, source: str) -> Hint | None:
        """Dial one address, prove ourselves, and read where the peer's gRPC listens."""
        other = ID(peer)
        try:
            if not await self._host.connect(other, address):
                return None
            stream = await self._host.basic.new_stream(other, [CONTACT])
            try:
                await stream.write(proof(self._seed, self._host.me, peer))
                if not await self._proves(stream, peer):
                    return None
                size = int.from_bytes(await read_exactly(stream, 4), "big")
                if size > 2 * self._limits.contact_bytes:
                    return None
                told = contact.unpack(bytes(await read_exactly(stream, size)), self._limits)
            finally:
                await stream.close()
            if len(self._host.connected()) > self._limits.keep_connections:
                await self._host.network.close_peer(other)
        except Exception as error:  # strangers' bytes and libp2p's many error classes
            log.debug("asking failed", extra={"address": address, "reason": innermost(error)})
            return None
        name = ids.to_peer(peer)
        if told is None or name is None:
            return None
        return Hint(name, *told, source, f"{address}/p2p/{other}")

    async def answer(self, stream: Any) -> None:
        """Answer a peer that proves to be of our swarm; close on everybody else."""
        peer = bytes(stream.muxed_conn.peer_id.to_bytes())
        answer = self._shared.answer
        if answer is None or self._answering >= self._limits.answering:
            await stream.reset()
            return
        self._answering += 1
        try:
            with trio.fail_after(self._limits.ask_timeout):
                if not await self._proves(stream, peer):
                    await stream.reset()
                    return
                mine = proof(self._seed, self._host.me, peer)
                await stream.write(mine + len(answer).to_bytes(4, "big") + answer)
                await stream.close()
        except Exception as error:  # as in `_ask`
            log.debug("answering failed", extra={"reason": innermost(error)})
            await stream.reset()
        finally:
            self._answering -= 1

    async def _proves(self, stream: Any, peer: bytes) -> bool:
        """Read the peer's proof and tell whether it holds."""
        theirs = bytes(await read_exactly(stream, 32))
        return hmac.compare_digest(theirs, proof(self._seed, peer, self._host.me))
