"""Integers as bytes: fixed widths LSB-first (bit j is bit j mod 8 of byte ⌊j/8⌋), digits by base.

Streams are uint8 tensors on the device of what they hold, so that on CUDA nothing but the finished
payload crosses to the host. Every stream ends at a byte; the padding is zero, and a reader refuses
anything else.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from shoal.compression.codec import PayloadError

SLAB = 1 << 20
"""Loops in torch take so many elements at a time, so that no temporary is as large as the model."""
_WHOLE = {16: torch.int16, 32: torch.int32}


def packed_bytes(count: int, width: int) -> int:
    """Return how many bytes `count` integers of `width` bits take."""
    return (count * width + 7) // 8


def pack_bits(bits_N: Tensor) -> Tensor:
    """Return the bytes of a stream of bits (bool, or 0 and 1 of any type)."""
    count = len(bits_N)
    if bits_N.device.type == "cpu":
        packed = np.packbits(bits_N.to(torch.uint8).numpy(), bitorder="little")
        return torch.from_numpy(packed)
    padded = torch.nn.functional.pad(bits_N.to(torch.uint8), (0, -count % 8)).reshape(-1, 8)
    weights = torch.tensor([1 << j for j in range(8)], dtype=torch.uint8, device=bits_N.device)
    return (padded * weights).sum(1, dtype=torch.uint8)


def unpack_bits(data: Tensor, count: int) -> Tensor:
    """Return `count` bits (uint8 0 or 1) of a stream that is exactly as long as they need."""
    if len(data) != packed_bytes(count, 1):
        raise PayloadError(f"{len(data)} bytes where {count} bits were expected")
    if data.device.type == "cpu":
        bits = torch.from_numpy(np.unpackbits(data.numpy(), bitorder="little"))
    else:
        shifts = torch.arange(8, dtype=torch.uint8, device=data.device)
        bits = ((data[:, None] >> shifts) & 1).reshape(-1)
    check_padding(data, count)
    return bits[:count]


def check_padding(data: Tensor, count: int) -> None:
    """Refuse a last byte with ones beyond the first `count` bits of the stream."""
    if count % 8 and int(data[-1]) >> count % 8:
        raise PayloadError("padding is not zero")


def pack(values_N: Tensor, width: int) -> Tensor:
    """Return integers in [0, 2^width), width at most 32, one after the other."""
    if width == 0:
        return torch.zeros(0, dtype=torch.uint8, device=values_N.device)
    if width == 8:
        return values_N.to(torch.uint8)
    if width == 1:
        return pack_bits(values_N)
    if width in _WHOLE:  # little-endian, as all machines that torch runs on
        return values_N.to(_WHOLE[width]).view(torch.uint8)
    shifts = torch.arange(width, dtype=torch.int64, device=values_N.device)
    parts = []
    for start in range(0, len(values_N), SLAB):  # a slab of 8 n elements ends at a byte
        slab = values_N[start : start + SLAB].to(torch.int64)
        parts.append(pack_bits(((slab[:, None] >> shifts) & 1).reshape(-1)))
    return torch.cat(parts) if parts else values_N.to(torch.uint8)


def unpack(data: Tensor, count: int, width: int) -> Tensor:
    """Return `count` integers of `width` bits as int64; inverse of `pack`."""
    if len(data) != packed_bytes(count, width):
        raise PayloadError(
            f"{len(data)} bytes where {count} integers of {width} bits were expected"
        )
    if width == 8:
        return data.to(torch.int64)
    if width in _WHOLE:
        whole = data.clone().view(_WHOLE[width])  # the copy begins at a multiple of its width
        return whole.to(torch.int64) & ((1 << width) - 1)
    values_N = torch.zeros(count, dtype=torch.int64, device=data.device)
    shifts = torch.arange(width, device=data.device)
    for start in range(0, count, SLAB):
        slab = values_N[start : start + SLAB]
        piece = data[start * width // 8 :][: packed_bytes(len(slab), width)]
        planes = unpack_bits(piece, len(slab) * width).reshape(-1, width)
        slab[:] = (planes.to(torch.int64) << shifts).sum(1)
    return values_N


def per_byte(base: int) -> int:
    """Return how many digits of this base (2 to 256) go into a byte: 8, 5, 4, 3, 3, 2 …, 1."""
    digits = 1
    while base ** (digits + 1) <= 256:
        digits += 1
    return digits


def digit_bytes(count: int, base: int) -> int:
    """Return how many bytes `count` digits take."""
    return -(-count // per_byte(base))


def pack_digits(digits_N: Tensor, base: int) -> Tensor:
    """Return digits below `base` (uint8), as many to a byte as go, the first weighing least.

    No digit is split between bytes, so that the bytes can be entropy-coded (`entropy.squeeze`).
    The last byte is filled up with zero digits.
    """
    each = per_byte(base)
    if each == 1:
        return digits_N.to(torch.uint8)
    if base == 2:
        return pack_bits(digits_N)
    padded = torch.nn.functional.pad(digits_N.to(torch.uint8), (0, -len(digits_N) % each))
    columns = padded.reshape(-1, each)
    packed = columns[:, each - 1].clone()
    for j in reversed(range(each - 1)):
        packed = packed * base + columns[:, j]
    return packed


def unpack_digits(data: Tensor, count: int, base: int) -> Tensor:
    """Return `count` digits (uint8); inverse of `pack_digits`, refuses every other form."""
    check_digits(data, count, base)
    each = per_byte(base)
    if base == 2:
        return unpack_bits(data, count)
    return data if each == 1 else _digits(data, base).reshape(-1)[:count]


def check_digits(data: Tensor, count: int, base: int) -> None:
    """Refuse all bytes that `count` digits cannot be packed into."""
    each, used = per_byte(base), count % per_byte(base)
    if len(data) != digit_bytes(count, base):
        raise PayloadError(f"{len(data)} bytes where {count} digits of base {base} were expected")
    if base**each < 256 and len(data) and int(data.max()) >= base**each:
        raise PayloadError("a byte is larger than its digits can make it")
    if used and int(data[-1]) >= base**used:
        raise PayloadError("padding is not zero")


def _digits(data: Tensor, base: int) -> Tensor:
    """Return the digits of each byte in a row."""
    digits = torch.empty((len(data), per_byte(base)), dtype=torch.uint8, device=data.device)
    left = data
    for j in range(digits.shape[1]):
        digits[:, j] = left % base
        left = left // base
    return digits


def join(parts: Sequence[bytes | Tensor]) -> bytes:
    """Return one payload of bytes and uint8 tensors; the only transfer from the device."""
    device = next((p.device for p in parts if isinstance(p, Tensor)), torch.device("cpu"))
    if device.type == "cpu":
        return b"".join(p.numpy().data if isinstance(p, Tensor) else p for p in parts)
    tensors = [
        p if isinstance(p, Tensor) else torch.frombuffer(bytearray(p), dtype=torch.uint8).to(device)
        for p in parts
        if len(p)
    ]
    return torch.cat(tensors).cpu().numpy().tobytes() if tensors else b""


class Reader:
    """Takes a payload apart front to back; asking for more than there is raises PayloadError."""

    def __init__(self, payload: bytes, device: torch.device | str = "cpu") -> None:
        # A copy, because the bytes may not be written to, which torch does not know.
        self._left = torch.from_numpy(np.frombuffer(payload, np.uint8).copy()).to(device)

    def __len__(self) -> int:
        return len(self._left)

    def take(self, count: int) -> Tensor:
        """Return the next `count` bytes."""
        if count > len(self._left):
            raise PayloadError(f"payload ends {count - len(self._left)} bytes too early")
        taken, self._left = self._left[:count], self._left[count:]
        return taken

    def number(self, size: int) -> int:
        """Return the next `size` bytes as an unsigned little-endian integer."""
        return int.from_bytes(self.take(size).cpu().numpy().tobytes(), "little")

    def rest(self) -> Tensor:
        """Return everything that is left."""
        return self.take(len(self._left))

    def end(self) -> None:
        """Refuse trailing bytes."""
        if len(self._left):
            raise PayloadError(f"{len(self._left)} bytes too many")
