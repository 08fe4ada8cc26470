"""Four-bit floats: a sign and one of eight magnitudes, times a power of two per block of 32.

E3M0, an exponent alone (Streaming DiLoCo, arXiv 2501.18512, sends its outer gradients so), and
E2M1, two bits of exponent and one of mantissa (the element of OCP's MXFP4). In units of q and of
the block's scale 2^e the magnitudes are the integers

    code   0  1  2  3  4   5   6   7
    e3m0   0  1  2  4  8  16  32  64
    e2m1   0  1  2  3  4   6   8  12

and e is the smallest from 0 on under which the block's largest magnitude is at most the table's
last (24 for e3m0 and 27 for e2m1 at most, so that all is within int32). Elements go to the nearest
magnitude, ties to the even code; bit 3 of a symbol is the sign, and zero has none.
Payload: e of every block (1 byte), then the symbols, two to a byte (the first in the low half),
squeezed.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from shoal.compression import bits, entropy, symbols
from shoal.compression.codec import Decoded, Encoded, PayloadError, codec

BLOCK = 32
ALPHABET = 16
MAGNITUDES = {"e3m0": (0, 1, 2, 4, 8, 16, 32, 64), "e2m1": (0, 1, 2, 3, 4, 6, 8, 12)}
TOP_EXPONENT = {"e3m0": 24, "e2m1": 27}
_SHRINK = torch.tensor([2.0**-e for e in range(28)])


class Floats(NamedTuple):
    """What a payload says."""

    exponent: Tensor
    """Of each block (uint8)."""
    symbol: Tensor
    """Of each element (uint8): 8 · minus + code."""


@codec("fp4")
@dataclass(frozen=True, slots=True)
class FP4:
    """Send every element as a four-bit float."""

    format: str = "e3m0"
    """'e3m0': magnitudes over a wide range, coarse ones; 'e2m1': finer ones, a narrower range."""
    entropy: str = "auto"
    """How symbols are squeezed; 'auto' takes the shorter of plain bytes and Huffman."""

    def __post_init__(self) -> None:
        """Refuse what has no layout."""
        if self.format not in MAGNITUDES:
            raise ValueError(f"format = {self.format!r}; use 'e3m0' or 'e2m1'")
        entropy.check(self.entropy)

    @property
    def inexact(self) -> str:
        """Why these settings may not be used in the ledger; empty: they may."""
        return entropy.library(self.entropy)

    def encode(self, x_D: Tensor, *, key: int = 0) -> Encoded:
        """Round each element to the nearest that its block's scale allows."""
        size, device = len(x_D), x_D.device
        exponent_B = torch.empty(-(-size // BLOCK), dtype=torch.uint8, device=device)
        symbol_D = torch.empty(size, dtype=torch.uint8, device=device)
        value_D = torch.empty(size, dtype=torch.int32, device=device)

        def piece(part: slice) -> None:
            x_BK = symbols.blocks(x_D[part], BLOCK)
            magnitude_BK = x_BK.abs()
            e_B = self._exponents(magnitude_BK.amax(1))
            scaled_BK = magnitude_BK * _SHRINK.to(device)[e_B][:, None]
            code_BK = self._codes(scaled_BK)
            code_BK += 8 * ((x_BK < 0) & (code_BK > 0))
            symbol_N = code_BK.reshape(-1)[: part.stop - part.start]
            exponent_B[part.start // BLOCK :][: len(e_B)] = e_B
            symbol_D[part] = symbol_N
            value_D[part] = self._values(e_B, symbol_N)

        symbols.spread(piece, size, device, multiple=BLOCK)
        return Encoded(self.pack(Floats(exponent_B, symbol_D), size), Decoded(size, value_D))

    def decode(self, payload: bytes, size: int, device: torch.device | str = "cpu") -> Decoded:
        """Return magnitude · 2^e."""
        exponent_B, symbol_D = self.unpack(payload, size, device)
        value_D = torch.empty(size, dtype=torch.int32, device=symbol_D.device)

        def piece(part: slice) -> None:
            here = exponent_B[part.start // BLOCK : -(-part.stop // BLOCK)]
            value_D[part] = self._values(here, symbol_D[part])

        symbols.spread(piece, size, symbol_D.device, multiple=BLOCK)
        return Decoded(size, value_D)

    def bound(self, size: int) -> int:
        """Return the most bytes that a payload of `size` elements can have."""
        return -(-size // BLOCK) + symbols.squeezed_bound(size, ALPHABET, self.entropy)

    def pack(self, floats: Floats, size: int) -> bytes:
        """Return the payload of exponents and symbols."""
        stream = symbols.squeezed(floats.symbol, ALPHABET, self.entropy)
        return bits.join([floats.exponent, *stream])

    def unpack(self, payload: bytes, size: int, device: torch.device | str = "cpu") -> Floats:
        """Return exponents and symbols; inverse of `pack`, refuses everything else."""
        reader = bits.Reader(payload, device)
        exponent_B = reader.take(-(-size // BLOCK))
        symbol_D = symbols.expanded(reader, size, ALPHABET, self.entropy)
        reader.end()
        if size and int(exponent_B.max()) > TOP_EXPONENT[self.format]:
            raise PayloadError("value outside int32")
        if bool((symbol_D == 8).any()):
            raise PayloadError("a zero has a sign")
        largest_B = symbols.blocks(symbol_D & 7, BLOCK).amax(1) if size else exponent_B
        least = 6 if self.format == "e3m0" else 5
        if bool(((exponent_B > 0) & (largest_B < least)).any()):
            raise PayloadError("a block's exponent is larger than its elements need")
        return Floats(exponent_B, symbol_D)

    def _exponents(self, largest_B: Tensor) -> Tensor:
        """Return the smallest e with largest ≤ 2^e · the last magnitude, as int32."""
        symbols.check_finite(largest_B)
        mantissa_B, exponent_B = torch.frexp(largest_B)  # in [0.5, 1), of 2^exponent
        if self.format == "e3m0":  # 64 = 0.5 · 2^7
            needed_B = exponent_B - 6 - (mantissa_B == 0.5).to(torch.int32)
        else:  # 12 = 0.75 · 2^4
            needed_B = exponent_B - 4 + (mantissa_B > 0.75).to(torch.int32)
        return needed_B.clamp(0, TOP_EXPONENT[self.format])

    def _codes(self, scaled_BK: Tensor) -> Tensor:
        """Return the code of the nearest magnitude, ties to the even code, as uint8."""
        table = MAGNITUDES[self.format]
        code_BK = torch.zeros_like(scaled_BK, dtype=torch.uint8)
        for code in range(1, 8):
            middle = (table[code - 1] + table[code]) / 2
            code_BK += scaled_BK > middle if code % 2 else scaled_BK >= middle
        return code_BK

    def _values(self, exponent_B: Tensor, symbol_N: Tensor) -> Tensor:
        magnitudes = MAGNITUDES[self.format]
        both = torch.tensor([*magnitudes, *(-m for m in magnitudes)], dtype=torch.int32)
        table = both.to(symbol_N.device)
        whole_N = table.index_select(0, symbol_N.to(torch.int32))
        unit_B = torch.bitwise_left_shift(1, exponent_B.to(torch.int32))
        whole_BK = symbols.blocks(whole_N, BLOCK) * unit_B[:, None]
        return whole_BK.reshape(-1)[: len(symbol_N)]
