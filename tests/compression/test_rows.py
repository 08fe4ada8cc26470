"""Structured sparsity: which rows are kept, of which tensors, and what their elements become."""

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.compression import codec
from shoal.compression.codec import PayloadError, Shapes
from shoal.compression.settings import SettingError


def gaussian(size: int, *, scale: float = 20_000.0, seed: int = 0) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)) * scale


def slices(shapes: Shapes, run: int) -> list[list[slice]]:
    """The rows of each tensor, as slices of the vector."""
    found, start = [], 0
    for shape in shapes:
        size = math.prod(shape)
        length = size // shape[0] if len(shape) > 1 else run
        edges = [*range(start, start + size, length), start + size]
        found.append([slice(a, b) for a, b in itertools.pairwise(edges)])
        start += size
    return [rows for rows in found if rows]


def oracle(x: torch.Tensor, shapes: Shapes, run: int, density: float) -> list[int]:
    """Every element of the rows of largest norm, in Python's integers."""
    kept: list[int] = []
    whole = [int(v) for v in x.double().clamp(-2147483520.0, 2147483520.0).round().tolist()]
    for rows in slices(shapes, run):
        squares = [sum(v * v for v in whole[row]) for row in rows]
        order = sorted(range(len(rows)), key=lambda i: (-squares[i], i))
        for i in sorted(order[: max(1, int(len(rows) * density))]):
            kept += range(rows[i].start, rows[i].stop)
    return kept


@settings(max_examples=60, deadline=None)
@given(data=st.data(), density=st.floats(0.05, 0.5), run=st.integers(1, 9))
def test_the_rows_of_largest_norm_of_each_tensor_are_kept(
    data: st.DataObject, density: float, run: int
) -> None:
    shapes = tuple(
        data.draw(
            st.lists(st.lists(st.integers(1, 6), max_size=3).map(tuple), min_size=1, max_size=5)
        )
    )
    size = sum(math.prod(shape) for shape in shapes)
    values = data.draw(
        st.lists(st.integers(-2, 2) | st.integers(-(2**31), 2**31), min_size=size, max_size=size)
    )
    x = torch.tensor(values, dtype=torch.float32)
    part = codec.make("rows", {"density": density, "row": run}, shapes=shapes)
    payload, decoded = part.encode(x)
    assert decoded.indices is not None
    assert decoded.indices.tolist() == oracle(x, shapes, run, density)
    assert torch.equal(part.decode(payload, size).dense(), decoded.dense())
    assert len(payload) <= part.bound(size)


def test_sums_of_squares_are_compared_beyond_64_bits() -> None:
    """Two rows whose Σx² differs by one in the last place of a number of 80 bits."""
    length = 1 << 18
    x = torch.full((2, length), 2.0e9)
    x[0, 5], x[1, 7] = 6.0, 7.0
    part = codec.make("rows", {"density": 0.5}, shapes=((2, length),))
    decoded = part.encode(x.reshape(-1)).decoded
    assert decoded.indices is not None
    assert int(decoded.indices[0]) == length
    x[1, 7] = 6.0
    equal = part.encode(x.reshape(-1)).decoded
    assert equal.indices is not None
    assert int(equal.indices[0]) == 0


def test_rows_longer_than_a_slab_are_summed_piece_by_piece() -> None:
    length = (1 << 22) + 3
    x = torch.zeros(2 * length)
    x[length - 1], x[-1] = 5.0, -6.0
    decoded = codec.make("rows", {"density": 0.5}, shapes=((2, length),)).encode(x).decoded
    assert decoded.indices is not None
    assert int(decoded.indices[0]) == length
    assert int(decoded.values[-1]) < 0


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_elements_of_a_kept_row_are_the_nearest_levels_of_its_scale(bits: int) -> None:
    x = gaussian(64 * 100).round()
    decoded = codec.make("rows", {"bits": bits}, shapes=((100, 64),)).encode(x).decoded
    assert decoded.indices is not None
    assert len(decoded.values) == 6 * 64
    at = decoded.indices.reshape(6, 64)
    for index, values in zip(at, decoded.values.long().reshape(6, 64), strict=True):
        row = x[index].long()
        mean = float(row.abs().double().mean())
        if bits < 3:
            scale = int(values.abs().max())
            assert abs(scale - (1 if bits == 1 else 1.5) * mean) <= mean / 10
            levels = torch.tensor([-scale, scale] if bits == 1 else [-scale, 0, scale])
        else:
            top = 2 ** (bits - 1) - 1
            scale = math.gcd(*values.tolist())
            assert int(row.abs().max()) / top <= scale <= int(row.abs().max()) / top * 1.13 + 1
            levels = scale * torch.arange(-top, top + 1)
        assert torch.equal((row - values).abs(), (row[:, None] - levels).abs().amin(1))


