"""`shoal resume`: train again."""

import argparse

from shoal.node import flags


def register(subparsers: flags.Subparsers) -> None:
    """Add the command."""
    summary = "Train again after `shoal pause`."
    flags.add_directory(flags.command(subparsers, "resume", summary, run))


def run(args: argparse.Namespace) -> int:
    """Ask the daemon."""
    from shoal.node import client

    client.connect(client.find(args.dir)).post("resume")
    print("resumed")
    return 0
