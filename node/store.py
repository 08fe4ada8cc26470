"""The log of one peer in one run: updates with their payloads, proofs, admissions. Append-only.

What `append` acknowledged with `own=True` is on the disk and survives a power cut; everything else
survives a killed process. The index in memory is eight bytes an update and one entry a payload.
"""

import contextlib
import json
import logging
import secrets
import threading
from array import array
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from shoal.gossip.limits import Limits
from shoal.gossip.names import NO_HASH, Author, Hash, Key, PeerId, RunId
from shoal.gossip.records import Proof, Record, Update
from shoal.node.files import write_atomically
from shoal.node.segments import Bounds, DamageError, Disk, Head, Kind, Place, Segments, check_of

log = logging.getLogger(__name__)

MENDED = 64
"""Updates that one `mend` writes by default: the daemon's loop waits for the disk meanwhile."""
MENDED_BYTES = 32 << 20
"""It writes no more of them beyond this."""


class StoreFailed(Exception):  # noqa: N818 - the core's word for it, gossip/events.py
    """It is not stored, and nothing half-written counts. `reason` goes to `/status`."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class StoreFull(StoreFailed):
    """The bound `Limits.log_bytes` (or, in memory, `staging_bytes`) is reached."""

    def __init__(self) -> None:
        super().__init__("log full")


class DamagedError(StoreFailed):
    """An update that was stored can't be read any more: forgotten, and to be fetched anew."""

    def __init__(self, key: Key, why: str) -> None:
        super().__init__(f"disk: update {key.number} of log {key.author.log:016x}: {why}")
        self.key = key


class Stored(NamedTuple):
    """One update as it lies in the log."""

    key: Key
    raw: bytes
    """The record as it travels."""
    payload: Hash
    size: int
    has_payload: bool
    """False: it travelled inside the record, or is never fetched."""
    own: bool


@dataclass(slots=True)
class _Numbers:
    """Where one author's updates lie: an array for what has no hole below, a dict for the rest."""

    summed: int = 0
    """How many, from 1 on, a snapshot stands for: the array begins after them."""
    places: "array[int]" = field(default_factory=lambda: array("Q"))
    others: dict[int, int] = field(default_factory=dict)

    def get(self, number: int) -> int:
        if 0 < (place := number - self.summed) <= len(self.places):
            return self.places[place - 1]
        return self.others.get(number, 0)

    def put(self, number: int, at: int) -> None:
        if 0 < (place := number - self.summed) <= len(self.places):
            self.places[place - 1] = at
            return
        self.others[number] = at
        while following := self.others.pop(self.summed + len(self.places) + 1, 0):
            self.places.append(following)

    def count(self) -> int:
        """Return how many are held from 1 without a hole, those of a snapshot included."""
        try:
            return self.summed + self.places.index(0)
        except ValueError:
            return self.summed + len(self.places)

    def whole(self) -> "_Numbers":
        """Return the same without a snapshot."""
        if not self.summed:
            return self
        fresh = _Numbers(others=dict(enumerate(self.places, self.summed + 1)))
        for number, at in sorted(self.others.items()):
            fresh.put(number, at)
        return fresh


