"""Streams of bits: packed integers and digits, Rice and canonical Huffman codes."""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shoal.compression import bits, entropy, parallel
from shoal.compression.codec import PayloadError

quick = settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


def read(data: torch.Tensor | bytes) -> bits.Reader:
    return bits.Reader(data if isinstance(data, bytes) else data.numpy().tobytes())


def as_bytes(values: list[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.uint8)


@pytest.fixture(params=[False, True], ids=["torch", "compiled"])
def compiled(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Run with the loops in torch alone, then with the compiled ones alone."""
    if request.param:
        pytest.importorskip("numba")
    for name in ("LARGE", "LOADED"):
        monkeypatch.setattr(parallel, name, 0 if request.param else 1 << 60)
    return bool(request.param)


def skewed(count: int, seed: int = 0, spread: float = 9.0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(count, generator=g) * spread + 128).clamp(0, 255).to(torch.uint8)


@quick
@given(width=st.integers(1, 32), data=st.data())
def test_packed_integers_come_back(width: int, data: st.DataObject) -> None:
    values = data.draw(st.lists(st.integers(0, 2**width - 1), max_size=50))
    packed = bits.pack(torch.tensor(values, dtype=torch.int64), width)
    assert len(packed) == bits.packed_bytes(len(values), width)
    assert bits.unpack(packed, len(values), width).tolist() == values


def test_more_integers_than_a_slab_come_back() -> None:
    values = torch.arange(bits.SLAB + 77) * 2654435761 % 2**11
    packed = bits.pack(values, 11)
    assert torch.equal(bits.unpack(packed, len(values), 11), values)
    assert torch.equal(bits.pack(values[:800], 11), packed[:1100])


def test_bits_are_packed_from_the_low_end() -> None:
    assert bits.pack(torch.tensor([1, 2, 3]), 3).tolist() == [0b11_010_001, 0b0]
    assert bits.pack_bits(torch.tensor([1, 0, 0, 0, 0, 0, 0, 0, 1])).tolist() == [1, 1]


def test_padding_that_is_not_zero_is_refused() -> None:
    with pytest.raises(PayloadError, match="padding"):
        bits.unpack(as_bytes([0b1000_0001]), 1, 3)
    with pytest.raises(PayloadError, match="padding"):
        bits.unpack_digits(as_bytes([1 + 3 * 2]), 1, 3)


@quick
@given(base=st.integers(2, 256), data=st.data())
def test_digits_come_back(base: int, data: st.DataObject) -> None:
    digits = data.draw(st.lists(st.integers(0, base - 1), max_size=40))
    packed = bits.pack_digits(as_bytes(digits), base)
    assert len(packed) == bits.digit_bytes(len(digits), base)
    assert bits.unpack_digits(packed, len(digits), base).tolist() == digits
    each = bits.per_byte(base)
    assert base**each <= 256 < base ** (each + 1)
    if digits:
        first = sum(d * base**j for j, d in enumerate(digits[:each]))
        assert int(packed[0]) == first


def test_bytes_that_no_digits_make_are_refused() -> None:
    with pytest.raises(PayloadError, match="larger than its digits"):
        bits.unpack_digits(as_bytes([243]), 5, 3)
    with pytest.raises(PayloadError, match="2 bytes where 5 digits"):
        bits.unpack_digits(as_bytes([1, 2]), 5, 3)


@quick
@given(st.lists(st.integers(0, 3000), min_size=1, max_size=200), st.integers(0, 10))
@pytest.mark.usefixtures("compiled")
def test_rice_codes_come_back_and_are_canonical(values: list[int], b: int) -> None:
    data = entropy.rice_encode(torch.tensor(values), b)
    assert entropy.rice_decode(read(data), len(values), b, sum(values)).tolist() == values
    assert len(data) <= entropy.rice_bound(len(values), b, sum(values))
    exact = len(values) * b + sum((v >> b) + 1 for v in values)
    assert len(data) * 8 < exact + 16
    longer = torch.cat((data, as_bytes([0])))
    with pytest.raises(PayloadError):
        entropy.rice_decode(read(longer), len(values), b, sum(values) + 10_000)
    with pytest.raises(PayloadError):
        entropy.rice_decode(read(data[:-1]), len(values), b, sum(values))
    with pytest.raises(PayloadError):
        entropy.rice_decode(read(data), len(values), b, sum(values) - 1)


@quick
@given(
    values=st.lists(st.integers(0, 255), max_size=300),
    repeat=st.sampled_from([1, 2, 40, 4096 // 7]),
    mode=st.sampled_from(entropy.MODES),
)
@pytest.mark.usefixtures("compiled")
def test_squeezed_bytes_come_back(values: list[int], repeat: int, mode: str) -> None:
    data = as_bytes(values).repeat(repeat)
    stream = entropy.squeeze(data, mode)
    assert stream.dtype == torch.uint8
    assert len(stream) <= entropy.squeezed_bound(len(data), mode)
    reader = read(torch.cat((stream, as_bytes([77]))))
    assert torch.equal(entropy.expand(reader, len(data), mode), data)
    assert reader.rest().tolist() == [77]
    with pytest.raises(PayloadError):
        entropy.expand(read(stream[:-1]), len(data), mode)


@pytest.mark.parametrize("count", [1, 4095, 4096, 4097, 20_000])
@pytest.mark.usefixtures("compiled")
def test_segments_of_every_length_come_back(count: int) -> None:
    data = skewed(count)
    for mode in entropy.MODES:
        assert torch.equal(entropy.expand(read(entropy.squeeze(data, mode)), count, mode), data)


@pytest.mark.usefixtures("compiled")
def test_squeezed_bytes_take_their_entropy() -> None:
    data = skewed(64 * 4096 + 1)  # one byte more than torch codes at once
    p = torch.bincount(data).double() / len(data)
    bound = -float((p[p > 0] * p[p > 0].log2()).sum()) / 8 * len(data)
    assert bound < len(stream := entropy.squeeze(data)) < 1.01 * bound
    assert torch.equal(entropy.expand(read(stream), len(data)), data)


@settings(quick, max_examples=100)
@given(
    values=st.lists(st.integers(0, 4000), min_size=1, max_size=60),
    b=st.integers(0, 12),
    cut=st.binary(max_size=30),
    kept=st.integers(0, 80),
)
@pytest.mark.usefixtures("compiled")
def test_garbled_rice_codes_are_refused_or_are_the_one_form(
    values: list[int], b: int, cut: bytes, kept: int
) -> None:
    data = entropy.rice_encode(torch.tensor(values), b).numpy().tobytes()[:kept] + cut
    try:
        found = entropy.rice_decode(read(data), len(values), b, sum(values) + 300)
    except PayloadError:
        return
    assert entropy.rice_encode(found, b).numpy().tobytes() == data


@pytest.mark.parametrize("count", [5000, 70_001])
def test_compiled_loops_and_torch_make_the_same_streams(
    count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("numba")
    streams: list[list[bytes]] = []
    gaps = torch.randint(0, 400, (count,), generator=torch.Generator().manual_seed(1))
    wild = skewed(count, spread=3.0)
    wild[::97] = torch.arange(len(wild[::97])).to(torch.uint8)  # codes of up to 15 bits
    for least in (0, 1 << 60):
        for name in ("LARGE", "LOADED"):
            monkeypatch.setattr(parallel, name, least)
        made = [entropy.squeeze(skewed(count)), entropy.squeeze(wild, "huffman")]
        made += [entropy.rice_encode(gaps, b) for b in (0, 3, 6, 9)]
        streams.append([stream.numpy().tobytes() for stream in made])
    assert streams[0] == streams[1]


def test_auto_takes_the_bytes_as_they_are_when_huffman_does_not_pay() -> None:
    even = torch.arange(256, dtype=torch.uint8).repeat(100)
    assert entropy.squeeze(even)[0] == entropy.RAW
    assert entropy.squeeze(skewed(25_600))[0] == entropy.HUFFMAN
    raw = entropy.squeeze(skewed(25_600), "none")
    with pytest.raises(PayloadError, match="Huffman is shorter"):
        entropy.expand(read(raw), 25_600, "auto")
    coded = entropy.squeeze(even, "huffman")
    with pytest.raises(PayloadError, match="come as short"):
        entropy.expand(read(coded), 25_600, "auto")


@pytest.mark.usefixtures("compiled")
def test_a_lone_byte_takes_no_bits() -> None:
    data = torch.full((8192,), 2, dtype=torch.uint8)
    stream = entropy.squeeze(data)
    assert stream.tolist() == [1, 2, 0x00, 0x01, 0, 0, 0, 0]
    assert torch.equal(entropy.expand(read(stream), 8192), data)


@pytest.mark.usefixtures("compiled")
def test_the_layout_of_the_huffman_form() -> None:
    data = as_bytes([1, 0, 1, 2, 1, 0, 1])  # codes 0: 10, 1: 0, 2: 11, root bit first
    stream = entropy.squeeze(data, "huffman")
    bitstring = "0" + "10" + "0" + "11" + "0" + "10" + "0"
    body = [int(bitstring[:8][::-1], 2), int(bitstring[8:][::-1], 2)]
    assert stream.tolist() == [1, 2, 0x12, 0x02, 2, 0, *body]


@pytest.mark.usefixtures("compiled")
def test_other_code_lengths_than_the_bytes_own_are_refused() -> None:
    """A complete tree that gives the rare byte the short code is not the one form that counts."""
    bitstring = "10" * 6 + "0" + "11"  # 1 six times, 0, 2 with lengths 1, 2, 2
    body = [int(bitstring[i : i + 8][::-1], 2) for i in range(0, len(bitstring), 8)]
    with pytest.raises(PayloadError, match="not those of the bytes"):
        entropy.expand(read(bytes([1, 2, 0x21, 0x02, len(body), 0, *body])), 8, "huffman")
    with pytest.raises(PayloadError, match="complete tree"):
        entropy.expand(read(bytes([1, 2, 0x21, 0x03, len(body), 0, *body])), 8, "huffman")


@pytest.mark.usefixtures("compiled")
def test_segments_that_lie_about_their_length_are_refused() -> None:
    data = skewed(3 * 4096)
    stream = bytearray(entropy.squeeze(data).numpy().tobytes())
    at = 2 + (int(data.max()) + 2) // 2
    for change in (1, -1):
        wrong = bytearray(stream)
        first = int.from_bytes(wrong[at : at + 2], "little") + change
        second = int.from_bytes(wrong[at + 2 : at + 4], "little") - change
        wrong[at : at + 4] = first.to_bytes(2, "little") + second.to_bytes(2, "little")
        with pytest.raises(PayloadError):
            entropy.expand(read(bytes(wrong)), len(data))
    stream[at : at + 6] = bytes(6)
    with pytest.raises(PayloadError, match="cut off"):
        entropy.expand(read(bytes(stream)), len(data))


@settings(quick, max_examples=200)
@given(
    tail=st.binary(max_size=200),
    kept=st.integers(0, 60),
    count=st.sampled_from([0, 1, 9, 500, 5000]),
    mode=st.sampled_from(entropy.MODES),
)
@pytest.mark.usefixtures("compiled")
def test_garbage_is_refused_or_is_the_one_form(
    tail: bytes, kept: int, count: int, mode: str
) -> None:
    """What is accepted squeezes to the same stream again; everything else is a PayloadError."""
    start = entropy.squeeze(skewed(count, spread=0.9), mode).numpy().tobytes()[:kept]
    reader = read(start + tail)
    try:
        data = entropy.expand(reader, count, mode)
    except PayloadError:
        return
    used = len(start + tail) - len(reader)
    assert entropy.squeeze(data, mode).numpy().tobytes() == (start + tail)[:used]


def test_huffman_is_optimal_on_powers_of_two_and_near_the_entropy() -> None:
    assert entropy.huffman_lengths([8, 4, 2, 1, 1]) == [1, 2, 3, 4, 4]
    g = torch.Generator().manual_seed(0)
    counts = torch.randint(1, 1000, (255,), generator=g).tolist()
    lengths = entropy.huffman_lengths(counts)
    total = sum(counts)
    bound = -sum(n / total * math.log2(n / total) for n in counts)
    assert bound <= sum(n * w for n, w in zip(counts, lengths, strict=True)) / total < bound + 0.1
    assert sum(2.0**-n for n in lengths) == 1


def test_huffman_lengths_never_pass_fifteen_bits() -> None:
    fibonacci = [1, 1]
    while len(fibonacci) < 40:
        fibonacci.append(fibonacci[-1] + fibonacci[-2])
    lengths = entropy.huffman_lengths(fibonacci)
    assert max(lengths) <= entropy.LONGEST
    assert sum(2.0**-n for n in lengths) == 1


def test_unknown_modes_are_named_with_the_known() -> None:
    with pytest.raises(ValueError, match="use one of auto, none, huffman, range, zstd, any"):
        entropy.check("brotli")
    assert all(entropy.library(mode) == "" for mode in entropy.MODES)
    assert all("another version" in entropy.library(mode) for mode in entropy.LIBRARY_MODES)
