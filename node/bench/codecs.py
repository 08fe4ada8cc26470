"""What every codec costs and loses: `shoal bench codecs`.

Bits per parameter of real payloads beside the entropy of what they say, the error that stays
behind, speed beside this machine's own speed of copying, and memory beyond the tensors that are
there anyway. On Gaussian and heavy-tailed vectors, and on updates that this command records from
a peer that trains the built-in text run. Exit code 1 if the default sparse form takes more than
0.14 bits a parameter.
"""

import argparse
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from shoal.node.bench._cases import Case, chosen_cases, label
from shoal.node.bench._codec_rows import Row, make_panels, table
from shoal.node.bench._device import add_device, device_name, take_device
from shoal.node.bench._ends import apply, empty_ledger, encode
from shoal.node.bench._entropy import entropy
from shoal.node.bench._footprint import Footprints, footprints
from shoal.node.bench._report import add_json, machine, one_object, say
from shoal.node.bench._sizes import add_sizes, parse_sizes
from shoal.node.bench._speed import best, copying
from shoal.node.bench._vectors import INPUTS, Vector, chosen_inputs, vectors
from shoal.node.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from shoal.node.plot import Panel

MOST_BITS = 0.14
"""Per parameter, of the default sparse form (entropy 0.1307)."""
REPEATS = 3
"""Timings are the best of so many, or of more."""
SLAB = 1 << 22
"""Elements at a time whose squares are added in float64."""


def register(parser: argparse.ArgumentParser) -> None:
    """Add the flags."""
    add_json(parser)
    add_sizes(parser)
    parser.add_argument("--codecs", metavar="NAME,…", help="only these (default: all)")
    parser.add_argument(
        "--inputs", default=",".join(INPUTS), metavar="NAME,…", help=f"of {', '.join(INPUTS)}"
    )
    add_device(parser)
    parser.add_argument("--png", type=Path, metavar="FILE", help="draw error and speed")
    parser.add_argument(
        "--quick", action="store_true", help="1 M parameters, a small model, one repetition"
    )


def run(args: argparse.Namespace) -> int:
    """Measure and show; 1 if the default sparse form is too long."""
    from shoal.node import plot

    sizes = [1_000_000] if args.quick else parse_sizes(args.sizes)
    inputs, cases = chosen_inputs(args.inputs), chosen_cases(args.codecs)
    if args.png is not None:
        plot.check()
    take_device(args)
    memory = footprints(cases, sizes, args)
    found = vectors(inputs, sizes, quick=args.quick)
    copied = copying(args.device)
    rows = [row for each in found for row in _measured(each, cases, memory, copied, args)]
    _show(rows, copied, args)
    return int(bool(too_long(rows)))


def too_long(rows: Iterable[Row]) -> list[Row]:
    """Return the rows in which the default sparse form breaks its promise."""
    promised = [row for row in rows if row.codec == "sparse" and row.input != "heavy"]
    return [row for row in promised if row.size >= 1_000_000 and row.bits > MOST_BITS]


def _measured(
    vector: Vector,
    cases: Sequence[Case],
    memory: Footprints,
    copied: float,
    args: argparse.Namespace,
) -> Iterator[Row]:
    from shoal.compression import codec

    if vector.about:
        say(vector.about)
    size = len(vector.x_D)
    x_D = vector.x_D.to(args.device)
    ledger = empty_ledger(size, args.device)
    for name, options in cases:
        part = codec.make(name, options, shapes=vector.shapes)
        say(f"{label((name, options))} on {vector.input} {size:,}")
        repeats = 1 if args.quick else REPEATS
        left_D = x_D.clone()
        payload = encode(part, left_D)  # also: compiles what is compiled on first use
        error = _squares(left_D) / _squares(x_D)
        encoding = best(
            lambda: encode(part, left_D),  # noqa: B023  run at once
            repeats,
            args.device,
            before=lambda: left_D.copy_(x_D),  # noqa: B023
        )
        apply(part, payload, ledger)
        decoding = best(lambda: apply(part, payload, ledger), repeats, args.device)  # noqa: B023
        extra = memory.get((label((name, options)), size), (None, None))
        yield Row(
            codec=label((name, options)),
            input=vector.input,
            size=size,
            bits=8 * len(payload) / size,
            entropy=entropy(part, payload, size) / size,
            error=error,
            encode=size / encoding,
            encode_of_copy=size / encoding / copied,
            decode=size / decoding,
            decode_of_copy=size / decoding / copied,
            encode_memory=extra[0],
            decode_memory=extra[1],
        )


def _squares(x_D: "Tensor") -> float:
    return sum(
        float(x_D[start : start + SLAB].double().square().sum())
        for start in range(0, len(x_D), SLAB)
    )


def _show(rows: Sequence[Row], copied: float, args: argparse.Namespace) -> None:
    from shoal.node import plot

    where = f"{machine()}, {args.threads} threads" if args.device == "cpu" else device_name()
    panels = make_panels(rows)
    if args.png is not None:
        plot.png(args.png, panels)
    if args.json:
        print(one_object("codecs", rows, where=where, copied_per_second=copied))
    else:
        print(f"codecs on {where}")
        print(f"copying float32: {copied / 1e6:,.0f} M/s, {8 * copied / 1e9:.1f} GB/s moved")
        print()
        print(table(rows))
        _draw(panels)
    for row in too_long(rows):
        print(
            f"sparse takes {row.bits:.4f} bits a parameter on {row.input} updates, "
            f"more than {MOST_BITS}",
            file=sys.stderr,
        )


def _draw(panels: "Sequence[Panel]") -> None:
    from shoal.node import plot

    try:
        for panel in panels[:2]:
            shown = plot.text(panel, width=plot.columns(), colour=sys.stdout.isatty())
            print("", shown, sep="\n")
    except ConfigError as error:  # the table is there; only its picture is not
        print(f"no plot: {error}", file=sys.stderr)
