"""What a run file and node.toml may say, and the one clear line when they say something else.

The run file holds everything that must be equal on all peers; node.toml and the command line hold
what is local. The tables are those of training/tables.py; options of the parts (`task.*`,
`local.optimizer`, `exchange.update`) stay plain here: the worker, which has the parts, checks them.
"""

import difflib
import ipaddress
import json
import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, cast, get_args, get_origin, get_type_hints

from shoal.compression.settings import SettingError
from shoal.gossip import limits as presets
from shoal.gossip.limits import Limits
from shoal.node.addresses import EXAMPLE, parse, parse_listen
from shoal.node.errors import ConfigError
from shoal.node.files import write_atomically
from shoal.training import presets as recipes
from shoal.training import tables

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
    list: "a list: [ … ]",
}
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
class Task:
    """Table [task]: what is trained. All keys but `name` are the task's own."""

    name: str
    """A built-in task, an installed entry point of `shoal.tasks`, or `package.module:Factory`."""
    options: Options = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9_.-]+(:[A-Za-z0-9_.]+)?", self.name):
            raise ConfigError(
                f"task.name = {self.name!r}: use the name of a task, or package.module:Factory"
            )

    @property
    def is_import(self) -> bool:
        """Whether the name asks to import code: needs the operator's `--allow-task`."""
        return ":" in self.name


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFile:
    """A run file: five tables."""

    run: tables.Run
    task: Task
    local: tables.Local = field(default_factory=tables.Local)
    exchange: tables.Exchange = field(default_factory=tables.Exchange)
    swarm: tables.Swarm = field(default_factory=tables.Swarm)

    @staticmethod
    def load(path: Path) -> "RunFile":
        """Read a run file; raises ConfigError with the file named."""
        return RunFile.parse(read_toml(path), where=str(path))

    @staticmethod
    def parse(given: object, *, where: str) -> "RunFile":
        """Check plain tables; `where` begins every complaint."""
        try:
            _check_plain(given, "the run file", 0)
            return _build(RunFile, _expanded(given), "")
        except (ConfigError, SettingError) as error:
            raise ConfigError(f"{where}: {error}") from None

    @staticmethod
    def from_canonical(data: bytes, *, where: str) -> "RunFile":
        """Read the bytes that a genesis holds."""
        if len(data) > RUN_FILE_BYTES:
            raise ConfigError(
                f"{where}: {len(data)} bytes; a run file has at most {RUN_FILE_BYTES}"
            )
        try:
            given = json.loads(data, parse_constant=_no_constant, object_pairs_hook=_no_doubles)
        except (ValueError, RecursionError):
            raise ConfigError(f"{where}: not a run file in JSON") from None
        return RunFile.parse(given, where=where)

    def tables(self) -> dict[str, Any]:
        """Return the five tables as plain values."""
        return asdict(self) | {"task": {"name": self.task.name, **self.task.options}}

    def to_toml(self) -> str:
        """Return the run file as TOML, for people."""
        return to_toml(self.tables())


def _expanded(given: object) -> object:
    """Put in what `exchange.preset` stands for."""
    return recipes.expand(given) if isinstance(given, dict) else given


def canonical(plain: Mapping[str, object]) -> bytes:
    """Return the one form of plain tables that a genesis holds: JSON, sorted keys, no spaces."""
    text = json.dumps(
        plain, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    )
    return text.encode()


# ---------------------------------------------------------------- node.toml


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeConfig:
    """What is local to one peer: node.toml in its directory, overridden by the command line."""

    data: str = ""
    """Folder or file with this peer's data; empty: what the task has built in."""
    base: str = ""
    """Folder of the model to start from, or hf://org/name; for tasks that take one."""
    shard: str = ""
    """`i/N`: train on the blocks whose hash is i modulo N; empty: see design 7."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda`, `cuda:1` …"""
    device_memory: str = ""
    """Such as "2GB": so much of the device holds weights, which stream from the host; for runs that
    train by forward passes alone. Empty: all of the model is on the device."""
    threads: int = 0
    """Threads of the worker; 0: as many as there are cores."""
    listen: str = ""
    """`HOST:PORT`; empty: all interfaces, port 7464; 0: the last start's port, or any."""
    advertise: tuple[str, ...] = ()
    """Addresses to tell others; empty: every non-loopback address of this machine."""
    libp2p: str = ""
    """`off`, or libp2p's own TCP port; 0: any free one. Empty: see `libp2p_port`."""
    libp2p_peer: tuple[str, ...] = ()
    """libp2p multiaddrs with /p2p through which to enter the DHT; of any run."""
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
        parse_size(self.device_memory)
        _at_least(self.threads, 0, "threads")
        _at_least(self.log_gigabytes, 0, "log_gigabytes")
        _choice(self.limits, "limits", ("lan", "wan"))
        if self.libp2p:
            parse_libp2p(self.libp2p)
        for text in self.libp2p_peer:
            check_libp2p_peer(text)
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

    def libp2p_port(self) -> int | None:
        """Return libp2p's TCP port, 0: any free one; None: it is off.

        Unless it is asked for, it is off where nobody on another machine could come: it listens on
        all interfaces.
        """
        if self.libp2p:
            return parse_libp2p(self.libp2p)
        host = parse_listen(self.listen).host if self.listen else ""
        near = bool(host) and ipaddress.ip_address(host).is_loopback
        return None if near and not (self.advertise or self.libp2p_peer) else 0

    def merged(self, flags: Mapping[str, object]) -> "NodeConfig":
        """Return it with what the command line gave: None, False and () mean not given.

        Paths become absolute, so that the directory can be resumed from anywhere. Other names are
        left alone, so that a whole `vars(args)` may be passed.
        """
        mine = {f.name for f in fields(self)}
        given = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in flags.items()
            if name in mine and value not in (None, (), [], False)
        }
        for name in ("data", "identity", "secret_file"):
            if given.get(name):
                given[name] = str(Path(str(given[name])).expanduser().absolute())
        if given.get("base"):
            given["base"] = absolute_base(str(given["base"]))
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


