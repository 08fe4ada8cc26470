"""Low rank: every matrix as the product of two thin ones, found by power iteration.

Vogels, Karimireddy and Jaggi, "PowerSGD" (arXiv 1905.13727), algorithm 1, for updates that are sent
one by one: nobody averages the first factor before the second is computed, so both travel, and the
start matrix is random (±1, from the key) instead of the last turn's. A tensor of two dimensions and
more is a matrix M of m rows (its first dimension) and n columns; where m·n / (rank·(m + n)) ≤ 2,
and for vectors, it is sent as 8-bit mantissas with a scale per 256 elements instead.

    repeat `iterations` times:  P ← orth(M·Q);  Q ← Mᵀ·P   (Q ← orth(Q) before the next)
    M ≈ Σ_i p_i (Mᵀ p_i)ᵀ / (p_i·p_i)

*Exact on every device and any number of threads*: matrices hold integers in float64 and no partial
sum of a product leaves 2^53, so the order of additions does not matter. M is rounded to at most 20
bits, columns of P and Q to 15 and a sign; for sides up to 2^22. Gram-Schmidt takes its coefficients
from exact dot products, and its other steps are single rounded operations per element.

A column of P has a largest mantissa of exactly 2^(bits-1) - 1. A column of Q has an exponent f in
-16 … 31, at most 16 above the least of its matrix. An element is Σ_i P_ri · Q_ci · 2^-f_i, rounded
to the nearest integer (ties to even) within int32. Columns that say nothing are zero, f is -16.

Payload: f + 16 of every column (1 byte), the scale of every 256 elements of the other tensors one
after the other (1 byte), the upper bytes of all mantissas (P then Q of each matrix by rows, plus
2^(bits-1)), squeezed; 127 + mantissa of the other tensors' elements, squeezed; with 16 bits the
lower bytes of all mantissas.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from shoal.compression import bits, entropy, scales, shaped, splitmix, symbols
from shoal.compression.codec import INT32_MAX, Decoded, Encoded, PayloadError, Shapes, codec

BLOCK = 256
TOP = 127
"""Largest mantissa of elements that are sent one by one."""
LARGEST = 2.0**31 - 128
"""The largest float32 within int32; larger magnitudes are sent as this."""
LONGEST = 1 << 22
"""Longest side of a matrix for which sums stay exact."""
LEAST, MOST, SPAN = -16, 31, 16
"""Exponents of Q's columns, and how far those of one matrix are apart."""
FINE = 32767
"""Largest mantissa of a factor while it is computed."""
_FAR = 128
_POWERS = torch.tensor([2.0**e for e in range(-_FAR, _FAR)], dtype=torch.float64)


class Factors(NamedTuple):
    """What a payload says."""

    exponents: Tensor
    """uint8: f + 16 of every column of every matrix."""
    mantissas: Tensor
    """int32: P then Q of every matrix, by rows."""
    scales: Tensor
    """uint8: the code of the scale of every 256 other elements."""
    others: Tensor
    """uint8: 127 + mantissa of every other element."""


class Tile(NamedTuple):
    """One tensor of the vector."""

    start: int
    rows: int
    columns: int
    rank: int
    """0: its elements are sent one by one."""

    @property
    def size(self) -> int:
        """Return how many elements it has."""
        return self.rows * self.columns

    @property
    def numbers(self) -> int:
        """Return how many mantissas its factors have."""
        return self.rank * (self.rows + self.columns)


