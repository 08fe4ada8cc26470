"""Four-bit floats: the table, the scale rule, the published vectors and errors."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.vectors import X16

from shoal.compression import codec
from shoal.compression.codec import PayloadError
from shoal.compression.codecs.fp4 import MAGNITUDES, TOP_EXPONENT, Floats

FORMATS = pytest.mark.parametrize("name", ["e3m0", "e2m1"])


def plain(name: str) -> codec.Codec:
    return codec.make("fp4", {"format": name, "entropy": "none"})


def slow(x: list[float], name: str) -> list[int]:
    """Return what one block decodes to, by searching everything."""
    table, largest = MAGNITUDES[name], max(abs(v) for v in x)
    exponent = 0
    while table[-1] * 2**exponent < largest and exponent < TOP_EXPONENT[name]:
        exponent += 1
    found = []
    for value in x:
        by_code = [(abs(abs(value) / 2**exponent - m), c % 2, c) for c, m in enumerate(table)]
        code = min(by_code)[2]
        found.append((-1 if value < 0 else 1) * table[code] * 2**exponent)
    return found


@pytest.mark.parametrize(
    ("name", "exponent", "nibbles", "error"),
    [
        # x is 2^20 times the published vector, whose scales are 2^-2 and 2^-4 under tables that
        # begin at 1/2 and 1/4 instead of 1
        ("e2m1", 20 - 2 - 1, "e130500ac092410c", 0.0161),
        ("e3m0", 20 - 4 - 2, "f463691de0c5632e", 0.0327),
    ],
)
def test_the_published_vector(name: str, exponent: int, nibbles: str, error: float) -> None:
    x = torch.tensor(X16) * 2**20
    payload, decoded = plain(name).encode(x)
    assert payload.hex() == f"{exponent:02x}00{nibbles}"
    relative = (x.double() - decoded.values).square().sum() / x.double().square().sum()
    assert float(relative) == pytest.approx(error, abs=1e-4)


@FORMATS
@settings(max_examples=200, deadline=None)
@given(
    x=st.lists(st.floats(-2e9, 2e9, width=32), min_size=1, max_size=32),
    scale=st.sampled_from([1.0, 2.0**-20, 2.0**-28]),
)
def test_every_element_goes_to_the_nearest_and_ties_to_the_even_code(
    name: str, x: list[float], scale: float
) -> None:
    x = [float(np.float32(v * scale)) for v in x]
    assert plain(name).encode(torch.tensor(x)).decoded.values.tolist() == slow(x, name)


@FORMATS
def test_ties(name: str) -> None:
    table = MAGNITUDES[name]
    middles = [(a + b) / 2 for a, b in itertools.pairwise(table)]
    found = plain(name).encode(torch.tensor([*middles, float(table[-1])])).decoded.values.tolist()
    assert found[:-1] == [table[0], table[2], table[2], table[4], table[4], table[6], table[6]]


@pytest.mark.parametrize(
    ("name", "least", "most"), [("e2m1", 0.010, 0.015), ("e3m0", 0.033, 0.040)]
)
def test_relative_error_on_gaussian_input(name: str, least: float, most: float) -> None:
    """1.0-1.4 % and 3.3-3.8 % with a scale that fits; a power of two costs a little more."""
    x = torch.randn(1 << 18, generator=torch.Generator().manual_seed(0)) * 20_000
    payload, decoded = codec.make("fp4", {"format": name}).encode(x)
    assert least < float((x - decoded.values).norm() ** 2 / x.norm() ** 2) < most
    assert len(payload) * 8 / len(x) < 4.1


@FORMATS
def test_the_largest_elements_stay_within_int32(name: str) -> None:
    x = torch.tensor([3e38, -3e38, 1.0])
    values = plain(name).encode(x).decoded.values.tolist()
    top = MAGNITUDES[name][-1] << TOP_EXPONENT[name]
    assert values == [top, -top, 0]
    assert top < 2**31 <= 2 * top


@FORMATS
def test_other_forms_of_the_same_content_are_refused(name: str) -> None:
    part = plain(name)
    zeros = part.encode(torch.zeros(40)).payload
    assert zeros == bytes(2 + 1 + 20)
    with pytest.raises(PayloadError, match="larger than its elements need"):
        part.decode(bytes([0, 1]) + zeros[2:], 40)
    with pytest.raises(PayloadError, match="outside int32"):
        part.decode(bytes([0, TOP_EXPONENT[name] + 1]) + zeros[2:], 40)
    with pytest.raises(PayloadError, match="sign"):
        part.decode(zeros[:-1] + b"\x80", 40)
    with pytest.raises(PayloadError, match="padding"):
        part.decode(bytes([0, 0, 0x10]), 1)


def test_content_is_packed_as_it_was_read() -> None:
    part = codec.make("fp4", {})
    payload = part.encode(torch.arange(-50.0, 51.0)).payload
    floats = part.unpack(payload, 101)  # type: ignore[attr-defined]
    assert isinstance(floats, Floats)
    assert part.pack(floats, 101) == payload  # type: ignore[attr-defined]


def test_settings_are_checked() -> None:
    with pytest.raises(ValueError, match="'e3m0' or 'e2m1'"):
        codec.make("fp4", {"format": "e4m3"})
