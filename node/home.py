"""The directory of one peer in one run: its files, its lock, and whose it is.

identity.key  who this peer is            genesis      what the run is
log/          updates, proofs             checkpoint/  the worker's state
initial.bin   the initial integers        run.toml     the file that founded it (founder only)
peers.json    peers known from before     node.toml    local settings
metrics.jsonl one line per turn           status.json  the ports in use (and `token`)
snapshot      what a joiner began with in place of the log (runs over a pool of seeds)
lock          held while a daemon runs
"""

import fcntl
import json
import logging
import os
import secrets
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, TextIO

from shoal.gossip.limits import Limits
from shoal.gossip.names import PeerId, RunId
from shoal.node import genesis as genesis_module
from shoal.node import identity as identity_module
from shoal.node.config import NodeConfig, RunFile
from shoal.node.errors import ConfigError
from shoal.node.files import write_atomically
from shoal.node.genesis import Genesis
from shoal.node.identity import Identity, parse_peer, peer_text

log = logging.getLogger(__name__)

KNOWN_PEERS = 256
"""Peers remembered on disk."""
METRICS_BYTES = 8 << 20
"""metrics.jsonl is rotated beyond this; one older file is kept."""
_PEERS_BYTES = 4 << 20
_LINE_BYTES = 4096
"""More than one line of metrics.jsonl has."""
_ASIDE = 1000
_LOOK = 0.05
"""Seconds between two looks at a lock."""


class Known(NamedTuple):
    """A peer from before, to be tried at start."""

    peer: PeerId
    addresses: tuple[str, ...]


