"""Directions of ±1 that everyone regenerates from 64 bits: keys, and sums along many directions.

    z_i = 1 - 2 · bit(i mod 64) of out(⌊i / 64⌋)

where out is SplitMix64 in counter form (splitmix.py): one hash gives 64 signs, any slice is had
without what is before it, and integers give the same on every device. Random signs have the
smallest fourth moment of all directions with E[z zᵀ] = I, hence the least variance of a
simultaneous-perturbation estimate (Spall, "Multivariate stochastic approximation using a
simultaneous perturbation gradient approximation", 1992; Malladi et al., "Fine-tuning language
models with just forward passes", 2023). Sums along them, Σ_k a_k · z(key_k) and Σ_i x_i · z_i, are
of integers: the order of seeds, batches and threads leaves no trace.

D: parameters, K: keys, G: keys taken at once, N: sums, W: words of 64 signs.
"""

import hashlib
import importlib
import math
import struct
import warnings
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shoal.compression import parallel, splitmix

PERTURBATION, RANDOM_K, ROUNDING, PROJECTION, SAMPLING, SUBSAMPLE = range(6)
"""Domains: what a key is for. Keys of different domains share nothing."""
COMMON = bytes(32)
"""The author in keys of directions that all peers have in common."""
Integers = Sequence[int] | Tensor
"""Keys as numbers below 2⁶⁴, or as an int64 tensor with the same bits; coefficients of int32."""

_SLAB = 1 << 18
"""Signs that torch makes at a time on the CPU: what a core's cache holds …"""
_SLAB_CUDA = 1 << 22
"""… and elsewhere: enough for every multiprocessor."""
_PART = 1 << 22
"""Elements that are rounded to integers at a time."""
_HIGH = -(2**31)


def key(run: bytes, author: bytes, turn: int, sample: int, *, domain: int = PERTURBATION) -> int:
    """Return the key, below 2⁶⁴, of one direction: the 8 bytes of a BLAKE2b of who drew it, when.

    `run`: the run's id, of which the first 16 bytes count; `author`: a public key of 32 bytes, or
    COMMON. Raise ValueError for anything that does not fit.
    """
    if len(run) < 16 or len(author) != 32:
        raise ValueError(
            f"a key wants 16 bytes or more of run id and 32 of author, not {len(run)} and "
            f"{len(author)}"
        )
    if not all(0 <= n < 2**64 for n in (domain, turn, sample)):
        raise ValueError(f"domain {domain}, turn {turn} and sample {sample} are to be in [0, 2⁶⁴)")
    said = struct.pack("<Q16s32sQQ", domain, run[:16], author, turn, sample)
    digest = hashlib.blake2b(said, digest_size=8, person=b"shoal-seed").digest()
    return int.from_bytes(digest, "little")


def signs(key: int, size: int, *, start: int = 0, device: torch.device | str = "cpu") -> Tensor:
    """Return z_start … z_(start + size - 1), int8 of ±1."""
    if start < 0:
        raise ValueError(f"start {start} is below zero")
    found_D = torch.empty(size, dtype=torch.int8, device=device)
    keys_1 = _tensor(_unsigned([key]), device)
    for begin, part_D in _slabs(found_D):
        part_D.copy_(_masks(keys_1, start + begin, len(part_D))[0].bitwise_or_(1))
    return found_D


def accumulate(total_D: Tensor, keys: Integers, coefficients: Integers, *, start: int = 0) -> None:
    """Add Σ_k a_k · z(key_k) to contiguous int32 in place, modulo 2³².

    One pass over memory for all seeds. `total_D` holds the elements from `start` of the directions;
    coefficients are any int32. The same seed twice counts twice. Raise ValueError, and add nothing,
    for another type or shape, unequal numbers of keys and coefficients, or a number out of range.
    """
    _check(total_D, torch.int32, start)
    keys_K, a_K = _unsigned(keys), _coefficients(coefficients)
    if len(keys_K) != len(a_K):
        raise ValueError(f"{len(keys_K)} keys, but {len(a_K)} coefficients")
    if loops := _loops(total_D, len(keys_K)):
        # Σ a·z = Σ a - 2 Σ a·bit: a loop adds where a bit is set, and nothing elsewhere.
        base = a_K.sum().astype(np.int32)
        change_K = (-2 * a_K).astype(np.int32)
        parallel.ranges(
            loops.accumulate, len(total_D), total_D.numpy(), start, keys_K, change_K, base
        )
        return
    if fused := _fused(total_D, len(keys_K)):
        there_K, twice_K = (_tensor(n, total_D.device) for n in (keys_K, -2 * a_K))
        fused.accumulate(total_D, start, there_K, twice_K, int(a_K.sum().astype(np.int32)))
    else:
        _accumulate(total_D, keys_K, a_K, start)


