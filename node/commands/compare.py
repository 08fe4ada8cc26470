"""`shoal compare`: train several runs side by side; loss against turns and against bytes."""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shoal.node import flags, shipped

if TYPE_CHECKING:
    from shoal.node.compare import Job, Result, Row
    from shoal.node.plot import Panel

QUIET = 5.0
"""Seconds between lines of progress."""
ALL = "all"


def register(subparsers: flags.Subparsers) -> None:
    """Add the command."""
    parser = flags.command(
        subparsers,
        "compare",
        "Train run files in this machine's processes, each with several seeds, and show the "
        "held-out measure against turns and against bytes published. The same seed gives the "
        "same numbers. Exit code 1 if a run did not come to its end.",
        run,
    )
    parser.add_argument(
        "run_files",
        nargs="+",
        metavar="RUN.toml",
        help=f"run files, or shipped ones by name: {', '.join(shipped.names())}",
    )
    parser.add_argument(
        "--preset",
        action="append",
        default=[],
        metavar="NAME",
        help="train the runs with this published recipe too; repeatable; all: every one that "
        "works with the ledger",
    )
    parser.add_argument("--peers", type=flags.positive, default=4, metavar="N")
    parser.add_argument("--turns", type=flags.positive, metavar="T", help="turns of every peer")
    parser.add_argument("--steps", type=flags.positive, metavar="H", help="local steps of a turn")
    parser.add_argument(
        "--seeds", type=flags.positive, default=3, metavar="N", help="how many (default: 3)"
    )
    parser.add_argument(
        "--jobs",
        type=flags.positive,
        metavar="N",
        help="processes at once, a core each (default: as many as there are cores)",
    )
    parser.add_argument("--data", metavar="PATH", help="folder or file to train on")
    flags.add_base(parser)
    parser.add_argument("--allow-task", metavar="PACKAGE.MODULE:FACTORY", help="a task of yours")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="one row per run, seed and turn")
    parser.add_argument("--png", type=Path, metavar="FILE", help="draw the curves")
    parser.add_argument("--markdown", action="store_true", help="print the table in Markdown")


def run(args: argparse.Namespace) -> int:
    """Train, then show."""
    from shoal.node import compare, plot

    jobs = make_jobs(args)
    if args.png is not None:
        plot.check()
    for path in (args.csv, args.png):
        _try_to_write(path)
    children = compare.Children(args.jobs or len(os.sched_getaffinity(0)), _Progress(len(jobs)))
    children.check(jobs[:: args.seeds])
    results = children.train(jobs)
    rows = compare.rows(results)
    panels = make_panels(results)
    if args.csv is not None:
        write_csv(args.csv, results)
    if args.png is not None:
        plot.png(args.png, panels)
    print("\n".join(report(args, rows, results)))
    if not args.markdown:
        _draw(panels)
    return int(any(row.failed for row in rows))


def make_jobs(args: argparse.Namespace) -> "list[Job]":
    """Return the jobs: for each run file as it is and with every preset, all seeds."""
    from shoal.node.compare import Job
    from shoal.node.config import absolute_base
    from shoal.node.swarm import adapt, read_run

    recipes: dict[str, dict[str, Any]] = {}
    for file in args.run_files:
        tables = _with_steps(adapt(read_run(file), peers=args.peers, turns=args.turns), args.steps)
        stem = file.removesuffix(".toml")
        name = stem if stem in recipes else Path(file).stem
        recipes[stem if name in recipes else name] = tables
        for preset, changed in _presets(tables, args.preset):
            alone = len(args.run_files) == 1 and preset not in recipes
            recipes[preset if alone else f"{name} {preset}"] = changed
    return [
        Job(
            name=name,
            tables=tables,
            peers=args.peers,
            seed=seed,
            data=None if args.data is None else os.path.abspath(args.data),
            base=None if args.base is None else absolute_base(args.base),
            allow_task=args.allow_task,
        )
        for name, tables in recipes.items()
        for seed in range(args.seeds)
    ]


def _with_steps(tables: dict[str, Any], steps: int | None) -> dict[str, Any]:
    """Return the run with so many local steps, and a measure before every turn."""
    local = {**tables.get("local", {}), "evaluate_every": 1}
    if steps is not None:
        local["steps"] = steps
    return {**tables, "local": local}


def _presets(tables: dict[str, Any], asked: Sequence[str]) -> list[tuple[str, dict[str, Any]]]:
    if not asked:
        return []
    from shoal.compression.settings import SettingError
    from shoal.node.errors import ConfigError
    from shoal.training import presets

    names = [n for name in asked for n in (sorted(presets.LEDGER) if name == ALL else [name])]
    try:
        return [(name, presets.apply(tables, name)) for name in dict.fromkeys(names)]
    except SettingError as error:
        raise ConfigError(f"--preset: {error}") from error


