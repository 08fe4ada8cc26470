"""Names and shapes of a model's trainable parameters ↔ one flat float32 vector.

The vector holds the parameters sorted by the UTF-8 bytes of their names, each row-major; a tied
parameter stands once, under its first name. Frozen parameters and buffers are not in it; that peers
hold the same frozen ones is seen from a digest in the layout's hash.
"""

import functools
import itertools
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b

import torch
from torch import Tensor, nn

from shoal.compression import perturbation
from shoal.compression.settings import SettingError

_SLAB = 1 << 18
"""Elements converted at a time on the CPU: what its caches hold …"""
_SLAB_CUDA = 1 << 24
"""… and elsewhere."""


@dataclass(frozen=True, slots=True)
class Layout:
    """Where each parameter lies in the flat vector; peers of one run have equal layouts."""

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[str, ...]
    fixed: bytes = b""
    """Digest of what is not trained but must be equal everywhere; empty: there is nothing."""

    @property
    def sizes(self) -> list[int]:
        """Return the number of elements of each parameter."""
        return [math.prod(shape) for shape in self.shapes]

    @property
    def size(self) -> int:
        """Return the length of the vector."""
        return sum(self.sizes)

    def hash(self) -> bytes:
        """Return the BLAKE2b-256 of the canonical JSON of names, shapes and types, and `fixed`."""
        rows = [list(row) for row in zip(self.names, self.shapes, self.dtypes, strict=True)]
        text = json.dumps(rows, separators=(",", ":"), ensure_ascii=False)
        rest = b"\0" + self.fixed if self.fixed else b""  # JSON holds no zero byte
        return blake2b(text.encode() + rest, digest_size=32).digest()

    def fragments(self, count: int) -> list[range]:
        """Return at most `count` contiguous ranges of whole parameters, as equal as they come.

        Parameters without elements make no range of their own.
        """
        wanted = self.size / max(1, min(count, sum(1 for size in self.sizes if size)))
        ranges: list[range] = []
        start = end = 0
        for size in self.sizes:
            end += size
            if size and end >= wanted * (len(ranges) + 1) - 0.5:
                ranges.append(range(start, end))
                start = end
        return ranges

    def shapes_in(self, part: range) -> tuple[tuple[int, ...], ...]:
        """Return the shapes of the parameters that lie in a fragment."""
        ends = itertools.accumulate(self.sizes)
        return tuple(s for s, end in zip(self.shapes, ends, strict=True) if end - 1 in part)


class Parameters:
    """A model's trainable parameters seen as one vector.

    `fixed` says what else must be equal on all peers, beside frozen parameters (a tokenizer).
    """

    def __init__(self, model: nn.Module, fixed: bytes = b"") -> None:
        self.named = dict(_trainable(model))
        if not self.named:
            raise SettingError("the model has no trainable parameters; nothing can be learnt")
        self._model, self._fixed = model, fixed
        self._sizes = [p.numel() for p in self.named.values()]

    @functools.cached_property
    def layout(self) -> Layout:
        """Return where each parameter lies; reads all frozen parameters once."""
        return Layout(
            tuple(self.named),
            tuple(tuple(p.shape) for p in self.named.values()),
            tuple(str(p.dtype).removeprefix("torch.") for p in self.named.values()),
            _digest(self._model, self._fixed),
        )

    @property
    def device(self) -> torch.device:
        """Return where the model computes."""
        return next(iter(self.named.values())).device

    @torch.no_grad()
    def read(self) -> Tensor:
        """Return the vector of the model's present values."""
        return torch.cat([p.detach().reshape(-1).float() for p in self.named.values()])

    @torch.no_grad()
    def gradients(self) -> Tensor:
        """Return the vector of the model's gradients, zero where there is none, and clear them."""
        parts = [
            torch.zeros(p.numel(), device=p.device)
            if p.grad is None
            else p.grad.reshape(-1).float()
            for p in self.named.values()
        ]
        for p in self.named.values():
            p.grad = None
        return torch.cat(parts)

    @torch.no_grad()
    def write(self, x_D: Tensor) -> None:
        """Set the model to the values of a vector."""
        for p, part in zip(self.named.values(), x_D.split(self._sizes), strict=True):  # type: ignore[no-untyped-call]
            p.copy_(part.reshape(p.shape))

    def write_integers(
        self, integers_D: Tensor, quantum_bits: int, *, key: int = 0, scale: float = 0.0
    ) -> None:
        """Set the model to q · integers + scale · z(key), without a vector of its size."""
        tensors = list(self.named.values())
        write_integers(tensors, integers_D, quantum_bits, key=key, scale=scale)

    def split(self, x_D: Tensor) -> dict[str, Tensor]:
        """Return a vector as named tensors of the right shapes."""
        parts = x_D.split(self._sizes)  # type: ignore[no-untyped-call]
        named = zip(self.layout.names, self.layout.shapes, parts, strict=True)
        return {name: part.reshape(shape) for name, shape, part in named}


