"""`shoal status`: the swarm as one peer sees it, once or live, as a table or as JSON."""

import argparse
import sys
import time
from typing import TYPE_CHECKING

from shoal.node import flags

if TYPE_CHECKING:
    from shoal.node.client import Client

INTERVAL = 1.0
"""Seconds between looks of --watch."""


def register(subparsers: flags.Subparsers) -> None:
    """Add the command."""
    parser = flags.command(subparsers, "status", "Show the swarm as this peer sees it.", run)
    flags.add_directory(parser)
    parser.add_argument("--watch", action="store_true", help="keep looking until Ctrl-C")
    parser.add_argument(
        "--json", action="store_true", help='print {"status": …, "peers": […]}, one per line'
    )


def run(args: argparse.Namespace) -> int:
    """Show it."""
    from shoal.node import client

    daemon = client.connect(client.find(args.dir))
    if args.json:
        show = _print_json
    elif args.watch and sys.stdout.isatty():
        return _watch(daemon)
    else:
        show = _print_table
    show(daemon)
    while args.watch:
        time.sleep(INTERVAL)
        show(daemon)
    return 0


def _print_json(daemon: "Client") -> None:
    import msgspec

    both = {"status": daemon.status(), "peers": daemon.peers()}
    print(msgspec.json.encode(both).decode(), flush=True)


def _print_table(daemon: "Client") -> None:
    from rich.console import Console

    from shoal.node import table

    console = Console()
    for part in table.overview(daemon.status(), daemon.peers()):
        console.print(part, soft_wrap=True)  # a join address stays one line, to be copied


def _watch(daemon: "Client") -> int:
    from rich.console import Console, Group
    from rich.live import Live

    from shoal.node import table

    with Live(console=Console(), auto_refresh=False) as live:
        while True:
            parts = table.overview(daemon.status(), daemon.peers())
            live.update(Group(*parts), refresh=True)
            time.sleep(INTERVAL)
