"""Turn rules: what a turn adds is a function of the set of its updates, in exact integers."""

import math
import random
import statistics
import weakref
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.compression import perturbation, splitmix
from shoal.compression.codec import Combination, Contribution, Decoded
from shoal.compression.settings import SettingError
from shoal.training import contribution, payloads, turn_rule
from shoal.training.exchange import Arrived
from shoal.training.ledger import HALF, Key, Ledger
from shoal.training.payloads import Payloads
from shoal.training.run import RunError, RunSpec

SIZE, DIRECTIONS = 70, 3
MOST = 2**31 - 1
ALONG: list[dict[str, Any]] = [
    {"name": "median"},
    {"name": "trimmed_mean"},
    {"name": "trimmed_mean", "cut": 0.4},
    {"name": "trimmed_mean", "cut": 0.0},
    {"name": "clip"},
    {"name": "clip", "factor": 2.345},
    {"name": "median", "quorum": 4},
    {"name": "trimmed_mean", "cut": 0.3, "quorum": 5},
    {"name": "clip", "quorum": 3},
]
NORMS: list[dict[str, Any]] = [{"name": "clip_norm"}, {"name": "clip_norm", "quorum": 3}]
EVERY = [{"name": "sum"}, *NORMS, *ALONG]


def label(rule: dict[str, Any]) -> str:
    return "-".join(map(str, rule.values()))


# ---------------------------------------------------------------- each rule, in Python's integers

Column = list[int]


def median(votes: Column, count: int) -> int:
    return math.floor(count * Fraction(statistics.median([Fraction(v) for v in votes])))


def trimmed(cut: float) -> Callable[[Column, int], int]:
    def rule(votes: Column, count: int) -> int:
        off = math.floor(Fraction(str(cut)) * len(votes))
        left = sorted(votes)[off : len(votes) - off]
        return math.floor(Fraction(count * sum(left), len(left)))

    return rule


def clip(factor: float) -> Callable[[Column, int], int]:
    def rule(votes: Column, count: int) -> int:
        most = math.floor(Fraction(str(factor)) * statistics.median_low(map(abs, votes)))
        return sum(max(-most, min(most, v)) for v in votes)

    return rule


def oracle(rule: dict[str, Any]) -> Callable[[Column], int]:
    found = {
        "median": median,
        "trimmed_mean": trimmed(rule.get("cut", 0.25)),
        "clip": clip(rule.get("factor", 1.0)),
    }[rule["name"]]

    def with_quorum(said: Column) -> int:
        silent = [0] * (rule.get("quorum", 0) - len(said))
        return found([*said, *silent], len(said))

    return with_quorum


def towards_zero(value: int, fraction: int) -> int:
    return (abs(value) * fraction >> 30) * (-1 if value < 0 else 1)


def clipped(
    rows: Sequence[Sequence[int]], squares: Sequence[int], quorum: int = 0
) -> list[list[int]]:
    """Rows scaled to the median norm; the fraction is found by trying, not by a square root."""
    middle = statistics.median_low([*squares, *[0] * (quorum - len(squares))])
    out = []
    for row, s in zip(rows, squares, strict=True):
        fraction = 1 << 30
        if s > middle:
            fraction = next(
                f
                for f in range(int(2**30 * math.sqrt(middle / s)) + 2, -1, -1)
                if f * f * s <= middle << 60
            )
        out.append([towards_zero(v, fraction) for v in row])
    return out


def keys_of(turn: int) -> torch.Tensor:
    return splitmix.words(turn, DIRECTIONS)


def scalars(turn: int, said: Sequence[int]) -> Combination:
    """What a peer says along the first directions of a turn."""
    return Combination(SIZE, keys_of(turn)[: len(said)], torch.tensor(said, dtype=torch.int64))


def written(combination: Combination) -> np.ndarray[Any, np.dtype[Any]]:
    total = np.zeros(SIZE, object)
    for key, a in zip(combination.keys.tolist(), combination.coefficients.tolist(), strict=True):
        signs = perturbation.signs(key & (2**64 - 1), SIZE).tolist()
        total += np.array([a * z for z in signs], object)
    return total


