"""Stochastic b-bit quantisation: each element becomes one of its two neighbouring levels at random.

QSGD (Alistarh et al., arXiv 1610.02132, sec. 3.1): with s = 2^(bits-1) - 1 levels and a block's
norm N, |x| is sent as the level ⌊|x|/u + U⌋ of u = N/s, U uniform in [0, 1): the mean is x. With
the 2-norm the variance is at most min(B/s², √B/s) · N² for blocks of B; with the largest magnitude
as norm (TernGrad at 2 bits, arXiv 1705.07878) it is smaller for all but spiky blocks.

Here u is an integer in units of q that one byte can state (`scales.py`), the smallest that is at
least N/s: at most 1/8 above it, and then nothing is rounded but by chance. U is (w + 2^31) / 2^32
for the 32 bits w that the key gives the element, and |x|/u + U is in float64: unbiased to 2^-32.
Payload: the unit of every block (1 byte), then per element s + level, the sign included, several to
a byte where they fit (5 at 2 bits, 2 at 3 and 4), squeezed.
"""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from shoal.compression import bits, entropy, scales, symbols
from shoal.compression.codec import INT32_MAX, Decoded, Encoded, PayloadError, codec

LARGEST = 2.0**31 - 128
"""The largest float32 within int32; larger magnitudes are sent as this."""


class Levels(NamedTuple):
    """What a payload says."""

    scale: Tensor
    """The code of each block's unit (uint8)."""
    symbol: Tensor
    """Of each element (uint8): s + level."""