class Store:
    """The log on disk. Make one with `Store.open`."""

    def __init__(self, segments: Segments, limits: Limits) -> None:
        self.log = 0
        """Own log id: `Author(own peer, store.log)` signs the next own update."""
        self.degraded = ""
        """Why updates are kept in memory only; empty while the disk works."""
        self.admissions: dict[PeerId, bytes] = {}
        self.proofs: dict[tuple[Author, int], bytes] = {}
        """Raw proof records."""
        self._segments = segments
        self._limits = limits
        self._numbers: dict[Author, _Numbers] = {}
        self._payloads: dict[Hash, int] = {}
        self._memory: dict[Key, tuple[Stored, bytes | None]] = {}
        self._memory_payloads: dict[Hash, bytes] = {}
        self._memory_bytes = 0
        self._small: list[tuple[Head, bytes]] = []
        """Proofs and admissions that the disk has not taken yet."""
        self._recorded = 0
        """The log id of the next opening."""
        self._recorded_segments = 0
        self._lock = threading.RLock()

    @classmethod
    def open(
        cls,
        directory: Path,
        limits: Limits,
        *,
        run: RunId,
        readonly: bool = False,
        summed: Mapping[Author, int] | None = None,
        disk: Disk | None = None,
        segment_bytes: int = 64 << 20,
    ) -> "Store":
        """Open or create the log in `directory`, check it and cut what was torn.

        `summed`: how many updates of each author a snapshot stands for, which lies elsewhere.

        Takes a fresh own log id when anything acknowledged may be lost, so that no number is ever
        used twice (design 3.4). A disk that can't be written leaves the store `degraded`. Raises
        ConfigError when the log is another run's.
        """
        bounds = Bounds(segment_bytes, limits.message_bytes, limits.payload_bytes)
        try:
            if not readonly:
                directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            segments = Segments(
                directory, run, bounds=bounds, disk=disk or Disk(), readonly=readonly
            )
            return cls._opened(segments, limits, summed or {})
        except OSError as error:
            if readonly:
                raise
            segments = Segments(directory, run, bounds=bounds, disk=Disk(), readonly=True)
            store = cls._opened(segments, limits, summed or {})
            store.degrade(_reason(error))
            return store

    @classmethod
    def _opened(cls, segments: Segments, limits: Limits, summed: Mapping[Author, int]) -> "Store":
        store = cls(segments, limits)
        store._numbers = {author: _Numbers(count) for author, count in summed.items()}
        for at, head, record in segments.scan():
            store._index(at, head, record)
        store._take_log_id()
        segments.cut()  # in this order: where the cut is all that shows a loss, so must the log id
        for note in segments.notes:
            log.warning("log repaired", extra={"note": note})
        return store

    @property
    def notes(self) -> tuple[str, ...]:
        """What was cut or set aside at opening, for people."""
        return tuple(self._segments.notes)

    @property
    def size(self) -> int:
        """Return the bytes on disk (and in memory while degraded)."""
        return self._segments.size + self._memory_bytes

    @property
    def whole(self) -> bool:
        """Whether all that is held is on disk, and the next update will be written there."""
        return not (self.degraded or self._small)

    @property
    def waiting(self) -> int:
        """Return how many updates are in memory only."""
        return len(self._memory)

    @property
    def full(self) -> bool:
        """Whether another update of a usual size would be refused."""
        return self._segments.size >= self._limits.log_bytes

    # ------------------------------------------------------------------ writing

    def append(self, record: Record, payload: bytes | None = None, *, own: bool = False) -> None:
        """Keep an update with its payload, or a proof; `own`: on the disk before this returns.

        What is held already is not written again. Raises `StoreFailed`.
        """
        statement = record.statement
        with self._lock:
            match statement:
                case Update():
                    self._append_update(statement, record.raw, payload, own=own)
                case Proof():
                    self._append_proof(statement, record.raw)
                case _:
                    raise TypeError(f"{type(statement).__name__} records are not kept")

    def keep_admission(self, peer: PeerId, admission: bytes) -> None:
        """Keep the proof that `peer` was admitted, with the log that its updates are in."""
        with self._lock:
            if self.admissions.get(peer) == admission:
                return
            self.admissions[peer] = admission
            head = _head(Kind.ADMISSION, Author(peer, 0), 0, admission)
            self._write_small(head, admission, sync=False)

    def forget_snapshot(self) -> None:
        """Count only what is here, number by number."""
        with self._lock:
            self._numbers = {author: n.whole() for author, n in self._numbers.items()}

    def degrade(self, reason: str) -> int:
        """Go on in memory under a fresh log id, and return it: the disk can't be trusted now.

        What is in memory is served and read like the rest, up to `Limits.staging_bytes`, and gone
        after a restart unless `mend` could write it.
        """
        with self._lock:
            self.degraded = self.degraded or reason
            self.log = secrets.randbits(64) or 1
            return self.log

    def mend(self, most: int | None = MENDED) -> bool:
        """Write what the disk did not take, in its order; say whether the log is whole there.

        At most `most` updates, None: all. What can't be written waits on. Own updates are numbered
        under the fresh log id in memory until every one of them is synced, and only then is that
        id the next opening's: whatever is lost on the way, no number is used twice.
        """
        with self._lock:
            if self.whole:
                return True
            if self._segments.readonly:
                return False
            try:
                self._mend(most)
            except StoreFailed as error:
                self.degraded = self.degraded and error.reason
            return self.whole

    def _mend(self, most: int | None) -> None:
        while self._small:
            self._write(*self._small[0], None, sync=True)
            del self._small[0]
        end = self._segments.size + MENDED_BYTES
        for key in list(islice(self._memory, most)):
            if most is None or self._segments.size < end:
                self._mend_update(key)
        if self._memory or not self.degraded:
            return
        self.sync()
        self._memory_bytes, reason, self.degraded = 0, self.degraded, ""
        try:
            self._record_log_id()
        except OSError as error:
            self.degraded = reason
            raise StoreFailed(_reason(error)) from error
        self.log = self._recorded

    def _mend_update(self, key: Key) -> None:
        """Let an update be on the disk instead of in memory."""
        stored, payload = self._memory[key]
        head = _head(Kind.UPDATE, *key, stored.raw, payload, stored.payload, own=stored.own)
        self._index(self._write(head, stored.raw, payload, sync=stored.own), head, stored.raw)
        del self._memory[key]
        self._memory_payloads.pop(stored.payload, None)  # the disk has it now
        self._memory_bytes -= head.frame_bytes

    def adopt_log(self, log: int) -> None:
        """Number own updates under `log` from now on, also after a restart.

        The core takes a fresh one when others have numbers of ours that this disk lacks.
        """
        with self._lock:
            self.log = self._recorded = log
            try:
                self._record_log_id()
            except OSError as error:
                self.degraded = self.degraded or _reason(error)

    def sync(self) -> None:
        """Wait until everything is on the disk."""
        with self._lock:
            try:
                self._segments.sync()
            except OSError as error:
                raise StoreFailed(_reason(error)) from error

    def close(self) -> None:
        """Close the files; syncs first when the disk allows it."""
        with self._lock:
            try:
                self._segments.sync()
            except OSError as error:
                log.warning("log not synced at close", extra={"error": _reason(error)})
            self._segments.close()

    def _append_update(
        self, update: Update, raw: bytes, payload: bytes | None, *, own: bool
    ) -> None:
        key = Key(update.author, update.number)
        held = self._find(key)
        if held is not None and (held.has_payload or payload is None):
            return
        head = _head(
            Kind.UPDATE, update.author, update.number, raw, payload, update.payload, own=own
        )
        if self.degraded:
            if own and update.author.log != self.log:
                # The disk keeps this log id for the next opening, but not this number.
                raise StoreFailed(self.degraded)
            self._remember(key, head, raw, payload)
            return
        at = self._write(head, raw, payload, sync=own)
        self._index(at, head, raw)

    def _append_proof(self, proof: Proof, raw: bytes) -> None:
        where = (proof.author, proof.number)
        if where in self.proofs:
            return
        self.proofs[where] = raw
        self._write_small(_head(Kind.PROOF, proof.author, proof.number, raw), raw, sync=True)

    def _write_small(self, head: Head, raw: bytes, *, sync: bool) -> None:
        """Write a proof or an admission; what the disk refuses waits for `mend`."""
        if self.degraded:
            self._small.append((head, raw))
            return
        try:
            self._write(head, raw, None, sync=sync)
        except StoreFull:
            raise
        except StoreFailed:
            self._small.append((head, raw))
            raise

    def _write(self, head: Head, raw: bytes, payload: bytes | None, *, sync: bool) -> Place:
        # Proofs and admissions are small and decide what counts: they may use 1/64 more.
        room = self._limits.log_bytes
        if head.kind is not Kind.UPDATE:
            room += max(room // 64, 1 << 20)
        if self._segments.size + head.frame_bytes > room:
            raise StoreFull
        try:
            # In this order: of what is refused here nothing may be on disk.
            self._segments.prepare(head.frame_bytes)
            if len(self._segments.sizes) != self._recorded_segments:
                self._record_log_id()
            at = self._segments.append(head, raw, payload, sync=sync)
        except OSError as error:
            raise StoreFailed(_reason(error)) from error
        return at

    def _remember(self, key: Key, head: Head, raw: bytes, payload: bytes | None) -> None:
        if self._memory_bytes + head.frame_bytes > self._limits.staging_bytes:
            raise StoreFull
        self._memory[key] = _stored(key, head, raw), payload
        self._memory_bytes += head.frame_bytes
        if payload is not None:
            self._memory_payloads[head.payload] = payload

    # ------------------------------------------------------------------ reading

    def get(self, author: Author, number: int) -> tuple[bytes, bytes | None] | None:
        """Return an update's record and its payload, or None when it is not here.

        Raises `DamagedError` (and forgets it) when it can't be read any more.
        """
        key = Key(author, number)
        with self._lock:
            if key in self._memory:
                stored, payload = self._memory[key]
                return stored.raw, payload
            at = self._place(key)
            if not at:
                return None
            try:
                head, raw = self._segments.record(at)
                payload = self._segments.payload(at, head) if head.has_payload else None
            except (DamageError, OSError) as error:
                raise self._forget(key, error) from error
            return raw, payload

    def record(self, author: Author, number: int) -> bytes | None:
        """Return an update's record alone, or None when it is not here.

        Raises `DamagedError` like `get`.
        """
        key = Key(author, number)
        with self._lock:
            if key in self._memory:
                return self._memory[key][0].raw
            at = self._place(key)
            if not at:
                return None
            try:
                return self._segments.record(at)[1]
            except (DamageError, OSError) as error:
                raise self._forget(key, error) from error

    def has(self, author: Author, number: int) -> bool:
        """Tell whether an update is held."""
        key = Key(author, number)
        return key in self._memory or bool(self._place(key))

    def payload(self, payload: Hash) -> bytes | None:
        """Return a payload by its hash, or None when it is not here.

        Raises `DamagedError` (and forgets the update) when it can't be read any more.
        """
        with self._lock:
            if payload in self._memory_payloads:
                return self._memory_payloads[payload]
            at = self._payloads.get(payload)
            if at is None:
                return None
            try:
                head = self._segments.head(Place(at))
            except (DamageError, OSError):
                return None
            try:
                return self._segments.payload(Place(at), head)
            except (DamageError, OSError) as error:
                raise self._forget(Key(head.author, head.number), error) from error

    def records(self) -> Iterator[Stored]:
        """Yield every update held, in the order of writing."""
        places = [at for numbers in self._numbers.values() for at in _all(numbers)]
        for at in sorted(places):
            try:
                head, raw = self._segments.record(Place(at))
            except (DamageError, OSError) as error:
                log.warning("update unreadable", extra={"error": str(error)})
                continue
            yield _stored(Key(head.author, head.number), head, raw)
        for stored, _ in list(self._memory.values()):
            yield stored

    def counts(self) -> dict[Author, int]:
        """Return how many updates of each author are held from 1 without a hole.

        Those that a snapshot stands for are held.
        """
        counts = {author: numbers.count() for author, numbers in self._numbers.items()}
        for author, number in sorted(self._memory):
            if counts.get(author, 0) == number - 1:
                counts[author] = number
        return counts

    # ------------------------------------------------------------------ inside

    def _index(self, at: Place, head: Head, record: bytes) -> None:
        match head.kind:
            case Kind.UPDATE:
                self._numbers.setdefault(head.author, _Numbers()).put(head.number, int(at))
                if head.has_payload:
                    self._payloads[head.payload] = int(at)
            case Kind.PROOF:
                self.proofs[head.author, head.number] = record
            case Kind.ADMISSION:
                self.admissions[head.author.peer] = record

    def _place(self, key: Key) -> Place | None:
        numbers = self._numbers.get(key.author)
        at = numbers.get(key.number) if numbers else 0
        return Place(at) if at else None

    def _find(self, key: Key) -> Stored | None:
        if key in self._memory:
            return self._memory[key][0]
        at = self._place(key)
        if not at:
            return None
        try:
            return _stored(key, *self._segments.record(at))
        except (DamageError, OSError) as error:
            self._forget(key, error)
            return None

    def _forget(self, key: Key, error: Exception) -> DamagedError:
        """Forget an update that can't be read any more, here and for the next opening.

        If it may be an own one, that opening takes a fresh log id: its number was used.
        """
        at = Place(self._place(key) or 0)
        self._numbers[key.author].put(key.number, 0)
        self._payloads = {h: p for h, p in self._payloads.items() if p != at}
        why = _reason(error) if isinstance(error, OSError) else str(error)
        log.warning("update unreadable", extra={"number": key.number, "error": why})
        if not self._segments.readonly and not self.degraded:
            with contextlib.suppress(OSError):
                if key.author.log == self.log:
                    self._recorded = secrets.randbits(64) or 1
                    self._record_log_id()
                self._segments.forget(at)  # last: nothing shows then that its number was used
        return DamagedError(key, why)

    # ------------------------------------------------------------------ own log id

    def _take_log_id(self) -> None:
        """Go on with the recorded log id, or take a fresh one when part of the log may be lost."""
        recorded, *were = read_log_id(self._segments.directory / "log.json")
        count, last = self._files()
        lost = self._segments.damaged or count < were[0] or last < were[1]
        if recorded and not lost:
            self.log = self._recorded = recorded
            self._recorded_segments = were[0]
            return
        if recorded or count:
            self._segments.notes.append("part of the log is lost: going on under a fresh log id")
        self.log = self._recorded = secrets.randbits(64) or 1
        if not self._segments.readonly:
            self._record_log_id()

    def _files(self) -> tuple[int, int]:
        return len(self._segments.sizes), max(self._segments.sizes, default=0)

    def _record_log_id(self) -> None:
        """Write the log id down, with the segments that must be there while it is in use."""
        if self.degraded:
            return
        count, last = self._files()
        body = {"log": f"{self._recorded:016x}", "segments": count, "last": last}
        write_atomically(self._segments.directory / "log.json", json.dumps(body).encode() + b"\n")
        self._recorded_segments = count


def _all(numbers: _Numbers) -> Iterator[int]:
    yield from (at for at in numbers.places if at)
    yield from (at for at in numbers.others.values() if at)


def _head(
    kind: Kind,
    author: Author,
    number: int,
    record: bytes,
    payload: bytes | None = None,
    payload_hash: Hash = NO_HASH,
    *,
    own: bool = False,
) -> Head:
    return Head(
        kind=kind,
        author=author,
        number=number,
        record_bytes=len(record),
        payload=payload_hash,
        payload_bytes=len(payload or b""),
        own=own,
        has_payload=payload is not None,
        check=check_of(record),
    )


def _stored(key: Key, head: Head, raw: bytes) -> Stored:
    return Stored(key, raw, head.payload, head.payload_bytes, head.has_payload, head.own)


def read_log_id(path: Path) -> tuple[int, int, int]:
    """Return what log.json says: log id, number of segments, last segment; zeros if illegible."""
    try:
        body = json.loads(path.read_bytes())
        return int(body["log"], 16), int(body["segments"]), int(body["last"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0, 0, 0


def _reason(error: OSError) -> str:
    return f"disk: {error.strerror or error}"
