"""Block-wise dynamic 8-bit: the published table and codes, exact decoding, small errors."""

import hashlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.vectors import X16

from shoal.compression import codec
from shoal.compression.codec import PayloadError
from shoal.compression.codecs import dynamic

PLAIN = codec.make("dynamic", {"entropy": "none"})
CODES = [191, 0, 175, 215, 91, 239, 47, 159, 127, 23, 199, 59, 187, 227, 35, 167]


def test_the_table_is_the_published_one() -> None:
    table = dynamic.numbers()
    digest = hashlib.sha256(table.astype("<f4").tobytes()).hexdigest()
    assert digest == "e732639a65f497b4ad684bb166a4467708255edd5207757de8b8f0c7e1fda89c"
    assert (len(table), table[127], table[255]) == (256, 0.0, 1.0)
    assert table[0] == pytest.approx(-0.99297, abs=1e-5)


def test_the_published_codes() -> None:
    x = torch.tensor(X16) * 2**20
    payload, decoded = PLAIN.encode(x)
    assert list(payload[5:]) == CODES
    assert int.from_bytes(payload[:4], "little") == round(0.9 * 2**20)
    relative = (x.double() - decoded.values).square().sum() / x.double().square().sum()
    assert float(relative) == pytest.approx(3.925e-5, rel=1e-3)


@settings(max_examples=200, deadline=None)
@given(x=st.lists(st.floats(-2e9, 2e9, width=32), min_size=1, max_size=256))
def test_codes_and_values_agree_with_a_search_in_python_integers(x: list[float]) -> None:
    vector = np.array(x, np.float32)
    largest = int(np.rint(np.abs(vector).max()))
    one_over = np.float32(1) / np.float32(largest) if largest else np.float32(0)
    scaled = np.clip(vector * one_over, -1, 1)
    codes = np.searchsorted(dynamic.middles(), scaled, side="left")
    fixed = [round(float(n) * 2**30) for n in dynamic.numbers()]
    values = [(fixed[c] * largest + 2**29) >> 30 for c in codes]
    payload, decoded = PLAIN.encode(torch.from_numpy(vector))
    assert list(payload[5:]) == codes.tolist()
    assert decoded.values.tolist() == values


def test_the_table_look_up_is_the_binary_search_at_and_around_every_middle() -> None:
    middles = dynamic.middles()
    near = [middles, np.nextafter(middles, np.float32(-2)), np.nextafter(middles, np.float32(2))]
    tiny = np.float32([0, -0.0, 1e-45, -1e-45, 1e-38, -1e-38, 1, -1])
    y = np.concatenate((*near, dynamic.numbers(), tiny))
    found = dynamic._codes(torch.from_numpy(y)[None]).numpy()
    assert found.tolist() == np.searchsorted(middles, y, side="left").tolist()
    uniform = np.random.default_rng(0).uniform(-1, 1, 100_000).astype(np.float32)
    found = dynamic._codes(torch.from_numpy(uniform)[None]).numpy()
    assert found.tolist() == np.searchsorted(middles, uniform, side="left").tolist()


def test_relative_error_on_gaussian_input() -> None:
    x = torch.randn(1 << 17, generator=torch.Generator().manual_seed(0)) * 1e6
    error = x.double() - PLAIN.encode(x).decoded.values
    assert float(error.square().sum() / x.double().square().sum()) == pytest.approx(
        1.18e-4, rel=0.05
    )


def test_zero_stays_zero_and_the_largest_stays_itself() -> None:
    x = torch.zeros(300)
    x[7], x[299] = 2.0**31, -(2.0**31)
    values = PLAIN.encode(x).decoded.values
    assert values.nonzero().reshape(-1).tolist() == [7, 299]
    assert int(values[7]) == 2**31 - 128
    assert int(values[299]) == pytest.approx(-0.99297 * 2**31, rel=1e-5)


def test_zero_blocks_have_one_form() -> None:
    payload = PLAIN.encode(torch.full((300,), 0.4)).payload
    assert payload == bytes(8) + b"\0" + bytes([127]) * 300
    for place in (9, 308):
        with pytest.raises(PayloadError, match="a block of zeros"):
            PLAIN.decode(payload[:place] + b"\x80" + payload[place + 1 :], 300)
    with pytest.raises(PayloadError, match="outside int32"):
        PLAIN.decode(b"\0\0\0\x80" + payload[4:], 300)
