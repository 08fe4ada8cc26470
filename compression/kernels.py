"""Compiled loops over large vectors on the CPU. Import this through parallel.py alone.

Every loop has a twin in torch that gives the same result to the bit (the tests call both), says so
in fewer words, and serves small vectors, CUDA, and machines without numba. So each docstring here
names the twin, and the rules are there. Loops take a range, run without the lock that Python holds,
and allow no reordering of float operations. Arrays are numpy's; lengths have been checked.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import numba
import numpy as np
from numba.core import cgutils, types
from numba.extending import intrinsic as numba_intrinsic

F = TypeVar("F", bound=Callable[..., Any])
Array = Any
Int = Any
"""A compiled integer, of whatever width the loop gives it; Python's checkers cannot follow."""

intrinsic: Any = numba_intrinsic
pointers: Any = cgutils
int32: Any = np.int32
int64: Any = np.int64
uint8: Any = np.uint8
uint64: Any = np.uint64
float32: Any = np.float32

SEGMENT = 4096
INT32_MAX = 2**31 - 1
_FINITE = 0x7F800000
"""Bits of |x| from which a float32 is infinite or not a number."""
_ROUND = float32(12582912.0)
"""1.5 · 2²³: adding and subtracting it rounds a small float32 to the nearest, ties to even."""
_MOST = float32(2.0**32)
_TWO = float32(2.0)

_STEP = uint64(0x9E3779B97F4A7C15)
_MUL1 = uint64(0xBF58476D1CE4E5B9)
_MUL2 = uint64(0x94D049BB133111EB)
_30, _27, _31, _1 = uint64(30), uint64(27), uint64(31), uint64(1)


def compiled(function: F) -> F:
    """Compile at the first call; keep the result beside the source if that can be written."""
    compile_: Any = numba.njit
    made: F
    try:
        made = compile_(nogil=True, cache=True)(function)
    except RuntimeError:  # no folder to keep it in
        made = compile_(nogil=True)(function)
    return made


def _load(_context: Any, array: Any, index: Any) -> Any:
    """Return the 8 bytes of a uint8 array from `index`, little-endian, aligned or not."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        where = _pointer(context, builder, signature, arguments)
        return builder.load(where, align=1)

    return types.uint64(array, index), generate


def _store(_context: Any, array: Any, index: Any, value: Any) -> Any:
    """Write the 8 bytes of `value` from `index`, little-endian."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        where = _pointer(context, builder, signature, arguments)
        builder.store(arguments[2], where, align=1)
        return context.get_dummy_value()

    return types.void(array, index, types.uint64), generate


_load64: Any = intrinsic(_load)
_store64: Any = intrinsic(_store)


