"""Entropy coding: Rice codes for gaps, canonical Huffman for bytes; specified here in integers.

*Squeezed bytes.* Codecs pack their symbols into bytes first (five trits, two nibbles, eight signs a
byte) and then squeeze the bytes: coding several symbols at once comes nearer to their entropy than
coding each. The stream is one byte of form and

    0  the bytes as they are
    1  canonical Huffman: the largest byte value that occurs (1 byte), code lengths of 0 … that
       value (4 bits each), then per segment of 4096 bytes the length of its code in bytes (u16),
       then the segments: codes one after the other, root bit first, LSB-first, padded with zeros
    2  range code, 3  zstd: length of the library's stream (u32), the stream (`coders.py`)

Which of 0 and 1 `auto` takes depends on how often each byte occurs and nothing else: Huffman when
it is the shorter one even if every segment ends in a whole byte of padding.

*Rice(b)* of v: v >> b in unary, and the b low bits. All low parts come first (packed, LSB-first),
   then all unary parts as one stream: v >> b zeros and a one each. The ones are found at once.
"""

import heapq
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shoal.compression import bits, parallel
from shoal.compression.codec import PayloadError

RAW, HUFFMAN, RANGE, ZSTD = 0, 1, 2, 3
SEGMENT = 4096
LONGEST = 15
"""Longest Huffman code in bits, so that a length fits in half a byte."""
MODES = ("auto", "none", "huffman")
"""What a run file can ask for with the ledger. `auto`: the shorter of `none` and Huffman."""
LIBRARY_MODES = ("range", "zstd", "any")
"""Streams of a library, or the bytes as they are where that is shorter; `any`: the shortest."""
_LIBRARY_FORMS = {"range": (RANGE,), "zstd": (ZSTD,), "any": (RANGE, ZSTD)}


def check(mode: str) -> None:
    """Raise ValueError when there is no such mode."""
    if mode not in MODES + LIBRARY_MODES:
        raise ValueError(f"entropy = {mode!r}; use one of {', '.join(MODES + LIBRARY_MODES)}")


def library(mode: str) -> str:
    """Return why streams of this mode may not be used in the ledger; empty: they may."""
    if mode in LIBRARY_MODES:
        return (
            f"entropy = {mode!r} is a library's stream, which another version of the library may "
            "decode otherwise; use 'auto', 'huffman' or 'none'"
        )
    return ""


def squeeze(data_N: Tensor, mode: str = "auto") -> Tensor:
    """Return the stream of bytes (uint8) in the form that `mode` says."""
    parts = squeeze_parts(data_N, mode)
    return torch.cat([p if isinstance(p, Tensor) else _bytes(p, data_N.device) for p in parts])


def squeeze_parts(data_N: Tensor, mode: str = "auto") -> list[bytes | Tensor]:
    """Return the stream of `squeeze` in pieces for `bits.join`, without copying raw bytes."""
    check(mode)
    found: list[bytes | Tensor] = [bytes([RAW]), data_N]
    if mode in ("auto", "huffman", "any"):
        counts = _histogram(data_N)
        lengths = huffman_lengths(counts)
        if mode == "huffman" or _huffman_pays(counts, lengths):
            found = [_encode(data_N, lengths)]
    for form in _LIBRARY_FORMS.get(mode, ()):
        from shoal.compression import coders  # the libraries are needed here alone

        stream = coders.encode(form, data_N.cpu().numpy().tobytes())
        coded: list[bytes | Tensor] = [bytes([form]), len(stream).to_bytes(4, "little"), stream]
        found = min(found, coded, key=_length)
    return found


def expand(reader: bits.Reader, count: int, mode: str = "auto") -> Tensor:
    """Return the `count` bytes of the stream that comes next; inverse of `squeeze`.

    Streams that a library made are taken as they come; those of the ledger's modes have one form.
    """
    form = reader.number(1)
    if form == RAW and mode != "huffman":
        data_N = reader.take(count)
        if mode == "auto":
            counts = _histogram(data_N)
            if _huffman_pays(counts, huffman_lengths(counts)):
                raise PayloadError("bytes as they are, where Huffman is shorter")
        return data_N
    if form == HUFFMAN and mode in ("auto", "huffman", "any"):
        return _decode(reader, count, mode)
    if form in _LIBRARY_FORMS.get(mode, ()):
        from shoal.compression import coders

        length = reader.number(4)
        if length > count:
            raise PayloadError("a library's stream, where the bytes as they are come as short")
        stream = reader.take(length)
        data = coders.decode(form, stream.cpu().numpy().tobytes(), count)
        return _bytes(data, stream.device)
    raise PayloadError(f"form {form} of squeezed bytes, where entropy = {mode!r}")


