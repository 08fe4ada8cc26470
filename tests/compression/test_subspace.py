"""One subspace for the whole run: its buckets by hand, projections by an oracle, bad payloads."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from support import seeds

from shoal.compression import codec
from shoal.compression.codec import Origin, PayloadError
from shoal.compression.codecs import subspace
from shoal.compression.codecs.subspace import Subspace
from shoal.compression.settings import SettingError

RUN = bytes(range(16))
ORIGIN = Origin(RUN)
RAW = {"dimension": 5, "entropy": "none"}


def make(options: dict[str, Any], origin: Origin = ORIGIN) -> Subspace:
    part = codec.at(codec.make("subspace", options), origin)
    assert isinstance(part, Subspace)
    return part


def gaussian(size: int, *, scale: float = 1000.0, seed: int = 0) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)) * scale


def oracle(run: bytes, size: int, dimension: int) -> NDArray[np.float64]:
    """Return P, written out."""
    words = seeds.words(seeds.key(run, seeds.COMMON, 0, 0, domain=3), size)
    matrix = np.zeros((size, dimension))
    matrix[np.arange(size), seeds.below(words, dimension)] = 1 - 2.0 * (words & np.uint64(1))
    return matrix


# ---------------------------------------------------------------- by hand


def test_the_buckets_by_hand() -> None:
    """Of 12 elements, bucket 2 has none; from hashlib and SplitMix64, written down."""
    assert seeds.key(RUN, seeds.COMMON, 0, 0, domain=3) == 0x860A9011DD60DF23
    x = make(RAW).spread(torch.tensor([1, 2, 3, 4, 5]), 12)
    assert x.tolist() == [-1, -1, 1, 1, -4, -4, -5, -5, -1, 5, -2, 5]
    ones = make(RAW).gather(torch.ones(12))
    assert ones.tolist() == [-1, -1, 0, -2, 0]
    means = make(RAW).gather(x.float() + torch.arange(12) * 0, mean=True)
    assert means.tolist() == [1, 2, 0, 4, 5]


def test_a_payload_by_hand() -> None:
    """A scale (3) and 127 + mantissa of each number, squeezed each (0: as it is)."""
    payload = bytes([0, 3, 0, 127 + 1, 127 - 2, 127, 127 + 4, 127 - 127])
    found = make(RAW).decode(payload, 12)
    assert found.values.tolist() == [-3, -3, 3, 3, -12, -12, 381, 381, -3, -381, 6, -381]
    with pytest.raises(PayloadError, match="without parameters"):
        make(RAW).decode(bytes([0, 3, 0, 128, 125, 128, 131, 0]), 12)
    with pytest.raises(PayloadError, match="without parameters"):
        make(RAW).unpack(bytes([0, 3, 0, 128, 125, 128, 131, 0]), 12)


def test_fewer_elements_than_dimensions_have_as_many_buckets() -> None:
    part = make({"dimension": 4000, "bits": 4})
    for size in (1, 3, 700):
        assert part.dimensions(size) == size
        assert part.bound(size) == codec.make("dense", {"bits": 4}).bound(size)
        x = gaussian(size)
        u = torch.linalg.lstsq(
            torch.from_numpy(oracle(RUN, size, size)), x.double()[:, None], driver="gelsd"
        ).solution[:, 0]
        assert torch.allclose(part.gather(x, mean=True).double(), u, atol=1e-3)


# ---------------------------------------------------------------- laws


@settings(max_examples=100, deadline=None)
@given(size=st.integers(1, 300), dimension=st.integers(1, 60), seed=st.integers(0, 99))
def test_sums_are_products_with_the_matrix(size: int, dimension: int, seed: int) -> None:
    part, run = make({"dimension": dimension}, Origin(bytes([seed] * 32))), bytes([seed] * 16)
    dimensions = min(size, dimension)
    matrix, x = oracle(run, size, dimensions), gaussian(size, seed=seed)
    u = gaussian(dimensions, seed=seed + 1)
    assert np.array_equal(part.spread(u, size).numpy(), (matrix @ u.double().numpy()))
    close = 1e-6 * float(x.abs().max()) * size
    gathered = part.gather(x)
    assert gathered.dtype == torch.float32
    assert np.allclose(gathered.numpy(), matrix.T @ x.double().numpy(), rtol=1e-6, atol=close)
    count = matrix.astype(bool).sum(0)
    means = matrix.T @ x.double().numpy() / np.maximum(count, 1)
    assert np.allclose(part.gather(x, mean=True).numpy(), means, rtol=1e-6, atol=close)
    kept = torch.where(torch.from_numpy(count) > 0, u, 0)
    again = part.gather(part.spread(u, size), mean=True)
    assert torch.allclose(again, kept, rtol=1e-6, atol=1e-5)


def test_gather_is_what_autograd_does() -> None:
    part, size = make({"dimension": 50}), 2000
    u = gaussian(50, scale=1).requires_grad_()
    weights = gaussian(size, scale=1, seed=1)
    (part.spread(u, size) * weights).sum().backward()
    assert u.grad is not None
    assert torch.allclose(part.gather(weights), u.grad, rtol=1e-4, atol=1e-4)


def test_what_is_left_is_at_right_angles_to_the_subspace() -> None:
    part, size, x = make({"dimension": 50}), 5000, gaussian(5000)
    left = x - part.spread(part.gather(x, mean=True), size)
    assert float(part.gather(left).abs().max()) < 1e-2
    assert float(left.norm() / x.norm()) == pytest.approx((1 - 50 / size) ** 0.5, abs=5e-3)


@pytest.mark.parametrize("bits", [4, 8])
def test_what_was_decoded_is_sent_again_but_for_rounding(bits: int) -> None:
    """A number moves by half a step at most; the projection itself loses nothing."""
    part, top = make({"bits": bits, "block": 0}), 2 ** (bits - 1) - 1
    decoded = part.encode(gaussian(5000, scale=20_000)).decoded.dense()
    again = part.encode(decoded.float()).decoded.dense()
    assert float((again - decoded).abs().max()) <= float(decoded.abs().max()) / top / 2 + 1
    numbers = part.gather(decoded.float(), mean=True)
    assert torch.equal(part.spread(numbers, 5000), decoded.float())


def test_sums_of_updates_stay_in_the_subspace() -> None:
    """So all peers and turns train in the same few dimensions; runs have their own."""
    size, total = 3000, torch.zeros(3000, dtype=torch.int32)
    for turn in range(1, 5):
        part = make({"dimension": 40}, Origin(RUN, bytes([turn] * 32), turn))
        total += part.encode(gaussian(size, seed=turn)).decoded.dense()
    part = make({"dimension": 40})
    u = part.gather(total.float(), mean=True)
    assert torch.equal(part.spread(u, size), total.float())
    other = make({"dimension": 40}, Origin(bytes(16)))
    assert not torch.equal(other.spread(u, size), total.float())


def test_elements_are_spread_evenly_and_signs_are_fair() -> None:
    """All buckets, and all signs, within five standard deviations of what chance would give."""
    size, dimension = 200_000, 100
    part = make({"dimension": dimension})
    ids = part.spread(torch.arange(1, dimension + 1), size)
    counts = ids.abs().bincount(minlength=dimension + 1)[1:].double()
    assert float((counts - size / dimension).abs().max()) < 5 * (size / dimension) ** 0.5
    assert abs(int(ids.sign().sum())) < 5 * size**0.5
    sums = part.gather(torch.ones(size))
    assert float((sums / counts.sqrt()).abs().max()) < 5


def test_any_number_of_threads_gives_the_same_numbers() -> None:
    before, x, found = torch.get_num_threads(), gaussian(300_000), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            subspace._buckets.cache_clear()
            part = make({})
            found.append((part.gather(x), part.encode(x).payload))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0][0], found[1][0])
    assert found[0][1] == found[1][1]


def test_long_vectors_are_taken_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    part, x = make({"dimension": 9}), gaussian(1000)
    whole = part.gather(x)
    monkeypatch.setattr(subspace, "_SLAB", 300)
    subspace._buckets.cache_clear()
    assert torch.equal(part.gather(x), whole)


def test_tables_are_made_once_and_few_are_kept() -> None:
    subspace._buckets.cache_clear()
    for turn in range(3):
        for size in (100, 200):
            make({}, Origin(RUN, bytes(32), turn)).encode(gaussian(size))
    found = subspace._buckets.cache_info()
    assert found.misses == 2
    assert found.currsize <= found.maxsize == subspace.TABLES
    table = subspace._buckets(RUN, 1000, 10, torch.device("cpu"))
    assert table.place.dtype == torch.int32


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda_gives_what_the_cpu_gives() -> None:
    part, x = make({}), gaussian(1_000_000)
    there = part.gather(x.cuda())
    assert there.is_cuda
    assert torch.equal(there.cpu(), part.gather(x))
    assert torch.equal(part.spread(there, len(x)).cpu(), part.spread(there.cpu(), len(x)))


# ---------------------------------------------------------------- what does not fit


def test_numbers_that_do_not_fit() -> None:
    part = make({"dimension": 10})
    for wrong in (torch.zeros(9), torch.zeros(11), torch.zeros(2, 5)):
        with pytest.raises(ValueError, match="wanted 10 numbers"):
            part.spread(wrong, 100)
    for bad in (math.nan, math.inf):
        with pytest.raises(ValueError, match="NaN or infinite"):
            part.gather(torch.tensor([1.0, bad]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dimension": 0}, "dimension = 0"),
        ({"dimension": (1 << 24) + 1}, "dimension"),
        ({"bits": 2}, "use 4 or 8"),
        ({"bits": 0}, "use 4 or 8"),
        ({"block": 17}, "block = 17"),
        ({"entropy": "morse"}, "entropy"),
    ],
)
def test_settings_that_have_no_layout(options: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        codec.make("subspace", options)


def test_a_librarys_streams_are_not_for_the_ledger() -> None:
    assert make({}).inexact == ""
    assert make({"entropy": "zstd"}).inexact
