"""Coordinates along common directions: by hand, by an oracle of its own, and what is refused."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import seeds

from shoal.compression import codec, parallel
from shoal.compression.codec import Origin, PayloadError
from shoal.compression.codecs.projection import Projection, apportioned
from shoal.compression.settings import SettingError

RUN, AUTHOR = bytes(range(16)), bytes(range(32))
ORIGIN = Origin(RUN, AUTHOR, 100)
SMALL = {"coefficients": 4, "block": 64}


def make(options: dict[str, Any], origin: Origin = ORIGIN) -> Projection:
    part = codec.at(codec.make("projection", options), origin)
    assert isinstance(part, Projection)
    return part


def gaussian(size: int, *, scale: float = 1000.0, seed: int = 0) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)) * scale


def fields(values: list[int], width: int) -> bytes:
    stream = sum(value << (i * width) for i, value in enumerate(values))
    return stream.to_bytes((len(values) * width + 7) // 8, "little")


def spans(part: Projection, size: int) -> list[tuple[int, int]]:
    return [(at, min(part.block, size - at)) for at in range(0, size, part.block)]


def width_of(part: Projection, size: int) -> int:
    """Return the bits of a count: of the largest that is possible."""
    most = min(max(part.coefficients, math.ceil(size / part.block)), size)
    return math.floor(math.log2(min(most, part.block))) + 1


# ---------------------------------------------------------------- by hand


def test_a_payload_by_hand() -> None:
    """70 elements are blocks of 64 and 6, of which the second goes on where the first ends."""
    part = make(SMALL)
    payload = bytes.fromhex("0a200025fb40")  # 2 and 1 of 3 bits, e = 0 and 1 of 5, q
    found = part.decode(payload, 70).dense()
    assert found[:16].tolist() == FIRST
    assert found[64:].tolist() == SECOND
    keys = [seeds.key(RUN, seeds.COMMON, 100, k, domain=3) for k in (0, 1)]
    assert keys == [0x4ABB61D6894E3918, 0xF328E7F8813C6483]
    wanted = 37 * seeds.signs(keys[0], 64) - 5 * seeds.signs(keys[1], 64)
    assert found[:64].tolist() == wanted.tolist()


FIRST = [-32, -42, -42, 42, -32, 42, -42, 32, -32, -32, 42, 42, 42, -42, 32, 32]
SECOND = [128, -128, -128, 128, 128, 128]


def test_nothing_is_said_in_few_bytes() -> None:
    for size, length in ((1, 2), (64, 2), (65, 3), (700, 13)):
        payload, decoded = make(SMALL).encode(torch.zeros(size))
        assert payload == bytes(length)
        assert not decoded.dense().any()


# ---------------------------------------------------------------- the whole format, once more


def expected(part: Projection, payload: bytes, size: int) -> Any:
    """Return the vector that a payload stands for, from the specification alone, or None."""
    blocks = spans(part, size)
    width = width_of(part, size)
    ends = [math.ceil(len(blocks) * width / 8)]
    ends.append(ends[0] + math.ceil(len(blocks) * 5 / 8))
    if len(payload) < ends[1]:
        return None
    heads = [int.from_bytes(payload[: ends[0]], "little")]
    heads.append(int.from_bytes(payload[ends[0] : ends[1]], "little"))
    if heads[0] >> (len(blocks) * width) or heads[1] >> (len(blocks) * 5):
        return None
    counts = [heads[0] >> (i * width) & ((1 << width) - 1) for i in range(len(blocks))]
    powers = [heads[1] >> (i * 5) & 31 for i in range(len(blocks))]
    rest = [q - 256 if q > 127 else q for q in payload[ends[1] :]]
    most = min(max(part.coefficients, len(blocks)), size)
    if sum(counts) != len(rest) or sum(counts) > most or -128 in rest:
        return None
    found = []
    for (start, length), count, power in zip(blocks, counts, powers, strict=True):
        q, rest = rest[:count], rest[count:]
        largest = max(map(abs, q), default=0)
        if count > length or (q and not q[-1]) or (power and largest < 64):
            return None
        if sum(map(abs, q)) * 2**power >= 2**31:
            return None
        keys = [
            seeds.key(part.origin.run, seeds.COMMON, part.origin.turn, k, 3) for k in range(count)
        ]
        part_of = np.zeros(length, np.int64)
        for a, key in zip(q, keys, strict=True):
            part_of += a * 2**power * seeds.signs(key, length, start)
        found.append(part_of)
    return np.concatenate(found)


@settings(max_examples=300, deadline=None)
@given(
    coefficients=st.integers(1, 40),
    block=st.sampled_from([64, 100, 128, 1 << 20]),
    size=st.integers(1, 400),
    turn=st.integers(0, 2**63),
    data=st.data(),
)
def test_payloads_stand_for_what_the_specification_says(
    coefficients: int, block: int, size: int, turn: int, data: st.DataObject
) -> None:
    part = make({"coefficients": coefficients, "block": block}, Origin(RUN, AUTHOR, turn))
    blocks = len(spans(part, size))
    width = width_of(part, size)
    some = st.integers(0, min(2**width - 1, 6)) | st.integers(0, 2**width - 1)
    counts = data.draw(st.lists(some, min_size=blocks, max_size=blocks))
    powers, q = [], b""
    for count in counts:
        here = data.draw(st.binary(min_size=count, max_size=count))
        large = any(64 <= byte <= 192 for byte in here)
        powers.append(data.draw(st.integers(0, 26) if large else st.sampled_from([0, 0, 0, 1])))
        q += here
    good = fields(counts, width) + fields(powers, 5) + q
    for payload in (good, good + b"\1", good[:-1], data.draw(st.binary(max_size=30))):
        wanted = expected(part, payload, size)
        if wanted is None:
            with pytest.raises(PayloadError):
                part.decode(payload, size)
        else:
            assert part.decode(payload, size).dense().tolist() == wanted.tolist()
            assert part.pack(part.unpack(payload, size), size) == payload
            assert len(payload) <= part.bound(size)


@pytest.mark.parametrize("path", ["torch", "compiled"])
def test_encode_says_the_scaled_products_to_the_nearest(path: str) -> None:
    """Of integers, whose products numpy finds exactly; on both paths and any threads."""
    size, part = 5000, make({"coefficients": 40, "block": 2048})
    x = gaussian(size).round()
    x[2048:4096] = 0
    x[4096:] *= 30
    keys = [seeds.key(RUN, seeds.COMMON, 100, k, 3) for k in range(40)]
    before, payloads = torch.get_num_threads(), set()
    with pytest.MonkeyPatch.context() as patch:
        for name in ("LARGE", "LOADED"):
            patch.setattr(parallel, name, 0 if path == "compiled" else 1 << 62)
        try:
            for threads in (1, 2):
                torch.set_num_threads(threads)
                payloads.add(part.encode(x).payload)
        finally:
            torch.set_num_threads(before)
    (payload,) = payloads
    found = part.unpack(payload, size)
    assert found.counts[1] == 0
    assert sum(found.counts) == 40  # none of them happens to be zero
    norms = [float(x[:2048].norm()), float(x[4096:].norm())]
    for i, block in enumerate((0, 2)):
        start, length = spans(part, size)[block]
        count = found.counts[block]
        assert abs(count - 1 - 38 * norms[i] / sum(norms)) < 1
        x_N = x[start : start + length].numpy().astype(np.int64)
        c = np.array([x_N @ seeds.signs(key, length, start) for key in keys[:count]])
        c = c / (length + count - 1)
        power = found.exponents[block]
        assert power == max(0, math.ceil(math.log2(abs(c).max() / 127.5)))
        assert (
            found.mantissas.split(found.counts)[block].tolist()
            == np.round(c / 2**power).astype(int).tolist()
        )


# ---------------------------------------------------------------- laws


def test_all_peers_have_the_directions_of_a_turn_in_common() -> None:
    payload = make({}).encode(gaussian(2000)).payload
    theirs = Origin(RUN, bytes(32), 100)
    assert torch.equal(
        make({}, theirs).decode(payload, 2000).values, make({}).decode(payload, 2000).values
    )
    for other in (Origin(RUN, AUTHOR, 101), Origin(bytes(16), AUTHOR, 100)):
        found = make({}, other).decode(payload, 2000).values
        assert not torch.equal(found, make({}).decode(payload, 2000).values)


def test_updates_of_a_turn_add_up_to_the_sum_of_their_coordinates() -> None:
    part, size = make({"coefficients": 30, "block": 100}), 350
    total, sums = torch.zeros(size, dtype=torch.int64), torch.zeros(4, 30, dtype=torch.int64)
    for seed in range(5):
        payload, decoded = part.encode(gaussian(size, seed=seed))
        total += decoded.dense()
        found = part.unpack(payload, size)
        for i, (q, e) in enumerate(
            zip(found.mantissas.split(found.counts), found.exponents, strict=True)
        ):
            sums[i, : len(q)] += q << e
    keys = [seeds.key(RUN, seeds.COMMON, 100, k, 3) for k in range(30)]
    for i, (start, length) in enumerate(spans(part, size)):
        z = np.array([seeds.signs(key, length, start) for key in keys])
        assert total[start : start + length].tolist() == (sums[i].numpy() @ z).tolist()


def test_the_residual_shrinks_as_promised() -> None:
    """By K/(d + K - 1) of its square in the mean over turns, here of one block."""
    size, x = 300, gaussian(300, scale=1e5)
    for coefficients in (3, 30, 300):
        left = []
        for turn in range(1, 101):
            part = make({"coefficients": coefficients}, Origin(RUN, AUTHOR, turn))
            residual = x - part.encode(x).decoded.dense()
            left.append(float(residual.square().sum() / x.square().sum()))
        wanted = 1 - coefficients / (size + coefficients - 1)
        assert sum(left) / len(left) == pytest.approx(wanted, abs=0.02)


def test_large_blocks_get_more_and_none_that_is_not_zero_gets_nothing() -> None:
    part = make({"coefficients": 100, "block": 64})
    x = gaussian(640)
    x[:64] *= 50
    x[64:128] *= 1e-2
    x[128:192] = 0
    counts = part.unpack(part.encode(x).payload, 640).counts
    assert counts[0] == 64  # all that it has room for
    assert counts[1] >= 1
    assert counts[2] == 0
    assert all(4 <= count <= 6 for count in counts[3:])
    few = make({"coefficients": 2, "block": 64})
    assert few.bound(640) == 5 + 7 + 10  # 4 and 5 bits of ten blocks, and one byte each
    assert few.unpack(few.encode(gaussian(640)).payload, 640).counts == [1] * 10


@settings(max_examples=200, deadline=None)
@given(
    parts=st.lists(
        st.tuples(st.just(0.0) | st.floats(1e-40, 1e40), st.integers(1, 50)),
        min_size=1,
        max_size=30,
    ),
    more=st.integers(0, 500),
)
def test_shares_add_up(parts: list[tuple[float, int]], more: int) -> None:
    weights, most = [w for w, _ in parts], [m for _, m in parts]
    total = len(parts) + more
    found = apportioned(weights, most, total)
    room = sum(m for w, m in parts if w > 0)
    assert sum(found) == min(total, room)
    for (weight, limit), count in zip(parts, found, strict=True):
        assert (count > 0) == (weight > 0)
        assert count <= limit
    for (a, m), i in zip(parts, found, strict=True):
        for (b, _), j in zip(parts, found, strict=True):
            if a >= b and i < m:
                assert i >= j - (a == b)


def test_shares_are_in_proportion() -> None:
    assert apportioned([1.0, 2.0, 5.0], [99, 99, 99], 83) == [11, 21, 51]
    assert apportioned([1.0, 1.0, 1.0], [99, 99, 99], 5) == [2, 2, 1]
    assert apportioned([1.0, 2.0, 0.0, 5.0], [99, 99, 99, 20], 53) == [11, 22, 0, 20]
    assert apportioned([0.0, 0.0], [5, 5], 10) == [0, 0]


@pytest.mark.parametrize("value", [2.0**31, -1e38, 3e38, 2.0**25])
def test_what_is_too_large_is_cut_within_int32(value: float) -> None:
    for size in (1, 2, 65, 1000):
        part = make({"coefficients": 300, "block": 512})
        payload, decoded = part.encode(torch.full((size,), value))
        assert torch.equal(part.decode(payload, size).dense(), decoded.dense())
        assert int(decoded.dense().to(torch.int64).abs().max()) < 2**31
    one = make({}).encode(torch.tensor([value])).decoded.dense()
    assert float(one[0]) == pytest.approx(max(-(2.0**31), min(value, 2.0**31)), rel=0.11)


def test_an_exponent_is_no_larger_than_it_need_be() -> None:
    """Of one element the coefficient is the element itself, but for its sign."""
    part = make({})
    for value, power, q in ((127.4, 0, 127), (127.5, 1, 64), (254.9, 1, 127), (255, 2, 64)):
        found = part.unpack(part.encode(torch.tensor([float(value)])).payload, 1)
        assert (found.exponents, found.mantissas.abs().tolist()) == ([power], [q])


# ---------------------------------------------------------------- what does not fit


@pytest.mark.parametrize(
    ("payload", "message"),
    [
        ("", "too early"),
        ("0a20", "too early"),
        ("0a200025fb", "too early"),
        ("0a200025fb4001", "too many"),
        ("4a200025fb40", "padding"),
        ("0a200425fb40", "padding"),
        ("0a200080fb40", "-128"),
        ("0a2000250040", "last coefficient"),
        ("0a200025fb3f", "larger than it need be"),
        ("02200025fb", "without coefficients"),
        ("0a200325fb40", "outside int32"),  # 64 · 2^25 is 2^31
        ("2d00000101010101010101010101", "are the most"),  # 5 and 5 of at most 4
        ("2d00000101010101", "are the most"),
    ],
)
def test_payloads_of_no_form(payload: str, message: str) -> None:
    with pytest.raises(PayloadError, match=message):
        make(SMALL).decode(bytes.fromhex(payload), 70)


def test_a_block_has_no_more_coefficients_than_elements() -> None:
    part = make({"coefficients": 20, "block": 64})
    head = fields([1, 7], 5) + fields([0, 0], 5)
    with pytest.raises(PayloadError, match="more coefficients than elements"):
        part.decode(head + b"\1" * 8, 70)
    head = fields([1, 6], 5) + fields([0, 0], 5)
    part.decode(head + b"\1" * 7, 70)


@pytest.mark.parametrize(
    "options",
    [{"coefficients": 0}, {"coefficients": 65_537}, {"block": 63}, {"block": (1 << 24) + 1}],
)
def test_settings_that_have_no_layout(options: dict[str, Any]) -> None:
    with pytest.raises(SettingError, match=next(iter(options))):
        codec.make("projection", options)
