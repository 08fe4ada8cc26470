"""`shoal swarm`: a real swarm of daemons on this machine, with a live table and a summary."""

import argparse
import contextlib
import os
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from shoal.node import flags, shipped

if TYPE_CHECKING:
    from shoal.node.status import Status
    from shoal.node.swarm import Plan, Summary, Swarm

INTERVAL = 1.0
"""Seconds between looks …"""
SHORT = 0.25
"""… and while nothing but a measure is waited for."""
PLAIN_INTERVAL = 5.0
"""Seconds between lines where there is no terminal."""
METERING = 1.2
"""Seconds that a daemon's count of bytes may lag behind."""
SETTLING = 60.0
"""Seconds after the last turn in which all must come to one model."""
MEASURING = 120.0
"""Seconds that the daemons may take to measure the model they ended with."""


def register(subparsers: flags.Subparsers) -> None:
    """Add the command."""
    parser = flags.command(
        subparsers,
        "swarm",
        "Start a swarm of real daemons on this machine and watch it train; exit code 1 if they "
        "do not end with one identical model.",
        run,
    )
    parser.add_argument(
        "run_file",
        nargs="?",
        default="text",
        metavar="RUN.toml",
        help="what to train: a run file, or a shipped one by name (default: text): "
        + ", ".join(shipped.names()),
    )
    parser.add_argument("--peers", type=flags.positive, default=4, metavar="N")
    flags.add_preset(parser)
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--turns", type=flags.positive, metavar="T", help="turns of every peer")
    length.add_argument(
        "--minutes", type=flags.positive_float, metavar="M", help="pause all after so long"
    )
    parser.add_argument(
        "--baseline", action="store_true", help="afterwards train one peer alone, for comparison"
    )
    parser.add_argument(
        "--dir", type=Path, metavar="DIR", help="new directory for all (default: swarm-NAME)"
    )
    parser.add_argument("--secret", action="store_true", help="admit only who has a secret file")
    parser.add_argument(
        "--host", default="127.0.0.1", help="listen here; 0.0.0.0 lets other machines join"
    )
    parser.add_argument(
        "--data", metavar="PATH", help="folder or file to train on (default: the task's own)"
    )
    flags.add_base(parser)
    parser.add_argument("--device", help="of every worker: cpu or cuda")
    flags.add_device_memory(parser)
    parser.add_argument("--allow-task", metavar="PACKAGE.MODULE:FACTORY", help="a task of yours")
    parser.add_argument(
        "--timeout", type=flags.positive_float, metavar="SECONDS", help="give up after so long"
    )


def run(args: argparse.Namespace) -> int:
    """Start it, watch it, end it, say what came of it."""
    from shoal.node.swarm import Swarm

    plan = make_plan(args)
    try:
        with _terminating_is_interrupting(), Swarm(plan) as swarm:
            print(f"{plan.peers} daemons in {plan.directory}", flush=True)
            join = _started(swarm)
            print(f"join from another terminal:\n  {join_command(plan, join)}\n", flush=True)
            rows, before, elapsed = _train(args, swarm)
            model = _export(swarm)
    except KeyboardInterrupt:
        print(f"stopped; go on with any of them: {shoal()} start {plan.directory}/peer-1")
        raise
    if not any(rows):
        print(f"no daemon answers; the logs say why: {plan.directory}/peer-1.log")
        return 1
    return _conclude(plan, model, summarize(args, plan, model, rows, before, elapsed))


def _started(swarm: "Swarm") -> str:
    """Start all; what is left of a run that could not even be founded is removed."""
    from shoal.node.errors import ConfigError

    try:
        return swarm.start()
    except ConfigError:
        if swarm.unfounded():
            shutil.rmtree(swarm.plan.directory, ignore_errors=True)
        raise


