"""Links, calls and transfers between daemons: gRPC over TLS 1.3, both ends proved and admitted.

One bidirectional stream per pair of neighbours carries their gossip; peers without a link are
called; payloads come over server streams as raw bytes. What arrives goes through node/wire/ and
then to the `Handler`; nothing that a peer sends raises past this folder.
"""

import os
from collections.abc import AsyncGenerator, Sequence

from shoal.gossip.limits import Limits
from shoal.gossip.messages import Message
from shoal.gossip.names import Hash, PeerId
from shoal.node.addresses import Address, Listen, own, parse_bare
from shoal.node.admission import Admission
from shoal.node.identity import Identity
from shoal.node.transport.handler import Handler
from shoal.node.transport.links import Links, LinkView
from shoal.node.transport.local import Local
from shoal.node.transport.messages import Messages
from shoal.node.transport.server import Server
from shoal.node.transport.transfers import Transfers
from shoal.node.wire import fields
from shoal.node.wire.requests import Hello


class Transport:
    """Everything that crosses the network for one peer in one run.

    All methods are called on the event loop that ran `start`; so are the handler's.
    `advertise`: addresses to tell others instead of the machine's own.
    """

    def __init__(
        self,
        identity: Identity,
        admission: Admission,
        handler: Handler,
        *,
        listen: Listen,
        limits: Limits,
        advertise: Sequence[Address] = (),
    ) -> None:
        self.identity = identity
        self.admission = admission
        self.listen = listen
        self.advertise = tuple(advertise)
        self.proof = admission.prove(identity.peer)
        self.session = int.from_bytes(os.urandom(8), "big")
        self.port = 0
        self.local = Local(identity, admission, handler, limits)
        self._messages = Messages(self.local, self.send)
        self._links = Links(self.local, self._hello, self._messages.take)
        self._transfers = Transfers(self.local)
        self._server = Server(self.local, self._links, self._messages, self._transfers)
        self.bytes_in = self.local.bytes_in
        self.bytes_out = self.local.bytes_out
        self.dropped = self.local.dropped

    async def start(self) -> None:
        """Listen; raises ConfigError when that can't be done."""
        self.port = self._server.bind(self.listen)
        await self._server.start()
        self.local.spawn(self.local.sweep())

    async def stop(self) -> None:
        """Close everything; no callback comes any more."""
        self.local.stopped = True
        self._links.stop()
        await self.local.stop()
        await self._server.stop()

    @property
    def addresses(self) -> tuple[str, ...]:
        """Where others can reach this peer: multiaddrs without /p2p, most useful first."""
        told = self.advertise or own(self.listen.host, self.port)
        return tuple(str(address.bare()) for address in told[: fields.ADDRESSES])

    def links(self) -> list[LinkView]:
        """Return the open links."""
        return self._links.view()

    def know(self, peer: PeerId, addresses: Sequence[str]) -> None:
        """Remember where `peer` can be reached, as its contact record says."""
        self.local.remember(peer, [parse_bare(text) for text in addresses])

    def connect(self, peer: PeerId, addresses: Sequence[str | Address] = ()) -> None:
        """Open a link unless there is one; ends in `on_link_up` or `on_link_down`."""
        given = [parse_bare(a) if isinstance(a, str) else a.bare() for a in addresses]
        if given:
            self.local.remember(peer, given)
        self._links.dial(peer)

    def disconnect(self, peer: PeerId, reason: str, ban: float = 0.0) -> None:
        """Close the link; with `ban` refuse everything of the peer for so many seconds."""
        if ban > 0:
            self.local.ban(peer, ban)
        self._messages.forget(peer)
        self._links.close(peer, reason)

    def send(self, peer: PeerId, message: Message) -> None:
        """Say `message` to `peer`, best effort: over the link, else by a call."""
        if not self._links.put(peer, message):
            self._messages.post(peer, message)

    def pull(
        self, peer: PeerId, payload: Hash, size: int, offset: int = 0
    ) -> AsyncGenerator[bytes, None]:
        """Yield a payload's bytes from `offset` on; raises PeerError. The hash is not checked."""
        return self._transfers.pull(peer, payload, size, offset)

    def initial(self, peer: PeerId, size: int, offset: int = 0) -> AsyncGenerator[bytes, None]:
        """Yield the initial model's `size` bytes from `offset` on; raises PeerError."""
        return self._transfers.initial(peer, size, offset)

    def _hello(self) -> Hello:
        run, told = self.admission.run, self.addresses
        return Hello((fields.VERSION,), run, self.proof, told, self.session)
