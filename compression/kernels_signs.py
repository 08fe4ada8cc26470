"""The loops of `perturbation` over large vectors on the CPU: all seeds while a tile is in cache.

A tile is 64 words of signs. They are hashed into a buffer; then elements are added where their bit
is set, which compiles to masked vector instructions. What is summed stays in the first level of
cache for as many seeds as there are, so memory is passed once. Tiles begin where a word does,
whatever element a range begins at; what of a tile lies outside the range is zero or not stored.
Import this through `perturbation` alone.
"""

from typing import Any

import numpy as np

from shoal.compression.kernels import compiled

Array = Any
Int = Any

WORDS = 64
TILE = 64 * WORDS
FEW_WORDS = 16
FEW = 64 * FEW_WORDS
"""Of a tile that has company in the cache."""

float32: Any = np.float32
int32: Any = np.int32
int64: Any = np.int64
uint64: Any = np.uint64

_STEP = uint64(0x9E3779B97F4A7C15)
_MUL1 = uint64(0xBF58476D1CE4E5B9)
_MUL2 = uint64(0x94D049BB133111EB)
_30, _27, _31 = uint64(30), uint64(27), uint64(31)
_BIT = np.uint64(1) << np.arange(64, dtype=np.uint64)
_BIT32 = _BIT[:32].astype(np.uint32)
"""Lanes of an int32 are tested against lanes as wide."""


@compiled
def _hash(key: Int, first: Int, word: Array) -> None:
    """Set word[w] to out(first + w); twin: `splitmix.words`."""
    at = key + uint64(first + 1) * _STEP
    for w in range(len(word)):
        z = at + uint64(w) * _STEP
        z = (z ^ (z >> _30)) * _MUL1
        z = (z ^ (z >> _27)) * _MUL2
        word[w] = z ^ (z >> _31)


@compiled
def accumulate(
    start: Int, end: Int, total: Array, first: Int, keys: Array, change: Array, base: Int
) -> None:
    """Add base + Σ change · bit mod 2³²; twin: `perturbation.accumulate` in torch."""
    word = np.empty(WORDS, np.uint64)
    half = word.view(np.uint32)
    tile = np.empty(TILE, np.int32)
    at = start
    while at < end:
        skip = (first + at) % 64
        count = min(end - at, TILE - skip)
        tile[:] = base
        for k in range(len(keys)):
            _hash(keys[k], (first + at) // 64, word)
            a = change[k]
            for h in range(2 * WORDS):
                bits = half[h]
                part = tile[32 * h : 32 * h + 32]
                for j in range(32):
                    part[j] += a if bits & _BIT32[j] else int32(0)
        out, sums = total[at : at + count], tile[skip : skip + count]
        for i in range(count):
            out[i] += sums[i]
        at += count


@compiled
def each(
    start: Int,
    end: Int,
    total: Array,
    first: Int,
    keys: Array,
    change: Array,
    base: Array,
    ends: Array,
    place: Int,
    key0: Int,
    key1: Int,
) -> Array:
    """Add many sums, return both lanes of each; twin: `perturbation.accumulate_each` in torch."""
    found = np.zeros((len(ends), 2), np.uint64)
    word = np.empty(FEW_WORDS, np.uint64)
    half = word.view(np.uint32)
    tile, held = np.empty(FEW, np.int32), np.empty(FEW, np.int32)
    tile0, tile1 = np.empty(FEW, np.uint64), np.empty(FEW, np.uint64)
    at = start
    while at < end:
        skip = (first + at) % 64
        count = min(end - at, FEW - skip)
        tile0[:], tile1[:], held[:] = uint64(0), uint64(0), int32(0)
        step = uint64(place + at + 1) * _STEP
        odd0, odd1 = tile0[skip : skip + count], tile1[skip : skip + count]
        for i in range(count):
            odd0[i] = _odd(step + uint64(i) * _STEP + key0)
            odd1[i] = _odd(step + uint64(i) * _STEP + key1)
        k = 0
        for u in range(len(ends)):
            tile[:] = base[u]
            while k < ends[u]:
                _hash(keys[k], (first + at) // 64, word)
                a = change[k]
                for h in range(2 * FEW_WORDS):
                    bits = half[h]
                    part = tile[32 * h : 32 * h + 32]
                    for j in range(32):
                        part[j] += a if bits & _BIT32[j] else int32(0)
                k += 1
            sum0 = sum1 = uint64(0)
            for i in range(FEW):
                v = uint64(int64(tile[i]))
                sum0 += v * tile0[i]
                sum1 += v * tile1[i]
                held[i] += tile[i]
            found[u, 0] += sum0
            found[u, 1] += sum1
        out, sums = total[at : at + count], held[skip : skip + count]
        for i in range(count):
            out[i] += sums[i]
        at += count
    return found


@compiled
def _odd(z: Int) -> Int:
    """Return the finaliser of SplitMix64, made odd."""
    z = (z ^ (z >> _30)) * _MUL1
    z = (z ^ (z >> _27)) * _MUL2
    return (z ^ (z >> _31)) | uint64(1)


@compiled
def project(start: Int, end: Int, x: Array, first: Int, keys: Array) -> Array:
    """Return Σ x · z for each key; twin: `perturbation.project` in torch."""
    found = np.zeros(len(keys), np.int64)
    word = np.empty(WORDS, np.uint64)
    tile = np.empty(TILE, np.int64)
    lane = np.empty(64, np.int64)
    at = start
    while at < end:
        skip = (first + at) % 64
        count = min(end - at, TILE - skip)
        tile[:] = 0
        held, part = tile[skip : skip + count], x[at : at + count]
        total = int64(0)
        for i in range(count):
            held[i] = part[i]
            total += part[i]
        for k in range(len(keys)):
            _hash(keys[k], (first + at) // 64, word)
            lane[:] = 0
            for w in range(WORDS):
                bits = word[w]
                lanes = tile[64 * w : 64 * w + 64]
                for j in range(64):
                    lane[j] += lanes[j] if bits & _BIT[j] else int64(0)
            set_ = int64(0)
            for j in range(64):
                set_ += lane[j]
            found[k] += total - 2 * set_
        at += count
    return found


@compiled
def perturb(start: Int, end: Int, x: Array, first: Int, key: Int, scale: Int) -> None:
    """Add scale · z; twin: `perturbation.perturb` in torch."""
    word = np.empty(WORDS, np.uint64)
    half = word.view(np.uint32)
    tile = np.empty(TILE, np.float32)
    at = start
    while at < end:
        skip = (first + at) % 64
        count = min(end - at, TILE - skip)
        _hash(key, (first + at) // 64, word)
        for h in range(2 * WORDS):
            bits = half[h]
            part = tile[32 * h : 32 * h + 32]
            for j in range(32):
                part[j] = -scale if bits & _BIT32[j] else scale
        out, steps = x[at : at + count], tile[skip : skip + count]
        for i in range(count):
            out[i] += steps[i]
        at += count
