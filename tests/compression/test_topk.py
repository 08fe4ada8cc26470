"""Top-k of a whole vector: what is chosen, what it costs, and what it leaves."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from shoal.compression import codec, entropy, parallel, places, selection
from shoal.compression.codec import INT32_MAX, PayloadError
from shoal.compression.settings import SettingError

# The vector of 16 that hand-made oracles are stated for, in units of q = 2⁻²⁰.
X16 = 2**20 * torch.tensor(
    [0.1, -0.9, 0.05, 0.4, -0.02, 0.7, -0.3, 0.01, 0.0, -0.6, 0.2, -0.15, 0.08, 0.55, -0.45, 0.03]
)
UNIT = 2.0**20
SELECTS = pytest.mark.parametrize("select", ["exact", "threshold"])


def gaussian(size: int, *, scale: float = 20_000.0, seed: int = 0) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)) * scale


def oracle(x: NDArray[np.float32], keep: int) -> NDArray[np.int64]:
    """Larger |x| first, then the smaller index, by sorting everything."""
    order = np.lexsort((np.arange(len(x)), -np.abs(x).astype(np.float64)))
    return np.sort(order[:keep])


def left(x: torch.Tensor, part: codec.Codec, key: int = 0) -> float:
    """Return ‖x - C(x)‖² / ‖x‖²."""
    decoded = part.encode(x, key=key).decoded.dense().double()
    return float((x.double() - decoded).square().sum() / x.double().square().sum())


def test_the_four_largest_of_sixteen_at_their_mean_magnitude() -> None:
    payload, decoded = codec.make("topk", {"density": 0.25}).encode(X16)
    assert decoded.indices is not None
    assert decoded.indices.tolist() == [1, 5, 9, 13]
    assert (decoded.values / UNIT).tolist() == [-0.6875, 0.6875, -0.6875, 0.6875]
    residual = ((X16 - decoded.dense()) / UNIT).double().square().sum()
    assert float(residual) == pytest.approx(0.60717, abs=5e-6)
    # version, unit 0.6875 · 2²⁰, raw signs 0101, gaps 1 3 3 3 with b = 1
    assert payload.hex() == "0000000b0000050f55"


def test_compefts_scalar_is_the_deviation_of_the_whole_vector() -> None:
    decoded = codec.make("topk", {"density": 0.25, "magnitude": "std"}).encode(X16).decoded
    assert (decoded.values.abs() / UNIT).tolist() == pytest.approx([0.40760887] * 4, abs=1e-6)
    residual = ((X16 - decoded.dense()) / UNIT).double().square().sum()
    assert float(residual) == pytest.approx(0.92053, abs=5e-6)
    scaled = codec.make("topk", {"density": 0.25, "magnitude": "std", "alpha": 2.5}).encode(X16)
    assert int(scaled.decoded.values.abs()[0]) == pytest.approx(2.5 * 0.40760887 * UNIT, abs=1)


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(st.integers(-5, 5) | st.integers(-(2**30), 2**30), min_size=1, max_size=200),
    density=st.floats(0.01, 0.5),
)
def test_exactly_the_largest_are_kept_and_the_smaller_indices_of_equals(
    values: list[int], density: float
) -> None:
    x = torch.tensor(values, dtype=torch.float32)
    keep = max(1, int(len(x) * density))
    assert selection.top(x, keep).tolist() == oracle(x.numpy(), keep).tolist()


@pytest.mark.parametrize("kind", ["gaussian", "ties", "zeros", "equal", "one", "denormal"])
@pytest.mark.parametrize("keep", [1, 5000, 150_000])
def test_compiled_loops_choose_what_torch_chooses(kind: str, keep: int) -> None:
    size = parallel.LARGE + 777
    x = {
        "gaussian": gaussian(size),
        "ties": gaussian(size, scale=1.5).round(),
        "zeros": torch.zeros(size),
        "equal": torch.full((size,), -7.0),
        "one": torch.nn.functional.pad(torch.tensor([-3e38]), (size - 1, 0)),
        "denormal": gaussian(size, scale=1e-40),
    }[kind]
    assert parallel.kernels(size, x) is not None
    wanted = selection.top_of_rows(selection.magnitude_bits(x)[None], keep)
    for threads in (1, 2):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            assert torch.equal(selection.top(x, keep), wanted)
        finally:
            torch.set_num_threads(before)


@SELECTS
@pytest.mark.parametrize("options", [{}, {"bits": 4}, {"density": 0.2}])
def test_compiled_loops_give_the_payload_of_torch(
    select: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    x = gaussian(parallel.LARGE + 5)
    part = codec.make("topk", {"select": select, **options})
    payload = part.encode(x, key=7).payload
    monkeypatch.setattr(parallel, "LARGE", 1 << 60)
    assert part.encode(x, key=7).payload == payload


@pytest.mark.parametrize("size", [100, 20_000, parallel.LARGE])
@pytest.mark.parametrize("power", [1, 3, 7])
@pytest.mark.parametrize("density", [0.3, 1 / 64, 0.001])
def test_a_threshold_keeps_all_above_it_and_about_as_many_as_asked(
    size: int, power: int, density: float
) -> None:
    x = gaussian(size, scale=1.0) ** power
    keep = max(1, int(size * density))
    for key in range(3):
        kept = selection.threshold(x, keep, key)
        assert selection.least_kept(keep) <= len(kept) <= selection.most_kept(keep)
        assert kept.tolist() == oracle(x.numpy(), len(kept)).tolist()
        assert torch.equal(kept, selection.threshold(x, keep, key))


def test_a_threshold_that_no_sample_sees_falls_back_to_exactly_k() -> None:
    """Equal magnitudes are all above any threshold; a few huge ones are missed by the sample."""
    equal = torch.full((50_000,), 3.0)
    assert selection.threshold(equal, 500, 0).tolist() == list(range(500))
    few = torch.zeros(300_000)
    few[torch.arange(40) * 7001] = 1e6
    kept = selection.threshold(few, 1000, 0)
    assert kept.tolist() == oracle(few.numpy(), 1000).tolist()


@pytest.mark.parametrize("size", [1000, parallel.LARGE])
@pytest.mark.parametrize("bad", [float("nan"), -float("inf")])
@SELECTS
def test_every_element_is_looked_at_for_nan(select: str, bad: float, size: int) -> None:
    x = gaussian(size)
    x[-1] = bad
    with pytest.raises(ValueError, match="NaN or infinite"):
        codec.make("topk", {"select": select}).encode(x)


@SELECTS
@settings(max_examples=60, deadline=None)
@given(data=st.data(), bits=st.sampled_from([1, 2, 3, 5, 8]))
def test_the_residual_shrinks_by_the_density_in_one_bit_by_what_it_is_due(
    select: str, data: st.DataObject, bits: int
) -> None:
    """Contraction: with the mean magnitude δ = (Σ|kept|)² / (k Σx²); more bits never leave more."""
    values = data.draw(
        st.lists(st.integers(-20, 20) | st.integers(-(2**20), 2**20), min_size=8, max_size=300)
    )
    x = torch.tensor(values, dtype=torch.float32)
    if not bool(x.any()):
        return
    part = codec.make("topk", {"density": 0.25, "bits": bits, "select": select})
    decoded = part.encode(x).decoded
    assert decoded.indices is not None
    kept = x[decoded.indices].double().abs()
    delta = float(kept.sum() ** 2 / (len(kept) * x.double().square().sum()))
    # The magnitude is rounded to an integer, which costs at most k/4 in squares.
    rounding = len(kept) / 4 / float(x.double().square().sum())
    assert left(x, part) <= 1 - delta + rounding + 1e-12


def test_the_residual_shrinks_beside_one_huge_element() -> None:
    x = gaussian(4096, scale=1000.0)
    x[5] = 2e9
    for bits in (1, 2, 4, 8):
        part = codec.make("topk", {"density": 0.25, "bits": bits})
        assert left(x, part) < 1
    assert left(x, codec.make("topk", {"density": 0.25, "bits": 8})) < 0.02


def test_energy_kept_of_a_gaussian_is_that_of_its_tail() -> None:
    x = gaussian(1 << 20)
    for density, energy in ((0.25, 0.724), (0.1, 0.440), (0.05, 0.280), (1 / 64, 0.120)):
        kept = selection.top(x, int(len(x) * density))
        assert float(x[kept].square().sum() / x.square().sum()) == pytest.approx(energy, abs=0.002)


@pytest.mark.parametrize(("density", "entropy_bound"), [(0.05, 0.3364), (0.2, 0.9219)])
@SELECTS
def test_a_ternary_update_takes_its_entropy(
    select: str, density: float, entropy_bound: float
) -> None:
    """H(p) + p bits a parameter, at most 3 % above for the number that is kept."""
    x = gaussian(1 << 20)
    payload, decoded = codec.make("topk", {"density": density, "select": select}).encode(x)
    p = len(decoded.values) / len(x)
    own = -p * math.log2(p) - (1 - p) * math.log2(1 - p) + p
    assert own == pytest.approx(entropy_bound, rel=0.06)
    assert own < len(payload) * 8 / len(x) < 1.03 * own


def test_each_tensor_by_itself_keeps_its_own_largest() -> None:
    shapes = ((10, 30), (7,), (0, 4), (200,))
    x = torch.cat([gaussian(300, scale=1e5), gaussian(7, scale=10.0), gaussian(200, scale=100.0)])
    for select in ("exact", "threshold"):
        options = {"density": 0.1, "scope": "tensor", "select": select}
        part = codec.make("topk", options, shapes=shapes)
        payload, decoded = part.encode(x)
        assert decoded.indices is not None
        for start, end in ((0, 300), (300, 307), (307, 507)):
            here = (decoded.indices >= start) & (decoded.indices < end)
            kept = decoded.indices[here] - start
            assert kept.tolist() == oracle(x[start:end].numpy(), len(kept)).tolist()
            magnitude = x[start:end][kept].round().abs().mean()
            assert float((decoded.values[here].abs() - magnitude).abs().max()) <= 0.5
        again = part.decode(payload, 507)
        assert torch.equal(again.dense(), decoded.dense())
        assert len(payload) <= part.bound(507)
    together = codec.make("topk", {"density": 0.1}, shapes=shapes).encode(x).decoded
    assert together.indices is not None
    assert int(together.indices.max()) < 300
    with pytest.raises(ValueError, match="not made of tensors"):
        codec.make("topk", {"scope": "tensor"}, shapes=shapes).encode(x[:500])


@SELECTS
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_no_payload_is_longer_than_the_bound_however_places_fall(
    select: str, data: st.DataObject
) -> None:
    """Places at the end make the gaps' unary parts longest."""
    size = data.draw(st.integers(1, 400))
    options = {
        "density": data.draw(st.floats(0.003, 0.5)),
        "bits": data.draw(st.sampled_from([1, 3, 8])),
        "entropy": data.draw(st.sampled_from(["auto", "none", "huffman"])),
        "select": select,
    }
    part = codec.make("topk", options)
    x = torch.zeros(size)
    heavy = data.draw(st.integers(0, size - 1))
    x[heavy:] = torch.arange(size - heavy) * 1000.0 + 50.0
    payload, decoded = part.encode(x)
    assert len(payload) <= part.bound(size)
    assert torch.equal(part.decode(payload, size).dense(), decoded.dense())


