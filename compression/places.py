"""Which of many places are kept: increasing numbers, on the wire as Rice-coded gaps.

The Rice parameter follows from how many are kept of how many, in integers alone, so that no
payload carries it and no logarithm of a library decides how bytes are read. It is

    b = max(0, 1 + ⌊log2(ln g / ln(1 - p))⌋),   g = (√5 - 1)/2,   p = kept / size

which is best for geometric gaps (Golomb 1966; Kiely, "Selecting the Golomb parameter in Rice
coding", 2004): b ≥ j exactly when (1 - p)^(2^(j-1)) ≥ g. Rice codes are the last of a payload.
"""

import math

import torch
from torch import Tensor

from shoal.compression import bits, entropy
from shoal.compression.codec import PayloadError


def _thresholds() -> list[int]:
    """Return 2⁶⁴ · g^(1/2^(j-1)) for j = 1, 2, …, rounded down."""
    found = [(math.isqrt(5 << 128) - (1 << 64)) >> 1]
    while len(found) < 32:
        found.append(math.isqrt(found[-1] << 64))
    return found


_LEAST_GONE = _thresholds()


def parameter(count: int, size: int) -> int:
    """Return the Rice parameter for `count` places kept of `size`."""
    gone = (size - count) << 64
    return sum(1 for least in _LEAST_GONE if count and gone >= least * size)


def write(place_K: Tensor, size: int) -> Tensor:
    """Return the stream (uint8) of increasing int64 places below `size`."""
    gaps_K = place_K.diff(prepend=place_K.new_tensor([-1])) - 1
    return entropy.rice_encode(gaps_K, parameter(len(place_K), size))


def read(reader: bits.Reader, count: int, size: int) -> Tensor:
    """Return `count` increasing places below `size`: all that is left of the payload."""
    if count > size:
        raise PayloadError(f"{count} places kept of {size}")
    gaps_K = entropy.rice_decode(reader, count, parameter(count, size), size - count)
    return torch.cumsum(gaps_K + 1, 0) - 1


def most_bytes(least: int, most: int, size: int) -> int:
    """Return the most bytes of any number of places from `least` to `most` below `size`."""
    # With one parameter b more places take more; so only the largest number for each b counts.
    largest = [size - -(-bound * size >> 64) for bound in _LEAST_GONE]
    tried = {most, *(count for count in largest if least <= count < most)}
    return max(entropy.rice_bound(n, parameter(n, size), size - n) for n in tried)
