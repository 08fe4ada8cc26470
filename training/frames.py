"""Frames of error control: numbered, kept for resending, checked; and what is shared by them.

A frame is one byte of flags (1: a checksum follows, 2: the body is dense floats), eight bytes of
checksum if so, what the method itself adds (a fixed number of bytes), and the codec's payload. The
checksum is of what author and receivers share *before* the frame, so a replica that differs is
found before it is used; every 32nd frame of an author carries one. That also finds out who gave a
false keyframe.

`Streams` keep one replica for every author; `Rounds` collect the frames of a round and change a
memory that all share when it is closed. The methods in `controls/` build on one or the other.
"""

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from shoal.compression.codec import Contribution, Decoded, Encoded, PayloadError, written
from shoal.training.control import ControlError, Lost, Remedy, Seat, State, Taken

CHECKED = 32
"""Every so many frames of an author carry a checksum."""
KEPT_FRAMES = 64
"""Frames kept per author, to be given to those who missed one."""
KEPT_BYTES = 256 << 20
"""Bytes of frames kept, of all authors together."""
SUM = 8


@dataclass(frozen=True, slots=True)
class Frame:
    """What a payload says."""

    decoded: Decoded
    """Floats in the seat's dtype."""
    dense: bool = False
    """Sent as plain floats instead of through the codec."""
    extra: bytes = b""
    """What the method added."""
    checksum: bytes = b""