def accumulate_each(
    total_D: Tensor,
    keys: Integers,
    coefficients: Integers,
    counts: Sequence[int],
    lanes: tuple[int, int],
    *,
    start: int = 0,
    place: int = 0,
) -> Tensor:
    """Do as `accumulate`, and say what was added sum by sum; return int64[N, 2] on the CPU.

    The first `counts[0]` keys are of one sum, the next `counts[1]` of another … Of each, as int32
    elements v (modulo 2³²), it is Σ_i v_i · r(place + i) modulo 2⁶⁴, where r(i) = out(i) | 1 of
    SplitMix64 under each of the keys `lanes`: the fingerprint of a vector that begins at `place` of
    the model. Still one pass over memory. Raise ValueError as `accumulate`.
    """
    _check(total_D, torch.int32, start)
    keys_K, a_K = _unsigned(keys), _coefficients(coefficients)
    if not len(keys_K) == len(a_K) == sum(counts):
        raise ValueError(f"{len(keys_K)} keys, {len(a_K)} coefficients, and {sum(counts)} wanted")
    ends_N = np.cumsum(np.array(counts, np.int64))
    if loops := _loops(total_D, len(keys_K)):
        before_K = np.concatenate(([0], np.cumsum(a_K)))
        base_N = np.diff(before_K[ends_N], prepend=0).astype(np.int32)
        change_K = (-2 * a_K).astype(np.int32)
        sums = (keys_K, change_K, base_N, ends_N)
        hashes = (np.uint64(lanes[0]), np.uint64(lanes[1]))
        parts = parallel.ranges(
            loops.each, len(total_D), total_D.numpy(), start, *sums, place, *hashes
        )
        return torch.from_numpy(np.sum(parts, axis=0, dtype=np.uint64).view(np.int64))
    found_N2 = torch.zeros(len(ends_N), 2, dtype=torch.int64, device=total_D.device)
    for begin, part_D in _slabs(total_D):
        index_D = torch.arange(len(part_D), dtype=torch.int64, device=part_D.device)
        odd_2D = [splitmix.at(key, index_D + (place + begin)) | 1 for key in lanes]
        for n, end in enumerate(ends_N.tolist()):
            some = slice(end - counts[n], end)
            sum_D = torch.zeros_like(part_D)
            accumulate(sum_D, _tensor(keys_K[some], "cpu"), a_K[some].tolist(), start=start + begin)
            part_D += sum_D
            found_N2[n] += torch.stack([(sum_D * odd_D).sum() for odd_D in odd_2D])
    return found_N2.cpu()


def project(x_D: Tensor, keys: Integers, *, start: int = 0) -> Tensor:
    """Return Σ_i x_i · z_i(key_k) for every key, int64[K] on the device of x; exact.

    `x_D` is contiguous int32, the elements from `start` of a longer vector, up to 2³¹ of them. One
    pass over x for all seeds. Raise ValueError as `accumulate`.
    """
    _check(x_D, torch.int32, start)
    keys_K = _unsigned(keys)
    if loops := _loops(x_D, len(keys_K)):
        parts = parallel.ranges(loops.project, len(x_D), x_D.numpy(), start, keys_K)
        return torch.from_numpy(np.sum(parts, axis=0))
    if fused := _fused(x_D, len(keys_K)):
        found_K: Tensor = fused.project(x_D, start, _tensor(keys_K, x_D.device))
        return found_K
    return _project(x_D, keys_K, start)


def along(x_D: Tensor, keys: Integers, *, start: int = 0) -> Tensor:
    """Return Σ_i x_i · z_i(key_k) of float32 for every key, float64[K] on the CPU.

    The same on every device and in any number of threads, since sums of integers are exact
    (`exponent`, `whole`). One pass over x for all seeds, without a copy of it.
    """
    total_K = torch.zeros(len(keys), dtype=torch.int64)
    power = exponent(x_D)
    for begin in range(0, len(x_D), _PART):
        part_D = whole(x_D[begin : begin + _PART], power)
        total_K += project(part_D, keys, start=start + begin).cpu()
    return total_K.to(torch.float64) * 2.0**-power


def exponent(x_D: Tensor) -> int:
    """Return e, at most 24, such that |x| · 2^e < 2³⁰; refuse NaN and infinity by ValueError."""
    low, high = torch.aminmax(x_D)  # NaN wins both
    largest = max(-float(low), float(high))
    if not math.isfinite(largest):
        raise ValueError("cannot encode a vector with NaN or infinite elements")
    return min(30 - math.frexp(largest)[1], 24)