def wrapped(values: np.ndarray[Any, np.dtype[Any]]) -> list[int]:
    return [(int(v) + 2**31) % 2**32 - 2**31 for v in values]


coefficients = st.one_of(
    st.integers(-127, 127), st.integers(-MOST, MOST), st.sampled_from([0, MOST, -MOST])
)
columns = st.lists(st.lists(coefficients, min_size=1, max_size=DIRECTIONS), min_size=1, max_size=9)


@pytest.mark.parametrize("rule", ALONG, ids=label)
@settings(max_examples=60, deadline=None)
@given(said=columns, rng=st.randoms())
def test_a_rule_along_directions_is_its_definition(
    rule: dict[str, Any], said: list[list[int]], rng: random.Random
) -> None:
    """Who says nothing along a direction says zero there."""
    made, expected = turn_rule.make(rule), oracle(rule)
    rng.shuffle(said)
    found = made.total([scalars(1, row) for row in said])
    assert isinstance(found, Combination)
    widest = max(map(len, said))
    totals = {
        int(keys_of(1)[k]): expected([row[k] if k < len(row) else 0 for row in said])
        for k in range(widest)
    }
    keys = found.keys.tolist()
    assert sorted(keys) == sorted(totals)
    assert found.coefficients.tolist() == wrapped(np.array([totals[k] for k in keys], object))


@settings(max_examples=60, deadline=None)
@given(
    said=st.lists(st.lists(coefficients, min_size=2, max_size=2), min_size=1, max_size=7),
    quorum=st.integers(0, 5),
)
def test_no_update_is_longer_than_the_median_norm(said: list[list[int]], quorum: int) -> None:
    made = turn_rule.make({"name": "clip_norm", "quorum": quorum})
    squares = [SIZE * sum(v * v for v in row) for row in said]
    rows = clipped(said, squares, quorum)
    found = made.total([scalars(1, row) for row in said])
    assert isinstance(found, Combination)
    sums = dict(zip(keys_of(1)[:2].tolist(), np.array(rows, object).sum(0), strict=True))
    expected = wrapped(np.array([sums[k] for k in found.keys.tolist()], object))
    assert found.coefficients.tolist() == expected
    middle = statistics.median_low([*squares, *[0] * (quorum - len(squares))])
    assert all(SIZE * sum(v * v for v in row) <= middle for row in rows)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(st.lists(coefficients, min_size=5, max_size=5), min_size=1, max_size=6),
    sparse=st.lists(st.booleans(), min_size=6, max_size=6),
)
def test_vectors_of_every_form_are_scaled_alike(rows: list[list[int]], sparse: list[bool]) -> None:
    updates: list[Decoded] = []
    for row, thin in zip(rows, sparse, strict=False):
        values = torch.tensor(row, dtype=torch.int32)
        places = values.nonzero()[:, 0] if thin else None
        updates.append(Decoded(5, values if places is None else values[places], places, 3))
    found = turn_rule.make("clip_norm").total(updates)
    assert isinstance(found, Decoded)
    assert found.offset == 3
    expected = np.array(clipped(rows, [sum(v * v for v in row) for row in rows]), object).sum(0)
    assert found.dense().tolist() == wrapped(expected)


@pytest.mark.parametrize("rule", ["median", "trimmed_mean", "clip"])
def test_who_comes_first_or_runs_ahead_decides_nothing_alone(rule: str) -> None:
    """Until a quorum is there the missing say zero, and a turn stands for the votes there are."""
    made = turn_rule.make(turn_rule.filled(rule, peers=8))

    def total(*said: int) -> int:
        found = made.total([scalars(1, [v]) for v in said])
        assert isinstance(found, Combination)
        return int(found.coefficients[0])

    assert total(127) == 0
    if rule != "trimmed_mean":
        assert total(127, -127) == 0
        assert total(127, 127) == 0
    assert abs(total(127, 127)) <= 127
    assert 0 < total(10, 10, 10) <= 30
    assert total(10, 10, 10, 10, 10) == 50