class Numbered:
    """Numbers, repair and checkpoints of frames; a subclass says what a frame does."""

    extra_bytes = 0
    """How much the method adds to each frame."""

    def __init__(self, seat: Seat) -> None:
        self.seat = seat
        self.counts: dict[bytes, int] = {}
        """Frames applied, by author."""
        self._kept: OrderedDict[tuple[bytes, int], bytes] = OrderedDict()
        self._kept_bytes = 0
        self._asked: set[tuple[bytes, int]] = set()
        self._pending: tuple[bytes, Frame, Any] | None = None

    # ---- what a subclass says

    def _shared_with(self, author: bytes) -> tuple[Tensor, ...]:
        """Return what the author's next frame builds on."""
        raise NotImplementedError

    def _apply(self, author: bytes, frame: Frame | None) -> None:
        """Do what a frame says; None: it was refused and says nothing."""
        raise NotImplementedError

    def _keep_private(self, memory: Any) -> None:
        """The pending frame was published: this is the author's memory from now on."""
        raise NotImplementedError

    def _forget_private(self) -> None:
        """The author's memory belongs to another frame than the last: begin anew."""
        raise NotImplementedError

    def _private(self) -> dict[str, Tensor]:
        """Return the author's memory by name, what there is of it."""
        raise NotImplementedError

    def _set_private(self, memory: Mapping[str, Tensor]) -> None:
        raise NotImplementedError

    def _shared(self) -> dict[str, Tensor]:
        """Return all that is shared by name."""
        raise NotImplementedError

    def _check_shared(self, shared: Mapping[str, Tensor], authors: list[bytes]) -> None:
        """Raise PayloadError unless this is shared state of this method and size."""
        raise NotImplementedError

    def _take_shared(self, shared: Mapping[str, Tensor], counts: Mapping[bytes, int]) -> None:
        """Take over what is newer, and its counts."""
        raise NotImplementedError

    def _set_shared(self, shared: Mapping[str, Tensor]) -> None:
        """Set all that is shared, as a checkpoint held it."""
        raise NotImplementedError

    def _open_round(self) -> dict[str, Tensor]:
        """Return the frames of the open round, for a checkpoint."""
        return {}

    def _set_open_round(self, frames: Mapping[str, Tensor]) -> None:
        pass

    def _numbers(self) -> dict[str, float]:
        return {}

    def _set_numbers(self, numbers: Mapping[str, float]) -> None:
        pass

    def _busy(self, author: bytes) -> bool:
        """Say whether the author's next frame must wait."""
        return False

    # ---- the author's side

    @property
    def count(self) -> int:
        """Return the number of this author's last frame."""
        return self.counts.get(self.seat.author, 0)

    @property
    def listening(self) -> bool:
        """Return False: there is always something to say."""
        return False

    def point(self, x_D: Tensor) -> Tensor:
        """Return x."""
        return x_D

    def correction(self) -> Tensor | None:
        """Return nothing."""
        return None

    def commit(self, number: int) -> None:
        """Apply what the pending frame decodes to."""
        if self._pending is None:
            raise ControlError("nothing is pending: publish before commit")
        if number != self.count + 1:
            raise ControlError(f"frame {number} where {self.count + 1} comes next; restore first")
        payload, frame, memory = self._pending
        self._pending = None
        self._keep_private(memory)
        self._apply(self.seat.author, frame)
        self._passed(self.seat.author, number, payload)

    def discard(self) -> None:
        """Forget the pending frame."""
        self._pending = None

    def _stage(self, body: Encoded | Tensor, memory: Any, *, extra: bytes = b"") -> bytes:
        """Make the pending frame of an encoded vector, or of a vector to be sent as it is."""
        dense = isinstance(body, Tensor)
        if isinstance(body, Tensor):
            body = Encoded(_to_bytes(body), Decoded(self.seat.size, body.clone()))
        author = self.seat.author
        checked = (self.count + 1) % CHECKED == 0
        checksum = digest(*self._shared_with(author)) if checked else b""
        payload = bytes([checked | dense << 1]) + checksum + extra + body.payload
        self._pending = (
            payload,
            Frame(written(body.decoded, self.seat.device), dense, extra, checksum),
            memory,
        )
        return payload

    # ---- everybody's side

    def receive(self, author: bytes, number: int, payload: bytes) -> Taken:
        """Take in the author's next frame."""
        if len(author) != len(self.seat.author):
            raise ControlError("all authors' names must be equally long")
        count = self.counts.get(author, 0)
        if number <= count:
            return Taken.KNOWN
        if number > count + 1 or self._busy(author):
            return Taken.EARLY
        try:
            frame = self._open(payload)
        except PayloadError:
            self._apply(author, None)
            self._passed(author, number, payload)
            return Taken.REFUSED
        if frame.checksum and frame.checksum != digest(*self._shared_with(author)):
            self._asked.add((author, number))  # sending it again would not help
            return Taken.DIVERGED
        if author == self.seat.author:
            self._pending = None
            self._forget_private()
        self._apply(author, frame)
        self._passed(author, number, payload)
        return Taken.APPLIED

    def lose(self, author: bytes, number: int) -> Lost:
        """Ask for the missing frames; when asked again, for a keyframe."""
        first = self.counts.get(author, 0) + 1
        if number < first:
            raise ControlError(f"frame {number} is not lost: it was applied")
        again = (author, number) in self._asked
        self._asked.add((author, number))
        return Lost(Remedy.KEYFRAME if again else Remedy.RESEND, author, first, number)

    def resend(self, author: bytes, number: int) -> bytes | None:
        """Return a frame if it is still held."""
        return self._kept.get((author, number))

    def _open(self, payload: bytes) -> Frame:
        """Return what a frame says, or raise PayloadError."""
        if not payload or payload[0] > 3:
            raise PayloadError("not a frame")
        checked, dense = payload[0] & 1, payload[0] >> 1
        start = 1 + SUM * checked + self.extra_bytes
        if len(payload) < start:
            raise PayloadError("the frame ends too early")
        body = payload[start:]
        seat = self.seat
        if dense:
            values = _from_bytes(body, seat)
            decoded = Decoded(seat.size, values)
        else:
            decoded = written(seat.codec.decode(body, seat.size, seat.device), seat.device)
        extra = payload[start - self.extra_bytes : start]
        return Frame(decoded, bool(dense), extra, payload[1 : 1 + SUM * checked])

    def _passed(self, author: bytes, number: int, payload: bytes) -> None:
        self.counts[author] = number
        self._asked = {(who, n) for who, n in self._asked if who != author or n > number}
        self._kept[author, number] = payload
        self._kept_bytes += len(payload)
        old = self._kept.pop((author, number - KEPT_FRAMES), b"")
        self._kept_bytes -= len(old)
        while self._kept_bytes > KEPT_BYTES:
            self._kept_bytes -= len(self._kept.popitem(last=False)[1])

    # ---- joining, checkpoints

    def _closed_counts(self) -> dict[bytes, int]:
        """Return the counts that `_shared` belongs to."""
        return self.counts

    def keyframe(self) -> bytes:
        """Return what is shared as a safetensors file."""
        return self._pack(self._closed_counts(), self._shared())

    def _pack(self, held: Mapping[bytes, int], shared: Mapping[str, Tensor]) -> bytes:
        counts = sorted(held.items())
        names = np.frombuffer(b"".join(a for a, _ in counts), np.uint8)
        return bytes(
            save(
                {
                    **{name: t.detach().cpu().contiguous() for name, t in shared.items()},
                    "authors": torch.from_numpy(names.reshape(len(counts), -1).copy()),
                    "counts": torch.tensor([n for _, n in counts], dtype=torch.int64),
                }
            )
        )

    def take(self, keyframe: bytes) -> None:
        """Take over what is newer."""
        try:
            held = load(keyframe)
        except (SafetensorError, ValueError, KeyError, OverflowError) as error:
            raise PayloadError(f"not a keyframe: {error}") from error
        authors, counts = _authors(held, len(self.seat.author))
        self._check_shared(held, authors)
        shared = {name: tensor.to(self.seat.device) for name, tensor in held.items()}
        before = self.count
        self._take_shared(shared, dict(zip(authors, counts, strict=True)))
        if self.count != before:
            self._pending = None
            self._forget_private()
        self._asked = {(who, n) for who, n in self._asked if n > self.counts.get(who, 0)}

    def checksum(self) -> bytes:
        """Return the digest of all that is shared and of how many frames of whom it holds."""
        shared = self._shared()
        counts = repr(sorted(self._closed_counts().items())).encode()
        return digest(*(shared[name] for name in sorted(shared)), about=counts)

    def state(self) -> State:
        """Return the memory; a pending frame and the frames kept for others are not part of it."""
        parts = {
            "private": self._private(),
            "shared": self._shared(),
            "round": self._open_round(),
        }
        tensors = {f"{p}/{n}": t.clone() for p, named in parts.items() for n, t in named.items()}
        numbers = {f"count/{a.hex()}": float(n) for a, n in self.counts.items()}
        return tensors, numbers | self._numbers()

    def restore(self, state: State) -> None:
        """Set the memory."""
        tensors, numbers = state
        parts: dict[str, dict[str, Tensor]] = {"private": {}, "shared": {}, "round": {}}
        for name, tensor in tensors.items():
            part, _, rest = name.partition("/")
            parts[part][rest] = tensor.clone().to(self.seat.device)
        self.counts = {
            bytes.fromhex(name.removeprefix("count/")): int(n)
            for name, n in numbers.items()
            if name.startswith("count/")
        }
        self._set_shared(parts["shared"])
        self._set_private(parts["private"])
        self._set_open_round(parts["round"])
        self._set_numbers(numbers)

    def _check_vector(self, shared: Mapping[str, Tensor], name: str) -> None:
        """Raise PayloadError unless this is a finite vector of the right kind."""
        found = shared.get(name)
        if found is None or found.shape != (self.seat.size,) or found.dtype != self.seat.dtype:
            raise PayloadError(f"the keyframe has no {name} of {self.seat.size} elements")
        if not bool(torch.isfinite(found).all()):
            raise PayloadError(f"{name} in the keyframe is not finite")


