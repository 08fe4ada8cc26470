"""The `shoal` command: finds the commands, runs one, turns errors into one line and an exit code.

A command is one file in node/commands/ with `register(subparsers)`. Such a file imports only the
standard library at its top and the rest where it is used, so that `shoal --help` stays quick.
"""

import argparse
import difflib
import errno
import importlib
import os
import pkgutil
import re
import sys
from collections.abc import Sequence
from typing import NoReturn

from shoal.node import commands
from shoal.node.errors import ConfigError

OPERATOR = 2
"""Exit code for what the operator can mend."""
DISK = {
    errno.ENOSPC: "free some space there",
    errno.EDQUOT: "free some space there",
    errno.EROFS: "it can't be written; choose another place with --dir",
    errno.EACCES: "make it readable and writable by this user",
    errno.EPERM: "make it readable and writable by this user",
}
"""What the operator can mend about a disk, where nobody nearer to the cause knew better."""
INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells expect it."""

START = """\
first steps:
  shoal swarm --peers 4          a real swarm on this machine, in two minutes
  shoal start RUN.toml           found a run and train; prints the address to join by
  shoal join ADDRESS             take part from another machine
  shoal status --watch           who is there, how far, how well
"""


class Parser(argparse.ArgumentParser):
    """argparse, with errors of one line that name the nearest known flag or command."""

    def error(self, message: str) -> NoReturn:
        """Raise the operator's error instead of printing the usage."""
        raise ConfigError(f"{message}{self._hint(message)}; see `{self.prog} --help`")

    def _hint(self, message: str) -> str:
        known = [*self._option_string_actions]
        for action in self._actions:
            if action.choices:
                known += [str(choice) for choice in action.choices]
        for word in re.sub(r"[',:]", " ", message).split():
            near = difflib.get_close_matches(word.split("=")[0], known, n=1, cutoff=0.7)
            if near and near[0] != word and word not in known:
                return f" (did you mean {near[0]}?)"
        return ""


def build() -> argparse.ArgumentParser:
    """Return the parser with every command of node/commands/ registered."""
    parser = Parser(
        prog="shoal",
        description="Train one model on machines that nobody owns together.",
        epilog=START,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"shoal {version()}")
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True)
    for module in sorted(pkgutil.iter_modules(commands.__path__), key=lambda m: m.name):
        importlib.import_module(f"{commands.__name__}.{module.name}").register(subparsers)
    return parser


def version() -> str:
    """Return Shoal's version."""
    from importlib.metadata import version as installed

    return installed("shoal")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    try:
        parser = build()
        args, unknown = parser.parse_known_args(argv)
        if unknown:
            args.parser.error(f"unknown argument {unknown[0]}")
        code: int = args.run(args)
        sys.stdout.flush()
    except ConfigError as error:
        print("shoal: " + " ".join(str(error).split()), file=sys.stderr)
        return OPERATOR
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # The reader (`head`, `less`) has seen enough. Python would complain while flushing at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if error.errno not in DISK:
            raise
        where = error.filename or "the disk"
        print(f"shoal: {where}: {error.strerror}: {DISK[error.errno]}", file=sys.stderr)
        return OPERATOR
    return code


if __name__ == "__main__":
    sys.exit(main())