@pytest.mark.parametrize("rule", ALONG, ids=label)
def test_liars_below_half_leave_it_between_honest_numbers(rule: dict[str, Any]) -> None:
    """By turn rule and share; clipping alone cannot promise it."""
    rng = random.Random(7)
    for _ in range(50):
        honest = [rng.randint(20, 60) for _ in range(6)]
        liars = {"median": 5, "trimmed_mean": math.floor(8 * rule.get("cut", 0.25))}
        count = liars.get(rule["name"], 0)
        count = min(count, 2) if rule["name"] == "trimmed_mean" else count
        said = [[v] for v in honest] + [[rng.choice([-127, 127])] for _ in range(count)]
        found = turn_rule.make(rule).total([scalars(1, row) for row in said])
        assert isinstance(found, Combination)
        mean = int(found.coefficients[0]) / len(said)
        if rule["name"] != "clip":
            assert min(honest) - 1 <= mean <= max(honest)
        else:
            assert abs(mean) <= statistics.median(honest) * rule.get("factor", 1.0)


# ---------------------------------------------------------------- the ledger under a rule

Held = dict[Key, tuple[int, Contribution]]


def initial(size: int = SIZE) -> torch.Tensor:
    g = torch.Generator().manual_seed(1)
    return torch.randint(-(2**31), 2**31, (size,), generator=g, dtype=torch.int64).to(torch.int32)


def expected_model(rule: dict[str, Any], held: Held) -> list[int]:
    """Add up what the votes of every turn mean, in Python's integers."""
    total = np.array(initial().tolist(), object)
    for turn in {turn for turn, _ in held.values()}:
        mine = sorted(key for key, (t, _) in held.items() if t == turn)
        votes = {key[0]: held[key][1] for key in reversed(mine)}
        said = [v.coefficients.tolist() for v in votes.values() if isinstance(v, Combination)]
        if rule["name"] == "clip_norm":
            squares = [SIZE * sum(v * v for v in row) for row in said]
            rows = clipped(said, squares, rule.get("quorum", 0))
            for row in rows:
                total += written(scalars(turn, row))
            continue
        widest = max(map(len, said))
        column = [[row[k] if k < len(row) else 0 for row in said] for k in range(widest)]
        for k, values in enumerate(column):
            one = Combination(SIZE, keys_of(turn)[k : k + 1], torch.tensor([0]))
            whole = oracle(rule)(values)
            signs = perturbation.signs(int(one.keys[0]) & (2**64 - 1), SIZE).tolist()
            total += np.array([whole * z for z in signs], object)
    return wrapped(total)


moves = st.lists(
    st.tuples(
        st.integers(0, 4),  # peer
        st.integers(0, 1),  # log
        st.integers(1, 3),  # number
        st.integers(1, 3),  # turn
        st.lists(coefficients, min_size=1, max_size=DIRECTIONS),
        st.booleans(),  # it leaves again
    ),
    min_size=1,
    max_size=14,
    unique_by=lambda move: move[:3],
)


