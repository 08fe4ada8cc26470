"""What quantisers share: pieces cover a vector once, chance does not depend on them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.compression import bits, splitmix, symbols

CPU = torch.device("cpu")


@settings(max_examples=100, deadline=None)
@given(size=st.integers(0, 200_000), multiple=st.sampled_from([1, 7, 256, 512, 8192]))
def test_pieces_cover_every_element_once_and_begin_at_multiples(size: int, multiple: int) -> None:
    parts = list(symbols.pieces(size, CPU, multiple=multiple))
    assert [p.start for p in parts] == [0, *(p.stop for p in parts)][: len(parts)]
    assert sum(p.stop - p.start for p in parts) == size
    assert all(p.start % multiple == 0 for p in parts)
    assert all(p.stop - p.start < 32768 for p in parts)  # else torch splits operations itself


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_work_is_done_on_every_piece_by_any_number_of_threads(threads: int) -> None:
    before, done = torch.get_num_threads(), torch.zeros(500_001, dtype=torch.int32)

    def work(part: slice) -> None:
        done[part] += 1

    try:
        torch.set_num_threads(threads)
        symbols.spread(work, len(done), CPU, multiple=256)
    finally:
        torch.set_num_threads(before)
    assert bool((done == 1).all())


def test_what_a_piece_raises_reaches_the_caller() -> None:
    def work(part: slice) -> None:
        symbols.check_finite(torch.tensor(float("nan") if part.start else 1.0))

    with pytest.raises(ValueError, match="NaN or infinite"):
        symbols.spread(work, 200_000, CPU)


@settings(max_examples=100, deadline=None)
@given(start=st.integers(0, 1000), count=st.integers(1, 100), key=st.integers(0, 2**64 - 1))
def test_chance_is_the_halves_of_the_generators_words(start: int, count: int, key: int) -> None:
    found = symbols.chance(key, slice(start, start + count), CPU)
    words = splitmix.words(key, 600).tolist()
    halves = [h for w in words for h in (w & 0xFFFFFFFF, (w >> 32) & 0xFFFFFFFF)]
    assert [h & 0xFFFFFFFF for h in found.tolist()] == halves[start : start + count]


@settings(max_examples=50, deadline=None)
@given(values=st.lists(st.integers(0, 2**32 - 1), max_size=20))
def test_u32_is_little_endian(values: list[int]) -> None:
    data = symbols.to_u32(torch.tensor(values, dtype=torch.int64))
    assert bytes(data.tolist()) == b"".join(v.to_bytes(4, "little") for v in values)
    assert symbols.from_u32(data).tolist() == values


@settings(max_examples=100, deadline=None)
@given(
    alphabet=st.sampled_from([2, 3, 4, 7, 15, 16, 64, 256]),
    count=st.integers(0, 300),
    mode=st.sampled_from(["auto", "none", "huffman"]),
)
def test_symbols_come_back_within_the_bound(alphabet: int, count: int, mode: str) -> None:
    generator = torch.Generator().manual_seed(count)
    symbols_N = torch.randint(0, alphabet, (count,), generator=generator).to(torch.uint8)
    stream = bits.join(symbols.squeezed(symbols_N, alphabet, mode))
    assert len(stream) <= symbols.squeezed_bound(count, alphabet, mode)
    reader = bits.Reader(stream)
    assert torch.equal(symbols.expanded(reader, count, alphabet, mode), symbols_N)
    reader.end()
