"""What every codec promises (compression/codec.py), for every name in the registry."""

import random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.codecs import VARIANTS

from shoal.compression import codec
from shoal.compression.codec import Combination, Contribution, Origin, PayloadError, written
from shoal.compression.codecs.subspace import Subspace
from shoal.compression.settings import SettingError

every = pytest.mark.parametrize(
    ("name", "options"), VARIANTS, ids=lambda v: v if isinstance(v, str) else str(v)
)
SIZES = (1, 2, 63, 64, 255, 256, 257, 4095, 4096, 4097, 10_000)


def gaussian(size: int, *, scale: float = 20_000.0, seed: int = 0) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)) * scale


def awkward(size: int) -> list[torch.Tensor]:
    one_hot = torch.zeros(size)
    one_hot[size // 2] = -3e9
    alternating = torch.ones(size) * 7
    alternating[::2] = -7
    return [
        gaussian(size),
        gaussian(size, scale=0.3),
        gaussian(size, scale=1e30),
        gaussian(size) ** 3,
        torch.zeros(size),
        torch.full((size,), 1e-40),
        torch.full((size,), -5.0),
        torch.full((size,), 2.0**31),
        one_hot,
        alternating,
    ]


def same(first: Contribution, second: Contribution) -> bool:
    if isinstance(first, Combination):
        assert isinstance(second, Combination)
        assert torch.equal(first.keys, second.keys)
        assert torch.equal(first.coefficients, second.coefficients)
    a, b = written(first), written(second)
    assert a.size == b.size
    assert (a.indices is None) == (b.indices is None)
    equal = torch.equal(a.values, b.values)
    return equal and (a.indices is None or torch.equal(a.indices, b.indices))  # type: ignore[arg-type]


def unbiased(part: codec.Codec) -> bool:
    """Return whether the law is E[decode] = x instead of a residual that shrinks."""
    return bool(getattr(part, "unbiased", False))


def within(part: codec.Codec, x: torch.Tensor) -> torch.Tensor:
    """Return the vector, or what of it lies where a codec that sends a subspace alone can go."""
    if not isinstance(part, Subspace):
        return x
    return part.spread(part.gather(x, mean=True), len(x))


@every
@pytest.mark.parametrize("size", SIZES)
def test_the_payload_decodes_to_what_encode_returned(
    name: str, options: dict[str, Any], size: int
) -> None:
    part = codec.make(name, options)
    for x in awkward(size):
        payload, decoded = part.encode(x)
        assert same(part.decode(payload, size), decoded)
        again = written(part.decode(payload, size))
        assert len(payload) <= part.bound(size)
        assert again.dense().shape == (size,)
        if not part.inexact:
            assert again.values.dtype == torch.int32
        if again.indices is not None:
            assert bool((again.indices.diff() > 0).all())
            assert 0 <= int(again.indices[0]) <= int(again.indices[-1]) < size


@every
def test_decoded_and_residual_are_exactly_the_input(name: str, options: dict[str, Any]) -> None:
    """The conservation law of error feedback, on vectors of integers, where it is exact."""
    part = codec.make(name, options)
    for seed in range(3):
        x = gaussian(9000, seed=seed).round()
        residual = x - part.encode(x).decoded.dense()
        assert torch.equal(residual.double() + part.encode(x).decoded.dense(), x.double())
        assert unbiased(part) or float(residual.norm()) < float(x.norm())


@every
def test_the_residual_of_a_residual_goes_to_zero(name: str, options: dict[str, Any]) -> None:
    """Nothing is lost for ever: encoding what was left, again and again, sends everything."""
    part = codec.make(name, options)
    if unbiased(part):
        pytest.skip("right on average, not in the end")
    x = within(part, gaussian(2048, scale=1000)).round()
    left, sent = x.clone(), torch.zeros(2048)
    for turn in range(1000):
        here = codec.at(part, Origin(turn=turn + 1))
        decoded = here.encode(left, key=turn).decoded.dense()
        left, sent = left - decoded, sent + decoded
        if float(left.norm()) < 0.15 * float(x.norm()):
            break
    assert torch.equal(sent + left, x)
    assert float(left.norm()) < 0.15 * float(x.norm())


@every
def test_unbiased_codecs_are_right_on_average(name: str, options: dict[str, Any]) -> None:
    """The mean over many keys is the vector, within five standard errors of every element."""
    part = codec.make(name, options)
    if not unbiased(part):
        pytest.skip("not unbiased")
    x, keys = gaussian(64, scale=1000).round(), 2000
    decoded = torch.stack([part.encode(x, key=key).decoded.dense() for key in range(keys)]).double()
    error = decoded.std(0).clamp(min=1e-9) / keys**0.5
    assert float(((decoded.mean(0) - x).abs() / error).max()) < 5


@every
def test_one_and_two_threads_give_the_same_bytes(name: str, options: dict[str, Any]) -> None:
    part = codec.make(name, options)
    x = gaussian(300_000)
    before, payloads = torch.get_num_threads(), set()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            payloads.add(part.encode(x).payload)
    finally:
        torch.set_num_threads(before)
    assert len(payloads) == 1


@every
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")
def test_cuda_gives_the_same_bytes_and_integers(name: str, options: dict[str, Any]) -> None:
    part = codec.make(name, options)
    for x in awkward(10_000):
        payload, decoded = part.encode(x)
        on_device = part.encode(x.cuda())
        assert on_device.payload == payload
        assert torch.equal(part.decode(payload, 10_000, "cuda").dense().cpu(), decoded.dense())


@every
def test_non_finite_vectors_are_refused(name: str, options: dict[str, Any]) -> None:
    part = codec.make(name, options)
    for bad in (float("nan"), float("inf"), -float("inf")):
        x = gaussian(500)
        x[123] = bad
        with pytest.raises(ValueError, match="NaN or infinite"):
            part.encode(x)


@every
def test_what_is_no_vector_of_float32_is_refused(name: str, options: dict[str, Any]) -> None:
    """Codecs compare the bits of numbers: other types would come out as other numbers, unnoticed.

    300 000 elements take the compiled loops, where there are any.
    """
    part = codec.make(name, options)
    for size in (1000, 300_000):
        for dtype in (torch.float64, torch.bfloat16, torch.int32):
            with pytest.raises(ValueError, match="give a vector of float32"):
                part.encode(gaussian(size).to(dtype))
        with pytest.raises(ValueError, match="give a vector of float32"):
            part.encode(gaussian(size).reshape(10, -1))
    with_gradient = gaussian(300_000).requires_grad_()
    assert part.encode(with_gradient).payload == part.encode(gaussian(300_000)).payload


@every
def test_no_vector_is_empty(name: str, options: dict[str, Any]) -> None:
    """Layouts have no empty fragments; asked for one, a decoder says so and nothing else."""
    part = codec.make(name, options)
    with pytest.raises(ValueError, match="give a vector"):
        part.encode(torch.zeros(0))
    for payload in (b"", bytes(1), bytes(3), bytes(part.bound(0)), b"\1" * 20):
        with pytest.raises(PayloadError):
            part.decode(payload, 0)


@every
def test_other_lengths_than_the_payloads_are_refused(name: str, options: dict[str, Any]) -> None:
    part = codec.make(name, options)
    payload = part.encode(gaussian(5000)).payload
    for cut in (0, 1, 2, len(payload) // 2, len(payload) - 1):
        if cut and codec.directed(name):
            continue  # fewer steps, or refused: tests of their own
        with pytest.raises(PayloadError):
            part.decode(payload[:cut], 5000)
    for tail in (b"\0", b"\1", bytes(100)):
        with pytest.raises(PayloadError):
            part.decode(payload + tail, 5000)
    for size in (1, 700, 9300, 10**6):
        if part.bound(size) == part.bound(5000):
            continue  # bytes do not depend on the size
        with pytest.raises(PayloadError):
            part.decode(payload, size)


@every
@settings(max_examples=150, deadline=None)
@given(data=st.binary(max_size=400), size=st.sampled_from([1, 7, 64, 300, 1000]))
def test_garbage_decodes_or_raises_payload_error(
    name: str, options: dict[str, Any], data: bytes, size: int
) -> None:
    part = codec.make(name, options)
    try:
        decoded = part.decode(data, size)
    except PayloadError:
        return
    assert len(data) <= part.bound(size)
    assert decoded.size == size


@every
@settings(max_examples=150, deadline=None)
@given(flips=st.lists(st.integers(0, 2**20), min_size=1, max_size=3), seed=st.integers(0, 3))
def test_flipped_bits_are_refused_or_are_another_canonical_payload(
    name: str, options: dict[str, Any], flips: list[int], seed: int
) -> None:
    """Whatever is accepted is what the packer makes of what was read: one form per content."""
    part: Any = codec.make(name, options)
    size = 1500
    payload = bytearray(part.encode(gaussian(size, seed=seed)).payload)
    for flip in flips:
        payload[flip // 8 % len(payload)] ^= 1 << flip % 8
    try:
        read = part.unpack(bytes(payload), size)
    except PayloadError:
        return
    assert part.pack(read, size) == bytes(payload)
    dense = part.decode(bytes(payload), size).dense().to(torch.int64)
    assert int(dense.abs().max()) < 2**31


@every
def test_decoding_takes_no_more_memory_than_the_size_allows(
    name: str, options: dict[str, Any]
) -> None:
    """A short payload for a huge size is refused by its length, before anything is allocated."""
    part = codec.make(name, options)
    payload = part.encode(gaussian(100)).payload
    if part.bound(100) == part.bound(2_000_000):
        pytest.skip("bytes do not depend on the size")
    with pytest.raises(PayloadError):
        part.decode(payload, 2_000_000)


def test_names_and_settings_are_checked_with_the_nearest_known() -> None:
    with pytest.raises(SettingError, match="did you mean 'sparse'"):
        codec.make("sparce", {})
    with pytest.raises(SettingError, match="did you mean 'density'"):
        codec.make("sparse", {"densty": 0.1})
    with pytest.raises(SettingError, match="must be int, got '3'"):
        codec.make("dense", {"levels": "3"})
    with pytest.raises(SettingError, match="density"):
        codec.make("sparse", {"density": 2})


def test_squares_are_summed_exactly_beyond_64_bits() -> None:
    values = torch.full((5_000_000,), -(2**31), dtype=torch.int32)
    values[1] = 3
    assert codec.sum_of_squares(values) == (5_000_000 - 1) * 2**62 + 9
    random_values = torch.from_numpy(
        np.random.default_rng(0).integers(-(2**31), 2**31, 1000, dtype=np.int32)
    )
    assert codec.sum_of_squares(random_values) == sum(int(v) ** 2 for v in random_values)


def test_python_random_is_not_touched() -> None:
    state = random.getstate()
    codec.make("sparse", {}).encode(gaussian(5000))
    assert random.getstate() == state
