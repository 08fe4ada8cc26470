"""The small pure parts, each by its law: timers, scores, pacing, suspicion, agreement."""

from itertools import pairwise
from math import isclose

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.gossip import agreement as agreement_module
from shoal.gossip.agreement import MOST_STANDS, Agreement
from shoal.gossip.events import Applied
from shoal.gossip.frontier import Frontier, Rows
from shoal.gossip.limits import Limits
from shoal.gossip.membership import suspicion_time
from shoal.gossip.names import Author, Hash, Key, PeerId, digest
from shoal.gossip.pacing import Free, Lockstep, Weight, drawn, first_turn, make
from shoal.gossip.records import Progress, Report, Update
from shoal.gossip.score import WEIGHTS, Scores
from shoal.gossip.timers import Timers


def peer(i: int) -> PeerId:
    return PeerId(digest(b"peer %d" % i))


# ---------------------------------------------------------------- timers


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 20))))
def test_a_timer_is_due_once_at_its_last_deadline(sets: list[tuple[str, int]]) -> None:
    timers = Timers()
    for what, at in sets:
        timers.set(what, at)
    last = dict(sets)
    assert timers.next() == min(last.values(), default=None)
    assert sorted(what for what, _ in timers.due(10)) == sorted(
        w for w, at in last.items() if at <= 10
    )
    assert list(timers.due(10)) == []
    assert sorted(what for what, _ in timers.due(99)) == sorted(
        w for w, at in last.items() if at > 10
    )


def test_hurry_never_delays_and_cancel_forgets() -> None:
    timers = Timers()
    timers.set("a", 5)
    timers.hurry("a", 7)
    assert timers.next() == 5
    timers.hurry("a", 3)
    assert timers.next() == 3
    timers.cancel("a")
    assert timers.next() is None


# ---------------------------------------------------------------- suspicion (Lifeguard, IV-B)


def test_suspicion_times_are_lifeguards() -> None:
    def at(confirmations: int) -> float:
        return suspicion_time(1000, confirmations, 2, 1.0, 4, 6)

    assert isclose(at(0), 72)
    assert isclose(at(2), 12)
    assert 12 < at(1) < 72
    # algorithms D3: k = 2 with 4 s as the least gives 24, 11.381, 4 s; the shape is the same.
    assert isclose(at(1) / 12, 11.381 / 4, rel_tol=1e-3)
    assert isclose(suspicion_time(4, 0, 0, 1.0, 4, 6), 6)


# ---------------------------------------------------------------- scores


def test_misdeeds_ban_and_scores_decay() -> None:
    scores = Scores(Limits())
    deeds = 0
    while not scores.blame(peer(1), "signature", 0.0):
        deeds += 1
        assert deeds < 10
    assert scores.banned(peer(1), 1.0)
    assert not scores.banned(peer(1), Limits().ban + 1)
    assert not scores.banned(peer(2), 1.0)
    scores.blame(peer(2), "flood", 0.0)
    assert isclose(scores.score(peer(2), Limits().score_halflife), WEIGHTS["flood"] / 2)


def test_every_misdeed_weighs() -> None:
    assert all(weight < 0 for weight in WEIGHTS.values())


def test_floods_are_refused_and_the_bucket_refills() -> None:
    limits = Limits()
    scores = Scores(limits)
    burst = int(4 * limits.records_per_second)
    assert scores.admit(peer(1), burst, 1, 0.0)
    assert not scores.admit(peer(1), 1, 1, 0.0)
    assert scores.admit(peer(1), int(limits.records_per_second) - 1, 1, 1.0)
    assert not scores.admit(peer(2), 1, int(5 * limits.bytes_per_second), 0.0)


def test_a_throttled_peer_refills_slowly() -> None:
    limits = Limits()
    scores = Scores(limits)
    scores.blame(peer(1), "signature", 0.0)
    assert scores.admit(peer(1), int(4 * limits.records_per_second), 1, 0.0)
    assert not scores.admit(peer(1), int(limits.records_per_second / 2), 1, 1.0)


def test_score_keeping_is_bounded() -> None:
    scores = Scores(Limits(members=10))
    for i in range(100):
        scores.blame(peer(i), "flood", 0.0)
    assert len(scores.peers) == 10


# ---------------------------------------------------------------- pacing