class Home:
    """A peer's directory, locked for this process. Use as a context manager, or `close` it."""

    def __init__(self, path: Path, *, readonly: bool = False) -> None:
        """Create the directory if need be and lock it; ConfigError when another daemon has it.

        With `readonly` neither: for who only looks, also while a daemon runs.
        """
        self.path = path
        self._lock: TextIO | None = None
        try:
            if not readonly:
                path.mkdir(mode=0o700, parents=True, exist_ok=True)
                self._lock = _lock(path)
        except OSError as error:
            raise ConfigError(
                f"{path} can't be used ({error.strerror}): choose another directory with --dir"
            ) from None
        self._metrics: TextIO | None = None
        self._sick = False

    # ------------------------------------------------------------------ paths

    @property
    def log(self) -> Path:
        """Return the folder of the log."""
        return self.path / "log"

    @property
    def checkpoint(self) -> Path:
        """Return the file of the worker's checkpoint."""
        return self.path / "checkpoint" / "worker.safetensors"

    @property
    def initial(self) -> Path:
        """Return the file with the initial model's integers."""
        return self.path / "initial.bin"

    @property
    def snapshot(self) -> Path:
        """Return the file of the snapshot that the run was joined with."""
        return self.path / "snapshot"

    @property
    def node_toml(self) -> Path:
        """Return the file of local settings."""
        return self.path / "node.toml"

    # ------------------------------------------------------------------ whose it is

    def genesis(self, limits: Limits) -> Genesis | None:
        """Return the run that the directory holds, or None when it holds none yet."""
        path = self.path / "genesis"
        return genesis_module.load(path, limits) if path.exists() else None

    def keep(self, genesis: Genesis, *, founded_from: RunFile | None = None) -> None:
        """Make this the directory of a run; refused when it is another run's."""
        held = self.genesis(Limits())
        if held is not None:
            self.refuse_another(held, genesis.run_id)
            return
        if founded_from is not None:
            write_atomically(self.path / "run.toml", founded_from.to_toml().encode())
        # Last, since its presence says that the directory holds a run.
        write_atomically(self.path / "genesis", genesis.raw)

    def refuse_another(self, held: Genesis, run: RunId) -> None:
        """Raise ConfigError unless the run held is `run`."""
        if held.run_id != run:
            raise ConfigError(
                f"{self.path} holds another run ({held.run_file.run.name}, {_short(held.run_id)}; "
                f"wanted {_short(run)}): choose another directory with --dir, or resume what it "
                f"holds with: shoal start {self.path}"
            )

    def refuse_another_file(self, held: Genesis, run_file: RunFile, source: Path) -> None:
        """Raise ConfigError unless the run held was founded from this run file."""
        mine = self.path / "run.toml"
        same = RunFile.load(mine) == run_file if mine.exists() else _within(run_file, held.run_file)
        if not same:
            raise ConfigError(
                f"{self.path} holds a run of another file than {source}: resume it with "
                f"`shoal start {self.path}`, found anew with --new (the old directory is moved "
                "aside), or choose another directory with --dir"
            )

    def identity(self, config: NodeConfig) -> Identity:
        """Return this peer's identity: the file that was named, else its own, made if need be."""
        if config.identity:
            try:
                return identity_module.load(Path(config.identity))
            except FileNotFoundError:
                raise ConfigError(
                    f"identity file {config.identity} does not exist; leave --identity out to have "
                    "one made"
                ) from None
        return identity_module.load_or_create(self.path / "identity.key")

    # ------------------------------------------------------------------ small files

    def known_peers(self) -> list[Known]:
        """Return the peers known from before, most useful first; what is illegible is left out."""
        try:
            with (self.path / "peers.json").open("rb") as file:
                entries = json.loads(file.read(_PEERS_BYTES))
            return [_known(entry) for entry in entries[:KNOWN_PEERS]]
        except FileNotFoundError:
            return []
        except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
            log.warning("peers.json ignored", extra={"error": str(error)})
            return []

    def remember_peers(self, peers: Iterable[Known]) -> None:
        """Replace the known peers: the first `KNOWN_PEERS` of `peers`."""
        entries = [
            {"peer": peer_text(known.peer), "addresses": list(known.addresses)}
            for known in list(peers)[:KNOWN_PEERS]
        ]
        write_atomically(self.path / "peers.json", json.dumps(entries, indent=1).encode())

    def publish_status(self, host: str, port: int, token: str, *, listening: int = 0) -> None:
        """Write down where the status port is, and the token that changing calls need.

        `listening`: the port for other peers, to be tried first at the next start.
        """
        write_atomically(self.path / "token", token.encode() + b"\n")
        body = {"host": host, "port": port, "pid": os.getpid(), "listening": listening}
        write_atomically(self.path / "status.json", json.dumps(body).encode() + b"\n")

    def last_port(self) -> int:
        """Return the port at which other peers reached this one before; 0 when none is known."""
        try:
            with (self.path / "status.json").open("rb") as file:
                port = json.loads(file.read(_LINE_BYTES))["listening"]
        except (OSError, ValueError, TypeError, KeyError, RecursionError):
            return 0
        return port if type(port) is int and 0 < port < 1 << 16 else 0

    def write_turn(self, line: Mapping[str, object]) -> None:
        """Append one line to metrics.jsonl, which is rotated; a sick disk loses the line only."""
        path = self.path / "metrics.jsonl"
        try:
            if self._metrics is None:
                torn = path.exists() and path.read_bytes()[-1:] != b"\n"
                self._metrics = path.open("a", encoding="utf-8")
                if torn and self._metrics.tell():
                    self._metrics.write("\n")
            self._metrics.write(json.dumps(line, separators=(",", ":")) + "\n")
            self._metrics.flush()
            if self._metrics.tell() > METRICS_BYTES:
                self._metrics.close()
                self._metrics = None
                path.replace(path.with_suffix(".jsonl.1"))
        except OSError as error:
            self._metrics = None
            if not self._sick:  # once, not every turn
                log.warning("metrics.jsonl not written", extra={"error": error.strerror})
            self._sick = True
        else:
            self._sick = False

    def last_turn(self) -> dict[str, object]:
        """Return the last whole line of metrics.jsonl, so that totals go on; empty without one."""
        for name in ("metrics.jsonl", "metrics.jsonl.1"):
            with suppress(OSError):
                with (self.path / name).open("rb") as file:
                    file.seek(max(0, file.seek(0, os.SEEK_END) - _LINE_BYTES))
                    lines = file.read().splitlines()
                for text in reversed(lines):
                    with suppress(ValueError):  # a crash may have torn the last one
                        if isinstance(line := json.loads(text), dict):
                            return line
        return {}

    # ------------------------------------------------------------------ end

    def close(self) -> None:
        """Release the lock; the directory can be resumed by others now."""
        if self._metrics is not None:
            self._metrics.close()
            self._metrics = None
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def __enter__(self) -> "Home":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def wait_until_free(path: Path, seconds: float) -> bool:
    """Wait until no daemon uses the directory; return whether that came to be in so long."""
    until = time.monotonic() + seconds
    with (path / "lock").open(encoding="ascii") as file:
        while True:
            with suppress(BlockingIOError):
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
                return True
            if time.monotonic() >= until:
                return False
            time.sleep(_LOOK)


