"""`shoal pause`: stop training, go on serving."""

import argparse

from shoal.node import flags


def register(subparsers: flags.Subparsers) -> None:
    """Add the command."""
    summary = "Stop training and go on serving; `shoal resume` goes on."
    flags.add_directory(flags.command(subparsers, "pause", summary, run))


def run(args: argparse.Namespace) -> int:
    """Ask the daemon."""
    from shoal.node import client

    client.connect(client.find(args.dir)).post("pause")
    print("paused: a turn under way still ends; the daemon goes on serving")
    return 0
