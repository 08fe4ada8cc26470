"""The kernel's own count of what sockets carried, beside what crossed an interface."""

import json
import os
import socket
import subprocess
import sys
import threading
from datetime import UTC, datetime
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from support.netns import Host, network

from shoal.node import traffic
from shoal.node.traffic import HEADER_BYTES, HEADER_BYTES_V6, SocketMeter

linux = pytest.mark.skipif(sys.platform != "linux", reason="TCP_INFO is Linux'")


def pair() -> tuple[socket.socket, socket.socket, socket.socket]:
    listener = socket.create_server(("127.0.0.1", 0))
    near = socket.create_connection(listener.getsockname())
    far, _ = listener.accept()
    return listener, near, far


def carry(near: socket.socket, far: socket.socket, size: int) -> None:
    near.sendall(bytes(size))
    while size:
        size -= len(far.recv(1 << 16))


@linux
def test_the_meter_counts_what_both_ends_carried_with_headers() -> None:
    listener, near, far = pair()
    with listener, near, far:
        meter = SocketMeter()
        meter.sample()
        out, came = meter.bytes_out, meter.bytes_in
        carry(near, far, 100_000)
        meter.sample()
        # Both ends are ours, so everything sent is also received; loopback takes few segments.
        assert 100_000 + HEADER_BYTES <= meter.bytes_out - out < 110_000
        assert 100_000 + HEADER_BYTES <= meter.bytes_in - came < 110_000


@linux
def test_a_second_sample_counts_nothing_twice() -> None:
    meter = SocketMeter()
    meter.sample()  # what other tests may have left open
    before = meter.bytes_out
    listener, near, far = pair()
    with listener, near, far, near.dup():
        carry(near, far, 10_000)
        meter.sample()
        out = meter.bytes_out
        meter.sample()
        assert meter.bytes_out == out
        assert 10_000 < out - before < 13_000


@linux
def test_the_status_port_is_left_out() -> None:
    listener, near, far = pair()
    with listener, near, far:
        port = listener.getsockname()[1]
        meter = SocketMeter(lambda: {port})
        meter.sample()
        before = meter.bytes_out
        carry(far, near, 50_000)  # what the status port sent; `near` is the asker
        meter.sample()
        assert meter.bytes_out - before < 2_000


@linux
def test_what_a_closed_socket_carried_stays_counted() -> None:
    meter = SocketMeter()
    meter.sample()
    before = meter.bytes_out
    for _ in range(3):
        listener, near, far = pair()
        with listener, near, far:
            carry(near, far, 20_000)
            meter.sample()
        meter.sample()
    assert 60_000 < meter.bytes_out - before < 66_000


@linux
def test_sampling_closes_nothing() -> None:
    listener, near, far = pair()
    with listener, near, far:
        SocketMeter().sample()
        carry(near, far, 1000)


@linux
def test_a_listening_socket_and_other_descriptors_count_nothing() -> None:
    meter = SocketMeter()
    meter.sample()
    before = meter.bytes_in, meter.bytes_out
    near, far = socket.socketpair()
    with socket.create_server(("127.0.0.1", 0)), near, far:
        near.send(b"not TCP")
        meter.sample()
        assert (meter.bytes_in, meter.bytes_out) == before


@linux
def test_headers_follow_the_address_family_spoken() -> None:
    """gRPC listens dual-stack: IPv4 under a mapped address still has IPv4's headers."""
    assert [traffic._speaks_v6(a) for a in ("127.0.0.1", "::ffff:10.0.0.1", "::1")] == [
        False,
        False,
        True,
    ]
    meter = SocketMeter()
    meter.sample()
    before = meter.bytes_out
    with socket.create_server(("::1", 0), family=socket.AF_INET6) as listener:
        near = socket.create_connection(listener.getsockname()[:2])
        far, _ = listener.accept()
        with near, far:
            meter.sample()
            # Only the handshake's segments (the kernel leaves out the SYN-ACK of its own making).
            out = meter.bytes_out - before
            assert out > 0
            assert out % HEADER_BYTES_V6 == 0


@linux
def test_a_socket_that_takes_a_closed_ones_inode_is_counted_whole() -> None:
    meter = SocketMeter()
    meter.sample()
    others, before = set(meter._last), meter.bytes_out
    listener, near, far = pair()
    with listener, near, far:
        carry(near, far, 5000)
        meter.sample()
        first = meter.bytes_out - before
        # The next socket under the same inode has carried less than the last one had.
        mine = meter._last.keys() - others
        meter._last |= dict.fromkeys(mine, (1 << 40, 1 << 40))
        meter.sample()
        assert meter.bytes_out - before == 2 * first