def move_aside(path: Path) -> Path | None:
    """Rename a directory, so that another run can be founded there; None when there is none."""
    if not path.exists():
        return None
    with Home(path):
        for number in range(1, _ASIDE):
            aside = path.with_name(f"{path.name}.old-{number}")
            if not aside.exists():
                path.rename(aside)
                return aside
    raise ConfigError(f"{path} was moved aside {_ASIDE} times: remove some of {path}.old-*")


def for_joiner(parent: Path, run_file: RunFile, run: RunId, config: NodeConfig) -> Home:
    """Return the home of a peer that joins without `--dir`: NAME-<6 characters of its peer id>.

    One that a daemon of this run left here, and that no daemon uses now, is taken again.
    """
    name = run_file.run.name
    for path in sorted(parent.glob(f"{name}-??????")):
        with suppress(ConfigError):
            home = Home(path)
            held = home.genesis(Limits())
            if held is not None and held.run_id == run and not config.identity:
                return home
            home.close()
    if config.identity:
        peer = identity_module.load(Path(config.identity))
        return Home(parent / f"{name}-{str(peer)[-6:]}")
    beginning = parent / f".{name}-{secrets.token_hex(4)}"
    try:
        beginning.mkdir(mode=0o700)
    except OSError as error:
        raise ConfigError(
            f"{parent} can't be written ({error.strerror}): choose a directory with --dir"
        ) from None
    peer = identity_module.load_or_create(beginning / "identity.key")
    path = parent / f"{name}-{str(peer)[-6:]}"
    beginning.rename(path)
    return Home(path)


def _lock(path: Path) -> TextIO:
    file = (path / "lock").open("a+", encoding="ascii")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = file.read(20).strip() or "?"
        file.close()
        raise ConfigError(
            f"{path} is in use by the daemon with process id {holder}: stop that one, or choose "
            "another directory with --dir"
        ) from None
    file.seek(0)
    file.truncate()
    file.write(f"{os.getpid()}\n")
    file.flush()
    return file


def _known(entry: Mapping[str, object]) -> Known:
    addresses = entry["addresses"]
    if not isinstance(addresses, list) or not all(isinstance(a, str) for a in addresses):
        raise TypeError("addresses are no list of texts")
    return Known(parse_peer(str(entry["peer"])), tuple(addresses[: Limits().addresses]))


def _within(part: RunFile, whole: RunFile) -> bool:
    """Tell whether everything that `part` says is in `whole`, whose options are filled in."""

    def inside(a: object, b: object) -> bool:
        if isinstance(a, dict) and isinstance(b, dict):
            return all(key in b and inside(value, b[key]) for key, value in a.items())
        return a == b

    return inside(part.tables(), whole.tables())


def _short(run: RunId) -> str:
    return run.hex()[:12]
