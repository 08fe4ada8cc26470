"""`shoal bench`: run a benchmark of node/bench/ and print its ratios against yardsticks."""

import argparse
import pkgutil

from shoal.node import flags


def register(subparsers: flags.Subparsers) -> None:
    """Add the command."""
    parser = flags.command(subparsers, "bench", "Measure something; without a name: list.", run)
    parser.add_argument("name", nargs="?", metavar="NAME")
    parser.add_argument(
        "--json", action="store_true", help="print one object {bench, machine, rows}"
    )


def run(args: argparse.Namespace) -> int:
    """Run it."""
    import importlib

    from shoal.node.errors import ConfigError

    if args.name is None:
        print("\n".join(names()) or "there are no benchmarks here")
        return 0
    if args.name not in names():
        raise ConfigError(f"there is no benchmark {args.name!r}; known: {', '.join(names())}")
    code: int | None = importlib.import_module(f"shoal.node.bench.{args.name}").run(args.json)
    return code or 0


def names() -> list[str]:
    """Return the benchmarks there are."""
    from shoal.node import bench

    found = pkgutil.iter_modules(bench.__path__)
    return sorted(module.name for module in found if not module.name.startswith("_"))
