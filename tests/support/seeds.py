"""The generator and its keys once more, from the specification: numpy and hashlib alone."""

import hashlib
import struct

import numpy as np
from numpy.typing import NDArray

COMMON = bytes(32)


def key(run: bytes, author: bytes, turn: int, sample: int, domain: int = 0) -> int:
    """Return BLAKE2b-64, person `shoal-seed`, of domain, run, author, turn and sample."""
    said = struct.pack("<Q", domain) + run[:16] + author + struct.pack("<QQ", turn, sample)
    return int.from_bytes(
        hashlib.blake2b(said, digest_size=8, person=b"shoal-seed").digest(), "little"
    )


def words(key: int, count: int, start: int = 0) -> NDArray[np.uint64]:
    """Return SplitMix64's out(start) … of a key."""
    i = np.arange(start + 1, start + count + 1, dtype=np.uint64)
    z = np.uint64(key) + i * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def signs(key: int, size: int, start: int = 0) -> NDArray[np.int64]:
    """Return z: a bit of a word each, the lowest first, 1 for -1."""
    first = start // 64
    last = -(-(start + size) // 64)
    data = words(key, last - first, first).astype("<u8").view(np.uint8)
    bit = np.unpackbits(data, bitorder="little")[start - 64 * first :][:size]
    return 1 - 2 * bit.astype(np.int64)


def below(words: NDArray[np.uint64], bound: int) -> list[int]:
    """Return ⌊bound · upper 32 bits / 2³²⌋ of each word."""
    return [(int(word) >> 32) * bound >> 32 for word in words]
