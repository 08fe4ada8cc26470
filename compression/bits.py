"""Fixed-width integers packed LSB-first: bit j of the stream is bit j mod 8 of byte ⌊j/8⌋.

Streams are uint8 tensors on the device of what they hold, so that on CUDA nothing but the finished
payload crosses to the host. Every stream ends at a byte; the padding is zero, and a reader refuses
anything else.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from shoal.compression.codec import PayloadError


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
    if bool(bits[count:].any()):
        raise PayloadError("padding is not zero")
    return bits[:count]


def pack(values_N: Tensor, width: int) -> Tensor:
    """Return integers in [0, 2^width), width at most 32, one after the other."""
    if width == 0:
        return torch.zeros(0, dtype=torch.uint8, device=values_N.device)
    if width == 8:
        return values_N.to(torch.uint8)
    shifts = torch.arange(width, dtype=torch.int64, device=values_N.device)
    planes = (values_N.to(torch.int64)[:, None] >> shifts) & 1
    return pack_bits(planes.reshape(-1))


def unpack(data: Tensor, count: int, width: int) -> Tensor:
    """Return `count` integers of `width` bits as int64; inverse of `pack`."""
    if len(data) != packed_bytes(count, width):
        raise PayloadError(
            f"{len(data)} bytes where {count} integers of {width} bits were expected"
        )
    if width == 8:
        return data.to(torch.int64)
    planes = unpack_bits(data, count * width).reshape(count, width).to(torch.int64)
    return (planes << torch.arange(width, device=data.device)).sum(1)


def join(parts: Sequence[bytes | Tensor]) -> bytes:
    """Return one payload of bytes and uint8 tensors; the only transfer from the device."""
    device = next((p.device for p in parts if isinstance(p, Tensor)), torch.device("cpu"))
    tensors = [
        p if isinstance(p, Tensor) else torch.frombuffer(bytearray(p), dtype=torch.uint8).to(device)
        for p in parts
        if len(p)
    ]
    return torch.cat(tensors).cpu().numpy().tobytes() if tensors else b""


class Reader:
    """Takes a payload apart front to back; asking for more than there is raises PayloadError."""

    def __init__(self, payload: bytes, device: torch.device | str = "cpu") -> None:
        data = torch.frombuffer(bytearray(payload), dtype=torch.uint8) if payload else _EMPTY
        self._left = data.to(device)

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


_EMPTY = torch.zeros(0, dtype=torch.uint8)