@settings(max_examples=60, deadline=None)
@given(data=st.data(), bits=st.sampled_from([1, 2, 4, 8]))
def test_the_residual_never_grows(data: st.DataObject, bits: int) -> None:
    values = data.draw(
        st.lists(st.integers(-20, 20) | st.integers(-(2**24), 2**24), min_size=1, max_size=300)
    )
    x = torch.tensor(values, dtype=torch.float64)
    part = codec.make("rows", {"density": 0.5, "bits": bits, "row": 16})
    decoded = part.encode(x.float()).decoded.dense()
    assert float((x - decoded).square().sum()) <= float(x.square().sum())


def test_fine_mantissas_leave_at_most_one_minus_the_density() -> None:
    """δ ≥ kept rows / rows when rows are of one length, up to the rounding of 8 bits."""
    for seed in range(5):
        x = gaussian(64 * 128, seed=seed)
        part = codec.make("rows", {"density": 0.25, "bits": 8}, shapes=((128, 64),))
        left = (x - part.encode(x).decoded.dense()).square().sum() / x.square().sum()
        assert float(left) < 0.75


def test_places_cost_next_to_nothing() -> None:
    """An update of few rows: 4 bits an element of them, little else."""
    x = torch.zeros(1000, 256)
    x[::40] = gaussian(25 * 256).reshape(25, 256)
    part = codec.make("rows", {"density": 0.025, "bits": 4}, shapes=((1000, 256),))
    payload, decoded = part.encode(x.reshape(-1))
    assert decoded.indices is not None
    assert decoded.indices[::256].tolist() == [256 * r for r in range(0, 1000, 40)]
    assert len(payload) < 25 * 256 // 2 + 25 + 30


def test_what_no_encoder_says_is_refused() -> None:
    shapes = ((20, 8), (20, 8), (30,))
    part: Any = codec.make("rows", {"density": 0.25, "row": 8}, shapes=shapes)
    x = 1000.0 * (1 + torch.arange(350) // 8 % 20)  # later rows are larger,
    x[344:] = 1.0  # but not the last, which is short
    kept = part.unpack(part.encode(x).payload, 350)
    assert kept.rows.tolist() == [15, 16, 17, 18, 19, 35, 36, 37, 38, 39, 42]
    moved = kept.rows.clone()
    moved[4] = 20
    short = kept.rows.clone()
    short[-1] = 43  # six elements, where eight symbols are
    codes = kept.groups.codes
    for bad, message in (
        (kept._replace(rows=moved), "more or fewer rows"),
        (kept._replace(rows=short), "88 elements stated, the rows have 86"),
        (kept._replace(groups=kept.groups._replace(codes=codes * 0)), "scale zero"),
        (kept._replace(groups=kept.groups._replace(codes=codes * 0 + 250)), "outside int32"),
    ):
        with pytest.raises(PayloadError, match=message):
            part.decode(part.pack(bad, 350), 350)
    payload = part.pack(kept, 350)
    with pytest.raises(PayloadError, match="unknown version"):
        part.decode(b"\2" + payload[1:], 350)
    with pytest.raises(PayloadError, match="at most 88"):
        part.decode(payload[:1] + (2**31).to_bytes(4, "little") + payload[5:], 350)


@pytest.mark.parametrize(
    "options", [{"density": 0.0}, {"density": 0.6}, {"bits": 3}, {"row": 0}, {"entropy": "lzma"}]
)
def test_settings_without_a_layout_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(SettingError, match="use"):
        codec.make("rows", options)
