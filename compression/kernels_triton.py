"""The loops of `perturbation` on CUDA, by Triton: all seeds while a tile is in registers.

A tile is 64 words of signs. A word is hashed, then taken as two halves, whose 32 bits lie along a
warp: memory is read and written once, in order, for as many seeds as there are, where torch's own
operations make and read some 30 bytes for each sign. Tiles begin where a word does, whatever
element the vector begins at. Import this through `perturbation` alone, which first looks whether
the kernels agree with torch on the device at hand.

D: elements, K: keys, W: words, H: halves of words.
"""

import contextlib
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

WORDS = 64
"""Of a tile: 32 sums a thread fit the registers, and the hash is a quarter of the work."""


@triton.jit
def _minus(keys, k, first, words: tl.constexpr):
    """Say where direction k is -1 in this program's tile: [2 · words, 32]."""
    w = tl.program_id(0).to(tl.int64) * words + tl.arange(0, words)
    z = (first + w + 1).to(tl.uint64) * 0x9E3779B97F4A7C15 + tl.load(keys + k).to(tl.uint64)
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    z = z ^ (z >> 31)
    half_h = tl.interleave(z.to(tl.uint32), (z >> 32).to(tl.uint32))
    # Against a bit that each thread keeps: an operation less than to shift its sign's bit down.
    bit = tl.full((32,), 1, tl.uint32) << tl.arange(0, 32).to(tl.uint32)
    return (half_h[:, None] & bit[None, :]) != 0


@triton.jit
def _places(count, skip, words: tl.constexpr):
    """Return where the tile's elements lie in the vector, and which of them do."""
    at = tl.arange(0, 2 * words)[:, None] * 32 + tl.arange(0, 32)[None, :]
    i = tl.program_id(0).to(tl.int64) * (64 * words) + at - skip
    return i, (i >= 0) & (i < count)


@triton.jit(do_not_specialize=["count", "first", "skip", "base", "keys_k"])
def _accumulate(
    total,
    keys,
    change,
    count,
    first,
    skip,
    base,
    keys_k,
    words: tl.constexpr,
):
    sums = tl.full((2 * words, 32), 0, tl.int32) + base.to(tl.int32)
    for k in range(keys_k):
        sums += tl.where(_minus(keys, k, first, words), tl.load(change + k).to(tl.int32), 0)
    # Only now, so that where they lie takes no registers in the loop.
    i, inside = _places(count, skip, words)
    sums += tl.load(total + i, mask=inside, other=0)
    tl.store(total + i, sums, mask=inside)


@triton.jit(do_not_specialize=["count", "first", "skip", "keys_k"])
def _project(
    x,
    keys,
    found,
    count,
    first,
    skip,
    keys_k,
    words: tl.constexpr,
):
    i, inside = _places(count, skip, words)
    part = tl.load(x + i, mask=inside, other=0).to(tl.int64)
    for k in range(keys_k):
        minus = tl.where(_minus(keys, k, first, words), part, 0)
        tl.atomic_add(found + k, tl.sum(minus))  # of integers: in any order


@triton.jit(do_not_specialize=["count", "first", "skip", "step"])
def _perturb(
    x,
    keys,
    count,
    first,
    skip,
    step,
    words: tl.constexpr,
):
    i, inside = _places(count, skip, words)
    # ±scale by its sign bit, so that adding is the only operation on floats.
    bits = (_minus(keys, 0, first, words).to(tl.uint32) << 31) ^ step.to(tl.uint32)
    moved = tl.load(x + i, mask=inside, other=0.0) + bits.to(tl.float32, bitcast=True)
    tl.store(x + i, moved, mask=inside)


def accumulate(total_D: Tensor, start: int, keys_K: Tensor, change_K: Tensor, base: int) -> None:
    """Add base + Σ change · bit mod 2³² to int32; keys and changes are int64 on its device."""
    programs, first, skip = _span(total_D, start)
    with _on(total_D):
        _accumulate[(programs,)](
            total_D, keys_K, change_K, len(total_D), first, skip, base, len(keys_K), words=WORDS
        )


def project(x_D: Tensor, start: int, keys_K: Tensor) -> Tensor:
    """Return Σ x · z for each key, int64[K]."""
    programs, first, skip = _span(x_D, start)
    minus_K = torch.zeros(len(keys_K), dtype=torch.int64, device=x_D.device)
    with _on(x_D):
        _project[(programs,)](x_D, keys_K, minus_K, len(x_D), first, skip, len(keys_K), words=WORDS)
    return x_D.sum(dtype=torch.int64) - 2 * minus_K


def perturb(x_D: Tensor, start: int, keys_1: Tensor, bits: int) -> None:
    """Add z times the float32 with these bits (an int32)."""
    programs, first, skip = _span(x_D, start)
    with _on(x_D):
        _perturb[(programs,)](x_D, keys_1, len(x_D), first, skip, bits, words=WORDS)


def _span(x_D: Tensor, start: int) -> tuple[int, int, int]:
    """Return how many programs it takes, the first word, and how many of its signs to leave out."""
    first, skip = divmod(start, 64)
    return -(-(skip + len(x_D)) // (64 * WORDS)), first, skip


def _on(x_D: Tensor) -> Any:
    """Let Triton, which takes the present device, take the vector's."""
    return torch.cuda.device(x_D.device) if x_D.is_cuda else contextlib.nullcontext()
