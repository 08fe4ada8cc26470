"""What a codec is, what it promises, and the registry that finds one by the name in the run file.

A codec turns a vector of numbers into bytes and back: sparsify → quantise → entropy-code. The bytes
are decoded by strangers, so everything that counts is decided here, once:

*receives* `encode` takes a one-dimensional float32 vector on any device: the author's residual
   times its weight, in units of q (so that rounding an element gives the integer that it would add
   to the ledger). It may be the whole model or one contiguous fragment of it, of at least one
   element. Elements must be finite.
*returns* the payload and what it decodes to, so that the author need not decode its own bytes.
*guarantees* (1) `decode(payload, size)` is exactly the `decoded` that `encode` returned, on every
   device, with any number of threads, in every version; (2) the same vector and key give the same
   bytes; (3) no payload is longer than `bound(size)`; (4) one canonical form: length exact, padding
   zero, choices among equivalent forms fixed; (5) sparse payloads decode to (indices, values)
   without touching the rest of the model.
*refuses* `decode` raises `PayloadError` and nothing else, checks every declared length against the
   bytes at hand before it allocates, and takes time and memory linear in `size`.

Adding a codec is adding one file to `codecs/`: a frozen dataclass whose fields are its settings,
under `@codec("name")`. An empty `inexact` says that it decodes to int32 in units of q from streams
that are specified here, which the ledger needs; else it says why not, and the codec with these
settings is for mixing only. A codec that must know which tensors the vector is made of has a method
`shaped(shapes)` that returns the codec for them; the others see a length and nothing else. One
whose payloads mean something only together with the run, the author and the turn they belong to
(seeds are not sent, but follow from these) has a method `at(origin)` that returns the codec for
them, and may decode to a `Combination`; those whose author must know its directions before it
learns say `directed = True` and are `Directed`. Two more traits are optional: `unbiased = True`
says that E[decoded] = x over keys (never to be fed back), `sparsifies = True` that much is left
unsent for long, so that a residual should decay.
"""

import functools
import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeVar, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from shoal.compression import parallel, perturbation
from shoal.compression.settings import build, fill, unknown

INT32_MAX = 2**31 - 1
Shapes = tuple[tuple[int, ...], ...]


class PayloadError(ValueError):
    """These bytes are not a payload of this codec for this size: the sender's fault."""


@dataclass(frozen=True, slots=True)
class Decoded:
    """A vector as a payload states it: dense, or the touched entries alone."""

    size: int
    """Length of the vector."""
    values: Tensor
    """int32 in units of q (float32 from codecs that are not exact)."""
    indices: Tensor | None = None
    """int64, strictly increasing, one per value; None: the values are the whole vector."""
    offset: int = 0
    """Where in the model the vector begins, when it is a fragment; indices count from there."""

    def dense(self) -> Tensor:
        """Return the whole vector."""
        if self.indices is None:
            return self.values
        whole = torch.zeros(self.size, dtype=self.values.dtype, device=self.values.device)
        whole[self.indices] = self.values
        return whole


@dataclass(frozen=True, slots=True)
class Combination:
    """A vector as Σ_k a_k · z(key_k), not yet written out (`compression/perturbation.py`)."""

    size: int
    """Length of the vector."""
    keys: Tensor
    """int64[K] on the CPU: the keys' bits, no two alike."""
    coefficients: Tensor
    """int64[K] on the CPU, in units of q; Σ|a| is below 2³¹, so that no element wraps."""
    offset: int = 0
    """Where in the model the vector begins."""
    directions: Tensor | None = None
    """int64[K]: the numbers of the keys in the run's pool of seeds, where it has one."""

    def dense(self, device: torch.device | str = "cpu") -> Tensor:
        """Return the whole vector, int32."""
        whole = parallel.zeros(self.size, torch.int32, device)
        perturbation.accumulate(whole, self.keys, self.coefficients)
        return whole

    def sum_of_squares(self) -> int:
        """Return d · Σ a²: what Σ v² is over directions at right angles, and nearly is over any."""
        return self.size * sum(int(a) ** 2 for a in self.coefficients.tolist())


