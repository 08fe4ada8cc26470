"""DCT top-k: the transform against numpy in floats, exactness in integers, tiles of any shape."""

import hashlib
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from shoal.compression import codec, scales
from shoal.compression.codec import INT32_MAX, PayloadError
from shoal.compression.codecs import dct
from shoal.compression.settings import SettingError

UNIT = 2.0**20


def gaussian(size: int, *, scale: float = 20_000.0, seed: int = 0) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)) * scale


def orthonormal(points: int) -> NDArray[np.float64]:
    """DCT-II by the cosine formula: [frequency, place]."""
    f, n = np.mgrid[:points, :points]
    basis = np.sqrt(2 / points) * np.cos(np.pi * f * (2 * n + 1) / (2 * points))
    basis[0] = 1 / math.sqrt(points)
    return np.asarray(basis)


def grid(height: int, width: int, keep: int = 1) -> dct.Grid:
    return dct.Grid(height, width, height, width, 1, 1, keep)


def forth(x: torch.Tensor) -> torch.Tensor:
    """The codec's transform of one tile."""
    return dct._forth(x.double()[None], grid(*x.shape)).reshape(x.shape)


def test_the_basis_is_the_cosine_formula_and_the_same_everywhere() -> None:
    data = b""
    for points in range(1, 65):
        exact = 2**dct.SHIFT * orthonormal(points)
        assert np.abs(dct.basis(points).numpy() - exact).max() <= 0.5 + 1e-9
        # No entry is near a half, where another library's cosine could round it the other way.
        assert np.abs(np.abs(exact % 1) - 0.5).min() > 1e-4
        data += dct.basis(points).numpy().astype("<i2").tobytes()
    assert hashlib.sha256(data).hexdigest() == (
        "573ac86696d6eb543d36d861ffc3de4765b5791752e81013ee38df1e28c5d6fc"
    )


def test_four_points_by_hand() -> None:
    rows = [[0.5, 0.5, 0.5, 0.5], [0.653281, 0.270598, -0.270598, -0.653281]]
    rows += [[0.5, -0.5, -0.5, 0.5], [0.270598, -0.653281, 0.653281, -0.270598]]
    assert dct.basis(4).numpy() / 2**dct.SHIFT == pytest.approx(np.array(rows), abs=4e-5)
    line = forth(UNIT * torch.tensor([[1.0, 2.0, 3.0, 4.0]])) / UNIT
    assert line[0].tolist() == pytest.approx([5, -2.230442, 0, -0.158513], abs=2e-4)
    square = forth(UNIT * torch.arange(16.0).reshape(4, 4)) / UNIT
    wanted = torch.zeros(4, 4, dtype=torch.float64)
    wanted[0, 0], wanted[0, 1], wanted[0, 3] = 30, -4.46088, -0.31703
    wanted[1, 0], wanted[3, 0] = -17.84354, -1.26810
    assert float((square - wanted).abs().max()) < 2e-3


def test_three_coefficients_of_a_ramp_leave_what_they_should() -> None:
    x = UNIT * torch.arange(16.0)
    part = codec.make("dct", {"tile": 4, "keep": 3}, shapes=((4, 4),))
    read: Any = part
    payload, decoded = part.encode(x)
    assert read.unpack(payload, 16).places.tolist() == [0, 1, 4]
    left = (x - decoded.dense()).double().square().sum() / x.double().square().sum()
    assert float(left) == pytest.approx(1.378e-3, abs=2e-5)


@settings(max_examples=40, deadline=None)
@given(height=st.integers(1, 64), width=st.integers(1, 64), seed=st.integers(0, 99))
def test_the_transform_is_numpys_in_both_directions(height: int, width: int, seed: int) -> None:
    x = gaussian(height * width, scale=2e6, seed=seed).round().reshape(height, width)
    exact = orthonormal(height) @ x.double().numpy() @ orthonormal(width).T
    y = forth(x)
    norm = float(x.norm())
    assert np.abs(y.numpy() - exact).max() < 1e-4 * norm + 2
    back = dct._back(y.reshape(1, -1), grid(height, width)).reshape(height, width)
    assert float((back - x.double()).norm()) < 6e-4 * norm + 2 * math.sqrt(height * width)


