"""The exact integer sum: any order, wrap-around, undoing, and the fingerprint that follows it."""

import random
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.compression import codec, parallel
from shoal.compression.codec import Combination, Decoded
from shoal.training import fingerprint, ledger
from shoal.training.exchange import Arrived
from shoal.training.exchanges.ledger import LedgerExchange
from shoal.training.feedback import FeedbackSettings
from shoal.training.fingerprint import Fingerprint
from shoal.training.ledger import Ledger
from shoal.training.rules import Fragment, Plane, Rules
from shoal.training.turn_rules.sum import Sum
from shoal.training.walk import WalkSettings

SIZE = 3000
MASK = 2**64 - 1


def integers(seed: int, size: int = SIZE, spread: int = 2**20) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randint(-spread, spread, (size,), generator=g, dtype=torch.int32)


def update(seed: int, spread: int = 2**20) -> Decoded:
    if seed % 2:
        return Decoded(SIZE, integers(seed, spread=spread))
    g = torch.Generator().manual_seed(seed)
    indices = torch.randperm(SIZE, generator=g)[:50].sort().values
    return Decoded(SIZE, integers(seed, 50, spread), indices)


def key(i: int) -> ledger.Key:
    return bytes([i]) * 32, 0, 1


def python_fingerprint(values: list[int]) -> tuple[int, int]:
    """The definition, in Python's own integers."""
    lanes = []
    for key in (int.from_bytes(b"shoal-f0", "big"), int.from_bytes(b"shoal-f1", "big")):
        total = 0
        for i, value in enumerate(values):
            z = (key + (i + 1) * 0x9E3779B97F4A7C15) & MASK
            z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
            z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
            total += value * ((z ^ (z >> 31)) | 1)
        lanes.append(total & MASK)
    return lanes[0], lanes[1]


def test_multipliers_are_split_mix_64(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fingerprint, "KEYS", (1234567, 0))
    published = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    found = fingerprint.multipliers(0, torch.arange(5)).tolist()
    assert [value & MASK for value in found] == [value | 1 for value in published]


def test_the_fingerprint_is_its_definition() -> None:
    values = integers(1, 500, 2**31)
    assert Fingerprint(500).of(values) == python_fingerprint(values.tolist())


def test_generated_and_cached_multipliers_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    values, sparse = integers(1), update(2)
    assert sparse.indices is not None
    cached = Fingerprint(SIZE)
    monkeypatch.setattr(fingerprint, "CACHED", 0)
    monkeypatch.setattr(fingerprint, "CHUNK", 700)
    generated = Fingerprint(SIZE)
    assert generated.of(values) == cached.of(values)
    assert generated.at(sparse.indices, sparse.values) == cached.at(sparse.indices, sparse.values)
    assert cached.at(sparse.indices, sparse.values) == cached.of(sparse.dense())


@settings(max_examples=30, deadline=None)
@given(order=st.permutations(range(12)), spread=st.sampled_from([2**20, 2**31]))
def test_any_order_gives_the_same_tensor_and_fingerprint(order: list[int], spread: int) -> None:
    straight = Ledger(integers(99), Sum())
    shuffled = Ledger(integers(99), Sum())
    for i in range(12):
        straight.add(key(i), i, update(i, spread))
    for i in order:
        shuffled.add(key(i), i, update(i, spread))
    assert torch.equal(straight.model, shuffled.model)
    assert straight.fingerprint() == shuffled.fingerprint() == straight.recompute()
    assert straight.out_of_range == shuffled.out_of_range


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 30), min_size=1, max_size=20, unique=True), st.randoms())
def test_subtracting_undoes_adding(chosen: list[int], rng: random.Random) -> None:
    one = Ledger(integers(5), Sum())
    before = one.model.clone(), one.fingerprint()
    deltas = {i: one.add(key(i), 1, update(i, 2**31)) for i in chosen}
    rng.shuffle(chosen)
    for i in chosen:
        assert one.subtract(key(i), 1, update(i, 2**31)) == fingerprint.negate(deltas[i])
    assert torch.equal(one.model, before[0])
    assert one.fingerprint() == before[1] == one.recompute()
    assert one.out_of_range == 0


