"""Laws of the frontier: a grow-only set seen through counts."""

import random
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.gossip.frontier import Frontier, Rows, Taken, entries_hash
from shoal.gossip.names import NO_HASH, Author, Hash, PeerId, digest, running
from shoal.gossip.records import Update


def author(i: int) -> Author:
    return Author(PeerId(digest(b"author %d" % i)), i)


def update(
    who: Author, number: int, turn: int | None = None, branch: int = 0
) -> tuple[Update, Hash]:
    name = digest(b"%d/%d/%d" % (who.log, number, branch))
    return Update(who, number, turn or number, "fake", name, 1, b"x"), Hash(digest(name))


def everything(logs: int = 3, numbers: int = 5) -> list[tuple[Update, Hash]]:
    return [update(author(i), n) for i in range(logs) for n in range(1, numbers + 1)]


def filled(updates: Iterator[tuple[Update, Hash]] | list[tuple[Update, Hash]]) -> Frontier:
    frontier = Frontier()
    for one in updates:
        frontier.add(*one)
    return frontier


@given(st.permutations(everything()), st.lists(st.sampled_from(everything()), max_size=20))
def test_order_and_duplicates_do_not_matter(
    order: list[tuple[Update, Hash]], again: list[tuple[Update, Hash]]
) -> None:
    frontier, plain = filled([*order, *again]), filled(everything())
    assert frontier.hash == plain.hash
    assert frontier.entries() == plain.entries()
    assert frontier.total() == 15


@given(st.sets(st.sampled_from(range(15)), min_size=1), st.randoms(use_true_random=False))
def test_equal_sets_mean_equal_frontiers_with_holes_too(
    chosen: set[int], rng: random.Random
) -> None:
    updates = [everything()[i] for i in sorted(chosen)]
    shuffled = rng.sample(updates, len(updates))
    assert filled(updates).hash == filled(shuffled).hash
    frontier = filled(shuffled)
    for i in range(3):
        have = {u.number for u, _ in updates if u.author == author(i)}
        count = next(n for n in range(6) if n + 1 not in have)
        assert frontier.count(author(i)) == count
        lacking = {n for a, b in frontier.missing(author(i), 5) for n in range(a, b + 1)}
        assert lacking == set(range(1, 6)) - have


@given(
    st.permutations(everything()),
    st.lists(st.tuples(st.integers(0, 2), st.integers(1, 6)), max_size=5),
    st.randoms(use_true_random=False),
)
def test_closings_commute_with_updates_and_the_smallest_wins(
    order: list[tuple[Update, Hash]], closings: list[tuple[int, int]], rng: random.Random
) -> None:
    steps: list[tuple[Update, Hash] | tuple[int, int]] = [*order, *closings, *closings]
    rng.shuffle(steps)
    mixed, last = Frontier(), filled(everything())
    for a, b in steps:
        if isinstance(a, Update):
            assert isinstance(b, bytes)
            mixed.add(a, Hash(b))
        else:
            assert isinstance(b, int)
            mixed.close(author(a), b)
    for i, n in closings:
        last.close(author(i), n)
    assert mixed.hash == last.hash
    smallest = {i: min(n for j, n in closings if j == i) for i, _ in closings}
    for i, n in smallest.items():
        assert mixed.closed(author(i)) == n
        assert mixed.count(author(i)) == n - 1
        assert mixed.add(*update(author(i), n)) is Taken.CLOSED
        assert mixed.missing(author(i), 9) == []


def test_the_running_hash_is_the_one_of_the_design() -> None:
    frontier = filled(everything(1, 2))
    (_, one), (_, two) = everything(1, 2)
    assert frontier.entry(author(0)).hash == running(running(NO_HASH, one), two)


def test_the_hash_of_entries_is_the_hash_of_the_frontier() -> None:
    frontier = filled(everything())
    frontier.close(author(1), 3)
    frontier.close(author(7), 1)
    assert entries_hash(frontier.entries()) == frontier.hash


def test_another_record_under_a_number_is_a_conflict() -> None:
    frontier = filled([update(author(0), 1), update(author(0), 3)])
    assert frontier.add(*update(author(0), 1, branch=1)) is Taken.CONFLICT
    assert frontier.add(*update(author(0), 3, branch=1)) is Taken.CONFLICT
    assert frontier.add(*update(author(0), 1)) is Taken.KNOWN
    assert frontier.add(*update(author(0), 3)) is Taken.KNOWN


