"""Streams of bits: packed integers, Rice and canonical Huffman codes."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.compression import old_bits as bits
from shoal.compression import old_entropy as entropy
from shoal.compression.codec import PayloadError


@settings(deadline=None)
@given(width=st.integers(1, 32), data=st.data())
def test_packed_integers_come_back(width: int, data: st.DataObject) -> None:
    values = data.draw(st.lists(st.integers(0, 2**width - 1), max_size=50))
    packed = bits.pack(np.array(values, np.int64), width)
    assert len(packed) == bits.packed_bytes(len(values), width)
    assert bits.unpack(packed, len(values), width).tolist() == values


def test_bits_are_packed_from_the_low_end() -> None:
    assert bits.pack(np.array([1, 2, 3]), 3) == bytes([0b11_010_001, 0b0])
    assert bits.pack_bits(np.array([1, 0, 0, 0, 0, 0, 0, 0, 1], np.uint8)) == b"\x01\x01"


def test_padding_that_is_not_zero_is_refused() -> None:
    with pytest.raises(PayloadError, match="padding"):
        bits.unpack(bytes([0b1000_0001]), 1, 3)


@settings(deadline=None)
@given(st.lists(st.integers(0, 3000), min_size=1, max_size=200), st.integers(0, 10))
def test_rice_codes_come_back_and_are_canonical(values: list[int], b: int) -> None:
    array = np.array(values, np.int64)
    data = entropy.rice_encode(array, b)
    assert entropy.rice_decode(data, len(values), b, sum(values)).tolist() == values
    assert len(data) <= entropy.rice_bound(len(values), b, sum(values))
    exact = len(values) * b + sum((v >> b) + 1 for v in values)
    assert len(data) * 8 < exact + 16
    with pytest.raises(PayloadError):
        entropy.rice_decode(data + b"\0", len(values), b, sum(values) + 10_000)
    with pytest.raises(PayloadError):
        entropy.rice_decode(data[:-1], len(values), b, sum(values))


@pytest.mark.parametrize(
    ("density", "b"), [(0.25, 1), (0.2, 2), (0.1, 3), (0.05, 4), (1 / 64, 5), (0.01, 6), (0.001, 9)]
)
def test_the_rice_parameter_is_the_best_for_the_density(density: float, b: int) -> None:
    assert entropy.rice_parameter(density) == b


@settings(deadline=None)
@given(st.lists(st.integers(0, 14), min_size=1, max_size=400), st.sampled_from([15, 16, 255]))
def test_huffman_codes_come_back(values: list[int], alphabet: int) -> None:
    symbols = np.array(values, np.uint8)
    data = entropy.huffman_encode(symbols, alphabet)
    counts = np.bincount(symbols, minlength=alphabet)
    assert len(data) == entropy.huffman_bytes(counts, entropy.huffman_lengths(counts))
    assert entropy.huffman_decode(data, len(values), alphabet).tolist() == values
    with pytest.raises(PayloadError):
        entropy.huffman_decode(data + b"\0", len(values), alphabet)
    with pytest.raises(PayloadError):
        entropy.huffman_decode(data[:-1], len(values), alphabet)


def test_huffman_is_within_a_bit_of_the_entropy_and_optimal_on_powers_of_two() -> None:
    counts = np.array([8, 4, 2, 1, 1], np.int64)
    assert entropy.huffman_lengths(counts).tolist() == [1, 2, 3, 4, 4]
    rng = np.random.default_rng(0)
    counts = rng.integers(1, 1000, 255)
    lengths = entropy.huffman_lengths(counts)
    p = counts / counts.sum()
    bound = -(p * np.log2(p)).sum()
    assert bound <= (p * lengths).sum() < bound + 0.1
    assert sum(2.0 ** -float(n) for n in lengths) == 1


def test_huffman_lengths_never_pass_fifteen_bits() -> None:
    fibonacci = [1, 1]
    while len(fibonacci) < 40:
        fibonacci.append(fibonacci[-1] + fibonacci[-2])
    lengths = entropy.huffman_lengths(np.array(fibonacci))
    assert lengths.max() <= entropy.LONGEST
    assert sum(2.0 ** -int(n) for n in lengths) == 1


def test_other_code_lengths_than_the_symbols_own_are_refused() -> None:
    """A complete tree that gives the rare symbol the short code is not the one form that counts."""
    symbols = np.array([1] * 90 + [0] * 6 + [2] * 4, np.uint8)
    table = bits.pack(np.array([1, 2, 2]), 4)  # 0: 0, 1: 10, 2: 11
    first = (symbols != 0).astype(np.uint8)
    second = (symbols[symbols != 0] == 2).astype(np.uint8)
    planes = bits.pack_bits(first) + bits.pack_bits(second)
    with pytest.raises(PayloadError, match="not those of the symbols"):
        entropy.huffman_decode(table + planes, 100, 3)
    with pytest.raises(PayloadError, match="complete tree"):
        entropy.huffman_decode(bits.pack(np.array([1, 2, 3]), 4) + planes, 100, 3)


def test_a_lone_symbol_takes_no_bits() -> None:
    data = entropy.huffman_encode(np.full(100_000, 2, np.uint8), 3)
    assert len(data) == 2
    assert entropy.huffman_decode(data, 100_000, 3).tolist() == [2] * 100_000


def test_two_million_symbols_take_their_entropy() -> None:
    rng = np.random.default_rng(0)
    symbols = np.clip(rng.normal(7, 2, 2_000_000).round(), 0, 14).astype(np.uint8)
    data = entropy.huffman_encode(symbols, 15)
    assert np.array_equal(entropy.huffman_decode(data, len(symbols), 15), symbols)
    p = np.bincount(symbols, minlength=15) / len(symbols)
    bound = -(p[p > 0] * np.log2(p[p > 0])).sum()
    assert len(data) * 8 / len(symbols) < bound + 0.06
