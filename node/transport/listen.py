"""Where to listen, and why nobody can: gRPC only says that it could not."""

import errno
import socket
from contextlib import suppress

from shoal.node.addresses import Listen, socket_text
from shoal.node.errors import ConfigError


def bind_host(listen: Listen) -> str:
    """Return the host to bind: all interfaces unless one is named."""
    return listen.host or ("::" if _has_ipv6() else "0.0.0.0")


def check_listen(listen: Listen) -> None:
    """Raise ConfigError when nobody could listen there now."""
    if (why := _why_not(bind_host(listen), listen.port)) is not None:
        raise why


def as_before(listen: Listen, port: int) -> Listen:
    """Return where to listen when any port will do: where others look for us, if that is free.

    `port`: the one of the last start, 0 for none. Peers that were all away know each other by it.
    """
    if listen.port or not port or _why_not(bind_host(listen), port) is not None:
        return listen
    return listen._replace(port=port)


def cannot_listen(host: str, port: int) -> ConfigError:
    """Find out why gRPC could not listen."""
    return _why_not(host, port) or ConfigError(
        f"can't listen on {socket_text(host, port)}: choose another (--listen HOST:PORT)"
    )


def _has_ipv6() -> bool:
    with suppress(OSError), socket.socket(socket.AF_INET6) as probe:
        probe.bind(("::1", 0))
        return True
    return False


def _why_not(host: str, port: int) -> ConfigError | None:
    place = socket_text(host, port)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
            probe.listen(1)
    except OSError as error:
        match error.errno:
            case errno.EADDRINUSE:
                why = "the port is in use: stop what listens there, or choose another"
            case errno.EADDRNOTAVAIL:
                why = "that is no address of this machine: use 0.0.0.0"
            case errno.EACCES:
                why = "that port needs more rights: choose one above 1023"
            case _:
                why = f"{error.strerror}: choose another"
        return ConfigError(f"can't listen on {place}: {why} (--listen HOST:PORT, 0 is any port)")
    return None
