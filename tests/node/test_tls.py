"""What lies below the links: TLS 1.3 between the holders of two keys, and nothing else."""

import asyncio
import os
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path

import grpc
import grpc.aio
from support.strangers import genesis, refusal
from support.transports import LIMITS, OPEN, Node, link, node, on_a_loop, raw, running, until

from shoal.gossip import messages as m
from shoal.node.admission import Credentials
from shoal.node.identity import Identity
from shoal.node.transport import dial


@on_a_loop
async def test_a_man_in_the_middle_is_refused() -> None:
    """He shows the server's true certificate to the probe, but has only his own key."""
    b, who = node(), Identity.generate()
    async with running(b):
        mallory = node()
        async with running(mallory):
            found = await dial.find(OPEN, b.peer, [b.address], timeout=2)
            hijacked = replace(found, target=f"ipv4:127.0.0.1:{mallory.port}")
            async with dial.channel(hijacked, OPEN.credentials(who), 1 << 20) as channel:
                assert await genesis(channel) is grpc.StatusCode.UNAVAILABLE
            assert mallory.owner.events == []


@on_a_loop
async def test_a_stolen_certificate_is_no_identity() -> None:
    """The copy passes as a certificate, but nobody finishes TLS 1.3 without its key."""
    b, thief = node(), Identity.generate()
    async with running(b):
        mine, theirs = OPEN.credentials(thief), OPEN.credentials(Identity.generate())
        stolen = Credentials(mine.key, mine.server, theirs.client, mine.root)
        async with raw(b, stolen) as channel:
            assert await genesis(channel) is not grpc.StatusCode.OK


@asynccontextmanager
async def tls_server(tmp: Path, version: ssl.TLSVersion, alpn: list[str]) -> AsyncIterator[Node]:
    """Something that is not ours behind a true certificate."""
    host = node()
    credentials = OPEN.credentials(host.identity)
    (tmp / "key").write_bytes(credentials.key)
    (tmp / "crt").write_bytes(credentials.server)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp / "crt", tmp / "key")
    context.maximum_version = version
    context.set_alpn_protocols(alpn)

    def serve(server: socket.socket) -> None:
        with suppress(OSError), server.accept()[0] as tcp, context.wrap_socket(tcp, True) as tls:
            tls.recv(1)

    with socket.create_server(("127.0.0.1", 0)) as server:
        host.port = server.getsockname()[1]
        serving = asyncio.get_running_loop().run_in_executor(None, serve, server)
        yield host
        await serving


def test_tls_older_than_1_3_is_not_spoken(tmp_path: Path) -> None:
    @on_a_loop
    async def test() -> None:
        a = node()
        async with running(a), tls_server(tmp_path, ssl.TLSVersion.TLSv1_2, ["h2"]) as old:
            assert "TLS 1.3" in await refusal(a, old)

    test()


def test_a_server_that_is_not_http2_is_refused(tmp_path: Path) -> None:
    @on_a_loop
    async def test() -> None:
        a = node()
        async with running(a), tls_server(tmp_path, ssl.TLSVersion.TLSv1_3, ["http/1.1"]) as odd:
            assert (await refusal(a, odd)).startswith("refused")

    test()


@on_a_loop
async def test_what_speaks_no_tls_is_told() -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"220 mail.example.org\r\n")
        await reader.read()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    a, b = node(), node()
    b.port = server.sockets[0].getsockname()[1]
    async with running(a):
        assert "no TLS 1.3" in await refusal(a, b)
    server.close()


@on_a_loop
async def test_garbage_at_the_port_and_silent_connections_change_nothing() -> None:
    a, b = node(), node(limits=replace(LIMITS, handshake_timeout=3.0))
    async with running(a, b):
        silent = [await asyncio.open_connection("127.0.0.1", b.port) for _ in range(20)]
        for garbage in (b"GET / HTTP/1.1\r\n\r\n", os.urandom(5000), b"\x16\x03\x01\xff\xff" * 99):
            _, writer = await asyncio.open_connection("127.0.0.1", b.port)
            writer.write(garbage)
            writer.close()
        await link(a, b)
        b.send(a.peer, m.Ping(1))
        await until(lambda: b.owner.heard)
        # gRPC closes who does not finish TLS in `handshake_timeout`.
        for reader, writer in silent:
            assert await asyncio.wait_for(reader.read(), 60) == b""
            writer.close()
        assert b.owner.of("bad") == []