def _pointer(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
    array = context.make_array(signature.args[0])(context, builder, arguments[0])
    where = pointers.gep_inbounds(builder, array.data, arguments[1])
    return builder.bitcast(where, context.get_value_type(types.uint64).as_pointer())


# Huffman (entropy.py)


@compiled
def histogram(start: Int, end: Int, data: Array) -> Array:
    """Count bytes; twin: `torch.bincount`."""
    counts = np.zeros((4, 256), np.int64)  # equal neighbours do not wait for each other
    part = data[start:end]
    n = len(part) & ~3
    for i in range(0, n, 4):
        counts[0, part[i]] += 1
        counts[1, part[i + 1]] += 1
        counts[2, part[i + 2]] += 1
        counts[3, part[i + 3]] += 1
    for i in range(n, len(part)):
        counts[0, part[i]] += 1
    return counts.sum(0)


@compiled
def huffman_sizes(start: Int, end: Int, data: Array, width: Array, size: Array) -> None:
    """Set the length in bytes of each segment's code; twin: `entropy._encode_slab`."""
    for s in range(start, end):
        part = data[s * SEGMENT : (s + 1) * SEGMENT]
        bits = 0
        for i in range(len(part)):
            bits += width[part[i]]
        size[s] = (bits + 7) >> 3


@compiled
def huffman_encode(
    start: Int, end: Int, data: Array, code: Array, width: Array, place: Array, out: Array
) -> None:
    """Write the code of each segment from byte `place`; twin: `entropy._encode_slab`."""
    for s in range(start, end):
        part = data[s * SEGMENT : (s + 1) * SEGMENT]
        at, limit = place[s], place[s + 1]
        pending, bits = uint64(0), uint64(0)
        i, n = 0, len(part)
        while i + 3 <= n and at + 8 <= limit:
            for j in range(i, i + 3):
                pending |= code[part[j]] << bits
                bits += width[part[j]]
            _store64(out, at, pending)
            at += int64(bits >> uint64(3))
            pending >>= bits & uint64(0x38)
            bits &= uint64(7)
            i += 3
        while i < n:
            pending |= code[part[i]] << bits
            bits += width[part[i]]
            i += 1
            while bits >= uint64(8):
                out[at] = uint8(pending & uint64(255))
                at += 1
                pending >>= uint64(8)
                bits -= uint64(8)
        if bits > uint64(0):
            out[at] = uint8(pending & uint64(255))


@compiled
def huffman_decode(
    start: Int, end: Int, data: Array, place: Array, short: Array, long: Array, out: Array
) -> Int:
    """Read segments; twin: `entropy._decode_slab`. Returns 0, or what is wrong.

    `short` and `long` hold symbol + 256 · width by the next 11 and 15 bits, 0: not that short. Four
    segments are read side by side, so that one need not wait for another's look-up.
    """
    s, wrong = start, 0
    at = np.empty(4, np.int64)
    while s < end:
        four = s + 4 <= end and (s + 4) * SEGMENT <= len(out) and place[s + 4] + 16 <= len(data)
        done = 0
        each = 4 if four else 1
        for k in range(4):
            at[k] = 8 * place[s + min(k, each - 1)]
        if four:
            a, b, c, d = at[0], at[1], at[2], at[3]
            end_a, end_b = 8 * place[s + 1], 8 * place[s + 2]
            end_c, end_d = 8 * place[s + 3], 8 * place[s + 4]
            out_a = out[s * SEGMENT : (s + 1) * SEGMENT]
            out_b = out[(s + 1) * SEGMENT : (s + 2) * SEGMENT]
            out_c = out[(s + 2) * SEGMENT : (s + 3) * SEGMENT]
            out_d = out[(s + 3) * SEGMENT : (s + 4) * SEGMENT]
            while done + 3 <= SEGMENT and a < end_a and b < end_b and c < end_c and d < end_d:
                bits_a = _load64(data, a >> 3) >> uint64(a & 7)
                bits_b = _load64(data, b >> 3) >> uint64(b & 7)
                bits_c = _load64(data, c >> 3) >> uint64(c & 7)
                bits_d = _load64(data, d >> 3) >> uint64(d & 7)
                for i in range(done, done + 3):
                    word_a, word_b = short[bits_a & _SHORT], short[bits_b & _SHORT]
                    word_c, word_d = short[bits_c & _SHORT], short[bits_d & _SHORT]
                    if word_a == 0:
                        word_a = long[bits_a & _LONG]
                    if word_b == 0:
                        word_b = long[bits_b & _LONG]
                    if word_c == 0:
                        word_c = long[bits_c & _LONG]
                    if word_d == 0:
                        word_d = long[bits_d & _LONG]
                    out_a[i], out_b[i] = word_a & 255, word_b & 255
                    out_c[i], out_d[i] = word_c & 255, word_d & 255
                    bits_a >>= uint64(word_a >> 8)
                    bits_b >>= uint64(word_b >> 8)
                    bits_c >>= uint64(word_c >> 8)
                    bits_d >>= uint64(word_d >> 8)
                    a += word_a >> 8
                    b += word_b >> 8
                    c += word_c >> 8
                    d += word_d >> 8
                done += 3
            at[0], at[1], at[2], at[3] = a, b, c, d
        for k in range(each):
            part = out[(s + k) * SEGMENT : (s + k + 1) * SEGMENT]
            wrong |= _finish(data, place[s + k + 1], at[k], part, done, long)
        if wrong:
            return wrong
        s += each
    return 0


_SHORT, _LONG = uint64(0x7FF), uint64(0x7FFF)


@compiled
def _finish(data: Array, limit: Int, at: Int, out: Array, done: Int, long: Array) -> Int:
    """Read the rest of a segment that ends before byte `limit`, touching nothing beyond it."""
    for i in range(done, len(out)):
        if at >= 8 * limit:
            return 1
        byte = at >> 3
        window = int64(data[byte])
        if byte + 1 < limit:
            window |= int64(data[byte + 1]) << 8
        if byte + 2 < limit:
            window |= int64(data[byte + 2]) << 16
        word = long[(window >> (at & 7)) & 0x7FFF]
        out[i] = word & 255
        at += word >> 8
    if at > 8 * limit:
        return 1
    if at + 7 < 8 * limit:
        return 2
    if at & 7 and data[limit - 1] >> (at & 7):
        return 4
    return 0


# Rice (entropy.py)


@compiled
def rice_encode(value: Array, b: Int, low: Array, unary: Array) -> None:
    """Write low parts and unary parts into zeroed bytes; twin: `entropy.rice_encode`."""
    mask = (1 << b) - 1
    at, end = 0, -1
    for i in range(len(value)):
        end += (value[i] >> b) + 1
        unary[end >> 3] |= uint8(1 << (end & 7))
        part, left = value[i] & mask, b
        while left > 0:
            room = 8 - (at & 7)
            low[at >> 3] |= uint8((part << (at & 7)) & 255)
            part >>= room
            at += min(room, left)
            left -= room


@compiled
def rice_decode(low: Array, unary: Array, b: Int, value: Array) -> Int:
    """Set the values, return how many ones there were; twin: `entropy.rice_decode`."""
    found, before, at = 0, -1, 0
    mask = (1 << b) - 1
    for i in range(len(unary)):
        byte = unary[i]
        if found + 8 > len(value):  # near the end, and of garbage
            for j in range(8):
                if byte >> j & 1:
                    if found < len(value):
                        value[found] = (8 * i + j - before - 1) << b
                    before = 8 * i + j
                    found += 1
            continue
        for j in range(_ONES[byte, 8]):
            place = 8 * i + _ONES[byte, j]
            value[found] = (place - before - 1) << b
            before = place
            found += 1
    if b == 0 or found != len(value):
        return found
    for i in range(len(value)):
        byte = at >> 3
        if byte + 8 <= len(low):
            value[i] |= int64(_load64(low, byte) >> uint64(at & 7)) & mask
        else:
            part = 0
            for j in range(len(low) - byte):
                part |= int64(low[byte + j]) << (8 * j)
            value[i] |= (part >> (at & 7)) & mask
        at += b
    return found


def _ones() -> Array:
    """Return the places of the ones of every byte, and in column 8 how many there are."""
    table = np.zeros((256, 9), np.int64)
    for byte in range(256):
        places = [j for j in range(8) if byte >> j & 1]
        table[byte, : len(places)] = places
        table[byte, 8] = len(places)
    return table


_ONES = _ones()


# Sparse (codecs/sparse.py)


@compiled
def sparse_encode(
    start: Int,
    end: Int,
    x: Array,
    chunk: Int,
    keep: Int,
    levels: Int,
    mantissa: Array,
    exponent: Array,
    index: Array,
    minus: Array,
    level: Array,
    value: Array,
) -> Int:
    """Keep the top of whole chunks; twin: `Sparse.encode`. Returns 1 if one is not finite."""
    raw = x.view(np.int32)
    size = np.empty(chunk, np.int32)
    candidate = np.empty(chunk + 1, np.int32)
    candidate_size = np.empty(chunk, np.int32)
    guess = int32(0)
    for c in range(start, end):
        part = raw[c * chunk : (c + 1) * chunk]
        largest = 0
        for i in range(chunk):
            size[i] = part[i] & 0x7FFFFFFF
            largest = max(largest, size[i])
        if largest >= _FINITE:
            return 1
        count = 0
        for i in range(chunk):
            count += size[i] >= guess
        if count < keep:
            guess = int32(0)
        m = 0
        for i in range(chunk):
            candidate[m] = i
            m += size[i] >= guess
        for j in range(m):
            candidate_size[j] = size[candidate[j]]
        least = _kth(candidate_size[:m], keep)
        free = keep
        for j in range(m):
            free -= candidate_size[j] > least
        guess = int32(max(least - (1 << 21), 0))  # four fifths of it, for the next chunk
        place = c * keep
        for j in range(m):
            if candidate_size[j] > least or (candidate_size[j] == least and free > 0):
                free -= candidate_size[j] == least
                index[place] = candidate[j]
                place += 1
        _say(
            x[c * chunk : (c + 1) * chunk],
            c,
            chunk,
            keep,
            levels,
            mantissa,
            exponent,
            index,
            minus,
            level,
            value,
        )
    return 0


@compiled
def sparse_gaps(start: Int, end: Int, index: Array, chunk: Int, keep: Int, gap: Array) -> None:
    """Set the gap before each kept element of these chunks; twin: `Sparse.pack`."""
    for c in range(start, end):
        before = c * chunk - 1
        for i in range(c * keep, min((c + 1) * keep, len(index))):
            gap[i] = index[i] - before - 1
            before = index[i]


@compiled
def sparse_decode(
    start: Int,
    end: Int,
    chunk: Int,
    keep: Int,
    size: Int,
    gap: Array,
    mantissa: Array,
    exponent: Array,
    index: Array,
    minus: Array,
    level: Array,
    value: Array,
) -> Int:
    """Set indices and values of chunks; twin: `Sparse._check`. Returns 0, or what is wrong."""
    for c in range(start, end):
        m, e = int64(mantissa[c]), int64(exponent[c])
        if e > 23 or (m < 128 and e > 0):
            return 2
        unit = m << e
        first, limit = c * chunk, min((c + 1) * chunk, size)
        place = first - 1
        for i in range(c * keep, min((c + 1) * keep, len(gap))):
            place += gap[i] + 1
            if place >= limit:
                return 1
            index[i] = place
            v = (2 * int64(level[i]) + 1) * unit
            if v > INT32_MAX:
                return 3
            if unit == 0 and (minus[i] or level[i] or place != first + i - c * keep):
                return 4
            value[i] = -v if minus[i] else v
    return 0


@compiled
def _kth(size: Array, keep: Int) -> Int:
    """Return the `keep`-th largest of integers below 2³¹, bit by bit."""
    least = 0
    for bit in range(30, -1, -1):
        trial = int32(least | (1 << bit))
        count = 0
        for i in range(len(size)):
            count += size[i] >= trial
        if count >= keep:
            least |= 1 << bit
    return least


@compiled
def _say(
    x: Array,
    c: Int,
    chunk: Int,
    keep: Int,
    levels: Int,
    mantissa: Array,
    exponent: Array,
    index: Array,
    minus: Array,
    level: Array,
    value: Array,
) -> None:
    """Choose the unit, signs and levels of what one chunk keeps."""
    first = c * keep
    total = largest = int64(0)
    for i in range(first, first + keep):
        twice = _twice(x[index[i]])
        total += twice
        largest = max(largest, twice)
    steps = 2 * levels - 1
    unit = (total + keep) // (2 * keep)
    if levels > 1:
        unit = -(-largest // (2 * steps))
    m, e = _minifloat(unit, True)
    if m << e > INT32_MAX // steps:
        m, e = _minifloat(int64(INT32_MAX // steps), False)
    mantissa[c], exponent[c] = m, e
    unit = m << e
    for i in range(first, first + keep):
        if unit == 0:
            index[i] = c * chunk + i - first
            minus[i], level[i], value[i] = 0, 0, 0
            continue
        v = x[index[i]]
        j = min(_twice(v) // (4 * unit), levels - 1)
        index[i] += c * chunk
        minus[i], level[i] = v < 0, j
        value[i] = -(2 * j + 1) * unit if v < 0 else (2 * j + 1) * unit


@compiled
def _twice(v: Int) -> Int:
    """Return ⌊2|v|⌋, at most 2³²."""
    return int64(min(_TWO * abs(v), _MOST))


@compiled
def _minifloat(unit: Int, up: bool) -> tuple[Int, Int]:
    e = int64(0)
    while unit >> e > 255:
        e += 1
    m = unit >> e
    if up and e > 0:
        m = (unit + (int64(1) << (e - 1))) >> e
    if m == 256:
        return int64(128), e + 1
    return m, e


# Dense (codecs/dense.py)

_TRITS = np.array([[c // 3**j % 3 for j in range(5)] for c in range(256)], np.uint8)


@compiled
def measure(start: Int, end: Int, x: Array) -> tuple[Int, Int]:
    """Return the bits of the largest |x| and Σ ⌊2|x|⌋; twin: `Dense._scales`."""
    return _largest(x.view(np.int32)[start:end]), _sum(x[start:end])


@compiled
def _largest(raw: Array) -> Int:
    largest = int32(0)
    for i in range(len(raw)):
        largest = max(largest, int32(raw[i] & int32(0x7FFFFFFF)))
    return int64(largest)


@compiled
def _sum(x: Array) -> Int:
    total = int64(0)
    for i in range(len(x)):
        total += _twice(x[i])
    return total


@compiled
def dense_encode(
    start: Int,
    end: Int,
    x: Array,
    tile: Int,
    block: Int,
    alphabet: Int,
    by_largest: Int,
    fits: Array,
    middles: Array,
    table: Array,
    most: Int,
    numerator: Int,
    denominator: Int,
    scale: Array,
    packed: Array,
    value: Array,
) -> Int:
    """Encode tiles of whole blocks and bytes; twin: `Dense.encode`. Returns 1 if not finite.

    `block = 0`: `scale` holds the one scale. `fits` are the bits of the largest |x| of each scale.
    """
    raw = x.view(np.int32)
    symbol = np.empty(tile, np.uint8)
    each = 1 if alphabet == 255 else 2 if alphabet == 15 else 4 if alphabet == 4 else 8
    each = 5 if alphabet == 3 else each
    for t in range(start, end):
        lo, hi = t * tile, min((t + 1) * tile, len(x))
        for a in range(lo, hi, block if block else tile):
            z = min(a + (block if block else tile), hi)
            s = scale[0]
            if block:
                largest = _largest(raw[a:z])
                if largest >= _FINITE:
                    return 1
                if by_largest:
                    code = np.searchsorted(fits, int32(largest))
                else:
                    twice = numerator * _sum(x[a:z]) // (denominator * (z - a))
                    code = np.searchsorted(middles, twice)
                s = table[min(code, most)]
                scale[a // block] = s
            out = packed[a:z] if alphabet == 255 else symbol[a - lo : z - lo]
            if alphabet == 2:
                _signs(x[a:z], s, out, value[a:z])
            elif alphabet == 4:
                _quarters(x[a:z], s, out, value[a:z])
            else:
                _mantissas(x[a:z], s, alphabet // 2, out, value[a:z])
        if alphabet != 255:
            symbol[hi - lo :] = 0
            _pack(symbol, alphabet, packed[lo // each : (hi + each - 1) // each])
    return 0


@compiled
def _mantissas(x: Array, scale: Int, top: Int, symbol: Array, value: Array) -> None:
    inverse = float32(1) / float32(scale) if scale else float32(0)
    limit, s = float32(top), int32(scale)
    for i in range(len(x)):
        v = x[i] * inverse
        v = limit if v > limit else v
        v = -limit if v < -limit else v
        m = int32((v + _ROUND) - _ROUND)
        symbol[i] = uint8(m + top)
        value[i] = int32(m * s)


@compiled
def _signs(x: Array, scale: Int, symbol: Array, value: Array) -> None:
    for i in range(len(x)):
        plus = not (x[i] < 0 and scale > 0)
        symbol[i] = plus
        value[i] = scale if plus else -scale


@compiled
def _quarters(x: Array, scale: Int, symbol: Array, value: Array) -> None:
    inverse = float32(1) / float32(scale) if scale else float32(0)
    for i in range(len(x)):
        far = int64(abs(x[i] * inverse) >= _TWO)
        j = 1 - far if x[i] < 0 and scale > 0 else 2 + far
        symbol[i] = j
        value[i] = (2 * j - 3) * scale


@compiled
def _pack(symbol: Array, alphabet: Int, packed: Array) -> None:
    for i in range(len(packed)):
        if alphabet == 3:
            s = symbol[5 * i : 5 * i + 5]
            packed[i] = uint8(s[0] + 3 * s[1] + 9 * s[2] + 27 * s[3] + 81 * s[4])
        elif alphabet == 15:
            packed[i] = uint8(symbol[2 * i] + 16 * symbol[2 * i + 1])
        elif alphabet == 4:
            s = symbol[4 * i : 4 * i + 4]
            packed[i] = uint8(s[0] + 4 * s[1] + 16 * s[2] + 64 * s[3])
        else:
            byte = 0
            for j in range(8):
                byte |= symbol[8 * i + j] << j
            packed[i] = uint8(byte)


@compiled
def dense_decode(
    start: Int,
    end: Int,
    packed: Array,
    tile: Int,
    block: Int,
    alphabet: Int,
    scale: Array,
    value: Array,
) -> Int:
    """Decode tiles; twin: `Dense._expand`. Returns 0, or what is wrong."""
    buffer = np.empty(tile + 8, np.uint8)
    top, idle = alphabet // 2, alphabet // 2
    largest = 1 if alphabet < 4 else 3 if alphabet == 4 else top
    for t in range(start, end):
        lo, hi = t * tile, min((t + 1) * tile, len(value))
        if alphabet != 255:
            _unpack(packed, lo, hi, alphabet, buffer)
        for a in range(lo, hi, block if block else tile):
            z = min(a + (block if block else tile), hi)
            s = scale[a // block] if block else scale[0]
            symbol = packed[a:z] if alphabet == 255 else buffer[a - lo : z - lo]
            out = value[a:z]
            if alphabet == 255 or alphabet == 15:
                highest = uint8(0)
                for i in range(len(symbol)):
                    highest = max(highest, symbol[i])
                if highest >= alphabet:
                    return 1
            if s == 0:
                for i in range(len(symbol)):
                    if symbol[i] != idle:
                        return 2
            if s * largest > INT32_MAX:
                for i in range(len(symbol)):
                    m = int64(symbol[i])
                    m = 2 * m - largest if alphabet == 2 or alphabet == 4 else m - top
                    if abs(m) * s > INT32_MAX:
                        return 4
            s32 = int32(s)
            if alphabet == 2 or alphabet == 4:
                for i in range(len(symbol)):
                    out[i] = int32((2 * int32(symbol[i]) - largest) * s32)
            else:
                for i in range(len(symbol)):
                    out[i] = int32((int32(symbol[i]) - int32(top)) * s32)
    return 0


@compiled
def _unpack(packed: Array, lo: Int, hi: Int, alphabet: Int, symbol: Array) -> None:
    """Take the digits of elements `lo` to `hi` apart; bytes past the last digit are zeros."""
    if alphabet == 3:
        for i in range((hi - lo + 4) // 5):
            byte = packed[lo // 5 + i]
            if 5 * i + 5 <= len(symbol):
                for j in range(5):
                    symbol[5 * i + j] = _TRITS[byte, j]
    elif alphabet == 15:
        for i in range((hi - lo + 1) // 2):
            byte = packed[lo // 2 + i]
            symbol[2 * i], symbol[2 * i + 1] = byte & 15, byte >> 4
    elif alphabet == 4:
        for i in range((hi - lo + 3) // 4):
            byte = packed[lo // 4 + i]
            for j in range(4):
                symbol[4 * i + j] = byte >> (2 * j) & 3
    else:
        for i in range((hi - lo + 7) // 8):
            byte = packed[lo // 8 + i]
            for j in range(8):
                symbol[8 * i + j] = byte >> j & 1


@compiled
def subtract(start: Int, end: Int, x: Array, value: Array, inverse: Int) -> None:
    """Take value · inverse from x in place; twin: `codec.subtract`."""
    left, sent = x[start:end], value[start:end]
    for i in range(len(left)):
        left[i] -= float32(sent[i]) * inverse


# The ledger (training/ledger.py, training/fingerprint.py)


@compiled
def lanes(start: Int, end: Int, value: Array, first: Int, key0: Int, key1: Int) -> tuple[Int, Int]:
    """Return Σ value · r(first + i) of both lanes mod 2⁶⁴; twin: `Fingerprint.of`."""
    sum0 = sum1 = uint64(0)
    part = value[start:end]
    at = uint64(first + start + 1) * _STEP
    for i in range(len(part)):
        v = uint64(int64(part[i]))
        c = at + uint64(i) * _STEP
        sum0 += v * _multiplier(c + key0)
        sum1 += v * _multiplier(c + key1)
    return sum0, sum1


@compiled
def _multiplier(z: Int) -> Int:
    z = (z ^ (z >> _30)) * _MUL1
    z = (z ^ (z >> _27)) * _MUL2
    return (z ^ (z >> _31)) | _1


@compiled
def dense_add(
    start: Int, end: Int, model: Array, value: Array, sign: Int, first: Int, key0: Int, key1: Int
) -> tuple[Int, Int, Int, Int, Int]:
    """Add to the model in place; twin: `Ledger._change`.

    Returns both lanes of what was added, both of by how much the model moved more than that when
    it wrapped, and how many values left half the range.
    """
    sum0 = sum1 = more0 = more1 = uint64(0)
    beyond = int64(0)
    for a in range(start, end, 1024):
        z = min(a + 1024, end)
        old, change = model[a:z], value[a:z]
        at = uint64(first + a + 1) * _STEP
        wrapped = 0
        for i in range(len(old)):
            v = int64(change[i]) * sign
            w = int64(old[i]) + v
            new = int32(w)
            wrapped |= w ^ int64(new)
            beyond += _beyond(new) - _beyond(old[i])
            old[i] = new
            c = at + uint64(i) * _STEP
            sum0 += uint64(v) * _multiplier(c + key0)
            sum1 += uint64(v) * _multiplier(c + key1)
        if wrapped:
            for i in range(len(old)):
                v = int64(change[i]) * sign
                more = uint64(int64(old[i]) - int64(int32(int64(old[i]) - v)) - v)
                c = at + uint64(i) * _STEP
                more0 += more * _multiplier(c + key0)
                more1 += more * _multiplier(c + key1)
    return sum0, sum1, more0, more1, beyond


@compiled
def sparse_add(
    start: Int,
    end: Int,
    model: Array,
    index: Array,
    value: Array,
    sign: Int,
    first: Int,
    key0: Int,
    key1: Int,
) -> tuple[Int, Int, Int, Int, Int]:
    """Add to the touched entries of the model; twin: `Ledger._change`. Returns as `dense_add`."""
    sum0 = sum1 = more0 = more1 = uint64(0)
    beyond = int64(0)
    for i in range(start, end):
        place = first + index[i]
        old = model[place]
        v = int64(value[i]) * sign
        new = int32(int64(old) + v)
        model[place] = new
        beyond += _beyond(new) - _beyond(old)
        c = uint64(place + 1) * _STEP
        r0, r1 = _multiplier(c + key0), _multiplier(c + key1)
        more = uint64(int64(new) - int64(old) - v)
        sum0 += uint64(v) * r0
        sum1 += uint64(v) * r1
        more0 += more * r0
        more1 += more * r1
    return sum0, sum1, more0, more1, beyond


@compiled
def _beyond(v: Int) -> Int:
    return int64(v >= 1 << 30 or v < -(1 << 30))


@compiled
def squares(start: Int, end: Int, value: Array) -> tuple[Int, Int]:
    """Return Σ v² in halves: what lies above 32 bits, and below; twin: `codec.sum_of_squares`."""
    high = low = uint64(0)
    part = value[start:end]
    for i in range(len(part)):
        v = int64(part[i])
        square = uint64(v * v)
        high += square >> uint64(32)
        low += square & uint64(0xFFFFFFFF)
    return high, low
