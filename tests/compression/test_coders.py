"""The entropy coders of libraries: what they take and refuse, and how near the bound they are."""

import sys
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.compression import coders
from shoal.compression.codec import PayloadError
from shoal.compression.settings import SettingError

FORMS = pytest.mark.parametrize("form", [coders.RANGE, coders.ZSTD])


def skewed(count: int) -> bytes:
    weights = np.array([0.7, 0.2, 0.06, 0.03, 0.01])
    return np.random.default_rng(3).choice(5, count, p=weights).astype(np.uint8).tobytes()


@FORMS
@settings(max_examples=100, deadline=None)
@given(data=st.binary(max_size=500))
def test_what_is_encoded_is_decoded(form: int, data: bytes) -> None:
    assert coders.decode(form, coders.encode(form, data), len(data)) == data


@FORMS
@pytest.mark.parametrize("data", [b"", b"\0", b"\0" * 5000, b"\xff" * 5000, bytes(range(256)) * 9])
def test_edges(form: int, data: bytes) -> None:
    assert coders.decode(form, coders.encode(form, data), len(data)) == data


def test_the_range_code_is_at_the_entropy() -> None:
    data = skewed(100_000)
    share = np.bincount(np.frombuffer(data, np.uint8)) / len(data)
    entropy = -(share * np.log2(share)).sum() * len(data) / 8
    assert len(coders.encode(coders.RANGE, data)) < 1.001 * entropy + 30


@FORMS
def test_other_lengths_and_other_counts_are_refused(form: int) -> None:
    data = skewed(3000)
    stream = coders.encode(form, data)
    for cut in (0, 1, 5, len(stream) // 2, len(stream) - 4, len(stream) - 1):
        with pytest.raises(PayloadError):
            coders.decode(form, stream[:cut], len(data))
    for tail in (b"\0", bytes(4), stream):
        with pytest.raises(PayloadError):
            coders.decode(form, stream + tail, len(data))
    for count in (0, 1, 2000, 10**9 if form == coders.ZSTD else 40_000):
        with pytest.raises(PayloadError):
            coders.decode(form, stream, count)


@FORMS
@settings(max_examples=200, deadline=None)
@given(data=st.binary(max_size=200), count=st.integers(0, 300))
def test_garbage_decodes_or_raises_payload_error(form: int, data: bytes, count: int) -> None:
    try:
        assert len(coders.decode(form, data, count)) == count
    except PayloadError:
        return


@FORMS
@settings(max_examples=200, deadline=None)
@given(flips=st.lists(st.integers(0, 2**16), min_size=1, max_size=3))
def test_flipped_bits_decode_or_raise_payload_error(form: int, flips: list[int]) -> None:
    stream = bytearray(coders.encode(form, skewed(600)))
    for flip in flips:
        stream[flip // 8 % len(stream)] ^= 1 << flip % 8
    try:
        assert len(coders.decode(form, bytes(stream), 600)) == 600
    except PayloadError:
        return


def test_a_frame_that_declares_more_is_refused_before_it_is_opened() -> None:
    bomb = coders.encode(coders.ZSTD, bytes(1 << 22))
    assert len(bomb) < 1000
    with pytest.raises(PayloadError, match="expected 100"):
        coders.decode(coders.ZSTD, bomb, 100)


def test_a_frame_that_holds_more_than_it_declares_is_refused_without_the_memory() -> None:
    run_of_100_000 = ((100_000 << 3) | (1 << 1)).to_bytes(3, "little") + b"\0"
    head = b"\x28\xb5\x2f\xfd\x80\x88" + (100).to_bytes(4, "little")
    tracemalloc.start()
    with pytest.raises(PayloadError):
        coders.decode(coders.ZSTD, head + run_of_100_000 * 1000, 100)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


@FORMS
def test_a_missing_library_is_named(form: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "constriction", None)
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(SettingError, match=r"install shoal\[coders\]"):
        coders.encode(form, b"abc")


def test_unknown_forms_are_refused() -> None:
    with pytest.raises(ValueError, match="form 7"):
        coders.encode(7, b"")
    with pytest.raises(PayloadError, match="form 7"):
        coders.decode(7, b"", 0)