@pytest.mark.parametrize("rule", [r for r in EVERY if r["name"] != "sum"], ids=label)
@settings(max_examples=40, deadline=None)
@given(moves=moves, rng=st.randoms(), together=st.booleans())
def test_any_order_of_coming_and_going_gives_the_model_of_the_set(
    rule: dict[str, Any], moves: list[Any], rng: random.Random, together: bool
) -> None:
    ledger = Ledger(initial(), turn_rule.make(rule))
    start = ledger.fingerprint()
    held: Held = {}
    steps = []
    for peer, log, number, turn, said, leaves in moves:
        key = (bytes([peer]) * 32, log, number)
        update = scalars(turn, said)
        at = rng.random()
        steps.append((at, 1, key, turn, update))
        if leaves:
            steps.append((at + rng.random(), -1, key, turn, update))
        else:
            held[key] = (turn, update)
    moved = start
    for _, sign, key, turn, update in sorted(steps, key=lambda step: step[0]):
        before = ledger.fingerprint()
        change = ledger.add if sign > 0 else ledger.subtract
        delta = change(key, turn, update)
        moved = tuple((m + d) % 2**64 for m, d in zip(moved, delta, strict=True))
        assert moved == ledger.fingerprint()
        if sign > 0:
            assert ledger.add(key, turn, update) == (0, 0), "what is in comes in but once"
        else:
            assert ledger.subtract(key, turn, update) == (0, 0)
            assert before != ledger.fingerprint() or delta == (0, 0)
    assert ledger.model.tolist() == expected_model(rule, held)
    assert ledger.fingerprint() == ledger.recompute()
    values = ledger.model.tolist()
    assert ledger.out_of_range == sum(v >= HALF or v < -HALF for v in values)

    # The same set, turn by turn at once.
    other = Ledger(initial(), turn_rule.make(rule))
    for turn in range(1, 4):
        group = {key: update for key, (t, update) in held.items() if t == turn}
        halves = [dict(list(group.items())[::2]), dict(list(group.items())[1::2])]
        for part in [group] if together else halves:
            other.take_in(turn, part)
    assert torch.equal(other.model, ledger.model)
    assert other.fingerprint() == ledger.fingerprint()
    for turn in range(1, 4):
        other.take_out(turn, held)
    assert torch.equal(other.model, initial())
    assert other.fingerprint() == start


@pytest.mark.parametrize("rule", EVERY, ids=label)
def test_one_peer_has_one_vote_a_turn_that_of_the_smallest_log_and_number(
    rule: dict[str, Any],
) -> None:
    if rule["name"] == "sum":
        return
    honest = {(bytes([p]) * 32, 1, 1): scalars(1, [10 + p, -p]) for p in range(3)}
    liar = bytes([9]) * 32
    one = Ledger(initial(), turn_rule.make(rule))
    one.take_in(1, {**honest, (liar, 5, 2): scalars(1, [7, 7])})
    many = Ledger(initial(), turn_rule.make(rule))
    many.take_in(1, {(liar, 5, n): scalars(1, [127, 127]) for n in range(3, 30)})
    many.take_in(1, {(liar, log, 1): scalars(1, [-127, 127]) for log in range(6, 30)})
    many.take_in(1, honest)
    many.take_in(1, {(liar, 5, 2): scalars(1, [7, 7])})
    assert torch.equal(one.model, many.model)
    # What is in stays as it came.
    assert many.take_in(1, {(liar, 5, 2): scalars(1, [-9, 9])}) == (0, 0)
    assert torch.equal(one.model, many.model)
    # In another turn it has another vote, if that turn has a quorum.
    moved = many.add((liar, 5, 1), 2, scalars(2, [3])) != (0, 0)
    assert moved == ("quorum" not in rule)
    # When the log that voted is closed, the next one votes.
    many.take_out(1, [(liar, 5, n) for n in range(2, 30)])
    next_one = Ledger(initial(), turn_rule.make(rule))
    next_one.take_in(1, {**honest, (liar, 6, 1): scalars(1, [-127, 127])})
    many.take_out(2, [(liar, 5, 1)])
    assert torch.equal(next_one.model, many.model)


@pytest.mark.parametrize("rule", [r for r in EVERY if r["name"] != "sum"], ids=label)
def test_nothing_is_remembered_of_what_left(rule: dict[str, Any]) -> None:
    honest = {(bytes([p]) * 32, 1, 1): scalars(1, [10 + p, -p]) for p in range(3)}
    key = (bytes([9]) * 32, 1, 1)
    one, other = (Ledger(initial(), turn_rule.make(rule)) for _ in range(2))
    one.take_in(1, {**honest, key: scalars(1, [100, 1])})
    one.take_out(1, [key])
    one.take_in(1, {key: scalars(1, [1, 1])})
    other.take_in(1, {**honest, key: scalars(1, [1, 1])})
    assert torch.equal(one.model, other.model)
    assert one.fingerprint() == other.fingerprint()
    one.restore(Ledger(initial(), turn_rule.make(rule)).to_bytes())
    one.take_in(1, {**honest, key: scalars(1, [1, 1])})
    assert torch.equal(one.model, other.model)