@pytest.mark.parametrize("tile", ["same", "basis", "halves"])
def test_every_product_is_exact_and_halves_go_up(tile: str) -> None:
    """Float64 gives Python's integers for tiles of ±(2³¹ - 1), in either direction."""
    x = torch.full((64, 64), float(INT32_MAX), dtype=torch.float64)
    basis = [[int(v) for v in row] for row in dct.basis(64).tolist()]
    if tile == "basis":  # the signs that make the sums of one coefficient largest
        x *= dct.basis(64)[5].sign()[:, None] * dct.basis(64)[9].sign()[None, :]
    if tile == "halves":  # multiples of 2¹³ end on a half as often as not
        x = 2.0**13 * (2 * (gaussian(4096).round() % 9) + 1).double().reshape(64, 64)
    whole = [[int(v) for v in row] for row in x.tolist()]

    def product(a: list[list[int]], b: list[list[int]]) -> list[list[int]]:
        columns = list(zip(*b, strict=True))
        return [
            [(sum(p * q for p, q in zip(r, c, strict=True)) + 2**13) >> 14 for c in columns]
            for r in a
        ]

    turned = [list(column) for column in zip(*basis, strict=True)]
    for first, last, found in (
        (basis, turned, lambda: dct._shifted(dct._shifted(dct.basis(64) @ x) @ dct.basis(64).T)),
        (turned, basis, lambda: dct._back(x.reshape(1, -1), grid(64, 64))[0]),
    ):
        assert found().tolist() == product(product(first, whole), last)


