"""Merkle tree over bytes in chunks of 1 MiB: BLAKE2b-256, standard library only.

A leaf is H(0 ‖ chunk), an inner node H(1 ‖ left ‖ right); a node without a sister goes up as it is.
The genesis holds the root over the initial model's integers (int32, little-endian), so whoever
fetches them can check each chunk alone.
"""

from collections.abc import Sequence
from hashlib import blake2b

CHUNK = 1 << 20


def chunks(data: bytes) -> list[bytes]:
    """Return the chunks of `data`, at least one."""
    return [data[i : i + CHUNK] for i in range(0, max(len(data), 1), CHUNK)]


def leaf(chunk: bytes) -> bytes:
    """Return the hash of one chunk."""
    return blake2b(b"\0" + chunk, digest_size=32).digest()


def leaves(data: bytes) -> list[bytes]:
    """Return the hashes of all chunks."""
    return [leaf(chunk) for chunk in chunks(data)]


def root(level: Sequence[bytes]) -> bytes:
    """Return the root over leaf hashes."""
    if not level:
        raise ValueError("a tree needs at least one leaf")
    while len(level) > 1:
        level = _above(level)
    return level[0]


def root_of(data: bytes) -> bytes:
    """Return the root over `data`."""
    return root(leaves(data))


def proof(level: Sequence[bytes], index: int) -> list[bytes]:
    """Return the sisters of leaf `index` on its way up."""
    sisters = []
    while len(level) > 1:
        if (sister := index ^ 1) < len(level):
            sisters.append(level[sister])
        level, index = _above(level), index // 2
    return sisters


def verify(chunk: bytes, index: int, count: int, sisters: Sequence[bytes], top: bytes) -> bool:
    """Say whether `chunk` is number `index` of `count` under the root `top`."""
    if not 0 <= index < count:
        return False
    node, left = leaf(chunk), list(sisters)
    while count > 1:
        if (index ^ 1) < count:
            if not left:
                return False
            sister = left.pop(0)
            node = _join(sister, node) if index & 1 else _join(node, sister)
        index, count = index // 2, (count + 1) // 2
    return not left and node == top


def _join(left: bytes, right: bytes) -> bytes:
    return blake2b(b"\1" + left + right, digest_size=32).digest()


def _above(level: Sequence[bytes]) -> list[bytes]:
    pairs = [level[i : i + 2] for i in range(0, len(level), 2)]
    return [_join(*pair) if len(pair) == 2 else pair[0] for pair in pairs]