def test_no_logarithm_decides_how_a_payload_of_the_ledger_is_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A library's logarithm may differ in its last bit; what peers decode may not."""

    def refuse(value: float) -> float:
        raise AssertionError(f"a logarithm of {value}")

    for name in ("log", "log1p", "log2"):
        monkeypatch.setattr(math, name, refuse)
    x = torch.randn(5000, generator=torch.Generator().manual_seed(0)) * 1000
    for name in codec.names():
        part = codec.make(name, {})
        payload, decoded = part.encode(x)
        assert torch.equal(part.decode(payload, 5000).dense(), decoded.dense())


def best_parameter(density: float) -> int:
    """Return b* = max(0, 1 + ⌊log2(ln((√5-1)/2) / ln(1-p))⌋), optimal for geometric gaps."""
    ratio = math.log((math.sqrt(5) - 1) / 2) / math.log1p(-density)
    return max(0, 1 + math.floor(math.log2(ratio)))


def test_rice_parameters_follow_from_integers_as_from_logarithms() -> None:
    size = 10**8
    table = {0.25: 1, 0.2: 2, 0.1: 3, 0.05: 4, 0.03: 4, 0.02: 5, 1 / 64: 5, 0.01: 6, 0.005: 7}
    for density, b in {**table, 0.001: 9, 0.5: 0, 0.99: 0}.items():
        count = round(size * density)
        assert places.parameter(count, size) == b == best_parameter(count / size)
    assert places.parameter(0, 5) == places.parameter(5, 5) == 0


