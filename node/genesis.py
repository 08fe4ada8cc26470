"""What a run id stands for: bytes made once by the founder, stored and served, never written anew.

A stranger's genesis is input like any other: bounded, parsed strictly, and it must hash to the run
id in the join address before anything in it counts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path

from google.protobuf.message import DecodeError

import shoal.training.tasks
from shoal.gossip.limits import Limits
from shoal.gossip.names import Hash, PeerId, RunId, digest
from shoal.node.config import RunFile, canonical
from shoal.node.errors import ConfigError
from shoal.proto.v1.run_pb2 import Genesis as Message
from shoal.proto.v1.run_pb2 import Most
from shoal.training import merkle

MAGIC = b"shoal-genesis-1\n"
"""Format and version: the first bytes of every genesis."""
PARAMETERS = 1 << 40
KINDS = 64


@dataclass(frozen=True, slots=True)
class Genesis:
    """A run, as everybody in it knows it. Make one with `found` or `decode`."""

    raw: bytes
    """The stored bytes; `run_id` is their hash."""
    run_file: RunFile
    tables: bytes
    """The run file with all defaults filled in: canonical JSON, as the worker gets it."""
    parameters: int
    layout: Hash
    """Hash of the parameters' names and shapes."""
    initial_root: Hash
    """Merkle root of the initial model's integers (int32, little endian)."""
    initial_squares: int
    """Their sum of squares."""
    most: Mapping[str, int]
    """The largest payload of each kind, in bytes: larger ones are never fetched."""
    founder: PeerId

    @property
    def run_id(self) -> RunId:
        """Return the name of the run."""
        return RunId(digest(self.raw))

    @property
    def initial_bytes(self) -> int:
        """Return the size of the initial model's integers."""
        return 4 * self.parameters

    def is_initial(self, integers: bytes | bytearray | memoryview) -> bool:
        """Tell whether `integers` are the initial model."""
        if len(integers) != self.initial_bytes:
            return False
        return merkle.root_of(bytes(integers)) == self.initial_root


def found(
    tables: Mapping[str, object],
    *,
    parameters: int,
    layout: bytes,
    initial_root: bytes,
    initial_squares: int,
    most: Mapping[str, int],
    founder: PeerId,
) -> Genesis:
    """Make the genesis of a new run from the filled run file and what the worker says of it."""
    message = Message(
        run_file=canonical(tables),
        parameters=parameters,
        layout=layout,
        initial_root=initial_root,
        initial_squares=_big_endian(initial_squares),
        most=[Most(kind=kind, size=size) for kind, size in sorted(most.items())],
        founder=founder,
    )
    raw = MAGIC + message.SerializeToString(deterministic=True)
    return decode(raw, Limits(), where="the new genesis")


def decode(raw: bytes, limits: Limits, *, where: str, run: RunId | None = None) -> Genesis:
    """Parse a genesis; raises ConfigError when it is not one, or not that of `run`."""
    stated = RunId(digest(raw))
    if run is not None and stated != run:
        raise ConfigError(
            f"{where}: this is the genesis of run {stated.hex()}, not of {run.hex()}; "
            "check the join address"
        )
    if len(raw) > limits.genesis_bytes:
        raise ConfigError(
            f"{where}: {len(raw)} bytes; a genesis has at most {limits.genesis_bytes}"
        )
    if not raw.startswith(MAGIC):
        raise ConfigError(f"{where}: not a genesis that this version of Shoal understands")
    message = Message()
    try:
        message.ParseFromString(raw[len(MAGIC) :])
    except DecodeError:
        raise ConfigError(f"{where}: not a genesis") from None
    message.DiscardUnknownFields()  # type: ignore[no-untyped-call,unused-ignore]
    if MAGIC + message.SerializeToString(deterministic=True) != raw:
        raise ConfigError(f"{where}: not the one form of a genesis")
    _check(message, limits, where)
    run_file = RunFile.from_canonical(message.run_file, where=f"{where}, run file")
    return Genesis(
        raw=raw,
        run_file=run_file,
        tables=message.run_file,
        parameters=message.parameters,
        layout=Hash(message.layout),
        initial_root=Hash(message.initial_root),
        initial_squares=int.from_bytes(message.initial_squares, "big"),
        most={most.kind: most.size for most in message.most},
        founder=PeerId(message.founder),
    )


