"""`shoal bench`: run a benchmark of node/bench/ and print its ratios against yardsticks.

A benchmark is one file with `register(parser)`, which adds its own flags, and `run(args)`, which
returns the exit code. Only the benchmark that is asked for is imported.
"""

import argparse
import pkgutil
from types import ModuleType

from shoal.node import flags


def register(subparsers: flags.Subparsers) -> None:
    """Add the command."""
    parser = flags.command(subparsers, "bench", "Measure something; without a name: list.", run)
    parser.add_argument("name", nargs="?", metavar="NAME")
    parser.add_argument(
        "options",
        nargs=argparse.REMAINDER,
        metavar="OPTION …",
        help="the benchmark's own; `shoal bench NAME --help` lists them",
    )


def run(args: argparse.Namespace) -> int:
    """Run it."""
    if args.name is None:
        print("\n".join(names()) or "there are no benchmarks here")
        return 0
    module = _find(args.name)
    parser = type(args.parser)(
        prog=f"{args.parser.prog} {args.name}",
        description=(module.__doc__ or "").partition("\n\n")[0],
        allow_abbrev=False,
    )
    module.register(parser)
    code: int = module.run(parser.parse_args(args.options))
    return code


def names() -> list[str]:
    """Return the benchmarks there are."""
    from shoal.node import bench

    found = pkgutil.iter_modules(bench.__path__)
    return sorted(module.name for module in found if not module.name.startswith("_"))


def _find(name: str) -> ModuleType:
    import importlib

    from shoal.node.errors import ConfigError

    if name not in names():
        raise ConfigError(f"there is no benchmark {name!r}; known: {', '.join(names())}")
    return importlib.import_module(f"shoal.node.bench.{name}")
