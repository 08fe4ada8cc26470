"""What daemon and worker say to each other, and the bytes that carry it. No torch, no trust lost.

A frame is two lengths, a JSON header and a body:

    u32 header length · u64 body length · header · body

The header says what is asked (`do`) or answered (`is`); payloads are concatenated in the body, with
their lengths in the header. The worker answers every request once, in order. It is the daemon's own
child, but it runs the user's code: a frame that makes no sense is a `PipeError`, never a crash.
"""

import asyncio
import socket
import struct
from collections.abc import Sequence
from typing import Any, TypeVar

import msgspec

_LENGTHS = struct.Struct("<IQ")
HEADER_BYTES = 64 << 20
BODY_BYTES = 8 << 30
Buffer = bytes | bytearray | memoryview
Frontier = list[tuple[bytes, int, int]]
"""(peer, log, count), sorted."""
Lanes = tuple[int, int]
"""A fingerprint, or a change of one."""


class PipeError(Exception):
    """The other end sent what is no frame."""


# ---------------------------------------------------------------- requests


class Setup(msgspec.Struct, frozen=True):
    """What the worker trains, and what differs by peer."""

    run: dict[str, Any]
    """The five tables."""
    peer: bytes
    run_id: bytes = bytes(32)
    """Where the seeds of shared directions come from; a run that is being founded has none yet."""
    data: str = ""
    base: str = ""
    shard: tuple[int, int] | None = None
    device: str = "auto"
    device_memory: int = 0
    """Bytes of weights that may be on the device; 0: all are."""
    threads: int = 0
    allow_task: str = ""
    directory: str = ""


class Found(msgspec.Struct, frozen=True, tag_field="do", tag="found"):
    """Build the run and say what its genesis needs. Answer: `Founded`."""

    setup: Setup


class Open(msgspec.Struct, frozen=True, tag_field="do", tag="open"):
    """Build the run of a genesis and get ready. Answer: `Opened` or `NeedInitial`."""

    setup: Setup
    parameters: int
    layout: bytes
    initial_root: bytes
    initial: str
    """File of the initial integers: read when it is there, else written when the model that is
    made from the seed has the right root."""
    checkpoint: str = ""
    """File of the worker's state; used when nothing in it goes beyond `held`. Empty: none is used
    and none is written."""
    held: Frontier = []
    """What the log holds: a checkpoint that goes beyond it is ignored."""
    own: tuple[int, int] | None = None
    """Log and number of the last own update in the log: residual and momentum live on only if they
    belong to it."""
    summed: Frontier = []
    """What the snapshot in the body stands for: 4 bytes a seed of the run's pool. Where the model
    begins without a checkpoint; empty: at the initial one."""


class Item(msgspec.Struct, frozen=True, array_like=True):
    """One update of `Apply` and `Subtract`; its payload is in the body."""

    peer: bytes
    log: int
    number: int
    turn: int
    kind: str
    size: int
    """As the record declares it."""
    length: int
    """Bytes in the body; -1: the payload was never fetched, since the record alone shows that it
    counts zero."""


class Apply(msgspec.Struct, frozen=True, tag_field="do", tag="apply"):
    """Take these updates in. Answer: `Done`."""

    items: list[Item]


class Subtract(msgspec.Struct, frozen=True, tag_field="do", tag="subtract"):
    """Take these updates out again. Answer: `Done`."""

    items: list[Item]


class Reset(msgspec.Struct, frozen=True, tag_field="do", tag="reset"):
    """Go back to where the model began, to be built anew from the log. Answer: `Done`."""

    whole: bool = False
    """Begin at the initial model, and forget the snapshot that was given at the opening."""


class Turn(msgspec.Struct, frozen=True, tag_field="do", tag="turn"):
    """Train one turn; the update stays pending until `Commit` or `Discard`. Answer: `Turned`."""

    turn: int
    members: float
    lag: float = 0.0
    """How many turns the others made during the last one, beyond that one."""
    publish: bool = True
    """False: not drawn for this turn; what is learnt goes into the next update."""