@settings(max_examples=100, deadline=None)
@given(size=st.integers(1, 300), data=st.data())
def test_the_most_bytes_of_places_are_enough_for_every_number(
    size: int, data: st.DataObject
) -> None:
    least = data.draw(st.integers(0, size))
    most = data.draw(st.integers(least, size))
    worst = max(
        entropy.rice_bound(n, places.parameter(n, size), size - n) for n in range(least, most + 1)
    )
    assert places.most_bytes(least, most, size) == worst


@SELECTS
def test_values_and_counts_that_no_encoder_says_are_refused(select: str) -> None:
    size = 2000
    part: Any = codec.make("topk", {"density": 0.1, "select": select, "bits": 2})
    kept = part.unpack(part.encode(gaussian(size)).payload, size)
    for bad, message in (
        (kept._replace(units=[INT32_MAX], symbols=kept.symbols | 2), "outside int32"),
        (kept._replace(units=[2**32 - 1]), "outside int32"),
        (kept._replace(units=[0]), "magnitude zero"),
    ):
        with pytest.raises(PayloadError, match=message):
            part.decode(part.pack(bad, size), size)
    with pytest.raises(PayloadError, match="unknown version"):
        part.decode(b"\1" + part.pack(kept, size)[1:], size)
    if select == "threshold":
        for count in (0, 139, 261, 2**32 - 1):
            bad = kept._replace(counts=[count])
            with pytest.raises(PayloadError, match="where about 200 were expected"):
                part.decode(part.pack(bad, size), size)


def test_places_in_the_wrong_tensor_are_refused() -> None:
    part: Any = codec.make("topk", {"density": 0.1, "scope": "tensor"}, shapes=((50,), (50,)))
    kept = part.unpack(part.encode(gaussian(100)).payload, 100)
    at = kept.places.clone()
    at[:] = torch.arange(len(at))
    with pytest.raises(PayloadError, match="more or fewer"):
        part.decode(part.pack(kept._replace(places=at), 100), 100)


@pytest.mark.parametrize(
    "options",
    [
        {"density": 0.0},
        {"density": 0.6},
        {"bits": 9},
        {"select": "sampled"},
        {"scope": "model"},
        {"magnitude": "max"},
        {"magnitude": "std", "bits": 2},
        {"alpha": 0.0},
        {"alpha": float("nan")},
        {"entropy": "zip"},
    ],
)
def test_settings_without_a_layout_are_refused_with_what_to_use(options: dict[str, Any]) -> None:
    with pytest.raises(SettingError, match=r"use|must be above 0"):
        codec.make("topk", options)


def test_a_librarys_stream_is_not_for_the_ledger() -> None:
    assert not codec.make("topk", {}).inexact
    assert "library" in codec.make("topk", {"entropy": "zstd"}).inexact
