"""Block-wise dynamic 8-bit: a code that is fine near zero and reaches seven decades.

Dettmers et al., "8-bit Optimizers via Block-wise Quantization" (arXiv 2110.02861), sec. 2.1: the
numbers 0, 1 and ±10^(i-6) · (centre of one of 2^i equal parts of [0.1, 1]) for i in 0 … 6. A block
of 256 is divided by its largest magnitude, a, and each element becomes the number next to
it: code = how many of the middles between neighbours are strictly below. A code stands for

    (round(2^30 · number) · a + 2^29) >> 30

in units of q, a being rounded to an integer first. The largest negative number is -0.993, so -a
itself is not among them. (bitsandbytes' kernels differ from this table rule among each other.)
Payload: a of every block (u32), then one code an element, squeezed.
"""

from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shoal.compression import bits, entropy, symbols
from shoal.compression.codec import INT32_MAX, Decoded, Encoded, PayloadError, codec

BLOCK = 256
ALPHABET = 256
ZERO = 127
"""The code of 0.0."""
LARGEST = 2.0**31 - 128
"""The largest float32 within int32; larger magnitudes are sent as this."""


class Codes(NamedTuple):
    """What a payload says."""

    largest: Tensor
    """Of each block (int64)."""
    code: Tensor
    """Of each element (uint8)."""


def numbers() -> NDArray[np.float32]:
    """Return the 256 numbers in order, as float32."""
    found = [np.array([0, 1], np.float32)]
    for i in range(7):
        edges = _edges(2**i)
        centres = (edges[:-1] + edges[1:]) / np.float32(2) * np.float32(10.0 ** (i - 6))
        found += [centres, -centres]
    return np.sort(np.concatenate(found))


def middles() -> NDArray[np.float32]:
    """Return the 255 middles between neighbouring numbers, in float32."""
    table = numbers()
    return (table[:-1] + table[1:]) / np.float32(2)


