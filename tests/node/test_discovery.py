"""Whom to dial, by a clock of the test's own; and the loop that dials."""

import asyncio
import random
from collections.abc import Callable, Iterable
from itertools import pairwise

import pytest

from shoal.gossip.names import PeerId
from shoal.node.addresses import parse
from shoal.node.discovery import Book, Discovery, DiscoveryLimits, Outcome, Source
from shoal.node.identity import peer_text
from shoal.node.transport.libp2p.hint import Hint

LIMITS = DiscoveryLimits()


def peer(n: int) -> PeerId:
    return PeerId(n.to_bytes(32, "big"))


def at(n: int) -> list[str]:
    return [f"/ip4/203.0.113.{n}/tcp/7464"]


def libp2p(n: int) -> str:
    return f"/ip4/203.0.113.{n}/tcp/4001/p2p/{peer_text(peer(n))}"


def book(limits: DiscoveryLimits = LIMITS) -> Book:
    return Book(peer(0), limits, random.Random(7))


def names(suggestions: Iterable[object]) -> list[int]:
    return [int.from_bytes(s.peer, "big") for s in suggestions]  # type: ignore[attr-defined]


def test_nobody_is_dialled_with_enough_links() -> None:
    it = book()
    it.add(peer(1), at(1), Source.BOOTSTRAP, now=0)
    assert it.due([peer(8), peer(9)], wanted=2, now=0) == []
    assert names(it.due([peer(8)], wanted=2, now=0)) == [1]


def test_as_many_are_suggested_as_are_missing_counting_dials_under_way() -> None:
    it = book()
    for n in range(1, 6):
        it.add(peer(n), at(n), Source.FOUND, now=0)
    assert len(it.due([], wanted=2, now=0)) == 2
    assert it.due([], wanted=2, now=0) == []
    assert len(it.due([], wanted=3, now=0)) == 1


def test_never_more_dials_than_the_bound() -> None:
    it = book()
    for n in range(1, 20):
        it.add(peer(n), at(n), Source.FOUND, now=0)
    assert len(it.due([], wanted=50, now=0)) == LIMITS.dials
    assert it.due([], wanted=50, now=99) == []


def test_bootstrap_comes_before_remembered_before_found() -> None:
    it = book()
    for n, source in ((1, Source.FOUND), (2, Source.BOOTSTRAP), (3, Source.REMEMBERED)):
        it.add(peer(n), at(n), source, now=0)
    assert names(it.due([], wanted=3, now=0)) == [2, 3, 1]


def test_who_never_failed_comes_before_a_bootstrap_that_did() -> None:
    it = book()
    it.add(peer(1), at(1), Source.BOOTSTRAP, now=0)
    it.due([], wanted=1, now=0)
    it.settle(peer(1), Outcome.UNREACHABLE, now=1)
    it.add(peer(2), at(2), Source.FOUND, now=50)
    assert names(it.due([], wanted=2, now=50)) == [2, 1]


def test_pauses_double_up_to_the_bound_and_end_with_a_link() -> None:
    it = book()
    it.add(peer(1), at(1), Source.BOOTSTRAP, now=0)
    now, pauses = 0.0, []
    for _ in range(12):
        while not it.due([], wanted=1, now=now):
            now += 0.25
            assert now < 10_000
        it.settle(peer(1), Outcome.UNREACHABLE, now=now)
        pauses.append(now)
    gaps = [b - a for a, b in pairwise(pauses)]
    assert gaps[0] < 3
    assert all(b > a for a, b in pairwise(gaps[:7]))
    assert max(gaps) <= 1.25 * LIMITS.retry_max + 0.25
    assert gaps[-1] >= 0.75 * LIMITS.retry_max
    while not it.due([], wanted=1, now=now):
        now += 1
    it.settle(peer(1), Outcome.LINKED, now=now)
    assert it.due([], wanted=1, now=now + 1) == []  # just lost: the core's business first
    assert names(it.due([], wanted=1, now=now + LIMITS.relink)) == [1]


def test_who_refuses_is_left_alone_even_when_found_again() -> None:
    it = book()
    it.add(peer(1), at(1), Source.FOUND, now=0)
    it.due([], wanted=1, now=0)
    it.settle(peer(1), Outcome.REFUSED, now=0)
    it.add(peer(1), at(1), Source.FOUND, now=10)
    it.seen(peer(1), now=10)
    assert it.due([], wanted=1, now=LIMITS.refused - 1) == []
    assert names(it.due([], wanted=1, now=LIMITS.refused)) == [1]


