"""A run's pool of seeds: sums that are the model, and a history that decides what is drawn."""

import random
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import seeds
from support.walks import PEER, RUN, Point, Rig, Valley

from shoal.compression import codec
from shoal.compression.codec import Origin
from shoal.training import turn_rule
from shoal.training.exchange import Arrived
from shoal.training.exchanges.ledger import LedgerExchange
from shoal.training.feedback import FeedbackSettings
from shoal.training.pool import Pool, chances
from shoal.training.rules import Fragment, Plane, Rules
from shoal.training.walk import WalkSettings

SIZE = 100
POOL = {"directions": "pool", "pool": 12, "perturbations": 6}


def exchange(
    *options: dict[str, Any], rule: str = "sum", bits: int = 24, initial: int = 5
) -> LedgerExchange:
    parts = [codec.make("scalar", one) for one in options or (POOL,)]
    planes = tuple(
        Plane("scalar", (Fragment(0, SIZE, part),), 2 if part is not parts[-1] else 1)
        for part in parts
    )
    rules = Rules(planes, turns=0, clip=Fraction(10**9), initial_squares=1 << 80, run=RUN)
    whole = torch.full((SIZE,), initial, dtype=torch.int32)
    walks = [WalkSettings(lr=1.0) for _ in parts]
    rule_ = turn_rule.make(rule)
    return LedgerExchange(whole, rules, walks, quantum_bits=bits, turn_rule=rule_, peer=PEER)


def updates(
    one: LedgerExchange, count: int, *, seed: int = 0, largest: float = 2.0**27
) -> list[Arrived]:
    """Return updates of several authors with random steps."""
    rng = np.random.default_rng(seed)
    made = []
    for number in range(count):
        author, turn = bytes([number % 3]) * 32, 1 + number // 3
        part: Any = one.rules.codec(turn, author)
        steps = torch.from_numpy(rng.uniform(-largest, largest, rng.integers(1, 7)))
        drawn = part.draw(len(steps), None, key=number)
        payload = part.say(SIZE, drawn, steps, key=number).payload
        made.append(Arrived((author, 1, number), turn, "scalar", payload, len(payload)))
    return made


def by_hand(one: LedgerExchange, given: list[Arrived]) -> tuple[Any, Any, Any]:
    """Return sums modulo 2³², and for each seed the sizes that updates had along it, from bytes."""
    pool = one.pool.size
    sums, history = np.zeros(pool, np.int64), [[0] for _ in range(pool)]
    model = np.full(SIZE, 5, np.int64)
    for update in given:
        part: Any = one.rules.codec(update.turn, update.key[0])
        said = part.unpack(update.payload, SIZE)
        found = np.zeros(pool, np.int64)
        for k, q in zip(said.directions.tolist(), said.mantissas.tolist(), strict=True):
            found[k] += q << part.exponent
            z = seeds.signs(seeds.key(RUN, seeds.COMMON, 0, k), SIZE)
            model += (q << part.exponent) * z
        for k in set(said.directions.tolist()):
            history[k].append(abs(int(found[k])))
        sums += found
    wrapped = (sums + 2**31) % 2**32 - 2**31
    return wrapped, history, (model + 2**31) % 2**32 - 2**31


# ---- chances


def test_likelier_are_seeds_that_moved_more() -> None:
    """The numbers are FedKSeed-Pro's: scores 0, 3, 1, 500."""
    expected = [0.174633, 0.175684, 0.174982, 0.474701]
    found = chances(torch.tensor([0, 3, 1, 500]))
    assert found.tolist() == pytest.approx(expected, abs=1e-6)
    assert chances(torch.tensor([7, 7, 7, 7])).tolist() == [0.25] * 4


@given(st.lists(st.integers(0, 10**12), min_size=1, max_size=50))
def test_no_seed_is_more_than_e_times_as_likely_as_another(scores: list[int]) -> None:
    found = chances(torch.tensor(scores))
    assert float(found.sum()) == pytest.approx(1)
    assert float(found.max() / found.min()) <= np.e + 1e-9
    order = np.argsort(scores, kind="stable")
    assert np.all(np.diff(found.numpy()[order]) >= 0)


def test_a_seeds_score_is_its_mean_step_with_a_first_one_of_zero() -> None:
    pool = Pool(3)
    pool.change(torch.tensor([1, 2]), torch.tensor([-500, 8]), 1)
    pool.change(torch.tensor([2]), torch.tensor([-4]), 1)
    assert pool.weights(3).tolist() == chances(torch.tensor([0.0, 250.0, 4.0])).tolist()
    assert pool.weights(2).tolist() == chances(torch.tensor([0.0, 250.0])).tolist()


# ---- what the ledger holds


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 40), st.integers(0, 30), st.integers(0, 2**32), st.booleans())
def test_the_run_is_its_sums_whatever_came_and_went(
    count: int, gone: int, seed: int, named: bool
) -> None:
    """Steps are so large that sums and model wrap around."""
    options = {**POOL, "exponent": 20, "sampling": "pro" if named else "uniform"}
    one = exchange(options)
    given = updates(one, count, seed=seed)
    rng = random.Random(seed)
    rng.shuffle(given)
    assert all(outcome.refused is None for outcome in one.apply(given))
    rng.shuffle(given)
    one.subtract(given[:gone])
    sums, history, model = by_hand(one, given[gone:])
    assert one.pool.sums.tolist() == sums.tolist()
    assert one.integers().tolist() == model.tolist()
    weights = chances(torch.tensor([np.mean(h) for h in history]))
    assert one.pool.weights(12).tolist() == pytest.approx(weights.tolist())
    told = one.sums()
    assert told is not None
    assert len(told) == 4 * 12
    joiner = exchange(options, initial=9)
    joiner.rebuild(np.full(SIZE, 5, "<i4").tobytes(), told)
    assert joiner.snapshot() == one.snapshot()
    assert joiner.fingerprint() == one.fingerprint() == joiner.recompute()
    assert joiner.sums() == told
    more = updates(one, 45, seed=seed + 1)[40:]
    one.apply(more)
    joiner.apply(more)
    assert joiner.fingerprint() == one.fingerprint()
    joiner.subtract(given[gone:])  # of what the joiner never saw one by one
    assert joiner.pool.weights(12).isfinite().all()