Contribution = Decoded | Combination
"""What a payload adds to the model, in either form."""


@dataclass(frozen=True, slots=True)
class Origin:
    """Which update a payload is: what seeds follow from."""

    run: bytes = bytes(32)
    """The run id."""
    author: bytes = bytes(32)
    """The author's public key."""
    turn: int = 1


class Encoded(NamedTuple):
    """A payload and what it decodes to."""

    payload: bytes
    decoded: Contribution


class Codec(Protocol):
    """The contract at the top of this file."""

    @property
    def inexact(self) -> str:
        """Why these settings may not be used in the ledger; empty: they may."""
        ...

    def encode(self, x_D: Tensor, *, key: int = 0) -> Encoded:
        """Return the payload of `x_D`; chance, where a codec uses any, comes from `key` alone."""
        ...

    def decode(self, payload: bytes, size: int, device: torch.device | str = "cpu") -> Contribution:
        """Return the vector of `size` elements that the payload states, or raise PayloadError."""
        ...

    def bound(self, size: int) -> int:
        """Return the most bytes that a payload of `size` elements can have."""
        ...


@runtime_checkable
class Directed(Protocol):
    """A codec whose payloads are steps along directions that its author walks along first.

    Made with `at(origin)`. A direction is a number: of a sample of the turn, or of a seed of the
    run's pool.
    """

    @property
    def perturbations(self) -> int:
        """Return the most steps that a payload may hold."""
        ...

    def draw(self, count: int, weights: Tensor | None = None, *, key: int = 0) -> Tensor:
        """Return int64[count]: the directions that this turn's author walks along, in order.

        `weights`, one per seed of a pool, say how likely each is; `key` is where chance comes from
        if the payload names its directions. Else both are ignored: everyone knows them.
        """
        ...

    def key(self, direction: int) -> int:
        """Return the key of a direction."""
        ...

    def say(self, size: int, directions: Tensor, steps: Tensor, *, key: int) -> Encoded:
        """Return the payload of float64 `steps` in units of q along the first so many drawn.

        Steps are rounded by chance, which comes from `key`, so that their mean is exact, after
        those out of range were cut. A step that is not finite counts zero.
        """
        ...


C = TypeVar("C", bound=type)
_codecs: dict[str, Callable[..., Codec]] = {}


def codec(name: str) -> Callable[[C], C]:
    """Register a frozen dataclass as the codec `name`."""

    def register(cls: C) -> C:
        _guard(cls)
        _codecs[name] = cls
        return cls

    return register


def names() -> list[str]:
    """Return the names of all codecs."""
    _scan()
    return sorted(_codecs)


def filled(name: str, settings: Mapping[str, Any], *, where: str = "update") -> dict[str, Any]:
    """Return all settings of codec `name` as plain data, or raise SettingError."""
    cls = _find(name)
    values = fill(cls, settings, where=where)
    build(cls, values, where=where)
    return values


def make(
    name: str,
    settings: Mapping[str, Any],
    *,
    shapes: Shapes | None = None,
    where: str = "update",
) -> Codec:
    """Return the codec `name` with these settings, or raise SettingError.

    `shapes` are those of the tensors that its vectors are made of, in order; without them a vector
    counts as one tensor of one dimension.
    """
    made = build(_find(name), filled(name, settings, where=where), where=where)
    shaped = getattr(made, "shaped", None)
    return made if shaped is None or shapes is None else shaped(tuple(shapes))


def directed(name: str) -> bool:
    """Say whether codec `name` speaks of steps along directions (`Directed`)."""
    return bool(getattr(_find(name), "directed", False))


def at(part: Codec, origin: Origin) -> Codec:
    """Return the codec for payloads of this origin."""
    bind: Callable[[Origin], Codec] | None = getattr(part, "at", None)
    return part if bind is None else bind(origin)


