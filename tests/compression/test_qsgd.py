"""QSGD: levels beside the element, the right mean, the published bound on the variance."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.compression import codec, scales
from shoal.compression.codec import PayloadError
from shoal.compression.codecs import qsgd

NORMS = pytest.mark.parametrize("norm", ["l2", "max"])


def gaussian(size: int, scale: float = 20_000.0, seed: int = 0) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)) * scale


def draws(x: torch.Tensor, options: dict[str, object], keys: int) -> torch.Tensor:
    part = codec.make("qsgd", {"entropy": "none", **options})
    found = [part.encode(x, key=k).decoded.values for k in range(keys)]
    return torch.stack(found).double()


def test_the_published_numbers() -> None:
    """x = (0.3, -0.4, 0, 1.2), s = 4, N = 1.3, in units in which N/s is the integer 13."""
    x = torch.tensor([[0.3, 0.4, 0.0, 1.2]]) * 40
    assert qsgd.l2(x).tolist() == [52.0]
    chances = torch.arange(-(2**31), 2**31, 2**17, dtype=torch.int64).to(torch.int32)
    found = qsgd.rounded(
        x.expand(len(chances), 4), torch.full((len(chances),), 13), chances[:, None]
    )
    mean, up = found.mean(0), (found == found.amax(0)).double().mean(0)
    assert mean.tolist() == pytest.approx([0.92308, 1.23077, 0, 3.69231], abs=1e-4)
    assert up.tolist() == pytest.approx([0.92308, 0.23077, 1, 0.69231], abs=1e-4)
    variance = float((found.var(0, correction=0) * (13 / 40) ** 2).sum())
    assert variance == pytest.approx(0.04875, abs=1e-5)


@NORMS
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_mean_over_keys_is_the_input(norm: str, bits: int) -> None:
    x = torch.cat((gaussian(700), gaussian(300, scale=0.4), gaussian(100, scale=1e7)))
    keys = 600
    found = draws(x, {"bits": bits, "norm": norm, "block": 64}, keys)
    deviation = found.std(0) / keys**0.5
    score = ((found.mean(0) - x).abs() / deviation.clamp(min=1e-12))[deviation > 0]
    assert float(score.max()) < 5.5
    assert 0.8 < float(score.square().mean()) < 1.25  # 1 for a mean that is exactly right
    still = deviation == 0
    # Elements that never moved are levels themselves, or too small to have been drawn.
    assert bool((found.mean(0) - x).abs()[still].le(x.abs().max() / 20).all())


@NORMS
@pytest.mark.parametrize(("bits", "block"), [(2, 512), (4, 512), (4, 16), (8, 8192)])
def test_the_variance_is_within_the_published_bound(norm: str, bits: int, block: int) -> None:
    x, s = gaussian(block, seed=bits), 2 ** (bits - 1) - 1
    found = draws(x, {"bits": bits, "norm": norm, "block": block}, 30)
    variance = float((found - x.double()).square().sum(1).mean())
    published = min(block / s**2, math.sqrt(block) / s) * (s * unit(x, norm, s)) ** 2
    bound = published if norm == "l2" else block * unit(x, norm, s) ** 2 / 4
    assert variance <= bound
    assert unit(x, norm, s) * s <= 1.13 * float(x.norm() if norm == "l2" else x.abs().max()) + 8 * s


def unit(x: torch.Tensor, norm: str, s: int) -> int:
    exact = math.isqrt(sum(math.ceil(abs(v)) ** 2 for v in x.tolist()) - 1) + 1
    wanted = -(-(exact if norm == "l2" else math.ceil(float(x.abs().max()))) // s)
    return next(int(scale) for scale in scales.SCALES.tolist() if scale >= wanted)


@NORMS
@settings(max_examples=100, deadline=None)
@given(
    x=st.lists(st.floats(-(2.0**31) + 128, 2.0**31 - 128, width=32), min_size=1, max_size=40),
    key=st.integers(0, 2**64 - 1),
)
def test_every_element_goes_to_a_level_beside_it(norm: str, x: list[float], key: int) -> None:
    vector = torch.tensor(x)
    part = codec.make("qsgd", {"bits": 3, "norm": norm, "block": 16, "entropy": "none"})
    payload, decoded = part.encode(vector, key=key)
    for block in range(-(-len(x) // 16)):
        step = int(scales.SCALES[payload[block]])
        here = slice(16 * block, 16 * block + 16)
        for value, sent in zip(x[here], decoded.values[here].tolist(), strict=True):
            if abs(value) <= 3 * step:
                assert sent % max(step, 1) == 0
                assert abs(sent - value) < max(step, 1)


@settings(max_examples=200, deadline=None)
@given(x=st.lists(st.floats(0, 2.0**31 - 128, width=32), min_size=1, max_size=100))
def test_the_integer_norm_is_just_above_the_norm(x: list[float]) -> None:
    exact = math.sqrt(math.fsum(v * v for v in np.array(x, np.float32).astype(float).tolist()))
    found = float(qsgd.l2(torch.tensor([x])))
    assert exact * (1 - 1e-12) <= found <= exact * (1 + 2**-18) + 2 * math.sqrt(len(x)) + 1


def test_bits_an_element() -> None:
    x = gaussian(1 << 17)
    for bits, norm, most in ((2, "l2", 0.36), (4, "l2", 1.1), (4, "max", 3.2), (8, "l2", 4.6)):
        payload = codec.make("qsgd", {"bits": bits, "norm": norm}).encode(x).payload
        assert len(payload) * 8 / len(x) < most


def test_what_no_encoder_says_is_refused() -> None:
    part = codec.make("qsgd", {"bits": 4, "entropy": "none"})
    zeros = part.encode(torch.zeros(3)).payload
    assert zeros == bytes([0, 0, 7 + 15 * 7, 7])
    with pytest.raises(PayloadError, match="unit zero"):
        part.decode(bytes([0, 0, 8 + 15 * 7, 7]), 3)
    with pytest.raises(PayloadError, match="outside int32"):
        part.decode(bytes([231, 0, 7 + 15 * 7, 7]), 3)
    with pytest.raises(PayloadError):
        part.decode(bytes([1, 0, 225, 7]), 3)
    with pytest.raises(PayloadError, match="padding"):
        part.decode(bytes([1, 0, 7, 7 + 15]), 3)


@pytest.mark.parametrize(
    ("options", "hint"),
    [({"bits": 1}, "use 2 to 8"), ({"block": 8}, "use 16 to 8192"), ({"norm": "l1"}, "'l2' or")],
)
def test_settings_are_checked(options: dict[str, object], hint: str) -> None:
    with pytest.raises(ValueError, match=hint):
        codec.make("qsgd", options)
