"""What a benchmark says: what it does now, and what it measured, as a table or one JSON object."""

import argparse
import json
import os
import platform
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Row:
    """One measured number beside what it is compared with."""

    name: str
    value: float
    unit: str
    yardstick: float | None = None
    """In the same unit; what it is, the name says."""
    ratio: float | None = None
    """value / yardstick."""


def add_json(parser: argparse.ArgumentParser) -> None:
    """Add the flag that all benchmarks have."""
    parser.add_argument(
        "--json", action="store_true", help="print one object {bench, machine, rows}"
    )


def beside(name: str, value: float, unit: str, yardstick: float) -> Row:
    """Return a row with its ratio."""
    return Row(name, value, unit, yardstick, value / yardstick)


def say(line: str) -> None:
    """Tell the waiting what is done now."""
    print(line, file=sys.stderr, flush=True)


def one_object(bench: str, rows: Sequence[Any], *, where: str | None = None, **more: Any) -> str:
    """Return what `--json` prints: bench, machine, what else there is to say, and the rows."""
    found = {"bench": bench, "machine": where or machine(), **more, "rows": list(rows)}
    return json.dumps(found, default=asdict)


def asked(args: argparse.Namespace) -> dict[str, Any]:
    """Return a benchmark's own flags, for its JSON object."""
    return {name: value for name, value in vars(args).items() if name not in ("json", "parser")}


def show(bench: str, rows: Sequence[Row], *, as_json: bool, where: str | None = None) -> None:
    """Print one object {bench, machine, rows}, or a table; `where`: another name of the machine."""
    if as_json:
        print(one_object(bench, rows, where=where))
        return
    print(f"{bench} on {where or machine()}")
    width = max(len(row.name) for row in rows)
    for row in rows:
        line = f"  {row.name:{width}}  {row.value:>12.5g} {row.unit}"
        if row.yardstick is not None and row.ratio is not None:
            line += f"   beside {row.yardstick:.5g} {row.unit}: {row.ratio:.4f}"
        print(line)


def grid(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table of plain text: the first column to the left, the others to the right."""
    widths = [max(len(row[i]) for row in [heads, *rows]) for i in range(len(heads))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if place else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in [heads, *rows]
    )


def markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return the same as a table in Markdown."""
    ruler = ["---", *("---:" for _ in heads[1:])]
    return "\n".join("| " + " | ".join(row) + " |" for row in [heads, ruler, *rows])


def machine() -> str:
    """Return processor, cores and Python in a few words."""
    model = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(x.split(":", 1)[1].strip() for x in lines if x.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return f"{model}, {os.cpu_count()} cores, Python {platform.python_version()}"
