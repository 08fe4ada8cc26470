"""Where peers listen: multiaddrs such as /ip4/203.0.113.5/tcp/7464/p2p/12D3KooW…; strict."""

import ctypes
import ipaddress
import re
import socket
import struct
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

from shoal.gossip.names import PeerId, RunId
from shoal.node.errors import ConfigError
from shoal.node.identity import parse_peer, peer_text

PORT = 7464
"""Where daemons listen unless told otherwise."""
TEXT = 256
"""Longest multiaddr, in characters."""
KINDS = ("ip4", "ip6", "dns4", "dns6", "dns")
EXAMPLE = "/ip4/203.0.113.5/tcp/7464/p2p/12D3KooW…"
NAME = re.compile(r"(?=.{1,253}$)([A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9])?\.?)+")


class AddressError(ConfigError):
    """The text is no address; its message says why and how one looks."""


@dataclass(frozen=True, slots=True)
class Address:
    """Host and port of a daemon's gRPC server; `peer`: who is there; `run`: what to join there."""

    kind: str
    host: str
    port: int
    peer: PeerId | None = None
    run: RunId | None = None

    def __str__(self) -> str:
        text = f"/{self.kind}/{self.host}/tcp/{self.port}"
        if self.peer is not None:
            text += f"/p2p/{peer_text(self.peer)}"
        if self.run is not None:
            text += f"/run/{self.run.hex()}"
        return text

    def bare(self) -> "Address":
        """Return the address without peer and run, as contact records carry it."""
        return replace(self, peer=None, run=None)

    def of(self, peer: PeerId, run: RunId | None = None) -> "Address":
        """Return the address as one of `peer`; with `run` it is a join address."""
        return replace(self, peer=peer, run=run)

    @property
    def family(self) -> socket.AddressFamily:
        """What to resolve the host to."""
        if self.kind == "dns":
            return socket.AF_UNSPEC
        return socket.AF_INET if self.kind.endswith("4") else socket.AF_INET6


class Listen(NamedTuple):
    """Where to listen: host "" is every interface; port 0 is any free one."""

    host: str
    port: int


def parse(text: str) -> Address:
    """Return the address that `text` spells; raises AddressError."""
    if len(text) > TEXT:
        raise AddressError(f"address of {len(text)} characters: the longest has {TEXT}")
    match text.split("/"):
        case ["", kind, host, "tcp", port]:
            return _address(text, kind, host, port)
        case ["", kind, host, "tcp", port, "p2p", peer]:
            return replace(_address(text, kind, host, port), peer=_peer(text, peer))
        case ["", kind, host, "tcp", port, "p2p", peer, "run", run]:
            address = _address(text, kind, host, port)
            return replace(address, peer=_peer(text, peer), run=_run(text, run))
        case ["", kind, host, "tcp", port, "run", run]:
            return replace(_address(text, kind, host, port), run=_run(text, run))
    raise AddressError(f"{text!r} is no address; one looks like {EXAMPLE}")


def parse_bare(text: str) -> Address:
    """Return the address of a contact record: canonical, without peer and run."""
    address = parse(text)
    if address.peer is not None or address.run is not None or str(address) != text:
        raise AddressError(f"{text!r} is not a plain /ip4/…/tcp/… address")
    return address


def parse_join(text: str) -> Address:
    """Return a join address: one that names a run, as every daemon prints it.

    Its peer may be missing; whoever dials it then refuses, showing who answered there.
    """
    address = parse(text)
    if address.run is None:
        raise AddressError(
            f"{text!r} names no run: a join address ends in /run/…; copy the whole line that "
            "`shoal start` or `shoal status` prints"
        )
    return address


def parse_listen(text: str) -> Listen:
    """Return host and port of a `--listen HOST:PORT`; raises AddressError."""
    host, colon, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not colon or not port.isascii() or not port.isdecimal() or int(port) > 65535:
        raise AddressError(f"--listen {text}: give HOST:PORT, for example 0.0.0.0:{PORT}")
    if host in {"", "*"}:
        return Listen("", int(port))
    host = "127.0.0.1" if host == "localhost" else host
    try:
        return Listen(str(ipaddress.ip_address(host)), int(port))
    except ValueError:
        raise AddressError(
            f"--listen {text}: {host} is no IP address of this machine; give one, or 0.0.0.0"
        ) from None


