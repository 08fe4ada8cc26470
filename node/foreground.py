"""What `start` and `join` share: read the flags, say what happens, run the daemon till it ends."""

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PLAIN = frozenset(logging.makeLogRecord({}).__dict__) | {"message", "asctime", "taskName"}
EVENT = "event_"
"""What the journal puts before an event's own numbers, lest they overwrite a record's."""
LOCAL = (
    "data",
    "base",
    "shard",
    "device",
    "device_memory",
    "threads",
    "listen",
    "advertise",
    "libp2p",
    "libp2p_peer",
    "identity",
    "secret_file",
    "allow_task",
    "observe",
    "status",
    "limits",
)
"""Flags that node.toml may hold too: fields of node/config.py's NodeConfig."""


class Lines(logging.Formatter):
    """One line per event: time, what, and its numbers as name=value."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        extra = {k.removeprefix(EVENT): v for k, v in record.__dict__.items() if k not in PLAIN}
        fields = "".join(f" {name}={_value(value)}" for name, value in extra.items())
        mark = "" if record.levelno < logging.WARNING else f"{record.levelname.lower()}: "
        line = f"{self.formatTime(record, '%H:%M:%S')} {mark}{record.getMessage()}{fields}"
        if record.exc_info:
            line += "\n" + self.formatException(record.exc_info)
        return line


def _value(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    text = str(value)
    return repr(text) if not text or " " in text else text


def log_to_stderr() -> None:
    """Let Shoal's own loggers speak; other libraries only when something is wrong."""
    handler = logging.StreamHandler()
    handler.setFormatter(Lines())
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)
    logging.getLogger("shoal").setLevel(logging.INFO)


def local(args: argparse.Namespace) -> dict[str, Any]:
    """Return the flags that override node.toml; None and () are what was not given."""
    given = {name: getattr(args, name) for name in LOCAL}
    for name in ("identity", "secret_file"):
        given[name] = None if given[name] is None else str(given[name])
    for name in ("advertise", "libp2p_peer"):
        given[name] = tuple(given[name])
    given["observe"] = given["observe"] or None
    return given


def serve(
    args: argparse.Namespace, *, target: Path | None = None, addresses: Sequence[str] = ()
) -> int:
    """Run the daemon until it is told to stop; return its exit code."""
    import asyncio

    from shoal.node import daemon, swarm

    if args.parent is not None:
        swarm.end_with_parent(args.parent)
    log_to_stderr()
    options = daemon.Options(
        directory=args.dir,
        local=local(args),
        new=getattr(args, "new", False),
        paused=args.paused,
        whole_log=getattr(args, "whole_log", False),
    )
    return asyncio.run(daemon.serve(options, target=target, addresses=addresses))
