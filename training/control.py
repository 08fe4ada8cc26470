"""Error control with shared memory: the contract, the registry, and how floats become frames.

A compressor alone drops what it does not send, for ever. These methods send the *difference* to
something that the sender and all its receivers hold alike, so that what was sent stays known and
what was dropped is still there to be sent. Each is a state machine without clock or network:

    at = control.point(x)                           where the author takes its gradient
    payload = control.publish(gradient, key=…)      pending until commit(number) or discard()
    control.receive(author, number, payload)        everybody's frames, the own ones among them
    direction = control.close(x)                    end of the round: x ← x - step · direction

A *round* is one frame of each author that takes part (a turn in lockstep). Peers that received
the same frames and closed the same rounds hold bit-identical memories: an author applies what its
own frame *decodes to*; sums over authors go in the order of their names; no value is computed on
one side alone. Frames of an author are numbered from 1 without gaps and taken strictly in order.

*Vectors* are one-dimensional tensors of `size` elements, float32 or (where tests compare with
formulas) float64. *Codecs* are anything with `encode(x, key=)` and `decode(payload, size)` of
`shoal.compression.codec.Codec` whose decoded values are floats; `Scaled` makes one from a codec of
that package. A method `wants` a contractive codec (E‖C(x) - x‖² ≤ (1 - δ)‖x‖²) or an unbiased one.

Adding a method is adding one file to `controls/`: a class under `@control("name")` whose first
argument is a `Seat` and whose other arguments are its settings. `ledger` says why it cannot be
used in the ledger, which is a sum and has no memory of who sent what; empty: it can.
"""

import importlib
import math
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, ClassVar, Protocol, TypeVar

import torch
from torch import Tensor

from shoal.compression.codec import Codec, Decoded, Encoded, PayloadError, written
from shoal.compression.settings import build, fill, unknown

MIXING = "keeps state that sender and receivers share, frame by frame: it enters with mixing"
SECOND_VECTOR = "needs a second shared vector, the average control variate"

LEAST_EXPONENT, MOST_EXPONENT = -42, 120
"""Of a frame's quantum 2^-e: values reach from 2^-120 to 2^73 and sums of them stay finite."""
TOP = 23
"""A frame's largest magnitude is put into [2^22, 2^23) quanta, exact in float32."""


class ControlError(ValueError):
    """The caller asked for what this state machine cannot do; the message says what to do."""


class Taken(Enum):
    """What became of a frame."""

    APPLIED = "applied"
    KNOWN = "known"
    """It had been applied before."""
    EARLY = "early"
    """One before it is missing, or its round is not yet closed: keep it and give it again."""
    REFUSED = "refused"
    """It is not a frame of this method. It counts as a frame that says nothing, for everyone."""
    DIVERGED = "diverged"
    """Its checksum says that this replica is not the author's: not applied, `lose` it."""


class Remedy(Enum):
    """What to do about a frame that is lost."""

    RESEND = "resend"
    """Ask for the frames `first` to `last` again; the author and every receiver can give them."""
    KEYFRAME = "keyframe"
    """Ask anyone who has passed `last` for a keyframe and `take` it: `keyframe()`, or where authors
    have replicas (`frames.Streams`) `keyframe_of(author)`."""
    REWEIGH = "reweigh"
    """Nothing: the round is the mean of what came. Others must leave the frame out too, or this
    peer's point is off by the frame's share until a keyframe."""


@dataclass(frozen=True, slots=True)
class Lost:
    """What a lost frame means."""

    remedy: Remedy
    author: bytes
    first: int
    last: int


@dataclass(frozen=True, slots=True)
class Seat:
    """Who uses a control, on vectors of which kind, through which codec."""

    author: bytes
    """This peer's name among the authors (peer id and log id); all are equally long."""
    codec: Codec
    """On floats; see `Scaled`."""
    size: int
    dtype: torch.dtype = torch.float32
    device: torch.device | str = "cpu"
    seed: int = 0
    """The run's: coins that all peers toss alike come from it."""

    def zeros(self) -> Tensor:
        """Return a vector of zeros."""
        return torch.zeros(self.size, dtype=self.dtype, device=self.device)


State = tuple[dict[str, Tensor], dict[str, float]]
"""Named tensors and named numbers, as a safetensors file and its header hold them."""


class Control(Protocol):
    """The contract at the top of this file."""

    ledger: ClassVar[str]
    """Why the ledger refuses it; empty: it does not."""
    wants: ClassVar[str]
    """"contractive", "unbiased" or "either": the codec's law."""

    @property
    def count(self) -> int:
        """Return the number of the last frame that was committed."""
        ...

    @property
    def listening(self) -> bool:
        """Say whether this author can publish nothing in the open round."""
        ...

    def point(self, x_D: Tensor) -> Tensor:
        """Return where the author takes its gradient when the shared point is x."""
        ...

    def correction(self) -> Tensor | None:
        """Return what the author adds to each local gradient; None: nothing."""
        ...

    def publish(self, vector_D: Tensor, *, key: int = 0) -> bytes:
        """Return the frame of this author's gradient (or mean local gradient); it is pending."""
        ...

    def commit(self, number: int) -> None:
        """The pending frame was published as `number`: apply what it decodes to."""
        ...

    def discard(self) -> None:
        """The pending frame will never be published."""
        ...

    def receive(self, author: bytes, number: int, payload: bytes) -> Taken:
        """Take in a frame; never raises for what others sent."""
        ...

    def close(self, x_D: Tensor) -> Tensor:
        """End the round at the shared point x and return the direction to step against."""
        ...

    def leave(self, author: bytes) -> None:
        """The author is gone for good; every peer must say so in the same round."""
        ...

    def lose(self, author: bytes, number: int) -> Lost:
        """Say what it means that frame `number` did not come; asked again, the next remedy."""
        ...

    def resend(self, author: bytes, number: int) -> bytes | None:
        """Return a frame that this peer still holds."""
        ...

    def keyframe(self) -> bytes:
        """Return all that is shared, exactly: what a late joiner is given, beside the point x."""
        ...

    def take(self, keyframe: bytes) -> None:
        """Take over what is newer in a keyframe; raises PayloadError and then changes nothing."""
        ...

    def checksum(self) -> bytes:
        """Return 8 bytes that agree between peers which hold the same."""
        ...

    def state(self) -> State:
        """Return everything, private and shared, for the worker's checkpoint."""
        ...

    def restore(self, state: State) -> None:
        """Inverse of `state`, on a fresh control with the same seat and settings."""
        ...


