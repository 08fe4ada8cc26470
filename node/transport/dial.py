"""Dialling: who answers at an address is proved before the first byte of gRPC (design 6).

A Python gRPC client cannot read the server's certificate. So a bare TLS 1.3 connection looks at it
first; the certificate that passed is then the only root of the gRPC channel, which therefore
reaches the holder of the same key or nobody.
"""

import asyncio
import socket
import ssl
from collections.abc import Sequence
from dataclasses import dataclass

import grpc
import grpc.aio

from shoal.gossip.names import PeerId
from shoal.node.addresses import Address, socket_text
from shoal.node.admission import SERVER_NAME, Admission, Credentials, peer_of
from shoal.node.errors import PeerError

STAGGER = 0.2
"""Seconds between the starts of attempts at several addresses of one peer."""

OPTIONS = (
    # An idle link shows a frozen peer after 4 s with all of these, after 43 s or never without.
    ("grpc.keepalive_time_ms", 3000),
    ("grpc.keepalive_timeout_ms", 2000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.ping_timeout_ms", 2000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", 1000),
    # Measured, one ping and its answer a second: 306 bytes a second on the wire without gRPC's
    # bandwidth probes, 769 with them. The fixed window replaces what they would find out.
    ("grpc.http2.bdp_probe", 0),
    ("grpc.http2.lookahead_bytes", 2 << 20),
)
"""Of both ends."""


@dataclass(frozen=True, slots=True)
class Found:
    """A peer that proved its id at an address."""

    address: Address
    target: str
    """For gRPC: the very IP address that answered."""
    certificate: bytes
    """DER."""


def channel(found: Found, credentials: Credentials, most: int) -> grpc.aio.Channel:
    """Return a gRPC channel to `found` that takes and sends messages of up to `most` bytes."""
    root = ssl.DER_cert_to_PEM_cert(found.certificate).encode()
    tls = grpc.ssl_channel_credentials(root, credentials.key, credentials.client)
    options = (
        *OPTIONS,
        ("grpc.ssl_target_name_override", SERVER_NAME),
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.enable_http_proxy", 0),
        ("grpc.enable_retries", 0),
        ("grpc.service_config_disable_resolution", 1),
        ("grpc.max_receive_message_length", most),
        ("grpc.max_send_message_length", most),
    )
    return grpc.aio.secure_channel(found.target, tls, options=options)


async def find(
    admission: Admission, peer: PeerId, addresses: Sequence[Address], *, timeout: float
) -> Found:
    """Return where `peer` answers first; raises PeerError that says what went wrong where."""
    if not addresses:
        raise PeerError("unreachable", "no address is known")
    async with asyncio.TaskGroup() as group:
        attempts = [
            group.create_task(_attempt(admission, peer, address, i * STAGGER, timeout))
            for i, address in enumerate(addresses)
        ]
        failures: list[PeerError] = []
        for attempt in asyncio.as_completed(attempts):
            outcome = await attempt
            if isinstance(outcome, Found):
                for other in attempts:
                    other.cancel()
                return outcome
            failures.append(outcome)
    raise _worst(failures)


async def who_answers(address: Address, *, timeout: float) -> PeerId:
    """Return the peer that proves its id at `address`, whoever it is."""
    _, certificate = await _look(address, timeout)
    return peer_of(certificate)


async def _attempt(
    admission: Admission, peer: PeerId, address: Address, delay: float, timeout: float
) -> Found | PeerError:
    await asyncio.sleep(delay)
    try:
        target, certificate = await _look(address, timeout)
        admission.check_server(certificate, peer)
    except PeerError as error:
        return PeerError(error.reason, f"{address.bare()}: {error}")
    return Found(address, target, certificate)


def _worst(failures: list[PeerError]) -> PeerError:
    # A wrong id or run tells more than the other address that did not answer.
    telling = [each for each in failures if each.reason != "unreachable"] or failures
    return PeerError(telling[0].reason, "; ".join(str(each) for each in telling[:3]))


async def _look(address: Address, timeout: float) -> tuple[str, bytes]:
    """Return the gRPC target and the certificate (DER) of whoever speaks TLS 1.3 there."""
    try:
        async with asyncio.timeout(timeout):
            return await _first(address)
    except TimeoutError:
        raise PeerError("unreachable", f"no answer in {timeout:g} s") from None
    except ssl.SSLError as error:
        said = error.reason or "no TLS"
        raise PeerError("no TLS 1.3", f"no TLS 1.3 there ({said}): is it Shoal's port?") from None
    except OSError as error:
        said = error.strerror or str(error)
        raise PeerError("unreachable", f"can't be reached ({said})") from None


async def _first(address: Address) -> tuple[str, bytes]:
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(
        address.host, address.port, family=address.family, type=socket.SOCK_STREAM
    )
    failure: OSError | None = None
    for family, _, _, _, place in found[:4]:
        host, port = str(place[0]), int(place[1])
        try:
            certificate = await _certificate(host, port)
        except OSError as error:
            failure = error
        else:
            scheme = "ipv6" if family == socket.AF_INET6 else "ipv4"
            return f"{scheme}:{socket_text(host, port)}", certificate
    raise failure or OSError("the name has no address")


async def _certificate(host: str, port: int) -> bytes:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    # Not unverified: the caller checks that the certificate proves the peer id it wants.
    context.verify_mode = ssl.CERT_NONE
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.set_alpn_protocols(["h2"])
    tcp = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        transport = await _start_tls(tcp, host, port, context)
    except BaseException:
        tcp.close()
        raise
    try:
        session = transport.get_extra_info("ssl_object")
        certificate = session.getpeercert(binary_form=True)
        if certificate is None or session.selected_alpn_protocol() != "h2":
            raise PeerError("certificate", "whoever answers there is no Shoal daemon")
        return bytes(certificate)
    finally:
        transport.abort()


async def _start_tls(
    tcp: socket.socket, host: str, port: int, context: ssl.SSLContext
) -> asyncio.Transport:
    loop = asyncio.get_running_loop()
    tcp.setblocking(False)
    await loop.sock_connect(tcp, (host, port))
    try:
        transport, _ = await loop.create_connection(
            asyncio.Protocol, sock=tcp, ssl=context, server_hostname=SERVER_NAME
        )
    except ConnectionError:
        raise OSError(0, "it closed the connection during TLS; is it Shoal's port?") from None
    return transport
