"""Natural compression: powers of two, the right mean, the published variance."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.compression import codec
from shoal.compression.codec import PayloadError

STOCHASTIC = codec.make("natural", {})
PLAIN = codec.make("natural", {"entropy": "none"})
NEAREST = codec.make("natural", {"rounding": "nearest"})


def draws(x: list[float], keys: int) -> torch.Tensor:
    vector = torch.tensor(x)
    return torch.stack([PLAIN.encode(vector, key=k).decoded.values for k in range(keys)])


def test_the_two_neighbours_come_with_the_published_probabilities() -> None:
    """2.5 → 2 with 3/4 and 4 with 1/4; -3 → -2 or -4; 1 and 2^30 stay; 1/4 → 1 with 1/4."""
    found = draws([2.5, -3.0, 1.0, 2.0**30, 0.25, 0.0], 4000)
    assert found[:, 0].unique().tolist() == [2, 4]
    assert found[:, 1].unique().tolist() == [-4, -2]
    assert bool((found[:, 2] == 1).all())
    assert bool((found[:, 3] == 2**30).all())
    assert found[:, 4].unique().tolist() == [0, 1]
    assert bool((found[:, 5] == 0).all())
    error = 5 * (0.25 / 4000) ** 0.5
    assert abs(float((found[:, 0] == 4).double().mean()) - 0.25) < error
    assert abs(float((found[:, 1] == -4).double().mean()) - 0.5) < error
    assert abs(float((found[:, 4] == 1).double().mean()) - 0.25) < error


@settings(max_examples=50, deadline=None)
@given(value=st.floats(-(2.0**30), 2.0**30, width=32), key=st.integers(0, 2**64 - 1))
def test_the_mean_is_the_input(value: float, key: int) -> None:
    """Bernstein's inequality: six standard errors, and some of the rarer of the two outcomes."""
    count = 20_000
    power = 2.0 ** math.floor(math.log2(abs(value))) if abs(value) >= 1 else 1.0
    share = abs(value) / power % 1
    mean = float(PLAIN.encode(torch.full((count,), value), key=key).decoded.values.double().mean())
    deviation = power * (share * (1 - share)) ** 0.5
    assert abs(mean - value) <= 6 * deviation / count**0.5 + 12 * power / count


def test_the_variance_is_at_most_an_eighth_of_the_square() -> None:
    x = torch.randn(200_000, generator=torch.Generator().manual_seed(0)) * 1e5
    error = STOCHASTIC.encode(x, key=3).decoded.values.double() - x.double()
    # On a uniform fraction f the mean of (2-f)(f-1)/f² is 3·ln 2 - 2 = 0.079; the bound is 1/8.
    assert 0.07 < float(error.square().sum() / x.double().square().sum()) < 0.125


@settings(max_examples=100, deadline=None)
@given(x=st.lists(st.floats(-1.5e9, 1.5e9, width=32), min_size=1, max_size=60))
def test_nearest_agrees_with_a_search_over_all_powers(x: list[float]) -> None:
    powers = np.array([0.0, *(2.0**e for e in range(31))])
    found = NEAREST.encode(torch.tensor(x)).decoded.values.double().numpy()
    exact = np.array(x, np.float32).astype(np.float64)
    least = np.abs(np.abs(exact)[:, None] - powers).min(1)
    assert bool((np.abs(found - exact) == least).all())
    large = np.abs(exact) >= 1
    assert bool(
        (((found - exact) ** 2)[large] <= exact[large] ** 2 / 9 + 1e-6).all()
        or max(np.abs(exact)) > 2**30
    )


def test_nine_bits_become_less_than_four() -> None:
    x = torch.randn(1 << 17, generator=torch.Generator().manual_seed(0)) * 20_000
    assert len(STOCHASTIC.encode(x).payload) * 8 / len(x) < 3.7
    plain = codec.make("natural", {"entropy": "none"})
    assert len(plain.encode(x).payload) == 1 + len(x)


def test_symbols_that_mean_nothing_are_refused() -> None:
    plain = codec.make("natural", {"entropy": "none"})
    for symbol in (32, 64, 255):
        with pytest.raises(PayloadError):
            plain.decode(bytes([0, 1, symbol]), 2)
    assert plain.decode(bytes([0, 33, 63]), 2).values.tolist() == [-1, -(2**30)]


def test_settings_are_checked() -> None:
    with pytest.raises(ValueError, match="'stochastic' or 'nearest'"):
        codec.make("natural", {"rounding": "up"})
    with pytest.raises(ValueError, match="entropy"):
        codec.make("natural", {"entropy": "gzip"})