def test_new_addresses_are_tried_at_once_and_first() -> None:
    it = book()
    it.add(peer(1), at(1), Source.FOUND, now=0)
    it.due([], wanted=1, now=0)
    it.settle(peer(1), Outcome.UNREACHABLE, now=0)
    it.add(peer(1), at(1), Source.FOUND, now=0.1)
    assert it.due([], wanted=1, now=0.1) == []
    it.add(peer(1), at(9), Source.FOUND, now=0.2)
    [suggestion] = it.due([], wanted=1, now=0.2)
    assert suggestion.addresses == (*at(9), *at(1))


def test_a_peer_seen_alive_is_tried_at_once() -> None:
    it = book()
    it.add(peer(1), at(1), Source.FOUND, now=0)
    for now in (0, 1000, 2000, 3000):
        it.due([], wanted=1, now=now)
        it.settle(peer(1), Outcome.UNREACHABLE, now=now)
    assert it.due([], wanted=1, now=3001) == []
    it.seen(peer(1), now=3001)
    assert names(it.due([], wanted=1, now=3001)) == [1]


def test_self_and_what_is_no_address_never_enter() -> None:
    it = book()
    it.add(peer(0), at(1), Source.FOUND, now=0)
    it.add(peer(1), ["/ip4/0.0.0.0/tcp/1", "http://x", "", "/ip4/1.2.3.4/tcp/99999"], 2, now=0)  # type: ignore[arg-type]
    assert len(it) == 0


def test_the_book_is_bounded_and_keeps_bootstrap_and_linked_peers() -> None:
    it = book(DiscoveryLimits(peers=10, addresses=3))
    it.add(peer(1), at(1), Source.BOOTSTRAP, now=0)
    it.add(peer(2), at(2), Source.FOUND, now=0)
    it.due([peer(2)], wanted=0, now=0)
    for n in range(3, 200):
        it.add(peer(n), at(n % 250), Source.FOUND, now=n)
        for k in range(10):
            it.add(peer(n), at(k), Source.FOUND, now=n)
    assert len(it) == 10
    assert {peer(1), peer(2)} <= it._known.keys()
    assert all(len(k.addresses) <= 3 for k in it._known.values())


def test_remembered_peers_come_back_from_disk() -> None:
    it = book(DiscoveryLimits(remembered=2))
    for n in (1, 2, 3):
        it.add(peer(n), at(n), Source.FOUND, now=0, libp2p=libp2p(n))
    it.add(peer(4), at(4), Source.FOUND, now=0)
    for n in (1, 2, 3):
        it.due([peer(n)], wanted=0, now=n)
    written = it.remembered()
    assert [p for p, _ in written] == [peer(3), peer(2)]
    again = discovery()
    assert again.recall(written) == [libp2p(3), libp2p(2)]
    assert dict(again.book.remembered()) == dict(written)  # before anybody was linked again
    suggested = again.book.due([], wanted=9, now=1e9)
    assert sorted(names(suggested)) == [2, 3]
    assert {s.addresses for s in suggested} == {tuple(at(2)), tuple(at(3))}


def test_members_are_remembered_by_their_contact_records_and_libp2p_addresses() -> None:
    it = book(DiscoveryLimits(remembered=3, addresses=2))
    for n in (1, 2, 3, 4):
        it.add(peer(n), at(n), Source.FOUND, now=0, libp2p=libp2p(n))
        it.due([peer(n)], wanted=0, now=n)
    told = (*at(101), *at(102), *at(103))
    written = it.remembered([(peer(1), told), (peer(9), told)])
    assert written == [
        (peer(1), (told[0], libp2p(1))),
        (peer(9), told[:2]),
        (peer(4), (*at(4), libp2p(4))),
    ]


def test_a_damaged_memory_is_passed_over() -> None:
    again = discovery()
    damaged = [(peer(1), ("", "x", "/ip4/1.2.3.4", libp2p(3))), (peer(2), tuple(at(2)))]
    assert again.recall(damaged) == []
    assert names(again.book.due([], wanted=9, now=1e9)) == [2]
    again.recall([(peer(n), tuple(at(2))) for n in range(10_000)])
    assert len(again.book) <= LIMITS.remembered + 1


# ---------------------------------------------------------------- the loop


