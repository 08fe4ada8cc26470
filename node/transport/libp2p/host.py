"""Our libp2p node and its DHT: how they are made, dial, and stay within bounds."""

import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any

import trio
from libp2p import create_yamux_muxer_option, new_host
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.crypto.x25519 import create_new_key_pair as new_noise_key
from libp2p.kad_dht.kad_dht import DHTMode, KadDHT
from libp2p.network.config import ConnectionConfig
from libp2p.peer.id import ID
from libp2p.records.validator import NamespacedValidator
from libp2p.security.noise.transport import PROTOCOL_ID as NOISE
from libp2p.security.noise.transport import Transport
from multiaddr import Multiaddr

from shoal.node.transport.libp2p.interfaces import own_addresses
from shoal.node.transport.libp2p.settings import FinderSettings


class Host:
    """What everybody here needs of libp2p. `basic` is its host, `network` that host's swarm."""

    def __init__(self, settings: FinderSettings) -> None:
        self.settings, self.limits = settings, settings.limits
        self.basic = self._made()
        self.network: Any = self.basic.get_network()
        self.network.retry_config.max_retries = 0  # `Candidates` decides about trying again
        self.dht: Any = KadDHT(
            self.basic,
            DHTMode.SERVER,
            # No namespace is valid: we use provider records, and nobody stores values with us.
            validator=NamespacedValidator({}, strict_validation=True),
            validator_changed=True,
            strict_validation=True,
        )
        self.me = bytes(self.basic.get_id().to_bytes())
        self._ages: dict[Any, tuple[float, float]] = {}
        """Of connected peers: when the connection was opened, and last seen in use."""

    def _made(self) -> Any:
        """Make libp2p's host. Each argument is there because its default is not for us."""
        key = create_new_key_pair(self.settings.identity)
        return new_host(
            key_pair=key,
            # The default also accepts plaintext.
            sec_opt={NOISE: Transport(key, noise_privkey=new_noise_key().private_key)},
            muxer_opt=create_yamux_muxer_option(),
            addrs_factory=self._advertised,
            # What strangers claim to see of us would be told on to others.
            disable_identify_address_discovery=True,
            connection_config=ConnectionConfig(
                max_connections=2 * self.limits.connections,
                min_connections=0,
                low_watermark=0,
                high_watermark=self.limits.connections,
                max_connections_per_peer=2,
                dial_timeout=self.limits.ask_timeout / 2,
                # A ping costs a kilobyte each way; `_close_idle` lets no connection grow old.
                enable_health_monitoring=False,
            ),
        )

    def _advertised(self, listening: Sequence[Any]) -> list[Any]:
        """Replace the wildcard by the machine's own addresses, private ones included."""
        if self.settings.advertise:
            return [Multiaddr(a.split("/p2p/")[0]) for a in self.settings.advertise]
        ports = {str(a.value_for_protocol("tcp")) for a in listening}
        return [Multiaddr(f"/ip4/{ip}/tcp/{p}") for ip in own_addresses() for p in sorted(ports)]

    @asynccontextmanager
    async def listening(self) -> AsyncIterator[None]:
        """Listen while the context is open; raises OSError when the port can't be had."""
        if self.settings.port:
            _refuse_taken(self.settings.port)
        listen = [Multiaddr(f"/ip4/0.0.0.0/tcp/{self.settings.port}")]
        async with self.basic.run(listen_addrs=listen):
            if not self.basic.get_transport_addrs():
                raise OSError(f"libp2p cannot listen on TCP port {self.settings.port}")
            # It would dial everybody it ever heard of until half of `connections` are open.
            await self.network.auto_connector.stop()
            yield

    def addresses(self) -> tuple[str, ...]:
        """Return our libp2p multiaddrs, with /p2p."""
        return tuple(str(address) for address in self.basic.get_addrs())

    def port(self) -> int:
        """Return the TCP port on which we listen."""
        return int(self.basic.get_transport_addrs()[0].value_for_protocol("tcp"))

    def connected(self) -> list[Any]:
        """Return the ids of the peers with which a connection is open."""
        return list(self.basic.get_connected_peers())

    async def connect(self, peer: ID, address: str) -> bool:
        """Dial exactly this address: the swarm itself would try only the first of a peer."""
        if peer not in self.connected():
            self.network.unblock_peer(peer)  # one failure would forbid every address for a minute
            self.basic.get_peerstore().add_addrs(peer, [Multiaddr(address)], 7200)
            await self.network.dial_addr(Multiaddr(address), peer)
        return peer in self.connected()

    async def close(self, peer: ID) -> None:
        """Close what may be a connection to nobody, so that the next ask dials anew."""
        with trio.move_on_after(1), suppress(Exception):
            await self.network.close_peer(peer)

    async def close_all(self) -> None:
        """Close every connection, in a second: libp2p itself would leave them to the collector."""
        with trio.move_on_after(1):
            for peer in self.connected():
                await self.network.close_peer(peer)

    async def tidy(self) -> None:
        """Keep bounds that libp2p does not keep: provider records, and idle connections."""
        self.dht.provider_store.cleanup_expired()
        providers = self.dht.provider_store.providers
        for key in list(providers)[: max(0, len(providers) - self.limits.provider_keys)]:
            del providers[key]
        await self._close_idle()

    async def _close_idle(self) -> None:
        """Close connections on which nothing is said."""
        now, connected = trio.current_time(), self.connected()
        for gone in self._ages.keys() - set(connected):
            del self._ages[gone]
        for peer in connected:
            opened, used = self._ages.get(peer, (now, now))
            if any(each.get_streams() for each in self.network.get_connections(peer)):
                used = now
            self._ages[peer] = opened, used
            if now - used >= self.limits.linger or now - opened >= self.limits.longest:
                await self.close(peer)


def _refuse_taken(port: int) -> None:
    """Raise OSError where another process listens: libp2p would share the port with it."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(("", port))
