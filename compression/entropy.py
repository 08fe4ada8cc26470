"""Entropy coding: Rice codes for gaps, canonical Huffman for bytes; specified here in integers.

*Squeezed bytes.* Codecs pack their symbols into bytes first (five trits, two nibbles, eight signs a
byte) and then squeeze the bytes: coding several symbols at once comes nearer to their entropy than
coding each. The stream is one byte of form and

    0  the bytes as they are
    1  canonical Huffman: the largest byte value that occurs (1 byte), code lengths of 0 … that
       value (4 bits each), then per segment of 4096 bytes the length of its code in bytes (u16),
       then the segments: codes one after the other, root bit first, LSB-first, padded with zeros
    2  range code, 3  zstd: of a library (`coders.py`); never in the ledger

*Rice(b)* of v: v >> b in unary, and the b low bits. All low parts come first (packed, LSB-first),
   then all unary parts as one stream: v >> b zeros and a one each. The ones are found at once.
"""

import heapq
import math

import torch
from torch import Tensor

from shoal.compression import bits
from shoal.compression.codec import PayloadError

RAW, HUFFMAN = 0, 1
SEGMENT = 4096
LONGEST = 15
"""Longest Huffman code in bits, so that a length fits in half a byte."""
MODES = ("auto", "none", "huffman")
"""What a run file can ask for. `auto`: the shorter of `none` and Huffman."""


def squeeze(data_N: Tensor, mode: str = "auto") -> Tensor:
    """Return the stream of bytes (uint8) in the form that `mode` says."""
    form = torch.tensor([RAW], dtype=torch.uint8, device=data_N.device)
    raw = torch.cat((form, data_N))
    if mode == "none":
        return raw
    counts = torch.bincount(data_N, minlength=256)
    lengths = huffman_lengths(counts.tolist())
    if mode == "auto" and _huffman_at_least(counts.tolist(), lengths) >= len(raw):
        return raw
    coded = _encode(data_N, lengths)
    return raw if mode == "auto" and len(coded) >= len(raw) else coded


def expand(reader: bits.Reader, count: int, mode: str = "auto") -> Tensor:
    """Return the `count` bytes of the stream that comes next; inverse of `squeeze`."""
    form = reader.number(1)
    if form == RAW and mode in ("auto", "none"):
        data_N = reader.take(count)
        coded = squeeze(data_N, mode) if mode == "auto" else None
        if coded is not None and int(coded[0]) != RAW:
            raise PayloadError("bytes as they are, where Huffman is shorter")
        return data_N
    if form == HUFFMAN and mode in ("auto", "huffman"):
        before = len(reader)
        data_N = _decode(reader, count)
        if mode == "auto" and before - len(reader) >= count:
            raise PayloadError("Huffman, where the bytes as they are come as short")
        return data_N
    raise PayloadError(f"form {form} of squeezed bytes, where entropy = {mode!r}")


