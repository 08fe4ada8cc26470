"""Append-only files of checksummed frames: what was written, what was torn, what is damaged.

A segment is a header (magic with version, run id, its number) and frames. A frame is a head of
fixed size, whose own checksum makes its lengths trustworthy, then the record, then the payload:

    head    magic · kind · flags · lengths · author · number · payload hash · record check · crc32
    record  checked by BLAKE2b-128 in the head
    payload checked by its BLAKE2b-256 in the head

What does not check is never trusted. A frame that the file ends in the middle of is *torn*: an
append that was interrupted and never acknowledged; it is cut. Anything else that does not check is
*damage*: the rest of that segment is kept aside as `NAME.bad`.
"""

import contextlib
import errno
import mmap
import os
import struct
import threading
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import IntEnum
from hashlib import blake2b
from pathlib import Path

from shoal.gossip.names import Author, Hash, PeerId, RunId
from shoal.node.errors import ConfigError
from shoal.node.files import sync_directory

_SEGMENT_MAGIC = b"shoalog1"
_SEGMENT = struct.Struct("<8s32sQI")
_FRAME_MAGIC = b"SHFR"
_HEAD = struct.Struct("<4sBBHIQ32sQQ32s16s")
_CRC = struct.Struct("<I")
HEAD_BYTES = _HEAD.size + _CRC.size
_OWN = 1
_HAS_PAYLOAD = 2
_READERS = 16
_COPY = 1 << 20
_TORN = "a frame is cut off"


class Kind(IntEnum):
    """What a frame holds."""

    UPDATE = 1
    PROOF = 2
    ADMISSION = 3
    FORGOTTEN = 4
    """It could not be read any more; its bytes are passed over."""


class Place(int):
    """Where a frame lies: segment number and offset in one integer, to keep the index small."""

    __slots__ = ()

    @property
    def segment(self) -> int:
        """Return the number of the segment."""
        return self >> 40

    @property
    def offset(self) -> int:
        """Return the offset in the segment."""
        return self & ((1 << 40) - 1)


def place(segment: int, offset: int) -> Place:
    """Join a segment number and an offset."""
    return Place(segment << 40 | offset)


@dataclass(frozen=True, slots=True)
class Head:
    """The fixed part of a frame."""

    kind: Kind
    author: Author
    number: int
    record_bytes: int
    payload: Hash
    payload_bytes: int
    own: bool = False
    has_payload: bool = False
    check: bytes = b""
    """BLAKE2b-128 of the record."""

    @property
    def frame_bytes(self) -> int:
        """Return the bytes of the whole frame."""
        return HEAD_BYTES + self.record_bytes + (self.payload_bytes if self.has_payload else 0)

    def encode(self) -> bytes:
        """Return the head's bytes."""
        body = _HEAD.pack(
            _FRAME_MAGIC,
            self.kind,
            self.own * _OWN | self.has_payload * _HAS_PAYLOAD,
            0,
            self.record_bytes,
            self.payload_bytes,
            self.author.peer,
            self.author.log,
            self.number,
            self.payload,
            self.check,
        )
        return body + _CRC.pack(zlib.crc32(body))


@dataclass(frozen=True, slots=True)
class Found:
    """One frame as `Segments.examine` finds it."""

    at: Place
    head: Head | None
    """None: not even its head checks, so nothing that it says counts."""
    record: bytes
    wrong: str
    """What does not check; empty when the frame is whole."""


class DamageError(Exception):
    """A frame does not check although the file does not end in it."""


class TornError(Exception):
    """The file ends in the middle of a frame."""


