"""Exact arithmetic on contributions: sums, differences, parts. Modulo 2³², like the ledger's own.

What is in one form (entries touched, or a combination of directions) stays in it, so that a sum
costs what its terms touch. Floats are nowhere.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shoal.compression.codec import Combination, Contribution, Decoded, written

BITS = 30
"""Fractions are in units of 2^-30, so that a product with an int32 fits 64 bits."""
FULL = 4
"""One in so many entries of a vector is so much that the others may be there as well."""
_SLAB = 1 << 20
"""Elements that are scaled at a time, so that no temporary of 64 bits is as large as the model."""


def added(parts: Sequence[Contribution]) -> Contribution | None:
    """Return the sum; None for no parts. All are of one fragment."""
    if len(parts) <= 1:
        return parts[0] if parts else None
    if combinations := [part for part in parts if isinstance(part, Combination)]:
        if len(combinations) == len(parts):
            return _combined(combinations)
        device = next(part.values.device for part in parts if isinstance(part, Decoded))
        parts = [written(part, device) for part in parts]
    return _entries([part for part in parts if isinstance(part, Decoded)])


def difference(new: Contribution | None, old: Contribution | None) -> Contribution | None:
    """Return new - old, where None is zero; None when they are surely equal."""
    if new is old:
        return None
    if old is None:
        return new
    negative = negated(old)
    if new is None:
        return negative
    change = added([new, negative])
    if isinstance(change, Combination):
        moved = change.coefficients != 0
        if not bool(moved.any()):
            return None
        change = combination(change, change.keys[moved], change.coefficients[moved])
    return change


def negated(part: Contribution) -> Contribution:
    """Return -part."""
    if isinstance(part, Combination):
        return combination(part, part.keys, -part.coefficients)
    return replace(part, values=-part.values)  # int32 wraps


def scaled(part: Contribution, fraction: int) -> Contribution:
    """Return part · fraction / 2^30, each number rounded toward zero; 0 ≤ fraction ≤ 2^30."""
    return rescaled(part, fraction, 0)


def rescaled(part: Contribution, new: int, old: int) -> Contribution:
    """Return what `scaled` makes of it by one fraction, less what it makes by another."""
    if isinstance(part, Combination):
        coefficients_K = _scaled(part.coefficients, new) - _scaled(part.coefficients, old)
        return combination(part, part.keys, coefficients_K)
    values = torch.empty_like(part.values)
    for start in range(0, len(values), _SLAB):
        slab = slice(start, start + _SLAB)
        wide = part.values[slab].to(torch.int64)
        values[slab] = (_scaled(wide, new) - _scaled(wide, old)).to(torch.int32)  # wraps
    return replace(part, values=values)


class Adding:
    """A sum of parts that come one after another; entries are let go when they fill a vector."""

    def __init__(self) -> None:
        self._parts: list[Contribution] = []
        self._whole: Decoded | None = None
        """What was added up."""
        self._waiting = 0
        """Entries of parts."""

    def add(self, part: Contribution) -> None:
        """Take in a part."""
        self._parts.append(part)
        if isinstance(part, Combination):  # it is small
            return
        self._waiting += len(part.values)
        if self._waiting * FULL < part.size:
            return
        if self._whole is None:
            zeros_D = torch.zeros(part.size, dtype=torch.int32, device=part.values.device)
            self._whole = replace(part, values=zeros_D, indices=None)
        _add_into(self._whole.values, [one for one in self._parts if isinstance(one, Decoded)])
        self._parts = [one for one in self._parts if isinstance(one, Combination)]
        self._waiting = 0

    def sum(self) -> Contribution | None:
        """Return the sum; None for no parts."""
        return added(self._parts if self._whole is None else [self._whole, *self._parts])


def combination(like: Combination, keys_K: Tensor, coefficients_K: Tensor) -> Combination:
    """Return the combination with these int64 coefficients modulo 2³², of the same fragment."""
    wrapped_K = ((coefficients_K + (1 << 31)) & 0xFFFFFFFF) - (1 << 31)
    return Combination(like.size, keys_K, wrapped_K, like.offset)


def _scaled(numbers: Tensor, fraction: int) -> Tensor:
    if fraction in (0, 1 << BITS):
        return numbers * (fraction >> BITS)
    return torch.div(numbers * fraction, 1 << BITS, rounding_mode="trunc")


def _combined(parts: Sequence[Combination]) -> Combination:
    keys = torch.cat([part.keys for part in parts])
    keys_K, place = torch.unique(keys, return_inverse=True)
    sums_K = torch.zeros(len(keys_K), dtype=torch.int64)
    sums_K.index_add_(0, place, torch.cat([part.coefficients for part in parts]))
    return combination(parts[0], keys_K, sums_K)


def _entries(parts: Sequence[Decoded]) -> Decoded:
    """Add element by element; int32 wraps."""
    first = parts[0]
    if all(part.indices is not None for part in parts):
        indices = torch.cat([part.indices for part in parts if part.indices is not None])
        places_T, where = torch.unique(indices, return_inverse=True)
        sums_T = torch.zeros(len(places_T), dtype=torch.int32, device=first.values.device)
        sums_T.index_add_(0, where, torch.cat([part.values for part in parts]))
        return replace(first, values=sums_T, indices=places_T)
    total_D = torch.zeros(first.size, dtype=torch.int32, device=first.values.device)
    _add_into(total_D, parts)
    return replace(first, values=total_D, indices=None)


def _add_into(total_D: Tensor, parts: Sequence[Decoded]) -> None:
    for part in parts:
        if part.indices is None:
            total_D += part.values
        else:
            total_D[part.indices] += part.values  # no index is there twice


def table(parts: Sequence[Combination], *, least: int = 0) -> tuple[Tensor, NDArray[np.int64]]:
    """Return all keys, sorted, and int64[N, K]: what each part says along each, zero if nothing.

    N is `least` or more: rows that no part has are zero.
    """
    keys_K = torch.unique(torch.cat([part.keys for part in parts]))
    said_NK = np.zeros((max(len(parts), least), len(keys_K)), np.int64)
    for row_K, part in zip(said_NK, parts, strict=False):
        row_K[torch.searchsorted(keys_K, part.keys).numpy()] = part.coefficients.numpy()
    return keys_K, said_NK