def _try_to_write(path: Path | None) -> None:
    """Find out before the training whether the file can be written after it."""
    from shoal.node.errors import ConfigError

    if path is None:
        return
    try:
        path.open("a").close()
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}; name another file") from error


class _Progress:
    """Says lines on stderr: at most one every few seconds."""

    def __init__(self, jobs: int) -> None:
        self._last = time.monotonic()
        print(f"{jobs} trainings", file=sys.stderr, flush=True)

    def __call__(self, line: str) -> None:
        now = time.monotonic()
        if now - self._last >= QUIET:
            self._last = now
            print(line, file=sys.stderr, flush=True)


# ---------------------------------------------------------------- at the end


HEADS = (
    "run",
    "bytes per peer and turn",
    "bytes per peer",
    "fewer than all-reduce",
    "before",
    "after",
)


def report(
    args: argparse.Namespace, rows: "Sequence[Row]", results: "Sequence[Result]"
) -> list[str]:
    """Return a line about the setting, the table, and what failed."""
    from shoal.node import table
    from shoal.node.bench import _report

    cells = [
        [
            row.name,
            table.size(row.per_turn) if row.published else "–",
            table.size(row.published) if row.published else "–",
            table.times(row.fewer),
            *(_spread(spread, args.seeds) for spread in (row.before, row.after)),
        ]
        for row in rows
    ]
    good = [result for result in results if not result.failed]
    setting = f"{args.peers} peers, {args.seeds} seed{'s' if args.seeds > 1 else ''}"
    if good:
        turns = _all_of({str(r.turns) for r in good})
        steps = _all_of({f"{r.steps / max(r.turns, 1):.0f}" for r in good})
        setting += f", {turns} turns of {steps} steps each"
        setting += f", {_all_of({f'{r.parameters:,}' for r in good})} parameters"
        setting += f"; before and after: {unit(results)} held out"
    if args.seeds > 1:
        setting += ", mean ± standard deviation"
    draw = _report.markdown if args.markdown else _report.grid
    failed = [f"{row.name} failed: {row.failed}" for row in rows if row.failed]
    return [setting, "", draw(HEADS, cells), "", *failed]


def _all_of(said: set[str]) -> str:
    """Return what is so in all runs, or all that is so in one of them."""
    return " or ".join(sorted(said, key=lambda text: (len(text), text)))


def _spread(spread: Any, seeds: int) -> str:
    if spread is None:
        return "–"
    return f"{spread.mean:.3f}" + (f" ± {spread.deviation:.3f}" if seeds > 1 else "")


def unit(results: "Sequence[Result]") -> str:
    """Return what all runs measure in, if it is one and the same."""
    units = {result.unit for result in results if not result.failed}
    return units.pop() if len(units) == 1 else "each task's measure"


def make_panels(results: "Sequence[Result]") -> "list[Panel]":
    """Return the held-out measure against turns and against bytes."""
    from shoal.node import compare
    from shoal.node.plot import Line, Panel

    curves = compare.curves(results)
    measure = f"{unit(results)} (held out)"
    by_turn, by_bytes = [], []
    for name, points in curves.items():
        known = [point for point in points if point.held_out is not None]
        held_out = [point.held_out or 0.0 for point in known]
        by_turn.append(Line(name, [point.turn for point in known], held_out))
        by_bytes.append(Line(name, [point.published for point in known], held_out))
    return [
        Panel("turns", measure, by_turn, title="against turns"),
        Panel(
            "payload bytes published per peer",
            measure,
            by_bytes,
            title="against bytes",
            log_x=True,
        ),
    ]


def _draw(panels: "Sequence[Panel]") -> None:
    from shoal.node import plot
    from shoal.node.errors import ConfigError

    try:
        for panel in panels:
            print(plot.text(panel, width=plot.columns(), colour=sys.stdout.isatty()), end="\n\n")
    except ConfigError as error:  # the table is there; only its picture is not
        print(f"no plot: {error}", file=sys.stderr)


def write_csv(path: Path, results: "Sequence[Result]") -> None:
    """Write one row per run, seed and turn."""
    import csv

    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["run", "seed", "turn", "loss", "held_out", "published_bytes"])
        for result in results:
            for point in result.points:
                numbers = (point.loss, point.held_out)
                cells = ["" if number is None else repr(number) for number in numbers]
                writer.writerow([result.name, result.seed, point.turn, *cells, point.published])
