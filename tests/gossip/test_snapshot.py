"""Laws of a frontier that began with a snapshot, and of what others make of it."""

import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.gossip.frontier import Frontier, Taken, entries_hash
from shoal.gossip.names import Author, Hash, PeerId, digest
from shoal.gossip.records import Update
from shoal.gossip.snapshot import Footing, Line, Snapshot

LOGS, NUMBERS = 3, 6
DONOR, ONE, TWO, THREE = (PeerId(digest(b"peer %d" % n)) for n in range(4))
AUTHORS = sorted(Author(PeerId(digest(b"author %d" % i)), i) for i in range(LOGS))


def update(author: Author, number: int, branch: int = 0) -> tuple[Update, Hash]:
    name = digest(b"%d/%d/%d" % (author.log, number, branch))
    # Turns that do not only rise: the largest so far is what counts.
    turn = 1 + (7 * number + author.log) % 5
    return Update(author, number, turn, "fake", name, 1, b"x"), Hash(digest(name))


def whole() -> Frontier:
    frontier = Frontier()
    for author in AUTHORS:
        for number in range(1, NUMBERS + 1):
            frontier.add(*update(author, number))
    return frontier


def lines(frontier: Frontier, counts: dict[Author, int]) -> tuple[Line, ...]:
    return tuple(
        Line(a, n, frontier.logs[a].hash_at(n), frontier.logs[a].turn_at(n))
        for a, n in sorted(counts.items())
        if n
    )


CUTS = st.fixed_dictionaries({author: st.integers(0, NUMBERS) for author in AUTHORS})


@given(cut=CUTS, rng=st.randoms(use_true_random=False))
def test_what_lies_above_a_snapshot_leads_to_the_frontier_of_the_whole_log(
    cut: dict[Author, int], rng: random.Random
) -> None:
    plain, short = whole(), Frontier()
    short.start(lines(plain, cut))
    above = [(a, n) for a in AUTHORS for n in range(cut[a] + 1, NUMBERS + 1)]
    rng.shuffle(above)
    for author, number in above:
        assert short.add(*update(author, number)) is Taken.NEW
    assert short.hash == plain.hash == entries_hash(short.entries())
    assert short.counts() == plain.counts()
    assert short.total() == plain.total()
    for author in AUTHORS:
        log, same = short.logs[author], plain.logs[author]
        assert (log.summed, log.latest) == (cut[author], same.latest)
        for count in range(cut[author], NUMBERS + 1):
            assert log.hash_at(count) == same.hash_at(count)
            assert log.turn_at(count) == same.turn_at(count)
        for number in range(1, NUMBERS + 1):
            known = number > cut[author]
            assert short.turn(author, number) == (plain.turn(author, number) if known else 0)
            assert short.add(*update(author, number)) is Taken.KNOWN
            forged = short.add(*update(author, number, branch=1))
            assert forged is (Taken.CONFLICT if known else Taken.KNOWN)
        assert short.missing(author, NUMBERS) == []


@given(cut=CUTS, at=CUTS)
def test_an_earlier_frontier_is_known_unless_it_lies_below_the_snapshot(
    cut: dict[Author, int], at: dict[Author, int]
) -> None:
    plain, short = whole(), Frontier()
    short.start(lines(plain, cut))
    for author in AUTHORS:
        for number in range(cut[author] + 1, NUMBERS + 1):
            short.add(*update(author, number))
    counts = {author: count for author, count in at.items() if count}
    known = all(at[a] >= cut[a] for a in AUTHORS)
    assert short.hash_at(counts) == (plain.hash_at(counts) if known else None)


@given(cut=CUTS, closings=CUTS)
def test_closings_above_a_snapshot_act_as_without_one(
    cut: dict[Author, int], closings: dict[Author, int]
) -> None:
    plain, short = whole(), Frontier()
    short.start(lines(plain, cut))
    for author in AUTHORS:
        for number in range(cut[author] + 1, NUMBERS + 1):
            short.add(*update(author, number))
        if closings[author] > cut[author]:
            assert short.close(author, closings[author])
            assert plain.close(author, closings[author])
    assert short.hash == plain.hash
    assert short.counts() == plain.counts()


@given(cut=CUTS, closings=CUTS)
def test_a_log_stays_closed_without_the_snapshot(
    cut: dict[Author, int], closings: dict[Author, int]
) -> None:
    plain, short = whole(), Frontier(unordered=1)
    short.start(lines(plain, cut))
    for author in AUTHORS:
        for number in range(NUMBERS, cut[author] + 1, -1):
            short.add(*update(author, number))  # above a hole
        if closings[author] > cut[author]:
            short.close(author, closings[author])
            plain.close(author, closings[author])
    short.forget_summed()
    for author in (a for a in AUTHORS if cut[a]):
        assert not short.logs[author].above
        for number in range(1, NUMBERS + 1):
            short.add(*update(author, number))
        assert short.entry(author) == plain.entry(author)
    above = sum(len(log.above) for log in short.logs.values())
    assert short._unordered == above


