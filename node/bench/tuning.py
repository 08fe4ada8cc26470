"""What compressing a finished fine-tuning costs: `shoal bench tuning`.

A text model is trained on one half of this Python's library, then tuned on the other half; what the
tuning changed (the task vector) is compressed once, added to the model as it was before, and
measured on held-out text of the second half. So ComPEFT (Yadav et al. 2023, arXiv 2311.13171: signs
of the largest, one scalar, which is chosen on validation text) and FedZip (Malekijoo et al. 2021,
arXiv 2102.01593: the largest in clusters, three encodings) are used as their papers use them,
without error feedback. Exit code 1 if ComPEFT is not at least 16 times smaller than 16-bit numbers
at a loss within 1 % of the tuned model's.
"""

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shoal.node.bench._report import add_json, grid, machine
from shoal.node.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from shoal.compression.codec import Shapes
    from shoal.training.task import Task
    from shoal.training.trainer import Trainer

ALPHAS = (0.5, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0)
"""ComPEFT's grid for the factor on the standard deviation."""
DENSITIES = (0.05, 0.1, 0.15, 0.2, 0.5)
FEW = (0.01, 0.05, 0.2, 0.5)
"""Of every tensor, for FedZip."""
WITHIN = 1.01
"""No worse: a loss of at most so many times the tuned model's."""
FACTOR_16 = 16.0
"""How much smaller than 16-bit numbers ComPEFT must be."""
PART = 20
"""A turn of the schedule has so many steps."""


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
    """Windows by which the table is made."""


FULL = Plan(layers=3, width=96, before=1000, tuning=400, validation=256, test=768)
QUICK = Plan(layers=2, width=32, before=60, tuning=60, validation=64, test=128)