class Streams(Numbered):
    """One replica for every author; a frame is added to its author's."""

    def __init__(self, seat: Seat) -> None:
        super().__init__(seat)
        self.replicas: dict[bytes, Tensor] = {}

    def replica(self, author: bytes) -> Tensor:
        """Return what the author's frames add up to, [size]."""
        found = self.replicas.get(author)
        return self.seat.zeros() if found is None else found

    def own(self) -> Tensor:
        """Return the own replica, as every receiver has it."""
        return self.replica(self.seat.author)

    def mean(self) -> Tensor:
        """Return the mean of all replicas, summed in the order of their authors."""
        total_D = self.seat.zeros()
        for author in sorted(self.replicas):
            total_D += self.replicas[author]
        return total_D / max(1, len(self.replicas))

    def keyframe_of(self, author: bytes) -> bytes:
        """Return a keyframe of one author's replica: what a lost frame of it asks for."""
        ending = f"/{author.hex()}"
        shared = {name: t for name, t in self._shared().items() if name.endswith(ending)}
        return self._pack({a: n for a, n in self.counts.items() if a == author}, shared)

    def close(self, x_D: Tensor) -> Tensor:
        """Return the mean; who sent nothing counts with what it said before."""
        return self.mean()

    def leave(self, author: bytes) -> None:
        """The author is gone for good; every peer must say so in the same round."""
        self.replicas.pop(author, None)
        self.counts.pop(author, None)

    def _shared_with(self, author: bytes) -> tuple[Tensor, ...]:
        return (self.replica(author),)

    def _apply(self, author: bytes, frame: Frame | None) -> None:
        if author not in self.replicas:
            self.replicas[author] = self.seat.zeros()
        if frame is not None:
            self._set_extra(author, frame.extra)
            add(self.replicas[author], frame.decoded)

    def _set_extra(self, author: bytes, extra: bytes) -> None:
        """Take in what the method added to a frame."""

    def _shared(self) -> dict[str, Tensor]:
        return {f"replica/{a.hex()}": r for a, r in self.replicas.items()}

    def _check_shared(self, shared: Mapping[str, Tensor], authors: list[bytes]) -> None:
        for author in authors:
            self._check_vector(shared, f"replica/{author.hex()}")
        if len(shared) != 2 + len(authors):
            raise PayloadError("the keyframe has more than one replica an author")

    def _take_shared(self, shared: Mapping[str, Tensor], counts: Mapping[bytes, int]) -> None:
        for author, count in counts.items():
            if count > self.counts.get(author, 0):
                self.counts[author] = count
                self.replicas[author] = shared[f"replica/{author.hex()}"]

    def _set_shared(self, shared: Mapping[str, Tensor]) -> None:
        self.replicas = {
            bytes.fromhex(name.removeprefix("replica/")): tensor
            for name, tensor in shared.items()
            if name.startswith("replica/")
        }


