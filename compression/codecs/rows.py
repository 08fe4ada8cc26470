"""Whole rows of the largest norm: structured sparsity, whose places cost next to nothing.

A tensor of two or more dimensions consists of the rows of its first dimension, any other of runs of
`row` elements (the last may be shorter). Of each tensor the k = ⌊rows · density⌋ rows (one at
least) of largest Σx² are kept, the smaller row among equals: a structured update in the sense of
Konečný et al., "Federated learning: strategies for improving communication efficiency" (2016),
chosen by norm as in block-wise top-k. It fits updates that live in few rows: embeddings, of which
a turn sees few words; output channels; heads.

Payload: a zero byte (version), the number of elements in the kept rows (u32, little-endian; a last
run may be short), a byte of scale per kept row, squeezed, the mantissas of their elements, squeezed
(`mantissas.py`), and the Rice-coded gaps between kept rows, counted through all tensors. Rows are
kept per tensor because rows of different lengths have no common measure: by norm long ones would
always win, by mean square short ones. Sums of squares are exact (two words).
"""

import math
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from shoal.compression import bits, entropy, mantissas, places, shaped, symbols
from shoal.compression.codec import (
    Decoded,
    Encoded,
    PayloadError,
    Shapes,
    codec,
    to_integers,
)

VERSION = 0
SLAB = 1 << 22
"""Elements whose squares are held at a time."""


class Kept(NamedTuple):
    """What a payload says."""

    rows: Tensor
    """int64: which rows, counted through all tensors, increasing."""
    groups: mantissas.Groups
    """Their scales and the mantissas of their elements."""