class World:
    """Peers that can be dialled, and the links that came of it."""

    def __init__(self, outcomes: dict[int, Outcome]) -> None:
        self.outcomes, self.links, self.dialled = outcomes, set[PeerId](), list[int]()

    async def dial(self, to: PeerId, addresses: tuple[str, ...]) -> Outcome:
        n = int.from_bytes(to, "big")
        self.dialled.append(n)
        assert addresses
        if n not in self.outcomes:
            await asyncio.sleep(3600)
        if self.outcomes[n] is Outcome.LINKED:
            self.links.add(to)
        return self.outcomes[n]


class Hints:
    def __init__(self) -> None:
        self.hints: asyncio.Queue[Hint] = asyncio.Queue(8)
        self.hurried = 0
        self.linked = set[PeerId]()

    def hurry(self, linked: Iterable[PeerId]) -> None:
        self.hurried += 1
        self.linked = set(linked)


def discovery(
    world: World | None = None, wanted: int = 2, limits: DiscoveryLimits | None = None
) -> Discovery:
    world = world or World({})
    return Discovery(
        peer(0),
        world.dial,
        links=lambda: world.links,
        wanted=lambda: wanted,
        limits=limits or DiscoveryLimits(interval=0.01, dial_timeout=0.05, retry=0.02, hurry=0.05),
        rng=random.Random(1),
    )


async def until(done: Callable[[], object], task: "asyncio.Task[None]") -> None:
    async with asyncio.timeout(200):
        while not done():
            assert not task.done(), task.exception()
            await asyncio.sleep(0.005)


async def ended(task: "asyncio.Task[None]") -> None:
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


def test_it_dials_until_it_has_the_links_it_wants(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")

    async def main() -> None:
        world = World({1: Outcome.UNREACHABLE, 2: Outcome.LINKED, 3: Outcome.REFUSED})
        it, hints = discovery(world), Hints()
        text = f"/p2p/{peer_text(peer(1))}"
        it.bootstrap([parse(at(1)[0] + text)])
        it.recall([(peer(n), tuple(at(n))) for n in (2, 3, 4)])
        task = asyncio.create_task(it.run(hints))
        await until(lambda: world.links == {peer(2)} and world.dialled.count(1) > 3, task)
        await until(lambda: world.dialled.count(4) > 1, task)  # its time-out ended that dial alone
        await until(lambda: hints.linked == world.links, task)
        assert world.dialled.count(3) == 1
        assert world.links == {peer(2)}
        world.outcomes[5] = Outcome.LINKED
        hints.hints.put_nowait(Hint(peer(5), tuple(at(5)), b"", "mdns", "/ip4/1.1.1.1/tcp/1/p2p/x"))
        await until(lambda: world.links == {peer(2), peer(5)}, task)
        await ended(task)
        told = dict(it.book.remembered())[peer(5)]
        assert told == (*at(5), "/ip4/1.1.1.1/tcp/1/p2p/x")

    asyncio.run(main())
    said = {(record.getMessage(), getattr(record, "outcome", "")) for record in caplog.records}
    # Who is unreachable the driver says, with the reason; and it says so at each attempt.
    assert said == {("dialled", "linked"), ("dialled", "refused"), ("no link in time", "")}


def test_with_enough_links_it_is_silent() -> None:
    async def main() -> None:
        world = World(dict.fromkeys(range(9), Outcome.LINKED))
        world.links = {peer(7), peer(8)}
        it, hints = discovery(world), Hints()
        it.recall([(peer(1), tuple(at(1)))])
        task = asyncio.create_task(it.run(hints))
        await asyncio.sleep(0.15)
        assert world.dialled == []
        assert hints.hurried == 0
        world.links.clear()
        await until(lambda: world.dialled == [1], task)
        await ended(task)

    asyncio.run(main())


def test_the_finder_is_hurried_ever_more_rarely_until_a_link_is_lost() -> None:
    async def main() -> None:
        world, hints, now = World({}), Hints(), [0.0]
        world.links = {peer(1)}
        it = discovery(world, wanted=3, limits=DiscoveryLimits(interval=0, hurry=10, hurry_max=80))
        it._clock = lambda: now[0]
        task = asyncio.create_task(it.run(hints))
        at_all = []
        for _ in range(400):
            now[0] += 1
            before = hints.hurried
            for _ in range(5):
                await asyncio.sleep(0)
            at_all += [now[0]] * (hints.hurried - before)
        assert len(at_all) == 7  # after 10, 20, 40, 80, 80, 80, 80
        world.links.clear()
        before = hints.hurried
        now[0] += 10
        await until(lambda: hints.hurried == before + 1, task)
        await ended(task)

    asyncio.run(main())