@codec("dynamic")
@dataclass(frozen=True, slots=True)
class Dynamic:
    """Send every element in 8 bits, as optimiser states are kept; best for heavy tails."""

    entropy: str = "auto"
    """How codes are squeezed; 'auto' takes the shorter of plain bytes and Huffman."""

    def __post_init__(self) -> None:
        """Refuse what has no layout."""
        entropy.check(self.entropy)

    @property
    def inexact(self) -> str:
        """Why these settings may not be used in the ledger; empty: they may."""
        return entropy.library(self.entropy)

    def encode(self, x_D: Tensor, *, key: int = 0) -> Encoded:
        """Find the number next to each element."""
        size, device = len(x_D), x_D.device
        largest_B = torch.empty(-(-size // BLOCK), dtype=torch.int64, device=device)
        code_D = torch.empty(size, dtype=torch.uint8, device=device)
        value_D = torch.empty(size, dtype=torch.int32, device=device)

        def piece(part: slice) -> None:
            x_BK = symbols.blocks(x_D[part], BLOCK)
            top_B = x_BK.abs().amax(1)
            symbols.check_finite(top_B)
            top_B = top_B.clamp(max=LARGEST).round()
            one_over_B = torch.where(top_B > 0, 1 / top_B, 0)
            code_N = _codes((x_BK * one_over_B[:, None]).clamp(-1, 1)).reshape(-1)
            code_N = code_N[: part.stop - part.start]
            here_B = top_B.to(torch.int64)
            largest_B[part.start // BLOCK :][: len(here_B)] = here_B
            code_D[part] = code_N
            value_D[part] = _values(here_B, code_N)

        symbols.spread(piece, size, device, multiple=BLOCK)
        return Encoded(self.pack(Codes(largest_B, code_D), size), Decoded(size, value_D))

    def decode(self, payload: bytes, size: int, device: torch.device | str = "cpu") -> Decoded:
        """Return number · a, in exact integers."""
        largest_B, code_D = self.unpack(payload, size, device)
        value_D = torch.empty(size, dtype=torch.int32, device=code_D.device)

        def piece(part: slice) -> None:
            here_B = largest_B[part.start // BLOCK : -(-part.stop // BLOCK)]
            value_D[part] = _values(here_B, code_D[part].to(torch.int32))

        symbols.spread(piece, size, code_D.device, multiple=BLOCK)
        return Decoded(size, value_D)

    def bound(self, size: int) -> int:
        """Return the most bytes that a payload of `size` elements can have."""
        return 4 * -(-size // BLOCK) + symbols.squeezed_bound(size, ALPHABET, self.entropy)

    def pack(self, codes: Codes, size: int) -> bytes:
        """Return the payload of largest magnitudes and codes."""
        stream = symbols.squeezed(codes.code, ALPHABET, self.entropy)
        return bits.join([symbols.to_u32(codes.largest), *stream])

    def unpack(self, payload: bytes, size: int, device: torch.device | str = "cpu") -> Codes:
        """Return largest magnitudes and codes; inverse of `pack`, refuses everything else."""
        reader = bits.Reader(payload, device)
        largest_B = symbols.from_u32(reader.take(4 * -(-size // BLOCK)))
        code_D = symbols.expanded(reader, size, ALPHABET, self.entropy)
        reader.end()
        if size and int(largest_B.max()) > INT32_MAX:
            raise PayloadError("value outside int32")
        idle_B = (largest_B == 0).nonzero().reshape(-1)
        if len(idle_B):
            padded = torch.nn.functional.pad(code_D, (0, -size % BLOCK), value=ZERO)
            if bool((padded.reshape(-1, BLOCK)[idle_B] != ZERO).any()):
                raise PayloadError("a block of zeros has codes")
        return Codes(largest_B, code_D)


def _edges(parts: int) -> NDArray[np.float32]:
    """Return the ends of equal parts of [0.1, 1] as torch.linspace computes them.

    That is, float32 steps from the nearer end, each sum rounded once.
    """
    start = np.float32(0.1)
    step, i = float((np.float32(1) - start) / np.float32(parts)), np.arange(parts + 1)
    near_start = i < (parts + 1) // 2
    return np.where(near_start, float(start) + step * i, 1 - step * (parts - i)).astype(np.float32)


def _codes(scaled_BK: Tensor) -> Tensor:
    """Return how many middles are strictly below each element of [-1, 1], as int32.

    The upper 16 bits of a float32 leave at most one middle between two neighbouring patterns, so a
    table and one comparison do what a binary search would, twenty times as fast.
    """
    below, middle = _search(scaled_BK.device)
    pattern = ((scaled_BK.view(torch.int32) >> 16) & 0xFFFF).reshape(-1)
    above = scaled_BK.reshape(-1) > middle.index_select(0, pattern)
    return below.index_select(0, pattern) + above


def _values(largest_B: Tensor, code_N: Tensor) -> Tensor:
    fixed_N = _fixed(code_N.device).index_select(0, code_N)
    product_BK = symbols.blocks(fixed_N, BLOCK) * largest_B[:, None]
    return ((product_BK + (1 << 29)) >> 30).reshape(-1)[: len(code_N)]


@cache
def _fixed(device: torch.device) -> Tensor:
    """Return round(2^30 · number) of every code; all within ±2^30, so products fit in 63 bits."""
    return torch.from_numpy(np.rint(numbers().astype(np.float64) * 2**30).astype(np.int64)).to(
        device
    )


@cache
def _search(device: torch.device) -> tuple[Tensor, Tensor]:
    """Return, per upper half of a float32, the middles below all its floats, and the next one."""
    pattern = np.arange(1 << 16, dtype=np.uint32) << 16
    ends = np.stack([pattern, pattern | 0xFFFF]).view(np.float32)
    with np.errstate(invalid="ignore"):
        below = np.searchsorted(middles(), np.fmin(ends[0], ends[1]))
    following = np.append(middles(), np.float32(np.inf))[below]
    return torch.from_numpy(below.astype(np.int32)).to(device), torch.from_numpy(following).to(
        device
    )
