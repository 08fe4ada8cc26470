"""`--sizes 1M,10M`: of how many parameters a benchmark makes its models."""

import argparse

from shoal.node.errors import ConfigError


def add_sizes(parser: argparse.ArgumentParser) -> None:
    """Add the flag."""
    parser.add_argument(
        "--sizes", default="1M,10M", metavar="N,…", help="parameters (default: 1M,10M)"
    )


def parse_sizes(text: str) -> list[int]:
    """Read "1M,10M" or plain numbers."""
    found = []
    for word in text.split(","):
        factor = {"k": 1_000, "M": 1_000_000, "G": 1_000_000_000}.get(word[-1:], 1)
        try:
            size = int(float(word[:-1] if factor > 1 else word) * factor)
        except ValueError:
            size = 0
        if not 0 < size < 1 << 31:
            raise ConfigError(f"--sizes {text}: {word!r} is no size; say 1M,10M")
        found.append(size)
    return found
