"""What a run file and node.toml may say, and the one clear line when they say something else.

The run file holds everything that must be equal on all peers; node.toml and the command line hold
what is local. Options of the parts (`task.model`, `local.optimizer`, `exchange.update` …) are kept
as plain tables here: the worker, which has the parts, checks them against their own dataclasses.
"""

import difflib
import json
import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from shoal.gossip import limits as presets
from shoal.gossip.limits import Limits
from shoal.node.errors import ConfigError
from shoal.node.files import write_atomically

NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
"""What a run may be called: it becomes the name of a directory."""
RUN_FILE_BYTES = 1 << 18
_DEPTH = 4
_TEXT = 256
_ITEMS = 1024
_WORDS: Mapping[type, str] = {
    int: "a whole number",
    float: "a number",
    str: "a text in quotes",
    bool: "true or false",
    dict: "a table: { name = value, … }",
}
Value = bool | int | float | str | list["Value"] | dict[str, "Value"]
"""What TOML and JSON have in common."""
Options = dict[str, Any]
"""The plain table of a part's options; the worker gives it its types."""
_Table = TypeVar("_Table")


def _choice(value: str, name: str, known: Sequence[str]) -> None:
    if value not in known:
        raise ConfigError(f"{name} = {value!r}: {_unknown(value, known)}")


def _at_least(value: float, least: float, name: str) -> None:
    if not value >= least:
        raise ConfigError(f"{name} = {value} is too small: at least {least}")


# ---------------------------------------------------------------- the run file


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """Table [run]: what the run is called and how long it goes on."""

    name: str
    seed: int = 0
    """Fixes the initial model, the held-out data and every other draw that peers share."""
    turns: int = 0
    """Each peer stops publishing after this many turns; 0: for ever."""

    def __post_init__(self) -> None:
        if not NAME.fullmatch(self.name):
            raise ConfigError(
                f"run.name = {self.name!r}: use 1-64 small letters, digits, '.', '_' and '-', "
                "and begin with a letter or a digit"
            )
        if not 0 <= self.seed < 1 << 63:
            raise ConfigError(f"run.seed = {self.seed}: choose one from 0 to 2**63 - 1")
        _at_least(self.turns, 0, "run.turns")


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """Table [task]: what is trained."""

    name: str
    """A built-in task, an installed entry point of `shoal.tasks`, or `package.module:Factory`."""
    model: Options = field(default_factory=dict)
    """Options of the task's model."""
    options: Options = field(default_factory=dict)
    """Further options of the task."""
    buffers: str = "refuse"
    """`local`: allow a model whose floating-point buffers change; each peer keeps its own."""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9_.-]+(:[A-Za-z0-9_.]+)?", self.name):
            raise ConfigError(
                f"task.name = {self.name!r}: use the name of a task, or package.module:Factory"
            )
        _choice(self.buffers, "task.buffers", ("refuse", "local"))

    @property
    def is_import(self) -> bool:
        """Whether the name asks to import code: needs the operator's `--allow-task`."""
        return ":" in self.name