def settings_of(name: str) -> list[str]:
    """Return the names of the settings of codec `name`."""
    return sorted(fill(_find(name), {}, where=name))


def to_integers(x_D: Tensor) -> Tensor:
    """Round to the nearest integers (ties to even), within int32, as int64; refuse non-finite."""
    if not bool(torch.isfinite(x_D).all()):
        raise ValueError("cannot encode a vector with NaN or infinite elements")
    # 2^31 - 1 is no float32; 2^31 - 128 is the largest below it.
    return x_D.clamp(-2147483520.0, 2147483520.0).round().to(torch.int64)


def sum_of_squares(values: Tensor) -> int:
    """Return Σ v² of int32 values exactly; the sum may pass 2⁶⁴ (design 3.3)."""
    if loops := parallel.kernels(len(values), values):
        halves = parallel.ranges(loops.squares, len(values), values.contiguous().numpy())
        return sum((int(high) << 32) + int(low) for high, low in halves)
    total = 0
    for start in range(0, len(values), _SLAB):
        squares = values[start : start + _SLAB].to(torch.int64).square()
        total += int((squares >> 32).sum()) << 32
        total += int((squares & 0xFFFFFFFF).sum())
    return total


def squares_of(update: Contribution) -> int:
    """Return the exact integer that `clip` is compared with."""
    if isinstance(update, Combination):
        return update.sum_of_squares()
    return sum_of_squares(update.values)


def written(update: Contribution, device: torch.device | str = "cpu") -> Decoded:
    """Return a contribution element by element."""
    if isinstance(update, Decoded):
        return update
    return Decoded(update.size, update.dense(device), offset=update.offset)


def subtract(x_D: Tensor, update: Contribution, factor: float) -> None:
    """Set x ← x - update / factor in place: what is left of `x_D` when `factor · x_D` was sent."""
    decoded = written(update, x_D.device)
    values, indices, inverse = decoded.values, decoded.indices, 1 / factor
    if indices is not None:
        x_D[indices] -= values.to(torch.float32).mul_(inverse)
        return
    fits = values.dtype == torch.int32 and x_D.dtype == torch.float32 and x_D.is_contiguous()
    if fits and (loops := parallel.kernels(len(x_D), x_D, values)):
        parallel.ranges(
            loops.subtract, len(x_D), x_D.numpy(), values.contiguous().numpy(), np.float32(inverse)
        )
        return
    for start in range(0, len(x_D), _SLAB):
        part = slice(start, start + _SLAB)
        x_D[part] -= values[part].to(torch.float32).mul_(inverse)


_SLAB = 1 << 20
"""Elements at a time, so that no temporary is as large as the model."""


def _guard(cls: Any) -> None:
    """Let a codec refuse what is no vector before its own code, which looks at bits, meets it."""
    encode, decode = cls.encode, cls.decode

    @functools.wraps(encode)
    def encode_vector(self: Codec, x_D: Tensor, *, key: int = 0) -> Encoded:
        if x_D.dtype != torch.float32 or x_D.ndim != 1 or not len(x_D):
            raise ValueError(
                f"cannot encode {x_D.dtype} of shape {tuple(x_D.shape)}; give a vector of float32"
            )
        encoded: Encoded = encode(self, x_D.detach(), key=key)
        return encoded

    @functools.wraps(decode)
    def decode_vector(
        self: Codec, payload: bytes, size: int, device: torch.device | str = "cpu"
    ) -> Contribution:
        if size < 1:
            raise PayloadError(f"a vector of {size} elements has no payload")
        decoded: Contribution = decode(self, payload, size, device)
        return decoded

    cls.encode, cls.decode = encode_vector, decode_vector


def _find(name: str) -> Callable[..., Codec]:
    _scan()
    if name not in _codecs:
        raise unknown("kind of update", name, _codecs)
    return _codecs[name]


def _scan() -> None:
    package = importlib.import_module("shoal.compression.codecs")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{module.name}")
