"""`shoal join`: fetch a run by its address and take part."""

import argparse

from shoal.node import flags


def register(subparsers: flags.Subparsers) -> None:
    """Add the command."""
    parser = flags.command(
        subparsers,
        "join",
        "Fetch a run by its join address, check it, and take part. No file is needed; "
        "`shoal start DIR` resumes it later.",
        run,
    )
    parser.add_argument(
        "addresses",
        nargs="+",
        metavar="ADDRESS",
        help="/ip4/…/tcp/…/p2p/…/run/…; several of one run: the first that answers",
    )
    parser.add_argument(
        "--whole-log",
        action="store_true",
        help="fetch every update, also where a run over a pool of seeds could begin with its sums",
    )
    flags.add_peer(parser)


def run(args: argparse.Namespace) -> int:
    """Serve until the daemon is stopped."""
    from shoal.node import foreground

    return foreground.serve(args, addresses=args.addresses)