@dataclass(frozen=True, slots=True, kw_only=True)
class Local:
    """Table [local]: how each peer trains between two updates."""

    optimizer: Options = field(default_factory=lambda: {"name": "adamw"})
    batch: int = 16
    steps: int = 0
    """Local steps a turn; 0: as many as fit into `turn_seconds`."""
    turn_seconds: float = 0.0
    min_steps: int = 1
    max_steps: int = 100_000

    def __post_init__(self) -> None:
        _at_least(self.batch, 1, "local.batch")
        _at_least(self.steps, 0, "local.steps")
        _at_least(self.turn_seconds, 0, "local.turn_seconds")
        _at_least(self.min_steps, 1, "local.min_steps")
        _at_least(self.max_steps, self.min_steps, "local.max_steps")
        if bool(self.steps) == bool(self.turn_seconds):
            raise ConfigError(
                "local.steps and local.turn_seconds: give one of them (steps = 30, or "
                "turn_seconds = 2.0)"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Exchange:
    """Table [exchange]: how the peers' models become one."""

    mode: str = "ledger"
    update: Options = field(default_factory=lambda: {"kind": "dense"})
    quantum_bits: int = 24
    """The model is kept in units of 2**-quantum_bits: 24 holds |w| < 128, 28 |w| < 8."""
    clip: float = 0.0
    """Updates whose Σc² exceeds this multiple of the initial model's count zero; 0: off."""
    participation: float = 1.0
    """Share of the peers that are drawn to publish in a turn."""

    def __post_init__(self) -> None:
        if self.mode == "mixing":
            raise ConfigError(
                'exchange.mode = "mixing" is not in this version yet; use mode = "ledger"'
            )
        _choice(self.mode, "exchange.mode", ("ledger",))
        if not 8 <= self.quantum_bits <= 30:
            raise ConfigError(f"exchange.quantum_bits = {self.quantum_bits}: choose 8 to 30")
        _at_least(self.clip, 0, "exchange.clip")
        if not 0 < self.participation <= 1:
            raise ConfigError(
                f"exchange.participation = {self.participation}: choose more than 0, at most 1"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Swarm:
    """Table [swarm]: who may take part, and who talks to whom."""

    admission: str = "open"
    topology: str = "exponential"
    min_peers: int = 1
    """The size the run expects: with fewer, each steps and shards as if so many were there."""
    pace: str = "free"
    """`free`: nobody waits; `lockstep`: turn t + 1 starts when all updates of turn t are there."""

    def __post_init__(self) -> None:
        if self.admission == "invite":
            raise ConfigError(
                'swarm.admission = "invite" is not in this version yet; use "secret" to keep '
                "strangers out"
            )
        _choice(self.admission, "swarm.admission", ("open", "secret"))
        _choice(self.pace, "swarm.pace", ("free", "lockstep"))
        if not 1 <= self.min_peers <= Limits().ledger_members:
            raise ConfigError(
                f"swarm.min_peers = {self.min_peers}: choose 1 to {Limits().ledger_members}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFile:
    """A run file: five tables."""

    run: Run
    task: Task
    local: Local
    exchange: Exchange = field(default_factory=Exchange)
    swarm: Swarm = field(default_factory=Swarm)

    @staticmethod
    def load(path: Path) -> "RunFile":
        """Read a run file; raises ConfigError with the file named."""
        return RunFile.parse(read_toml(path), where=str(path))

    @staticmethod
    def parse(tables: object, *, where: str) -> "RunFile":
        """Check plain tables; `where` begins every complaint."""
        try:
            _check_plain(tables, "the run file", 0)
            return _build(RunFile, tables, "")
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from None

    @staticmethod
    def from_canonical(data: bytes, *, where: str) -> "RunFile":
        """Read the bytes that a genesis holds."""
        if len(data) > RUN_FILE_BYTES:
            raise ConfigError(
                f"{where}: {len(data)} bytes; a run file has at most {RUN_FILE_BYTES}"
            )
        try:
            tables = json.loads(data, parse_constant=_no_constant, object_pairs_hook=_no_doubles)
        except (ValueError, RecursionError):
            raise ConfigError(f"{where}: not a run file in JSON") from None
        return RunFile.parse(tables, where=where)

    def tables(self) -> dict[str, Any]:
        """Return the five tables as plain values."""
        return asdict(self)

    def to_toml(self) -> str:
        """Return the run file as TOML, for people."""
        return to_toml(self.tables())


def canonical(tables: Mapping[str, object]) -> bytes:
    """Return the one form of plain tables that a genesis holds: JSON, sorted keys, no spaces."""
    text = json.dumps(
        tables, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    )
    return text.encode()


# ---------------------------------------------------------------- node.toml


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeConfig:
    """What is local to one peer: node.toml in its directory, overridden by the command line."""

    data: str = ""
    """Folder or file with this peer's data; empty: what the task has built in."""
    shard: str = ""
    """`i/N`: train on the blocks whose hash is i modulo N; empty: see design 7."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda`, `cuda:1` …"""
    threads: int = 0
    """Threads of the worker; 0: as many as there are cores."""
    listen: str = ""
    """`HOST:PORT`; empty: all interfaces, port 7464; port 0: any free one."""
    advertise: tuple[str, ...] = ()
    """Addresses to tell others; empty: every non-loopback address of this machine."""
    identity: str = ""
    """Identity file; empty: `identity.key` in the directory."""
    secret_file: str = ""
    """The swarm's secret, for admission = "secret"."""
    allow_task: str = ""
    """The one `package.module:Factory` that a run file may ask to import."""
    observe: bool = False
    """Hold, verify, serve and export, but never publish."""
    status: str = "127.0.0.1:0"
    """`HOST:PORT` of the status page."""
    limits: str = "lan"
    """Preset of time-outs and bounds: `lan` or `wan`."""
    log_gigabytes: float = 0.0
    """Disk for the log; 0: the preset's."""

    def __post_init__(self) -> None:
        if self.shard:
            parse_shard(self.shard)
        _at_least(self.threads, 0, "threads")
        _at_least(self.log_gigabytes, 0, "log_gigabytes")
        _choice(self.limits, "limits", ("lan", "wan"))
        if self.allow_task and ":" not in self.allow_task:
            raise ConfigError(
                f"--allow-task {self.allow_task}: write package.module:Factory, like the run file"
            )

    @staticmethod
    def load(path: Path) -> "NodeConfig":
        """Read node.toml; without one everything has its default."""
        if not path.exists():
            return NodeConfig()
        try:
            return _build(NodeConfig, read_toml(path), "")
        except ConfigError as error:
            text = str(error)
            raise ConfigError(text if text.startswith(str(path)) else f"{path}: {text}") from None

    def merged(self, flags: Mapping[str, object]) -> "NodeConfig":
        """Return it with what the command line gave: None and () mean not given.

        Paths become absolute, so that the directory can be resumed from anywhere.
        """
        given = {name: value for name, value in flags.items() if value not in (None, ())}
        for name in ("data", "identity", "secret_file"):
            if given.get(name):
                given[name] = str(Path(str(given[name])).expanduser().absolute())
        return replace(self, **cast("dict[str, Any]", given))

    def save(self, path: Path) -> None:
        """Write node.toml: what differs from the defaults."""
        default = asdict(NodeConfig())
        changed = {name: v for name, v in asdict(self).items() if v != default[name]}
        write_atomically(path, to_toml(changed).encode())

    def preset(self) -> Limits:
        """Return the bounds of this daemon."""
        chosen = presets.wan() if self.limits == "wan" else presets.lan()
        if self.log_gigabytes:
            return replace(chosen, log_bytes=int(self.log_gigabytes * (1 << 30)))
        return chosen


def parse_shard(text: str) -> tuple[int, int]:
    """Read `i/N`: part i of N, counted from 0."""
    found = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
    if not found:
        raise ConfigError(f"--shard {text}: write i/N, for example 0/4 for the first of four parts")
    i, n = int(found[1]), int(found[2])
    if n == 0:
        raise ConfigError(f"--shard {text}: there must be at least one part, for example 0/1")
    if i >= n:
        raise ConfigError(f"--shard {text}: parts count from 0, so the last of {n} is {n - 1}/{n}")
    return i, n


# ---------------------------------------------------------------- reading and writing


def read_toml(path: Path) -> dict[str, Any]:
    """Read a small TOML file; raises ConfigError with the line that is wrong."""
    try:
        if path.is_dir():
            raise ConfigError(f"{path} is a directory, not a TOML file")
        with path.open("rb") as file:
            data = file.read(RUN_FILE_BYTES + 1)
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist; give the path of a TOML file") from None
    except OSError as error:
        raise ConfigError(f"{path} can't be read: {error.strerror}") from None
    if len(data) > RUN_FILE_BYTES:
        raise ConfigError(f"{path} is larger than {RUN_FILE_BYTES >> 10} KiB: not a run file")
    try:
        return tomllib.loads(data.decode())
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is not UTF-8 text") from None
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from None


def to_toml(tables: Mapping[str, object]) -> str:
    """Write plain tables as TOML: one section for each table, the tables in them inline."""
    flat = {k: v for k, v in tables.items() if not isinstance(v, dict)}
    lines = [f"{_key(k)} = {_toml(v)}" for k, v in flat.items()]
    for name, table in tables.items():
        if isinstance(table, dict):
            lines += ["", f"[{_key(name)}]"] if lines else [f"[{_key(name)}]"]
            lines += [f"{_key(k)} = {_toml(v)}" for k, v in table.items()]
    return "\n".join(lines) + "\n"


def unknown_key(key: str, table: str, known: Iterable[str]) -> ConfigError:
    """Return the complaint about a key that nothing knows, with the nearest one that is known."""
    place = f" in [{table}]" if table else ""
    return ConfigError(f"unknown key {key!r}{place}: {_unknown(key, list(known))}")


def _unknown(word: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"{hint}Known: {', '.join(known)}"


def _build(cls: type[_Table], table: object, path: str) -> _Table:
    """Make a dataclass of a plain table; every complaint names the key."""
    if not isinstance(table, dict):
        raise ConfigError(f"{path or 'the file'} = {table!r}: expected {_WORDS[dict]}")
    types = get_type_hints(cls)
    for key in table:
        if key not in types:
            raise unknown_key(key, path, types)
    values = {
        key: _convert(value, types[key], f"{path}.{key}" if path else key)
        for key, value in table.items()
    }
    needed = [f.name for f in fields(cast("Any", cls)) if f.default is f.default_factory]
    for key in needed:
        if key not in values:
            section = types[key] in (Run, Task, Local)
            what = f"table [{key}]" if section else f"key {key!r} in [{path}]"
            raise ConfigError(f"{what} is missing")
    return cls(**values)


def _convert(value: object, kind: Any, path: str) -> object:
    if kind in (Run, Task, Local, Exchange, Swarm):
        return _build(kind, value, path)
    origin = get_origin(kind)
    if origin in (Union, UnionType):
        kind = next(k for k in get_args(kind) if k is not NoneType)
    if origin is tuple:
        if isinstance(value, list) and all(isinstance(v, str) for v in value):
            return tuple(value)
        raise ConfigError(f'{path} = {value!r}: expected a list of texts: ["…", "…"]')
    kind = origin or kind
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise ConfigError(f"{path} = {value!r}: expected {_WORDS[kind]}")
    return value


def _check_plain(value: object, path: str, depth: int) -> None:
    """Refuse what has no place in a run file, which may be a stranger's."""
    if depth > _DEPTH:
        raise ConfigError(f"{path}: nested too deeply")
    match value:
        case dict():
            _bound(value, path)
            for key, inner in value.items():
                _check_text(str(key), path)
                _check_plain(inner, f"{path}.{key}" if depth else str(key), depth + 1)
        case list():
            _bound(value, path)
            for inner in value:
                _check_plain(inner, path, depth + 1)
        case str():
            _check_text(value, path)
        case bool():
            pass
        case int():
            if not -(1 << 63) <= value < 1 << 63:
                raise ConfigError(f"{path}: the number has more than 64 bits")
        case float():
            if value != value or value in (float("inf"), float("-inf")):
                raise ConfigError(f"{path} = {value}: expected a finite number")
        case _:
            raise ConfigError(f"{path} = {value!r}: dates and times have no place in a run file")


def _bound(items: "dict[Any, Any] | list[Any]", path: str) -> None:
    if len(items) > _ITEMS:
        raise ConfigError(f"{path}: more than {_ITEMS} entries")


def _check_text(text: str, path: str) -> None:
    if len(text) > _TEXT or not text.isprintable():
        raise ConfigError(f"{path}: texts have at most {_TEXT} characters, all printable")
    if text.startswith(("/", "~", "./", "../", ".\\", "..\\")) or re.match(r"[A-Za-z]:[\\/]", text):
        raise ConfigError(f"{path} = {text!r}: a run file holds no paths; use --data for your data")


def _no_constant(text: str) -> float:
    raise ValueError(text)


def _no_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a key appears twice")
    return table


def _key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else json.dumps(key, ensure_ascii=False)


def _toml(value: object) -> str:
    match value:
        case bool():
            return "true" if value else "false"
        case int() | float():
            return repr(value)
        case str():
            return json.dumps(value, ensure_ascii=False)
        case list() | tuple():
            return "[" + ", ".join(_toml(v) for v in value) + "]"
        case dict() if value:
            return "{ " + ", ".join(f"{_key(k)} = {_toml(v)}" for k, v in value.items()) + " }"
        case dict():
            return "{}"
    raise TypeError(f"{type(value).__name__} has no form in TOML")
