"""Peers of one run meet in a DHT, of their own run or of any other: each provides the run's key."""

import ipaddress
import logging
import random
from typing import Any

import trio
from libp2p.peer.id import ID

from shoal.node.transport.libp2p import ids
from shoal.node.transport.libp2p.bell import Bell
from shoal.node.transport.libp2p.candidates import Candidates
from shoal.node.transport.libp2p.cause import innermost
from shoal.node.transport.libp2p.host import Host
from shoal.node.transport.libp2p.seed import rendezvous_key
from shoal.node.transport.libp2p.shared import Shared

log = logging.getLogger(__name__)


class Rendezvous:
    """Rounds in the DHT: frequent at first, when everybody starts, then rare."""

    def __init__(self, host: Host, candidates: Candidates, shared: Shared, bell: Bell) -> None:
        self._host, self._dht, self._limits = host, host.dht, host.limits
        self._candidates, self._shared, self._bell = candidates, shared, bell
        self._key = rendezvous_key(host.settings.seed)
        self._look_now = False

    def look(self) -> None:
        """Begin the next round as soon as this one is over."""
        self._look_now = True

    async def run(self) -> None:
        """Enter the DHT; say there that we provide the run's key, and look who else does."""
        failed, pause = 0, self._limits.rendezvous
        while True:
            self._look_now = False
            await self._enter()
            if useful := bool(self._strangers()):
                rest, pause = pause, min(3 * pause, self._limits.rendezvous_max)
                failed = 0
            else:
                rest = min(self._limits.retry * 2**failed, self._limits.retry_max)
                failed = min(failed + 1, 20)
            if useful and self._host.settings.rendezvous:
                with trio.move_on_after(60):
                    await self._one_round()
            until = trio.current_time() + rest * random.uniform(0.75, 1.0)
            while trio.current_time() < until and not self._look_now:
                if not useful and self._strangers():
                    break  # somebody else entered through us
                await self._bell.rest(min(1.0, max(0.0, until - trio.current_time())))

    def _strangers(self) -> list[Any]:
        """Return the DHT's nodes that are not of our run: those of it need no DHT to be found."""
        routes = self._dht.routing_table.get_peer_ids()
        return [peer for peer in routes if not self._candidates.answered(bytes(peer.to_bytes()))]

    async def _enter(self) -> None:
        """Connect to some bootstrap addresses; they may be of our run or of any other."""
        entries = 0
        for address in self._shared.bootstrap:
            if entries >= self._limits.entries:
                return
            where, _, name = address.rpartition("/p2p/")
            try:
                entries += await self._entered(ID.from_string(name), where)
            except Exception as error:  # strangers' bytes and libp2p's many error classes
                reason = innermost(error)
                log.debug("bootstrap failed", extra={"address": address, "reason": reason})

    async def _entered(self, other: ID, where: str) -> bool:
        peer = bytes(other.to_bytes())
        if peer == self._host.me or self._candidates.answered(peer):
            return False
        for address in await _resolved(where):
            with trio.move_on_after(self._limits.ask_timeout):
                if await self._host.connect(other, address):
                    await self._dht.add_peer(other)
                    self._candidates.found(peer, [address], "bootstrap", trio.current_time())
                    return True
        return False

    async def _one_round(self) -> None:
        try:
            await self._dht.provider_store.provide(self._key)
            await self._look_up()
        except Exception as error:  # as in `_enter`
            log.debug("rendezvous failed", extra={"reason": innermost(error)})

    async def _look_up(self) -> None:
        store = self._dht.provider_store
        # find_providers asks nobody when it holds a record itself – and it always holds our own.
        held = store.providers.pop(self._key, {})
        try:
            found = await store.find_providers(self._key, self._limits.candidates)
        finally:
            store.providers[self._key] = {**store.providers.get(self._key, {}), **held}
        for info in [*found, *(record.provider_info for record in held.values())]:
            peer = bytes(info.peer_id.to_bytes())
            if peer != self._host.me and ids.to_peer(peer) is not None:
                addresses = [str(a).split("/p2p/")[0] for a in info.addrs]
                self._candidates.found(peer, addresses, "rendezvous", trio.current_time())


async def _resolved(address: str) -> list[str]:
    """Turn /dns4/name/tcp/port into the /ip4 addresses behind the name."""
    parts = address.split("/")
    if len(parts) < 5 or not parts[1].startswith("dns"):
        return [address]
    family = {"dns4": trio.socket.AF_INET, "dns6": trio.socket.AF_INET6}.get(parts[1], 0)
    with trio.move_on_after(5):
        found = await trio.socket.getaddrinfo(parts[2], None, family, trio.socket.SOCK_STREAM)
        ips = [ipaddress.ip_address(entry[4][0]) for entry in found][:4]
        return [f"/ip{ip.version}/{ip}/{'/'.join(parts[3:])}" for ip in ips]
    return []
