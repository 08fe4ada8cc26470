"""What this process' TCP sockets sent and received, by the kernel's own count. Linux only.

TLS, HTTP/2 framing, probes, retransmissions and TCP/IP headers are in; link headers, UDP (mDNS) and
what other processes send are not. The kernel keeps the count per socket (`TCP_INFO`), so whoever
owns the socket – asyncio, gRPC's C core, libp2p – need not help.
"""

import os
import socket
import stat
import struct
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

HEADER_BYTES = 52
"""IPv4 header (20) + TCP header (20) + timestamps (12), per segment."""
HEADER_BYTES_V6 = 72
"""The same with an IPv6 header (40)."""

# struct tcp_info of <linux/tcp.h>: these have not moved since Linux 5.5.
_LENGTH = 208
_RECEIVED_AND_SEGMENTS = struct.Struct("=QII")  # tcpi_bytes_received, tcpi_segs_out, tcpi_segs_in
_RECEIVED_AT = 128
_SENT = struct.Struct("=Q")  # tcpi_bytes_sent, retransmissions included
_SENT_AT = 200
_LISTENING = 10  # tcpi_state, the first byte: such a socket counts something else in these fields


@dataclass(slots=True)
class SocketMeter:
    """Adds up what the process' TCP sockets carried: call `sample` about once a second.

    What a socket carries between its last sample and its closing is not seen; what was sampled
    stays. Sockets whose own port is in `without()` (the status port) are left out. Where the kernel
    does not tell (`supported()` is False) everything stays zero.
    """

    without: Callable[[], Iterable[int]] = tuple
    bytes_in: int = 0
    bytes_out: int = 0
    _last: dict[int, tuple[int, int]] = field(default_factory=dict)
    """Per socket inode: received and sent at the last sample."""

    def sample(self) -> None:
        """Look at every open socket once."""
        ignored = frozenset(self.without())
        seen: dict[int, tuple[int, int]] = {}
        for fd in _descriptors():
            try:
                self._look(fd, seen, ignored)
            except OSError:
                continue  # closed meanwhile, or no TCP socket
        for inode, (received, sent) in seen.items():
            before_in, before_out = self._last.get(inode, (0, 0))
            # A closed socket's inode may come back for a new one, which then starts below.
            if received < before_in or sent < before_out:
                before_in = before_out = 0
            self.bytes_in += received - before_in
            self.bytes_out += sent - before_out
        self._last = seen

    def _look(self, fd: int, seen: dict[int, tuple[int, int]], ignored: frozenset[int]) -> None:
        status = os.fstat(fd)
        if not stat.S_ISSOCK(status.st_mode) or status.st_ino in seen:
            return
        # A duplicate, since the number itself may be closed and given to another socket meanwhile.
        # Family and type are said so that Python does not ask for them; only TCP has TCP_INFO.
        with socket.socket(socket.AF_INET6, socket.SOCK_STREAM, 0, os.dup(fd)) as view:
            counts = _counts(view, ignored)
            if counts is not None:
                seen[os.fstat(view.fileno()).st_ino] = counts


def supported() -> bool:
    """Tell whether this kernel counts bytes per socket."""
    if not sys.platform.startswith("linux"):
        return False
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        return len(probe.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _LENGTH)) == _LENGTH


def _descriptors() -> Iterator[int]:
    try:
        names = os.listdir("/proc/self/fd")
    except OSError:
        return  # not Linux
    yield from map(int, names)


def _counts(view: socket.socket, ignored: frozenset[int]) -> tuple[int, int] | None:
    """Return (received, sent) bytes with headers; None for what is not to be counted."""
    info = view.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _LENGTH)
    if len(info) < _LENGTH or info[0] == _LISTENING:
        return None
    name = view.getsockname()
    if name[1] in ignored:
        return None
    header = HEADER_BYTES_V6 if _speaks_v6(name[0]) else HEADER_BYTES
    received, segments_out, segments_in = _RECEIVED_AND_SEGMENTS.unpack_from(info, _RECEIVED_AT)
    (sent,) = _SENT.unpack_from(info, _SENT_AT)
    return received + header * segments_in, sent + header * segments_out


def _speaks_v6(address: str) -> bool:
    """Tell IPv6 from IPv4, which gRPC's sockets speak under a mapped address."""
    return ":" in address and not address.startswith("::ffff:")