def absolute_base(text: str) -> str:
    """Return what --base names so that it means the same from anywhere; hf://… stays as it is."""
    return text if text.startswith("hf://") else str(Path(text).expanduser().absolute())


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


def parse_size(text: str) -> int:
    """Read bytes such as "2GB", "1.5 GiB" or "800MB"; 0 of an empty text."""
    if not text:
        return 0
    found = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,9})?) ?(?:([kKMGT])(i?))?B", text)
    if not found or not float(found[1]):
        raise ConfigError(f"--device-memory {text}: write a size such as 800MB, 2GB or 1.5GiB")
    power = " KMGT".index((found[2] or " ").upper())
    return int(float(found[1]) * (1024 if found[3] else 1000) ** power)


def parse_libp2p(text: str) -> int | None:
    """Read `off` (None) or a TCP port."""
    if text == "off":
        return None
    if not re.fullmatch(r"[0-9]{1,5}", text) or int(text) > 65535:
        raise ConfigError(f"--libp2p {text}: give off, or a TCP port (0: any free one)")
    return int(text)


def check_libp2p_peer(text: str) -> str:
    """Return a libp2p multiaddr that names its peer."""
    address = parse(text)
    if address.peer is None or address.run is not None:
        raise ConfigError(f"--libp2p-peer {text}: give a libp2p address such as {EXAMPLE}")
    return text


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
        found = tomllib.loads(data.decode())
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is not UTF-8 text") from None
    except (ValueError, RecursionError) as error:  # ValueError: a number of thousands of digits
        raise ConfigError(f"{path} is not valid TOML: {error}") from None
    if any(type(value) is int and not -(2**63) <= value < 2**63 for value in _values(found)):
        raise ConfigError(f"{path} is not valid TOML: an integer has more than 64 bits")
    return found


def _values(found: object) -> Iterator[object]:
    """Yield everything in nested tables and lists that is neither."""
    left = [found]
    while left:
        value = left.pop()
        if isinstance(value, dict):
            left += value.values()
        elif isinstance(value, list):
            left += value
        else:
            yield value


def to_toml(plain: Mapping[str, object]) -> str:
    """Write plain tables as TOML: one section for each table, the tables in them inline."""
    flat = {k: v for k, v in plain.items() if not isinstance(v, dict)}
    lines = [f"{_key(k)} = {_toml(v)}" for k, v in flat.items()]
    for name, table in plain.items():
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
    if cls is Task:
        table = {"options": {k: v for k, v in table.items() if k != "name"}} | (
            {"name": table["name"]} if "name" in table else {}
        )
    for key in table:
        if key not in types:
            raise unknown_key(key, path, types)
    values = {
        key: _convert(value, types[key], f"{path}.{key}" if path else key)
        for key, value in table.items()
    }
    for key in (f.name for f in fields(cast("Any", cls)) if f.default is f.default_factory):
        if key not in values:
            what = f"key {key!r} in [{path}]" if path else f"table [{key}]"
            raise ConfigError(f"{what} is missing")
    try:
        return cls(**values)
    except ValueError as error:
        raise ConfigError(f"{path}: {error}" if path else str(error)) from None


def _convert(value: object, kind: Any, path: str) -> object:
    if is_dataclass(kind):
        return _build(cast("type[Any]", kind), value, path)
    kinds = get_args(kind) if isinstance(kind, UnionType) else (kind,)
    kinds = tuple(get_origin(each) or each for each in kinds)
    if kinds == (tuple,):
        if isinstance(value, list) and all(isinstance(v, str) for v in value):
            return tuple(value)
        raise ConfigError(f'{path} = {value!r}: expected a list of texts: ["…", "…"]')
    if type(value) in kinds:
        return value
    if float in kinds and type(value) is int:
        return float(value)
    raise ConfigError(f"{path} = {value!r}: expected {' or '.join(_WORDS[k] for k in kinds)}")


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