@settings(max_examples=25, deadline=None)
@given(order=st.permutations(range(12)), gone=st.sets(st.integers(0, 11)), recalling=st.booleans())
def test_large_updates_are_recalled_and_give_the_same_model(
    order: list[int], gone: set[int], recalling: bool
) -> None:
    """Vectors of three turns, dense and thin, more turns than totals are remembered."""
    size = 3000
    made: dict[Key, Contribution] = {}
    for i in range(12):
        g = torch.Generator().manual_seed(i)
        spread = 2**20 if i % 4 else 2**30
        values = torch.randint(-spread, spread, (size,), generator=g, dtype=torch.int32)
        places = torch.randperm(size, generator=g)[:1200].sort().values if i % 2 else None
        key = (bytes([i]) * 32, 0, 1)
        made[key] = Decoded(size, values if places is None else values[places], places)
    keys = list(made)
    recalls: list[Key] = []

    def recall(key: Key) -> Contribution:
        recalls.append(key)
        return made[key]

    rule = turn_rule.make("clip_norm")
    ledger = Ledger(initial(size), rule, recall if recalling else None)
    for i in order:
        ledger.add(keys[i], i % 3, made[keys[i]])
        assert ledger.recalls(i % 3, keys[i]) == recalling
    for i in sorted(gone):
        ledger.subtract(keys[i], i % 3, made[keys[i]])
    assert bool(recalls) == recalling
    total = initial(size).tolist()
    wide = np.array(total, object)
    for turn in range(3):
        left = [made[keys[i]] for i in range(turn, 12, 3) if i not in gone]
        if left:
            rows = [u.dense().tolist() for u in left]
            squares = [sum(v * v for v in row) for row in rows]
            wide += np.array(clipped(rows, squares), object).sum(0)
    assert ledger.model.tolist() == wrapped(wide)
    assert ledger.fingerprint() == ledger.recompute()


@settings(max_examples=25, deadline=None)
@given(
    order=st.permutations(range(9)),
    quorum=st.integers(0, 6),
    sparse=st.booleans(),
    equal=st.booleans(),
)
def test_one_more_update_lets_those_above_the_median_be_decoded_and_one_at_a_time(
    order: list[int], quorum: int, sparse: bool, equal: bool
) -> None:
    size = 3000

    def made(i: int) -> Decoded:
        g = torch.Generator().manual_seed(i)
        values = torch.randint(-(2**20), 2**20, (size,), generator=g, dtype=torch.int32)
        if equal:  # of one length
            values = torch.where(values > 0, 7, -7).to(torch.int32)
        places = torch.arange(i, size, 3) if sparse else None
        return Decoded(size, values if places is None else values[places], places)

    keys = [(bytes([i]) * 32, 0, 1) for i in range(9)]
    squares = [sum(v * v for v in made(i).values.tolist()) for i in range(9)]
    recalled: list[int] = []
    alive: list[weakref.ref[torch.Tensor]] = []

    def recall(key: Key) -> Contribution:
        recalled.append(keys.index(key))
        assert sum(one() is not None for one in alive) <= 1
        update = made(recalled[-1])
        alive.append(weakref.ref(update.values))
        return update

    ledger = Ledger(initial(size), turn_rule.make({"name": "clip_norm", "quorum": quorum}), recall)
    votes: list[int] = []
    medians = [0]
    for move in [*order, *order[:4]]:
        recalled.clear()
        before = set(votes)
        if move in votes:
            votes.remove(move)
            ledger.subtract(keys[move], 1, made(move))
        else:
            votes.append(move)
            ledger.add(keys[move], 1, made(move))
        silent = [0] * (quorum - len(votes))
        medians.append(statistics.median_low([*(squares[i] for i in votes), *silent]))
        low, high = sorted(medians[-2:])
        stays = before & set(votes)
        assert {i for i in recalled if i in stays} <= {i for i in stays if squares[i] > low}
        if low == high:
            assert not stays & set(recalled)
        assert len(recalled) == len(set(recalled))
    rows = [made(i).dense().tolist() for i in votes]
    total = np.array(clipped(rows, [squares[i] for i in votes], quorum), object).sum(0)
    assert ledger.model.tolist() == wrapped(np.array(initial(size).tolist(), object) + total)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")