def make_plan(args: argparse.Namespace) -> "Plan":
    """Read the run file and, if it can be one, make the directory."""
    from shoal.node import swarm
    from shoal.node.config import RunFile
    from shoal.node.errors import ConfigError

    if args.peers > swarm.PEERS:
        raise ConfigError(
            f"--peers {args.peers} is more than {swarm.PEERS}, too many for one machine; "
            "`shoal simulate` takes thousands"
        )
    given = swarm.read_run(args.run_file)
    adapted = swarm.adapt(
        given, peers=args.peers, turns=args.turns, secret=args.secret, preset=args.preset
    )
    RunFile.parse(adapted, where=args.run_file)
    directory = swarm.new_directory(args.dir, run_name(given))
    return swarm.Plan(
        run=adapted,
        directory=directory,
        peers=args.peers,
        threads=swarm.threads_each(len(os.sched_getaffinity(0)), args.peers),
        host=args.host,
        secret=_make_secret(directory) if args.secret else None,
        extra=passed_on(args),
    )


def run_name(run: dict[str, Any]) -> str:
    """Return the run's name, if it has one that can be a file's name; the daemon will complain."""
    table = run.get("run")
    name = table.get("name") if isinstance(table, dict) else None
    return name if isinstance(name, str) and "/" not in name else "run"


def passed_on(args: argparse.Namespace) -> tuple[str, ...]:
    """Return the flags that every daemon gets as they are."""
    from shoal.node.config import absolute_base

    found: list[str] = []
    for name in ("data", "base", "device", "device_memory", "allow_task"):
        value = getattr(args, name)
        if value is not None:
            value = os.path.abspath(value) if name == "data" else value
            value = absolute_base(value) if name == "base" else value
            found += [f"--{name.replace('_', '-')}", value]
    return tuple(found)


def join_command(plan: "Plan", join: str) -> str:
    """Return what to type elsewhere to take part."""
    words = [shoal(), "join", join]
    if plan.secret is not None:
        words += ["--secret-file", str(plan.secret)]
    for flag, value in pairwise(plan.extra):
        if flag in ("--data", "--base", "--allow-task"):
            words += [flag, value]
    return shlex.join(words)


def shoal() -> str:
    """Return how this `shoal` is called from another terminal, where no .venv may be active."""
    installed = Path(sys.executable).with_name("shoal")
    return str(installed) if installed.exists() and shutil.which("shoal") is None else "shoal"


def _make_secret(directory: Path) -> Path:
    from shoal.node import admission

    admission.create_secret(directory / "secret")
    return directory / "secret"


@contextlib.contextmanager
def _terminating_is_interrupting() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end the swarm as cleanly as Ctrl-C does."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = {s: signal.signal(s, interrupt) for s in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# ---------------------------------------------------------------- while it runs


class Screen(Protocol):
    """Where the state of things is shown."""

    def show(self, rows: "list[Status | None]", elapsed: float) -> None:
        """Show it now, or leave it out if it was shown just before."""

    def say(self, text: str) -> None:
        """Say one line that stays."""


Rows = "list[Status | None]"


def _train(
    args: argparse.Namespace, swarm: "Swarm"
) -> "tuple[list[Status | None], float | None, float]":
    """Watch until all are done and hold one model. Return the last look and what it began with."""
    with _screen() as screen:
        rows = _known_at_first(swarm)
        before = first_evaluation(rows)
        swarm.begin()
        begun = time.monotonic()
        deadline = begun + 60 * args.minutes if args.minutes else None
        give_up = begun + args.timeout if args.timeout else None
        settled_by: float | None = None
        while not (settled_by and (_one_model(rows) or time.monotonic() > settled_by)):
            time.sleep(INTERVAL)
            now = time.monotonic()
            rows = swarm.look()
            screen.show(rows, now - begun)
            for child in swarm.newly_dead():
                screen.say(child.epitaph())
            if not swarm.living() or (give_up and now > give_up):
                screen.say("nobody is left" if not swarm.living() else "out of time")
                break
            if deadline and now > deadline:
                swarm.pause()
                deadline = None
            if settled_by is None and _all_done(rows, timed=bool(args.minutes)):
                settled_by = now + SETTLING
        elapsed = time.monotonic() - begun
        one = _one_model(rows)
        # The daemons look at their sockets once a second: let the last bytes be counted.
        time.sleep(METERING)
        rows = last_known(rows, swarm)
        if settled_by:
            rows = _measured(swarm, rows, screen, elapsed, one=one)
    return rows, before, elapsed


