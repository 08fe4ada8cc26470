"""A model larger than its device: weights stream from the host, unit by unit, as a pass needs them.

After ZO2 (Wang et al., "ZO2: scalable zeroth-order fine-tuning for extremely large language models
with limited GPU memory", 2025, arXiv 2503.12668): the forwards at θ + ε·z and θ - ε·z go through
the model together, so that each unit is uploaded once for both, and the next one travels while this
one computes. Simpler than there: the ledger on the host is the only model, in integers, and z is
had for any range. Nothing is ever written back, so that neither an update has to be put off until
the next upload nor a generator's states kept; a unit is converted and perturbed on arrival and
forgotten after use.

    unit's forward begins   wait for its bytes → weights on this side of θ; fetch the next unit
    unit's forward ends     forget the weights; if the other side is behind, let it run

Any model and any task work as they are: hooks of modules say when a unit is needed, and each side
is an ordinary call of `task.loss` in a thread of its own (`relay.py`). A weight that is used while
its unit is away (`linear(x, self.embedding.weight)`) is noticed, and stays from then on. But
modules must not remember in one forward what the next one is to see: the sides take turns in them.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from shoal.compression.settings import SettingError
from shoal.training.forwards import as_float
from shoal.training.generators import Chance
from shoal.training.parameters import Parameters, write_integers
from shoal.training.relay import Relay
from shoal.training.slot import Slot
from shoal.training.task import Task
from shoal.training.trap import Trap
from shoal.training.units import Unit, divide

SIDES = 2


class Offloaded:
    """Forward passes with at most `memory` bytes of weights on the device."""

    def __init__(
        self,
        task: Task,
        model: nn.Module,
        parameters: Parameters,
        quantum_bits: int,
        *,
        device: torch.device,
        memory: int,
    ) -> None:
        """Take the weights out of `model`, which is on the CPU; frozen ones are kept there.

        Raises SettingError when its largest units do not fit, and then changes nothing.
        """
        self._task, self._model, self._bits, self._device = task, model, quantum_bits, device
        self._memory = memory
        self._units = divide(model, parameters)
        moving = [unit for unit in self._units if not unit.stays]
        largest = max((unit.size for unit in moving), default=0)
        self._room = 2 * largest
        """Bytes of what is on its way."""
        self._check()
        self._owner = {id(p): unit for unit in self._units for p in unit.tensors()}
        self._blanks = {id(p): _blank(p, device) for unit in self._units for p in unit.tensors()}
        self._next = {(sides, a): b for a, b in pairwise(moving) for sides in (1, SIDES)}
        """By sides and unit: which came after it the last time; at first a guess."""
        self._slots = [Slot(largest, device) for _ in range(2)]
        self._held = self._room
        """Bytes of weights on the device."""
        self.peak = 0
        """Most bytes of weights that were on the device at once."""
        self.uploads = 0
        """How many units were brought to the device, without those that stay."""
        self._pass: _Pass | None = None
        _move_buffers(model, device)
        for unit in self._units:
            self._forget(unit)
            self._watch(unit)

    # ---- what others ask for

    def losses(
        self, integers_D: Tensor, key: int, epsilon: float, batch: Any
    ) -> tuple[float, float]:
        """Return the losses on both sides; each unit that moves is uploaded once."""
        relay = Relay()
        with self._passing(integers_D, key, (epsilon, -epsilon), relay) as now:
            found = relay.run(*(self._side(now, side, batch) for side in range(SIDES)))
            now.chances[1].go_on()
        return as_float(found[0]), as_float(found[1])

    @contextmanager
    def at(self, integers_D: Tensor) -> Iterator[nn.Module]:
        """Lend the model; every forward pass uploads every unit that moves."""
        with self._passing(integers_D, 0, (0.0,), None) as now:
            now.wear(0)
            with torch.no_grad(), Trap(self._owner, self._touched):
                yield self._model

    def value(self, tensor: Tensor) -> Tensor:
        """Return what a tensor of the model holds that is not in the ledger."""
        fixed = self._owner[id(tensor)].fixed if id(tensor) in self._owner else []
        return next((one.value for one in fixed if one.tensor is tensor), tensor)

    # ---- a pass

    @contextmanager
    def _passing(
        self, integers_D: Tensor, key: int, scales: tuple[float, ...], relay: Relay | None
    ) -> Iterator["_Pass"]:
        self._model.eval()
        now = self._pass = _Pass(integers_D, key, scales, relay, self._device)
        try:
            for unit in self._units:
                if unit.stays:
                    self._settle(now, unit)
            yield now
        finally:
            self._pass = None
            if now.last is not None:
                self._next.pop((len(scales), now.last), None)  # nothing follows
            for unit in self._units:
                self._forget(unit)
            for slot in self._slots:
                slot.release()
                slot.unit = None  # the integers may change now
            self._held = self._room

    def _side(self, now: "_Pass", side: int, batch: Any) -> Callable[[], Any]:
        def forward() -> Any:
            now.wear(side)
            with torch.no_grad(), Trap(self._owner, self._touched):
                loss = self._task.loss(self._model, batch)
            now.chances[side].put_aside()
            return loss

        return forward

    def _watch(self, unit: Unit) -> None:
        if unit.module is not None:
            unit.module.register_forward_pre_hook(lambda module, given: self._begin(unit))
            unit.module.register_forward_hook(lambda module, given, result: self._end(unit))

    def _begin(self, unit: Unit) -> None:
        if (now := self._pass) is None:
            return
        side = now.side()
        again = unit in now.inside[side]
        now.inside[side].append(unit)
        if unit.stays or again:
            return
        if side == 0 and len(now.inside[side]) == 1:
            if now.last is not None:
                self._next[len(now.scales), now.last] = unit
            now.last = unit
        slot = self._slot_of(unit) or self._fetch(now, unit)
        if slot is None:  # deep within others
            self._stay(now, unit)
            return
        self._dress(now, unit, slot)
        following = self._next.get((len(now.scales), unit))
        if following is not None and not following.stays and self._slot_of(following) is None:
            self._fetch(now, following)

    def _end(self, unit: Unit) -> None:
        if (now := self._pass) is None:
            return
        side, inside = now.side(), now.inside[now.side()]
        while inside:  # what the model caught itself may have left units within this one
            one = inside.pop()
            if not one.stays and one not in inside:
                self._undress(one)
            if one is unit:
                break
        if inside or now.relay is None or now.relay.role() is None:
            return
        now.ended[side] += 1
        if now.relay.alive(1 - side) and now.ended[1 - side] < now.ended[side]:
            now.chances[side].put_aside()
            now.relay.hand_over(side)
            now.wear(side)

    def _touched(self, tensor: Tensor) -> None:
        """See to it that a weight that is about to be used is there."""
        now = self._pass
        if now is not None and id(tensor) not in now.here:
            self._stay(now, self._owner[id(tensor)])

    # ---- bytes

    def _slot_of(self, unit: Unit) -> Slot | None:
        return next((slot for slot in self._slots if slot.unit is unit), None)

    def _fetch(self, now: "_Pass", unit: Unit) -> Slot | None:
        """Begin to upload a unit; None when what is being computed needs all the room."""
        busy = [one for inside in now.inside for one in inside if one is not unit]
        free = [slot for slot in self._slots if slot.unit not in busy]
        if not free:
            return None
        slot = min(free, key=lambda slot: slot.touched)
        slot.touched = now.tick()
        slot.upload(unit, now.integers)
        self.uploads += 1
        return slot

    def _dress(self, now: "_Pass", unit: Unit, slot: Slot) -> None:
        """Give the model a unit's weights on the side that runs."""
        slot.touched = now.tick()
        slot.wait()
        self._hold(unit.float_size)
        for run in unit.runs:
            integers = slot.numbers(run.offset, torch.int32, run.size)
            weights = self._weights(now, run.tensors, integers, run.start, now.side())
            for p, tensor in zip(run.tensors, weights, strict=True):
                now.put(p, tensor)
        for one in unit.fixed:
            flat = slot.numbers(one.offset, one.value.dtype, one.value.numel())
            now.put(one.tensor, flat.view(one.value.shape))

    def _undress(self, unit: Unit) -> None:
        self._forget(unit)
        self._held -= unit.float_size
        if (slot := self._slot_of(unit)) is not None:
            slot.release()

    def _stay(self, now: "_Pass", unit: Unit) -> None:
        """Let a unit stay from now on: its module's forward does not say when it is used."""
        unit.module = None
        self._check(unit)
        self._settle(now, unit)
        now.wear(now.side(), chance=False)

    def _settle(self, now: "_Pass", unit: Unit) -> None:
        """Bring a unit that stays, for all sides."""
        self._hold(len(now.scales) * unit.float_size + unit.fixed_size)
        for side in range(len(now.scales)):
            for run in unit.runs:
                integers = now.integers[run.start : run.start + run.size]
                weights = self._weights(now, run.tensors, integers, run.start, side)
                now.staying[side] += zip(run.tensors, weights, strict=True)
        for one in unit.fixed:
            now.put(one.tensor, one.value.to(self._device))

    def _weights(
        self, now: "_Pass", like: list[nn.Parameter], integers: Tensor, start: int, side: int
    ) -> list[Tensor]:
        made = [torch.empty(p.shape, dtype=p.dtype, device=self._device) for p in like]
        scale = now.scales[side]
        write_integers(made, integers, self._bits, start=start, key=now.key, scale=scale)
        return made

    def _forget(self, unit: Unit) -> None:
        """Let a unit's parameters have shapes alone."""
        for p in unit.tensors():
            p.data = self._blanks[id(p)]
            if self._pass is not None:
                self._pass.here.discard(id(p))

    def _hold(self, more: int) -> None:
        self._held += more
        self.peak = max(self.peak, self._held)
        if self._held > self._memory:
            raise self._too_small(self._held)

    def _check(self, unit: Unit | None = None) -> None:
        """Raise SettingError if what stays, two units under way and one at work do not fit."""
        moving = [one for one in self._units if not one.stays]
        needed = sum(SIDES * one.float_size + one.fixed_size for one in self._units if one.stays)
        needed += self._room + max((one.float_size for one in moving), default=0)
        if needed > self._memory:
            raise self._too_small(needed, unit)

    def _too_small(self, needed: int, unit: Unit | None = None) -> SettingError:
        why = "" if unit is None else f" ({unit.name} does: it is used outside of its forward)"
        return SettingError(
            f"--device-memory: two of this model's blocks and what must stay on the device{why} "
            f"take {needed} bytes, not {self._memory}"
        )


