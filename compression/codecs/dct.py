"""The largest coefficients of the cosine transform of every tile: what moved smoothly, in brief.

DeMo (Peng, Quesnelle and Kingma, "Decoupled momentum optimization", 2024, arXiv 2411.19870) cuts
each tensor into tiles of at most 64 x 64, applies the orthonormal two-dimensional DCT-II, keeps the
`keep` largest coefficients of each tile, and lets the rest wait. Its decoupled momentum is the
author's residual: `decay = 0.999` there. Its other half is not here: DeMo steps by the *sign* of
the mean over peers, which is no sum of contributions, so that in a ledger it would need to know
all updates of a turn at once. A ledger adds what peers send, times their weight.

*Tiles.* A tensor is the matrix of its first dimension by all others, one row if it has one
dimension. A side of n elements is cut into ⌈n/tile⌉ equal parts, the last filled up with zeros
that never travel: the smallest padding, and no tile of 1 x 64 or 1 x 1 for prime sides (the
published code takes the largest divisor ≤ 64, and sends a prime vector dense). Of a tile of `a`
elements max(1, ⌊keep · a / tile²⌋) coefficients are kept, the smaller place among equals.

*Exactly.* With B = round(2¹⁴ · basis), Y = ((B·X >> 14)·Bᵀ) >> 14 forth and ((Bᵀ·Y >> 14)·B) >> 14
back, `>>` rounding to the nearest. All are integers below 2⁵³ held in float64, so that every order
of summation gives the same: a row of B has Σ|b| ≤ 2¹⁴·8·1.001 for 64 points, X and Y are within
int32, the first product is below 2⁴⁹, the second below 2⁵². What leaves int32 is cut off.

Payload: a zero byte (version), a byte of scale per tile, squeezed, mantissas of `bits` bits per
kept coefficient, squeezed (`mantissas.py`), and the Rice-coded gaps between kept places, counted
through the tiles, each row by row. With the defaults 32/4096 · (8.4 + 7.0) + 8/4096 = 0.12 bits per
element (the published code sends 12 bytes a coefficient: 0.75).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from shoal.compression import bits, entropy, mantissas, places, selection, shaped, symbols
from shoal.compression.codec import (
    INT32_MAX,
    Decoded,
    Encoded,
    PayloadError,
    Shapes,
    codec,
    to_integers,
)

VERSION = 0
SHIFT = 14
"""Fraction bits of the basis."""
SLAB = 1 << 21
"""Elements that are transformed at a time."""


class Kept(NamedTuple):
    """What a payload says."""

    places: Tensor
    """int64: which coefficients, counted through all tiles, increasing."""
    groups: mantissas.Groups
    """Scales of the tiles and mantissas of the coefficients."""


class Grid(NamedTuple):
    """The tiles of one tensor."""

    rows: int
    columns: int
    height: int
    width: int
    """Of a tile."""
    down: int
    across: int
    """How many tiles."""
    keep: int
    """Coefficients per tile."""

    @property
    def tiles(self) -> int:
        """Return the number of tiles."""
        return self.down * self.across

    @property
    def area(self) -> int:
        """Return the number of coefficients of a tile."""
        return self.height * self.width


class Band(NamedTuple):
    """A part of a tensor: whole tiles."""

    down: int
    across: int
    """How many tiles."""
    rows: slice
    columns: slice
    """Which elements; beyond the tensor's there is padding."""


