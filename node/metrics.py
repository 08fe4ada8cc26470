"""What is counted: named counters with one label each, and the bytes that the sockets carried."""

import os
import socket
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

FAMILIES = {
    "dropped": ("reason", "What others sent and we did not take, by reason."),
    "refused_links": ("reason", "Handshakes and links turned away, by reason."),
    "refused_updates": ("reason", "Genuine updates that count zero, by the rule they break."),
    "messages_in": ("kind", "Messages received, by kind."),
    "messages_out": ("kind", "Messages sent, by kind."),
    "bytes_in": ("kind", "Bytes received before TLS, by kind."),
    "bytes_out": ("kind", "Bytes sent before TLS, by kind."),
    "pulls": ("result", "Payloads pulled, by how it ended."),
    "updates": ("whose", "Updates taken into the ledger: own and others'."),
    "turns": ("result", "Own turns, by how they ended."),
    "events": ("what", "Events, by kind."),
    "worker_restarts": ("reason", "How often the worker had to be started again."),
    "http": ("status", "Requests to the status port, by status code."),
}
"""name -> (label, help): the counters that exist. Prometheus sees `shoal_<name>_total`."""

LABELS = 64
"""Different labels per counter; further ones are counted together as "other"."""


class Counters:
    """Counters that only grow. Names are fixed above: a wrong one is our bug and raises."""

    def __init__(self) -> None:
        self._values: dict[str, dict[str, int]] = {name: {} for name in FAMILIES}

    def add(self, name: str, label: str, amount: int = 1) -> None:
        """Count `amount` more under `label`."""
        values = self._values[name]
        if label not in values and len(values) >= LABELS:
            label = "other"
        values[label] = values.get(label, 0) + amount

    def of(self, name: str) -> dict[str, int]:
        """Return a copy of one counter, by label."""
        return dict(self._values[name])

    def total(self, name: str) -> int:
        """Return one counter, summed over its labels."""
        return sum(self._values[name].values())

    def render(self) -> Iterator[str]:
        """Yield the lines of all counters in Prometheus' text format."""
        for name, (label, help_text) in FAMILIES.items():
            samples = {_label(label, value): n for value, n in self._values[name].items()}
            yield from render_family(f"shoal_{name}_total", "counter", help_text, samples)


def render_family(
    name: str, kind: str, help_text: str, samples: Mapping[str, float]
) -> Iterator[str]:
    """Yield one metric family in Prometheus' text format; keys of `samples` are label sets."""
    yield f"# HELP {name} {help_text}"
    yield f"# TYPE {name} {kind}"
    for labels, value in sorted(samples.items()):
        yield f"{name}{labels} {value:g}" if value != int(value) else f"{name}{labels} {int(value)}"


def _label(name: str, value: str) -> str:
    escaped = value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
    return f'{{{name}="{escaped}"}}'


# ---------------------------------------------------------------- bytes on the sockets

HEADER_BYTES = 52
"""IPv4 header (20) + TCP header (20) + timestamps (12), per segment."""

# struct tcp_info of <linux/tcp.h>: three u64/u32 groups that have not moved since Linux 5.5
_RECEIVED = struct.Struct("=Q")
_SEGMENTS = struct.Struct("=II")
_RECEIVED_AT, _SEGMENTS_AT, _SENT_AT = 128, 136, 200
_LENGTH = 208


@dataclass(slots=True)
class SocketMeter:
    """Adds up what this process' TCP sockets sent and received, by the kernel's own count.

    `sample` must be called about once a second: what a socket carried between the last sample and
    its closing is not seen. TLS, HTTP/2 framing, probes and headers are in; retransmissions too.
    Ports in `without` (the status port) are left out. Without TCP_INFO everything stays zero.
    """

    without: Callable[[], set[int]]
    bytes_in: int = 0
    bytes_out: int = 0
    _last: dict[str, tuple[int, int]] = field(default_factory=dict)

    def sample(self) -> None:
        """Look at every open socket once."""
        seen: dict[str, tuple[int, int]] = {}
        ignored = self.without()
        for fd, inode in _socket_fds():
            if inode in seen:
                continue  # the same socket under a second descriptor
            counts = _tcp_counts(fd, ignored)
            if counts is not None:
                seen[inode] = counts
        for inode, (received, sent) in seen.items():
            before_in, before_out = self._last.get(inode, (0, 0))
            # A closed socket's inode may come back for a new one, which then starts below.
            self.bytes_in += received - (before_in if received >= before_in else 0)
            self.bytes_out += sent - (before_out if sent >= before_out else 0)
        self._last = seen


def _socket_fds() -> Iterator[tuple[int, str]]:
    try:
        names = os.listdir("/proc/self/fd")
    except OSError:
        return  # not Linux
    for name in names:
        try:
            target = os.readlink(f"/proc/self/fd/{name}")
        except OSError:
            continue  # closed meanwhile
        if target.startswith("socket:"):
            yield int(name), target


def _tcp_counts(fd: int, ignored: set[int]) -> tuple[int, int] | None:
    try:
        view = socket.socket(fileno=fd)
    except OSError:
        return None
    try:
        if view.family not in (socket.AF_INET, socket.AF_INET6) or _port(view) in ignored:
            return None
        info = view.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
    except OSError:
        return None
    finally:
        view.detach()  # only looked at: the descriptor is somebody else's to close
    if len(info) < _LENGTH:
        return None
    (received,) = _RECEIVED.unpack_from(info, _RECEIVED_AT)
    segments_out, segments_in = _SEGMENTS.unpack_from(info, _SEGMENTS_AT)
    (sent,) = _RECEIVED.unpack_from(info, _SENT_AT)
    return received + HEADER_BYTES * segments_in, sent + HEADER_BYTES * segments_out


def _port(view: socket.socket) -> int:
    name: Any = view.getsockname()
    return int(name[1])
