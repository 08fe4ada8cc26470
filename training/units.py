"""What of a model comes to its device and leaves it together: its blocks, and what is around them.

A unit is a module that needs its parameters only while its forward runs: an element of the model's
largest ModuleList, or any other module without children. Parameters that several of these share
(tied embeddings), or that a module with children holds itself, are needed at times that nobody can
tell beforehand: they stay.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from shoal.training.parameters import Parameters

ALIGNED = 16
"""Where tensors begin within a unit's bytes."""


@dataclass(slots=True)
class Run:
    """Trainable parameters that lie one after another in the flat vector."""

    start: int
    size: int
    tensors: list[nn.Parameter]
    offset: int = 0
    """Where in the unit's bytes its integers begin."""


@dataclass(slots=True)
class Fixed:
    """A frozen parameter: not in the ledger, kept where the host has it."""

    tensor: nn.Parameter
    value: Tensor
    offset: int = 0


@dataclass(slots=True, eq=False)
class Unit:
    """Parameters that travel together."""

    name: str
    module: nn.Module | None
    """Whose forward needs it; None: it stays."""
    runs: list[Run] = field(default_factory=list)
    fixed: list[Fixed] = field(default_factory=list)
    size: int = 0
    """Bytes as it travels: an int32 a trainable parameter, frozen ones as they are."""

    @property
    def stays(self) -> bool:
        """Say whether it is on the device all the time."""
        return self.module is None

    @property
    def float_size(self) -> int:
        """Return the bytes of its trainable parameters as the model computes with them."""
        return sum(t.numel() * t.element_size() for run in self.runs for t in run.tensors)

    @property
    def fixed_size(self) -> int:
        """Return the bytes of its frozen parameters."""
        return sum(one.value.numel() * one.value.element_size() for one in self.fixed)

    def tensors(self) -> Iterator[nn.Parameter]:
        """Yield its parameters."""
        for run in self.runs:
            yield from run.tensors
        yield from (one.tensor for one in self.fixed)


def divide(model: nn.Module, parameters: Parameters) -> list[Unit]:
    """Return the units of a model in the order of its modules; all parameters are in one."""
    blocks = {id(block) for block in _blocks(model)}
    inside = {id(m) for block in _blocks(model) for m in block.modules()} - blocks
    units = [
        Unit(name, module)
        for name, module in model.named_modules()
        if id(module) in blocks
        or (id(module) not in inside and not any(module.children()) and _owned(module))
    ]
    users: dict[int, list[Unit]] = {}
    for unit in units:
        assert unit.module is not None
        for p in unit.module.parameters():
            users.setdefault(id(p), []).append(unit)
    staying = Unit("what is shared", None)
    starts = _starts(parameters)
    for p in model.parameters():
        of = users.get(id(p), [])
        unit = of[0] if len(of) == 1 else staying
        if id(p) in starts:
            unit.runs.append(Run(starts[id(p)], p.numel(), [p]))
        else:
            unit.fixed.append(Fixed(p, p.detach()))
    found = [staying, *units]
    for unit in found:
        unit.runs = _joined(unit.runs)
        _lay_out(unit)
    return [unit for unit in found if unit.runs or unit.fixed]


def _blocks(model: nn.Module) -> list[nn.Module]:
    """Return the elements of the largest ModuleList, each once."""
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m)]
    if not lists:
        return []
    largest = max(lists, key=lambda one: sum(p.numel() for p in one.parameters()))
    return list({id(block): block for block in largest}.values())


def _owned(module: nn.Module) -> bool:
    return any(True for _ in module.parameters(recurse=False))


def _starts(parameters: Parameters) -> dict[int, int]:
    """Return where each trainable parameter begins in the flat vector."""
    starts, at = {}, 0
    for p in parameters.named.values():
        starts[id(p)] = at
        at += p.numel()
    return starts


def _joined(runs: list[Run]) -> list[Run]:
    joined: list[Run] = []
    for run in sorted(runs, key=lambda run: (run.start, run.size)):
        if joined and joined[-1].start + joined[-1].size == run.start:
            joined[-1].size += run.size
            joined[-1].tensors += run.tensors
        else:
            joined.append(run)
    return joined


def _lay_out(unit: Unit) -> None:
    at = 0
    for run in unit.runs:
        run.offset, at = at, _up(at + run.size * torch.int32.itemsize)
    for one in unit.fixed:
        size = one.value.numel() * one.value.element_size()
        one.offset, at = at, _up(at + size)
    unit.size = at


def _up(count: int) -> int:
    return -(-count // ALIGNED) * ALIGNED