def test_the_draw_is_fair_and_the_same_everywhere() -> None:
    hits = sum(drawn(t, peer(i), 0.25) for t in range(100) for i in range(40))
    assert 850 < hits < 1150
    assert drawn(3, peer(1), 0.25) == drawn(3, peer(1), 0.25)
    assert all(drawn(t, peer(0), 1.0) for t in range(10))
    assert {drawn(t, peer(0), 0.5) for t in range(20)} == {True, False}


def test_a_joiner_starts_after_the_median_or_the_majority() -> None:
    assert first_turn("free", []) == 1
    assert first_turn("free", [0, 0, 3]) == 1
    assert first_turn("free", [4, 5, 9]) == 6
    assert first_turn("lockstep", [4, 5, 5]) == 6
    assert first_turn("lockstep", [4, 4, 4, 5]) == 5
    # Exactly half is no majority.
    assert first_turn("lockstep", [4, 4, 5, 5]) == 5


def test_the_weight_rises_at_once_and_falls_slowly() -> None:
    weight = Weight(min_peers=2, weight_turns=3)
    assert weight.at(1, 1) == 2
    assert weight.at(2, 8) == 8
    assert isclose(weight.at(3, 1), 7.92)
    for i in range(20):
        weight.hear(peer(i), 4)
    assert weight.at(4, 1) == 20
    falls = [weight.at(t, 1) for t in range(5, 600)]
    assert all(b >= 0.99 * a - 1e-9 for a, b in pairwise(falls))
    assert falls[-1] == 2, "authors not heard for `weight_turns` turns no longer count"


def held(*turns: tuple[int, int]) -> Frontier:
    """Return a frontier with updates (peer, turn)."""
    frontier, numbers = Frontier(), dict[int, int]()
    for i, turn in turns:
        number = numbers[i] = numbers.get(i, 0) + 1
        who = Author(peer(i), i)
        frontier.add(
            Update(who, number, turn, "fake", Hash(digest(b"")), 0, b""), digest(b"%d" % turn)
        )
    return frontier


def test_lockstep_waits_for_all_who_take_part() -> None:
    members = [peer(0), peer(1)]
    pace = Lockstep(held((0, 1)), Limits(lockstep_deadline=9), 2, 1.0)
    assert not pace.ready(2, members, 0.0)
    assert pace.ready(2, members[:1], 0.0), "who has failed is no longer a member"
    assert pace.reproducible
    assert pace.ready(2, members, 9.0), "a missed deadline goes on"
    assert not pace.reproducible


def test_lockstep_trains_on_the_turns_before_exactly() -> None:
    pace = Lockstep(held((0, 1), (1, 1), (1, 2), (0, 2), (1, 3)), Limits(), 2, 1.0)
    assert pace.ready(3, [peer(0), peer(1)], 0.0)
    assert dict(pace.begin(2, {})) == {Author(peer(0), 0): 1, Author(peer(1), 1): 1}
    assert dict(pace.begin(3, {})) == {Author(peer(0), 0): 2, Author(peer(1), 1): 2}


def test_lockstep_begins_with_min_peers_and_does_not_wait_for_a_joiner() -> None:
    pace = Lockstep(held(), Limits(), 3, 1.0)
    assert not pace.ready(1, [peer(0), peer(1)], 0.0)
    assert pace.ready(1, [peer(0), peer(1), peer(2)], 0.0)
    later = Lockstep(held((0, 1), (0, 2), (1, 1), (1, 2)), Limits(), 2, 1.0)
    assert later.ready(3, [peer(0), peer(1), peer(9)], 0.0)


def test_an_unknown_pace_is_answered_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="free, lockstep"):
        make("hurry", Frontier(), Limits(), 1, 1.0)
    assert isinstance(make("free", Frontier(), Limits(), 1, 1.0), Free)


# ---------------------------------------------------------------- agreement

ONE, TWO = Author(peer(1), 1), Author(peer(2), 2)


def ledger(counts: dict[Author, int]) -> Frontier:
    frontier = Frontier()
    for who, count in counts.items():
        for n in range(1, count + 1):
            update = Update(who, n, n, "fake", Hash(digest(b"")), 0, b"")
            frontier.add(update, digest(b"%d %d" % (who.log, n)))
    return frontier


def delta(key: Key) -> tuple[int, int]:
    value = digest(repr(key).encode())
    return int.from_bytes(value[:8], "big"), int.from_bytes(value[8:16], "big")


def total(counts: dict[Author, int]) -> tuple[int, int]:
    parts = [delta(Key(a, n)) for a, c in counts.items() for n in range(1, c + 1)]
    return sum(p[0] for p in parts) % 2**64, sum(p[1] for p in parts) % 2**64


