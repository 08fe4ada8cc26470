"""Random-k by strata: indices from the seed alone, equal chances, no bias where none is meant."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from shoal.compression import codec, scales, selection, splitmix
from shoal.compression.codec import INT32_MAX, PayloadError
from shoal.compression.settings import SettingError


def gaussian(size: int, *, scale: float = 20_000.0, seed: int = 0) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)) * scale


def words(key: int, count: int) -> NDArray[np.uint64]:
    """SplitMix64 in numpy's unsigned integers."""
    z = np.uint64(key & (2**64 - 1)) + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(
        0x9E3779B97F4A7C15
    )
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(z ^ (z >> np.uint64(31)))


def drawn(seed: int, size: int, count: int) -> list[int]:
    """One index of each stratum, in Python's integers."""
    found = []
    for i, word in enumerate(words(seed, count).tolist()):
        start, end = i * size // count, (i + 1) * size // count
        found.append(start + ((word >> 32) * (end - start) >> 32))
    return found


@settings(max_examples=80, deadline=None)
@given(seed=st.integers(0, 2**64 - 1), size=st.integers(1, 5000), density=st.floats(0.001, 0.5))
def test_the_seed_says_which_index_of_each_stratum_is_kept(
    seed: int, size: int, density: float
) -> None:
    count = max(1, int(size * density))
    index, length = selection.one_of_each(seed, size, count)
    assert index.tolist() == drawn(seed, size, count)
    assert int(length.sum()) == size
    assert int(length.max() - length.min()) <= 1


def test_known_indices_of_a_known_seed() -> None:
    """So that no change of the generator or of the strata goes unnoticed."""
    index, _ = selection.one_of_each(0x0123456789ABCDEF, 16, 4)
    assert index.tolist() == drawn(0x0123456789ABCDEF, 16, 4) == [0, 7, 8, 14]
    large, _ = selection.one_of_each(1234567, 2**31 - 1, 3)
    assert large.tolist() == drawn(1234567, 2**31 - 1, 3)


