"""`shoal doctor`: what is wrong with this machine, and what a run would cost on it."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from shoal.node import flags

if TYPE_CHECKING:
    from shoal.node.checkup import Finding


def register(subparsers: flags.Subparsers) -> None:
    """Add the command."""
    parser = flags.command(
        subparsers,
        "doctor",
        "Say what is wrong with this machine, one line each with the remedy; exit code 1 if "
        "something is. With a run file or a directory, also try one turn and estimate traffic.",
        run,
    )
    parser.add_argument(
        "target",
        nargs="?",
        type=Path,
        metavar="RUN.toml|DIR",
        help="also look at this run, or at a shipped one by name (default: the machine alone)",
    )
    parser.add_argument(
        "--peers",
        type=flags.positive,
        default=0,
        metavar="N",
        help="estimate for so many peers (default: the run's min_peers)",
    )
    parser.add_argument("--listen", type=flags.endpoint, metavar="HOST:PORT")
    parser.add_argument("--identity", type=Path, metavar="FILE", help="also look at this key file")
    parser.add_argument("--data", metavar="PATH", help="folder or file to train on")
    flags.add_base(parser)
    parser.add_argument("--device", help="cpu or cuda (default: cuda if there is one)")
    parser.add_argument(
        "--allow-task", metavar="PACKAGE.MODULE:FACTORY", help="let the run file use this task"
    )
    parser.add_argument(
        "--json", action="store_true", help="print one object {ok, findings, estimate}"
    )


def run(args: argparse.Namespace) -> int:
    """Examine and report."""
    from shoal.node import checkup

    given = {k: v for k, v in vars(args).items() if k != "target"}
    findings, estimate = checkup.examine(checkup.subject(args.target, given, args.peers))
    if args.json:
        print(checkup.to_json(findings, estimate))
    else:
        for finding in findings:
            print(line(finding))
    return int(any(f.state == checkup.PROBLEM for f in findings))


def line(finding: "Finding") -> str:
    """Return a finding as one line."""
    text = " ".join(f"{finding.name}: {finding.text}".split())
    remedy = f" -> {finding.remedy}" if finding.remedy else ""
    return f"{finding.state:8} {text}{remedy}"
