"""Flags that several commands share, and how their values are read."""

import argparse
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from shoal.node.errors import ConfigError

Subparsers = Any  # argparse's own class for this is private and generic in its parser
Run = Callable[[argparse.Namespace], int]

PORT = 7464


def command(subparsers: Subparsers, name: str, summary: str, run: Run) -> argparse.ArgumentParser:
    """Add a command; `run(args)` returns its exit code."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        name, help=summary, description=summary, allow_abbrev=False
    )
    parser.set_defaults(run=run, parser=parser)
    return parser


def add_directory(parser: argparse.ArgumentParser) -> None:
    """Add DIR, by which commands find a daemon."""
    parser.add_argument(
        "dir",
        nargs="?",
        type=Path,
        metavar="DIR",
        help="the run's directory (default: this one, or the only run in it)",
    )


def add_preset(parser: argparse.ArgumentParser) -> None:
    """Add --preset, by which a published recipe takes the place of a run file's exchange."""
    from shoal.training import presets

    parser.add_argument(
        "--preset",
        type=preset,
        metavar="NAME",
        help="exchange updates as this system does, instead of as the run file says: "
        + ", ".join(presets.LEDGER),
    )


def preset(name: str) -> str:
    """Check the name of a recipe: one that the ledger can do."""
    from shoal.compression.settings import SettingError
    from shoal.training import presets

    if name in presets.LEDGER:
        return name
    try:
        method = presets.recipe(name)["exchange"]["control"]
    except SettingError as error:
        raise ConfigError(f"--preset: {error}") from error
    from shoal.training import control

    raise ConfigError(f"--preset {name} cannot be used with the ledger: {control.ledger(method)}")


def add_peer(parser: argparse.ArgumentParser) -> None:
    """Add what `start` and `join` both take: everything that is this machine's own affair."""
    parser.add_argument(
        "--dir", type=Path, metavar="DIR", help="keep identity, ledger and log here"
    )
    network = parser.add_argument_group("network")
    network.add_argument(
        "--listen",
        type=endpoint,
        metavar="HOST:PORT",
        help=f"where others dial in (default: all interfaces, port {PORT}; port 0: any free one, "
        "at later starts the same again if it can be)",
    )
    network.add_argument(
        "--advertise",
        action="append",
        default=[],
        metavar="ADDRESS",
        help="a multiaddr to tell others, such as /dns4/me.example/tcp/7464; repeatable "
        "(default: every address of this machine that is not loopback)",
    )
    network.add_argument(
        "--status",
        type=endpoint,
        metavar="HOST:PORT",
        help="where /status and /metrics are served (default: 127.0.0.1, any free port)",
    )
    network.add_argument(
        "--limits",
        choices=("lan", "wan"),
        help="time-outs for one building (lan, the default) or for home lines and oceans (wan)",
    )
    network.add_argument(
        "--libp2p",
        type=libp2p,
        metavar="off|PORT",
        help="find peers of the run by libp2p, on the local network and through --libp2p-peer, "
        "listening on all interfaces at this TCP port (default: any free one, or off where "
        "--listen names loopback); off: only by the addresses given",
    )
    network.add_argument(
        "--libp2p-peer",
        action="append",
        type=libp2p_peer,
        default=[],
        metavar="MULTIADDR",
        help="a libp2p node to look for peers through, of this run or any, such as "
        "/dns4/meet.example/tcp/4001/p2p/12D3KooW…; repeatable",
    )
    add_training(parser.add_argument_group("training"))
    trust = parser.add_argument_group("trust")
    trust.add_argument("--identity", type=Path, metavar="FILE", help="this peer's key file")
    trust.add_argument(
        "--secret-file", type=Path, metavar="FILE", help="the swarm's secret, if it has one"
    )
    trust.add_argument(
        "--allow-task",
        metavar="PACKAGE.MODULE:FACTORY",
        help="let the run file use this task of yours",
    )
    # For `shoal swarm`: end with that process.
    parser.add_argument("--parent", type=int, help=argparse.SUPPRESS)


def add_base(parser: argparse._ActionsContainer) -> None:
    """Add --base, by which a task finds the model that it starts from."""
    parser.add_argument(
        "--base",
        metavar="DIR|hf://ORG/NAME",
        help="model to start from: a Hugging Face folder; hf:// downloads it",
    )


def add_device_memory(parser: argparse._ActionsContainer) -> None:
    """Add --device-memory, for models larger than their device."""
    parser.add_argument(
        "--device-memory",
        type=size,
        metavar="SIZE",
        help="weights on the device at once, such as 2GB; the rest stays on the host "
        "(for kinds that train by forward passes alone)",
    )


def add_training(parser: argparse._ActionsContainer) -> None:
    """Add what concerns the worker."""
    parser.add_argument(
        "--data", metavar="PATH", help="folder or file to train on (default: the task's own)"
    )
    add_base(parser)
    parser.add_argument(
        "--shard",
        type=shard,
        metavar="I/N",
        help="train on part I of N of the data, counted from 0",
    )
    parser.add_argument("--device", help="cpu or cuda (default: cuda if there is one)")
    add_device_memory(parser)
    parser.add_argument("--threads", type=positive, metavar="N", help="CPU threads of the worker")
    parser.add_argument(
        "--observe", action="store_true", help="hold, verify and serve the run; never train"
    )
    parser.add_argument(
        "--paused", action="store_true", help="wait with training until `shoal resume`"
    )


def size(text: str) -> str:
    """Check a number of bytes."""
    from shoal.node.config import parse_size

    parse_size(text)
    return text


def endpoint(text: str) -> str:
    """Check HOST:PORT."""
    from shoal.node.addresses import parse_listen

    parse_listen(text)
    return text


def libp2p(text: str) -> str:
    """Check off|PORT."""
    from shoal.node.config import parse_libp2p

    parse_libp2p(text)
    return text


def libp2p_peer(text: str) -> str:
    """Check a libp2p multiaddr."""
    from shoal.node.config import check_libp2p_peer

    return check_libp2p_peer(text)


def shard(text: str) -> str:
    """Check I/N with 0 ≤ I < N."""
    from shoal.node.config import parse_shard

    parse_shard(text)
    return text


def positive(text: str) -> int:
    """Read a whole number above zero."""
    if not re.fullmatch(r"[0-9]{1,9}", text) or int(text) == 0:
        raise ConfigError(f"{text!r} is not a whole number above zero")
    return int(text)


def positive_float(text: str) -> float:
    """Read a number above zero."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1e9:
        raise ConfigError(f"{text!r} is not a number above zero")
    return value