def load(path: Path, limits: Limits, *, run: RunId | None = None) -> Genesis:
    """Read the genesis that a directory keeps."""
    with path.open("rb") as file:
        raw = file.read(limits.genesis_bytes + 1)
    return decode(raw, limits, where=str(path), run=run)


def check_task(run_file: RunFile, allow_task: str) -> None:
    """Refuse a task that this machine must not, or can not, run.

    A run file may name a built-in task or an installed entry point; importing anything else is for
    the operator to allow, by name.
    """
    name = run_file.task.name
    if run_file.task.is_import:
        if allow_task != name:
            raise ConfigError(
                f"the run asks to import its task from {name}: that runs this module's code here. "
                f"If you trust it, add --allow-task {name}"
            )
        return
    known = task_names()
    if name not in known:
        raise ConfigError(
            f"task {name!r} is not installed here. Known: {', '.join(known)}. Install the package "
            "that brings it (entry point group shoal.tasks)"
        )


def task_names() -> Sequence[str]:
    """Return the built-in and installed tasks, without importing any of them."""
    folders = map(Path, shoal.training.tasks.__path__)
    built_in = {p.stem.replace("_", "-") for folder in folders for p in folder.glob("[a-z]*.py")}
    return sorted(built_in | {point.name for point in entry_points(group="shoal.tasks")})


def parse_run_id(text: str) -> RunId:
    """Read a run id: 64 hexadecimal digits."""
    try:
        run = bytes.fromhex(text)
    except ValueError:
        run = b""
    if len(run) != 32 or run.hex() != text:
        raise ConfigError(f"{text!r} is not a run id: 64 digits 0-9 a-f")
    return RunId(run)


def _check(message: Message, limits: Limits, where: str) -> None:
    sizes = (len(message.layout), len(message.initial_root), len(message.founder))
    if sizes != (32, 32, 32):
        raise ConfigError(f"{where}: a hash or a key in it has not 32 bytes")
    if not 1 <= message.parameters <= PARAMETERS:
        raise ConfigError(f"{where}: a model of {message.parameters} parameters")
    squares = message.initial_squares
    if len(squares) > 16 or squares[:1] == b"\0":
        raise ConfigError(f"{where}: its sum of squares is no 128-bit number")
    kinds = [most.kind for most in message.most]
    if not kinds or len(kinds) > KINDS or kinds != sorted(set(kinds)):
        raise ConfigError(f"{where}: its kinds of update are not a sorted list")
    for most in message.most:
        if not most.kind.isidentifier() or len(most.kind) > 32:
            raise ConfigError(f"{where}: {most.kind[:32]!r} is no kind of update")
        if most.size > limits.payload_bytes:
            raise ConfigError(
                f"{where}: {most.kind} updates of {most.size} bytes; "
                f"this daemon takes at most {limits.payload_bytes}"
            )


def _big_endian(number: int) -> bytes:
    return number.to_bytes((number.bit_length() + 7) // 8, "big")


def another_model(found: int, wanted: int) -> str:
    """Return what to say when the task builds a model here that is not laid out as the run's.

    `found` and `wanted` are numbers of parameters.
    """
    differs = "with other shapes or another frozen part"
    if found != wanted:
        differs = f"of {found} parameters, where the run's has {wanted}"
    return (
        f"the task builds another model here, {differs}: install the version of Shoal and of the "
        "task that the founder uses, and start from the founder's model if --base names one (the "
        "whole folder: another tokenizer or config.json makes another model)"
    )