def decode_head(data: bytes, *, largest_record: int, largest_payload: int) -> Head:
    """Parse a head strictly; raises `TornError` if it is cut off, `DamageError` if it is wrong."""
    if len(data) < HEAD_BYTES:
        raise TornError
    if _CRC.unpack_from(data, _HEAD.size)[0] != zlib.crc32(data[: _HEAD.size]):
        raise DamageError("the head of a frame does not check")
    magic, kind, flags, zero, record, payload, peer, log, number, digest, check = _HEAD.unpack_from(
        data
    )
    if magic != _FRAME_MAGIC or zero or flags > 3 or kind not in tuple(Kind):
        raise DamageError("not a frame that this version writes")
    if record > largest_record or payload > largest_payload:
        raise DamageError("a frame larger than the limits allow")
    return Head(
        kind=Kind(kind),
        author=Author(PeerId(peer), log),
        number=number,
        record_bytes=record,
        payload=Hash(digest),
        payload_bytes=payload,
        own=bool(flags & _OWN),
        has_payload=bool(flags & _HAS_PAYLOAD),
        check=check,
    )


def check_of(record: bytes) -> bytes:
    """Return the check that a head carries for its record."""
    return blake2b(record, digest_size=16).digest()


class Disk:
    """The three calls that can fail for want of a healthy disk; tests put a sick one here."""

    def write(self, fd: int, buffers: list[memoryview], offset: int) -> int:
        """Write some of `buffers` at `offset`; return how many bytes."""
        return os.pwritev(fd, buffers, offset)

    def sync(self, fd: int) -> None:
        """Wait until everything written is on the disk."""
        os.fsync(fd)

    def truncate(self, fd: int, size: int) -> None:
        """Cut the file."""
        os.ftruncate(fd, size)


@dataclass(frozen=True, slots=True)
class Bounds:
    """What the segments may hold."""

    segment_bytes: int = 64 << 20
    """A new segment starts beyond this; one frame may be larger and then has one of its own."""
    record_bytes: int = 4 << 20
    payload_bytes: int = 1 << 30