@linux
def test_descriptors_that_close_meanwhile_are_passed_over() -> None:
    meter = SocketMeter()

    def churn() -> None:
        for _ in range(500):
            for end in pair():
                end.close()

    threads = [threading.Thread(target=churn) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        while any(thread.is_alive() for thread in threads):
            meter.sample()
    finally:
        for thread in threads:
            thread.join()


@linux
def test_a_sample_asks_each_socket_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    counts = traffic._counts

    def counted(view: socket.socket, ignored: frozenset[int]) -> tuple[int, int] | None:
        asked.append(os.fstat(view.fileno()).st_ino)
        return counts(view, ignored)

    monkeypatch.setattr(traffic, "_counts", counted)
    ends = [end for _ in range(8) for end in pair()]
    mine = {os.fstat(end.fileno()).st_ino for end in ends}
    twice = os.dup(ends[1].fileno())
    SocketMeter().sample()
    os.close(twice)
    for end in ends:
        end.close()
    assert sorted(inode for inode in asked if inode in mine) == sorted(mine)
    assert len(mine) == 24


def test_elsewhere_it_says_so_and_stays_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(traffic.os, "listdir", missing)
    meter = SocketMeter()
    meter.sample()
    assert not traffic.supported()
    assert (meter.bytes_in, meter.bytes_out) == (0, 0)


def missing(path: str) -> list[str]:
    raise FileNotFoundError(path)


# ---------------------------------------------------------------- against interface counters

END = """
import json, socket, ssl, sys
from shoal.node.traffic import SocketMeter

role, address, port, folder = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4]
BULK, MESSAGES = 6 << 20, 3000
meter = SocketMeter()
if role == "server":
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(folder + "/pair.pem")
    listener = socket.create_server((address, port))
    print("up", flush=True)
    raw, _ = listener.accept()
    wire = context.wrap_socket(raw, server_side=True)
else:
    context = ssl.create_default_context(cafile=folder + "/pair.pem")
    raw = socket.create_connection((address, port))
    wire = context.wrap_socket(raw, server_hostname="peer")
wire.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

def take(size):
    while size:
        size -= len(wire.recv(min(size, 65536)))

def bulk(send):
    for _ in range(BULK >> 16):
        wire.sendall(bytes(65536)) if send else take(65536)

bulk(role == "client")
meter.sample()
for turn in range(MESSAGES):
    size = 64 + 61 * turn % 400
    if role == "client":
        wire.sendall(bytes(size)); take(size)
    else:
        take(size); wire.sendall(bytes(size))
bulk(role == "server")
# All that the server sent has left its socket once the client says that it came.
wire.sendall(b"!") if role == "client" else take(1)
meter.sample()
print(json.dumps([meter.bytes_in, meter.bytes_out]), flush=True)
sys.stdin.read()
"""


def certificate(folder: Path) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "peer")])
    signed = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(datetime(1970, 1, 2, tzinfo=UTC))
        .not_valid_after(datetime(9999, 1, 1, tzinfo=UTC))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("peer")]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem = signed.public_bytes(serialization.Encoding.PEM) + key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    (folder / "pair.pem").write_bytes(pem)


def start(host: Host, role: str, address: str, folder: Path) -> "subprocess.Popen[str]":
    command = [sys.executable, "-W", "error", "-c", END, role, address, "7464", str(folder)]
    return host.start(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


@pytest.mark.real
def test_the_meter_agrees_with_interface_counters_within_a_tenth(tmp_path: Path) -> None:
    """A TLS transfer each way and thousands of small messages, between two namespaces."""
    certificate(tmp_path)
    with network(2) as net:
        before = [host.counters() for host in net]
        server = start(net[0], "server", net[0].address, tmp_path)
        assert server.stdout is not None
        assert server.stdout.readline() == "up\n"
        client = start(net[1], "client", net[0].address, tmp_path)
        assert client.stdout is not None
        metered = [json.loads(end.stdout.readline()) for end in (server, client) if end.stdout]
        after = [host.counters() for host in net]
        for end in range(2):
            for way in range(2):
                crossed = after[end][way] - before[end][way]
                assert crossed > 7_000_000
                assert metered[end][way] == pytest.approx(crossed, rel=0.1), (end, way)
