"""Fixed-width integers packed LSB-first: bit j of the stream is bit j mod 8 of byte ⌊j/8⌋.

Every stream ends at a byte; the padding is zero, and a reader refuses anything else.
"""

import numpy as np
from numpy.typing import NDArray

from shoal.compression.codec import PayloadError

Bits = NDArray[np.uint8]
"""One bit per element, 0 or 1."""


def packed_bytes(count: int, width: int) -> int:
    """Return how many bytes `count` integers of `width` bits take."""
    return (count * width + 7) // 8


def pack_bits(bits: Bits) -> bytes:
    """Return the bytes of a stream of bits."""
    return np.packbits(bits, bitorder="little").tobytes()


def unpack_bits(data: bytes, count: int) -> Bits:
    """Return the first `count` bits of `data`, which must be exactly as long as they need."""
    if len(data) != packed_bytes(count, 1):
        raise PayloadError(f"{len(data)} bytes where {count} bits were expected")
    bits = np.unpackbits(np.frombuffer(data, np.uint8), bitorder="little")
    if bits[count:].any():
        raise PayloadError("padding is not zero")
    return bits[:count]


def pack(values: NDArray[np.integer], width: int) -> bytes:
    """Return integers below 2^width (width at most 32), one after the other."""
    if width == 0:
        return b""
    if width == 8:
        return values.astype(np.uint8).tobytes()
    shifts = np.arange(width, dtype=np.uint32)
    planes = (values.astype(np.uint32)[:, None] >> shifts) & np.uint32(1)
    return pack_bits(planes.astype(np.uint8).reshape(-1))


def unpack(data: bytes, count: int, width: int) -> NDArray[np.int64]:
    """Return `count` integers of `width` bits; inverse of `pack`."""
    if len(data) != packed_bytes(count, width):
        raise PayloadError(
            f"{len(data)} bytes where {count} integers of {width} bits were expected"
        )
    if width == 8:
        return np.frombuffer(data, np.uint8).astype(np.int64)
    if width == 4:
        pairs = np.frombuffer(data, np.uint8)
        nibbles = np.stack((pairs & 15, pairs >> 4), axis=1).reshape(-1)
        if nibbles[count:].any():
            raise PayloadError("padding is not zero")
        return nibbles[:count].astype(np.int64)
    planes = unpack_bits(data, count * width).reshape(count, width)
    return planes.astype(np.int64) @ (1 << np.arange(width, dtype=np.int64))


class Reader:
    """Takes a payload apart front to back; asking for more than there is raises PayloadError."""

    def __init__(self, payload: bytes) -> None:
        self._left = memoryview(payload)

    def take(self, count: int) -> bytes:
        """Return the next `count` bytes."""
        if count > len(self._left):
            raise PayloadError(f"payload ends {count - len(self._left)} bytes too early")
        taken, self._left = self._left[:count], self._left[count:]
        return bytes(taken)

    def rest(self) -> bytes:
        """Return everything that is left."""
        return self.take(len(self._left))

    def end(self) -> None:
        """Refuse trailing bytes."""
        if self._left:
            raise PayloadError(f"{len(self._left)} bytes too many")