def applied(old: dict[Author, int], new: dict[Author, int]) -> Applied:
    keys = [Key(a, n) for a in new for n in range(old.get(a, 0) + 1, new[a] + 1)]
    return Applied(tuple(sorted(new.items())), total(new), tuple((k, delta(k)) for k in keys))


@given(st.integers(0, 6), st.integers(0, 6), st.integers(0, 4), st.integers(0, 4))
def test_the_fingerprint_at_an_earlier_frontier_is_what_it_was(
    a: int, b: int, c: int, d: int
) -> None:
    start, end = {ONE: min(a, c), TWO: min(b, d)}, {ONE: max(a, c), TWO: max(b, d)}
    agreement = Agreement(ledger(end))
    agreement.start((), (0, 0))
    assert agreement.step(applied({}, start))
    assert agreement.step(applied(start, end))
    assert agreement.at({k: n for k, n in start.items() if n}) == total(start)
    assert agreement.at({ONE: max(a, c) + 1}) is None


def statement(counts: dict[Author, int], value: tuple[int, int], sequence: int = 1) -> Progress:
    at = ledger(counts).hash
    return Progress(peer(9), sequence, tuple(sorted(counts.items())), at, value, Report())


def agrees(agreement: Agreement) -> bool | None:
    known = agreement.verdicts.values()
    return all(known) if known else None


def test_a_statement_is_checked_once_we_have_passed_it() -> None:
    agreement, here, there = Agreement(ledger({ONE: 3, TWO: 2})), {ONE: 1}, {ONE: 2, TWO: 1}
    agreement.start((), (0, 0))
    agreement.step(applied({}, here))
    assert agreement.heard(statement(there, total(there)), compare=True)
    assert agreement.check(Rows()) == []
    assert agrees(agreement) is None, "we are not so far yet"
    agreement.step(applied(here, {ONE: 3, TWO: 2}))
    assert agreement.check(Rows()) == []
    assert agrees(agreement) is True
    assert agreement.heard(statement(there, (1, 2), sequence=2), compare=True)
    assert agreement.check(Rows()) == [peer(9)]
    assert agrees(agreement) is False


def test_a_model_that_did_not_move_by_what_was_added_shows() -> None:
    agreement = Agreement(ledger({ONE: 2}))
    agreement.start((), (0, 0))
    event = applied({}, {ONE: 2})
    flipped = Applied(
        event.frontier, (event.fingerprint[0] ^ 1, event.fingerprint[1]), event.deltas
    )
    assert not agreement.step(flipped)


def test_a_statement_about_other_updates_is_not_compared() -> None:
    agreement = Agreement(ledger({ONE: 2}))
    agreement.start((), (0, 0))
    agreement.step(applied({}, {ONE: 2}))
    other = Progress(peer(9), 1, ((ONE, 2),), digest(b"another fork"), (1, 2), Report())
    agreement.heard(other, compare=True)
    assert agreement.check(Rows()) == []
    assert agrees(agreement) is None


def test_subtracting_what_was_summed_before_the_start_is_no_drift() -> None:
    frontier = ledger({ONE: 4, TWO: 2})
    agreement = Agreement(frontier)
    held = {ONE: 3, TWO: 2}
    agreement.start(tuple(sorted(held.items())), total(held))
    assert agreement.step(applied(held, {ONE: 4, TWO: 2}))
    frontier.close(ONE, 2)
    left = {ONE: 1, TWO: 2}
    assert agreement.step(Applied(tuple(sorted(left.items())), total(left), ()))
    assert agreement.at(left) == total(left)
    assert agreement.at({TWO: 2}) is None, "what the first update added was never told"


def test_subtracting_a_closed_log_keeps_the_sums() -> None:
    frontier = ledger({ONE: 4, TWO: 2})
    agreement = Agreement(frontier)
    agreement.start((), (0, 0))
    agreement.step(applied({}, {ONE: 4, TWO: 2}))
    frontier.close(ONE, 2)
    assert not agreement.clean()
    left = {ONE: 1, TWO: 2}
    assert agreement.step(Applied(tuple(sorted(left.items())), total(left), ()))
    assert agreement.clean()
    assert agreement.at({ONE: 1, TWO: 1}) == total({ONE: 1, TWO: 1})


