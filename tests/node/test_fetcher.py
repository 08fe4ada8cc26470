"""Payloads are verified, resumed elsewhere, bounded, and never raise past the fetcher."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest

from shoal.gossip.events import Misbehaved, Pull, Pulled, PullFailed
from shoal.gossip.limits import Limits
from shoal.gossip.names import Hash, PeerId, digest
from shoal.node.errors import PeerError
from shoal.node.fetcher import Fetcher

DATA = bytes(range(256)) * 40
NAME = digest(DATA)
HONEST, BROKEN, LIAR, SLOW, GENEROUS = (PeerId(bytes([i]) * 32) for i in range(1, 6))


async def source(peer: PeerId, payload: Hash, size: int, offset: int) -> AsyncIterator[bytes]:
    """Serve DATA in chunks, each peer in its own way."""
    for start in range(offset, size, 1000):
        if peer == BROKEN and start - offset >= 3000:
            raise PeerError("unreachable", "gone")
        if peer == SLOW:
            await asyncio.sleep(60)
        chunk = DATA[start : min(start + 1000, size)]
        yield b"?" * len(chunk) if peer == LIAR else chunk
    if peer == GENEROUS:
        yield b"and more"


def run(*peers: PeerId, limits: Limits | None = None) -> tuple[Fetcher, list[object], list[int]]:
    heard: list[object] = []
    offsets: list[int] = []

    def pull(peer: PeerId, payload: Hash, size: int, offset: int) -> AsyncIterator[bytes]:
        offsets.append(offset)
        return source(peer, payload, size, offset)

    fetcher = Fetcher(pull, heard.append, limits or Limits())

    async def main() -> None:
        for peer in peers:
            await fetcher.fetch(Pull(peer, NAME, len(DATA)))

    asyncio.run(main())
    return fetcher, heard, offsets


def test_a_whole_payload_is_handed_over_once() -> None:
    fetcher, heard, _ = run(HONEST)
    assert heard == [Pulled(NAME)]
    assert fetcher.take(NAME) == DATA
    assert fetcher.take(NAME) is None


def test_the_next_source_goes_on_where_the_last_one_stopped() -> None:
    fetcher, heard, offsets = run(BROKEN, HONEST)
    assert heard == [PullFailed(BROKEN, NAME, "unreachable"), Pulled(NAME)]
    assert offsets == [0, 3000]
    assert fetcher.take(NAME) == DATA


def test_a_wrong_payload_is_the_senders_fault_and_is_forgotten() -> None:
    fetcher, heard, offsets = run(LIAR, HONEST)
    assert heard == [Misbehaved(LIAR, "hash"), PullFailed(LIAR, NAME, "hash"), Pulled(NAME)]
    assert offsets == [0, 0]
    assert fetcher.take(NAME) == DATA


def test_a_silent_source_times_out() -> None:
    _, heard, _ = run(SLOW, limits=replace(Limits(), pull_timeout=0.05))
    assert heard == [PullFailed(SLOW, NAME, "timeout")]


def test_what_comes_beyond_the_declared_size_is_not_read() -> None:
    fetcher, heard, _ = run(GENEROUS)
    assert heard == [Pulled(NAME)]
    assert fetcher.take(NAME) == DATA


@pytest.mark.parametrize("extra", [1, 999])
def test_a_chunk_that_oversteps_the_declared_size_is_refused(extra: int) -> None:
    heard: list[object] = []

    async def pull(peer: PeerId, payload: Hash, size: int, offset: int) -> AsyncIterator[bytes]:
        yield DATA + b"x" * extra

    fetcher = Fetcher(pull, heard.append, Limits())
    asyncio.run(fetcher.fetch(Pull(HONEST, NAME, len(DATA))))
    assert heard == [PullFailed(HONEST, NAME, "oversize")]


def test_who_goes_on_after_a_liar_is_not_blamed_for_its_bytes() -> None:
    heard: list[object] = []

    async def pull(peer: PeerId, payload: Hash, size: int, offset: int) -> AsyncIterator[bytes]:
        if peer == LIAR:
            yield b"?" * 3000
            raise PeerError("unreachable", "gone")
        yield DATA[offset:]

    fetcher = Fetcher(pull, heard.append, Limits())

    async def main() -> None:
        await fetcher.fetch(Pull(LIAR, NAME, len(DATA)))
        await fetcher.fetch(Pull(HONEST, NAME, len(DATA)))

    asyncio.run(main())
    assert heard == [PullFailed(LIAR, NAME, "unreachable"), Pulled(NAME)]
    assert fetcher.take(NAME) == DATA


def test_two_pulls_of_one_payload_do_not_mix() -> None:
    """The first was given up by the core, which asks again for another record's sake."""
    heard: list[object] = []
    fetcher = Fetcher(source, heard.append, Limits())

    async def main() -> None:
        pulls = (Pull(HONEST, NAME, len(DATA)), Pull(BROKEN, NAME, len(DATA)))
        await asyncio.gather(*(fetcher.fetch(p) for p in (*pulls, pulls[0])))

    asyncio.run(main())
    assert not any(isinstance(event, Misbehaved) for event in heard)
    assert fetcher.take(NAME) == DATA


def test_a_large_payload_is_verified_too() -> None:
    large = DATA * 500
    heard: list[object] = []

    async def pull(peer: PeerId, payload: Hash, size: int, offset: int) -> AsyncIterator[bytes]:
        await asyncio.sleep(0)
        yield large[:-1] + (b"?" if peer == LIAR else large[-1:])

    fetcher = Fetcher(pull, heard.append, Limits())

    async def main() -> None:
        await fetcher.fetch(Pull(LIAR, digest(large), len(large)))
        await fetcher.fetch(Pull(HONEST, digest(large), len(large)))

    asyncio.run(main())
    assert [type(event) for event in heard] == [Misbehaved, PullFailed, Pulled]