@pytest.mark.parametrize("name", ["clip_norm", "median"])
def test_cuda_agrees_with_the_cpu(name: str) -> None:
    here = Ledger(initial(), turn_rule.make(name))
    there = Ledger(initial().cuda(), turn_rule.make(name))
    for i in range(9):
        key = (bytes([i]) * 32, 0, 1)
        one: Contribution = scalars(i % 2, [i * 10**8, -i, 77 - i])
        other = one
        if name == "clip_norm":
            values = torch.arange(-35, 35, dtype=torch.int32) * 10**7 * (i + 1)
            places = torch.arange(0, SIZE, 2) if i % 3 else None
            values = values if places is None else values[places]
            one = Decoded(SIZE, values, places)
            moved = None if places is None else places.cuda()
            other = Decoded(SIZE, values.cuda(), moved)
        assert here.add(key, i % 2, one) == there.add(key, i % 2, other)
    assert here.to_bytes() == there.to_bytes()
    assert here.fingerprint() == there.fingerprint() == there.recompute()


# ---------------------------------------------------------------- arithmetic


def test_equal_contributions_have_no_difference_and_none_is_zero() -> None:
    one = scalars(1, [1, 2, 3])
    assert contribution.difference(one, scalars(1, [1, 2, 3])) is None
    assert contribution.difference(one, None) is one
    assert contribution.difference(None, None) is None
    assert contribution.difference(one, one) is None
    back = contribution.difference(None, one)
    assert isinstance(back, Combination)
    assert back.coefficients.tolist() == [-1, -2, -3]
    moved = contribution.difference(scalars(1, [1, 5, 3]), one)
    assert isinstance(moved, Combination)
    assert (moved.keys.tolist(), moved.coefficients.tolist()) == ([int(keys_of(1)[1])], [3])
    assert contribution.added([]) is None


def test_a_vector_and_a_combination_add_up() -> None:
    vector = Decoded(SIZE, torch.arange(SIZE, dtype=torch.int32))
    found = contribution.added([vector, scalars(1, [5, -7])])
    assert isinstance(found, Decoded)
    expected = np.arange(SIZE).astype(object) + written(scalars(1, [5, -7]))
    assert found.dense().tolist() == wrapped(expected)


# ---------------------------------------------------------------- names and options


def test_every_rule_is_found_filled_and_says_what_it_needs() -> None:
    names = turn_rule.names()
    assert {"sum", "median", "trimmed_mean", "clip", "clip_norm"} <= set(names)
    for name in names:
        filled = turn_rule.filled(name)
        assert turn_rule.filled(filled) == filled
        rule = turn_rule.make(filled)
        assert rule.alone == (name == "sum")
        assert rule.total([]) is None
        assert not (rule.alone and rule.along)
        assert turn_rule.filled(name, peers=8).get("quorum", 0) == (5 if rule.along else 0)
    given = {"name": "trimmed_mean", "cut": 0.25, "quorum": 0}
    assert turn_rule.filled({"name": "trimmed_mean"}) == given
    assert turn_rule.filled({"name": "median", "quorum": 2}, peers=8)["quorum"] == 2


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("medium", "did you mean 'median'"),
        ({"name": "clip", "facter": 1.0}, "did you mean 'factor'"),
        ({"name": "clip", "factor": 0}, "factor = 0"),
        ({"name": "clip", "factor": 1e7}, "at most a million"),
        ({"name": "trimmed_mean", "cut": 0.5}, "less than 0.5"),
        ({"name": "trimmed_mean", "cut": -0.1}, "less than 0.5"),
        ({"name": "median", "quorum": -1}, "quorum = -1"),
        ({"name": "median", "quorum": 5000}, "quorum = 5000"),
        ({"name": "clip_norm", "quorum": 5000}, "quorum = 5000"),
        ({"name": "trimmed_mean", "cut": "much"}, "must be float"),
        ({"cut": 0.1}, "names no rule"),
        ({"name": 3}, "names no rule"),
        (3, "names no rule"),
        (None, "names no rule"),
    ],
)
def test_a_wrong_rule_is_one_line_with_the_remedy(given: Any, said: str) -> None:
    with pytest.raises(SettingError, match=r"exchange\.rule") as raised:
        turn_rule.make(given)
    assert said in str(raised.value)
    assert "\n" not in str(raised.value)