def test_a_cut_into_what_the_worker_started_with_is_no_drift() -> None:
    """A checkpoint holds sums only; a proof may reach below it."""
    frontier = ledger({ONE: 4, TWO: 2})
    agreement = Agreement(frontier)
    agreement.start(((ONE, 4), (TWO, 1)), total({ONE: 4, TWO: 1}))
    frontier.close(ONE, 2)
    left = {ONE: 1, TWO: 1}
    assert agreement.step(Applied(tuple(sorted(left.items())), total(left), ()))
    assert agreement.step(applied(left, {ONE: 1, TWO: 2}))
    assert agreement.at({ONE: 1, TWO: 1}) == total(left)
    wrong = Applied(((ONE, 1), (TWO, 2)), (7, 7), ())
    assert not agreement.step(wrong), "later drifts show again"


# ---------------------------------------------------------------- agreement under a turn rule


Turns = dict[int, frozenset[Author]]


def by_turn(counts: dict[Author, int]) -> Turns:
    """Whose updates are in, by turn: in `ledger` an update's turn is its number."""
    most = max(counts.values(), default=0)
    return {t: frozenset(a for a, n in counts.items() if n >= t) for t in range(1, most + 1)}


def of_turn(turn: int, members: frozenset[Author]) -> tuple[int, int]:
    """What a turn adds: one number of each set, no sum over its members."""
    return delta(Key(ONE, 10 * turn + sum(a.log for a in members))) if members else (0, 0)


def joint(counts: dict[Author, int]) -> tuple[int, int]:
    """The fingerprint at a frontier."""
    parts = [of_turn(turn, members) for turn, members in by_turn(counts).items()]
    return sum(p[0] for p in parts) % 2**64, sum(p[1] for p in parts) % 2**64


def moved(old: dict[Author, int], new: dict[Author, int]) -> Applied:
    """A turn's whole change stands with the last of its updates, as the worker reports it."""
    before, after = by_turn(old), by_turn(new)
    deltas: list[tuple[Key, tuple[int, int]]] = []
    for turn, members in after.items():
        news = sorted(members - before.get(turn, frozenset()))
        if news:
            was, now = of_turn(turn, before.get(turn, frozenset())), of_turn(turn, members)
            change = (now[0] - was[0]) % 2**64, (now[1] - was[1]) % 2**64
            deltas += [(Key(who, turn), (0, 0)) for who in news[:-1]]
            deltas.append((Key(news[-1], turn), change))
    return Applied(tuple(sorted(new.items())), joint(new), tuple(deltas))


def combined(frontier: Frontier) -> Agreement:
    agreement = Agreement(frontier, combined=True)
    agreement.start((), joint({}))
    return agreement


@given(st.lists(st.sampled_from([ONE, TWO]), max_size=12), st.integers(1, 3), st.booleans())
def test_under_a_turn_rule_a_frontier_is_known_where_we_stood_or_turns_are_whole(
    order: list[Author], step: int, whole: bool
) -> None:
    """And what is said of it is what the model is there; what was taken out leaves the stands."""
    end = {who: order.count(who) for who in (ONE, TWO) if who in order}
    agreement = combined(ledger(end))
    stood = [dict[Author, int]()]
    for i in range(0, len(order), step):
        counts = dict(stood[-1])
        for who in order[i : i + step]:
            counts[who] = counts.get(who, 0) + 1
        assert agreement.step(moved(stood[-1], counts))
        stood.append(counts)
    if not whole:
        agreement._turns = None
    ours = by_turn(end)
    for a in range(end.get(ONE, 0) + 1):
        for b in range(end.get(TWO, 0) + 1):
            counts = {who: n for who, n in ((ONE, a), (TWO, b)) if n}
            theirs = by_turn(counts)
            apart = all(t not in theirs or theirs[t] == members for t, members in ours.items())
            known = counts in stood or (whole and apart)
            assert agreement.at(counts) == (joint(counts) if known else None)


def test_under_a_turn_rule_we_tell_of_turns_that_are_over_and_of_each_once() -> None:
    agreement = combined(ledger({ONE: 5, TWO: 3}))
    here = {ONE: 5, TWO: 3}
    agreement.step(moved({}, here))
    for over, counts in ((2, {ONE: 2, TWO: 2}), (2, here), (3, {ONE: 3, TWO: 3}), (0, here)):
        assert agreement.tell(over) == (tuple(sorted(counts.items())), joint(counts))
    plain = Agreement(ledger({ONE: 5, TWO: 3}))
    plain.start((), (0, 0))
    plain.step(applied({}, here))
    assert plain.tell(2) == (tuple(sorted(here.items())), total(here))
    plain.stop()
    assert plain.tell(2) is None


