"""The model as an exact integer sum: initial + Σ contributions mod 2³², in units of q (design 3.1).

Addition commutes and wraps, so any order of the same updates gives the same tensor and the same
fingerprint on every device. Under a turn rule it is the contributions of turns that are added, each
a function of the set of its updates; what changes when one comes or goes is a difference of two.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shoal.compression import parallel, perturbation
from shoal.compression.codec import (
    Combination,
    Contribution,
    Decoded,
    sum_of_squares,
    written,
)
from shoal.training import fingerprint
from shoal.training.fingerprint import CHUNK, Fingerprint, Lanes
from shoal.training.turn_rule import TurnRule
from shoal.training.turns import Recall, Turns

HALF = 1 << 30
"""Half the range of int32: values beyond it raise the divergence alarm."""

Key = tuple[bytes, int, int]
"""Peer, log and number of an update."""


class Ledger:
    """The integers, their running fingerprint, and the updates of turns that must be kept."""

    def __init__(self, initial_D: Tensor, rule: TurnRule, recall: Recall | None = None) -> None:
        """Start from a model without updates. Without `recall` large updates are kept as well."""
        self.model = initial_D.clone()
        self.rule = rule
        self._lanes = Fingerprint(len(initial_D), initial_D.device)
        self._turns = Turns(rule, recall)
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

    def add(self, key: Key, turn: int, update: Contribution) -> Lanes:
        """Take in an update; return the fingerprint of what it contributed.

        Under a turn rule: by how much the model's fingerprint moved.
        """
        if self.rule.alone:
            return self._change(written(update, self.model.device), 1)
        return self.take_in(turn, {key: update})

    def subtract(self, key: Key, turn: int, update: Contribution) -> Lanes:
        """Take an update out again; inverse of `add`."""
        if self.rule.alone:
            return self._change(written(update, self.model.device), -1)
        return self.take_out(turn, [key])

    def add_many(self, updates: Sequence[Combination], sign: int = 1) -> list[Lanes]:
        """Take in combinations, or out with sign -1; return the fingerprint of each contribution.

        As one after the other, but in two passes over memory for all of them. For runs without a
        turn rule.
        """
        found: list[Lanes] = [(0, 0)] * len(updates)
        for batch in _batches(updates):
            some = [updates[place] for place in batch]
            if len(some) == 1:
                found[batch[0]] = self._change(written(some[0], self.model.device), sign)
                continue
            first = some[0]
            total_D = parallel.zeros(first.size, torch.int32, self.model.device)
            lanes_N2 = perturbation.accumulate_each(
                total_D,
                torch.cat([update.keys for update in some]),
                torch.cat([update.coefficients for update in some]),
                [len(update.keys) for update in some],
                fingerprint.KEYS,
                place=first.offset,
            )
            self._change(Decoded(first.size, total_D, offset=first.offset), sign)
            for place, lanes in zip(batch, (sign * lanes_N2).tolist(), strict=True):
                found[place] = lanes[0] & fingerprint.MASK, lanes[1] & fingerprint.MASK
        return found

    def take_in(self, turn: int, updates: Mapping[Key, Contribution]) -> Lanes:
        """Take in updates of one turn at once; those that are in already change nothing.

        Return by how much the fingerprint moved. For runs with a turn rule.
        """
        return self._move_by(self._turns.take_in(turn, updates))

    def take_out(self, turn: int, keys: Iterable[Key]) -> Lanes:
        """Take updates of one turn out again; inverse of `take_in`."""
        return self._move_by(self._turns.take_out(turn, keys))

    def recalls(self, turn: int, key: Key) -> bool:
        """Say whether this update is in and may have to be recalled."""
        return self._turns.recalls(turn, key)

    def floats(self, quantum_bits: int) -> Tensor:
        """Return q · model as float32, rounded to nearest even: the same everywhere."""
        return self.model.to(torch.float32).mul_(2.0**-quantum_bits)

    def to_bytes(self) -> bytes:
        """Return the integers, little-endian."""
        return self.model.cpu().numpy().astype("<i4").tobytes()

    def restore(self, data: bytes) -> None:
        """Set the integers; the fingerprint starts from them.

        Under a turn rule they must be those of a model without updates: of a sum nobody can tell
        what was in which turn.
        """
        self.model.copy_(from_bytes(data, self.size))
        self._turns = self._turns.emptied()
        self._running = self.recompute()
        self.out_of_range = _beyond(self.model)

    def sum_of_squares(self) -> int:
        """Return Σ model² exactly."""
        return sum_of_squares(self.model)

    def _move_by(self, change: Contribution | None) -> Lanes:
        """Add what a turn's contribution changed by; return by how much the fingerprint moved."""
        before = self._running
        if change is not None:
            self._change(written(change, self.model.device), 1)
        return fingerprint.add(self._running, fingerprint.negate(before))

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


def _batches(updates: Sequence[Combination]) -> list[list[int]]:
    """Return the places of updates of one fragment each, whose sum stays within int32."""
    batches: dict[tuple[int, int], list[list[int]]] = {}
    reach: dict[tuple[int, int], int] = {}
    for place, update in enumerate(updates):
        fragment = update.offset, update.size
        own = int(update.coefficients.abs().sum())
        if fragment not in batches or reach[fragment] + own >= 1 << 31:
            batches.setdefault(fragment, []).append([])
            reach[fragment] = 0
        batches[fragment][-1].append(place)
        reach[fragment] += own
    return [batch for some in batches.values() for batch in some]


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