def squeezed_bound(count: int, mode: str = "auto") -> int:
    """Return the most bytes that `squeeze` makes of `count` bytes."""
    if mode != "huffman":
        return 1 + count
    whole, rest = divmod(count, SEGMENT)
    each, last = bits.packed_bytes(SEGMENT, LONGEST), bits.packed_bytes(rest, LONGEST)
    return 2 + 128 + 2 * -(-count // SEGMENT) + whole * each + last


def rice_encode(values_N: Tensor, b: int) -> Tensor:
    """Return the Rice code of non-negative int64 values."""
    if loops := parallel.kernels(_RICE * len(values_N), values_N):
        low = torch.zeros(bits.packed_bytes(len(values_N), b), dtype=torch.uint8)
        count = len(values_N) + int((values_N >> b).sum())
        unary = torch.zeros(bits.packed_bytes(count, 1), dtype=torch.uint8)
        loops.rice_encode(values_N.numpy(), b, low.numpy(), unary.numpy())
        return torch.cat((low, unary))
    low = bits.pack(values_N & ((1 << b) - 1), b)
    ends = torch.cumsum((values_N >> b) + 1, 0) - 1
    length = int(ends[-1]) + 1 if len(ends) else 0
    bits_N = torch.zeros(length, dtype=torch.uint8, device=values_N.device)
    bits_N[ends] = 1
    return torch.cat((low, bits.pack_bits(bits_N)))


_RICE = 16
"""A kept value stands for at least so many elements: the compiled loops pay for fewer of them."""


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
    low, unary = data[:split], data[split:]
    if loops := parallel.kernels(_RICE * count, data):
        bits.check_padding(low, count * b)
        values_N = parallel.empty(count, torch.int64)
        found = loops.rice_decode(low.numpy(), unary.numpy(), b, values_N.numpy())
    else:
        ends = bits.unpack_bits(unary, 8 * len(unary)).nonzero().reshape(-1)
        found = len(ends)
        values_N = ends.diff(prepend=ends.new_tensor([-1])) - 1
    if found != count:
        raise PayloadError(f"Rice code holds {found} values, expected {count}")
    if not loops and b:
        values_N = (values_N << b) | bits.unpack(low, count, b)
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


def _huffman_pays(counts: Sequence[int], lengths: Sequence[int]) -> bool:
    """Say whether `auto` takes Huffman: a bound on its size, from the histogram alone."""
    count = sum(counts)
    segments = -(-count // SEGMENT)
    return _head_bytes(lengths) + 3 * segments + _coded_bits(counts, lengths) // 8 < 1 + count


def _coded_bits(counts: Sequence[int], lengths: Sequence[int]) -> int:
    if sum(1 for n in lengths if n) < 2:
        return 0
    return sum(n * w for n, w in zip(counts, lengths, strict=True))


def _head_bytes(lengths: Sequence[int]) -> int:
    return 2 + bits.packed_bytes(_top(lengths) + 1, 4)


def _top(lengths: Sequence[int]) -> int:
    """Return the largest byte value that has a code."""
    return max((s for s, n in enumerate(lengths) if n), default=0)


def _length(parts: Sequence[bytes | Tensor]) -> int:
    return sum(len(p) for p in parts)


def _bytes(data: bytes, device: torch.device) -> Tensor:
    if not data:
        return torch.zeros(0, dtype=torch.uint8, device=device)
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).to(device)


def _histogram(data_N: Tensor) -> list[int]:
    """Return how often each byte occurs."""
    if loops := parallel.kernels(len(data_N), data_N):
        found: list[int] = sum(
            parallel.ranges(loops.histogram, len(data_N), data_N.numpy())
        ).tolist()
        return found
    total = torch.zeros(256, dtype=torch.int64, device=data_N.device)
    for slab in data_N.split(bits.SLAB) if len(data_N) else ():  # type: ignore[no-untyped-call]
        total += torch.bincount(slab, minlength=256)
    return list(total.tolist())


def _codes(lengths: Sequence[int]) -> list[int]:
    """Return canonical codes, by (length, symbol) counting up, bits reversed: root bit lowest."""
    codes = [0] * len(lengths)
    code = previous = 0
    for length, symbol in sorted((n, s) for s, n in enumerate(lengths) if n):
        code <<= length - previous
        previous = length
        codes[symbol] = int(f"{code:0{length}b}"[::-1], 2)
        code += 1
    return codes


def _encode(data_N: Tensor, lengths: Sequence[int]) -> Tensor:
    """Return the Huffman form."""
    device, top = data_N.device, _top(lengths)
    lone = sum(1 for n in lengths if n) < 2
    table = torch.tensor(lengths[: top + 1], dtype=torch.int64, device=device)
    head = torch.tensor([HUFFMAN, top], dtype=torch.uint8, device=device)
    widths = torch.tensor(lengths, dtype=torch.int64, device=device) * (not lone)
    codes = torch.tensor(_codes(lengths), dtype=torch.int64, device=device)
    if loops := parallel.kernels(len(data_N), data_N):
        return _encode_compiled(
            loops, data_N, torch.cat((head, bits.pack(table, 4))), codes, widths
        )
    found = [
        _encode_slab(data_N[start : start + _SLAB], widths, codes)
        for start in range(0, len(data_N), _SLAB)
    ]
    sizes = [bits.pack(sizes_S, 16) for sizes_S, _ in found]
    return torch.cat((head, bits.pack(table, 4), *sizes, *(stream for _, stream in found)))


def _encode_compiled(
    loops: Any, data_N: Tensor, head: Tensor, codes: Tensor, widths: Tensor
) -> Tensor:
    segments = -(-len(data_N) // SEGMENT)
    size_S = torch.zeros(segments, dtype=torch.int64)
    data, width, code = data_N.numpy(), widths.numpy(), codes.numpy().astype(np.uint64)
    parallel.ranges(loops.huffman_sizes, segments, data, width, size_S.numpy())
    place_S = torch.nn.functional.pad(torch.cumsum(size_S, 0), (1, 0))
    front = torch.cat((head, bits.pack(size_S, 16)))
    stream = parallel.empty(len(front) + int(place_S[-1]), torch.uint8)
    stream[: len(front)] = front
    place_S += len(front)
    parallel.ranges(
        loops.huffman_encode,
        segments,
        data,
        code,
        width.astype(np.uint64),
        place_S.numpy(),
        stream.numpy(),
    )
    return stream


_SLAB = 64 * SEGMENT
"""Bytes that are coded at once in torch; a decoder holds some 8 numbers for each of their bits."""


def _encode_slab(data_N: Tensor, widths: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    """Return the length of each segment's code in bytes, and the segments."""
    symbol_N = data_N.to(torch.int64)
    width_N, code_N = widths[symbol_N], codes[symbol_N]
    end_N = torch.cumsum(width_N, 0)
    segments = -(-len(data_N) // SEGMENT)
    last_S = (torch.arange(1, segments + 1, device=data_N.device) * SEGMENT).clamp(max=len(data_N))
    end_S = end_N[last_S - 1]
    before_S = torch.nn.functional.pad(end_S, (1, 0))[:-1]
    size_S = (end_S - before_S + 7) // 8
    start_S = 8 * (torch.cumsum(size_S, 0) - size_S)
    segment_N = torch.arange(len(data_N), device=data_N.device) // SEGMENT
    place_N = end_N - width_N + (start_S - before_S)[segment_N]
    stream = torch.zeros(8 * int(size_S.sum()), dtype=torch.uint8, device=data_N.device)
    for k in range(int(widths.max())):
        here = width_N > k
        stream[place_N[here] + k] = ((code_N[here] >> k) & 1).to(torch.uint8)
    return size_S, bits.pack_bits(stream)


def _decode(reader: bits.Reader, count: int, mode: str) -> Tensor:
    """Return the bytes of the Huffman form, after its first byte."""
    top = reader.number(1)
    table = bits.unpack(reader.take(bits.packed_bytes(top + 1, 4)), top + 1, 4).tolist()
    lengths: list[int] = table + [0] * (255 - top)
    used = [s for s, n in enumerate(lengths) if n]
    lone = len(used) == 1 and lengths[used[0]] == 1
    whole = sum(1 << (LONGEST - lengths[s]) for s in used) == 1 << LONGEST
    if used and top != used[-1]:
        raise PayloadError("Huffman code lengths end in a zero")
    if not (lone or (whole and len(used) > 1) or (count == 0 and top == 0 and not used)):
        raise PayloadError("Huffman code lengths do not make a complete tree")
    sizes_S = bits.unpack(reader.take(2 * -(-count // SEGMENT)), -(-count // SEGMENT), 16)
    data = reader.take(int(sizes_S.sum()))
    if lone or not count:
        if len(data):
            raise PayloadError("a lone symbol takes no bits")
        data_N = torch.full((count,), used[0] if used else 0, dtype=torch.uint8, device=data.device)
    else:
        data_N = _decode_segments(data, sizes_S, count, lengths)
    counts = _histogram(data_N)
    if huffman_lengths(counts) != lengths:
        raise PayloadError("Huffman code lengths are not those of the bytes")
    if mode == "auto" and not _huffman_pays(counts, lengths):
        raise PayloadError("Huffman, where the bytes as they are come as short")
    return data_N


def _decode_segments(data: Tensor, sizes_S: Tensor, count: int, lengths: Sequence[int]) -> Tensor:
    """Return `count` bytes, having checked that each segment is as long as it says."""
    segments, each = len(sizes_S), _SLAB // SEGMENT
    wanted_S = torch.full_like(sizes_S, SEGMENT)
    wanted_S[-1] = count - SEGMENT * (segments - 1)
    least = min(n for n in lengths if n)
    if bool((8 * sizes_S < wanted_S * least).any()):
        raise PayloadError("Huffman code is cut off")
    symbol_at, width_at = _windows(lengths, data.device)
    if loops := parallel.kernels(count, data):
        return _decode_compiled(loops, data, sizes_S, count, symbol_at + 256 * width_at)
    bounds = torch.nn.functional.pad(torch.cumsum(sizes_S, 0), (1, 0)).tolist()
    found = []
    for first in range(0, segments, each):
        last = min(first + each, segments)
        slab, wanted = data[bounds[first] : bounds[last]], wanted_S[first:last]
        found.append(
            _decode_slab(slab, sizes_S[first:last], int(wanted.sum()), symbol_at, width_at)
        )
    return torch.cat(found)


def _decode_compiled(
    loops: Any, data: Tensor, sizes_S: Tensor, count: int, words: Tensor
) -> Tensor:
    place_S = torch.nn.functional.pad(torch.cumsum(sizes_S, 0), (1, 0)).numpy()
    long = words.numpy().astype(np.uint16)
    short = np.where(long[: 1 << 11] >> 8 <= 11, long[: 1 << 11], 0).astype(np.uint16)
    data_N = parallel.empty(count, torch.uint8)
    wrong = parallel.ranges(
        loops.huffman_decode,
        len(sizes_S),
        data.numpy(),
        place_S,
        short,
        long,
        data_N.numpy(),
    )
    if any(wrong):
        raise PayloadError("a segment of Huffman code is cut off, too long or badly padded")
    return data_N


def _windows(lengths: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return, for every 15 bits that may come next, the symbol they begin with and its width."""
    symbol = torch.zeros(1 << LONGEST, dtype=torch.uint8)
    width = torch.zeros(1 << LONGEST, dtype=torch.int64)
    for s, (length, code) in enumerate(zip(lengths, _codes(lengths), strict=True)):
        if length:
            symbol[code :: 1 << length] = s
            width[code :: 1 << length] = length
    return symbol.to(device), width.to(device)


def _decode_slab(
    data: Tensor, sizes_S: Tensor, count: int, symbol_at: Tensor, width_at: Tensor
) -> Tensor:
    """Return `count` bytes of segments that lie side by side.

    Where a code that began at each bit would end is looked up for all bits at once; following
    these jumps 2^i at a time finds the starts of all codes in 12 steps.
    """
    device, last = data.device, 8 * len(data)
    wide = torch.nn.functional.pad(data, (0, 2)).to(torch.int64)
    three = wide[:-2] | wide[1:-1] << 8 | wide[2:] << 16
    window_P = ((three[:, None] >> torch.arange(8, device=device)) & 0x7FFF).reshape(-1)
    bit_P = torch.arange(last + 1, device=device)
    jump_P = bit_P.clone()
    jump_P[:-1] = (bit_P[:-1] + width_at[window_P]).clamp(max=last)
    end_S = 8 * torch.cumsum(sizes_S, 0)
    place_SK = (end_S - 8 * sizes_S)[:, None]
    while place_SK.shape[1] < SEGMENT:
        place_SK = torch.cat((place_SK, jump_P[place_SK]), 1)
        jump_P = jump_P[jump_P]
    place_N = place_SK.reshape(-1)[:count]
    symbol_N = symbol_at[window_P[place_N.clamp(max=last - 1)]]
    # Codes follow one another without gaps: if the last ends in time, all lie in their segment.
    final_S = torch.cat((place_SK[:-1, -1], place_N[-1:]))
    final_S = final_S + width_at[window_P[final_S.clamp(max=last - 1)]]
    if bool((final_S > end_S).any()):
        raise PayloadError("Huffman code is cut off")
    if bool((final_S + 7 < end_S).any()):
        raise PayloadError("a segment of Huffman code has bytes too many")
    tail_S = wide[end_S // 8 - 1] >> (8 - (end_S - final_S))
    if bool(((end_S > final_S) & (tail_S != 0)).any()):
        raise PayloadError("padding is not zero")
    return symbol_N
