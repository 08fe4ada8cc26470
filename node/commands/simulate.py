"""`shoal simulate`: many peers in one process, on a simulated network with a seed."""

import argparse
from typing import TYPE_CHECKING, Any

from shoal.node import flags, shipped

if TYPE_CHECKING:
    from shoal.node.simulation.simulator import Simulator

HORIZON = 1e6
"""Simulated seconds after which a simulation that does not end is given up."""


def register(subparsers: flags.Subparsers) -> None:
    """Add the command."""
    parser = flags.command(
        subparsers,
        "simulate",
        "Train a run with many peers in this process: the same core, codecs and ledger, on a "
        "simulated network. The same seed gives the same trace. Exit code 1 if the peers do not "
        "end with one identical model.",
        run,
    )
    parser.add_argument(
        "run_file",
        metavar="RUN.toml",
        help=f"a run file, or a shipped one by name: {', '.join(shipped.names())}",
    )
    parser.add_argument("--peers", type=flags.positive, default=8, metavar="N")
    flags.add_preset(parser)
    parser.add_argument("--turns", type=flags.positive, metavar="T", help="turns of every peer")
    parser.add_argument("--seed", type=int, default=0, help="of network and timing (default: 0)")
    parser.add_argument(
        "--loss", type=_share, default=0.0, metavar="P", help="share of messages lost, 0 to 0.9"
    )
    parser.add_argument("--fake", action="store_true", help="random updates, no training")
    parser.add_argument("--data", metavar="PATH", help="folder or file to train on")
    flags.add_base(parser)
    parser.add_argument("--allow-task", metavar="PACKAGE.MODULE:FACTORY", help="a task of yours")
    parser.add_argument("--json", action="store_true", help="print the summary as one object")


def _share(text: str) -> float:
    from shoal.node.errors import ConfigError

    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 0.9:
        raise ConfigError(f"--loss {text} is not a share from 0 to 0.9")
    return value


def run(args: argparse.Namespace) -> int:
    """Simulate it."""
    import json

    from shoal.node.errors import ConfigError
    from shoal.node.swarm import adapt, read_run

    given = read_run(args.run_file)
    tables = adapt(given, peers=args.peers, turns=args.turns, preset=args.preset)
    if not tables["run"].get("turns"):
        raise ConfigError(f"{args.run_file} goes on for ever; say where to stop: --turns 10")
    simulator = _make(args, tables)
    before = _measure(simulator)
    ended = _watch(simulator, quiet=args.json)
    summary = summarize(simulator, before, ended=ended)
    print(json.dumps(summary) if args.json else "\n".join(report(summary)))
    return 0 if summary["equal"] else 1


def _make(args: argparse.Namespace, tables: dict[str, Any]) -> "Simulator":
    from shoal.node.simulation.faults import Network
    from shoal.node.simulation.simulator import Simulator
    from shoal.node.simulation.workers import fake_run

    network = Network(loss=args.loss)
    if args.fake:
        _check(tables, args.allow_task)
        turns = tables["run"]["turns"]
        return Simulator(args.peers, fake_run(turns=turns), seed=args.seed, network=network)
    from shoal.node import rehearsal

    return rehearsal.rehearse(
        tables,
        args.peers,
        seed=args.seed,
        network=network,
        data=args.data,
        base=args.base,
        allow_task=args.allow_task,
    )


def _check(tables: dict[str, Any], allow_task: str | None) -> None:
    """Refuse what a worker would refuse, where none reads the tables."""
    from shoal.node.errors import ConfigError
    from shoal.training.run import RunError, RunSpec

    try:
        RunSpec.parse(tables, allow_task=allow_task)
    except RunError as error:
        raise ConfigError(str(error)) from error


def _watch(simulator: "Simulator", *, quiet: bool) -> bool:
    """Let time pass until all is done, a line whenever everybody is a turn further."""
    from shoal.gossip.records import Standing

    shown = 0

    def over(simulator: "Simulator") -> bool:
        nonlocal shown
        turn = min((peer.core.turns.next - 1 for peer in simulator.living()), default=0)
        if turn > shown and not quiet:
            shown = turn
            print(_line(simulator, turn), flush=True)
        standing = {peer.core.membership.standing for peer in simulator.living()}
        return standing == {Standing.FINISHED} and simulator.converged()

    return simulator.run(HORIZON, over)


def _line(simulator: "Simulator", turn: int) -> str:
    from shoal.node import table

    measured = _means(simulator)
    return (
        f"{table.seconds(simulator.now):>9}  turn {turn}  loss {table.number(measured['loss'])}  "
        f"held out {table.number(measured['evaluation'])}  {simulator.messages} messages"
    )


def _means(simulator: "Simulator") -> dict[str, float | None]:
    """Return means over the peers of what their workers said last; None for fake ones."""
    from shoal.node.status import known

    reports = [getattr(peer.worker, "last", None) for peer in simulator.living()]
    answer: dict[str, float | None] = {}
    for name in ("loss", "evaluation"):
        values = [known(getattr(report, name)) for report in reports if report is not None]
        numbers = [value for value in values if value is not None]
        answer[name] = sum(numbers) / len(numbers) if numbers else None
    return answer


def _measure(simulator: "Simulator") -> float | None:
    """Return the measure of the model that all hold, before or after; None for fake workers."""
    from shoal.node.status import known

    worker: Any = simulator.living()[0].worker
    return known(worker.evaluate()) if hasattr(worker, "evaluate") else None


def summarize(simulator: "Simulator", before: float | None, *, ended: bool) -> dict[str, Any]:
    """Return what came of it; `before` is what `_measure` said of the initial model."""
    living = simulator.living()
    models = {(peer.core.frontier.hash, peer.worker.fingerprint()) for peer in living}
    return {
        "peers": len(living),
        "ended": ended,
        "equal": ended and len(models) == 1,
        "updates": sum(count for _, count in living[0].core.frontier.counts()),
        "simulated_seconds": simulator.now,
        "messages": simulator.messages,
        "message_bytes": simulator.message_bytes,
        "published_bytes": _published(simulator),
        "first_evaluation": before,
        "loss": _means(simulator)["loss"],
        "evaluation": _measure(simulator),
        "seed": simulator.seed,
        "trace": simulator.trace(),
    }


def _published(simulator: "Simulator") -> int | None:
    """Return the payload bytes of all peers; None for fake workers, whose updates say nothing."""
    workers: list[Any] = [peer.worker for peer in simulator.living()]
    sizes = [worker.published for worker in workers if hasattr(worker, "published")]
    return sum(sizes) if sizes else None


def report(summary: dict[str, Any]) -> list[str]:
    """Return the summary as lines for people."""
    from shoal.node import table

    verdict = "all equal" if summary["equal"] else "they DIFFER, or not all peers came to the end"
    lines = [
        "",
        f"{summary['peers']} peers, {summary['updates']} updates "
        f"in {table.seconds(summary['simulated_seconds'])} of simulated time",
    ]
    if summary["evaluation"] is not None:
        first = table.number(summary["first_evaluation"])
        lines.append(f"  held out: {first} before, {table.number(summary['evaluation'])} after")
    size = table.size(summary["message_bytes"])
    records = f"{summary['messages']} messages with {size} of records"
    if summary["published_bytes"] is not None:
        records += f", payloads of {table.size(summary['published_bytes'])} published"
    return [
        *lines,
        f"  {records}",
        f"  fingerprints: {verdict}",
        f"  trace of seed {summary['seed']}: {summary['trace']}",
    ]