def test_the_payload_carries_the_seed_and_no_index() -> None:
    part: Any = codec.make("random", {"density": 1 / 16, "entropy": "none", "bits": 4})
    x = gaussian(4096)
    payload, decoded = part.encode(x, key=99)
    seed = int.from_bytes(payload[1:9], "little")
    assert seed == int(words(99, 1)[0])
    assert decoded.indices is not None
    assert decoded.indices.tolist() == drawn(seed, 4096, 256)
    assert len(payload) == 1 + 8 + (1 + 1) + (1 + 256 // 2)  # version, seed, scale, mantissas
    assert part.encode(x, key=100).decoded.indices.tolist() != decoded.indices.tolist()


@pytest.mark.parametrize(("size", "count"), [(64, 4), (63, 4), (1000, 7)])
def test_every_element_of_a_stratum_is_as_likely(size: int, count: int) -> None:
    """Chi-square over 5000 seeds stays within five standard deviations of its mean."""
    seeds, hits = 5000, torch.zeros(size, dtype=torch.int64)
    for seed in splitmix.words(5, seeds).tolist():
        hits[selection.one_of_each(seed, size, count)[0]] += 1
    _, length = selection.one_of_each(0, size, count)
    expected = (seeds / length.double()).repeat_interleave(length)
    chi_square = float(((hits - expected).square() / expected).sum())
    freedom = size - count
    assert abs(chi_square - freedom) < 5 * (2 * freedom) ** 0.5


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_contractive_values_are_within_half_a_step_of_the_kept(bits: int) -> None:
    x = gaussian(40_000).round()
    decoded = codec.make("random", {"density": 0.1, "bits": bits}).encode(x, key=3).decoded
    assert decoded.indices is not None
    kept = x[decoded.indices].long()
    for block, values in zip(kept.split(256), decoded.values.long().split(256), strict=True):
        if bits == 2:
            wanted = 1.5 * float(block.abs().double().mean())
            scale = int(values.abs().max())
            assert abs(scale - wanted) <= wanted / 16 + 1
            levels = torch.tensor([-scale, 0, scale])
            nearest = (block[:, None] - levels).abs().amin(1)
            assert torch.equal((block - values).abs(), nearest)
        else:
            top = 2 ** (bits - 1) - 1
            scale = int(scales.of(scales.up((block.abs().max()[None] + top - 1) // top)))
            assert bool((values % scale == 0).all())
            assert 2 * int((block - values).abs().max()) <= scale


@settings(max_examples=60, deadline=None)
@given(data=st.data(), bits=st.sampled_from([1, 2, 3, 8]))
def test_the_residual_of_contractive_values_never_grows(data: st.DataObject, bits: int) -> None:
    values = data.draw(
        st.lists(st.integers(-20, 20) | st.integers(-(2**24), 2**24), min_size=1, max_size=300)
    )
    x = torch.tensor(values, dtype=torch.float64)
    part = codec.make("random", {"density": 0.5, "bits": bits})
    decoded = part.encode(x.float(), key=data.draw(st.integers(0, 9))).decoded.dense()
    before, after = x.square().sum(), (x - decoded).square().sum()
    assert float(after) <= float(before)


def test_contractive_leaves_one_minus_the_density_on_average() -> None:
    """δ = k/d: enumeration over keys, values fine enough not to matter."""
    x = gaussian(256)
    part = codec.make("random", {"density": 0.25, "bits": 8})
    left = [
        float((x - part.encode(x, key=key).decoded.dense()).double().square().sum())
        for key in range(600)
    ]
    ratio = torch.tensor(left) / float(x.double().square().sum())
    assert abs(float(ratio.mean()) - 0.75) < 5 * float(ratio.std()) / 600**0.5 + 1e-4


@pytest.mark.parametrize(("bits", "scale"), [(1, 0.7), (2, 3.0), (4, 0.7), (8, 1e5)])
def test_unbiased_means_are_the_vector_even_below_one_quantum(bits: int, scale: float) -> None:
    part = codec.make("random", {"density": 0.25, "bits": bits, "scaling": "unbiased"})
    x, keys = gaussian(43, scale=scale), 2000  # strata of 4 and of 5
    decoded = torch.stack([part.encode(x, key=k).decoded.dense() for k in range(keys)]).double()
    error = decoded.std(0).clamp(min=1e-9) / keys**0.5
    assert float(((decoded.mean(0) - x.double()).abs() / error).max()) < 5


def test_unbiased_variance_is_at_most_omega() -> None:
    """E‖Q(x) - x‖² ≤ (d/k - 1)‖x‖² for values fine enough not to matter."""
    part = codec.make("random", {"density": 0.25, "scaling": "unbiased"})
    x = gaussian(256)
    errors = [
        float((part.encode(x, key=k).decoded.dense() - x).double().square().sum())
        for k in range(400)
    ]
    omega = torch.tensor(errors).mean() / x.double().square().sum()
    assert 0.9 * 3 < float(omega) < 1.05 * 3


def test_unbiased_values_beyond_int32_are_cut_off() -> None:
    part = codec.make("random", {"density": 0.25, "scaling": "unbiased"})
    decoded = part.encode(torch.full((64,), -2e9), key=1).decoded
    assert int(decoded.values.abs().max()) <= INT32_MAX
    assert int(decoded.values.max()) < -(2**30)


@settings(max_examples=60, deadline=None)
@given(
    size=st.integers(1, 2000),
    density=st.floats(0.001, 0.5),
    bits=st.integers(1, 8),
    mode=st.sampled_from(["auto", "none", "huffman"]),
    scaling=st.sampled_from(["contractive", "unbiased"]),
)
def test_no_payload_is_longer_than_the_bound(
    size: int, density: float, bits: int, mode: str, scaling: str
) -> None:
    options = {"density": density, "bits": bits, "entropy": mode, "scaling": scaling}
    part = codec.make("random", options)
    for x in (gaussian(size), torch.rand(size, generator=torch.Generator().manual_seed(1)) * 2e9):
        payload, decoded = part.encode(x, key=size)
        assert len(payload) <= part.bound(size)
        assert torch.equal(part.decode(payload, size).dense(), decoded.dense())


def test_what_no_encoder_says_is_refused() -> None:
    part: Any = codec.make("random", {"density": 0.25, "bits": 3})
    read = part.unpack(part.encode(gaussian(400)).payload, 400)
    codes, said = read.groups
    for groups, message in (
        (read.groups._replace(codes=torch.full_like(codes, 255)), "outside int32"),
        (read.groups._replace(codes=torch.full_like(codes, 231)), "outside int32"),
        (read.groups._replace(codes=torch.zeros_like(codes)), "scale zero"),
    ):
        with pytest.raises(PayloadError, match=message):
            part.decode(part.pack(read._replace(groups=groups), 400), 400)
    with pytest.raises(PayloadError, match="unknown version"):
        part.decode(b"\7" + part.pack(read, 400)[1:], 400)
    assert int(said.max()) <= 6


@pytest.mark.parametrize(
    "options",
    [{"density": 0.0}, {"density": 0.51}, {"bits": 0}, {"bits": 9}, {"scaling": "none"}],
)
def test_settings_without_a_layout_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(SettingError, match="use"):
        codec.make("random", options)