class Commit(msgspec.Struct, frozen=True, tag_field="do", tag="commit"):
    """The pending update got this log and number. Answer: `Ready`."""

    log: int
    number: int
    save: bool = True
    """False: no checkpoint now, since the log on disk lacks what the model holds."""


class Discard(msgspec.Struct, frozen=True, tag_field="do", tag="discard"):
    """The pending update was not published. Answer: `Ready`."""


class Evaluate(msgspec.Struct, frozen=True, tag_field="do", tag="evaluate"):
    """Measure the shared model on held-out data. Answer: `Measured`."""


class Sums(msgspec.Struct, frozen=True, tag_field="do", tag="sums"):
    """Say what the run has added to the initial model. Answer: `Summed`."""


class Recompute(msgspec.Struct, frozen=True, tag_field="do", tag="recompute"):
    """Compute the fingerprint from the tensor itself. Answer: `Done` without outcomes."""


class Export(msgspec.Struct, frozen=True, tag_field="do", tag="export"):
    """Write the shared model as safetensors. Answer: `Ready`."""

    path: str
    metadata: dict[str, str] = {}


class Save(msgspec.Struct, frozen=True, tag_field="do", tag="save"):
    """Write the checkpoint now. Answer: `Ready`."""


class Stop(msgspec.Struct, frozen=True, tag_field="do", tag="stop"):
    """Write the checkpoint and end. Answer: `Ready`."""

    save: bool = True
    """False: leave the one that is there, since the log on disk lacks what the model holds."""


Request = (
    Found
    | Open
    | Apply
    | Subtract
    | Reset
    | Turn
    | Commit
    | Discard
    | Evaluate
    | Sums
    | Recompute
    | Export
    | Save
    | Stop
)

# ---------------------------------------------------------------- answers


class Founded(msgspec.Struct, frozen=True, tag_field="is", tag="founded"):
    """What the genesis needs."""

    parameters: int
    layout: bytes
    initial_root: bytes
    initial_squares: str
    """Hexadecimal: it can pass 2**64."""
    most: dict[str, int]
    run: dict[str, Any]
    """The five tables with every default filled in."""


class Opened(msgspec.Struct, frozen=True, tag_field="is", tag="opened"):
    """The model is at `frontier`: send what lies above it."""

    frontier: Frontier
    fingerprint: Lanes
    device: str
    kept: bool
    """Residual and momentum of the last own update live on."""
    note: str = ""
    """Why a checkpoint was not used, if one was there."""
    unit: str = ""
    """What the task's measure is in, for people."""


class NeedInitial(msgspec.Struct, frozen=True, tag_field="is", tag="need initial"):
    """This machine makes other initial integers: fetch them into the file, then `Open` again."""


class Result(msgspec.Struct, frozen=True, array_like=True):
    """What became of one update, in the order of the items."""

    delta: Lanes
    refused: str | None = None


class Done(msgspec.Struct, frozen=True, tag_field="is", tag="done"):
    """The model is at `frontier` with this fingerprint."""

    results: list[Result]
    frontier: Frontier
    fingerprint: Lanes
    out_of_range: int = 0
    """Values that left half the range of int32: above 0 is an alarm."""


class Turned(msgspec.Struct, frozen=True, tag_field="is", tag="turned"):
    """A turn is over. The payload is in the body, unless the turn was dropped."""

    kind: str
    loss: float | None
    """None stands for NaN, here and below."""
    evaluation: float | None
    steps: int
    seconds: float
    """Of the local steps alone."""
    dropped: str | None = None
    skipped: int = 0
    """Steps that taught nothing, since their loss was not finite."""
    memory: int = 0
    """Bytes: resident, or the most that were allocated on the device."""
    measured: bool = True
    """The shared model was measured: None in `evaluation` then is the result."""


class Summed(msgspec.Struct, frozen=True, tag_field="is", tag="summed"):
    """What the updates below `frontier` add up to is in the body; empty: nothing short is so."""

    frontier: Frontier
    fingerprint: Lanes


class Measured(msgspec.Struct, frozen=True, tag_field="is", tag="measured"):
    """The task's held-out measure of the shared model."""

    value: float | None


