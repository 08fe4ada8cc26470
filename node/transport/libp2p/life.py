"""One life of libp2p, from its start until it fails or is stopped. Needs libp2p; runs on trio."""

import logging
import random
from collections.abc import Callable, Collection

import trio

from shoal.node.transport.libp2p.bell import Bell
from shoal.node.transport.libp2p.candidates import Candidates
from shoal.node.transport.libp2p.hint import Hint
from shoal.node.transport.libp2p.host import Host
from shoal.node.transport.libp2p.introductions import CONTACT, Introductions
from shoal.node.transport.libp2p.mdns import LocalNetwork
from shoal.node.transport.libp2p.rendezvous import Rendezvous
from shoal.node.transport.libp2p.settings import FinderSettings
from shoal.node.transport.libp2p.shared import Shared

log = logging.getLogger(__name__)


class Life:
    """Two sources of candidates, and the introductions that make hints of them; made on trio.

    `wake`, `look` and `hurry` are for the daemon's thread, everything else for this one.
    """

    def __init__(
        self, settings: FinderSettings, shared: Shared, found: Callable[[Hint], None]
    ) -> None:
        self._shared, self._mdns = shared, settings.mdns
        self._bell = Bell()
        self._candidates = Candidates(settings.limits, random.Random())
        self.host = Host(settings)
        self._introductions = Introductions(self.host, self._candidates, shared, found)
        self._rendezvous = Rendezvous(self.host, self._candidates, shared, self._bell)
        self._local = LocalNetwork(self.host, self._candidates)

    def wake(self) -> None:
        """Look at once whether to stop."""
        self._bell.ring()

    def look(self) -> None:
        """Begin the next round in the DHT now."""
        self._bell.ring(self._rendezvous.look)

    def hurry(self, linked: Collection[bytes]) -> None:
        """Ask everybody again but `linked`, and look for more."""

        def again() -> None:
            self._candidates.hurry(linked, trio.current_time())
            self._rendezvous.look()

        self._bell.ring(again)

    async def run(self) -> None:
        """Find, until the daemon wants no more; raises whatever libp2p raises."""
        # The DHT itself is not run: its hourly and ten-minute rounds would ask everybody it
        # knows. What little they do for us, `Rendezvous` and `Host.tidy` do.
        async with self.host.listening(), trio.open_nursery() as nursery:
            self.host.basic.set_stream_handler(CONTACT, self._introductions.answer)
            nursery.start_soon(self.host.basic.get_peerstore().start_cleanup_task, 300)
            nursery.start_soon(self._keep_house)
            nursery.start_soon(self._introductions.ask_all)
            nursery.start_soon(self._rendezvous.run)
            if self._mdns:
                nursery.start_soon(self._local.run)
            self._shared.state = "running"
            log.info("libp2p listens", extra={"addresses": " ".join(self.host.addresses()[:4])})
            while not self._shared.stopping.is_set():
                await self._bell.rest(5.0)
            await self.host.close_all()
            nursery.cancel_scope.cancel()

    async def _keep_house(self) -> None:
        """Keep bounds that libp2p does not keep, and the numbers on `/status`."""
        while True:
            await self.host.tidy()
            self._shared.addresses = self.host.addresses()
            self._shared.counts = {
                "found": len(self._candidates),
                "connected": len(self.host.connected()),
                "routing": self.host.dht.get_routing_table_size(),
            }
            await self._bell.rest(2.0)
