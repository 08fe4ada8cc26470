"""A text model trained on one half of this Python's library and tuned on the other half."""

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shoal.node.bench._report import say

if TYPE_CHECKING:
    from torch import Tensor, nn

    from shoal.compression.codec import Shapes
    from shoal.training.task import Task
    from shoal.training.trainer import Trainer

PART = 20
"""A turn of the schedule has so many steps."""
RATE = 3e-4
"""Of a tuning, which starts near where it ends: a tenth of AdamW's usual rate."""
WITHIN = 1.01
"""No worse: a loss of at most so many times that of what was not compressed."""


@dataclass(frozen=True, slots=True)
class Series:
    """The tuning in so many rounds, once for every density with every decay, once uncompressed."""

    rounds: int
    rate: float
    """AdamW's."""
    densities: tuple[float, ...]
    decays: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Plan:
    """How large and how long."""

    layers: int
    width: int
    before: int
    """Steps on the first half …"""
    tuning: int
    """… and on the second."""
    validation: int
    """Windows by which alpha is chosen."""
    test: int
    """Windows by which the tables are made."""
    series: tuple[Series, ...] = ()


FULL = Plan(
    layers=3,
    width=96,
    before=1000,
    tuning=400,
    validation=256,
    test=768,
    series=(
        Series(40, RATE, (0.005, 0.01, 0.02, 0.05), (1.0, 0.95)),
        Series(100, RATE, (0.005, 0.01), (1.0,)),
        Series(40, 1e-3, (0.005, 0.01, 0.02, 0.05), (1.0,)),
    ),
)
QUICK = Plan(
    layers=2,
    width=32,
    before=60,
    tuning=60,
    validation=64,
    test=128,
    series=(Series(20, RATE, (0.01, 0.05), (1.0,)),),
)


@dataclass(frozen=True, slots=True)
class Tuned:
    """A model before and after its tuning, and text to measure on."""

    task: "Task"
    model: "nn.Module"
    shapes: "Shapes"
    base_D: "Tensor"
    """Before …"""
    tuned_D: "Tensor"
    """… and after."""
    validation_NT: "Tensor"
    test_NT: "Tensor"
    seconds: float
    bits: int
    """q = 2^-bits."""
    again: "Callable[..., Trainer]"
    """Returns a trainer that is yet to tune the base; takes what `trainer` takes by keyword."""


def tune(plan: Plan, folder: Path, seed: int) -> Tuned:
    """Train on one half of the library, then on the other."""
    from shoal.training import ledger
    from shoal.training.parameters import Parameters

    begun = time.monotonic()
    halves = split(folder)
    say(f"training a text model, {plan.before} steps on one half of the library")
    first = trainer(plan, halves[0], seed, turns=-(-plan.before // PART))
    first.alone(plan.before)
    bits = 24
    base = ledger.from_floats(Parameters(first.model).read(), bits)
    initial = base.numpy().astype("<i4").tobytes()
    again = partial(trainer, plan, halves[1], seed + 1, initial=initial)
    say(f"tuning it, {plan.tuning} steps on the other half")
    second = again(turns=-(-plan.tuning // PART), rate=RATE)
    base_D = second.exchange.model()
    second.alone(plan.tuning)
    parameters = Parameters(second.model)
    validation_NT, test_NT = held_out(halves[1], seed + 1, plan)
    return Tuned(
        task=second.task,
        model=second.model,
        shapes=parameters.layout.shapes,
        base_D=base_D,
        tuned_D=parameters.read(),
        validation_NT=validation_NT,
        test_NT=test_NT,
        seconds=time.monotonic() - begun,
        bits=bits,
        again=again,
    )


def split(folder: Path) -> tuple[Path, Path]:
    """Copy this Python's modules into two folders, by a hash of where they lie in the library."""
    import sysconfig

    from shoal.training import data

    root = Path(sysconfig.get_paths()["stdlib"])
    halves = folder / "first", folder / "second"
    for half in halves:
        half.mkdir()
    for path in data.files(None):
        name = path.relative_to(root).as_posix()
        half = halves[blake2b(name.encode(), digest_size=1).digest()[0] % 2]
        shutil.copyfile(path, half / name.replace("/", "."))
    return halves


def trainer(
    plan: Plan,
    data: Path,
    seed: int,
    *,
    turns: int,
    steps: int = 0,
    rate: float | None = None,
    update: Mapping[str, Any] | None = None,
    initial: bytes | None = None,
) -> "Trainer":
    """Return a trainer of the shipped run: AdamW at a constant, then falling `rate`, or the run's.

    `steps` are those of a turn, `update` is the table `exchange.update` (None: the run's own).
    """
    from shoal.node.swarm import adapt, read_run
    from shoal.training.run import RunSpec
    from shoal.training.trainer import Setup, Trainer

    tables = adapt(read_run("text"), peers=1, turns=turns)
    tables["run"] |= {"name": "tuning", "seed": seed}
    tables["task"]["model"] = {"layers": plan.layers, "width": plan.width}
    tables["local"] |= {"evaluate_every": 0} | ({"steps": steps} if steps else {})
    if rate is not None:
        tables["local"]["optimizer"] = {"name": "adamw", "lr": rate, "schedule": "wsd"}
    if update is not None:
        tables["exchange"]["update"] = dict(update)
    setup = Setup(run=RunSpec.parse(tables), data=str(data))
    return Trainer(setup, initial=initial, clock=time.monotonic)


def held_out(folder: Path, seed: int, plan: Plan) -> "tuple[Tensor, Tensor]":
    """Return windows of text that nobody trains on, of different blocks for both purposes."""
    from shoal.training import data
    from shoal.training.task import Place

    place = Place(seed=seed, peer=b"", batch=1, data=str(folder), shard=None, min_peers=1)
    blocks = data.load(place).held_out
    return windows(blocks[::2], plan.validation), windows(blocks[1::2], plan.test)


def windows(blocks: Sequence[bytes], count: int, length: int = 129) -> "Tensor":
    """Return `count` windows at equal distances, or all there are, as rows of bytes."""
    import torch

    cut = [b[i : i + length] for b in blocks for i in range(0, len(b) - length + 1, length)]
    chosen = [cut[i * len(cut) // count] for i in range(count)] if len(cut) > count else cut
    flat = torch.frombuffer(bytearray(b"".join(chosen)), dtype=torch.uint8)
    return flat.reshape(-1, length)


def loss(tuned: Tuned, model_D: "Tensor", windows_NT: "Tensor") -> float:
    """Return bits per byte of a model on windows."""
    import torch

    from shoal.training.parameters import Parameters

    Parameters(tuned.model).write(model_D)
    tuned.model.eval()
    total = 0.0
    with torch.no_grad():
        for start in range(0, len(windows_NT), 64):
            batch = windows_NT[start : start + 64]
            total += float(tuned.task.loss(tuned.model, batch)) * len(batch)
    return total / len(windows_NT)