class Ready(msgspec.Struct, frozen=True, tag_field="is", tag="ready"):
    """Done."""

    problem: str = ""
    """Why it could not be done, where that is no reason to end."""


class Failed(msgspec.Struct, frozen=True, tag_field="is", tag="failed"):
    """It could not be done. `kind` "config": trying again is no use, the operator must act."""

    error: str
    kind: str


Answer = Founded | Opened | NeedInitial | Done | Turned | Summed | Measured | Ready | Failed

_encoder = msgspec.json.Encoder()
_requests: "msgspec.json.Decoder[Request]" = msgspec.json.Decoder(Request)
_answers: "msgspec.json.Decoder[Answer]" = msgspec.json.Decoder(Answer)
_Any = TypeVar("_Any")

# ---------------------------------------------------------------- bytes


def encode(message: Request | Answer, bodies: Sequence[Buffer] = ()) -> list[Buffer]:
    """Return the buffers of a frame, the bodies uncopied."""
    header = _encoder.encode(message)
    size = sum(len(body) for body in bodies)
    return [_LENGTHS.pack(len(header), size) + header, *bodies]


def decode_request(header: Buffer) -> Request:
    """Parse a request's header; raises PipeError."""
    return _decode(_requests, header)


def decode_answer(header: Buffer) -> Answer:
    """Parse an answer's header; raises PipeError."""
    return _decode(_answers, header)


def split(items: Sequence[Item], body: memoryview) -> list[bytes | None]:
    """Cut the body of `Apply` and `Subtract` into payloads; raises PipeError."""
    if sum(max(item.length, 0) for item in items) != len(body):
        raise PipeError("the payloads' lengths do not add up to the body")
    payloads: list[bytes | None] = []
    start = 0
    for item in items:
        payloads.append(bytes(body[start : start + item.length]) if item.length >= 0 else None)
        start += max(item.length, 0)
    return payloads


def _decode(decoder: "msgspec.json.Decoder[_Any]", header: Buffer) -> _Any:
    try:
        return decoder.decode(header)
    except (msgspec.DecodeError, RecursionError) as error:
        raise PipeError(f"not a message: {error}") from error


def _lengths(data: Buffer) -> tuple[int, int]:
    header, body = _LENGTHS.unpack(data)
    if header > HEADER_BYTES or body > BODY_BYTES:
        raise PipeError(f"a frame of {header} + {body} bytes is too large")
    return header, body


# ---------------------------------------------------------------- the two ends


class Blocking:
    """The worker's end."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock

    def send(self, message: Request | Answer, bodies: Sequence[Buffer] = ()) -> None:
        """Send one frame."""
        for buffer in encode(message, bodies):
            self.sock.sendall(buffer)

    def receive(self) -> tuple[bytearray, bytearray]:
        """Return the next frame's header and body; raises EOFError when the daemon is gone."""
        header, body = _lengths(self._read(_LENGTHS.size))
        return self._read(header), self._read(body)

    def _read(self, size: int) -> bytearray:
        buffer = bytearray(size)
        view = memoryview(buffer)
        while view:
            done = self.sock.recv_into(view)
            if not done:
                raise EOFError
            view = view[done:]
        return buffer


class Async:
    """The daemon's end: never blocks the loop."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        sock.setblocking(False)

    async def send(self, frame: Sequence[Buffer]) -> None:
        """Send the buffers that `encode` returned."""
        loop = asyncio.get_running_loop()
        for buffer in frame:
            await loop.sock_sendall(self.sock, buffer)

    async def receive(self) -> tuple[bytearray, bytearray]:
        """Return the next frame's header and body; raises EOFError when the worker is gone."""
        header, body = _lengths(await self._read(_LENGTHS.size))
        return await self._read(header), await self._read(body)

    async def _read(self, size: int) -> bytearray:
        loop = asyncio.get_running_loop()
        buffer = bytearray(size)
        view = memoryview(buffer)
        while view:
            done = await loop.sock_recv_into(self.sock, view)
            if not done:
                raise EOFError
            view = view[done:]
        return buffer

    def close(self) -> None:
        """Close the socket; the worker sees its end."""
        self.sock.close()
