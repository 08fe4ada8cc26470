"""Peers of the run on the local network, by multicast DNS in libp2p's form."""

import ipaddress
import logging
import random
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import trio
from zeroconf import Error as ZeroconfError
from zeroconf import IPVersion, ServiceBrowser, ServiceInfo, ServiceStateChange, Zeroconf

from shoal.node.identity import parse_peer
from shoal.node.transport.libp2p import ids
from shoal.node.transport.libp2p.candidates import Candidates
from shoal.node.transport.libp2p.cause import innermost
from shoal.node.transport.libp2p.host import Host
from shoal.node.transport.libp2p.interfaces import own_addresses
from shoal.node.transport.libp2p.seed import mdns_type

log = logging.getLogger(__name__)


class LocalNetwork:
    """Announces us on the local network and takes in who else does; made on trio."""

    def __init__(self, host: Host, candidates: Candidates) -> None:
        self._host, self._limits, self._candidates = host, host.limits, candidates
        self._kind = mdns_type(host.settings.seed)
        self._token = trio.lowlevel.current_trio_token()

    async def run(self) -> None:
        """Do so for ever, anew whenever the machine's addresses change."""
        while True:
            own = own_addresses()
            try:
                await self._on(own)
            except (OSError, ZeroconfError) as error:  # no multicast here (a container, a VPN)
                log.warning("mDNS is off for a minute", extra={"reason": innermost(error)})
                await trio.sleep(60)

    async def _on(self, own: tuple[str, ...]) -> None:
        info = self._announcement(own)
        seen, names = trio.open_memory_channel[tuple[str, bool]](self._limits.candidates)

        def changed(*, name: str, state_change: object, **_: object) -> None:
            if state_change is ServiceStateChange.Removed:
                return
            # Renewed records are an update, another life is an addition.
            anew = state_change is ServiceStateChange.Added
            with suppress(trio.RunFinishedError):  # on zeroconf's thread
                self._token.run_sync_soon(offer, name, anew)

        def offer(name: str, anew: bool) -> None:
            with suppress(trio.WouldBlock):
                seen.send_nowait((name, anew))

        network = await _in_thread(
            lambda: Zeroconf(interfaces=list(own), ip_version=IPVersion.V4Only)
        )
        try:
            ServiceBrowser(network, self._kind, handlers=[changed])
            await _in_thread(lambda: network.register_service(info))
            looked = trio.current_time()
            while True:
                with trio.move_on_after(self._limits.interfaces):
                    name, anew = await names.receive()
                    if name != info.name:
                        await self._take_in(network, name, anew)
                if trio.current_time() - looked > self._limits.interfaces:
                    looked = trio.current_time()
                    if own_addresses() != own:
                        return
        finally:
            with trio.CancelScope(shield=True), trio.move_on_after(2):
                await _in_thread(network.close)

    def _announcement(self, own: tuple[str, ...]) -> ServiceInfo:
        # A new name for every life: after a restart nobody is answered from a cache.
        name = f"{random.getrandbits(128):032x}"
        addresses = self._host.addresses()[: self._limits.addresses]
        return ServiceInfo(
            self._kind,
            f"{name}.{self._kind}",
            port=self._host.port(),
            properties={f"dnsaddr{i or ''}": a for i, a in enumerate(addresses)},
            server=f"{name}.local.",
            addresses=[ipaddress.ip_address(ip).packed for ip in own],
        )

    async def _take_in(self, network: Any, name: str, anew: bool) -> None:
        info = await _in_thread(lambda: network.get_service_info(self._kind, name, timeout=2000))
        if info is None:
            return
        by_peer: dict[bytes, list[str]] = {}
        for label, value in info.properties.items():
            if label.startswith(b"dnsaddr") and value and len(value) <= self._limits.address_bytes:
                where, _, peer = value.decode("ascii", "replace").rpartition("/p2p/")
                with suppress(ValueError):  # no name of an Ed25519 key
                    key = ids.to_bytes(parse_peer(peer))
                    if where.isprintable():
                        by_peer.setdefault(key, []).append(where)
        for peer_id, addresses in list(by_peer.items())[:1]:
            if peer_id != self._host.me:
                now = trio.current_time()
                self._candidates.found(peer_id, addresses, "mdns", now, anew=anew)


async def _in_thread(work: Callable[[], Any]) -> Any:
    """Run what blocks; on cancellation let it finish alone."""
    run: Any = trio.to_thread.run_sync  # the stubs that come with libp2p are of an older trio
    return await run(work, abandon_on_cancel=True)
