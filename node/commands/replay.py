"""`shoal replay`: check a log, rebuild the model from it, and compare."""

import argparse
from collections.abc import Iterator
from typing import TYPE_CHECKING

from shoal.node import flags

if TYPE_CHECKING:
    from shoal.node.replay import Result

SHOWN = 10
"""Lines of one kind that are printed; --json has them all."""


def register(subparsers: flags.Subparsers) -> None:
    """Add the command."""
    parser = flags.command(
        subparsers,
        "replay",
        "Check every signature, payload and number of a directory's log, rebuild the model from "
        "the initial one, and compare it with the daemon that runs there and with the last "
        "checkpoint. Only reads. Exit code 1 if something is wrong or does not agree.",
        run,
    )
    flags.add_directory(parser)
    parser.add_argument(
        "--shuffle", type=int, metavar="SEED", help="add the updates in a random order"
    )
    parser.add_argument(
        "--batch",
        type=flags.positive,
        default=0,
        metavar="N",
        help="hold so many updates in memory at once (default: 512, or 32 MiB of payload)",
    )
    parser.add_argument("--threads", type=flags.positive, default=0, metavar="N")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument(
        "--evaluate", action="store_true", help="measure the model on held-out data"
    )
    parser.add_argument(
        "--data",
        default="",
        metavar="PATH",
        help="with --evaluate: folder or file with that data (default: the daemon's)",
    )
    flags.add_base(parser)
    parser.add_argument(
        "--allow-task",
        default="",
        metavar="PACKAGE.MODULE:FACTORY",
        help="let the run use this task (default: what the daemon was allowed)",
    )
    parser.add_argument("--json", action="store_true", help="print one object")


def run(args: argparse.Namespace) -> int:
    """Replay and report."""
    from shoal.node import client, replay
    from shoal.node.config import absolute_base
    from shoal.node.errors import ConfigError

    if args.data and not args.evaluate:
        raise ConfigError("--data is for --evaluate; add that, or leave --data out")
    options = replay.Options(
        shuffle=args.shuffle,
        batch=args.batch,
        threads=args.threads,
        device=args.device,
        evaluate=args.evaluate,
        data=args.data,
        base=absolute_base(args.base) if args.base else "",
        allow_task=args.allow_task,
    )
    result = replay.replay(client.find(args.dir), options)
    if args.json:
        print(result.to_json())
    else:
        print("\n".join(lines(result)))
    return 0 if result.agrees else 1


def lines(result: "Result") -> Iterator[str]:
    """Yield the report, for people."""
    yield f"run       {result.name} {result.run}, {result.parameters} parameters"
    first, last = result.turns
    turns = f", turns {first} to {last}" if last else ""
    yield (
        f"log       {result.updates} updates of {result.authors} authors{turns}; "
        f"{_size(result.log_bytes)} in "
        f"{result.segments} {'file' if result.segments == 1 else 'files'}, "
        f"{_size(result.payload_bytes)} of them payloads"
    )
    if result.running:
        yield "daemon    runs: its log is read without its lock, and is not changed"
    yield (
        f"checked   {result.signatures} signatures and ids, every payload's hash, numbers and "
        f"running hashes in {result.examined_in:.2f} s"
    )
    yield from _some("closed", result.closed)
    yield from _some("note", result.notes)
    yield (
        f"rebuilt   in {result.rebuilt_in:.2f} s: {result.updates_per_second:.3g} updates/s "
        f"({result.order}, batches of {result.batch}, {result.device}, {result.threads} threads)"
    )
    refused = ", ".join(f"{rule} {count}" for rule, count in sorted(result.refused.items()))
    if refused:
        yield f"refused   {sum(result.refused.values())} updates count zero: {refused}"
        yield from _some("refused", result.refused_examples)
    if result.out_of_range:
        yield f"note      {result.out_of_range} values out of range: the training diverged"
    yield f"model     fingerprint {result.fingerprint} at frontier {result.frontier}"
    if result.evaluation is not None:
        yield f"held out  {result.evaluation:.4f} {result.unit}".rstrip()
    for each in result.compared:
        word = {True: "agrees", False: "DIFFERS", None: "unknown"}[each.agrees]
        yield f"{word:9} {each.who} {each.text}"
    if not result.compared:
        yield "unknown   no daemon runs there and there is no checkpoint: nothing to compare with"
    yield from _some("WRONG", [str(wrong) for wrong in result.wrong])


def _some(word: str, texts: list[str]) -> Iterator[str]:
    for text in texts[:SHOWN]:
        yield f"{word:9} {text}"
    if len(texts) > SHOWN:
        yield f"{word:9} … and {len(texts) - SHOWN} more"


def _size(count: int) -> str:
    value, unit = float(count), "bytes"
    for larger in ("kB", "MB", "GB"):
        if value < 1000:
            break
        value, unit = value / 1000, larger
    return f"{value:.0f} {unit}" if unit == "bytes" else f"{value:.1f} {unit}"