@dataclass(eq=False)
class _Pass:
    """One pass through the model, on one side or both."""

    integers: Tensor
    key: int
    scales: tuple[float, ...]
    """±ε, or 0: how far each side is from θ."""
    relay: Relay | None
    device: torch.device
    last: Unit | None = None
    clock: int = 0
    here: set[int] = field(default_factory=set)
    """Parameters that have weights now, by id."""

    def __post_init__(self) -> None:
        sides = range(len(self.scales))
        self.chances = [Chance(self.device) for _ in sides]
        self.inside: list[list[Unit]] = [[] for _ in sides]
        """Units whose forward each side is in."""
        self.ended = [0 for _ in sides]
        """How many forwards of units each side is through with."""
        self.staying: list[list[tuple[nn.Parameter, Tensor]]] = [[] for _ in sides]

    def side(self) -> int:
        """Return which side runs."""
        return 0 if self.relay is None else self.relay.running

    def tick(self) -> int:
        """Return a time later than all before."""
        self.clock += 1
        return self.clock

    def put(self, p: nn.Parameter, tensor: Tensor) -> None:
        """Let a parameter have these weights."""
        self.here.add(id(p))
        p.data = tensor

    def wear(self, side: int, *, chance: bool = True) -> None:
        """Let what stays be this side's, and torch's generators be where it left them."""
        for p, tensor in self.staying[side]:
            self.put(p, tensor)
        if chance:
            self.chances[side].go_on()


def _blank(p: nn.Parameter, device: torch.device) -> Tensor:
    """Return what has a parameter's shape but not its memory; NaN shows if it is computed with."""
    nothing = float("nan") if p.is_floating_point() else 0
    return torch.full((), nothing, dtype=p.dtype, device=device).expand(p.shape)


def _move_buffers(model: nn.Module, device: torch.device) -> None:
    moved: dict[int, tuple[Tensor, Tensor]] = {}
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            _, there = moved.setdefault(id(buffer), (buffer, buffer.to(device)))
            module._buffers[name] = there