def run_file(rule: Any, *updates: dict[str, Any], **more: Any) -> dict[str, Any]:
    given = list(updates) if len(updates) > 1 else updates[0]
    return {
        "run": {"name": "digits"},
        "task": {"name": "digits"},
        "exchange": {"rule": rule, "update": given, **more},
        "swarm": {"min_peers": 6},
    }


COMMON = {"kind": "scalar", "directions": "common", "lr": 0.01}


def test_a_run_file_carries_its_rule_filled_in() -> None:
    spec = RunSpec.parse(run_file("trimmed_mean", COMMON))
    assert spec.filled()["exchange"]["rule"] == {
        "name": "trimmed_mean",
        "cut": 0.25,
        "quorum": 4,
    }
    assert spec.exchange.combines()
    assert RunSpec.parse(spec.filled()).filled() == spec.filled()
    fewer = RunSpec.parse(run_file("median", COMMON, participation=0.5))
    assert fewer.filled()["exchange"]["rule"] == {"name": "median", "quorum": 2}
    plain = RunSpec.parse(run_file("sum", {"kind": "sparse"}))
    assert plain.filled()["exchange"]["rule"] == {"name": "sum"}
    assert not plain.exchange.combines()
    assert not RunSpec.parse(plain.filled()).exchange.combines()


@pytest.mark.parametrize("rule", ["median", "trimmed_mean", {"name": "clip", "factor": 2.0}])
@pytest.mark.parametrize(
    "updates",
    [
        [{"kind": "sparse"}],
        [{"kind": "dense"}],
        [{"kind": "scalar", "directions": "own", "lr": 0.01}],
        [{"kind": "scalar", "directions": "pool", "lr": 0.01}],
        [{"kind": "sparse", "every": 10}, COMMON],
        [{**COMMON, "every": 2}, {"kind": "dense"}],
    ],
    ids=["sparse", "dense", "own", "pool", "planes", "a later plane"],
)
def test_rules_along_directions_need_directions_in_common(
    rule: Any, updates: list[dict[str, Any]]
) -> None:
    with pytest.raises(RunError, match=r"compares what peers say .*directions = 'common'"):
        RunSpec.parse(run_file(rule, *updates))
    RunSpec.parse(run_file("clip_norm", *updates))


# ---------------------------------------------------------------- what is recalled


def test_payloads_come_back_from_memory_and_from_the_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(payloads, "IN_MEMORY", 100)
    kept = Payloads(tmp_path)
    rng = random.Random(3)
    updates = []
    for n in range(30):
        data = rng.randbytes(rng.randrange(1, 40))
        updates.append(Arrived((bytes(32), 1, n), n, "dense", data, len(data)))
        kept.keep(updates[-1])
    for update in rng.sample(updates, 30):
        assert kept.recall(update.key) == update
    in_memory = [update.size for start, update in kept._places.values() if start < 0]
    assert 0 < sum(in_memory) <= 100
    assert list(tmp_path.iterdir()) == [], "the file has no name"
    kept.clear()
    kept.keep(updates[5])
    assert kept.recall(updates[5].key) == updates[5]
    with pytest.raises(KeyError):
        kept.recall(updates[6].key)


def test_vectors_are_not_compared_along_directions() -> None:
    vector = Decoded(SIZE, torch.ones(SIZE, dtype=torch.int32))
    with pytest.raises(TypeError, match="not along directions"):
        turn_rule.make("median").total([scalars(1, [1]), vector])


def test_a_disk_that_takes_nothing_leaves_them_in_memory(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(payloads, "IN_MEMORY", 0)
    kept = Payloads(tmp_path / "missing")
    update = Arrived((bytes(32), 1, 1), 1, "dense", b"abc", 3)
    kept.keep(update)
    assert kept.recall(update.key) == update