def test_under_a_turn_rule_an_author_that_goes_back_hides_no_turn() -> None:
    """Its update counts in its own turn, wherever it stands in its log."""
    frontier = Frontier()
    for number, turn in ((1, 1), (2, 7), (3, 1)):
        update = Update(ONE, number, turn, "fake", Hash(digest(b"")), 0, b"")
        frontier.add(update, digest(b"%d" % number))
    assert [frontier.turn(ONE, n) for n in range(5)] == [0, 1, 7, 1, 0]
    agreement = Agreement(frontier, combined=True)
    agreement.start((), (0, 0))
    deltas = tuple((Key(ONE, n), (n, n)) for n in (1, 2, 3))
    assert agreement.step(Applied(((ONE, 3),), (6, 6), deltas))
    assert agreement.at({ONE: 1}) is None, "turn 1 is there in part"
    assert agreement.at({ONE: 2}) is None
    assert agreement.tell(1) == (((ONE, 3),), (6, 6)), "so we tell where we stand"
    frontier.close(ONE, 3)
    assert [frontier.turn(ONE, n) for n in range(5)] == [0, 1, 7, 0, 0]


def test_under_a_turn_rule_a_statement_of_where_we_never_were_is_dropped() -> None:
    agreement, rows = combined(ledger({ONE: 2, TWO: 2})), Rows()
    there = {TWO: 1}
    agreement.heard(statement(there, joint(there)), compare=True)
    agreement.step(moved({}, {ONE: 2}))
    assert agreement.check(rows) == []
    assert agreement._unchecked, "we may yet come there"
    agreement.step(moved({ONE: 2}, {ONE: 2, TWO: 2}))
    assert agreement.check(rows) == []
    assert agrees(agreement) is None
    assert not agreement._unchecked
    assert rows.holds(peer(9), TWO) == 1, "what it holds is known all the same"
    end = {ONE: 2, TWO: 2}
    agreement.heard(statement(end, joint(end), sequence=2), compare=True)
    assert agreement.check(rows) == []
    assert agrees(agreement) is True
    agreement.heard(statement(end, (7, 7), sequence=3), compare=True)
    assert agreement.check(rows) == [peer(9)]


def test_under_a_turn_rule_a_statement_of_other_updates_says_nothing() -> None:
    agreement = combined(ledger({ONE: 1}))
    agreement.step(moved({}, {ONE: 1}))
    agreement.heard(
        Progress(peer(9), 1, ((ONE, 1),), digest(b"another fork"), (1, 2), Report()), compare=True
    )
    assert agreement.check(rows := Rows()) == []
    assert agrees(agreement) is None
    assert not rows.holds(peer(9), ONE)


def test_under_a_turn_rule_a_drift_shows_and_taking_out_is_none() -> None:
    frontier = ledger({ONE: 3})
    agreement = combined(frontier)
    event = moved({}, {ONE: 3})
    assert not agreement.step(Applied(event.frontier, (1, 1), event.deltas))
    agreement.start((), joint({}))
    assert agreement.step(event)
    frontier.close(ONE, 2)
    assert agreement.step(Applied(((ONE, 1),), joint({ONE: 1}), ()))
    assert agreement.at({ONE: 1}) == joint({ONE: 1})


def test_under_a_turn_rule_old_frontiers_are_forgotten() -> None:
    many = MOST_STANDS + 9
    agreement = combined(ledger({ONE: many}))
    for n in range(1, many + 1):
        agreement.step(moved({ONE: n - 1}, {ONE: n}))
    agreement._turns = None
    assert agreement.at({ONE: many - MOST_STANDS}) is None
    assert agreement.at({ONE: many - MOST_STANDS + 1}) == joint({ONE: many - MOST_STANDS + 1})


def test_under_a_turn_rule_what_lies_far_back_is_not_added_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(agreement_module, "MOST_ABOVE", 3)
    agreement = combined(ledger({ONE: 9}))
    agreement.step(moved({}, {ONE: 9}))
    assert agreement.at({ONE: 6}) == joint({ONE: 6})
    assert agreement.at({ONE: 5}) is None


def test_a_statement_that_is_not_newer_changes_nothing() -> None:
    agreement = Agreement(ledger({ONE: 2}))
    said = [statement({ONE: 2}, (n, n), sequence=n) for n in (3, 2, 3, 4)]
    assert [agreement.heard(each, compare=True) for each in said] == [True, False, False, True]
    assert agreement.statements[peer(9)] == said[3]
