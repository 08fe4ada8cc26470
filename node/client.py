"""Speak to a running daemon over its status port: what the commands use."""

import http.client
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import msgspec

from shoal.node.errors import ConfigError
from shoal.node.status import EventRow, PeerRow, Status

TIMEOUT = 10.0
"""Seconds; a daemon answers in milliseconds unless its machine is in trouble."""

T = TypeVar("T")


class UnreachableError(ConfigError):
    """No daemon answers there."""


@dataclass(frozen=True, slots=True)
class Client:
    """One daemon's status port. Every call opens a connection of its own."""

    host: str
    port: int
    token: str = ""

    def status(self) -> Status:
        """Return `/status`."""
        return self._get("/status", Status)

    def peers(self) -> list[PeerRow]:
        """Return `/peers`."""
        return self._get("/peers", list[PeerRow])

    def events(self, after: int = 0) -> list[EventRow]:
        """Return the remembered events with a number above `after`."""
        return self._get(f"/events?after={after}&format=json", list[EventRow])

    def post(self, call: str, body: dict[str, str] | None = None, timeout: float = 600.0) -> None:
        """Make one of the changing calls: pause, resume, leave, export."""
        self._ask("POST", f"/{call}", json.dumps(body or {}), timeout)

    def _get(self, path: str, kind: type[T]) -> T:
        return msgspec.json.decode(self._ask("GET", path, None, TIMEOUT), type=kind)

    def _ask(self, method: str, path: str, body: str | None, timeout: float) -> bytes:
        headers = {"Content-Type": "application/json"}
        if self.token:
            headers["Authorization"] = f"Bearer {self.token}"
        connection = http.client.HTTPConnection(self.host, self.port, timeout=timeout)
        try:
            connection.request(method, path, body, headers)
            answer = connection.getresponse()
            data = answer.read()
        except (OSError, http.client.HTTPException) as error:
            raise UnreachableError(
                f"no daemon answers at {self.host}:{self.port} ({error})"
            ) from error
        finally:
            connection.close()
        if answer.status >= 400:
            raise ConfigError(f"the daemon refused {path}: {_reason(data, answer.reason)}")
        return data


def _reason(data: bytes, otherwise: str) -> str:
    try:
        return str(json.loads(data)["error"])
    except (ValueError, KeyError, TypeError):
        return otherwise


def find(directory: Path | None) -> Path:
    """Return the run's directory: the one named, this one, or the only one below this one.

    Of several below, the only one whose daemon runs.
    """
    if directory is not None:
        if _holds_a_run(directory):
            return directory
        below = _runs_below(directory)
    else:
        here = Path.cwd()
        if _holds_a_run(here):
            return here
        below = _runs_below(here)
    if len(below) == 1:
        return below[0]
    running = [path for path in below if connect_if_running(path) is not None]
    if len(running) == 1:
        return running[0]
    where = directory or "this directory"
    if not below:
        raise ConfigError(f"no run in {where}; name the directory that `shoal start` made")
    names = ", ".join(str(path) for path in (running or below)[:6])
    how_many = f"{len(running)} running" if running else f"{len(below)}"
    raise ConfigError(f"{how_many} runs in {where}; name one of them: {names}")


def _runs_below(directory: Path) -> list[Path]:
    found = (path.parent for path in [*directory.glob("*/genesis"), *directory.glob("*/*/genesis")])
    return sorted(Path(os.path.relpath(path)) for path in found)


def _holds_a_run(directory: Path) -> bool:
    return (directory / "genesis").is_file() or (directory / "status.json").is_file()


def connect(directory: Path) -> Client:
    """Return a client of the daemon that runs in `directory`."""
    client = from_file(directory)
    try:
        if client is not None:
            client.status()
            return client
    except UnreachableError as error:
        if isinstance(error.__cause__, TimeoutError):
            raise ConfigError(
                f"the daemon in {directory} gives no answer in {TIMEOUT:g} s: it is stopped "
                f"(kill -CONT) or stuck; its pid is in {directory}/status.json"
            ) from error
    except msgspec.DecodeError:
        pass  # whoever answers there is no daemon
    raise ConfigError(f"no daemon runs in {directory}; start it: shoal start {directory}")


def connect_if_running(directory: Path) -> Client | None:
    """Return a client of the daemon in `directory`, or None when none answers."""
    client = from_file(directory)
    if client is None:
        return None
    try:
        client.status()
    except (UnreachableError, msgspec.DecodeError):
        return None  # the file outlived its daemon
    return client


def from_file(directory: Path) -> Client | None:
    """Return a client for the address written in `directory`, whether or not a daemon answers."""
    try:
        address = json.loads((directory / "status.json").read_bytes())
        token = (directory / "token").read_text().strip()
        return Client(str(address["host"]), int(address["port"]), token)
    except FileNotFoundError:
        return None
    except PermissionError as error:
        raise ConfigError(f"cannot read {error.filename}: another user's daemon") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{directory}/status.json is damaged ({error}); remove it") from error
