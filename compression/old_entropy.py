"""Rice and canonical Huffman codes, specified here in integers, laid out so that both vectorise.

The lengths are those of the textbook codes; only the order of the bits differs, so that no reader
has to walk a stream bit by bit:

*Rice(b)* of v: v >> b in unary, and the b low bits. All low parts come first (packed, LSB-first),
   then all unary parts as one stream: v >> b zeros and a one each. The ones are found at once.
*Huffman*: plane k holds bit k (from the root) of the code of every symbol whose code is longer than
   k, in the order of the symbols; each plane is padded to a byte. A reader goes down the tree for
   all symbols together, one plane after the other, and back up to put them in order.
"""

import heapq
import math

import numpy as np
from numpy.typing import NDArray

from shoal.compression import old_bits as bits
from shoal.compression.codec import PayloadError

Symbols = NDArray[np.uint8]
LONGEST = 15
"""Longest Huffman code in bits, so that a length fits in half a byte."""


def rice_parameter(density: float) -> int:
    """Return the best b for gaps between entries kept with this probability.

    b* = max(0, 1 + ⌊log2(ln((√5-1)/2) / ln(1-p))⌋), optimal for geometric gaps.
    """
    ratio = math.log((math.sqrt(5) - 1) / 2) / math.log1p(-density)
    return max(0, 1 + math.floor(math.log2(ratio)))


def rice_encode(values: NDArray[np.int64], b: int) -> bytes:
    """Return the Rice code of non-negative values."""
    low = bits.pack(values & ((1 << b) - 1), b)
    ends = np.cumsum((values >> b) + 1) - 1
    unary = np.zeros(int(ends[-1]) + 1 if len(ends) else 0, np.uint8)
    unary[ends] = 1
    return low + bits.pack_bits(unary)


def rice_bound(count: int, b: int, total: int) -> int:
    """Return the most bytes that `count` values take whose sum is at most `total`."""
    return bits.packed_bytes(count, b) + bits.packed_bytes(count + (total >> b), 1)


def rice_decode(data: bytes, count: int, b: int, total: int) -> NDArray[np.int64]:
    """Return `count` values whose sum is at most `total`; `data` must hold nothing else."""
    split = bits.packed_bytes(count, b)
    if len(data) > rice_bound(count, b, total):
        raise PayloadError("Rice code is longer than its values can need")
    if len(data) < split + bits.packed_bytes(count, 1):
        raise PayloadError("Rice code is cut off")
    low = bits.unpack(data[:split], count, b) if b else np.zeros(count, np.int64)
    if count and data[-1] == 0:
        raise PayloadError("Rice code ends in a needless byte")
    unary = np.unpackbits(np.frombuffer(data[split:], np.uint8), bitorder="little")
    ends = np.flatnonzero(unary)
    if len(ends) != count:
        raise PayloadError(f"Rice code holds {len(ends)} values, expected {count}")
    high = np.diff(ends, prepend=-1) - 1
    return (high << b) | low


