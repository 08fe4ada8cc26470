"""Steps along seeded directions: payloads by hand, chance that is fair, and what is refused."""

import hashlib
import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import seeds

from shoal.compression import codec, parallel, perturbation, seeded
from shoal.compression.codec import Combination, Directed, Origin, PayloadError
from shoal.compression.codecs import scalar
from shoal.compression.codecs.scalar import Scalar
from shoal.compression.settings import SettingError

RUN, AUTHOR = bytes(range(16)), bytes(range(32))
ORIGIN = Origin(RUN + b"the rest of a run id", AUTHOR, 100)
POOL = {"directions": "pool", "pool": 10}
KINDS: dict[str, dict[str, Any]] = {
    "own": {},
    "common": {"directions": "common"},
    "pool": POOL,
    "pro": {**POOL, "sampling": "pro"},
}
every = pytest.mark.parametrize("kind", KINDS)


def make(options: dict[str, Any], origin: Origin = ORIGIN) -> Scalar:
    part = codec.at(codec.make("scalar", options), origin)
    assert isinstance(part, Scalar)
    assert isinstance(part, Directed)
    return part


def steps(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


# ---------------------------------------------------------------- known answers


def test_the_known_key_is_of_sample_3() -> None:
    part = make({})
    assert part.key(3) == 0x2F295DC10E89139B
    _, decoded = part.say(100_000, torch.arange(4), steps(0, 0, 0, 1), key=1)
    assert isinstance(decoded, Combination)
    z = decoded.dense().to(torch.int8)
    assert hashlib.sha256(z.numpy().tobytes()).hexdigest().startswith("3af77be4e46b4d1c")
    assert int(z.sum()) == 70


def test_keys_follow_from_run_author_and_turn() -> None:
    """Written down from hashlib; peers of other versions must find the same."""
    own, common, pool = (make(KINDS[kind]) for kind in ("own", "common", "pool"))
    found = [own.key(s) for s in range(3)]
    assert found == [0x8C71FABF1FFF685C, 0xCD95B484852F38E3, 0x815E9E1412F55FED]
    found = [common.key(s) for s in range(3)]
    assert found == [0xD803773DC3232602, 0x6B15A7B76ECD816A, 0xF53F3C27DC4F35A9]
    whole = make({"directions": "pool"})
    found = [whole.key(k) for k in (0, 1, 4095)]
    assert found == [0x9C2E6107C8DCFABF, 0x5A2FF7B78AE69CBE, 0x65FBB7096ABE4537]
    assert pool.key(1) == whole.key(1)
    assert whole.draw(5).tolist() == [2090, 3904, 3499, 1661, 3882]
    assert pool.draw(5).tolist() == [5, 9, 8, 4, 9]


@pytest.mark.parametrize(
    ("options", "payload", "dense"),
    [
        ({}, "25fb7f", [-169, 85, -85, 95, 95, 169, -85, 169]),
        ({"directions": "common"}, "25fb7f", [159, -169, -159, -159, 95, 169, 169, -95]),
        ({**POOL, "exponent": 2}, "25fb7f0102", [664, -376, -368, 640, -664, 664, 376, 648]),
        # 5 9 8 4 9 in 4 bits each, low first: 95 48 09; then 37 -5 127 1 2.
        (
            {**POOL, "exponent": 2, "sampling": "pro"},
            "95480925fb7f0102",
            [664, -376, -368, 640, -664, 664, 376, 648],
        ),
    ],
)
def test_payloads_by_hand(options: dict[str, Any], payload: str, dense: list[int]) -> None:
    part = make(options)
    decoded = part.decode(bytes.fromhex(payload), 8)
    assert decoded.dense().tolist() == dense
    count = 5 if part.directions == "pool" else 3
    directions = torch.tensor([5, 9, 8, 4, 9]) if count == 5 else torch.arange(3)
    wanted = torch.tensor([37, -5, 127, 1, 2][:count]).double() * 2**part.exponent
    said = part.say(8, directions, wanted, key=77)
    assert said.payload.hex() == payload
    assert torch.equal(said.decoded.dense(), decoded.dense())


def test_a_seed_drawn_twice_counts_twice() -> None:
    part = make(POOL)
    decoded = part.decode(bytes([37, 251, 127, 1, 2]), 8)
    assert decoded.directions is not None
    assert decoded.directions.tolist() == [4, 5, 8, 9]
    assert decoded.coefficients.tolist() == [1, 37, 127, -5 + 2]
    assert [k % 2**64 for k in decoded.keys.tolist()] == [part.key(k) for k in (4, 5, 8, 9)]


def test_zeros_are_said_too() -> None:
    """A peer that found no slope votes for none; one that measured nothing does not vote."""
    for kind in KINDS:
        part = make(KINDS[kind])
        directions = part.draw(3)
        _, decoded = part.say(50, directions, steps(0, math.nan, 5), key=1)
        assert isinstance(decoded, Combination)
        assert len(decoded.keys) == len(set(directions.tolist()))
        assert 0 in decoded.coefficients.tolist()


# ---------------------------------------------------------------- the whole format, once more


def expected(part: Scalar, payload: bytes, size: int) -> Any:
    """Return the vector that a payload stands for, from the specification alone, or None."""
    width = math.ceil(math.log2(part.pool)) if part.sampling == "pro" else 0
    lengths = {n: n + math.ceil(n * width / 8) for n in range(1, part.perturbations + 1)}
    counts = [n for n, length in lengths.items() if length == len(payload)]
    if not counts:
        return None
    (count,) = counts
    mantissas = [q - 256 if q > 127 else q for q in payload[-count:]]
    stream = int.from_bytes(payload[:-count], "little")
    if -128 in mantissas or stream >> (count * width):
        return None
    run, author, turn = part.origin.run, part.origin.author, part.origin.turn
    if part.sampling == "pro":
        named = [stream >> (s * width) & ((1 << width) - 1) for s in range(count)]
        if max(named) >= part.pool:
            return None
    else:
        drawing = seeds.words(seeds.key(run, author, turn, 0, domain=4), count)
        named = seeds.below(drawing, part.pool)
    if part.directions == "pool":
        keys = [seeds.key(run, seeds.COMMON, 0, k) for k in named]
    else:
        who = author if part.directions == "own" else seeds.COMMON
        keys = [seeds.key(run, who, turn, s) for s in range(count)]
    scaled = [q * 2**part.exponent for q in mantissas]
    return sum(a * seeds.signs(key, size) for a, key in zip(scaled, keys, strict=True))


SETTINGS = st.one_of(
    st.fixed_dictionaries({"directions": st.sampled_from(["own", "common"])}),
    st.fixed_dictionaries(
        {
            "directions": st.just("pool"),
            "pool": st.sampled_from([1, 2, 3, 16, 100, 256, 257, 65_535, 65_536]),
            "sampling": st.sampled_from(["uniform", "pro"]),
        }
    ),
)
ORIGINS = st.builds(
    Origin,
    st.sampled_from([RUN, bytes(16)]),  # few, so that their pools are made once
    st.binary(min_size=32, max_size=32),
    st.integers(1, 2**63),
)


@settings(max_examples=200, deadline=None)
@given(
    options=SETTINGS,
    perturbations=st.integers(1, 30),
    exponent=st.integers(0, 19),
    origin=ORIGINS,
    size=st.integers(1, 200),
    data=st.data(),
)
def test_payloads_stand_for_what_the_specification_says(
    options: dict[str, Any],
    perturbations: int,
    exponent: int,
    origin: Origin,
    size: int,
    data: st.DataObject,
) -> None:
    if options.get("pool", 0) > 65_000:
        origin = ORIGIN
    part = make({**options, "perturbations": perturbations, "exponent": exponent}, origin)
    count = data.draw(st.integers(1, perturbations))
    width = (part.pool - 1).bit_length() if part.sampling == "pro" else 0
    garbage = data.draw(st.binary(max_size=40))
    names = data.draw(st.lists(st.integers(0, part.pool - 1), min_size=count, max_size=count))
    stream = sum(name << (s * width) for s, name in enumerate(names)) if width else 0
    good = stream.to_bytes((count * width + 7) // 8, "little") + data.draw(
        st.binary(min_size=count, max_size=count)
    )
    for payload in (garbage, good, good + b"\0", good[:-1]):
        wanted = expected(part, payload, size)
        if wanted is None:
            with pytest.raises(PayloadError):
                part.decode(payload, size)
        else:
            assert part.decode(payload, size).dense().tolist() == wanted.tolist()
            assert part.pack(part.unpack(payload, size), size) == payload
            assert len(payload) <= part.bound(size)


@pytest.mark.parametrize("path", ["torch", "compiled"])
def test_both_paths_and_any_threads_write_the_same_vector(path: str) -> None:
    size = perturbation._SLAB + 777
    payload = bytes([37, 251, 127, 1, 2])
    wanted = expected(make(POOL), payload, size)
    before = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        for name in ("LARGE", "LOADED"):
            patch.setattr(parallel, name, 0 if path == "compiled" else 1 << 62)
        try:
            for threads in (1, 2):
                torch.set_num_threads(threads)
                assert np.array_equal(make(POOL).decode(payload, size).dense().numpy(), wanted)
        finally:
            torch.set_num_threads(before)


# ---------------------------------------------------------------- laws


@every
def test_updates_add_up_in_any_order(kind: str) -> None:
    """All that several peers said in several turns, as one sum over keys or one after another."""
    total, keys, coefficients = torch.zeros(500, dtype=torch.int32), [], []
    for turn in (1, 2, 3):
        for peer in range(4):
            part = make(KINDS[kind], Origin(RUN, bytes([peer] * 32), turn))
            noise = torch.randn(7, generator=torch.Generator().manual_seed(peer + 9 * turn)) * 50
            _, decoded = part.say(500, part.draw(7), noise.double(), key=turn)
            assert isinstance(decoded, Combination)
            total += decoded.dense()
            keys.append(decoded.keys)
            coefficients.append(decoded.coefficients)
    at_once = torch.zeros(500, dtype=torch.int32)
    order = torch.randperm(len(torch.cat(keys)), generator=torch.Generator().manual_seed(3))
    perturbation.accumulate(at_once, torch.cat(keys)[order], torch.cat(coefficients)[order])
    assert torch.equal(at_once, total)


def test_who_shares_directions_with_whom() -> None:
    mine, theirs = Origin(RUN, AUTHOR, 5), Origin(RUN, bytes(31) + b"\1", 5)
    later, elsewhere = Origin(RUN, AUTHOR, 6), Origin(bytes(16), AUTHOR, 5)
    shared = {}
    for kind, options in KINDS.items():
        first = [make(options, mine).key(s) for s in range(9)]
        others = (theirs, later, elsewhere)
        shared[kind] = [first == [make(options, o).key(s) for s in range(9)] for o in others]
    assert shared == {
        "own": [False, False, False],
        "common": [True, False, False],
        "pool": [True, True, False],
        "pro": [True, True, False],
    }
    many = {"directions": "pool"}
    assert make(many, mine).draw(9).tolist() != make(many, theirs).draw(9).tolist()
    assert make(many, mine).draw(9).tolist() != make(many, later).draw(9).tolist()


def test_rounding_is_right_on_average() -> None:
    """Within five standard errors, for each step on its own, over keys."""
    part = make({"perturbations": 9, "exponent": 3})
    wanted = steps(0.3, -0.3, 4, -4, 7.99, -1015.9, 1016, 12.5, 1e-3)
    keys, total = 4000, torch.zeros(9, dtype=torch.float64)
    for key in range(keys):
        _, decoded = part.say(10, part.draw(9), wanted, key=key)
        assert isinstance(decoded, Combination)
        off = decoded.coefficients - wanted
        assert float(off.abs().max()) < 8
        total += off
    fraction = (wanted / 8).remainder(1)
    error = 8 * (fraction * (1 - fraction) / keys).sqrt()
    assert bool((total / keys).abs().le(5 * error).all())


def test_rounding_by_hand() -> None:
    """Up where 53 bits of a word, as a fraction, are below what is above the floor."""
    part = make({"perturbations": 300, "exponent": 1})
    wanted = torch.linspace(-9, 9, 300, dtype=torch.float64)
    payload, _ = part.say(10, part.draw(300), wanted, key=2**64 - 3)
    rounding = int(seeds.words(2**64 - 3, 2)[1])
    up = [int(word >> np.uint64(11)) / 2**53 for word in seeds.words(rounding, 300)]
    floor = np.floor(wanted.numpy() / 2)
    assert list(payload) == ((floor + (np.array(up) < wanted.numpy() / 2 - floor)) % 256).tolist()


def test_steps_of_one_payload_are_rounded_independently() -> None:
    part = make({"perturbations": 1000})
    ups = []
    for key in range(30):
        _, decoded = part.say(10, part.draw(1000), torch.full((1000,), 0.5).double(), key=key)
        assert isinstance(decoded, Combination)
        assert set(decoded.coefficients.tolist()) == {0, 1}
        ups.append(decoded.coefficients.double() * 2 - 1)
    sums = torch.stack(ups)
    assert float(sums.mean(1).abs().max()) < 5 / 1000**0.5
    assert float((sums[1:] * sums[:-1]).mean(1).abs().max()) < 5 / 1000**0.5
    assert float((sums[:, 1:] * sums[:, :-1]).mean(1).abs().max()) < 5 / 1000**0.5


def test_out_of_range_is_cut_and_what_is_no_number_is_zero() -> None:
    part = make({"exponent": 4})
    wanted = steps(1e30, -1e30, 127 * 16, 127 * 16 + 1, math.inf, -math.inf, math.nan, -0.0)
    for key in range(50):
        payload, _ = part.say(10, part.draw(8), wanted, key=key)
        assert payload == bytes([127, 129, 127, 127, 0, 0, 0, 0])


def test_chance_comes_from_the_key_alone() -> None:
    part = make({})
    halves = torch.full((16,), 0.5).double()
    state = torch.get_rng_state()
    first = part.say(10, part.draw(16), halves, key=5).payload
    assert first == part.say(10_000, part.draw(16), halves, key=5).payload
    assert first != part.say(10, part.draw(16), halves, key=6).payload
    other = make({}, Origin(RUN, AUTHOR, 9))
    assert first == other.say(10, other.draw(16), halves, key=5).payload
    assert torch.equal(torch.get_rng_state(), state)


@every
def test_encode_shrinks_the_residual_as_it_promises(kind: str) -> None:
    """Over turns the mean square left is 1 - P/(d + P - 1), within what 200 turns can tell."""
    size, options = 8, {**KINDS[kind], "perturbations": 16}
    if "pool" in options:
        options["pool"] = 60_000  # all but never twice
    x = torch.randn(size, generator=torch.Generator().manual_seed(1)) * 2000
    left = []
    for turn in range(1, 201):
        decoded = make({**options, "exponent": 5}, Origin(RUN, AUTHOR, turn)).encode(x, key=turn)
        residual = x - decoded.decoded.dense()
        left.append(float(residual.square().sum() / x.square().sum()))
    mean = sum(left) / len(left)
    assert mean == pytest.approx(1 - 16 / (8 + 15), abs=0.05)


def test_a_pool_of_one_seed_does_not_overshoot() -> None:
    part = make({"directions": "pool", "pool": 1, "exponent": 3})
    z = torch.from_numpy(seeds.signs(part.key(0), 300)).float()
    decoded = part.encode(z * 1000).decoded.dense()
    assert float((decoded - z * 1000).abs().max()) <= 16 * 8


# ---------------------------------------------------------------- drawing


def test_seeds_are_drawn_by_their_weights() -> None:
    """Each within five standard errors of its chance; none of weight zero."""
    part = make({**KINDS["pro"], "perturbations": 20_000})
    weights = torch.tensor([0, 1, 0, 2, 0.5, 1e-9, 4, 0, 1, 0], dtype=torch.float64)
    drawn = part.draw(20_000, weights, key=3)
    found = Counter(drawn.tolist())
    for k, weight in enumerate((weights / weights.sum()).tolist()):
        error = (weight * (1 - weight) * 20_000) ** 0.5
        assert abs(found[k] - weight * 20_000) <= 5 * error
    assert torch.equal(part.draw(20_000, weights * 1e300, key=3), drawn)
    assert torch.equal(part.draw(20_000, weights.float() * 8, key=3), drawn)
    assert torch.equal(part.draw(100, weights, key=3), drawn[:100])
    assert not torch.equal(part.draw(20_000, weights, key=4), drawn)


def test_weights_are_drawn_from_by_the_inverse_of_their_sum() -> None:
    """Word s of the key that the first word of the author's key is: the specification by hand."""
    part = make(KINDS["pro"])
    weights = [3, 0, 1, 4, 1, 5, 9, 2, 6, 5]
    drawing = int(seeds.words(1234, 1)[0])
    at = [(int(word) >> 11) / 2**53 * sum(weights) for word in seeds.words(drawing, 16)]
    wanted = [int(np.searchsorted(np.cumsum(weights), a, side="right")) for a in at]
    assert part.draw(16, torch.tensor(weights).double(), key=1234).tolist() == wanted
    assert part.draw(16, key=1234).tolist() == seeds.below(seeds.words(drawing, 16), 10)


def test_the_ends_of_the_range_are_drawn_from() -> None:
    """Words of all zeros and all ones, which chance will hardly bring."""
    words = torch.tensor([0, -1])
    for before, after in ((0, 0), (1, 0), (0, 2), (3, 3)):
        weights = torch.tensor([0.0] * before + [0.7, 0.1, 0.9] + [0.0] * after)
        found = scalar._weighted(words, weights, len(weights))
        assert found.tolist() == [before, before + 2]


def test_only_one_weight_is_always_drawn() -> None:
    part = make({**KINDS["pro"], "perturbations": 500})
    for k in range(10):
        weights = torch.zeros(10, dtype=torch.float64)
        weights[k] = 5e-324
        assert set(part.draw(500, weights, key=k).tolist()) == {k}


@pytest.mark.parametrize(
    "weights",
    [
        [1.0] * 9,
        [1.0] * 11,
        [0.0] * 10,
        [1.0] * 9 + [-1e-30],
        [1.0] * 9 + [math.nan],
        [1.0] * 9 + [math.inf],
    ],
)
def test_weights_that_say_no_chances_are_refused(weights: list[float]) -> None:
    with pytest.raises(ValueError, match="weights"):
        make(KINDS["pro"]).draw(3, torch.tensor(weights).double(), key=1)


def test_where_directions_are_known_weights_and_keys_do_not_matter() -> None:
    for kind in ("own", "common", "pool"):
        part = make(KINDS[kind])
        weights = torch.tensor([math.nan])
        assert torch.equal(part.draw(9), part.draw(9, weights, key=9))
        assert torch.equal(part.draw(9)[:4], part.draw(4))


def test_a_pool_is_derived_once() -> None:
    keys = seeded.pool(RUN, 4096)
    assert seeded.pool(RUN + b"more", 4096) is keys
    wanted = [seeds.key(RUN, seeds.COMMON, 0, k) for k in range(4096)]
    assert [k % 2**64 for k in keys.tolist()] == wanted


# ---------------------------------------------------------------- what does not fit


@pytest.mark.parametrize(
    ("options", "payload", "message"),
    [
        ({}, "", "1 to 16 steps"),
        ({}, "01" * 17, "1 to 16 steps"),
        ({}, "0180", "-128"),
        (POOL, "80", "-128"),
        (KINDS["pro"], "", "steps"),
        (KINDS["pro"], "09", "steps"),
        (KINDS["pro"], "0a01", "seed 10 of a pool of 10"),
        (KINDS["pro"], "1901", "padding"),
        (KINDS["pro"], "0980", "-128"),
        (KINDS["pro"], "99" * 8 + "01" * 17, "steps"),
    ],
)
def test_payloads_of_no_form(options: dict[str, Any], payload: str, message: str) -> None:
    with pytest.raises(PayloadError, match=message):
        make(options).decode(bytes.fromhex(payload), 5)


def test_the_length_says_how_many_steps_there_are() -> None:
    """With 4 bits a name: 2, 3, 5, 6, 8 … bytes, and none between."""
    part = make(KINDS["pro"])
    lengths = [len(part.say(5, part.draw(n), steps(*[1] * n), key=1).payload) for n in range(1, 17)]
    assert lengths == [n + (n + 1) // 2 for n in range(1, 17)]
    for length in range(30):
        if length not in lengths:
            with pytest.raises(PayloadError, match="steps"):
                part.decode(b"\1" * length, 5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"directions": "mine"}, "directions"),
        ({"perturbations": 0}, "perturbations = 0"),
        ({"perturbations": 65_537}, "perturbations"),
        ({"pool": 0}, "pool = 0"),
        ({"pool": 65_537}, "pool"),
        ({"sampling": "often"}, "sampling"),
        ({"sampling": "pro"}, "set directions = 'pool'"),
        ({"exponent": -1}, "exponent = -1"),
        ({"exponent": 10**9}, "exponent"),
        ({"exponent": 21}, "lower one of them"),  # 127 · 16 · 2^21 > 2^31
        ({"exponent": 9, "perturbations": 65_536}, "lower one of them"),
    ],
)
def test_settings_that_have_no_layout(options: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        codec.make("scalar", options)


def test_the_largest_settings_stay_within_int32() -> None:
    for options in (
        {"exponent": 20},
        {"exponent": 8, "perturbations": 65_536},
        {**POOL, "exponent": 20},
    ):
        part = make(options)
        decoded = part.decode(b"\x81" * part.perturbations, 3)
        assert int(decoded.coefficients.abs().sum()) < 2**31
        assert int(decoded.dense().abs().max()) < 2**31


def test_calls_that_do_not_fit() -> None:
    part, pro = make({}), make(KINDS["pro"])
    for count in (0, 17):
        with pytest.raises(ValueError, match="1 to 16"):
            part.draw(count)
    for wrong in (torch.tensor([1, 0]), torch.tensor([0, 2])):
        with pytest.raises(ValueError, match="not the directions"):
            part.say(5, wrong, steps(1, 1), key=0)
    for wrong in (torch.tensor([-1]), torch.tensor([10])):
        with pytest.raises(ValueError, match="not the directions"):
            pro.say(5, wrong, steps(1), key=0)
    for directions, sizes in (
        (torch.arange(2), steps(1)),
        (torch.arange(0), steps()),
        (torch.arange(17), steps(*[1] * 17)),
    ):
        with pytest.raises(ValueError, match="a payload has 1 to 16"):
            part.say(5, directions, sizes, key=0)
    for number in (-1, 16):
        with pytest.raises(ValueError, match="none of 16"):
            part.key(number)
    with pytest.raises(ValueError, match="none of 10"):
        pro.key(10)
