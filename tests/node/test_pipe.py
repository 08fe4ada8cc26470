"""Frames between daemon and worker: whole, uncopied, and refused when they make no sense."""

import asyncio
import socket
import struct
import threading
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.node import pipe
from shoal.node.pipe import Async, Blocking, Item, PipeError

PEER = bytes(range(32))


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    a, b = socket.socketpair()
    yield a, b
    a.close()
    b.close()


MESSAGES: list[pipe.Request | pipe.Answer] = [
    pipe.Open(
        pipe.Setup({"run": {"name": "x"}}, PEER, shard=(1, 4)),
        parameters=5,
        layout=PEER,
        initial_root=PEER,
        initial="i",
        held=[(PEER, 2**64 - 1, 3)],
        own=(2**64 - 1, 7),
    ),
    pipe.Apply([Item(PEER, 1, 2, 3, "dense", 10, 10), Item(PEER, 1, 3, 3, "x", 2**60, -1)]),
    pipe.Turn(3, 4.5),
    pipe.Commit(2**64 - 1, 1),
    pipe.Stop(),
    pipe.Turned("dense", None, 1.5, 30, 0.25),
    pipe.Done([pipe.Result((2**64 - 1, 0), "too large")], [(PEER, 1, 2)], (1, 2**64 - 1)),
    pipe.Founded(1, PEER, PEER, f"{1 << 100:x}", {"dense": 10}, {"run": {"seed": 1}}),
    pipe.Failed("ValueError: no", "crash"),
]


@pytest.mark.parametrize("message", MESSAGES, ids=lambda m: type(m).__name__)
def test_a_message_arrives_as_it_was_sent(
    ends: tuple[socket.socket, socket.socket], message: pipe.Request | pipe.Answer
) -> None:
    Blocking(ends[0]).send(message, [b"one", memoryview(b"two")])
    header, body = Blocking(ends[1]).receive()
    decode = (
        pipe.decode_answer
        if hasattr(pipe.Answer, "__args__") and isinstance(message, pipe.Answer)
        else pipe.decode_request
    )
    assert decode(header) == message
    assert body == b"onetwo"


def test_large_bodies_cross_in_both_directions_without_blocking_the_loop() -> None:
    a, b = socket.socketpair()
    big = bytes(range(256)) * 40_000

    def echo() -> None:
        link = Blocking(b)
        _, body = link.receive()
        link.send(pipe.Ready(), [body, body])

    async def talk() -> tuple[bytearray, int]:
        link, ticks = Async(a), 0
        thread = threading.Thread(target=echo)
        thread.start()

        async def tick() -> None:
            nonlocal ticks
            while True:
                ticks += 1
                await asyncio.sleep(0)

        ticking = asyncio.create_task(tick())
        await link.send(pipe.encode(pipe.Save(), [big]))
        _, body = await link.receive()
        ticking.cancel()
        thread.join()
        link.close()
        return body, ticks

    body, ticks = asyncio.run(talk())
    b.close()
    assert body == big * 2
    assert ticks > 10


def test_the_payloads_are_cut_from_the_body_by_their_lengths() -> None:
    items = [Item(PEER, 1, n, 1, "dense", 9, length) for n, length in enumerate([3, -1, 0, 2])]
    assert pipe.split(items, memoryview(b"abcde")) == [b"abc", None, b"", b"de"]
    for body in (b"abcd", b"abcdef", b""):
        with pytest.raises(PipeError, match="add up"):
            pipe.split(items, memoryview(body))


@pytest.mark.parametrize("lengths", [(1 << 31, 0), (2**32 - 1, 2**64 - 1), (0, 1 << 40)])
def test_absurd_lengths_are_refused_before_anything_is_allocated(
    ends: tuple[socket.socket, socket.socket], lengths: tuple[int, int]
) -> None:
    ends[0].sendall(struct.pack("<IQ", *lengths))
    with pytest.raises(PipeError, match="too large"):
        Blocking(ends[1]).receive()


@pytest.mark.parametrize("sent", [b"", b"\1\0", struct.pack("<IQ", 10, 0) + b"abc"])
def test_an_end_in_the_middle_of_a_frame_is_an_end(
    ends: tuple[socket.socket, socket.socket], sent: bytes
) -> None:
    ends[0].sendall(sent)
    ends[0].shutdown(socket.SHUT_WR)
    with pytest.raises(EOFError):
        Blocking(ends[1]).receive()


@given(st.binary(max_size=60) | st.sampled_from([b'{"is":"turned"}', b'{"do":"x"}', b"[" * 9999]))
def test_headers_that_are_no_message_are_refused(data: bytes) -> None:
    for decode in (pipe.decode_answer, pipe.decode_request):
        with pytest.raises(PipeError, match="not a message"):
            decode(data)