@codec("dct")
@dataclass(frozen=True, slots=True)
class Dct:
    """Send the strongest waves of every tile; the others wait in the author's residual."""

    sparsifies: ClassVar[bool] = True

    keep: int = 32
    """Coefficients kept of a full tile; at least one of each is."""
    tile: int = 64
    """Longest side of a tile in elements, 4 to 64; larger ones choose better and take longer."""
    bits: int = 8
    """Bits per coefficient: 2 to 8."""
    entropy: str = "auto"
    """How symbols are coded: auto, none or huffman; range, zstd or any only without a ledger."""
    shapes: Shapes | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        """Refuse what has no layout."""
        if not 4 <= self.tile <= 64:
            raise ValueError(f"tile = {self.tile}; use 4 to 64")
        if not 1 <= self.keep <= self.tile**2 // 2:
            raise ValueError(f"keep = {self.keep}; use 1 to {self.tile**2 // 2}, half of a tile")
        if not 2 <= self.bits <= 8:
            raise ValueError(f"bits = {self.bits}; use 2 to 8")
        entropy.check(self.entropy)

    @property
    def inexact(self) -> str:
        """Say why a library's streams are not for the ledger."""
        return entropy.library(self.entropy)

    def shaped(self, shapes: Shapes) -> "Dct":
        """Return the codec for vectors of these tensors."""
        return shaped.with_shapes(self, shapes)

    def encode(self, x_D: Tensor, *, key: int = 0) -> Encoded:
        """Transform, keep the largest coefficients, round them to their tile's scale."""
        size, first = len(x_D), 0
        at, found = [x_D.new_zeros(0, dtype=torch.int64)], [x_D.new_zeros(0, dtype=torch.int64)]
        for grid, x_RC in self._matrices(x_D):
            for band in _bands(grid):
                y_TA = _forth(_tiles(x_RC, grid, band), grid)
                place_K = selection.top_of_rows(y_TA.abs().to(torch.int32), grid.keep)
                at.append(place_K + first)
                found.append(y_TA.reshape(-1)[place_K].to(torch.int64))
                first += y_TA.numel()
        place_K = torch.cat(at)
        counts_T = self._counts(size, x_D.device)
        groups = mantissas.nearest(torch.cat(found), counts_T, self.bits)
        idle_K = (groups.codes == 0).repeat_interleave(counts_T)
        kept = Kept(torch.where(idle_K, self._first_places(size, place_K), place_K), groups)
        return Encoded(self.pack(kept, size), self._decoded(kept, size))

    def decode(self, payload: bytes, size: int, device: torch.device | str = "cpu") -> Decoded:
        """Return the transform back, as dense integers."""
        return self._decoded(self.unpack(payload, size, device), size)

    def bound(self, size: int) -> int:
        """Return the size under the worst placing, when entropy coding gains nothing."""
        grids = self._grids(size)
        tiles, count = sum(g.tiles for g in grids), sum(g.tiles * g.keep for g in grids)
        coded = entropy.squeezed_bound(tiles, self.entropy)
        coded += symbols.squeezed_bound(count, mantissas.alphabet(self.bits), self.entropy)
        return 1 + coded + places.most_bytes(count, count, self._coefficients(size))

    def pack(self, kept: Kept, size: int) -> bytes:
        """Return the payload of what is kept."""
        alphabet = mantissas.alphabet(self.bits)
        return bits.join(
            (
                bytes([VERSION]),
                *entropy.squeeze_parts(kept.groups.codes, self.entropy),
                *symbols.squeezed(kept.groups.symbols, alphabet, self.entropy),
                places.write(kept.places, self._coefficients(size)),
            )
        )

    def unpack(self, payload: bytes, size: int, device: torch.device | str = "cpu") -> Kept:
        """Return what is kept; inverse of `pack`, refuses everything else."""
        grids = self._grids(size)
        tiles, count = sum(g.tiles for g in grids), sum(g.tiles * g.keep for g in grids)
        reader = bits.Reader(payload, device)
        if (version := reader.number(1)) != VERSION:
            raise PayloadError(f"unknown version {version}")
        codes_T = entropy.expand(reader, tiles, self.entropy)
        symbols_K = symbols.expanded(reader, count, mantissas.alphabet(self.bits), self.entropy)
        place_K = places.read(reader, count, self._coefficients(size))
        kept = Kept(place_K, mantissas.Groups(codes_T, symbols_K))
        self._check(kept, size)
        return kept

    def _check(self, kept: Kept, size: int) -> None:
        """Refuse places outside their tile, values outside int32, and places of zeros."""
        counts_T = self._counts(size, kept.places.device)
        mantissas.values(kept.groups, counts_T, self.bits)
        area_T = self._areas(size, kept.places.device)
        end_T = area_T.cumsum(0)
        tile_K = torch.repeat_interleave(counts_T)
        if bool(((kept.places < (end_T - area_T)[tile_K]) | (kept.places >= end_T[tile_K])).any()):
            raise PayloadError("a tile keeps more or fewer coefficients than it should")
        idle_K = (kept.groups.codes == 0)[tile_K]
        if bool((idle_K & (kept.places != self._first_places(size, kept.places))).any()):
            raise PayloadError("a tile of scale zero must keep its first coefficients")

    def _decoded(self, kept: Kept, size: int) -> Decoded:
        device = kept.places.device
        counts_T = self._counts(size, device)
        values_K = mantissas.values(kept.groups, counts_T, self.bits)
        out_D = torch.empty(size, dtype=torch.int32, device=device)
        first = taken = 0
        for grid, out_RC in self._matrices(out_D):
            for band in _bands(grid):
                tiles = band.down * band.across
                y_TA = torch.zeros(tiles * grid.area, dtype=torch.float64, device=device)
                here = slice(taken, taken + tiles * grid.keep)
                y_TA[kept.places[here] - first] = values_K[here].to(torch.float64)
                _put(out_RC, _back(y_TA.reshape(tiles, -1), grid), grid, band)
                first, taken = first + len(y_TA), here.stop
        return Decoded(size, out_D)

    def _matrices(self, x_D: Tensor) -> Iterator[tuple[Grid, Tensor]]:
        """Yield each tensor's tiles and the tensor as a matrix."""
        first = 0
        for grid in self._grids(len(x_D)):
            last = first + grid.rows * grid.columns
            yield grid, x_D[first:last].reshape(grid.rows, grid.columns)
            first = last

    def _grids(self, size: int) -> list[Grid]:
        grids = []
        for shape in shaped.tensors(self.shapes, size):
            rows = shape[0] if len(shape) > 1 else 1
            columns = math.prod(shape) // rows
            (height, down), (width, across) = self._split(rows), self._split(columns)
            keep = max(1, self.keep * height * width // self.tile**2)
            grids.append(Grid(rows, columns, height, width, down, across, keep))
        return grids

    def _split(self, side: int) -> tuple[int, int]:
        """Return the side of a tile and how many tiles cover a side."""
        parts = -(-side // self.tile)
        length = -(-side // parts)
        return length, -(-side // length)

    def _coefficients(self, size: int) -> int:
        return sum(g.tiles * g.area for g in self._grids(size))

    def _counts(self, size: int, device: torch.device) -> Tensor:
        """Return how many coefficients each tile keeps."""
        return self._per_tile(size, [g.keep for g in self._grids(size)], device)

    def _areas(self, size: int, device: torch.device) -> Tensor:
        return self._per_tile(size, [g.area for g in self._grids(size)], device)

    def _per_tile(self, size: int, numbers: list[int], device: torch.device) -> Tensor:
        tiles = torch.tensor([g.tiles for g in self._grids(size)], device=device)
        return torch.tensor(numbers, device=device).repeat_interleave(tiles)

    def _first_places(self, size: int, place_K: Tensor) -> Tensor:
        """Return the places of the first coefficients of every tile."""
        counts_T, area_T = self._counts(size, place_K.device), self._areas(size, place_K.device)
        start_T = area_T.cumsum(0) - area_T - (counts_T.cumsum(0) - counts_T)
        return start_T.repeat_interleave(counts_T) + torch.arange(
            len(place_K), device=place_K.device
        )


def _bands(grid: Grid) -> Iterator[Band]:
    """Yield parts of a tensor, tiles in order, of a slab at most (one tile at least)."""
    down = max(1, SLAB // (grid.across * grid.area))
    across = max(1, min(grid.across, SLAB // grid.area))
    for row in range(0, grid.down, down):
        for column in range(0, grid.across, across):
            yield Band(
                min(down, grid.down - row),
                min(across, grid.across - column),
                slice(row * grid.height, (row + down) * grid.height),
                slice(column * grid.width, (column + across) * grid.width),
            )


def _tiles(x_RC: Tensor, grid: Grid, band: Band) -> Tensor:
    """Return the tiles of a band as integers (float64), padded with zeros: [tile, row, column]."""
    part = to_integers(x_RC[band.rows, band.columns]).to(torch.float64)
    bottom = band.down * grid.height - part.shape[0]
    right = band.across * grid.width - part.shape[1]
    padded = torch.nn.functional.pad(part, (0, right, 0, bottom))
    cut = padded.reshape(band.down, grid.height, band.across, grid.width)
    return cut.transpose(1, 2).reshape(-1, grid.height, grid.width)


def _put(out_RC: Tensor, x_THW: Tensor, grid: Grid, band: Band) -> None:
    """Write the tiles of a band to where they were cut; inverse of `_tiles`."""
    cut = x_THW.reshape(band.down, band.across, grid.height, grid.width).transpose(1, 2)
    whole = cut.reshape(band.down * grid.height, band.across * grid.width)
    part = out_RC[band.rows, band.columns]
    part.copy_(whole[: part.shape[0], : part.shape[1]].clamp(-INT32_MAX, INT32_MAX))


def _forth(x_THW: Tensor, grid: Grid) -> Tensor:
    """Return the coefficients of tiles, within int32: [tile, place]."""
    down, across = (basis(n).to(x_THW.device) for n in (grid.height, grid.width))
    y_THW = _shifted(_shifted(down @ x_THW) @ across.T)
    return y_THW.reshape(len(x_THW), -1).clamp(-INT32_MAX, INT32_MAX)


def _back(y_TA: Tensor, grid: Grid) -> Tensor:
    """Return tiles from their coefficients; inverse of `_forth` up to rounding."""
    down, across = (basis(n).to(y_TA.device) for n in (grid.height, grid.width))
    y_THW = y_TA.reshape(-1, grid.height, grid.width)
    return _shifted(_shifted(down.T @ y_THW) @ across)


def _shifted(x: Tensor) -> Tensor:
    """Divide integers by 2¹⁴, to the nearest, halves up; every step is exact in float64."""
    return x.mul_(2.0**-SHIFT).add_(0.5).floor_()


@cache
def basis(points: int) -> Tensor:
    """Return round(2¹⁴ · orthonormal DCT-II) as float64: [frequency, place]."""
    rows = [
        [
            round(2**SHIFT * math.sqrt((2 if f else 1) / points) * _cosine(f * (2 * n + 1), points))
            for n in range(points)
        ]
        for f in range(points)
    ]
    return torch.tensor(rows, dtype=torch.float64)


def _cosine(multiple: int, points: int) -> float:
    return math.cos(math.pi * (multiple % (4 * points)) / (2 * points))
