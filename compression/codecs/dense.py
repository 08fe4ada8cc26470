"""Every element, as one of 2, 3 or 4 levels or a 4- or 8-bit mantissa, times an integer scale.

Payload: the scales, then the symbols, both squeezed (`entropy.squeeze`). There is one scale for
each `block` elements, an integer in units of q in one byte (`scales.py`); with `block = 0` there is
one for the whole vector, in 4 bytes. Symbols are packed into bytes, the first weighing least:

    levels = 2   8 to a byte: 0 is -s, 1 is +s; s = mean |x| of the block (Bernstein et al.,
                 "signSGD", 2018; with one scale per tensor, as in 1-bit Adam, block = 0)
    levels = 3   5 to a byte in base 3: 0 is -s, 1 is 0, 2 is +s; s = 1.5 · mean |x|
    bits = 2     4 to a byte: j is (2j - 3)·u; u = 5/8 · mean |x|, near the best for a Gaussian
    bits = 4     2 to a byte: mantissa + 7, and
    bits = 8     1 to a byte: mantissa + 127; the scale is the smallest that fits the largest |x|

Three levels take ≈ 1.56 bits an element on Gaussian input (entropy of a symbol 1.54).
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from shoal.compression import bits, entropy, parallel, scales
from shoal.compression.codec import INT32_MAX, Decoded, Encoded, PayloadError, codec

MOST_BLOCK = 1 << 20
_SLAB = 5 * bits.SLAB // 4
"""Elements at a time in torch: whole bytes of symbols, whatever their base."""
NOT_FINITE = "cannot encode a vector with NaN or infinite elements"
_PROBLEMS = {
    1: "symbol outside the alphabet",
    2: "a block of scale zero has symbols",
    4: "value outside int32",
}


class Content(NamedTuple):
    """What a payload says."""

    scale_B: Tensor
    """int64 scale of each block, in units of q."""
    packed: Tensor
    """uint8: the symbols of all elements, packed."""


@codec("dense")
@dataclass(frozen=True, slots=True)
class Dense:
    """Send every element coarsely; what rounding drops stays in the author's residual."""

    levels: int = 3
    """2: {-s, s} with s = mean |x| of the block; 3: {-s, 0, s} with s = 1.5 · mean |x|."""
    bits: int = 0
    """2: four levels; 4 or 8: signed mantissas of so many bits; 0: as `levels` says."""
    block: int = 256
    """Elements that share a scale, a multiple of 8; 0: all. Small ones cost bytes and follow x."""
    entropy: str = "auto"
    """How symbols are coded: auto, none or huffman; range, zstd or any only without a ledger."""

    def __post_init__(self) -> None:
        """Refuse what has no layout."""
        if self.bits not in (0, 2, 4, 8):
            raise ValueError(f"bits = {self.bits}; use 2, 4, 8, or 0 for levels")
        if self.levels not in (2, 3):
            raise ValueError(f"levels = {self.levels}; use 2 or 3, or set bits to 2, 4 or 8")
        if self.block and (not 16 <= self.block <= MOST_BLOCK or self.block % 8):
            raise ValueError(
                f"block = {self.block}; use a multiple of 8 from 16 to {MOST_BLOCK}, or 0 for all"
            )
        entropy.check(self.entropy)

    @property
    def inexact(self) -> str:
        """Say why a library's streams are not for the ledger."""
        return entropy.library(self.entropy)

    def encode(self, x_D: Tensor, *, key: int = 0) -> Encoded:
        """Round each element to the nearest that its block's scale allows."""
        if loops := parallel.kernels(len(x_D), x_D):
            content, values_D = self._encode_compiled(loops, x_D.contiguous())
            return Encoded(self.pack(content, len(x_D)), Decoded(len(x_D), values_D))
        scale_B = self._scales(x_D)
        packed = parallel.empty(bits.digit_bytes(len(x_D), self._base), torch.uint8, x_D.device)
        values_D = parallel.empty(len(x_D), torch.int32, x_D.device)
        each = bits.per_byte(self._base)
        for start in range(0, len(x_D), _SLAB):
            slab_D = x_D[start : start + _SLAB]
            scale_D = self._spread(scale_B, start, len(slab_D))
            symbol_D = self._symbols(slab_D, scale_D)
            digits = bits.pack_digits(symbol_D, self._base)
            packed[start // each :][: len(digits)] = digits
            values_D[start : start + _SLAB] = self._values(symbol_D, scale_D)
        payload = self.pack(Content(scale_B, packed), len(x_D))
        return Encoded(payload, Decoded(len(x_D), values_D))

    def decode(self, payload: bytes, size: int, device: torch.device | str = "cpu") -> Decoded:
        """Return mantissa · scale."""
        return Decoded(size, self._expand(self._read(payload, size, device), size))

    def bound(self, size: int) -> int:
        """Return the size when nothing is gained by entropy coding."""
        symbols = entropy.squeezed_bound(bits.digit_bytes(size, self._base), self.entropy)
        if not self.block:
            return 4 + symbols
        return entropy.squeezed_bound(self._blocks(size), self.entropy) + symbols

    def pack(self, content: Content, size: int) -> bytes:
        """Return the payload of scales and symbols."""
        if self.block:
            parts = entropy.squeeze_parts(_codes(content.scale_B), self.entropy)
        else:
            parts = [bits.pack(content.scale_B, 32)]
        return bits.join([*parts, *entropy.squeeze_parts(content.packed, self.entropy)])

    def unpack(self, payload: bytes, size: int, device: torch.device | str = "cpu") -> Content:
        """Return scales and symbols; inverse of `pack`, refuses everything else."""
        content = self._read(payload, size, device)
        self._expand(content, size)
        return content

    def _read(self, payload: bytes, size: int, device: torch.device | str) -> Content:
        """Return what the streams hold, unchecked."""
        reader = bits.Reader(payload, device)
        if self.block:
            scale_B = scales.of(entropy.expand(reader, self._blocks(size), self.entropy))
        else:
            scale_B = bits.unpack(reader.take(4), 1, 32)
        packed = entropy.expand(reader, bits.digit_bytes(size, self._base), self.entropy)
        reader.end()
        if bool((scale_B > INT32_MAX).any()):
            raise PayloadError("scale outside int32")
        return Content(scale_B, packed)

    def _expand(self, content: Content, size: int) -> Tensor:
        """Return the values, or refuse what no encoder says."""
        scale_B, packed = content
        if loops := parallel.kernels(size, packed):
            return self._expand_compiled(loops, content, size)
        values_D = parallel.empty(size, torch.int32, packed.device)
        each = bits.per_byte(self._base)
        for start in range(0, size, _SLAB):
            count = min(_SLAB, size - start)
            digits = packed[start // each :][: bits.digit_bytes(count, self._base)]
            symbol_D = bits.unpack_digits(digits, count, self._base)
            if self._alphabet < self._base and int(symbol_D.max()) >= self._alphabet:
                raise PayloadError(_PROBLEMS[1])
            scale_D = self._spread(scale_B, start, count)
            if bool(((scale_D == 0) & (symbol_D != self._idle)).any()):
                raise PayloadError(_PROBLEMS[2])
            value_D = self._mantissas(symbol_D) * scale_D
            if int(value_D.max()) > INT32_MAX or int(value_D.min()) < -INT32_MAX:
                raise PayloadError(_PROBLEMS[4])
            values_D[start : start + count] = value_D
        return values_D

    def _encode_compiled(self, loops: Any, x_D: Tensor) -> tuple[Content, Tensor]:
        size, x = len(x_D), x_D.numpy()
        scale_B = torch.empty(self._blocks(size), dtype=torch.int64)
        if not self.block:
            found = parallel.ranges(loops.measure, size, x)
            largest = np.int32(max(bits_ for bits_, _ in found)).view(np.float32)
            if not np.isfinite(largest):
                raise ValueError(NOT_FINITE)
            measure = float(largest) if self.bits >= 4 else sum(total for _, total in found)
            scale_B[0] = self._scale(measure, size)
        packed = parallel.empty(bits.digit_bytes(size, self._base), torch.uint8)
        values_D = parallel.empty(size, torch.int32)
        table = scales.SCALES.numpy()
        wrong = parallel.ranges(
            loops.dense_encode,
            -(-size // self._tile),
            x,
            self._tile,
            self.block,
            self._alphabet,
            self.bits >= 4,
            self._fits().numpy().view(np.int32),
            table[:-1] + table[1:],
            table,
            scales.largest(self._limit),
            *(self._factor if self.bits < 4 else (1, 1)),
            scale_B.numpy(),
            packed.numpy(),
            values_D.numpy(),
        )
        if any(wrong):
            raise ValueError(NOT_FINITE)
        return Content(scale_B, packed), values_D

    def _expand_compiled(self, loops: Any, content: Content, size: int) -> Tensor:
        scale_B, packed = content
        bits.check_digits(packed, size, self._base)
        values_D = parallel.empty(size, torch.int32)
        wrong = parallel.ranges(
            loops.dense_decode,
            -(-size // self._tile),
            packed.numpy(),
            self._tile,
            self.block,
            self._alphabet,
            scale_B.numpy(),
            values_D.numpy(),
        )
        for problem in filter(None, wrong):
            raise PayloadError(_PROBLEMS[problem])
        return values_D

    @property
    def _tile(self) -> int:
        """Return how many elements the compiled loops take at once: whole blocks, whole bytes."""
        block = self.block or 1024
        return 5 * block * max(2048 // block, 1)

    @property
    def _top(self) -> int:
        """Return the largest mantissa."""
        return {0: 1, 2: 3, 4: 7, 8: 127}[self.bits]

    @property
    def _alphabet(self) -> int:
        """Return the number of symbols."""
        return {0: self.levels, 2: 4, 4: 15, 8: 255}[self.bits]

    @property
    def _base(self) -> int:
        """Return the base in which symbols are packed."""
        return {0: self.levels, 2: 4, 4: 16, 8: 256}[self.bits]

    @property
    def _idle(self) -> int:
        """Return the one symbol of a block of scale zero: the smallest that is not negative."""
        return self._alphabet // 2

    def _blocks(self, size: int) -> int:
        return -(-size // self.block) if self.block else 1

    def _spread(self, scale_B: Tensor, start: int, count: int) -> Tensor:
        """Return the scale of each of `count` elements, or the one of all."""
        if not self.block:
            return scale_B
        index_D = torch.arange(start, start + count, device=scale_B.device)
        return scale_B[index_D // self.block]

    def _scales(self, x_D: Tensor) -> Tensor:
        """Return each block's scale; refuse what is not finite."""
        by_largest = self.bits >= 4
        row = self.block or bits.SLAB
        measured, step = [], max(bits.SLAB // row, 1) * row
        for start in range(0, len(x_D), step):
            slab_D = x_D[start : start + step].abs()
            if not bool(torch.isfinite(slab_D).all()):
                raise ValueError(NOT_FINITE)
            rows_BK = torch.nn.functional.pad(slab_D, (0, -len(slab_D) % row)).reshape(-1, row)
            measured.append(rows_BK.amax(1) if by_largest else _sums(rows_BK))
        if not measured:
            return torch.zeros(self._blocks(0), dtype=torch.int64, device=x_D.device)
        measure_B = torch.cat(measured)
        if not self.block:
            whole = measure_B.max() if by_largest else measure_B.sum()
            return torch.tensor([self._scale(whole.item(), len(x_D))], device=x_D.device)
        if by_largest:
            most = scales.largest(self._limit)
            return scales.SCALES.to(x_D.device)[
                torch.searchsorted(self._fits().to(x_D.device), measure_B).clamp(max=most)
            ]
        count_B = torch.full_like(measure_B, self.block)
        count_B[-1] = len(x_D) - self.block * (len(measure_B) - 1)
        numerator, denominator = self._factor
        codes_B = scales.nearest(numerator * measure_B // (denominator * count_B), most=self._limit)
        return scales.SCALES.to(x_D.device)[codes_B]

    def _scale(self, measure: float, count: int) -> int:
        """Return the one scale of a whole vector, from its largest |x| or its Σ ⌊2|x|⌋."""
        if self.bits >= 4:
            return 0 if measure <= 0.5 else min(math.ceil(measure / self._top), self._limit)
        numerator, denominator = self._factor
        twice = numerator * int(measure) // (denominator * count)
        return min((twice + 1) // 2, self._limit)

    def _fits(self) -> Tensor:
        """Return the largest |x| that each scale can say; what rounds to zero needs none."""
        fits = (scales.SCALES * self._top).to(torch.float32)  # exact: 11 bits
        fits[0] = 0.5
        return fits

    @property
    def _factor(self) -> tuple[int, int]:
        """Return the scale over the mean |x|."""
        return {0: (1, 1) if self.levels == 2 else (3, 2), 2: (5, 8)}[self.bits]

    @property
    def _limit(self) -> int:
        """Return the largest scale that keeps values within int32."""
        return INT32_MAX // self._top

    def _symbols(self, x_D: Tensor, scale_D: Tensor) -> Tensor:
        """Return the symbol nearest to each element."""
        minus_D = (x_D < 0) & (scale_D > 0)
        if self._alphabet == 2:
            return (~minus_D).to(torch.uint8)
        # Single float32 operations, so that every device finds the same.
        ratio_D = x_D * torch.where(scale_D > 0, scale_D.to(torch.float32).reciprocal(), 0.0)
        if self._alphabet == 4:
            far_D = (ratio_D.abs() >= 2).to(torch.uint8)
            return torch.where(minus_D, 1 - far_D, 2 + far_D)
        return (ratio_D.round().clamp(-self._top, self._top) + self._top).to(torch.uint8)

    def _mantissas(self, symbol_D: Tensor) -> Tensor:
        wide_D = symbol_D.to(torch.int64)
        return 2 * wide_D - self._top if self._alphabet in (2, 4) else wide_D - self._top

    def _values(self, symbol_D: Tensor, scale_D: Tensor) -> Tensor:
        return (self._mantissas(symbol_D) * scale_D).to(torch.int32)


def _sums(magnitude_BK: Tensor) -> Tensor:
    """Return Σ ⌊2|x|⌋ of each row: of integers, so that no order of adding changes it."""
    return (2 * magnitude_BK).clamp(max=2.0**32).to(torch.int64).sum(1)


def _codes(scale_B: Tensor) -> Tensor:
    """Return the byte of each scale."""
    return torch.searchsorted(scales.SCALES.to(scale_B.device), scale_B).to(torch.uint8)