def _known_at_first(swarm: "Swarm") -> "list[Status | None]":
    """Wait until one has measured the model that all begin with; return the last look at them."""
    rows = swarm.look()
    patience = time.monotonic() + MEASURING
    while not any(s is not None and s.measured for s in rows) and time.monotonic() < patience:
        if not any(s is not None and s.worker.pid is not None for s in rows):
            break
        time.sleep(SHORT)
        rows = swarm.look()
    return rows


def _measured(
    swarm: "Swarm", rows: "list[Status | None]", screen: Screen, elapsed: float, *, one: bool
) -> "list[Status | None]":
    """Wait until the daemons have measured what they ended with; return the last look at them."""
    from shoal.node.swarm import measured

    patience = time.monotonic() + MEASURING
    # After a pause a last turn may still be on its way, and what was one model be it again later.
    while not (measured(rows) and _one_model(rows) >= one) and time.monotonic() < patience:
        if not swarm.living():
            break
        time.sleep(SHORT)
        rows = last_known(rows, swarm)
        screen.show(rows, elapsed)
    return rows


def last_known(rows: "list[Status | None]", swarm: "Swarm") -> "list[Status | None]":
    """Look again: who is silent for a moment is as it was, who has ended is not there."""
    later = swarm.look()
    living = {child.index for child in swarm.living()}
    looks = enumerate(zip(rows, later, strict=True))
    return [old if new is None and place in living else new for place, (old, new) in looks]


def first_evaluation(rows: "list[Status | None]") -> float | None:
    """Return the held-out measure with which all begin, by the look that they end with."""
    return next((s.evaluation for s in rows if s is not None and s.measured), None)


def _all_done(rows: "list[Status | None]", *, timed: bool) -> bool:
    from shoal.node import swarm
    from shoal.node.status import State

    done = {State.FINISHED, State.DEGRADED, State.DIVERGED}
    return swarm.finished(rows, frozenset(done | ({State.PAUSED} if timed else set())))


def _one_model(rows: "list[Status | None]") -> bool:
    from shoal.node import swarm

    return swarm.one_model(rows)


@contextlib.contextmanager
def _screen() -> Iterator[Screen]:
    if not sys.stdout.isatty():
        yield PlainScreen()
        return
    from rich.console import Console
    from rich.live import Live

    with Live(console=Console(), auto_refresh=False) as live:
        yield LiveScreen(live)


class PlainScreen:
    """One line every few seconds."""

    def __init__(self) -> None:
        self._last = -PLAIN_INTERVAL

    def show(self, rows: "list[Status | None]", elapsed: float) -> None:
        """Print a line if it is time for one."""
        from shoal.node import table

        if elapsed - self._last >= PLAIN_INTERVAL:
            self._last = elapsed
            print(table.line(rows, unit_of(rows), elapsed), flush=True)

    def say(self, text: str) -> None:
        """Print it."""
        print(text, flush=True)


class LiveScreen:
    """A table that is drawn anew in place."""

    def __init__(self, live: Any) -> None:
        self._live = live

    def show(self, rows: "list[Status | None]", elapsed: float) -> None:
        """Draw the table."""
        from shoal.node import table

        footer = [f"{table.seconds(elapsed)} · Ctrl-C leaves cleanly"]
        self._live.update(table.daemons(rows, unit_of(rows), footer), refresh=True)

    def say(self, text: str) -> None:
        """Print it above the table."""
        self._live.console.print(text, markup=False, highlight=False)


