"""What quantisers share: long vectors taken in pieces, symbols squeezed, chance per element.

Element-wise work over a long vector goes piece by piece: temporaries stay in the cache, and beside
the results there is never a second copy of the vector.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from shoal.compression import bits, entropy, parallel, splitmix

PIECE = 3 << 13
"""Elements of a piece on a CPU: temporaries fit in the cache of one core, and torch, which splits
operations on 32768 elements and more, leaves each to the thread that called it."""
DEVICE_PIECE = 1 << 24
"""Elements of a piece on another device, where every operation costs a launch."""


def pieces(size: int, device: torch.device, *, multiple: int = 1) -> Iterator[slice]:
    """Yield slices that cover `size` elements, each beginning at a multiple of `multiple`."""
    wanted = PIECE if device.type == "cpu" else DEVICE_PIECE
    step = max(1, wanted // multiple) * multiple
    return (slice(start, min(start + step, size)) for start in range(0, size, step))


def spread(
    work: Callable[[slice], None], size: int, device: torch.device, *, multiple: int = 1
) -> None:
    """Call `work` on every piece of `size` elements; on a CPU by as many threads as torch has."""
    parts = list(pieces(size, device, multiple=multiple))

    def some(first: int, last: int) -> None:
        for part in parts[first:last]:
            work(part)

    if device.type == "cpu":
        parallel.ranges(some, len(parts))
    else:
        some(0, len(parts))


def blocks(x_D: Tensor, block: int) -> Tensor:
    """Return the vector in rows of one block, the last padded with zeros."""
    return torch.nn.functional.pad(x_D, (0, -len(x_D) % block)).reshape(-1, block)


def check_finite(largest: Tensor) -> None:
    """Refuse a vector by the largest magnitudes of its parts, which keep NaN and infinity."""
    if not bool(torch.isfinite(largest).all()):
        raise ValueError("cannot encode a vector with NaN or infinite elements")


def chance(key: int, where: slice, device: torch.device) -> Tensor:
    """Return 32 random bits (as int32) per element: halves of the generator's words, low first."""
    first, last = where.start // 2, -(-where.stop // 2)
    words = splitmix.words(key, last - first, start=first, device=device)
    return words.view(torch.int32)[where.start % 2 :][: where.stop - where.start]


def squeezed(symbols_N: Tensor, alphabet: int, mode: str) -> list[bytes | Tensor]:
    """Return the stream of symbols (uint8): several to a byte, then squeezed; for `bits.join`."""
    return entropy.squeeze_parts(bits.pack_digits(symbols_N, alphabet), mode)


def expanded(reader: bits.Reader, count: int, alphabet: int, mode: str) -> Tensor:
    """Return the `count` symbols (uint8) of the stream that comes next; inverse of `squeezed`."""
    data = entropy.expand(reader, bits.digit_bytes(count, alphabet), mode)
    return bits.unpack_digits(data, count, alphabet)


def squeezed_bound(count: int, alphabet: int, mode: str) -> int:
    """Return the most bytes that `squeezed` makes of `count` symbols."""
    return entropy.squeezed_bound(bits.digit_bytes(count, alphabet), mode)


def to_u32(values_N: Tensor) -> Tensor:
    """Return the little-endian bytes of int64 values in [0, 2^32)."""
    shifts = torch.tensor([0, 8, 16, 24], device=values_N.device)
    return ((values_N[:, None] >> shifts) & 255).to(torch.uint8).reshape(-1)


def from_u32(data: Tensor) -> Tensor:
    """Return the int64 values of little-endian bytes, four each; inverse of `to_u32`."""
    shifts = torch.tensor([0, 8, 16, 24], device=data.device)
    return (data.reshape(-1, 4).to(torch.int64) << shifts).sum(1)