C = TypeVar("C", bound=type)
_controls: dict[str, Callable[..., Control]] = {}


def control(name: str) -> Callable[[C], C]:
    """Register a class as the method `name`."""

    def register(cls: C) -> C:
        _controls[name] = cls
        return cls

    return register


def names() -> list[str]:
    """Return the names of all methods."""
    _scan()
    return sorted(_controls)


def ledger(name: str) -> str:
    """Return why the ledger refuses method `name`; empty: it does not."""
    reason: str = _find(name).ledger  # type: ignore[attr-defined]
    return reason


def filled(name: str, settings: Mapping[str, Any], *, where: str = "control") -> dict[str, Any]:
    """Return all settings of method `name` as plain data, or raise SettingError."""
    return fill(_find(name), settings, where=where, skip=1)


def make(name: str, settings: Mapping[str, Any], seat: Seat, *, where: str = "control") -> Control:
    """Return method `name` with these settings, or raise SettingError."""
    return build(_find(name), filled(name, settings, where=where), seat, where=where)


@dataclass(frozen=True, slots=True)
class Scaled:
    """A codec of integers in quanta, on floats: a frame's quantum is a power of two of its own.

    The first byte of a payload is e + 128 for a quantum of 2^-e; the codec's payload follows. e is
    the largest for which every |x| · 2^e is below 2^23 (0 for zeros), so that the codec rounds off
    at most 2^-23 of the largest magnitude, however small gradients become; what an unbiased codec
    rounds to whole quanta it biases by no more than that. Multiplying by a power of two is exact,
    so author and receivers, CPU and CUDA, agree bit for bit.
    """

    codec: Codec
    dtype: torch.dtype = torch.float32

    @property
    def unbiased(self) -> bool:
        """Return whether the codec says that E[decode] = x."""
        return bool(getattr(self.codec, "unbiased", False))

    @property
    def inexact(self) -> str:
        """Return why the ledger cannot have it."""
        return "a frame has a quantum of its own"

    def encode(self, x_D: Tensor, *, key: int = 0) -> Encoded:
        """Return the payload of a float vector, and what it decodes to as floats."""
        most = float(x_D.abs().max()) if len(x_D) else 0.0
        if not math.isfinite(most):
            raise ValueError("cannot encode a vector with NaN or infinite elements")
        exponent = min(TOP - math.frexp(most)[1], MOST_EXPONENT) if most else 0
        if exponent < LEAST_EXPONENT:
            raise ValueError(f"a gradient has an element of {most:.3g}; lower the step")
        scaled_D = (x_D * 2.0**exponent).to(torch.float32)
        encoded = self.codec.encode(scaled_D, key=key)
        payload = bytes([exponent + 128]) + encoded.payload
        return Encoded(payload, self._floats(written(encoded.decoded, x_D.device), exponent))

    def decode(self, payload: bytes, size: int, device: torch.device | str = "cpu") -> Decoded:
        """Return the floats that a payload states, or raise PayloadError."""
        if not payload:
            raise PayloadError("the frame ends too early")
        exponent = payload[0] - 128
        if not LEAST_EXPONENT <= exponent <= MOST_EXPONENT:
            raise PayloadError(f"quantum 2^{-exponent} is out of range")
        return self._floats(written(self.codec.decode(payload[1:], size, device), device), exponent)

    def bound(self, size: int) -> int:
        """Return the most bytes of a payload."""
        return 1 + self.codec.bound(size)

    def _floats(self, decoded: Decoded, exponent: int) -> Decoded:
        values = decoded.values.to(self.dtype) * 2.0**-exponent
        return Decoded(decoded.size, values, decoded.indices)


def check_codec(method: str, wants: str, codec: Codec) -> None:
    """Refuse a codec whose law is not the one that a method's convergence rests on."""
    unbiased = bool(getattr(codec, "unbiased", False))
    if wants == "contractive" and unbiased:
        raise ValueError(
            f"{method} needs a contractive codec, for example sparse; an unbiased one makes its "
            "memory grow"
        )
    if wants == "unbiased" and not unbiased:
        raise ValueError(f"{method} needs an unbiased codec, for example qsgd or natural")


def _find(name: str) -> Callable[..., Control]:
    _scan()
    if name not in _controls:
        raise unknown("method of error control", name, _controls)
    return _controls[name]


def _scan() -> None:
    package = importlib.import_module("shoal.training.controls")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{module.name}")
