"""Directions of ±1: known answers, slices, and sums along them that no order can change."""

import hashlib
import struct
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from shoal.compression import kernels_signs, parallel, perturbation, splitmix

RUN, AUTHOR = bytes(range(16)), bytes(range(32))
KNOWN = 0x2F295DC10E89139B
"""The key of domain 0, turn 100, sample 3."""

KEYS = st.integers(0, 2**64 - 1)
COEFFICIENTS = st.integers(-(2**31), 2**31 - 1) | st.integers(-9, 9)
STARTS = st.integers(0, 300) | st.sampled_from([2**31 - 5, 2**33 + 77, 10**12])
EDGES = [1, 63, 64, 65, 4095, 4096, 4097, 4160, 9000]
SIZES = st.integers(0, 400) | st.sampled_from(EDGES)


def oracle(key: int, size: int, start: int = 0) -> NDArray[np.int64]:
    """z in numpy's unsigned integers, bit by bit from the definition."""
    index = np.arange(start, start + size, dtype=np.uint64)
    word = index // np.uint64(64)
    z = np.uint64(key) + (word + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(31)
    bit = (z >> (index % np.uint64(64))) & np.uint64(1)
    return np.asarray(1 - 2 * bit.astype(np.int64))


def integers(size: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-(2**31), 2**31, (size,), generator=generator).to(torch.int32)


@pytest.fixture(params=["torch", "compiled"])
def path(request: pytest.FixtureRequest) -> Iterator[str]:
    """Whatever the size, either the torch code or the loops serve."""
    with pytest.MonkeyPatch.context() as patch:
        take(patch, request.param)
        yield request.param


def take(patch: pytest.MonkeyPatch, path: str) -> None:
    for name in ("LARGE", "LOADED"):
        patch.setattr(parallel, name, 0 if path == "compiled" else 1 << 62)


@pytest.fixture(params=[1, 2, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


# ---------------------------------------------------------------- known answers


def test_the_generator_gives_the_published_vector() -> None:
    published = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    assert [word % 2**64 for word in splitmix.words(1234567, 5).tolist()] == published
    word = np.empty(5, np.uint64)
    kernels_signs._hash(np.uint64(1234567), 0, word)
    assert word.tolist() == published


def test_the_known_key() -> None:
    assert perturbation.key(RUN, AUTHOR, 100, 3) == KNOWN
    assert perturbation.key(RUN + b"more", AUTHOR, 100, 3) == KNOWN
    words = [word % 2**64 for word in splitmix.words(KNOWN, 3).tolist()]
    assert words == [0x2A5CF60076A5E555, 0x2915F8B12E5B6CA5, 0xD01A5E6E2F5B674A]


def test_the_known_signs() -> None:
    z = perturbation.signs(KNOWN, 100_000)
    assert z.dtype == torch.int8
    assert z[:16].tolist() == [-1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, 1, -1, -1, -1]
    assert int(z.sum()) == 70
    assert hashlib.sha256(z.numpy().tobytes()).hexdigest().startswith("3af77be4e46b4d1c")
    assert np.array_equal(z.numpy(), oracle(KNOWN, 100_000))


def test_sums_have_the_known_signs(path: str) -> None:
    total = torch.zeros(100_000, dtype=torch.int32)
    perturbation.accumulate(total, [KNOWN], [1])
    assert hashlib.sha256(total.to(torch.int8).numpy()).hexdigest().startswith("3af77be4e46b4d1c")
    ones = torch.ones(100_000, dtype=torch.int32)
    assert perturbation.project(ones, [KNOWN]).tolist() == [70]
    x = torch.zeros(100_000)
    perturbation.perturb(x, KNOWN, 1.0)
    assert torch.equal(x.int(), total)


def test_every_part_of_a_key_counts() -> None:
    other = bytes(31) + b"\1"
    keys = {
        perturbation.key(RUN, AUTHOR, 1, 2),
        perturbation.key(RUN, AUTHOR, 2, 1),
        perturbation.key(RUN, AUTHOR, 1, 2, domain=perturbation.PROJECTION),
        perturbation.key(RUN, perturbation.COMMON, 1, 2),
        perturbation.key(RUN, other, 1, 2),
        perturbation.key(other, AUTHOR, 1, 2),
        perturbation.key(RUN, AUTHOR, 2**64 - 1, 2**64 - 1, domain=2**64 - 1),
    }
    assert len(keys) == 7
    said = struct.pack("<Q", 3) + RUN + bytes(32) + struct.pack("<QQ", 1, 2)
    digest = hashlib.blake2b(said, digest_size=8, person=b"shoal-seed").digest()
    found = perturbation.key(RUN, perturbation.COMMON, 1, 2, domain=perturbation.PROJECTION)
    assert found == int.from_bytes(digest, "little")


def test_domains_have_their_numbers() -> None:
    """They are part of what all peers must agree on."""
    named = (
        perturbation.PERTURBATION,
        perturbation.RANDOM_K,
        perturbation.ROUNDING,
        perturbation.PROJECTION,
        perturbation.SAMPLING,
        perturbation.SUBSAMPLE,
    )
    assert named == (0, 1, 2, 3, 4, 5)


# ---------------------------------------------------------------- laws


@settings(max_examples=100, deadline=None)
@given(key=KEYS, size=SIZES, start=STARTS)
def test_any_slice_needs_nothing_before_it(key: int, size: int, start: int) -> None:
    wanted = oracle(key, size, start)
    assert np.array_equal(perturbation.signs(key, size, start=start).numpy(), wanted)
    for path in ("torch", "compiled"):
        total, x = torch.zeros(size, dtype=torch.int32), torch.zeros(size)
        with pytest.MonkeyPatch.context() as patch:
            take(patch, path)
            perturbation.accumulate(total, [key], [1], start=start)
            perturbation.perturb(x, key, 1.0, start=start)
        assert np.array_equal(total.numpy(), wanted)
        assert np.array_equal(x.numpy(), wanted)


@settings(max_examples=100, deadline=None)
@given(
    pairs=st.lists(st.tuples(KEYS, COEFFICIENTS), max_size=12),
    size=SIZES,
    start=STARTS,
    data=st.data(),
)
def test_both_paths_give_the_sum_of_the_oracle(
    pairs: list[tuple[int, int]], size: int, start: int, data: st.DataObject
) -> None:
    keys, coefficients = [k for k, _ in pairs], [a for _, a in pairs]
    before = integers(size, data.draw(st.integers(0, 9)))
    z = np.array([oracle(k, size, start) for k in keys]).reshape(len(keys), size)
    a = np.array(coefficients, np.int64)
    wanted = (before.numpy() + a @ z).astype(np.int32)  # wraps, as int64 does before it
    along = z @ before.numpy().astype(np.int64)
    for path in ("torch", "compiled"):
        total = before.clone()
        with pytest.MonkeyPatch.context() as patch:
            take(patch, path)
            found = perturbation.project(before, keys, start=start)
            perturbation.accumulate(total, keys, coefficients, start=start)
        assert np.array_equal(total.numpy(), wanted), path
        assert found.dtype == torch.int64
        assert np.array_equal(found.numpy(), along), path


@settings(max_examples=30, deadline=None)
@given(pairs=st.lists(st.tuples(KEYS, COEFFICIENTS), min_size=1, max_size=20), data=st.data())
def test_order_batches_and_splits_leave_no_trace(
    pairs: list[tuple[int, int]], data: st.DataObject
) -> None:
    before = integers(5000)
    once = before.clone()
    perturbation.accumulate(once, [k for k, _ in pairs], [a for _, a in pairs], start=9)
    shuffled = data.draw(st.permutations(pairs))
    cut, place = data.draw(st.integers(0, len(pairs))), data.draw(st.integers(0, 5000))
    for path in ("torch", "compiled"):
        pieces = before.clone()
        with pytest.MonkeyPatch.context() as patch:
            take(patch, path)
            for batch in (shuffled[:cut], shuffled[cut:]):
                for low, high in ((place, 5000), (0, place)):
                    keys, coefficients = [k for k, _ in batch], [a for _, a in batch]
                    part = pieces[low:high]
                    perturbation.accumulate(part, keys, coefficients, start=9 + low)
        assert torch.equal(pieces, once), path


@settings(max_examples=40, deadline=None)
@given(key=KEYS, a=COEFFICIENTS, times=st.integers(2, 5))
def test_what_is_added_can_be_taken_away_and_wraps(key: int, a: int, times: int) -> None:
    before = integers(500)
    for path in ("torch", "compiled"):
        total = before.clone()
        with pytest.MonkeyPatch.context() as patch:
            take(patch, path)
            perturbation.accumulate(total, [key] * times, [a] * times)
            wanted = before.numpy() + times * a * oracle(key, 500)
            assert np.array_equal(total.numpy(), wanted.astype(np.int32)), path
            back = (-times * a + 2**31) % 2**32 - 2**31
            perturbation.accumulate(total, [key], [back])
        assert torch.equal(total, before), path


@settings(max_examples=60, deadline=None)
@given(
    key=KEYS,
    size=SIZES,
    start=STARTS,
    scale=st.floats(width=32, allow_nan=False, allow_infinity=False),
    spread=st.sampled_from([1e-40, 1e-3, 1.0, 1e38]),
)
def test_perturbing_rounds_once(
    key: int, size: int, start: int, scale: float, spread: float
) -> None:
    generator = torch.Generator().manual_seed(size)
    before = torch.randn(size, generator=generator) * spread
    with np.errstate(over="ignore"):
        steps = np.float32(scale) * oracle(key, size, start).astype(np.float32)
        wanted = before.numpy() + steps
    for path in ("torch", "compiled"):
        x = before.clone()
        with pytest.MonkeyPatch.context() as patch:
            take(patch, path)
            perturbation.perturb(x, key, scale, start=start)
        assert np.array_equal(x.numpy().view(np.int32), wanted.view(np.int32)), path


def test_any_number_of_threads_and_large_vectors(threads: int) -> None:
    """Larger than a slab of torch, with parts of threads that begin inside words and tiles."""
    size, start, seeds = perturbation._SLAB + 12_345, 1_000_003, 9
    before = integers(size)
    keys = splitmix.words(3, seeds)
    coefficients = integers(seeds, 1)
    z = np.array([oracle(k % 2**64, size, start) for k in keys.tolist()])
    wanted = (before.numpy() + coefficients.numpy().astype(np.int64) @ z).astype(np.int32)
    along = z @ before.numpy().astype(np.int64)
    first = int(keys[0]) % 2**64
    assert np.array_equal(perturbation.signs(first, size, start=start), z[0])
    for path in ("torch", "compiled"):
        total, x = before.clone(), torch.zeros(size)
        with pytest.MonkeyPatch.context() as patch:
            take(patch, path)
            perturbation.accumulate(total, keys, coefficients, start=start)
            assert np.array_equal(perturbation.project(before, keys, start=start), along), path
            perturbation.perturb(x, first, -0.5, start=start)
        assert np.array_equal(total.numpy(), wanted), path
        assert np.array_equal(x.numpy(), -0.5 * z[0]), path


def test_projections_hold_the_largest_sums(path: str) -> None:
    """All elements at the end of the range and along z: the sum is 2³¹ · D, without a loss."""
    z = torch.from_numpy(oracle(5, 10_000))
    low = torch.full((10_000,), -(2**31), dtype=torch.int32)
    along = torch.where(z > 0, 2**31 - 1, -(2**31)).to(torch.int32)
    minus = int((z < 0).sum())
    assert perturbation.project(low, [5]).tolist() == [-(2**31) * int(z.sum())]
    assert perturbation.project(along, [5]).tolist() == [(2**31 - 1) * 10_000 + minus]


LANES = (0x73686F616C2D6630, 0x73686F616C2D6631)


def hashes(v: NDArray[np.int64], place: int) -> list[int]:
    """Return both lanes of a vector that begins at `place`, in Python's own integers."""
    index = np.arange(place + 1, place + 1 + len(v), dtype=np.uint64)
    found = []
    for lane in LANES:
        r = np.uint64(lane) + index * np.uint64(0x9E3779B97F4A7C15)
        r = (r ^ (r >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        r = (r ^ (r >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        r = (r ^ (r >> np.uint64(31))) | np.uint64(1)
        total = sum(a * b for a, b in zip(v.tolist(), r.tolist(), strict=True))
        found.append((total + 2**63) % 2**64 - 2**63)
    return found


@settings(max_examples=80, deadline=None)
@given(
    sums=st.lists(st.lists(st.tuples(KEYS, COEFFICIENTS), max_size=4), max_size=5),
    size=SIZES,
    start=STARTS,
    place=STARTS,
    data=st.data(),
)
def test_many_sums_at_once_are_each_accounted_for(
    sums: list[list[tuple[int, int]]], size: int, start: int, place: int, data: st.DataObject
) -> None:
    pairs = [pair for one in sums for pair in one]
    keys, coefficients = [k for k, _ in pairs], [a for _, a in pairs]
    before = integers(size, data.draw(st.integers(0, 9)))
    each = []
    for one in sums:
        v = sum((a * oracle(k, size, start) for k, a in one), np.zeros(size, np.int64))
        each.append(v.astype(np.int32).astype(np.int64))  # as the vector written out is: it wraps
    wanted = (before.numpy() + sum(each, np.zeros(size, np.int64))).astype(np.int32)
    for path in ("torch", "compiled"):
        total = before.clone()
        with pytest.MonkeyPatch.context() as patch:
            take(patch, path)
            found = perturbation.accumulate_each(
                total, keys, coefficients, [len(s) for s in sums], LANES, start=start, place=place
            )
        assert np.array_equal(total.numpy(), wanted), path
        assert found.shape == (len(sums), 2)
        assert found.tolist() == [hashes(v, place) for v in each], path


def test_many_sums_along_a_long_vector(threads: int) -> None:
    size, start, place = perturbation._SLAB + 12_345, 1_000_003, 77
    keys, coefficients = splitmix.words(3, 9), integers(9, 1) >> 8
    total, wanted = integers(size), integers(size)
    perturbation.accumulate(wanted, keys, coefficients, start=start)
    found = []
    for path in ("torch", "compiled"):
        total = integers(size)
        with pytest.MonkeyPatch.context() as patch:
            take(patch, path)
            found.append(
                perturbation.accumulate_each(
                    total, keys, coefficients, [1, 5, 0, 3], LANES, start=start, place=place
                )
            )
        assert torch.equal(total, wanted), path
    assert torch.equal(found[0], found[1])
    assert found[0][2].tolist() == [0, 0]
    v = sum(
        a * oracle(k % 2**64, size, start)
        for k, a in zip(keys[6:].tolist(), coefficients[6:].tolist(), strict=True)
    )
    assert found[0][3].tolist() == hashes(v, place)


@pytest.mark.parametrize("counts", [[], [1], [3], [1, 2]])
def test_counts_that_do_not_add_up_change_nothing(counts: list[int], path: str) -> None:
    total = integers(100)
    with pytest.raises(ValueError, match="2 keys, 2 coefficients"):
        perturbation.accumulate_each(total, [1, 2], [3, 4], counts, LANES)
    assert torch.equal(total, integers(100))


@pytest.mark.parametrize("scale", [1.0, 3e-3, 1e30, 1e-12])
def test_products_with_floats_are_those_of_the_nearest_integers(path: str, scale: float) -> None:
    """Within 30 bits of the largest, and of 2⁻²⁴; whatever the parts that are taken at a time."""
    size, start, keys = 5000, 130, [KNOWN, 5, 2**64 - 1]
    x = torch.randn(size, generator=torch.Generator().manual_seed(2)) * scale
    z = np.array([oracle(key, size, start) for key in keys])
    power = perturbation.exponent(x)
    largest = float(x.abs().max()) * 2.0**power
    assert power == 24 or 2**29 <= largest < 2**30
    assert power == 24 if scale < 1 else power < 30
    rounded = np.round(x.double().numpy() * 2.0**power).astype(np.int64)
    assert np.array_equal(perturbation.whole(x, power).numpy(), rounded)
    found = perturbation.along(x, keys, start=start)
    assert found.dtype == torch.float64
    assert found.tolist() == [float(int(p)) * 2.0**-power for p in z @ rounded]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(perturbation, "_PART", 999)
        assert torch.equal(perturbation.along(x, keys, start=start), found)


def test_products_with_what_is_no_number_are_refused() -> None:
    for bad in (float("nan"), float("inf"), -float("inf")):
        with pytest.raises(ValueError, match="NaN or infinite"):
            perturbation.along(torch.tensor([1.0, bad, 2.0]), [1])
    tiny = torch.full((100,), 1e-45)
    assert perturbation.along(tiny, [1]).tolist() == [0]


def test_nothing_along_nothing(path: str) -> None:
    total = integers(9000)
    before = total.clone()
    perturbation.accumulate(total, [], [])
    assert torch.equal(total, before)
    assert perturbation.project(total, []).shape == (0,)
    perturbation.accumulate(total[:0], [1], [2])
    assert perturbation.project(total[:0], [1]).tolist() == [0]


def test_directions_are_nearly_orthogonal_and_fair() -> None:
    """Sums of 2²⁰ products of independent signs stay within five standard deviations of zero."""
    size = 1 << 20
    z = [perturbation.signs(perturbation.key(RUN, AUTHOR, 7, k), size).int() for k in range(4)]
    for i in range(4):
        assert abs(int(z[i].sum())) < 5 * size**0.5
        for j in range(i):
            assert abs(int((z[i] * z[j]).sum())) < 5 * size**0.5
        assert abs(int((z[i][1:] * z[i][:-1]).sum())) < 5 * size**0.5


def test_a_models_own_memory_is_perturbed() -> None:
    layer = torch.nn.Linear(8, 4, bias=False)
    before = layer.weight.detach().clone()
    perturbation.perturb(layer.weight.view(-1), 11, 0.25)
    wanted = before + 0.25 * torch.from_numpy(oracle(11, 32)).view(4, 8)
    assert torch.equal(layer.weight, wanted.float())


def test_without_numba_torch_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "shoal.compression.kernels", None)
    parallel._compiled.cache_clear()
    try:
        total = torch.zeros(parallel.LARGE, dtype=torch.int32)
        perturbation.accumulate(total, [KNOWN], [3], start=1)
    finally:
        parallel._compiled.cache_clear()
    assert np.array_equal(total.numpy(), 3 * oracle(KNOWN, parallel.LARGE, 1))


# ---------------------------------------------------------------- what does not fit


@pytest.mark.parametrize(
    ("keys", "coefficients", "message"),
    [
        ([1, 2], [1], "2 keys, but 1"),
        ([2**64], [1], r"not in \[0"),
        ([-1], [1], r"not in \[0"),
        ([1], [2**31], "int32"),
        ([1], [-(2**31) - 1], "int32"),
        ([1], torch.tensor([2**31]), "int32"),
        ([1], torch.tensor([1.0]), "integers"),
        (torch.tensor([1], dtype=torch.int32), [1], "int64"),
    ],
)
def test_numbers_that_do_not_fit_change_nothing(
    keys: Any, coefficients: Any, message: str, path: str
) -> None:
    total = integers(100)
    before = total.clone()
    with pytest.raises(ValueError, match=message):
        perturbation.accumulate(total, keys, coefficients)
    assert torch.equal(total, before)


@pytest.mark.parametrize(
    "wrong",
    [
        torch.zeros(8, dtype=torch.float64),
        torch.zeros(8, dtype=torch.int64),
        torch.zeros((2, 4), dtype=torch.int32),
        torch.zeros(8, dtype=torch.int32)[::2],
    ],
)
def test_vectors_of_another_kind_are_refused(wrong: torch.Tensor) -> None:
    for act in (
        lambda: perturbation.accumulate(wrong, [1], [1]),
        lambda: perturbation.project(wrong, [1]),
        lambda: perturbation.perturb(wrong, 1, 1.0),
    ):
        with pytest.raises(ValueError, match="contiguous vector"):
            act()


def test_other_arguments_that_do_not_fit() -> None:
    x, n = torch.zeros(8), torch.zeros(8, dtype=torch.int32)
    for act in (
        lambda: perturbation.signs(1, 8, start=-1),
        lambda: perturbation.accumulate(n, [1], [1], start=-1),
        lambda: perturbation.project(n, [1], start=-1),
        lambda: perturbation.perturb(x, 1, 1.0, start=-1),
    ):
        with pytest.raises(ValueError, match="below zero"):
            act()
    for scale in (float("nan"), float("inf"), 1e39):
        with pytest.raises(ValueError, match="finite"):
            perturbation.perturb(x, 1, scale)
    assert torch.equal(x, torch.zeros(8))
    for run, author in ((RUN[:15], AUTHOR), (RUN, AUTHOR[:31]), (RUN, AUTHOR + b"x")):
        with pytest.raises(ValueError, match="bytes"):
            perturbation.key(run, author, 0, 0)
    for turn, sample, domain in ((-1, 0, 0), (0, 2**64, 0), (0, 0, -1)):
        with pytest.raises(ValueError, match="in \\[0"):
            perturbation.key(RUN, AUTHOR, turn, sample, domain=domain)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda_gives_what_the_cpu_gives() -> None:
    size, start = perturbation._SLAB_CUDA + 777, 1_000_003
    before, keys, coefficients = integers(size), splitmix.words(3, 9), integers(9, 1)
    x = torch.randn(size, generator=torch.Generator().manual_seed(1))
    there, total, there_x = before.cuda(), before.clone(), x.cuda()
    found = [
        perturbation.accumulate_each(t, keys, coefficients, [4, 5], LANES, start=start, place=9)
        for t in (there, total)
    ]
    assert torch.equal(found[0], found[1])
    assert torch.equal(there.cpu(), total)
    perturbation.accumulate(there, keys.cuda(), coefficients.cuda(), start=start)
    perturbation.accumulate(total, keys, coefficients, start=start)
    assert torch.equal(there.cpu(), total)
    along = perturbation.project(there, keys.cuda(), start=start)
    assert along.is_cuda
    assert torch.equal(along.cpu(), perturbation.project(total, keys, start=start))
    perturbation.perturb(there_x, 5, 0.1, start=start)
    perturbation.perturb(x, 5, 0.1, start=start)
    assert torch.equal(there_x.cpu(), x)
    z = perturbation.signs(5, size, start=start, device="cuda")
    assert torch.equal(z.cpu(), perturbation.signs(5, size, start=start))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_a_step_along_one_direction_waits_for_nothing_that_is_computed_on_cuda() -> None:
    """Else what comes to the device could not be gathered meanwhile (training/slot.py)."""
    size = 2 * perturbation._SLAB_CUDA
    x, total = torch.zeros(size, device="cuda"), integers(size).cuda()
    perturbation.perturb(x, 5, 0.1)
    torch.cuda.set_sync_debug_mode("error")
    try:
        perturbation.perturb(x, 2**64 - 1, 0.1)
        perturbation.accumulate(total, [2**63], [3])
    finally:
        torch.cuda.set_sync_debug_mode("default")