@pytest.mark.parametrize("compiled", [False, True])
def test_an_update_of_a_fragment_counts_from_its_offset(
    compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ledger moves as if the fragment were a whole vector with zeros around it."""
    if compiled:
        pytest.importorskip("numba")
    for name in ("LARGE", "LOADED"):
        monkeypatch.setattr(parallel, name, 0 if compiled else 1 << 60)
    one, two = Ledger(integers(5, spread=2**31), Sum()), Ledger(integers(5, spread=2**31), Sum())
    for seed, offset, spread in ((1, 700, 2**31), (2, 2999 - 50, 2**20), (4, 0, 2**31)):
        values = integers(seed, 50, spread)
        indices = torch.arange(50) if seed != 1 else None
        part = Decoded(50, values, indices, offset)
        whole = torch.zeros(SIZE, dtype=torch.int32)
        whole[offset : offset + 50] = values
        assert one.add(key(seed), 1, part) == two.add(key(seed), 1, Decoded(SIZE, whole))
    assert torch.equal(one.model, two.model)
    assert one.fingerprint() == two.fingerprint() == one.recompute()
    assert one.out_of_range == two.out_of_range
    one.subtract(key(1), 1, Decoded(50, integers(1, 50, 2**31), None, 700))
    assert one.fingerprint() == one.recompute()


def test_the_compiled_loops_and_torch_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("numba")
    found = []
    for least in (0, 1 << 60):
        for name in ("LARGE", "LOADED"):
            monkeypatch.setattr(parallel, name, least)
        one = Ledger(integers(5, spread=2**31), Sum())
        deltas = [one.add(key(i), 1, update(i, 2**31)) for i in range(8)]
        deltas += [one.subtract(key(i), 1, update(i, 2**31)) for i in range(5)]
        found.append((deltas, one.fingerprint(), one.recompute(), one.to_bytes(), one.out_of_range))
    assert found[0] == found[1]
    assert found[0][1] == found[0][2]


def test_a_part_has_the_fingerprint_of_the_whole_without_the_rest() -> None:
    values = integers(1)
    lanes = Fingerprint(SIZE)
    parts = [lanes.of(values[:1000]), lanes.of(values[1000:], 1000)]
    assert fingerprint.add(*parts) == lanes.of(values)


def test_without_wrapping_the_fingerprint_moves_by_the_deltas() -> None:
    one = Ledger(integers(5), Sum())
    total = one.fingerprint()
    for i in range(20):
        total = fingerprint.add(total, one.add(key(i), 1, update(i)))
    assert one.fingerprint() == total


def test_values_wrap_modulo_two_to_the_32_and_raise_the_alarm() -> None:
    one = Ledger(torch.tensor([2**30 - 1, 2**31 - 1, 0], dtype=torch.int32), Sum())
    assert one.out_of_range == 1
    start = one.fingerprint()
    delta = one.add(key(1), 1, Decoded(3, torch.tensor([1, 1, 5], dtype=torch.int32)))
    assert one.model.tolist() == [2**30, -(2**31), 5]
    assert one.out_of_range == 2
    assert one.fingerprint() == one.recompute()
    linear = fingerprint.add(start, delta)
    assert all((a - b) % 2**32 == 0 for a, b in zip(linear, one.fingerprint(), strict=True))


def test_one_and_two_threads_agree() -> None:
    before, found = torch.get_num_threads(), set()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            one = Ledger(integers(1, 400_000), Sum())
            one.add(key(1), 1, Decoded(400_000, integers(2, 400_000, 2**31)))
            found.add((one.fingerprint(), one.to_bytes(), one.floats(24).numpy().tobytes()))
    finally:
        torch.set_num_threads(before)
    assert len(found) == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")
def test_cuda_agrees_with_the_cpu() -> None:
    here, there = Ledger(integers(1), Sum()), Ledger(integers(1).cuda(), Sum())
    for i in range(8):
        there_update = update(i, 2**31)
        indices = there_update.indices
        moved = Decoded(
            SIZE, there_update.values.cuda(), None if indices is None else indices.cuda()
        )
        assert here.add(key(i), 1, update(i, 2**31)) == there.add(key(i), 1, moved)
    assert here.to_bytes() == there.to_bytes()
    assert here.fingerprint() == there.fingerprint() == there.recompute()
    assert torch.equal(here.floats(24), there.floats(24).cpu())


def steps(seed: int, largest: int) -> Combination:
    """Return a few steps of the whole model, or of a fragment in its middle."""
    rng = random.Random(seed)
    offset, size = rng.choice([(0, SIZE), (0, SIZE), (1100, 500)])
    count = rng.randint(1, 5)
    keys = torch.tensor([rng.randrange(-(2**63), 2**63) for _ in range(count)])
    coefficients = torch.tensor([rng.randint(-largest, largest) for _ in range(count)])
    return Combination(size, keys, coefficients, offset)


@settings(max_examples=60, deadline=None)
@given(
    seeds=st.lists(st.integers(0, 10**6), max_size=12),
    largest=st.sampled_from([3, 2**20, 2**27, 2**28]),
    edge=st.booleans(),
    compiled=st.booleans(),
)
def test_many_at_once_are_as_one_after_the_other(
    seeds: list[int], largest: int, edge: bool, compiled: bool
) -> None:
    """With the fingerprint of each, whatever wraps, in either code; and out again."""
    updates = [steps(seed, largest) for seed in seeds]
    initial = integers(9) + (2**31 - 2**20 if edge else 0)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("LARGE", "LOADED"):
            patch.setattr(parallel, name, 0 if compiled else 1 << 62)
        at_once, singly = Ledger(initial, Sum()), Ledger(initial, Sum())
        before = at_once.fingerprint()
        found = at_once.add_many(updates)
        assert found == [singly.add(key(0), 1, update) for update in updates]
        for one in (at_once, singly):
            assert torch.equal(one.model, singly.model)
            assert one.fingerprint() == one.recompute() == singly.recompute()
            assert one.out_of_range == singly.out_of_range
        back = at_once.add_many(updates[::-1], -1)[::-1]
        assert back == [fingerprint.negate(lanes) for lanes in found]
        assert torch.equal(at_once.model, initial)
        assert at_once.fingerprint() == before
    assert found == [Fingerprint(SIZE).of(update.dense(), update.offset) for update in updates]


def test_what_passes_int32_together_is_added_in_parts() -> None:
    keys = torch.arange(4)
    updates = [
        Combination(SIZE, keys[:1], torch.tensor([2**30])),
        Combination(SIZE, keys[:1], torch.tensor([2**30 - 1])),
        Combination(500, keys, torch.tensor([5, 5, 5, 5]), 100),
        Combination(SIZE, keys[:1], torch.tensor([1])),
        Combination(SIZE, keys[:2], torch.tensor([2**30, -(2**30)])),  # wraps by itself
        Combination(SIZE, keys[1:2], torch.tensor([7])),
    ]
    assert ledger._batches(updates) == [[0, 1], [3], [4], [5], [2]]


def test_a_flipped_bit_shows_after_many_at_once() -> None:
    one = Ledger(integers(1), Sum())
    one.model[77] ^= 1 << 13
    one.add_many([steps(seed, 100) for seed in range(5)])
    assert one.fingerprint() != one.recompute()


def test_steps_are_added_at_once_and_answered_in_order() -> None:
    """Between them a sparse update of another plane, and one that breaks a rule."""
    scalar = codec.make("scalar", {"exponent": 3})
    sparse = codec.make("sparse", {})
    planes = (
        Plane("sparse", (Fragment(0, SIZE, sparse),), every=3),
        Plane("scalar", (Fragment(0, SIZE, scalar),)),
    )
    rules = Rules(planes, turns=0, clip=Fraction(10**9), initial_squares=1 << 80, run=bytes(32))
    settings_ = (FeedbackSettings(), WalkSettings())
    exchange = LedgerExchange(integers(1), rules, settings_, quantum_bits=24)
    arrived, wanted, model = [], [], integers(1)
    for number in range(10):
        turn, author = number + 1, bytes([number % 2]) * 32
        part = rules.codec(turn, author)
        payload, decoded = part.encode(integers(number).float(), key=number)
        if number == 4:
            payload = payload[:-1] + b"\x80"
        else:
            model += decoded.dense()
        wanted.append((0, 0) if number == 4 else Fingerprint(SIZE).of(decoded.dense()))
        kind = rules.planes[rules.plane(turn)].kind
        arrived.append(Arrived((author, 1, number), turn, kind, payload, len(payload)))
    outcomes = exchange.apply(arrived)
    assert [outcome.key for outcome in outcomes] == [update.key for update in arrived]
    assert [bool(outcome.refused) for outcome in outcomes] == [i == 4 for i in range(10)]
    assert [outcome.delta for outcome in outcomes] == wanted
    assert torch.equal(exchange.integers(), model)
    assert exchange.fingerprint() == exchange.recompute()
    back = exchange.subtract(arrived)
    assert [outcome.delta for outcome in back] == [fingerprint.negate(lanes) for lanes in wanted]
    assert torch.equal(exchange.integers(), integers(1))


def test_bytes_come_back() -> None:
    one, other = Ledger(integers(1), Sum()), Ledger(integers(2), Sum())
    other.restore(one.to_bytes())
    assert torch.equal(one.model, other.model)
    assert one.fingerprint() == other.fingerprint()
    with pytest.raises(ValueError, match="bytes of model"):
        other.restore(one.to_bytes()[:-1])


def test_a_flipped_bit_in_memory_shows() -> None:
    one = Ledger(integers(1), Sum())
    one.model[7] ^= 1 << 13
    assert one.recompute() != one.fingerprint()


def test_floats_become_the_nearest_integers() -> None:
    whole = ledger.from_floats(torch.tensor([0.5, -1.25, 1e-9]), 24)
    assert whole.tolist() == [2**23, -5 * 2**22, 0]
    with pytest.raises(ValueError, match="quantum_bits"):
        ledger.from_floats(torch.tensor([64.0]), 24)
    with pytest.raises(ValueError, match="quantum_bits"):
        ledger.from_floats(torch.tensor([float("nan")]), 24)