class Segments:
    """The files of one log. One writer; readers may be other threads."""

    def __init__(
        self, directory: Path, run: RunId, *, bounds: Bounds, disk: Disk, readonly: bool
    ) -> None:
        self.directory = directory
        self.run = run
        self.bounds = bounds
        self.readonly = readonly
        self.notes: list[str] = []
        """What was cut or set aside, for people."""
        self.damaged = False
        """Something that had been acknowledged may be lost."""
        self.sizes: dict[int, int] = {}
        self._cuts: dict[int, int] = {}
        """Where files are to end, found by `scan`."""
        self._disk = disk
        self._tail: tuple[int, int] | None = None
        self._abandoned = False
        self._readers: dict[int, int] = {}
        self._lock = threading.Lock()

    @property
    def size(self) -> int:
        """Return the bytes of all segments."""
        return sum(self.sizes.values())

    def path(self, segment: int) -> Path:
        """Return the file of a segment."""
        return self.directory / f"{segment:08d}.seg"

    # ------------------------------------------------------------------ opening

    def scan(self) -> Iterator[tuple[Place, Head, bytes]]:
        """Check every segment and yield its frames; note or set aside what does not check.

        `cut` then cuts it off, before anything is written. Payloads are hashed in the last segment
        only, where a torn write can be; those of sealed segments, which were synced whole, are
        hashed when they are read.
        """
        numbers = sorted(int(p.stem) for p in self.directory.glob("*.seg") if p.stem.isdecimal())
        for number in numbers:
            yield from self._scan_segment(number, last=number == numbers[-1])

    def _scan_segment(self, number: int, *, last: bool) -> Iterator[tuple[Place, Head, bytes]]:
        with self.path(number).open("rb") as file:
            fd, good = file.fileno(), 0
            end = os.fstat(fd).st_size
            try:
                self._check_segment_head(os.pread(fd, _SEGMENT.size, 0), number)
                good = _SEGMENT.size
                while good < end:
                    head, record = self._read_frame(fd, good, end, payloads=last)
                    yield place(number, good), head, record
                    good += head.frame_bytes
            except TornError:
                # Sealed segments were synced whole: no crash cuts their end off.
                self.damaged = self.damaged or not last
                self._note_torn(number, good, end)
            except DamageError as damage:
                self._set_aside(number, good, str(damage))
            else:
                self.sizes[number] = good

    def _check_segment_head(self, data: bytes, number: int) -> None:
        if len(data) < _SEGMENT.size:
            raise TornError
        magic, run, stated, crc = _SEGMENT.unpack(data)
        if crc != zlib.crc32(data[: _SEGMENT.size - 4]) or stated != number:
            raise DamageError("the head of the segment does not check")
        if magic != _SEGMENT_MAGIC:
            raise ConfigError(
                f"{self.path(number)} was written by another version of Shoal; use that version "
                "to export the model, or move the directory aside and join again"
            )
        if run != self.run:
            raise ConfigError(
                f"{self.path(number)} belongs to another run; move it out of {self.directory}"
            )

    def _read_frame(self, fd: int, at: int, end: int, *, payloads: bool) -> tuple[Head, bytes]:
        head = decode_head(
            os.pread(fd, HEAD_BYTES, at),
            largest_record=self.bounds.record_bytes,
            largest_payload=self.bounds.payload_bytes,
        )
        if at + head.frame_bytes > end:
            raise TornError
        if head.kind is Kind.FORGOTTEN:
            return head, b""
        record = os.pread(fd, head.record_bytes, at + HEAD_BYTES)
        self._check_frame(fd, at, head, record, payloads=payloads)
        return head, record

    def _check_frame(self, fd: int, at: int, head: Head, record: bytes, *, payloads: bool) -> None:
        if check_of(record) != head.check:
            raise DamageError("a record does not check")
        if payloads and head.has_payload:
            start = at + HEAD_BYTES + head.record_bytes
            hasher = blake2b(digest_size=32)
            for offset in range(0, head.payload_bytes, _COPY):
                hasher.update(os.pread(fd, min(_COPY, head.payload_bytes - offset), start + offset))
            if hasher.digest() != head.payload:
                raise DamageError("a payload does not check")

    def _note_torn(self, number: int, good: int, end: int) -> None:
        name = self.path(number).name
        self.notes.append(f"{name}: cut an interrupted write of {end - good} bytes")
        self._end(number, good)

    def _set_aside(self, number: int, good: int, why: str) -> None:
        self.damaged = True
        path = self.path(number)
        bad = path.with_suffix(".seg.bad")
        self.notes.append(f"{path.name}: {why} at byte {good}; the rest is kept as {bad.name}")
        if self.readonly:
            return
        try:
            with path.open("rb") as source, bad.open("wb") as target:
                source.seek(good)
                while piece := source.read(_COPY):
                    target.write(piece)
        except OSError as error:
            self.notes[-1] = f"{path.name}: {why} at byte {good}; cut ({error.strerror})"
            bad.unlink(missing_ok=True)
        self._end(number, good)

    def _end(self, number: int, size: int) -> None:
        self._cuts[number] = size
        if size:
            self.sizes[number] = size

    def cut(self) -> None:
        """Cut off what `scan` found: once it is written down that something may be lost."""
        for number, size in () if self.readonly else self._cuts.items():
            self._truncate(number, size)
        self._cuts = {}

    def _truncate(self, number: int, size: int) -> None:
        if not size:
            self.path(number).unlink()
            return
        fd = os.open(self.path(number), os.O_RDWR | os.O_CLOEXEC)
        try:
            self._disk.truncate(fd, size)
            self._disk.sync(fd)
        finally:
            os.close(fd)

    # ------------------------------------------------------------------ examining

    def examine(self) -> Iterator[Found]:
        """Yield every frame of every segment in order, payloads hashed, with what is wrong with it.

        Unlike `scan` this changes nothing and goes on behind damage. A frame that the last segment
        ends in the middle of is left out, with a note: a daemon may be writing it, or was.
        """
        numbers = sorted(int(p.stem) for p in self.directory.glob("*.seg") if p.stem.isdecimal())
        for number in numbers:
            with self.path(number).open("rb") as file:
                yield from self._examine(file.fileno(), number, last=number == numbers[-1])

    def _examine(self, fd: int, number: int, *, last: bool) -> Iterator[Found]:
        end = self.sizes[number] = os.fstat(fd).st_size
        try:
            self._check_segment_head(os.pread(fd, _SEGMENT.size, 0), number)
        except TornError:  # of the last one: a daemon was making it
            if not last:
                yield Found(place(number, 0), None, b"", _TORN)
            return
        except (DamageError, ConfigError) as error:
            yield Found(place(number, 0), None, b"", str(error))
        at, sound = _SEGMENT.size, True
        while at < end:
            found = self._found(fd, place(number, at), end)
            if found.wrong == _TORN and last and sound:
                self.notes.append(f"{self.path(number).name}: byte {at}: half a frame at the end")
                return
            yield found
            sound = sound and not found.wrong
            at = at + found.head.frame_bytes if found.head else _next_frame(fd, at + 1, end)

    def _found(self, fd: int, at: Place, end: int) -> Found:
        """Look at the frame at `at`; one whose head does not check has no length and no name."""
        try:
            head = self._head(os.pread(fd, HEAD_BYTES, at.offset))
            if at.offset + head.frame_bytes > end:
                return Found(at, None, b"", _TORN)
        except DamageError as damage:
            return Found(at, None, b"", str(damage))
        if head.kind is Kind.FORGOTTEN:
            return Found(at, head, b"", "")
        record = os.pread(fd, head.record_bytes, at.offset + HEAD_BYTES)
        try:
            self._check_frame(fd, at.offset, head, record, payloads=True)
        except DamageError as damage:
            return Found(at, head, record, str(damage))
        return Found(at, head, record, "")

    # ------------------------------------------------------------------ writing

    def append(self, head: Head, record: bytes, payload: bytes | None, *, sync: bool) -> Place:
        """Write one frame; on OSError nothing of it counts, now or after the next opening."""
        fd, number = self._writable(head.frame_bytes)
        start = self.sizes[number]
        try:
            self._write(fd, [head.encode(), record, *([payload] if payload else [])], start)
        except OSError:
            self._undo(fd, start)
            raise
        if sync:
            self._sync(fd, start)
        self.sizes[number] = start + head.frame_bytes
        return place(number, start)

    def prepare(self, need: int) -> None:
        """Let there be a file to which a frame of `need` bytes can be appended."""
        self._writable(need)

    def _writable(self, need: int) -> tuple[int, int]:
        """Return the file to append to: the tail while the frame fits into it, else a new one."""
        if self.readonly:
            raise OSError(errno.EROFS, "the log was opened for reading only")
        if self._tail is not None:
            fd, number = self._tail
            size = self.sizes[number]
            if size == _SEGMENT.size or size + need <= self.bounds.segment_bytes:
                return self._tail
            self._disk.sync(fd)
            self._abandon()
        number = max(self.sizes, default=0)
        resumable = number and not self._abandoned
        if resumable and self.sizes[number] + need <= self.bounds.segment_bytes:
            fd = os.open(self.path(number), os.O_RDWR | os.O_CLOEXEC)
            self._tail = fd, number
            return self._tail
        return self._create(number + 1)

    def _create(self, number: int) -> tuple[int, int]:
        path = self.path(number)
        flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
        fd = os.open(path, flags, 0o600)
        try:
            body = _SEGMENT.pack(_SEGMENT_MAGIC, self.run, number, 0)[: -_CRC.size]
            self._write(fd, [body + _CRC.pack(zlib.crc32(body))], 0)
            self._disk.sync(fd)
            sync_directory(self.directory)
        except OSError:
            os.close(fd)
            path.unlink(missing_ok=True)
            raise
        self.sizes[number] = _SEGMENT.size
        self._tail = fd, number
        self._abandoned = False
        return self._tail

    def _write(self, fd: int, buffers: list[bytes], offset: int) -> None:
        views = [memoryview(b) for b in buffers]
        while views:
            done = self._disk.write(fd, views, offset)
            offset += done
            while views and done >= len(views[0]):
                done -= len(views.pop(0))
            if views and done:
                views[0] = views[0][done:]

    def forget(self, at: Place) -> None:
        """Mark a frame as unreadable for good, so that the next opening passes over it.

        A frame whose head does not check needs no mark: the next opening sets it aside.
        """
        with contextlib.suppress(DamageError):
            head = replace(self.head(at), kind=Kind.FORGOTTEN)
            fd = os.open(self.path(at.segment), os.O_WRONLY | os.O_CLOEXEC)
            try:
                self._write(fd, [head.encode()], at.offset)
                self._disk.sync(fd)
            finally:
                os.close(fd)

    def _sync(self, fd: int, start: int) -> None:
        try:
            self._disk.sync(fd)
        except OSError:
            # After a failed fsync the kernel may call the lost pages clean: a later fsync of this
            # file would lie. So the frame goes, and so does the file as a place to write to.
            self._undo(fd, start)
            self._abandon()
            raise

    def _undo(self, fd: int, start: int) -> None:
        """Take back a frame; if the file can't be cut, spoil its head and never write behind it."""
        try:
            self._disk.truncate(fd, start)
        except OSError:
            with contextlib.suppress(OSError):
                self._write(fd, [bytes(HEAD_BYTES)], start)
            self._abandon()

    def _abandon(self) -> None:
        """Append to this segment no more."""
        if self._tail is not None:
            os.close(self._tail[0])
        self._tail = None
        self._abandoned = True

    def sync(self) -> None:
        """Wait until everything appended is on the disk."""
        if self._tail is not None:
            self._disk.sync(self._tail[0])

    def close(self) -> None:
        """Close all files."""
        self._abandon()
        with self._lock:
            for fd in self._readers.values():
                os.close(fd)
            self._readers.clear()

    # ------------------------------------------------------------------ reading

    def head(self, at: Place) -> Head:
        """Read a frame's head again; raises `DamageError`."""
        return self._head(self._read(at.segment, at.offset, HEAD_BYTES))

    def record(self, at: Place) -> tuple[Head, bytes]:
        """Read a frame's head and record; raises `DamageError`."""
        head = self.head(at)
        record = self._read(at.segment, at.offset + HEAD_BYTES, head.record_bytes)
        if check_of(record) != head.check:
            raise DamageError("a record does not check")
        return head, record

    def payload(self, at: Place, head: Head) -> bytes:
        """Read a frame's whole payload and check it; raises `DamageError`."""
        start = at.offset + HEAD_BYTES + head.record_bytes
        payload = self._read(at.segment, start, head.payload_bytes)
        if blake2b(payload, digest_size=32).digest() != head.payload:
            raise DamageError("a payload does not check")
        return payload

    def _head(self, data: bytes) -> Head:
        try:
            return decode_head(
                data,
                largest_record=self.bounds.record_bytes,
                largest_payload=self.bounds.payload_bytes,
            )
        except TornError as torn:
            raise DamageError(_TORN) from torn

    def _read(self, segment: int, offset: int, size: int) -> bytes:
        with self._lock:
            fd = self._readers.get(segment)
            if fd is None:
                if len(self._readers) >= _READERS:
                    os.close(self._readers.pop(next(iter(self._readers))))
                fd = self._open(segment)
                self._readers[segment] = fd
            data = os.pread(fd, size, offset)
            while len(data) < size:  # one call returns at most 2 GiB, or less after a signal
                more = os.pread(fd, size - len(data), offset + len(data))
                if not more:
                    raise DamageError(_TORN)
                data += more
        return data

    def _open(self, segment: int) -> int:
        path, flags = self.path(segment), os.O_RDONLY | os.O_CLOEXEC
        try:
            return os.open(path, flags)
        except OSError as error:
            # A process short of descriptors has lost no update.
            if error.errno not in (errno.EMFILE, errno.ENFILE) or not self._readers:
                raise
            os.close(self._readers.pop(next(iter(self._readers))))
            return os.open(path, flags)


def _next_frame(fd: int, at: int, end: int) -> int:
    """Return where the next head that checks begins, from `at` on, or `end`."""
    with mmap.mmap(fd, end, access=mmap.ACCESS_READ) as data:
        while (at := data.find(_FRAME_MAGIC, at)) >= 0:
            head = data[at : at + HEAD_BYTES]
            crc = _CRC.unpack_from(head, _HEAD.size)[0] if len(head) == HEAD_BYTES else -1
            if crc == zlib.crc32(head[: _HEAD.size]):
                return at
            at += 1
    return end
