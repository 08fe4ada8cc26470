"""What compressing a fine-tuning costs: `shoal bench tuning`.

A text model is trained on one half of this Python's library, then tuned on the other half; what the
tuning changed (the task vector) is compressed once, added to the model as it was before, and
measured on held-out text of the second half. So ComPEFT (Yadav et al. 2023, arXiv 2311.13171: signs
of the largest, one scalar, which is chosen on validation text) is used as its paper uses it,
without error feedback. Exit code 1 if ComPEFT is not, with every seed, at least 16 times smaller
than 16-bit numbers at a loss within 1 % of the tuned model's.

FedZip (Malekijoo et al. 2021, arXiv 2102.01593: the largest in clusters, three encodings)
compresses the update of every round; so a second table takes the tuning in rounds (`_rounds.py`).
No claim of FedZip's decides the exit code: see there what was measured.
"""

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shoal.node.bench import _rounds
from shoal.node.bench._report import add_json, grid, machine, one_object, say
from shoal.node.bench._tuned import FULL, QUICK, WITHIN, Plan, Tuned, loss, tune
from shoal.node.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

ALPHAS = (0.5, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0)
"""ComPEFT's grid for the factor on the standard deviation."""
DENSITIES = (0.05, 0.1, 0.15, 0.2, 0.5)
FEW = (0.01, 0.05, 0.2, 0.5)
"""Of every tensor, for FedZip."""
FACTOR_16 = 16.0
"""How much smaller than 16-bit numbers ComPEFT must be."""


@dataclass(frozen=True, slots=True)
class Trial:
    """One way to compress; of several settings the best on validation text is taken."""

    name: str
    kind: str
    settings: Sequence[dict[str, Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One model: the base plus what a payload says."""

    seed: int
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
    parser.add_argument("--seed", type=int, default=1, metavar="N", help="the first (default: 1)")
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="how many (default: 1)")
    parser.add_argument("--threads", type=int, default=2, metavar="N", help="(default: 2)")
    parser.add_argument("--quick", action="store_true", help="a tiny model, a few steps")


def run(args: argparse.Namespace) -> int:
    """Train, tune, compress and show."""
    import torch

    if args.threads < 1 or args.seeds < 1:
        raise ConfigError(
            f"--threads {args.threads} --seeds {args.seeds}: use whole numbers above zero"
        )
    if not 0 <= args.seed <= (1 << 32) - args.seeds:
        raise ConfigError(f"--seed {args.seed}: use 0 to {2**32 - args.seeds}")
    torch.set_num_threads(args.threads)
    plan = QUICK if args.quick else FULL
    seeds = range(args.seed, args.seed + args.seeds)
    found = [_one(plan, seed, show=not args.json) for seed in seeds]
    rows = [row for each in found for row in each.rows]
    rounds = [row for each in found for row in each.rounds]
    if args.json:
        print(
            one_object(
                "tuning",
                rows,
                parameters=found[0].parameters,
                seconds=sum(each.seconds for each in found),
                rounds=rounds,
            )
        )
    elif args.seeds > 1:
        print(f"in rounds, {args.seeds} seeds: the worst of each\n\n{_rounds.summary(rounds)}")
    return int(not claims_hold(rows))


@dataclass(frozen=True, slots=True)
class Found:
    """What one seed says."""

    parameters: int
    seconds: float
    """Of the two trainings."""
    rows: list[Row]
    rounds: list[_rounds.Round]


def _one(plan: Plan, seed: int, *, show: bool) -> Found:
    """Measure with one seed, and print each table as soon as it is there."""
    with tempfile.TemporaryDirectory(prefix="shoal-tuning-") as folder:
        tuned = tune(plan, Path(folder), seed)
        rows = list(measure(tuned, trials(), seed))
        count = len(tuned.base_D)
        if show:
            print(f"tuning on {machine()}")
            print(
                f"{count:,} parameters, seed {seed}; held out: bits per byte of the second half; "
                f"training took {tuned.seconds:.0f} s"
            )
            print(f"\n{table(rows)}\n", flush=True)
        rounds = list(_rounds.measure(tuned, plan, seed))
        if show:
            print(f"in rounds, {plan.tuning} steps in all\n\n{_rounds.table(rounds)}\n", flush=True)
    return Found(count, tuned.seconds, rows, rounds)


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


def claims_hold(rows: Sequence[Row]) -> bool:
    """Say whether every seed has a row with which ComPEFT keeps what it says."""
    seeds = {row.seed for row in rows}
    return seeds == {row.seed for row in rows if keeps_the_claim(row)}


def keeps_the_claim(row: Row) -> bool:
    """Say whether this is ComPEFT as much smaller and as good as it says."""
    small = row.of_16_bit is not None and row.of_16_bit >= FACTOR_16
    return row.name.startswith("ComPEFT") and small and row.no_worse


# ---------------------------------------------------------------- compressing


def measure(tuned: Tuned, wanted: Sequence[Trial], seed: int) -> Iterator[Row]:
    """Yield base, tuned model, and every trial."""
    count = len(tuned.base_D)
    base = loss(tuned, tuned.base_D, tuned.test_NT)
    full = loss(tuned, tuned.tuned_D, tuned.test_NT)

    def row(name: str, settings: dict[str, Any], size: int, value: float) -> Row:
        return Row(
            seed=seed,
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
        say(f"compressing: {trial.name}")
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


# ---------------------------------------------------------------- what is shown


HEADS = ("update", "alpha", "bytes", "of 16 bit", "of 32 bit", "held out", "gain kept", "")


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
