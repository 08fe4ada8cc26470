"""Merkle roots over chunks of 1 MiB (BLAKE2b-256). Standard library only: the daemon checks too.

Leaves and inner nodes are hashed under different prefixes, so that no chunk can pass for a node
(RFC 6962, section 2.1); an odd node at the end of a level is carried up unchanged.
"""

from collections.abc import Iterable, Iterator
from hashlib import blake2b

CHUNK = 1 << 20
"""Bytes per leaf; the last one may be shorter."""

_EMPTY = b"\x02"
_LEAF = b"\x00"
_NODE = b"\x01"


def root(data: bytes | bytearray | memoryview) -> bytes:
    """Return the root over `data`, 32 bytes."""
    return root_of(leaf(chunk) for chunk in chunks(data))


def chunks(data: bytes | bytearray | memoryview) -> Iterator[memoryview]:
    """Cut `data` into chunks without copying."""
    view = memoryview(data).cast("B")
    for start in range(0, len(view), CHUNK):
        yield view[start : start + CHUNK]


def leaf(chunk: bytes | bytearray | memoryview) -> bytes:
    """Return the hash of one chunk."""
    hasher = blake2b(_LEAF, digest_size=32)
    hasher.update(chunk)
    return hasher.digest()


def root_of(leaves: Iterable[bytes]) -> bytes:
    """Return the root over the hashes of all chunks, in order."""
    level = list(leaves)
    if not level:
        return blake2b(_EMPTY, digest_size=32).digest()
    while len(level) > 1:
        pairs = zip(level[::2], level[1::2], strict=False)
        odd = level[-1:] if len(level) % 2 else []
        level = [blake2b(_NODE + a + b, digest_size=32).digest() for a, b in pairs] + odd
    return level[0]