@given(cut=CUTS)
def test_without_the_snapshot_only_the_log_counts(cut: dict[Author, int]) -> None:
    plain, short = whole(), Frontier(unordered=100)
    short.start(lines(plain, cut))
    for author in AUTHORS:
        for number in range(cut[author] + 1, NUMBERS + 1):
            short.add(*update(author, number))
    lost = short.forget_summed()
    assert lost == [(a, cut[a], NUMBERS) for a in AUTHORS if cut[a]]
    for author, _, _ in lost:
        assert short.count(author) == short.summed(author) == 0
        assert short.missing(author, NUMBERS) == [(1, NUMBERS)]
        for number in range(NUMBERS, 0, -1):
            assert short.add(*update(author, number)) is Taken.NEW
    assert short.hash == plain.hash


def standing(*verdicts: tuple[PeerId, bool]) -> Footing:
    footing = Footing(Snapshot(DONOR, (), (0, 0)))
    footing.heard(dict(verdicts))
    return footing


def test_the_donor_cannot_confirm_its_own_snapshot() -> None:
    assert not standing((DONOR, True)).firm({DONOR, ONE})
    assert standing((DONOR, True)).firm({DONOR})
    assert standing().firm(set())
    assert standing((ONE, True)).firm({DONOR, ONE, TWO})


def test_the_donor_can_refute_it() -> None:
    assert standing((DONOR, False)).refuted()


@pytest.mark.parametrize(
    ("verdicts", "disputes", "refuted"),
    [
        ([], [], False),
        ([(ONE, False)], [], True),
        ([(ONE, True), (TWO, False)], [], False),
        ([(ONE, True), (TWO, False), (THREE, False)], [], True),
        ([(ONE, True)], [TWO], False),
        ([(ONE, True)], [TWO, THREE], True),
        ([(ONE, True)], [ONE], False),
        ([], [TWO], True),
    ],
)
def test_more_must_speak_against_it_than_for_it(
    verdicts: list[tuple[PeerId, bool]], disputes: list[PeerId], refuted: bool
) -> None:
    footing = standing(*verdicts)
    for peer in disputes:
        footing.dispute(peer)
    assert footing.refuted() is refuted


def test_who_stands_on_the_log_alone_needs_nobodys_word() -> None:
    footing = standing((ONE, False))
    footing.lose()
    assert footing.firm({ONE, TWO})
    footing.heard({ONE: False})
    footing.dispute(TWO)
    assert not footing.refuted()


def test_who_lacks_its_updates_for_long_speaks_against_it() -> None:
    footing = standing((ONE, True))
    footing.lacking([TWO], 100.0)
    footing.lacking([TWO, ONE, THREE], 150.0)
    assert not footing.refuted(159.9)
    assert not footing.refuted(160.0), "one for it, one against"
    assert footing.refuted(210.0), "nobody can hold it and lack it"
    footing.lacking([], 210.0)
    footing.lacking([TWO, THREE], 211.0)
    assert not footing.refuted(270.9), "they were not late all the time"
    assert footing.refuted(271.0)


def test_doubt_lasts_while_more_speak_against_it() -> None:
    footing = standing((ONE, False))
    assert footing.doubted(5.0) == 5.0
    assert footing.doubted(9.0) == 5.0
    footing.heard({ONE: False, TWO: True})
    assert footing.doubted(10.0) is None
    footing.heard({ONE: False})
    assert footing.doubted(12.0) == 12.0


@given(cut=CUTS, more=st.lists(st.integers(1, 9), max_size=5))
def test_which_turns_are_signed(cut: dict[Author, int], more: list[int]) -> None:
    frontier = Frontier()
    frontier.start(lines(whole(), cut))
    for author in AUTHORS:
        for number, turn in enumerate(more, cut[author] + 1):
            one, record = update(author, number)
            frontier.add(replace(one, turn=turn), record)
        if author in frontier.logs:
            assert frontier.logs[author].signed == max(more, default=0)


def test_who_has_dropped_it_does_not_speak_for_it_any_more() -> None:
    footing = standing((ONE, True), (TWO, False))
    assert footing.contested() == {ONE}
    assert not footing.refuted()
    footing.take_back([ONE])
    assert footing.refuted()
    assert standing((ONE, True)).contested() == set()


def test_a_dispute_counts_while_its_peer_is_there() -> None:
    footing = standing()
    footing.dispute(TWO)
    footing.present({ONE, TWO})
    assert footing.refuted()
    footing.present({ONE})
    assert not footing.refuted()