def test_a_reset_forgets_all() -> None:
    one = exchange()
    one.apply(updates(one, 9))
    one.restore(np.full(SIZE, 5, "<i4").tobytes())
    assert one.sums() == bytes(48)
    assert one.pool.weights(12).tolist() == [1 / 12] * 12


def test_refused_updates_leave_the_pool() -> None:
    one = exchange()
    bad = Arrived((PEER, 1, 1), 1, "scalar", b"\x80", 1)
    assert one.apply([bad])[0].refused
    one.subtract([bad])
    assert one.sums() == bytes(48)


def test_pools_of_two_planes_share_their_seeds() -> None:
    one = exchange({**POOL, "pool": 5}, POOL)
    given = updates(one, 30)
    one.apply(given)
    sums, _, model = by_hand(one, given)
    assert one.pool.sums.tolist() == sums.tolist()
    assert one.integers().tolist() == model.tolist()


def test_a_model_that_is_more_than_its_sums_is_not_said_to_be_them() -> None:
    assert exchange(POOL, {"directions": "own"}).sums() is None
    assert exchange({"directions": "own"}).pool.size == 0
    assert exchange(rule="clip_norm").sums() is None
    part = codec.make("dense", {})
    plane = Plane("dense", (Fragment(0, SIZE, part),))
    rules = Rules((plane,), turns=0, clip=Fraction(1), initial_squares=1)
    initial = torch.zeros(SIZE, dtype=torch.int32)
    dense = LedgerExchange(initial, rules, [FeedbackSettings()], quantum_bits=24)
    assert dense.sums() is None
    assert dense.chances(part) is None


def test_under_a_turn_rule_the_history_goes_on() -> None:
    one = exchange(rule="clip_norm")
    given = updates(one, 9)
    one.apply(given)
    _, history, _ = by_hand(one, given)
    weights = chances(torch.tensor([np.mean(h) for h in history]))
    assert one.pool.weights(12).tolist() == pytest.approx(weights.tolist())
    one.subtract(given)
    assert one.pool.weights(12).tolist() == [1 / 12] * 12


def test_a_download_that_does_not_fit_changes_nothing() -> None:
    one = exchange()
    one.apply(updates(one, 6))
    before = one.snapshot(), one.sums(), one.pool.weights(12).tolist()
    whole = np.full(SIZE, 5, "<i4").tobytes()
    for initial, sums in ((whole, bytes(44)), (whole[4:], bytes(48)), (whole, b"")):
        with pytest.raises(ValueError, match="bytes of"):
            one.rebuild(initial, sums)
    assert (one.snapshot(), one.sums(), one.pool.weights(12).tolist()) == before
    with pytest.raises(ValueError, match="pool/sums is missing, or of another pool"):
        one.pool.load(Pool(11).tensors())


# ---- what is drawn


def test_weights_are_for_codecs_that_name_what_they_draw() -> None:
    for sampling, wanted in (("uniform", False), ("pro", True)):
        one = exchange({**POOL, "sampling": sampling})
        part = codec.at(one.rules.fragment(1).codec, Origin(RUN, PEER, 1))
        assert (one.chances(part) is not None) == wanted


def test_what_a_peer_draws_follows_from_what_all_found() -> None:
    """Seed 3 moved the loss by far the most, so it is drawn e times as often as another."""
    model = Point([1.0] * 8)
    options = {"directions": "pool", "pool": 6, "sampling": "pro", "perturbations": 600}
    one = Rig(Valley(), model, settings=WalkSettings(lr=1e-6, walk=False), **options)
    one.exchange.pool.change(torch.tensor([3]), torch.tensor([1000]), 1)
    drawn = one.learn().brought.directions
    counts = np.bincount(drawn.numpy(), minlength=6)
    expected = 600 * chances(torch.tensor([0, 0, 0, 500, 0, 0])).numpy()
    np.testing.assert_allclose(counts, expected, rtol=0.3)


def test_unbiased_slopes_are_divided_by_how_likely_their_seed_was() -> None:
    options = {"directions": "pool", "pool": 6, "sampling": "pro", "perturbations": 50}
    found = []
    for unbiased in (False, True):
        still = WalkSettings(lr=1e-2, walk=False, unbiased=unbiased, reach=1e9)
        one = Rig(Valley(), Point([1.0, 2.0, 3.0]), settings=still, **options)
        one.exchange.pool.change(torch.tensor([1, 4]), torch.tensor([-70, 100]), 1)
        found.append(one.learn().brought)
    plain, reweighed = found
    assert torch.equal(plain.directions, reweighed.directions)
    factor = 1 / (6 * chances(torch.tensor([0, 35, 0, 0, 50, 0])))[plain.directions]
    assert torch.allclose(plain.sizes * factor, reweighed.sizes, rtol=1e-9)
    assert len(set(factor.tolist())) == 3