class Grid(NamedTuple):
    """The rows of one tensor."""

    first: int
    """Element at which the tensor begins."""
    size: int
    length: int
    """Elements per row; the last row has what is left."""

    @property
    def rows(self) -> int:
        """Return the number of rows."""
        return -(-self.size // self.length)


@codec("rows")
@dataclass(frozen=True, slots=True)
class Rows:
    """Send the rows that moved most, every element of them."""

    sparsifies: ClassVar[bool] = True

    density: float = 1 / 16
    """Fraction of each tensor's rows that are kept; at least one is."""
    bits: int = 4
    """1: sign and mean magnitude of the row; 2: three levels; 4 or 8: mantissas."""
    row: int = 64
    """Elements of a row in tensors of one dimension."""
    entropy: str = "auto"
    """How symbols are coded: auto, none or huffman; range, zstd or any only without a ledger."""
    shapes: Shapes | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        """Refuse what has no layout."""
        if not 0 < self.density <= 0.5:
            raise ValueError(f"density = {self.density}; use one in (0, 0.5], or kind = 'dense'")
        if self.bits not in (1, 2, 4, 8):
            raise ValueError(f"bits = {self.bits}; use 1, 2, 4 or 8")
        if not 1 <= self.row <= 1 << 20:
            raise ValueError(f"row = {self.row}; use 1 to 1048576")
        entropy.check(self.entropy)

    @property
    def inexact(self) -> str:
        """Say why a library's streams are not for the ledger."""
        return entropy.library(self.entropy)

    def shaped(self, shapes: Shapes) -> "Rows":
        """Return the codec for vectors of these tensors."""
        return shaped.with_shapes(self, shapes)

    def encode(self, x_D: Tensor, *, key: int = 0) -> Encoded:
        """Keep the rows of largest norm."""
        size, at, first = len(x_D), [x_D.new_zeros(0, dtype=torch.int64)], 0
        for grid in self._grids(size):
            x_T = x_D[grid.first : grid.first + grid.size]
            at.append(_largest(x_T, grid.length, self._keep(grid)) + first)
            first += grid.rows
        row_K = torch.cat(at)
        index_N, lengths_K = self._elements(row_K, size)
        groups = mantissas.nearest(to_integers(x_D[index_N]), lengths_K, self.bits)
        values_N = mantissas.values(groups, lengths_K, self.bits).to(torch.int32)
        payload = self.pack(Kept(row_K, groups), size)
        return Encoded(payload, Decoded(size, values_N, index_N))

    def decode(self, payload: bytes, size: int, device: torch.device | str = "cpu") -> Decoded:
        """Return the elements of the kept rows; the rest is not touched."""
        return self._read(payload, size, device)[1]

    def bound(self, size: int) -> int:
        """Return the size when the longest rows are kept and entropy coding gains nothing."""
        count, rows, elements = self._counts(size)
        coded = entropy.squeezed_bound(count, self.entropy)
        coded += symbols.squeezed_bound(elements, self._alphabet, self.entropy)
        return 5 + coded + places.most_bytes(count, count, rows)

    def pack(self, kept: Kept, size: int) -> bytes:
        """Return the payload of what is kept."""
        _, rows, _ = self._counts(size)
        return bits.join(
            (
                bytes([VERSION]),
                len(kept.groups.symbols).to_bytes(4, "little"),
                *entropy.squeeze_parts(kept.groups.codes, self.entropy),
                *symbols.squeezed(kept.groups.symbols, self._alphabet, self.entropy),
                places.write(kept.rows, rows),
            )
        )

    def unpack(self, payload: bytes, size: int, device: torch.device | str = "cpu") -> Kept:
        """Return what is kept; inverse of `pack`, refuses everything else."""
        return self._read(payload, size, device)[0]

    def _read(self, payload: bytes, size: int, device: torch.device | str) -> tuple[Kept, Decoded]:
        """Return what the payload says, and what it decodes to."""
        count, rows, most = self._counts(size)
        reader = bits.Reader(payload, device)
        if (version := reader.number(1)) != VERSION:
            raise PayloadError(f"unknown version {version}")
        if (elements := reader.number(4)) > most:
            raise PayloadError(f"{elements} elements where at most {most} are kept")
        codes_K = entropy.expand(reader, count, self.entropy)
        symbols_N = symbols.expanded(reader, elements, self._alphabet, self.entropy)
        row_K = places.read(reader, count, rows)
        self._check(row_K, size)
        index_N, lengths_K = self._elements(row_K, size)
        if len(index_N) != elements:
            raise PayloadError(f"{elements} elements stated, the rows have {len(index_N)}")
        groups = mantissas.Groups(codes_K, symbols_N)
        values_N = mantissas.values(groups, lengths_K, self.bits).to(torch.int32)
        return Kept(row_K, groups), Decoded(size, values_N, index_N)

    def _check(self, row_K: Tensor, size: int) -> None:
        """Refuse rows that are not so many of each tensor as there should be."""
        grids = self._grids(size)
        ends = torch.tensor([0, *(g.rows for g in grids)], device=row_K.device).cumsum(0)
        if torch.searchsorted(row_K, ends).diff().tolist() != [self._keep(g) for g in grids]:
            raise PayloadError("a tensor keeps more or fewer rows than it should")

    def _elements(self, row_K: Tensor, size: int) -> tuple[Tensor, Tensor]:
        """Return the indices of the elements of rows, and how many each row has."""
        grids = self._grids(size)
        table = row_K.new_tensor([(g.first, g.size, g.length, g.rows) for g in grids])
        first_T, size_T, length_T, rows_T = table.reshape(-1, 4).unbind(1)
        ends_T = rows_T.cumsum(0)
        tensor_K = torch.searchsorted(ends_T, row_K, right=True)
        within_K = (row_K - (ends_T - rows_T)[tensor_K]) * length_T[tensor_K]
        lengths_K = (size_T[tensor_K] - within_K).minimum(length_T[tensor_K])
        start_K = first_T[tensor_K] + within_K - (lengths_K.cumsum(0) - lengths_K)
        places_N = start_K.repeat_interleave(lengths_K)
        return places_N + torch.arange(len(places_N), device=row_K.device), lengths_K

    def _grids(self, size: int) -> list[Grid]:
        grids, first = [], 0
        for shape in shaped.tensors(self.shapes, size):
            count = math.prod(shape)
            grids.append(Grid(first, count, count // shape[0] if len(shape) > 1 else self.row))
            first += count
        return grids

    def _counts(self, size: int) -> tuple[int, int, int]:
        """Return how many rows are kept, of how many, and their elements at most."""
        grids = self._grids(size)
        elements = sum(min(self._keep(g) * g.length, g.size) for g in grids)
        return sum(self._keep(g) for g in grids), sum(g.rows for g in grids), elements

    def _keep(self, grid: Grid) -> int:
        return max(1, int(grid.rows * self.density))

    @property
    def _alphabet(self) -> int:
        return mantissas.alphabet(self.bits)


def _largest(x_T: Tensor, length: int, keep: int) -> Tensor:
    """Return the `keep` rows of largest Σx², increasing; of equals the smaller."""
    whole = len(x_T) // length
    sums = [_squares(x_T[: whole * length].reshape(whole, length))]
    if len(x_T) % length:
        sums.append(_squares(x_T[whole * length :].reshape(1, -1)))
    high_R, low_R = (torch.cat(part) for part in zip(*sums, strict=True))
    order_R = low_R.sort(stable=True, descending=True).indices
    order_R = order_R[high_R[order_R].sort(stable=True, descending=True).indices]
    return order_R[:keep].sort().values


def _squares(x_RC: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sums of squares of rows: multiples of 2³¹, and what is left."""
    rows, length = x_RC.shape
    high_R, low_R = (torch.zeros(rows, dtype=torch.int64, device=x_RC.device) for _ in range(2))
    step = max(1, SLAB // length)
    for row in range(0, rows, step):
        for column in range(0, length, SLAB):
            x_SC = x_RC[row : row + step, column : column + SLAB]
            squares_SC = to_integers(x_SC).square()
            high_R[row : row + step] += (squares_SC >> 31).sum(1)
            low_R[row : row + step] += (squares_SC & 0x7FFFFFFF).sum(1)
    return high_R + (low_R >> 31), low_R & 0x7FFFFFFF