class Rounds(Numbered):
    """A memory that all share; the frames of a round change it when the round is closed."""

    def __init__(self, seat: Seat) -> None:
        super().__init__(seat)
        self.round: dict[bytes, Frame | None] = {}
        """The frames of the open round."""
        self.closed = 0
        """Rounds closed."""

    def mean(self) -> Tensor:
        """Return the mean of the round's frames in the order of their authors; zero if none."""
        total_D, came = self.seat.zeros(), 0
        for author in sorted(self.round):
            frame = self.round[author]
            if frame is not None:
                add(total_D, frame.decoded)
                came += 1
        return total_D / max(1, came)

    def close(self, x_D: Tensor) -> Tensor:
        """Do what the round's frames say together and return the direction."""
        if self._pending is not None:
            raise ControlError("a frame is pending: commit or discard it before the round closes")
        direction_D = self._close(x_D)
        self.round = {}
        self.closed += 1
        return direction_D

    def leave(self, author: bytes) -> None:
        """The author is gone for good; every peer must say so in the same round."""
        self.round.pop(author, None)
        self.counts.pop(author, None)

    def _close(self, x_D: Tensor) -> Tensor:
        raise NotImplementedError

    def _busy(self, author: bytes) -> bool:
        return author in self.round

    def _apply(self, author: bytes, frame: Frame | None) -> None:
        self.round[author] = frame

    def _skip(self, author: bytes, number: int) -> Lost:
        """Leave the lost frame out of its round and go on without it."""
        if number < self.counts.get(author, 0) or (
            number == self.counts.get(author, 0) and self.round.get(author) is None
        ):
            raise ControlError(f"frame {number} is not lost: it was applied")
        self.round[author] = None
        self.counts[author] = number
        return Lost(Remedy.REWEIGH, author, number, number)

    def _closed_counts(self) -> dict[bytes, int]:
        return {a: n - (a in self.round) for a, n in self.counts.items()}

    def _vectors(self) -> dict[str, Tensor]:
        """Return the shared vectors by name."""
        raise NotImplementedError

    def _set_vectors(self, vectors: Mapping[str, Tensor]) -> None:
        raise NotImplementedError

    def _marks(self) -> list[int]:
        """Return the shared numbers; the first is how many rounds were closed."""
        return [self.closed]

    def _check_marks(self, marks: list[int]) -> None:
        """Raise PayloadError unless these are shared numbers."""
        if len(marks) != len(self._marks()) or min(marks) < 0:
            raise PayloadError("the keyframe does not say how many rounds were closed")

    def _set_marks(self, marks: list[int]) -> None:
        self.closed = marks[0]

    def _shared(self) -> dict[str, Tensor]:
        return self._vectors() | {"marks": torch.tensor(self._marks(), dtype=torch.int64)}

    def _check_shared(self, shared: Mapping[str, Tensor], authors: list[bytes]) -> None:
        names = set(self._vectors())
        if set(shared) != names | {"authors", "counts", "marks"}:
            raise PayloadError("the keyframe is of another method")
        for name in names:
            self._check_vector(shared, name)
        marks = shared["marks"]
        if marks.ndim != 1 or not len(marks) or marks.dtype != torch.int64:
            raise PayloadError("the keyframe does not say how many rounds were closed")
        self._check_marks(marks.tolist())

    def _take_shared(self, shared: Mapping[str, Tensor], counts: Mapping[bytes, int]) -> None:
        if int(shared["marks"][0]) > self.closed:
            self.round = {}
            self.counts = dict(counts)
            self._set_shared(shared)

    def _set_shared(self, shared: Mapping[str, Tensor]) -> None:
        self._set_marks(shared["marks"].tolist())
        self._set_vectors(shared)

    def _open_round(self) -> dict[str, Tensor]:
        none = self.seat.zeros()[:0]
        return {
            author.hex(): none if frame is None else frame.decoded.dense()
            for author, frame in self.round.items()
        }

    def _set_open_round(self, frames: Mapping[str, Tensor]) -> None:
        self.round = {
            bytes.fromhex(author): Frame(Decoded(self.seat.size, values)) if len(values) else None
            for author, values in frames.items()
        }


