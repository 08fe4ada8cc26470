"""`shoal start`: found a run from its file, or resume what a directory holds."""

import argparse
from pathlib import Path

from shoal.node import flags


def register(subparsers: flags.Subparsers) -> None:
    """Add the command."""
    parser = flags.command(
        subparsers,
        "start",
        "Found a run (RUN.toml), or resume the one that a directory holds (DIR). The daemon runs "
        "in the foreground and prints the address by which others can join.",
        run,
    )
    parser.add_argument("target", type=Path, metavar="RUN.toml|DIR")
    parser.add_argument(
        "--new", action="store_true", help="move the old directory aside and found another run"
    )
    flags.add_peer(parser)


def run(args: argparse.Namespace) -> int:
    """Serve until the daemon is stopped."""
    from shoal.node import foreground

    return foreground.serve(args, target=args.target)
