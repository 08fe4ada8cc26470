"""The model as an exact integer sum: initial + Σ contributions mod 2³², in units of q (design 3.1).

Addition commutes and wraps, so any order of the same updates gives the same tensor and the same
fingerprint on every device.
"""

from collections.abc import Hashable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shoal.compression import parallel
from shoal.compression.codec import Contribution, Decoded, sum_of_squares, written
from shoal.training import fingerprint
from shoal.training.fingerprint import CHUNK, Fingerprint, Lanes
from shoal.training.rules import TurnRule

HALF = 1 << 30
"""Half the range of int32: values beyond it raise the divergence alarm."""


class Ledger:
    """The integers, their running fingerprint, and the updates of turns that must be kept."""

    def __init__(self, initial_D: Tensor, rule: TurnRule) -> None:
        self.model = initial_D.clone()
        self._rule = rule
        self._lanes = Fingerprint(len(initial_D), initial_D.device)
        self._turns: dict[int, dict[Hashable, Decoded]] = {}
        self._running = self.recompute()
        self.out_of_range = _beyond(self.model)
        """How many values have left half the range."""

    @property
    def size(self) -> int:
        """Return the number of parameters."""
        return len(self.model)

    def fingerprint(self) -> Lanes:
        """Return the running fingerprint."""
        return self._running

    def lanes_of(self, values_D: Tensor) -> Lanes:
        """Return the fingerprint that another tensor of this size would have."""
        return self._lanes.of(values_D.to(self.model.device))

    def recompute(self) -> Lanes:
        """Return the fingerprint of the tensor as it is now: a flipped bit in memory shows."""
        return self._lanes.of(self.model)

    def add(self, key: Hashable, turn: int, update: Contribution) -> Lanes:
        """Take in an update; return the fingerprint of what it contributed."""
        members = {} if self._rule.alone else self._turns.setdefault(turn, {})
        if key in members:
            return 0, 0
        update = written(update, self.model.device)
        change = self._rule.joined(tuple(members.values()), update)
        if not self._rule.alone:
            members[key] = update
        return self._change(change, 1)

    def subtract(self, key: Hashable, turn: int, update: Contribution) -> Lanes:
        """Take an update out again; inverse of `add`."""
        members = {} if self._rule.alone else self._turns.setdefault(turn, {})
        if not self._rule.alone and members.pop(key, None) is None:
            return 0, 0
        update = written(update, self.model.device)
        return self._change(self._rule.joined(tuple(members.values()), update), -1)

    def floats(self, quantum_bits: int) -> Tensor:
        """Return q · model as float32, rounded to nearest even: the same everywhere."""
        return self.model.to(torch.float32).mul_(2.0**-quantum_bits)

    def to_bytes(self) -> bytes:
        """Return the integers, little-endian."""
        return self.model.cpu().numpy().astype("<i4").tobytes()

    def restore(self, data: bytes) -> None:
        """Set the integers; the fingerprint starts from them."""
        self.model.copy_(from_bytes(data, self.size))
        self._turns.clear()
        self._running = self.recompute()
        self.out_of_range = _beyond(self.model)

    def sum_of_squares(self) -> int:
        """Return Σ model² exactly."""
        return sum_of_squares(self.model)

    def _change(self, update: Decoded, sign: int) -> Lanes:
        """Add or subtract in place; return the fingerprint of what was added."""
        touched = len(update.values)
        if loops := parallel.kernels(touched, self.model, update.values):
            delta, more = self._change_compiled(loops, update, sign)
        elif update.indices is None:
            delta, more = (0, 0), (0, 0)
            for start in range(0, touched, CHUNK):
                values = update.values[start : start + CHUNK]
                place = slice(update.offset + start, update.offset + start + len(values))
                wrapped = self._move(place, values, sign)
                delta = fingerprint.add(delta, self._lanes.of(values, place.start))
                more = fingerprint.add(more, self._lanes.of(wrapped, place.start))
        else:
            places = update.indices + update.offset
            wrapped = self._move(places, update.values, sign)
            delta = self._lanes.at(places, update.values)
            more = self._lanes.at(places, wrapped)
        if sign < 0:
            delta = fingerprint.negate(delta)
        self._running = fingerprint.add(self._running, fingerprint.add(delta, more))
        return delta

    def _move(self, places: slice | Tensor, values: Tensor, sign: int) -> Tensor:
        """Change the model; return by how much more than asked for it moved, where it wrapped."""
        old = self.model[places].clone()
        new = old + values if sign > 0 else old - values  # int32 wraps: mod 2^32
        self.model[places] = new
        self.out_of_range += _beyond(new) - _beyond(old)
        return new.to(torch.int64) - old - sign * values.to(torch.int64)

    def _change_compiled(self, loops: Any, update: Decoded, sign: int) -> tuple[Lanes, Lanes]:
        """Do the same in one pass."""
        values, keys = update.values.contiguous().numpy(), fingerprint.keys()
        model, touched = self.model.numpy(), len(values)
        if update.indices is None:
            part = model[update.offset : update.offset + touched]
            found = parallel.ranges(
                loops.dense_add, touched, part, values, sign, update.offset, *keys
            )
        else:
            indices = update.indices.contiguous().numpy()
            found = parallel.ranges(
                loops.sparse_add, touched, model, indices, values, sign, update.offset, *keys
            )
        sums = [sum(int(row[i]) for row in found) for i in range(5)]
        self.out_of_range += sums[4]
        delta = sums[0] & fingerprint.MASK, sums[1] & fingerprint.MASK
        if sign < 0:  # as the fingerprint of the values, like the loop in torch
            delta = fingerprint.negate(delta)
        return delta, (sums[2] & fingerprint.MASK, sums[3] & fingerprint.MASK)


def from_bytes(data: bytes, size: int) -> Tensor:
    """Return `size` integers from little-endian bytes; inverse of `Ledger.to_bytes`."""
    if len(data) != 4 * size:
        raise ValueError(f"{len(data)} bytes of model where {4 * size} were expected")
    return torch.from_numpy(np.frombuffer(data, "<i4").astype(np.int32))


def from_floats(x_D: Tensor, quantum_bits: int) -> Tensor:
    """Return the integers nearest to x / q (ties to even), or raise ValueError."""
    scaled = x_D.to(torch.float64) * 2.0**quantum_bits
    if not bool((scaled.abs() < HALF).all()):
        most = 2 ** (30 - quantum_bits)
        raise ValueError(
            f"an initial weight is not below {most} in magnitude; lower exchange.quantum_bits"
        )
    return scaled.round().to(torch.int32)


def _beyond(values: Tensor) -> int:
    count = 0
    for start in range(0, len(values), CHUNK):
        part = values[start : start + CHUNK]
        count += int(((part >= HALF) | (part < -HALF)).sum())
    return count