def add(total_D: Tensor, update: Contribution, sign: int = 1) -> None:
    """Add what a frame states (or take it off), touching no more than it touches."""
    decoded = written(update, total_D.device)
    if decoded.indices is None:
        total_D += sign * decoded.values
    else:
        total_D[decoded.indices] += sign * decoded.values


def digest(*vectors: Tensor, about: bytes = b"") -> bytes:
    """Return 8 bytes of BLAKE2b over the vectors' little-endian bytes."""
    state = blake2b(about, digest_size=SUM, person=b"shoal-replica")
    for vector in vectors:
        state.update(_to_bytes(vector))
    return state.digest()


def _to_bytes(x_D: Tensor) -> bytes:
    array = x_D.detach().cpu().numpy()
    return array.astype(array.dtype.newbyteorder("<")).tobytes()


def _from_bytes(body: bytes, seat: Seat) -> Tensor:
    width = torch.finfo(seat.dtype).bits // 8
    if len(body) != width * seat.size:
        raise PayloadError(f"{len(body)} bytes of floats where {width * seat.size} were expected")
    values = torch.from_numpy(np.frombuffer(body, f"<f{width}").astype(f"=f{width}"))
    if not bool(torch.isfinite(values).all()):
        raise PayloadError("an element is not finite")
    return values.to(seat.device)


def _authors(held: Mapping[str, Tensor], length: int) -> tuple[list[bytes], list[int]]:
    """Return whose frames a keyframe holds and how many of each, or raise PayloadError."""
    names, counts = held.get("authors"), held.get("counts")
    if names is None or counts is None or names.dtype != torch.uint8:
        raise PayloadError("the keyframe does not say whose frames it holds")
    if counts.dtype != torch.int64 or counts.ndim != 1 or bool((counts < 0).any()):
        raise PayloadError("the keyframe's counts are no counts")
    if names.shape not in {(len(counts), length), (0, 0)} or (len(counts) and not len(names)):
        raise PayloadError("the keyframe's authors are not as many as its counts")
    authors = [row.numpy().tobytes() for row in names]
    if len(set(authors)) != len(authors):
        raise PayloadError("an author twice in a keyframe")
    return authors, [int(n) for n in counts]
