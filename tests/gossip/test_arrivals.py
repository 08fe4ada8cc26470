"""Payloads on their way: who is asked for what, within bounds."""

from collections import Counter
from collections.abc import Iterator

from shoal.gossip.arrivals import PULLS_PER_SOURCE, Arrivals
from shoal.gossip.events import Pull
from shoal.gossip.frontier import Frontier, Taken
from shoal.gossip.limits import Limits
from shoal.gossip.names import Author, Hash, PeerId, RunId, digest
from shoal.gossip.outbox import Outbox
from shoal.gossip.records import Record, Update
from shoal.gossip.run import Run
from shoal.gossip.timers import Timers


def peer(i: int) -> PeerId:
    return PeerId(digest(b"peer %d" % i))


def update(number: int, *, author: int = 0, payload: int | None = None, size: int = 5000) -> Record:
    name = Hash(digest(b"payload %d" % (number if payload is None else payload)))
    statement = Update(Author(peer(author), 1), number, number, "fake", name, size)
    return Record(digest(repr(statement).encode()), b"", statement)


class Scene:
    """Arrivals, and the pulls that they ask for."""

    def __init__(self, limits: Limits | None = None) -> None:
        run = Run(RunId(digest(b"run")), most_bytes={"fake": 1 << 20})
        self.out, self.frontier = Outbox(256), Frontier()
        self.it = Arrivals(run, limits or Limits(), Timers(), self.out, self.frontier)
        self.under_way: dict[Hash, Pull] = {}

    def take(self, record: Record, source: PeerId) -> Taken:
        assert isinstance(record.statement, Update)
        return self.it.take(record, record.statement, source, own=False)

    def pump(self) -> list[Pull]:
        self.it.pump()
        new = [e for e in self.out.drain() if isinstance(e, Pull)]
        assert not {p.payload for p in new} & self.under_way.keys(), "nothing is pulled twice"
        self.under_way |= {p.payload: p for p in new}
        return new

    def fail(self, pull: Pull) -> bool:
        del self.under_way[pull.payload]
        return self.it.failed(pull.peer, pull.payload)

    def arrive(self, pull: Pull) -> None:
        del self.under_way[pull.payload]
        self.it.pulled(pull.payload)

    def busy(self) -> Counter[PeerId]:
        return Counter(p.peer for p in self.under_way.values())


def everything(scene: Scene) -> Iterator[Pull]:
    while scene.pump() or scene.under_way:
        pull = next(iter(scene.under_way.values()))
        scene.arrive(pull)
        yield pull


def test_what_was_offered_first_comes_first_and_no_source_is_overrun() -> None:
    scene = Scene()
    records = [update(n) for n in range(1, 41)]
    for record in records:
        assert scene.take(record, peer(1)) is Taken.NEW
    assert len(scene.pump()) == PULLS_PER_SOURCE
    assert scene.pump() == []
    got = [p.payload for p in everything(scene)]
    assert got == [r.statement.payload for r in records]  # type: ignore[union-attr]
    assert not scene.it.fetches
    assert not scene.it._offers


def test_several_sources_share_the_work() -> None:
    scene = Scene()
    for n in range(1, 41):
        record = update(n)
        scene.take(record, peer(1))
        for other in (2, 3, 4, 5, 6):
            scene.it.holds(peer(other), record.statement.author, n)  # type: ignore[union-attr]
    assert len(scene.pump()) == Limits().pulls
    assert set(scene.busy().values()) <= {2, 3}
    assert len(scene.busy()) == 6
    assert len(list(everything(scene))) == 40


def test_a_failed_source_is_not_asked_again_before_the_others() -> None:
    scene = Scene()
    record = update(1)
    scene.take(record, peer(1))
    scene.it.holds(peer(2), Author(peer(0), 1), 1)
    (first,) = scene.pump()
    assert not scene.fail(first), "there is another source"
    (second,) = scene.pump()
    assert {first.peer, second.peer} == {peer(1), peer(2)}
    assert scene.fail(second), "there is none left"
    assert scene.pump() == []
    scene.it.holds(peer(1), Author(peer(0), 1), 1)
    assert len(scene.pump()) == 1


def test_a_closing_frees_what_was_under_way() -> None:
    scene = Scene()
    for n in range(1, 9):
        scene.take(update(n), peer(1))
    assert len(scene.pump()) == PULLS_PER_SOURCE
    scene.it.close(Author(peer(0), 1), 1)
    assert not scene.it.fetches
    assert not scene.it._busy
    assert not scene.it._offers
    scene.under_way.clear()
    scene.take(update(1, author=7, payload=99), peer(1))
    assert len(scene.pump()) == 1


def test_staging_is_bounded_but_never_blocked() -> None:
    scene = Scene(Limits(staging_bytes=12_000))
    for n in range(1, 8):
        scene.take(update(n), peer(n))
    scene.take(update(8, size=1 << 20), peer(8))
    assert len(scene.pump()) == 2
    assert len(list(everything(scene))) == 8


def test_a_liar_about_the_size_of_a_payload_does_not_spoil_its_transfer() -> None:
    scene = Scene()
    assert scene.take(update(1, size=5000), peer(1)) is Taken.NEW
    copycat = update(1, author=3, payload=1, size=5)
    assert scene.take(copycat, peer(3)) is Taken.REFUSED
    assert [p.size for p in everything(scene)] == [5000]
    assert scene.take(copycat, peer(3)) is Taken.NEW, "it may show now that it is right"