def whole(x_D: Tensor, exponent: int) -> Tensor:
    """Return the integers nearest to x · 2^exponent, int32."""
    return (x_D * 2.0**exponent).round_().to(torch.int32)


def perturb(x_D: Tensor, key: int, scale: float, *, start: int = 0) -> None:
    """Add scale · z to contiguous float32 in place: one rounding an element, on every device alike.

    `scale` is rounded to float32 first. There is no inverse: (x + s) - s has lost the bits of x
    that x + s had no room for, and after thousands of steps a peer would train another model than
    the one that all hold. So whoever perturbs converts the ledger's integers again afterwards
    (q · n, exact), which costs the same pass over memory and no copy of the model. Raise ValueError
    for another type or shape, or a scale that float32 does not hold.
    """
    x_D = x_D.detach()  # a model's own memory is meant, whatever autograd thinks of it
    _check(x_D, torch.float32, start)
    keys_1 = _unsigned([key])
    with np.errstate(over="ignore"):
        step = np.float32(scale)
    if not np.isfinite(step):
        raise ValueError(f"scale {scale} is no finite float32")
    if loops := _loops(x_D, 1):
        parallel.ranges(loops.perturb, len(x_D), x_D.numpy(), start, keys_1[0], step)
        return
    bits = int(step.view(np.int32))
    if fused := _fused(x_D, 1):
        fused.perturb(x_D, start, _tensor(keys_1, x_D.device), bits)
    else:
        _perturb(x_D, keys_1, bits, start)


# ---------------------------------------------------------------- torch


def _accumulate(
    total_D: Tensor, keys_K: NDArray[np.uint64], a_K: NDArray[np.int64], start: int
) -> None:
    there_K = _tensor(keys_K, total_D.device)
    for begin, part_D, some in _tiles(total_D, len(keys_K)):
        z_GD = _masks(there_K[some], start + begin, len(part_D))
        for z_D, a in zip(z_GD.bitwise_or_(1), a_K[some].tolist(), strict=True):
            part_D.add_(z_D, alpha=a)  # int32 wraps


def _project(x_D: Tensor, keys_K: NDArray[np.uint64], start: int) -> Tensor:
    found_K = torch.zeros(len(keys_K), dtype=torch.int64, device=x_D.device)
    there_K = _tensor(keys_K, x_D.device)
    for begin, part_D, some in _tiles(x_D, len(keys_K)):
        minus_GD = _masks(there_K[some], start + begin, len(part_D))
        minus_GD = minus_GD.bitwise_and_(part_D)  # Σ x·z = Σ x - 2 Σ x·bit
        found_K[some] += part_D.sum(dtype=torch.int64) - 2 * minus_GD.sum(1, dtype=torch.int64)
    return found_K


def _perturb(x_D: Tensor, keys_1: NDArray[np.uint64], bits: int, start: int) -> None:
    there_1 = _tensor(keys_1, x_D.device)
    for begin, part_D in _slabs(x_D):
        minus_D = _masks(there_1, start + begin, len(part_D))[0]
        # ±scale by its sign bit, so that adding is the only operation on floats.
        part_D += minus_D.bitwise_and_(_HIGH).bitwise_xor_(bits).view(torch.float32)


def _masks(keys_G: Tensor, first: int, size: int) -> Tensor:
    """Return int32[G, size]: -1 where z is -1, else 0, for `size` elements from `first`."""
    low, high = first // 64, -(-(first + size) // 64)
    count_W = torch.arange(low + 1, high + 1, dtype=torch.int64, device=keys_G.device)
    words_GW = splitmix.mix(count_W * splitmix.STEP + keys_G[:, None])
    halves_G2W = words_GW.view(torch.int32)  # the lower half first
    to_top = torch.arange(31, -1, -1, dtype=torch.int32, device=keys_G.device)
    bits = torch.bitwise_left_shift(halves_G2W[:, :, None], to_top)
    skip = first - 64 * low
    # The shift to the right copies what is the sign bit now.
    return bits.bitwise_right_shift_(31).reshape(len(keys_G), -1)[:, skip : skip + size]


def _slabs(x_D: Tensor) -> Iterator[tuple[int, Tensor]]:
    slab = _slab(x_D)
    for begin in range(0, len(x_D), slab):
        yield begin, x_D[begin : begin + slab]


