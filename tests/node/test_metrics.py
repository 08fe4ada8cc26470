"""Counters, and the kernel's own count of what sockets carried."""

import socket
import sys

import pytest

from shoal.node.metrics import HEADER_BYTES, LABELS, Counters, SocketMeter


def test_counters_add_up_by_label() -> None:
    counters = Counters()
    counters.add("dropped", "bad signature")
    counters.add("dropped", "bad signature", 4)
    counters.add("dropped", "oversize")
    assert counters.of("dropped") == {"bad signature": 5, "oversize": 1}
    assert counters.total("dropped") == 6


def test_a_counter_that_does_not_exist_is_our_bug() -> None:
    with pytest.raises(KeyError):
        Counters().add("droped", "oversize")


def test_labels_are_bounded_and_nothing_is_lost() -> None:
    counters = Counters()
    for number in range(3 * LABELS):
        counters.add("events", f"event {number}")
    assert len(counters.of("events")) == LABELS + 1
    assert counters.total("events") == 3 * LABELS


def test_what_is_returned_is_a_copy() -> None:
    counters = Counters()
    counters.of("dropped")["oversize"] = 9
    assert counters.of("dropped") == {}


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
        meter = SocketMeter(set)
        meter.sample()
        out, came = meter.bytes_out, meter.bytes_in
        carry(near, far, 100_000)
        meter.sample()
        # Both ends are ours, so everything sent is also received; loopback takes few segments.
        assert 100_000 + HEADER_BYTES <= meter.bytes_out - out < 110_000
        assert 100_000 + HEADER_BYTES <= meter.bytes_in - came < 110_000


@linux
def test_a_second_sample_counts_nothing_twice() -> None:
    listener, near, far = pair()
    with listener, near, far, near.dup():
        meter = SocketMeter(set)
        carry(near, far, 10_000)
        meter.sample()
        out = meter.bytes_out
        meter.sample()
        assert meter.bytes_out == out
        assert 10_000 < out < 13_000


@linux
def test_the_status_port_is_left_out() -> None:
    listener, near, far = pair()
    with listener, near, far:
        port = listener.getsockname()[1]
        meter = SocketMeter(lambda: {port})
        carry(far, near, 50_000)  # what the status port sent; `near` is the asker
        meter.sample()
        assert meter.bytes_out < 2_000


@linux
def test_what_a_closed_socket_carried_stays_counted() -> None:
    meter = SocketMeter(set)
    for _ in range(3):
        listener, near, far = pair()
        with listener, near, far:
            carry(near, far, 20_000)
            meter.sample()
        meter.sample()
    assert 60_000 < meter.bytes_out < 66_000


@linux
def test_sampling_closes_nothing() -> None:
    listener, near, far = pair()
    with listener, near, far:
        SocketMeter(set).sample()
        carry(near, far, 1000)