@torch.no_grad()
def write_integers(
    tensors: Sequence[Tensor],
    integers_N: Tensor,
    quantum_bits: int,
    *,
    start: int = 0,
    key: int = 0,
    scale: float = 0.0,
) -> None:
    """Set tensors, one after the other N elements, to q · integers + scale · z(key).

    z begins with its element `start`. In float32, rounded once after each of the two, and only then
    to a tensor's own type: the same on every device, and what was there before leaves no trace.
    Integers from elsewhere come to the tensors' device slab by slab.
    """
    device = tensors[0].device
    slab = _SLAB if device.type == "cpu" else _SLAB_CUDA
    flats = [tensor.detach().reshape(-1) for tensor in tensors]
    ends = list(itertools.accumulate(map(len, flats)))
    number = 0
    for low in range(0, len(integers_N), slab):
        part_N = integers_N[low : low + slab].to(device)
        floats = part_N.to(torch.float32).mul_(2.0**-quantum_bits)
        if scale:
            perturbation.perturb(floats, key, scale, start=start + low)
        at = 0
        while at < len(floats):
            here = low + at - (ends[number] - len(flats[number]))
            part = flats[number][here : here + len(floats) - at]
            part.copy_(floats[at : at + len(part)])
            at += len(part)
            number += low + at == ends[number]
    for tensor, flat in zip(tensors, flats, strict=True):
        if not tensor.is_contiguous():  # then the flat one is a copy
            tensor.copy_(flat.view(tensor.shape))


def floating_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Return copies of the floating-point buffers, to see later which ones training changes.

    Those that the model itself does not save are no part of it: rotary frequencies, for one.
    """
    kept = model.state_dict().keys()
    return {
        name: buffer.detach().clone()
        for name, buffer in model.named_buffers()
        if buffer.is_floating_point() and name in kept
    }


@torch.no_grad()
def restore_buffers(model: nn.Module, before: dict[str, Tensor]) -> None:
    """Set floating-point buffers back to `before`."""
    now = dict(model.named_buffers())
    for name, old in before.items():
        now[name].copy_(old)


def changed_buffers(model: nn.Module, before: dict[str, Tensor]) -> list[str]:
    """Return the names of floating-point buffers that differ from `before`."""
    now = dict(model.named_buffers())
    return sorted(
        name for name, old in before.items() if name in now and not torch.equal(now[name], old)
    )


def buffers_refused(changed: list[str]) -> str:
    """Return why a model whose buffers change cannot be trained as asked."""
    return (
        f"training changes the model's buffers {', '.join(changed[:3])}, which do not travel; "
        "use layers without them or set run.buffers = 'local'"
    )


def _trainable(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    for name, p in _sorted(model):
        if p.requires_grad:
            if not p.is_floating_point():
                raise SettingError(f"parameter {name} has type {p.dtype}; only real floats train")
            yield name, p


def _sorted(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield every parameter once, under the first of its names."""
    seen: set[int] = set()
    every = model.named_parameters(remove_duplicate=False)
    for name, p in sorted(every, key=lambda item: item[0].encode()):
        if id(p) not in seen:
            seen.add(id(p))
            yield name, p


def _digest(model: nn.Module, fixed: bytes) -> bytes:
    """Return the BLAKE2b-256 of `fixed` and all frozen parameters; empty when there are none."""
    frozen = [(name, p) for name, p in _sorted(model) if not p.requires_grad]
    if not frozen and not fixed:
        return b""
    whole = blake2b(len(fixed).to_bytes(8, "little") + fixed, digest_size=32)
    for name, p in frozen:
        # What goes before the bytes says how many they are, so that no two models read alike.
        head = json.dumps([name, list(p.shape), str(p.dtype).removeprefix("torch.")])
        whole.update(head.encode() + b"\0")
        whole.update(p.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return whole.digest()