def _tiles(x_D: Tensor, keys: int) -> Iterator[tuple[int, Tensor, slice]]:
    """Yield parts of a vector with each group of keys whose signs there are made at once."""
    for begin, part_D in _slabs(x_D):
        group = _slab(x_D) // len(part_D)
        for first in range(0, keys, group):
            yield begin, part_D, slice(first, first + group)


def _slab(x_D: Tensor) -> int:
    return _SLAB if x_D.device.type == "cpu" else _SLAB_CUDA


# ---------------------------------------------------------------- arguments


def _loops(x_D: Tensor, keys: int) -> Any:
    """Return the compiled loops if they serve so many directions along this vector, else None."""
    if not keys or parallel.kernels(len(x_D) * keys, x_D) is None:
        return None
    return importlib.import_module("shoal.compression.kernels_signs")


def _fused(x_D: Tensor, keys: int) -> Any:
    """Return Triton's kernels for a vector on a device that has them, else None."""
    return _triton(x_D.device) if keys and x_D.device.type == "cuda" else None


@cache
def _triton(device: torch.device) -> Any:
    """Return the kernels if Triton is here, and gives on this device what torch gives there."""
    try:
        kernels = importlib.import_module("shoal.compression.kernels_triton")
    except ImportError:  # it comes with torch for CUDA on Linux
        return None
    try:
        agrees, why = _agrees(kernels, device), "they differ from torch"
    except Exception as error:  # it compiles for this device with whatever compiler is here
        agrees, why = False, f"{type(error).__name__}: {error}"
    if not agrees:
        warnings.warn(f"no fused kernels on {device}, slower ones serve: {why}", stacklevel=2)
    return kernels if agrees else None


def _agrees(kernels: Any, device: torch.device) -> bool:
    """Try them where tiles, words and directions are more than one, and cut at both ends."""
    start, bits = 2**40 + 37, int(np.float32(0.3).view(np.int32))
    keys_K = np.array([5, 2**63, 2**64 - 1], np.uint64)
    a_K = np.array([1, -(2**31), 2**31 - 1], np.int64)
    there_K = _tensor(keys_K, device)
    x_D = splitmix.words(1, 10_000, device=device).to(torch.int32)
    sums_D, floats_D = x_D.clone(), x_D.to(torch.float32)
    fused_D, moved_D = sums_D.clone(), floats_D.clone()
    _accumulate(sums_D, keys_K, a_K, start)
    kernels.accumulate(fused_D, start, there_K, _tensor(-2 * a_K, device), int(a_K.sum()))
    _perturb(floats_D, keys_K[:1], bits, start)
    kernels.perturb(moved_D, start, there_K[:1], bits)
    found_K = kernels.project(x_D, start, there_K)
    return (
        torch.equal(sums_D, fused_D)
        and torch.equal(floats_D, moved_D)
        and torch.equal(_project(x_D, keys_K, start), found_K)
    )


def _check(x_D: Tensor, dtype: torch.dtype, start: int) -> None:
    if x_D.dtype != dtype or x_D.ndim != 1 or not x_D.is_contiguous():
        name = str(dtype).removeprefix("torch.")
        raise ValueError(f"wanted a contiguous vector of {name}, got {x_D.dtype}{[*x_D.shape]}")
    if start < 0:
        raise ValueError(f"start {start} is below zero")


def _unsigned(keys: Integers) -> NDArray[np.uint64]:
    if isinstance(keys, Tensor):
        if keys.dtype != torch.int64:
            raise ValueError(f"keys are int64, not {keys.dtype}")
        return keys.cpu().contiguous().numpy().view(np.uint64)
    if not all(0 <= k < 2**64 for k in keys):
        raise ValueError("a key is not in [0, 2⁶⁴)")
    return np.array(keys, np.uint64)


def _coefficients(coefficients: Integers) -> NDArray[np.int64]:
    if isinstance(coefficients, Tensor):
        if coefficients.dtype.is_floating_point:
            raise ValueError(f"coefficients are integers, not {coefficients.dtype}")
        coefficients = coefficients.tolist()
    if not all(-(2**31) <= a < 2**31 for a in coefficients):
        raise ValueError("a coefficient is not an int32")
    return np.array(coefficients, np.int64)


def _tensor(keys_G: NDArray[np.uint64] | NDArray[np.int64], device: torch.device | str) -> Tensor:
    if len(keys_G) == 1:  # as an argument of a kernel: a copy would wait for what is computed there
        return torch.full((1,), int(keys_G.view(np.int64)[0]), dtype=torch.int64, device=device)
    return torch.from_numpy(keys_G.view(np.int64)).to(device)