def unit_of(rows: "list[Status | None]") -> str:
    """Return the unit of the held-out measure, once somebody knows it."""
    return next((status.unit for status in rows if status is not None and status.unit), "")


# ---------------------------------------------------------------- at the end


def _export(swarm: "Swarm") -> Path | None:
    """Let the first peer that can write the model; None when none can."""
    from shoal.node.errors import ConfigError

    target = swarm.plan.directory / "model.safetensors"
    for child in swarm.living():
        try:
            child.call("export", {"path": str(target)})
        except ConfigError:
            continue  # its worker is gone; the next one holds the same model
        return target
    return None


def summarize(
    args: argparse.Namespace,
    plan: "Plan",
    model: Path | None,
    rows: "list[Status | None]",
    before: float | None,
    elapsed: float,
) -> "Summary":
    """Return the summary; with --baseline, train one peer alone first."""
    from shoal.node import alone, swarm

    summary = swarm.summarize(rows, before=before, alone=None, seconds=elapsed)
    if not args.baseline:
        return summary
    print("training one peer alone on its shard, for comparison …", flush=True)
    measured, together = alone.compare(
        plan.run_file,
        peers=plan.peers,
        steps=round(summary.steps),
        turns=max((status.turn for status in rows if status is not None), default=0),
        threads=plan.threads,
        extra=plan.extra,
        model=model,
    )
    return replace(summary, alone=measured, after=summary.after if together is None else together)


def _conclude(plan: "Plan", model: Path | None, summary: "Summary") -> int:
    _write(plan.directory / "summary.json", summary)
    print("\n".join(report(summary)))
    if model is not None:
        print(f"the model: {model}")
    print(f"go on with any of them: {shoal()} start {plan.directory}/peer-1")
    return 0 if summary.equal and summary.answering == summary.peers else 1


def _write(path: Path, summary: "Summary") -> None:
    import msgspec

    path.write_bytes(msgspec.json.format(msgspec.json.encode(summary)))


def report(summary: "Summary") -> list[str]:
    """Return the summary as lines for people."""
    from shoal.node import table

    unit = summary.unit or "held out"
    lines = [
        "",
        f"{summary.run}: {summary.peers} peers, {summary.steps:.0f} steps a peer "
        f"in {table.seconds(summary.seconds)}",
        f"  {unit}: {table.number(summary.before)} before, {table.number(summary.after)} after",
    ]
    if summary.alone is not None and summary.after is not None:
        gain = summary.alone - summary.after
        lines.append(
            f"  one peer alone on its shard: {table.number(summary.alone)} "
            f"(together {table.number(abs(gain))} {'lower' if gain >= 0 else 'higher'})"
        )
    lines += [
        f"  sent per peer: {table.size(summary.sent)} on the sockets; float32 gradient "
        f"all-reduce: {table.size(summary.reference)}; {_saving(summary.fewer)} "
        f"({table.times(summary.fewer_by_payload)} by payloads alone)",
        f"  fingerprints: {_verdict(summary)}",
    ]
    return lines


def _saving(fewer: float | None) -> str:
    """Say how much less was sent; of a tiny model, how much more."""
    from shoal.node import table

    if fewer and fewer < 1:
        return f"{table.times(1 / fewer)} more"
    return f"{table.times(fewer)} fewer"


def _verdict(summary: "Summary") -> str:
    if summary.answering < summary.peers:
        gone = summary.peers - summary.answering
        rest = "the others are equal"
        if not summary.equal:
            rest = "the others DIFFER" if summary.differ else "the others were not yet at one"
        return f"{gone} of {summary.peers} peers did not answer at the end; {rest}"
    if summary.differ:
        return "they DIFFER: this must not happen; please report it with the directory's logs"
    if not summary.equal:
        return "not comparable: at the end not all held the same updates, and a model"
    return f"all {summary.peers} equal ({summary.fingerprint})"
