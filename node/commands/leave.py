"""`shoal leave`: say good-bye and stop the daemon."""

import argparse

from shoal.node import flags


def register(subparsers: flags.Subparsers) -> None:
    """Add the command."""
    summary = "Say good-bye and stop the daemon, as Ctrl-C does; `shoal start DIR` brings it back."
    flags.add_directory(flags.command(subparsers, "leave", summary, run))


def run(args: argparse.Namespace) -> int:
    """Ask the daemon."""
    from shoal.node import client

    client.connect(client.find(args.dir)).post("leave")
    print("left")
    return 0