def huffman_lengths(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the code length of each symbol, 0 for those that never occur.

    Huffman's algorithm; among equal weights the tree made first is taken first (leaves before
    inner nodes, by symbol). If a code passes 15 bits, all weights are halved (rounding up) and it
    starts again. A lone symbol gets length 1 and takes no bits at all.
    """
    weights = counts.astype(np.int64)
    used = np.flatnonzero(weights)
    lengths = np.zeros(len(counts), np.int64)
    if len(used) == 1:
        lengths[used] = 1
        return lengths
    while len(used):
        heap = [(int(weights[s]), i) for i, s in enumerate(used)]
        heapq.heapify(heap)
        parent = [0] * (2 * len(used) - 1)
        for node in range(len(used), 2 * len(used) - 1):
            (w1, first), (w2, second) = heapq.heappop(heap), heapq.heappop(heap)
            parent[first] = parent[second] = node
            heapq.heappush(heap, (w1 + w2, node))
        depth = [0] * len(parent)
        for node in reversed(range(len(parent) - 1)):
            depth[node] = depth[parent[node]] + 1
        if max(depth) <= LONGEST:
            lengths[used] = depth[: len(used)]
            break
        weights = (weights + 1) >> 1
    return lengths


def huffman_bytes(counts: NDArray[np.int64], lengths: NDArray[np.int64]) -> int:
    """Return how many bytes `huffman_encode` makes of symbols with these counts."""
    table = bits.packed_bytes(len(counts), 4)
    if np.count_nonzero(lengths) <= 1:
        return table
    planes = (int(counts[lengths > k].sum()) for k in range(int(lengths.max())))
    return table + sum(bits.packed_bytes(n, 1) for n in planes)


def huffman_encode(symbols: Symbols, alphabet: int) -> bytes:
    """Return the code lengths (4 bits each) and the planes of `symbols`."""
    lengths = huffman_lengths(np.bincount(symbols, minlength=alphabet))
    parts = [bits.pack(lengths, 4)]
    if np.count_nonzero(lengths) > 1:
        codes = _codes(lengths)
        left = symbols
        for k in range(int(lengths.max())):
            left = left[(lengths > k)[left]] if k else left
            bit = (codes >> np.maximum(lengths - 1 - k, 0)) & 1
            parts.append(bits.pack_bits(bit.astype(np.uint8)[left]))
    return b"".join(parts)


def huffman_decode(data: bytes, count: int, alphabet: int) -> Symbols:
    """Return `count` symbols; `data` must hold nothing else and be what the encoder makes."""
    reader = bits.Reader(data)
    lengths = bits.unpack(reader.take(bits.packed_bytes(alphabet, 4)), alphabet, 4)
    used = np.flatnonzero(lengths)
    if len(used) == 1 and lengths[used[0]] == 1:
        symbols = np.full(count, used[0], np.uint8)
    elif len(used) < 2 or sum(1 << (LONGEST - int(n)) for n in lengths[used]) != 1 << LONGEST:
        raise PayloadError("Huffman code lengths do not make a complete tree")
    else:
        symbols = _descend(reader, count, lengths)
    reader.end()
    if not np.array_equal(huffman_lengths(np.bincount(symbols, minlength=alphabet)), lengths):
        raise PayloadError("Huffman code lengths are not those of the symbols")
    return symbols


def _codes(lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return canonical codes: by (length, symbol), counting up."""
    codes = np.zeros(len(lengths), np.int64)
    code = previous = 0
    for symbol in sorted(np.flatnonzero(lengths), key=lambda s: (lengths[s], s)):
        code <<= int(lengths[symbol]) - previous
        previous = int(lengths[symbol])
        codes[symbol] = code
        code += 1
    return codes


def _descend(reader: bits.Reader, count: int, lengths: NDArray[np.int64]) -> Symbols:
    # In a canonical tree the leaves of a depth stand before its inner nodes, so a node is its
    # number v within the depth: a leaf if v < leaves, else inner node v - leaves, with children
    # 2(v - leaves) and 2(v - leaves) + 1.
    inner = np.zeros(count, np.int16)
    nodes: list[NDArray[np.int16]] = []
    leaves: list[Symbols] = []
    for depth in range(1, int(lengths.max()) + 1):
        bit = bits.unpack_bits(reader.take(bits.packed_bytes(len(inner), 1)), len(inner))
        nodes.append(2 * inner + bit)
        leaves.append(np.flatnonzero(lengths == depth).astype(np.uint8))
        inner = nodes[-1][nodes[-1] >= len(leaves[-1])] - len(leaves[-1])
    symbols = np.zeros(0, np.uint8)
    for node, leaf in zip(reversed(nodes), reversed(leaves), strict=True):
        here = np.empty(len(node), np.uint8)
        is_leaf = node < len(leaf)
        here[is_leaf] = leaf[node[is_leaf]]
        here[~is_leaf] = symbols
        symbols = here
    return symbols
