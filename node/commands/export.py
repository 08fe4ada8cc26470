"""`shoal export`: write the shared model as safetensors."""

import argparse
from pathlib import Path

from shoal.node import flags


def register(subparsers: flags.Subparsers) -> None:
    """Add the command."""
    parser = flags.command(
        subparsers,
        "export",
        "Write the shared model as safetensors, with the run file as metadata: of the running "
        "daemon, or of a directory whose daemon is stopped.",
        run,
    )
    parser.add_argument("file", type=Path, metavar="FILE.safetensors")
    flags.add_directory(parser)


def run(args: argparse.Namespace) -> int:
    """Write it."""
    from shoal.node import client, offline
    from shoal.node.errors import ConfigError

    target = args.file.absolute()
    if not target.parent.is_dir():
        raise ConfigError(f"{target.parent} is not a directory; make it first")
    directory = client.find(args.dir)
    daemon = client.connect_if_running(directory)
    if daemon is not None:
        daemon.post("export", {"path": str(target)})
    else:
        offline.export(directory, target)
    print(target)
    return 0