@codec("lowrank")
@dataclass(frozen=True, slots=True)
class LowRank:
    """Send the strongest directions of every matrix; the others wait in the residual."""

    sparsifies: ClassVar[bool] = True

    rank: int = 4
    """Columns of each factor; bytes grow with it."""
    iterations: int = 2
    """Power iterations; 2 come within a few per cent of the best factors of this rank."""
    bits: int = 16
    """Bits of a factor's mantissas: 8 or 16."""
    entropy: str = "auto"
    """How mantissas are squeezed; 'auto' takes the shorter of plain bytes and Huffman."""
    shapes: Shapes | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        """Refuse what has no layout."""
        if not 1 <= self.rank <= 64:
            raise ValueError(f"rank = {self.rank}; use 1 to 64")
        if not 1 <= self.iterations <= 16:
            raise ValueError(f"iterations = {self.iterations}; use 1 to 16")
        if self.bits not in (8, 16):
            raise ValueError(f"bits = {self.bits}; use 8 or 16")
        entropy.check(self.entropy)

    @property
    def inexact(self) -> str:
        """Why these settings may not be used in the ledger; empty: they may."""
        return entropy.library(self.entropy)

    @property
    def _top(self) -> int:
        return (1 << (self.bits - 1)) - 1

    def shaped(self, shapes: Shapes) -> "LowRank":
        """Return the codec for vectors of these tensors."""
        return shaped.with_shapes(self, shapes)

    def encode(self, x_D: Tensor, *, key: int = 0) -> Encoded:
        """Find the factors of every matrix, round the elements of the other tensors."""
        size, tiles, word = len(x_D), self._tiles(len(x_D)), 0
        none = torch.zeros(0, dtype=torch.int32, device=x_D.device)
        exponents, mantissas, others = [none], [none], [x_D[:0]]
        for tile in tiles:
            x_T = x_D[tile.start : tile.start + tile.size]
            if tile.rank:
                start_CR = _signs(key, word, tile.columns * tile.rank, x_D.device)
                word += -(-tile.columns * tile.rank // 64)
                x_MN = x_T.reshape(tile.rows, tile.columns)
                start_CR = start_CR.reshape(tile.columns, tile.rank)
                f_R, left_MR, right_NR = factors(x_MN, start_CR, self.iterations, self._top)
                exponents.append(f_R - LEAST)
                mantissas += [left_MR.reshape(-1), right_NR.reshape(-1)]
            else:
                others.append(x_T)
        scale_B, symbol_E = _rounded(torch.cat(others))
        found = Factors(
            torch.cat(exponents).to(torch.uint8), torch.cat(mantissas), scale_B, symbol_E
        )
        return Encoded(self.pack(found, size), self._decoded(found, size))

    def decode(self, payload: bytes, size: int, device: torch.device | str = "cpu") -> Decoded:
        """Return the products of the factors and the other elements."""
        return self._decoded(self.unpack(payload, size, device), size)

    def bound(self, size: int) -> int:
        """Return the most bytes that a payload of `size` elements can have."""
        columns, numbers, others = self._counts(size)
        fixed = columns + -(-others // BLOCK) + (numbers if self.bits == 16 else 0)
        return fixed + sum(symbols.squeezed_bound(n, 256, self.entropy) for n in (numbers, others))

    def pack(self, found: Factors, size: int) -> bytes:
        """Return the payload of factors and other elements."""
        whole = found.mantissas + (self._top + 1)
        upper = (whole >> (self.bits - 8)).to(torch.uint8)
        lower = [(whole & 255).to(torch.uint8)] if self.bits == 16 else []
        streams = (symbols.squeezed(s, 256, self.entropy) for s in (upper, found.others))
        squeezed = [part for stream in streams for part in stream]
        return bits.join([found.exponents, found.scales, *squeezed, *lower])

    def unpack(self, payload: bytes, size: int, device: torch.device | str = "cpu") -> Factors:
        """Return factors and other elements; inverse of `pack`, refuses everything else."""
        columns, numbers, others = self._counts(size)
        reader = bits.Reader(payload, device)
        exponent_R = reader.take(columns)
        scale_B = reader.take(-(-others // BLOCK))
        whole = symbols.expanded(reader, numbers, 256, self.entropy).to(torch.int32)
        symbol_E = symbols.expanded(reader, others, 256, self.entropy)
        if self.bits == 16:
            whole = (whole << 8) | reader.take(numbers)
        reader.end()
        found = Factors(exponent_R, whole - (self._top + 1), scale_B, symbol_E)
        self._check(found, size)
        return found

    def _check(self, found: Factors, size: int) -> None:
        """Refuse columns that are not in normal form, and elements outside int32."""
        if len(found.mantissas) and int(found.mantissas.min()) < -self._top:
            raise PayloadError("mantissa outside its range")
        for f_R, left_MR, right_NR in self._matrices(found, size):
            largest_R = left_MR.abs().amax(0)
            alive_R = right_NR.abs().amax(0) > 0
            if not torch.equal(largest_R, alive_R.to(torch.int32) * self._top):
                raise PayloadError("a column of a factor is not in normal form")
            if bool(((f_R > LEAST) & ~alive_R).any()) or int(f_R.max()) > MOST:
                raise PayloadError("a column's exponent is outside its range")
            if bool(alive_R.any()) and int(f_R[alive_R].max() - f_R[alive_R].min()) > SPAN:
                raise PayloadError("a matrix's exponents are too far apart")
        if not len(found.others):
            return
        if int(found.scales.max()) > scales.largest(INT32_MAX // TOP):
            raise PayloadError("value outside int32")
        if int(found.others.max()) > 2 * TOP:
            raise PayloadError("symbol outside the alphabet")
        padded = torch.nn.functional.pad(found.others, (0, -len(found.others) % BLOCK), value=TOP)
        idle_BK = padded.reshape(-1, BLOCK)[(found.scales == 0).nonzero().reshape(-1)]
        if bool((idle_BK != TOP).any()):
            raise PayloadError("a block of scale zero has mantissas")

    def _decoded(self, found: Factors, size: int) -> Decoded:
        tiles = self._tiles(size)
        value_D = torch.empty(size, dtype=torch.int32, device=found.mantissas.device)
        matrices = self._matrices(found, size)
        other_E, at = _values(found.scales, found.others), 0
        for tile in tiles:
            value_T = value_D[tile.start : tile.start + tile.size]
            if tile.rank:
                _multiply(*next(matrices), value_T.view(tile.rows, tile.columns))
            else:
                value_T[:] = other_E[at : at + tile.size]
                at += tile.size
        return Decoded(size, value_D)

    def _matrices(self, found: Factors, size: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield exponents f, P and Q of every matrix, as int32."""
        column = at = 0
        for tile in self._tiles(size):
            if tile.rank:
                both = found.mantissas[at : at + tile.numbers].reshape(-1, tile.rank)
                f_R = found.exponents[column : column + tile.rank].to(torch.int32) + LEAST
                yield f_R, both[: tile.rows], both[tile.rows :]
                column, at = column + tile.rank, at + tile.numbers

    def _tiles(self, size: int) -> list[Tile]:
        found, start = [], 0
        for shape in shaped.tensors(self.shapes, size):
            length = math.prod(shape)
            rows = shape[0] if len(shape) > 1 else length
            columns = length // rows
            pays = length > 2 * self.rank * (rows + columns) and max(rows, columns) <= LONGEST
            found.append(Tile(start, rows, columns, self.rank if pays and len(shape) > 1 else 0))
            start += length
        return found

    def _counts(self, size: int) -> tuple[int, int, int]:
        """Return the numbers of columns, of mantissas and of other elements."""
        tiles = self._tiles(size)
        others = sum(tile.size for tile in tiles if not tile.rank)
        return sum(tile.rank for tile in tiles), sum(tile.numbers for tile in tiles), others


def factors(
    x_MN: Tensor, start_NR: Tensor, iterations: int, top: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return exponents f, P and Q (int32) with x ≈ Σ_i p_i q_iᵀ 2^-f_i; |p| and |q| up to `top`.

    `start_NR` holds integers below 2^15 in float64.
    """
    matrix = _Integers(x_MN)
    right_NR = start_NR
    for left in range(iterations, 0, -1):
        left_MR = orthogonal(matrix.times(right_NR), top if left == 1 else FINE)
        right_NR = matrix.transposed_times(left_MR)
        if left > 1:
            right_NR = orthogonal(right_NR, FINE)
    # What column i of Q stands for is right · 2^shift / square; f brings its largest below 2^15.
    square_R = (left_MR * left_MR).sum(0).clamp(min=1)
    largest_R = right_NR.abs().amax(0) / square_R * _power(matrix.shift)
    f_R = top.bit_length() - torch.frexp(largest_R).exponent
    f_R = torch.where(largest_R > 0, f_R.clamp(LEAST, MOST), MOST)
    f_R = torch.minimum(f_R, f_R.min() + SPAN)
    factor_R = _power(matrix.shift + f_R) / square_R
    right_NR = (right_NR * factor_R).round().clamp(-top, top)
    alive_R = right_NR.abs().amax(0) > 0
    f_R = torch.where(alive_R, f_R, LEAST)
    return f_R, (left_MR * alive_R).to(torch.int32), right_NR.to(torch.int32)


def orthogonal(column_MR: Tensor, top: int) -> Tensor:
    """Return orthogonal columns of integers up to `top` that span what integer columns span.

    Gram-Schmidt, twice for every column, which is brought to full length before each time: a column
    that lies almost in the span of those before it would else be left with rounding errors.
    Columns that lie in it altogether become zero.
    """
    # Projections shorten a column but for rounding: one bit more than the sum of products needs.
    room = 52 - FINE.bit_length() - len(column_MR).bit_length()
    found: list[tuple[Tensor, Tensor]] = []
    for column_M in column_MR.unbind(1):
        for _ in range(2):
            column_M = _to_bits(column_M, min(20, room))
            for other_M, square in found:
                share = (other_M * column_M).sum() / square
                column_M = (column_M - share * other_M).round()
        largest = column_M.abs().amax()
        factor = torch.where(largest > 0, top / largest, 0)
        column_M = (column_M * factor).round()
        found.append((column_M, (column_M * column_M).sum().clamp(min=1)))
    return torch.stack([column_M for column_M, _ in found], 1)


class _Integers:
    """A matrix of float32 as integers of so few bits that its products with factors are exact."""

    def __init__(self, x_MN: Tensor) -> None:
        self._x_MN = x_MN
        largest = torch.maximum(x_MN.amax(), -x_MN.amin())
        symbols.check_finite(largest)
        room = min(20, 53 - FINE.bit_length() - max(x_MN.shape).bit_length())
        exponent = torch.frexp(largest.clamp(max=LARGEST)).exponent
        self.shift = (exponent - room).clamp(min=0)
        """The matrix is about 2^shift times these integers."""
        self._shrink = _power(-self.shift).to(torch.float32)

    def times(self, right_NR: Tensor) -> Tensor:
        return torch.cat([self._rows(part) @ right_NR for part in self._parts()])

    def transposed_times(self, left_MR: Tensor) -> Tensor:
        total = left_MR.new_zeros(self._x_MN.shape[1], left_MR.shape[1])
        for part in self._parts():
            total += self._rows(part).T @ left_MR[part]
        return total

    def _rows(self, part: slice) -> Tensor:
        limited = self._x_MN[part].clamp(-LARGEST, LARGEST)
        return (limited * self._shrink).round().to(torch.float64)

    def _parts(self) -> Iterator[slice]:
        return _row_parts(self._x_MN)


def _row_parts(matrix_MN: Tensor) -> Iterator[slice]:
    """Yield slices of rows so that float64 copies of them are small beside the model."""
    rows, columns = matrix_MN.shape
    on_cpu = matrix_MN.device.type == "cpu"
    some = max(1, (16 * symbols.PIECE if on_cpu else symbols.DEVICE_PIECE) // columns)
    return (slice(start, min(start + some, rows)) for start in range(0, rows, some))


def _multiply(f_R: Tensor, left_MR: Tensor, right_NR: Tensor, out_MN: Tensor) -> None:
    """Write Σ_i p_i q_iᵀ 2^-f_i, rounded, within int32; sums stay below 2^53 (64 columns)."""
    highest = f_R.max()
    # Columns of zeros have the least f and would widen the span; their power does not matter.
    right_NR = right_NR.to(torch.float64) * _power((highest - f_R).clamp(max=SPAN))
    left_MR, shrink = left_MR.to(torch.float64), _power(-highest)
    for part in _row_parts(out_MN):
        product = (left_MR[part] @ right_NR.T).mul_(shrink).round_()
        out_MN[part] = product.clamp_(-INT32_MAX, INT32_MAX).to(torch.int32)


def _to_bits(column_M: Tensor, width: int) -> Tensor:
    """Return integers (float64) times a power of two so that the largest has `width` bits."""
    exponent = torch.frexp(column_M.abs().amax()).exponent
    return (column_M * _power(width - exponent)).round()


def _power(exponent: Tensor) -> Tensor:
    """Return 2^exponent as float64, exactly (a library's pow need not be)."""
    index = (exponent + _FAR).clamp(0, 2 * _FAR - 1).to(torch.int64)
    return _POWERS.to(exponent.device)[index]


def _signs(key: int, word: int, count: int, device: torch.device) -> Tensor:
    """Return ±1 (float64) from the bits of the generator's words from `word` on."""
    words = splitmix.words(key, -(-count // 64), start=word, device=device)
    bit_N = (words[:, None] >> torch.arange(64, device=device)) & 1
    return (1 - 2 * bit_N).reshape(-1)[:count].to(torch.float64)


def _rounded(x_E: Tensor) -> tuple[Tensor, Tensor]:
    """Return the scale code of every block and 127 + mantissa of every element, as uint8."""
    device = x_E.device
    scale_B = torch.empty(-(-len(x_E) // BLOCK), dtype=torch.uint8, device=device)
    symbol_E = torch.empty(len(x_E), dtype=torch.uint8, device=device)

    def piece(part: slice) -> None:
        x_BK = symbols.blocks(x_E[part], BLOCK)
        largest_B = x_BK.abs().amax(1)
        symbols.check_finite(largest_B)
        whole_B = largest_B.clamp(max=LARGEST).round().to(torch.int64)
        code_B = scales.up(-(-whole_B // TOP), most=INT32_MAX // TOP)
        unit_B = scales.of(code_B)
        mantissa_BK = x_BK.to(torch.float64) / unit_B.clamp(min=1)[:, None]
        mantissa_BK = mantissa_BK.round().clamp(-TOP, TOP) * (unit_B > 0)[:, None]
        scale_B[part.start // BLOCK :][: len(code_B)] = code_B
        symbol_E[part] = (mantissa_BK.reshape(-1)[: part.stop - part.start] + TOP).to(torch.uint8)

    symbols.spread(piece, len(x_E), device, multiple=BLOCK)
    return scale_B, symbol_E


def _values(scale_B: Tensor, symbol_E: Tensor) -> Tensor:
    value_E = torch.empty(len(symbol_E), dtype=torch.int32, device=symbol_E.device)

    def piece(part: slice) -> None:
        unit_B = scales.of(scale_B[part.start // BLOCK : -(-part.stop // BLOCK)]).to(torch.int32)
        whole_BK = symbols.blocks(symbol_E[part].to(torch.int32) - TOP, BLOCK) * unit_B[:, None]
        value_E[part] = whole_BK.reshape(-1)[: part.stop - part.start]

    symbols.spread(piece, len(symbol_E), symbol_E.device, multiple=BLOCK)
    return value_E