@codec("qsgd")
@dataclass(frozen=True, slots=True)
class QSGD:
    """Send every element by chance as one of the levels beside it, so that the mean is right."""

    unbiased: ClassVar[bool] = True

    bits: int = 4
    """Bits of a level before entropy coding, the sign among them."""
    block: int = 512
    """Elements that share a norm; larger blocks cost fewer bytes and have more variance."""
    norm: str = "l2"
    """'l2', as published: most levels are 0 and cost little; 'max': the largest magnitude, several
    times as many bytes and much less variance."""
    entropy: str = "auto"
    """How levels are squeezed; 'auto' takes the shorter of plain bytes and Huffman."""

    def __post_init__(self) -> None:
        """Refuse what has no layout."""
        if not 2 <= self.bits <= 8:
            raise ValueError(f"bits = {self.bits}; use 2 to 8")
        if not 16 <= self.block <= 8192:
            raise ValueError(f"block = {self.block}; use 16 to 8192")
        if self.norm not in ("l2", "max"):
            raise ValueError(f"norm = {self.norm!r}; use 'l2' or 'max'")
        entropy.check(self.entropy)

    @property
    def inexact(self) -> str:
        """Why these settings may not be used in the ledger; empty: they may."""
        return entropy.library(self.entropy)

    @property
    def _levels(self) -> int:
        """Return s."""
        return (1 << (self.bits - 1)) - 1

    @property
    def _alphabet(self) -> int:
        return 2 * self._levels + 1

    def encode(self, x_D: Tensor, *, key: int = 0) -> Encoded:
        """Round each element to a neighbouring level by chance."""
        size, device, s = len(x_D), x_D.device, self._levels
        scale_B = torch.empty(-(-size // self.block), dtype=torch.uint8, device=device)
        symbol_D = torch.empty(size, dtype=torch.uint8, device=device)
        value_D = torch.empty(size, dtype=torch.int32, device=device)

        def piece(part: slice) -> None:
            x_N = x_D[part]
            magnitude_BK = symbols.blocks(x_N.abs(), self.block)
            code_B = scales.up(self._least_unit(magnitude_BK), most=INT32_MAX // s)
            chance_BK = symbols.blocks(symbols.chance(key, part, device), self.block)
            level_BK = rounded(magnitude_BK, scales.of(code_B), chance_BK).clamp(max=s)
            level_N = level_BK.reshape(-1)[: len(x_N)].to(torch.int32)
            level_N = torch.where(x_N < 0, -level_N, level_N)
            scale_B[part.start // self.block :][: len(code_B)] = code_B
            symbol_D[part] = level_N + s
            value_D[part] = self._values(code_B, level_N)

        symbols.spread(piece, size, device, multiple=self.block)
        return Encoded(self.pack(Levels(scale_B, symbol_D), size), Decoded(size, value_D))

    def decode(self, payload: bytes, size: int, device: torch.device | str = "cpu") -> Decoded:
        """Return level · unit."""
        scale_B, symbol_D = self.unpack(payload, size, device)
        value_D = torch.empty(size, dtype=torch.int32, device=symbol_D.device)

        def piece(part: slice) -> None:
            here_B = scale_B[part.start // self.block : -(-part.stop // self.block)]
            value_D[part] = self._values(here_B, symbol_D[part].to(torch.int32) - self._levels)

        symbols.spread(piece, size, symbol_D.device, multiple=self.block)
        return Decoded(size, value_D)

    def bound(self, size: int) -> int:
        """Return the most bytes that a payload of `size` elements can have."""
        coded = symbols.squeezed_bound(size, self._alphabet, self.entropy)
        return -(-size // self.block) + coded

    def pack(self, levels: Levels, size: int) -> bytes:
        """Return the payload of units and symbols."""
        stream = symbols.squeezed(levels.symbol, self._alphabet, self.entropy)
        return bits.join([levels.scale, *stream])

    def unpack(self, payload: bytes, size: int, device: torch.device | str = "cpu") -> Levels:
        """Return units and symbols; inverse of `pack`, refuses everything else."""
        reader = bits.Reader(payload, device)
        scale_B = reader.take(-(-size // self.block))
        symbol_D = symbols.expanded(reader, size, self._alphabet, self.entropy)
        reader.end()
        if not size:
            return Levels(scale_B, symbol_D)
        if int(scale_B.max()) > scales.largest(INT32_MAX // self._levels):
            raise PayloadError("value outside int32")
        idle_B = (scale_B == 0).nonzero().reshape(-1)
        if len(idle_B):
            s = self._levels
            padded = torch.nn.functional.pad(symbol_D, (0, -size % self.block), value=s)
            if bool((padded.reshape(-1, self.block)[idle_B] != s).any()):
                raise PayloadError("a block of unit zero has levels")
        return Levels(scale_B, symbol_D)

    def _least_unit(self, magnitude_BK: Tensor) -> Tensor:
        """Return ⌈norm / s⌉ of every block (int64), from integers alone."""
        largest_B = magnitude_BK.amax(1)
        symbols.check_finite(largest_B)
        whole = l2(magnitude_BK) if self.norm == "l2" else largest_B.clamp(max=LARGEST).ceil()
        return -(-whole.to(torch.int64) // self._levels)

    def _values(self, scale_B: Tensor, level_N: Tensor) -> Tensor:
        unit_B = scales.of(scale_B).to(torch.int32)
        return (symbols.blocks(level_N, self.block) * unit_B[:, None]).reshape(-1)[: len(level_N)]


def rounded(magnitude_BK: Tensor, unit_B: Tensor, chance_BK: Tensor) -> Tensor:
    """Return ⌊magnitude/unit + U⌋ (float64); `chance_BK` holds the 32 bits of U (int32)."""
    ratio_BK = magnitude_BK.to(torch.float64) / unit_B.clamp(min=1)[:, None]
    uniform_BK = (chance_BK.to(torch.float64) + 2.0**31) * 2.0**-32
    return (ratio_BK + uniform_BK).floor()


def l2(magnitude_BK: Tensor) -> Tensor:
    """Return an integer (float64) ≥ the 2-norm of every row, at most 2^-19 of it (or √B) above.

    Magnitudes are rounded up to 20 bits, so the squares of up to 8192 add up to at most 2^53:
    float64 holds every partial sum exactly and the order does not matter.
    """
    magnitude_BK = magnitude_BK.clamp(max=LARGEST)
    shift_B = (torch.frexp(magnitude_BK.amax(1)).exponent - 20).clamp(min=0)
    power_B = torch.bitwise_left_shift(1, shift_B.to(torch.int64)).to(torch.float64)
    whole_BK = (magnitude_BK * (1 / power_B).to(torch.float32)[:, None]).ceil().to(torch.float64)
    sum_B = whole_BK.square().sum(1)
    root_B = sum_B.sqrt().floor()
    root_B += (root_B * root_B < sum_B).to(torch.float64)
    return root_B * power_B