def squeezed_bound(count: int, mode: str = "auto") -> int:
    """Return the most bytes that `squeeze` makes of `count` bytes."""
    if mode != "huffman":
        return 1 + count
    segments = -(-count // SEGMENT)
    return 2 + 128 + 2 * segments + sum(-(-SEGMENT * LONGEST // 8) for _ in range(segments))


def rice_parameter(density: float) -> int:
    """Return the best b for gaps between entries kept with this probability.

    b* = max(0, 1 + ⌊log2(ln((√5-1)/2) / ln(1-p))⌋), optimal for geometric gaps.
    """
    if density >= 1:
        return 0
    ratio = math.log((math.sqrt(5) - 1) / 2) / math.log1p(-density)
    return max(0, 1 + math.floor(math.log2(ratio)))


def rice_encode(values_N: Tensor, b: int) -> Tensor:
    """Return the Rice code of non-negative int64 values."""
    low = bits.pack(values_N & ((1 << b) - 1), b)
    ends = torch.cumsum((values_N >> b) + 1, 0) - 1
    length = int(ends[-1]) + 1 if len(ends) else 0
    unary = torch.zeros(length, dtype=torch.uint8, device=values_N.device)
    unary[ends] = 1
    return torch.cat((low, bits.pack_bits(unary)))


def rice_bound(count: int, b: int, total: int) -> int:
    """Return the most bytes that `count` values take whose sum is at most `total`."""
    return bits.packed_bytes(count, b) + bits.packed_bytes(count + (total >> b), 1)


def rice_decode(reader: bits.Reader, count: int, b: int, total: int) -> Tensor:
    """Return `count` int64 values whose sum is at most `total`: all that is left of the payload."""
    data = reader.rest()
    split = bits.packed_bytes(count, b)
    if len(data) > rice_bound(count, b, total):
        raise PayloadError("Rice code is longer than its values can need")
    if len(data) < split + bits.packed_bytes(count, 1):
        raise PayloadError("Rice code is cut off")
    if count and int(data[-1]) == 0:
        raise PayloadError("Rice code ends in a needless byte")
    unary = bits.unpack_bits(data[split:], 8 * (len(data) - split))
    ends = unary.nonzero().reshape(-1)
    if len(ends) != count:
        raise PayloadError(f"Rice code holds {len(ends)} values, expected {count}")
    values_N = ends.diff(prepend=ends.new_tensor([-1])) - 1
    values_N = (values_N << b) | bits.unpack(data[:split], count, b) if b else values_N
    if int(values_N.sum()) > total:
        raise PayloadError("Rice code holds values that are too large together")
    return values_N


def huffman_lengths(counts: list[int]) -> list[int]:
    """Return the code length of each symbol, 0 for those that never occur.

    Huffman's algorithm; among equal weights the tree made first is taken first (leaves before
    inner nodes, by symbol). If a code passes 15 bits, all weights are halved (rounding up) and it
    starts again. A lone symbol gets length 1 and takes no bits at all.
    """
    weights = list(counts)
    used = [s for s, n in enumerate(counts) if n]
    lengths = [0] * len(counts)
    if len(used) == 1:
        lengths[used[0]] = 1
        return lengths
    while used:
        heap = [(weights[s], i) for i, s in enumerate(used)]
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
            for i, s in enumerate(used):
                lengths[s] = depth[i]
            break
        weights = [(w + 1) >> 1 for w in weights]
    return lengths


def _huffman_at_least(counts: list[int], lengths: list[int]) -> int:
    """Return a lower bound on the bytes of the Huffman form, the form byte among them."""
    top = max((s for s, n in enumerate(counts) if n), default=0)
    lone = sum(1 for n in counts if n) < 2
    coded = 0 if lone else sum(n * w for n, w in zip(counts, lengths, strict=True))
    segments = -(-sum(counts) // SEGMENT)
    return 2 + bits.packed_bytes(top + 1, 4) + 2 * segments + bits.packed_bytes(coded, 1)


def _codes(lengths: list[int]) -> list[int]:
    """Return canonical codes, by (length, symbol) counting up, bits reversed: root bit lowest."""
    codes = [0] * len(lengths)
    code = previous = 0
    for length, symbol in sorted((n, s) for s, n in enumerate(lengths) if n):
        code <<= length - previous
        previous = length
        codes[symbol] = int(f"{code:0{length}b}"[::-1], 2)
        code += 1
    return codes


def _encode(data_N: Tensor, lengths: list[int]) -> Tensor:
    device = data_N.device
    top = max((s for s, n in enumerate(lengths) if n), default=0)
    table = torch.tensor(lengths[: top + 1], dtype=torch.int64, device=device)
    head = torch.tensor([HUFFMAN, top], dtype=torch.uint8, device=device)
    parts = [head, bits.pack(table, 4)]
    segments = data_N.split(SEGMENT) if len(data_N) else ()  # type: ignore[no-untyped-call]
    lone = sum(1 for n in lengths if n) < 2
    width = torch.tensor(lengths, device=device) if not lone else torch.zeros(256, device=device)
    width, code = width.to(torch.int64), torch.tensor(_codes(lengths), device=device)
    coded = []
    for segment in segments:
        symbols = segment.to(torch.int64)
        ends = torch.cumsum(width[symbols], 0)
        stream = torch.zeros(int(ends[-1]), dtype=torch.uint8, device=device)
        for k in range(LONGEST):
            here = width[symbols] > k
            place = (ends - width[symbols])[here] + k
            stream[place] = ((code[symbols][here] >> k) & 1).to(torch.uint8)
        coded.append(bits.pack_bits(stream))
    sizes = torch.tensor([len(c) for c in coded], dtype=torch.int64, device=device)
    return torch.cat((*parts, bits.pack(sizes, 16), *coded))


def _decode(reader: bits.Reader, count: int) -> Tensor:
    top = reader.number(1)
    table = bits.unpack(reader.take(bits.packed_bytes(top + 1, 4)), top + 1, 4).tolist()
    lengths = table + [0] * (256 - len(table))
    used = [s for s, n in enumerate(lengths) if n]
    whole = sum(1 << (LONGEST - lengths[s]) for s in used) == 1 << LONGEST
    lone = len(used) == 1 and lengths[used[0]] == 1
    if count and not lone and (len(used) < 2 or not whole):
        raise PayloadError("Huffman code lengths do not make a complete tree")
    segments = -(-count // SEGMENT)
    sizes = bits.unpack(reader.take(2 * segments), segments, 16).tolist()
    found: list[int] = []
    codes = {(lengths[s], c): s for s, c in enumerate(_codes(lengths)) if lengths[s]}
    for i, size in enumerate(sizes):
        stream = reader.take(size).tolist()
        wanted, at = min(SEGMENT, count - SEGMENT * i), 0
        if lone:
            found += [used[0]] * wanted
        for _ in range(0 if lone else wanted):
            code = length = 0
            while (length, code) not in codes:
                if at >= 8 * len(stream) or length >= LONGEST:
                    raise PayloadError("Huffman code is cut off")
                code |= (stream[at >> 3] >> (at & 7) & 1) << length
                at, length = at + 1, length + 1
            found.append(codes[length, code])
        if size != (at + 7) // 8 or (at & 7 and stream[-1] >> (at & 7)):
            raise PayloadError("a segment of Huffman code has bytes or bits too many")
    data_N = torch.tensor(found, dtype=torch.uint8)
    if huffman_lengths(torch.bincount(data_N, minlength=256).tolist()) != lengths:
        raise PayloadError("Huffman code lengths are not those of the bytes")
    return data_N
