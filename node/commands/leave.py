"""`shoal leave`: say good-bye and stop the daemon."""

import argparse
import sys

from shoal.node import flags

ENDING = 40.0
"""Seconds that the daemon may take to end: its worker finishes the step it is at, and writes."""


def register(subparsers: flags.Subparsers) -> None:
    """Add the command."""
    summary = "Say good-bye and stop the daemon, as Ctrl-C does; `shoal start DIR` brings it back."
    flags.add_directory(flags.command(subparsers, "leave", summary, run))


def run(args: argparse.Namespace) -> int:
    """Ask the daemon, and wait until it is gone: then its directory can be started again."""
    from shoal.node import client, home
    from shoal.node.errors import ConfigError

    directory = client.find(args.dir)
    daemon = client.connect(directory)
    for warning in daemon.status().warnings:
        if "in memory only" in warning:  # it tries once more, and says so if that is in vain
            print(f"warning: {warning}", file=sys.stderr)
    daemon.post("leave")
    if not home.wait_until_free(directory, ENDING):
        raise ConfigError(
            f"the daemon in {directory} has left the swarm but not ended within {ENDING:g} s; its "
            f"pid is in {directory}/status.json"
        )
    print("left")
    return 0
