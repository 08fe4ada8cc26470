"""The gRPC server: who may call, which part answers, and our own bugs let out of gRPC."""

from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, TypeVar

import grpc
import grpc.aio

from shoal.gossip.names import PeerId
from shoal.node.addresses import Listen, socket_text
from shoal.node.admission import peer_of
from shoal.node.errors import PeerError
from shoal.node.transport import dial
from shoal.node.transport.channels import SLACK
from shoal.node.transport.links import Links
from shoal.node.transport.listen import bind_host, cannot_listen
from shoal.node.transport.local import Local, crash
from shoal.node.transport.messages import Messages
from shoal.node.transport.rpc import SERVICE, Context
from shoal.node.transport.transfers import Transfers

T = TypeVar("T")

_peer_of = lru_cache(maxsize=1024)(peer_of)


class Server:
    """Answer the calls of admitted peers: with links, messages and transfers."""

    def __init__(
        self, local: Local, links: Links, messages: Messages, transfers: Transfers
    ) -> None:
        self.local = local
        self.limits = local.limits
        self.links = links
        self.messages = messages
        self.transfers = transfers
        self._server: grpc.aio.Server | None = None

    def bind(self, listen: Listen) -> int:
        """Take a port and return it; raises ConfigError when that can't be done."""
        self._server = grpc.aio.server(options=self._options())
        self._server.add_generic_rpc_handlers((self._service(),))
        credentials = self.local.credentials
        tls = grpc.ssl_server_credentials(
            [(credentials.key, credentials.server)],
            root_certificates=credentials.root,
            require_client_auth=True,
        )
        host = bind_host(listen)
        try:
            return self._server.add_secure_port(socket_text(host, listen.port), tls)
        except RuntimeError:
            raise cannot_listen(host, listen.port) from None

    async def start(self) -> None:
        """Answer calls, after `bind`."""
        assert self._server is not None
        await self._server.start()

    async def stop(self) -> None:
        """Answer nobody any more."""
        if self._server is not None:
            await self._server.stop(0.2)

    def _service(self) -> grpc.GenericRpcHandler:
        stream, unary = grpc.unary_stream_rpc_method_handler, grpc.unary_unary_rpc_method_handler
        link = self._guarded_link
        return grpc.method_handlers_generic_handler(
            SERVICE,
            {
                "Link": grpc.stream_stream_rpc_method_handler(link),
                "Deliver": unary(self._guarded(self.messages.serve)),
                "Genesis": unary(self._guarded(self.transfers.serve_genesis)),
                "Pull": stream(self._guarded(self.transfers.serve_pull)),
                "Initial": stream(self._guarded(self.transfers.serve_initial)),
                "Snapshot": unary(self._guarded(self.transfers.serve_snapshot)),
            },
        )

    async def _guarded_link(self, _: object, context: Context) -> None:
        with loud():
            await self.links.serve(await self._enter(context), context)

    def _guarded(
        self, serve: Callable[[PeerId, bytes, Context], Awaitable[T]]
    ) -> Callable[[bytes, Context], Coroutine[Any, Any, T]]:
        async def guarded(request: bytes, context: Context) -> T:
            with loud():
                return await serve(await self._enter(context), request, context)

        return guarded

    async def _enter(self, context: Context) -> PeerId:
        """Return who calls. On every call: old connections outlive a ban."""
        certificates = list(context.auth_context().get("x509_pem_cert", ()))
        try:
            peer = _peer_of(certificates[0])
        except (IndexError, PeerError):
            self.local.dropped["certificate"] += 1
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "no Shoal certificate")
        if self.local.banned(peer):
            self.local.dropped["refused"] += 1
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, "banned here for a while")
        return peer

    def _options(self) -> list[tuple[str, int]]:
        most = self.limits.message_bytes + SLACK
        return [
            *dial.OPTIONS,
            ("grpc.server_handshake_timeout_ms", int(1000 * self.limits.handshake_timeout)),
            ("grpc.max_receive_message_length", most),
            ("grpc.max_send_message_length", most),
            # A link, what `Limits.transfers` allows, a few calls: each may hold a whole message.
            ("grpc.max_concurrent_streams", 32),
            # Who connects and asks for nothing shall not use up our files.
            ("grpc.max_connection_idle_ms", int(2000 * self.limits.channel_idle)),
            # Else a second daemon could share the port unnoticed.
            ("grpc.so_reuseport", 0),
        ]


@contextmanager
def loud() -> Iterator[None]:
    """Let our own bugs in what serves a call out of gRPC, which would only log them."""
    try:
        yield
    except (grpc.aio.BaseError, PeerError):
        raise  # gRPC's own: aborted by us, or the caller went away while it was answered
    except Exception as error:
        crash(error)
        raise