def test_different_branches_have_different_hashes() -> None:
    one, other = filled([update(author(0), 1)]), filled([update(author(0), 1, branch=1)])
    assert one.hash != other.hash
    for frontier in (one, other):
        frontier.close(author(0), 1)
    assert one.hash == other.hash


@given(st.permutations(everything()), st.tuples(*[st.integers(0, 5)] * 3))
def test_the_hash_at_an_earlier_frontier_is_what_it_was(
    order: list[tuple[Update, Hash]], at: tuple[int, int, int]
) -> None:
    then = filled([u for u in everything() if u[0].number <= at[u[0].author.log]])
    now = filled(order)
    assert now.hash_at(dict(then.counts())) == then.hash


def test_a_frontier_not_reached_has_no_hash() -> None:
    frontier = filled(everything())
    assert frontier.hash_at({author(0): 6}) is None
    assert frontier.hash_at({author(9): 1}) is None


def test_updates_above_holes_are_bounded() -> None:
    frontier = Frontier(unordered=100)
    taken = [frontier.add(*update(author(0), n)) for n in range(2, 100)]
    fits = taken.count(Taken.NEW)
    assert taken == [Taken.NEW] * fits + [Taken.REFUSED] * (98 - fits)
    assert 16 <= fits <= 50
    assert frontier.add(*update(author(1), 5)) is Taken.NEW, "one author leaves room for others"
    assert frontier.add(*update(author(0), 1)) is Taken.NEW
    assert frontier.count(author(0)) == fits + 1
    assert frontier.add(*update(author(0), fits + 9)) is Taken.NEW, "the hole closed: there is room"


def test_logs_are_bounded() -> None:
    frontier = Frontier(logs=2)
    assert [frontier.add(*update(author(i), 1)) for i in range(3)][-1] is Taken.REFUSED


def test_up_to_turn_stops_before_the_first_later_turn() -> None:
    turns = [1, 2, 5, 3, 6]  # a liar's turn falls back: it does not count before turn 5
    frontier = filled([update(author(0), i + 1, turn) for i, turn in enumerate(turns)])
    counts = [dict(frontier.up_to_turn(t)).get(author(0), 0) for t in range(7)]
    assert counts == [0, 1, 2, 2, 2, 4, 5]


def test_settled_is_what_every_member_has_stated() -> None:
    frontier, rows = filled(everything()), Rows()
    one, other = PeerId(digest(b"one")), PeerId(digest(b"other"))
    rows.state(one, author(0), 4)
    rows.state(other, author(2), 1)
    rows.state(other, author(0), 2)
    rows.state(other, author(0), 1)
    settled = dict(rows.settled(frontier, [one, other]))
    assert settled == {author(0): 2, author(1): 0, author(2): 0}
    rows.forget(one)
    assert dict(rows.settled(frontier, [other]))[author(2)] == 1


@pytest.mark.parametrize("number", [1, 4])
def test_closing_twice_is_closing_once(number: int) -> None:
    frontier = filled(everything())
    assert frontier.close(author(0), number)
    before = frontier.hash
    assert not frontier.close(author(0), number)
    assert not frontier.close(author(0), number + 1)
    assert frontier.hash == before


def test_a_log_closed_at_its_first_number_is_in_the_hash_of_earlier_frontiers() -> None:
    frontier = filled([update(author(1), 1), update(author(2), 1), update(author(2), 2)])
    frontier.close(author(1), 1)
    assert frontier.hash_at(dict(frontier.counts())) == frontier.hash
    earlier = filled([update(author(1), 1), update(author(2), 1)])
    open_there = earlier.hash_at({author(2): 1})
    earlier.close(author(1), 1)
    assert frontier.hash_at({author(2): 1}) == earlier.hash != open_there


def test_what_is_lost_is_a_hole_and_what_came_after_it_is_held_no_longer() -> None:
    frontier = filled([update(author(1), n) for n in (1, 2, 3, 5)])
    assert frontier.lose(author(1), 2) == 3
    assert frontier.hash == filled([update(author(1), 1)]).hash
    assert frontier.missing(author(1), 5) == [(2, 4)]
    assert frontier.lose(author(1), 5) == 1, "above the hole, where nothing is in"
    assert frontier.missing(author(1), 5) == [(2, 5)]
    assert frontier.lose(author(2), 1) == 0
    for number in (5, 3, 2):
        frontier.add(*update(author(1), number))
    assert frontier.count(author(1)) == 3