@dataclass(frozen=True, slots=True)
class Trial:
    """One way to compress; of several settings the best on validation text is taken."""

    name: str
    kind: str
    settings: Sequence[dict[str, Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One model: the base plus what a payload says."""

    name: str
    settings: dict[str, Any]
    bytes: int
    of_16_bit: float | None
    """How many times smaller than two bytes a parameter."""
    of_32_bit: float | None
    loss: float
    """Bits per byte of held-out text."""
    kept: float
    """Share of what the tuning gained that is still there."""
    no_worse: bool
    """The loss is within 1 % of the tuned model's."""


def register(parser: argparse.ArgumentParser) -> None:
    """Add the flags."""
    add_json(parser)
    parser.add_argument("--seed", type=int, default=1, metavar="N", help="(default: 1)")
    parser.add_argument("--threads", type=int, default=2, metavar="N", help="(default: 2)")
    parser.add_argument("--quick", action="store_true", help="a tiny model, a few steps")


def run(args: argparse.Namespace) -> int:
    """Train, tune, compress and show."""
    import torch

    if args.threads < 1:
        raise ConfigError(f"--threads {args.threads} is not a whole number above zero")
    if not 0 <= args.seed < 1 << 32:
        raise ConfigError(f"--seed {args.seed}: use 0 to {2**32 - 1}")
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory(prefix="shoal-tuning-") as folder:
        tuned = tune(QUICK if args.quick else FULL, Path(folder), args.seed)
    rows = list(measure(tuned, trials()))
    _show(rows, tuned, args)
    return int(not any(keeps_the_claim(row) for row in rows))


def trials() -> list[Trial]:
    """Return what is tried: ComPEFT, FedZip, and the default updates of runs beside them."""
    found = [Trial("dense", "dense", [{}]), Trial("dense, 4 bits", "dense", [{"bits": 4}])]
    found += [Trial(f"sparse, {100 * d:g} %", "sparse", [{"density": d}]) for d in (1 / 64, 0.1)]
    for density in DENSITIES:
        alphas = [{"density": density, "magnitude": "std", "alpha": a} for a in ALPHAS]
        found.append(Trial(f"ComPEFT, {100 * density:g} %", "topk", alphas))
    for density in DENSITIES:
        found.append(Trial(f"top-k, mean, {100 * density:g} %", "topk", [{"density": density}]))
    for density in FEW:
        for encoding in ("huffman", "positions", "gaps"):
            settings = {"density": density, "centroids": 3, "encoding": encoding}
            found.append(Trial(f"FedZip, {100 * density:g} %, {encoding}", "kmeans", [settings]))
    return found


def keeps_the_claim(row: Row) -> bool:
    """Say whether this is ComPEFT as much smaller and as good as it says."""
    small = row.of_16_bit is not None and row.of_16_bit >= FACTOR_16
    return row.name.startswith("ComPEFT") and small and row.no_worse


# ---------------------------------------------------------------- two halves, two trainings


@dataclass(frozen=True, slots=True)
class Tuned:
    """A model before and after its tuning, and text to measure on."""

    task: "Task"
    model: "nn.Module"
    shapes: "Shapes"
    base_D: "Tensor"
    tuned_D: "Tensor"
    validation_NT: "Tensor"
    test_NT: "Tensor"
    seconds: float
    bits: int
    """q = 2^-bits."""


def tune(plan: Plan, folder: Path, seed: int) -> Tuned:
    """Train on one half of the library, then on the other."""
    from shoal.training import ledger
    from shoal.training.parameters import Parameters

    begun = time.monotonic()
    halves = split(folder)
    _say(f"training a text model, {plan.before} steps on one half of the library")
    first = _trainer(plan, halves[0], seed, steps=plan.before, initial=None)
    first.alone(plan.before)
    bits = 24
    base = ledger.from_floats(Parameters(first.model).read(), bits)
    _say(f"tuning it, {plan.tuning} steps on the other half")
    second = _trainer(
        plan, halves[1], seed + 1, steps=plan.tuning, initial=base.numpy().astype("<i4").tobytes()
    )
    base_D = second.exchange.model()
    second.alone(plan.tuning)
    parameters = Parameters(second.model)
    validation_NT, test_NT = _held_out(halves[1], seed + 1, plan)
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


def _trainer(plan: Plan, data: Path, seed: int, *, steps: int, initial: bytes | None) -> "Trainer":
    from shoal.node.swarm import adapt, read_run
    from shoal.training.run import RunSpec
    from shoal.training.trainer import Setup, Trainer

    tables = adapt(read_run("text"), peers=1, turns=-(-steps // PART))
    tables["run"] |= {"name": "tuning", "seed": seed}
    tables["task"]["model"] = {"layers": plan.layers, "width": plan.width}
    if initial is not None:  # a tuning starts near where it ends: a tenth of AdamW's usual rate
        tables["local"]["optimizer"] = {"name": "adamw", "lr": 3e-4, "schedule": "wsd"}
    setup = Setup(run=RunSpec.parse(tables), data=str(data))
    return Trainer(setup, initial=initial, clock=time.monotonic)


def _held_out(folder: Path, seed: int, plan: Plan) -> "tuple[Tensor, Tensor]":
    """Return windows of text that nobody trains on, of different blocks for both purposes."""
    from shoal.training import data
    from shoal.training.task import Place

    place = Place(seed=seed, peer=b"", batch=1, data=str(folder), shard=None, min_peers=1)
    blocks = data.load(place).held_out
    return _windows(blocks[::2], plan.validation), _windows(blocks[1::2], plan.test)


def _windows(blocks: Sequence[bytes], count: int, length: int = 129) -> "Tensor":
    """Return `count` windows at equal distances, or all there are, as rows of bytes."""
    import torch

    cut = [b[i : i + length] for b in blocks for i in range(0, len(b) - length + 1, length)]
    chosen = [cut[i * len(cut) // count] for i in range(count)] if len(cut) > count else cut
    flat = torch.frombuffer(bytearray(b"".join(chosen)), dtype=torch.uint8)
    return flat.reshape(-1, length)


# ---------------------------------------------------------------- compressing


def measure(tuned: Tuned, wanted: Sequence[Trial]) -> Iterator[Row]:
    """Yield base, tuned model, and every trial."""
    count = len(tuned.base_D)
    base = loss(tuned, tuned.base_D, tuned.test_NT)
    full = loss(tuned, tuned.tuned_D, tuned.test_NT)

    def row(name: str, settings: dict[str, Any], size: int, value: float) -> Row:
        return Row(
            name=name,
            settings=settings,
            bytes=size,
            of_16_bit=2 * count / size if size else None,
            of_32_bit=4 * count / size if size else None,
            loss=value,
            kept=(base - value) / (base - full),
            no_worse=value <= WITHIN * full,
        )

    yield row("before tuning", {}, 0, base)
    yield row("tuned, 32 bits", {}, 4 * count, full)
    half_D = tuned.base_D + (tuned.tuned_D - tuned.base_D).bfloat16().float()
    yield row("tuned, 16 bits", {}, 2 * count, loss(tuned, half_D, tuned.test_NT))
    for trial in wanted:
        _say(f"compressing: {trial.name}")
        settings, size, model_D = best(tuned, trial)
        yield row(trial.name, settings, size, loss(tuned, model_D, tuned.test_NT))


def best(tuned: Tuned, trial: Trial) -> "tuple[dict[str, Any], int, Tensor]":
    """Return the settings with the least loss on validation text, payload bytes, and model."""
    found = [(settings, *compressed(tuned, trial.kind, settings)) for settings in trial.settings]
    if len(found) == 1:
        return found[0]
    return min(found, key=lambda each: loss(tuned, each[2], tuned.validation_NT))


def compressed(tuned: Tuned, kind: str, settings: dict[str, Any]) -> "tuple[int, Tensor]":
    """Return payload bytes of the task vector, and the base plus what they decode to."""
    from shoal.compression import codec

    part = codec.make(kind, settings, shapes=tuned.shapes)
    vector_D = (tuned.tuned_D - tuned.base_D) * 2.0**tuned.bits
    payload = part.encode(vector_D, key=1).payload
    said_D = part.decode(payload, len(vector_D)).dense()
    return len(payload), tuned.base_D + said_D.float() * 2.0**-tuned.bits


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


# ---------------------------------------------------------------- what is shown


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


HEADS = ("update", "alpha", "bytes", "of 16 bit", "of 32 bit", "held out", "gain kept", "")


def _show(rows: Sequence[Row], tuned: Tuned, args: argparse.Namespace) -> None:
    count = len(tuned.base_D)
    if args.json:
        about = {"parameters": count, "seed": args.seed, "seconds": tuned.seconds}
        found = {"bench": "tuning", "machine": machine(), **about}
        print(json.dumps({**found, "rows": [asdict(row) for row in rows]}))
        return
    print(f"tuning on {machine()}")
    print(
        f"{count:,} parameters, seed {args.seed}; held out: bits per byte of the second half; "
        f"training took {tuned.seconds:.0f} s"
    )
    print()
    print(table(rows))


def table(rows: Sequence[Row]) -> str:
    """Return the rows as text."""
    return grid(
        HEADS,
        [
            (
                row.name,
                f"{row.settings['alpha']:g}" if "alpha" in row.settings else "",
                f"{row.bytes:,}",
                "–" if row.of_16_bit is None else f"{row.of_16_bit:.1f} ×",
                "–" if row.of_32_bit is None else f"{row.of_32_bit:.1f} ×",
                f"{row.loss:.4f}",
                f"{100 * row.kept:.0f} %",
                "no worse" if row.no_worse else "",
            )
            for row in rows
        ],
    )