def own(host: str, port: int) -> tuple[Address, ...]:
    """Return the addresses under which a daemon that listens on `host` can be reached.

    All interfaces ("", 0.0.0.0, ::): every address of the machine that is not loopback or
    link-local, loopback only when there is no other.
    """
    if host and not ipaddress.ip_address(host).is_unspecified:
        return (_of_ip(host, port),)
    wanted = [ip for ip in machine() if host != "0.0.0.0" or "." in ip]
    far = [ip for ip in wanted if not ipaddress.ip_address(ip).is_loopback]
    near = [ip for ip in wanted if ip == "127.0.0.1"] or wanted[:1] or ["127.0.0.1"]
    return tuple(_of_ip(ip, port) for ip in far or near)


def machine() -> list[str]:
    """Return this machine's IP addresses, IPv4 first, without link-local ones."""
    found = dict.fromkeys(_getifaddrs())
    usable = [ip for ip in found if not ipaddress.ip_address(ip).is_link_local]
    return sorted(usable, key=lambda ip: ":" in ip)


def socket_text(host: str, port: int) -> str:
    """Return HOST:PORT with brackets around IPv6."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _address(text: str, kind: str, host: str, port: str) -> Address:
    if kind not in KINDS:
        raise AddressError(f"{text!r}: /{kind} is not understood; use {', '.join(KINDS)}")
    number = int(port) if port.isascii() and port.isdecimal() and len(port) <= 5 else 0
    if not 0 < number < 65536 or port != str(number):
        raise AddressError(f"{text!r}: {port!r} is no port (1-65535)")
    return Address(kind, _host(text, kind, host), number)


def _host(text: str, kind: str, host: str) -> str:
    if kind.startswith("dns"):
        if not NAME.fullmatch(host):
            raise AddressError(f"{text!r}: {host!r} is no host name")
        return host.lower()
    try:
        ip = ipaddress.IPv4Address(host) if kind == "ip4" else ipaddress.IPv6Address(host)
    except ValueError:
        raise AddressError(f"{text!r}: {host!r} is no {kind} address") from None
    if isinstance(ip, ipaddress.IPv6Address) and ip.scope_id is not None:
        raise AddressError(f"{text!r}: an address with a zone means nothing elsewhere")
    if ip.is_unspecified or ip.is_multicast:
        raise AddressError(f"{text!r}: {host} is nobody's address")
    return str(ip)


def _peer(text: str, peer: str) -> PeerId:
    try:
        return parse_peer(peer)
    except ValueError as error:
        raise AddressError(f"{text!r}: {error}") from None


def _run(text: str, run: str) -> RunId:
    if not re.fullmatch("[0-9a-f]{64}", run):
        raise AddressError(f"{text!r}: a run id has 64 hexadecimal digits; is it cut off?")
    return RunId(bytes.fromhex(run))


def _of_ip(ip: str, port: int) -> Address:
    return Address("ip6" if ":" in ip else "ip4", ip, port)


class _Interface(ctypes.Structure):
    """The head of `struct ifaddrs`, the same on Linux, macOS and the BSDs."""


_Interface._fields_ = [
    ("next", ctypes.POINTER(_Interface)),
    ("name", ctypes.c_char_p),
    ("flags", ctypes.c_uint),
    ("address", ctypes.c_void_p),
]


def _getifaddrs() -> Iterator[str]:
    """Ask libc for the addresses of all interfaces; the standard library does not."""
    libc = ctypes.CDLL(None)
    head = ctypes.POINTER(_Interface)()
    if libc.getifaddrs(ctypes.byref(head)) != 0:
        return
    try:
        interface = head
        while interface:
            if interface.contents.address:
                yield from _sockaddr(interface.contents.address)
            interface = interface.contents.next
    finally:
        libc.freeifaddrs(head)


def _sockaddr(address: int) -> Iterator[str]:
    # BSD systems put the length into the first byte and the family into the second.
    (family,) = struct.unpack("H", ctypes.string_at(address, 2))
    if sys.platform != "linux":
        family = ctypes.string_at(address, 2)[1]
    if family == socket.AF_INET:
        yield socket.inet_ntop(socket.AF_INET, ctypes.string_at(address + 4, 4))
    elif family == socket.AF_INET6:
        yield socket.inet_ntop(socket.AF_INET6, ctypes.string_at(address + 8, 16))
