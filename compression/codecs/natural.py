"""Natural compression: every element becomes a power of two or zero, nothing else is sent.

Horváth et al., "Natural Compression for Distributed Deep Learning" (arXiv 1905.10988), in steps of
q: |x| = 2^e · f with f in [1, 2) becomes 2^(e+1) with probability f - 1, else 2^e; |x| below 1
becomes 1 with probability |x|, else 0. So the mean is x, and the variance at most x²/8 for |x| ≥ 1.
Payload: one symbol an element, squeezed: 0 is zero, 1 … 31 are 2^0 … 2^30, 33 … 63 their negatives.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from shoal.compression import bits, entropy, symbols
from shoal.compression.codec import Decoded, Encoded, PayloadError, codec

ALPHABET = 64
MINUS = 32
LARGEST = 2.0**30
"""Larger elements are sent as 2^30: int32 has no larger power of two."""
VALUES = torch.tensor(
    [0, *(1 << e for e in range(31)), 0, *(-(1 << e) for e in range(31))], dtype=torch.int32
)
"""What each symbol stands for; 32 is not used."""


@codec("natural")
@dataclass(frozen=True, slots=True)
class Natural:
    """Send the exponent of every element: about 3 bits after Huffman, relative error 1/8."""

    rounding: str = "stochastic"
    """'stochastic': unbiased; 'nearest': the nearer power of two (the larger of two as near),
    which leaves at most 1/9 of the energy of elements from 1 on."""
    entropy: str = "auto"
    """How symbols are squeezed; 'auto' takes the shorter of plain bytes and Huffman."""

    def __post_init__(self) -> None:
        """Refuse what has no layout."""
        if self.rounding not in ("stochastic", "nearest"):
            raise ValueError(f"rounding = {self.rounding!r}; use 'stochastic' or 'nearest'")
        entropy.check(self.entropy)

    @property
    def inexact(self) -> str:
        """Why these settings may not be used in the ledger; empty: they may."""
        return entropy.library(self.entropy)

    @property
    def unbiased(self) -> bool:
        """Whether the mean over keys of what is decoded is the input (below 2^30)."""
        return self.rounding == "stochastic"

    def encode(self, x_D: Tensor, *, key: int = 0) -> Encoded:
        """Round each element to a power of two."""
        size, device = len(x_D), x_D.device
        symbol_D = torch.empty(size, dtype=torch.uint8, device=device)
        value_D = torch.empty(size, dtype=torch.int32, device=device)
        table = VALUES.to(device)

        def piece(part: slice) -> None:
            x_N = x_D[part]
            code_N = self._exponents(x_N.abs(), key, part)
            code_N += MINUS * ((x_N < 0) & (code_N > 0))
            symbol_D[part] = code_N
            value_D[part] = table.index_select(0, code_N)

        symbols.spread(piece, size, device)
        return Encoded(self.pack(symbol_D, size), Decoded(size, value_D))

    def decode(self, payload: bytes, size: int, device: torch.device | str = "cpu") -> Decoded:
        """Return the powers of two."""
        symbol_D = self.unpack(payload, size, device)
        value_D = torch.empty(size, dtype=torch.int32, device=symbol_D.device)
        table = VALUES.to(symbol_D.device)

        def piece(part: slice) -> None:
            value_D[part] = table.index_select(0, symbol_D[part].to(torch.int32))

        symbols.spread(piece, size, symbol_D.device)
        return Decoded(size, value_D)

    def bound(self, size: int) -> int:
        """Return the most bytes that a payload of `size` elements can have."""
        return symbols.squeezed_bound(size, ALPHABET, self.entropy)

    def pack(self, symbol_D: Tensor, size: int) -> bytes:
        """Return the payload of symbols (uint8)."""
        return bits.join(symbols.squeezed(symbol_D, ALPHABET, self.entropy))

    def unpack(self, payload: bytes, size: int, device: torch.device | str = "cpu") -> Tensor:
        """Return the symbols (uint8); inverse of `pack`, refuses everything else."""
        reader = bits.Reader(payload, device)
        symbol_D = symbols.expanded(reader, size, ALPHABET, self.entropy)
        reader.end()
        if size and int(symbol_D.max()) >= ALPHABET:
            raise PayloadError("symbol outside the alphabet")
        if bool((symbol_D == MINUS).any()):
            raise PayloadError("a zero has a sign")
        return symbol_D

    def _exponents(self, magnitude_N: Tensor, key: int, part: slice) -> Tensor:
        """Return 0 for zero and 1 + e for 2^e (int32), from the bits of float32 magnitudes."""
        if len(magnitude_N):
            symbols.check_finite(magnitude_N.max())
        magnitude_N = magnitude_N.clamp(max=LARGEST)
        small_K = (magnitude_N < 1).nonzero().reshape(-1)
        float_N = magnitude_N.view(torch.int32)
        if self.rounding == "nearest":
            code_N = ((float_N + (1 << 22)) >> 23) - 126
            code_N[small_K] = (magnitude_N[small_K] > 0.5).to(torch.int32)
            return code_N
        # The fraction's 23 bits carry into the exponent with probability f - 1.
        chance_N = symbols.chance(key, part, magnitude_N.device)
        code_N = ((float_N + ((chance_N >> 9) & 0x7FFFFF)) >> 23) - 126
        likely_K = (magnitude_N[small_K] * 2.0**32).to(torch.int64)
        code_N[small_K] = ((chance_N[small_K].to(torch.int64) + 2**31) < likely_K).to(torch.int32)
        return code_N