def rebuilt(part: Any, payload: bytes, shapes: codec.Shapes) -> NDArray[np.float64]:
    """What a payload means: tile by tile, in floats, by the formulas of the docstring."""
    size = sum(math.prod(shape) for shape in shapes)
    kept = part.unpack(payload, size)
    said = dict(zip(kept.places.tolist(), kept.groups.symbols.tolist(), strict=True))
    scale = scales.of(kept.groups.codes).tolist()
    vectors, first, tile = [], 0, 0
    for shape in shapes:
        rows = shape[0] if len(shape) > 1 else 1
        columns = math.prod(shape) // rows
        height, width = (-(-n // -(-n // part.tile)) for n in (rows, columns))
        whole = np.zeros((rows + height, columns + width))
        for top in range(0, rows, height):
            for left in range(0, columns, width):
                y = [said.get(first + i, 127) - 127 for i in range(height * width)]
                x = orthonormal(height).T @ np.reshape(y, (height, width)) @ orthonormal(width)
                whole[top : top + height, left : left + width] = scale[tile] * x
                first, tile = first + height * width, tile + 1
        vectors.append(whole[:rows, :columns].reshape(-1))
    return np.concatenate(vectors)


@settings(max_examples=40, deadline=None)
@given(
    shapes=st.lists(
        st.lists(st.integers(1, 20), max_size=2).map(tuple)
        | st.tuples(st.integers(1, 9), st.integers(1, 5), st.integers(1, 5)),
        min_size=1,
        max_size=4,
    ).map(tuple)
)
def test_tensors_of_any_shape_come_back_where_they_were(shapes: codec.Shapes) -> None:
    """Padding never shows, tiles lie where they were cut."""
    size = sum(math.prod(shape) for shape in shapes)
    part = codec.make("dct", {"tile": 8, "keep": 16}, shapes=shapes)
    payload, decoded = part.encode(gaussian(size))
    assert torch.equal(part.decode(payload, size).values, decoded.values)
    assert len(payload) <= part.bound(size)
    wanted = rebuilt(part, payload, shapes)
    error = np.linalg.norm(decoded.values.numpy() - wanted)
    assert error <= 1e-3 * np.linalg.norm(wanted) + math.sqrt(size)


def test_a_prime_side_is_cut_into_equal_tiles_with_little_padding() -> None:
    part: Any = codec.make("dct", {}, shapes=((50257, 3), (509,), (65, 64)))
    large, line, square = part._grids(50257 * 3 + 509 + 65 * 64)
    assert (large.height, large.width, large.down, large.across) == (64, 3, 786, 1)
    assert (line.height, line.width, line.across) == (1, 64, 8)
    assert (square.height, square.down) == (33, 2)
    assert [large.keep, line.keep, square.keep] == [1, 1, 16]


def test_slabs_of_a_large_tensor_are_as_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = ((300, 200), (5000,))
    x = gaussian(65_000)
    payloads = set()
    for slab in (1, 4096 * 3, 1 << 30):
        monkeypatch.setattr(dct, "SLAB", slab)
        part = codec.make("dct", {}, shapes=shapes)
        payload, decoded = part.encode(x)
        assert torch.equal(part.decode(payload, len(x)).values, decoded.values)
        payloads.add(payload)
    assert len(payloads) == 1


def test_a_wave_takes_one_coefficient() -> None:
    """What top-k of values would need thousands of numbers for."""
    wave = torch.from_numpy(np.outer(orthonormal(64)[7], orthonormal(64)[11])).float() * 1e7
    part: Any = codec.make("dct", {"keep": 1, "bits": 8}, shapes=((64, 64),))
    payload, decoded = part.encode(wave.reshape(-1))
    assert part.unpack(payload, 4096).places.tolist() == [7 * 64 + 11]
    # One scale byte of three bits holds the only coefficient to 1/16 of half a step of 127.
    assert float((wave.reshape(-1) - decoded.values).norm() / wave.norm()) < 0.01


@pytest.mark.parametrize("seed", range(3))
def test_a_tile_keeps_its_largest_coefficients(seed: int) -> None:
    """Energy left is that of the coefficients not kept, plus their rounding to 8 bits."""
    x = gaussian(128 * 128, seed=seed).reshape(128, 128)
    decoded = codec.make("dct", {}, shapes=((128, 128),)).encode(x.reshape(-1)).decoded
    basis = orthonormal(64)
    wanted = 0.0
    for i in (0, 64):
        for j in (0, 64):
            y = basis @ x[i : i + 64, j : j + 64].double().numpy() @ basis.T
            wanted += float(np.sort((y**2).reshape(-1))[:-32].sum())
    left = float((x.reshape(-1) - decoded.values).double().square().sum())
    assert wanted < left < 1.001 * wanted
    assert left < (1 - 32 / 4096) * float(x.double().square().sum())


@settings(max_examples=60, deadline=None)
@given(data=st.data(), keep=st.sampled_from([1, 8, 32]), bits=st.sampled_from([2, 4, 8]))
def test_the_residual_never_grows(data: st.DataObject, keep: int, bits: int) -> None:
    """Up to the rounding of the transform: half a quantum an element and 6·10⁻⁴ of the norm."""
    values = data.draw(
        st.lists(st.integers(-20, 20) | st.integers(-(2**24), 2**24), min_size=1, max_size=200)
    )
    x = torch.tensor(values, dtype=torch.float64)
    decoded = codec.make("dct", {"tile": 8, "keep": keep, "bits": bits}).encode(x.float()).decoded
    norm = float(x.norm())
    assert float((x - decoded.dense()).norm()) <= norm * (1 + 6e-4) + math.sqrt(len(x))


def test_what_leaves_int32_is_cut_off() -> None:
    x = torch.full((4096,), 2.1e9)
    decoded = codec.make("dct", {"keep": 64}, shapes=((64, 64),)).encode(x).decoded
    assert int(decoded.values.min()) > 0
    part: Any = codec.make("dct", {"keep": 2048}, shapes=((64, 64),))
    read = part.unpack(part.encode(gaussian(4096)).payload, 4096)
    groups = read.groups._replace(
        codes=torch.full_like(read.groups.codes, 8 * 22), symbols=read.groups.symbols * 0 + 254
    )
    first = torch.arange(2048)
    loud = part.decode(part.pack(read._replace(places=first, groups=groups), 4096), 4096)
    assert int(loud.values.max()) == INT32_MAX


def test_bits_on_a_million_gaussian_elements() -> None:
    shapes = ((1024, 1024),)
    payload = codec.make("dct", {}, shapes=shapes).encode(gaussian(1 << 20)).payload
    assert len(payload) * 8 / (1 << 20) < 0.122


def test_what_no_encoder_says_is_refused() -> None:
    part: Any = codec.make("dct", {"tile": 8, "keep": 4}, shapes=((16, 8), (5,)))
    kept = part.unpack(part.encode(gaussian(133)).payload, 133)
    assert len(kept.places) == 4 + 4 + 1
    moved = kept.places.clone()
    moved[3] = 64
    moved[4:8] = torch.arange(70, 74)
    codes = kept.groups.codes
    silent = kept.groups._replace(codes=codes * 0, symbols=kept.groups.symbols * 0 + 127)
    for bad, message in (
        (kept._replace(places=moved), "a tile keeps more or fewer"),
        (kept._replace(groups=kept.groups._replace(codes=codes * 0)), "scale zero"),
        (kept._replace(groups=kept.groups._replace(codes=codes * 0 + 231)), "outside int32"),
        (kept._replace(groups=silent, places=kept.places), "must keep its first"),
    ):
        with pytest.raises(PayloadError, match=message):
            part.decode(part.pack(bad, 133), 133)
    with pytest.raises(PayloadError, match="unknown version"):
        part.decode(b"\3" + part.pack(kept, 133)[1:], 133)


@pytest.mark.parametrize(
    "options", [{"tile": 3}, {"tile": 65}, {"keep": 0}, {"keep": 2049}, {"bits": 1}, {"bits": 9}]
)
def test_settings_without_a_layout_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(SettingError, match="use"):
        codec.make("dct", options)
