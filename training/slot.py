"""Room on a device for one unit of a model as it travels, and how it gets there.

On CUDA a unit is gathered in pinned memory and copied on a stream of its own, so that the next one
travels while this one computes; events keep either from running into the other. Elsewhere it is
copied and that is all.
"""

from typing import Any

import torch
from torch import Tensor

from shoal.training.units import Unit


class Slot:
    """Bytes: integers of trainable parameters, and frozen ones as they are."""

    def __init__(self, size: int, device: torch.device) -> None:
        self.size = size
        self.unit: Unit | None = None
        """Whose bytes are here, or on their way."""
        self.touched = 0
        """When it was needed last, on the caller's clock."""
        self._device = device
        self._bytes = torch.empty(size, dtype=torch.uint8, device=device)
        self._cuda = device.type == "cuda"
        if self._cuda:
            self._stage = torch.empty(size, dtype=torch.uint8, pin_memory=True)
            self._stream: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            self._arrived: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._used: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]
            # Who had this memory before may still be at work with it, and who has it afterwards is
            # to wait for the last bytes that come.
            self.release()
            self._bytes.record_stream(self._stream)

    def upload(self, unit: Unit, integers_D: Tensor) -> None:
        """Begin to bring a unit; what was here is overwritten when it is no longer in use."""
        self.unit = unit
        if not self._cuda:
            _gather(unit, integers_D, self._bytes)
            return
        self._arrived.synchronize()  # or the stage would change while it is read
        _gather(unit, integers_D, self._stage)
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(self._used)
            self._bytes[: unit.size].copy_(self._stage[: unit.size], non_blocking=True)
            self._arrived.record(self._stream)

    def wait(self) -> None:
        """Let what is computed next come after the bytes."""
        if self._cuda:
            torch.cuda.current_stream(self._device).wait_event(self._arrived)

    def release(self) -> None:
        """Let bytes that come next come after what was computed until now."""
        if self._cuda:
            self._used.record(torch.cuda.current_stream(self._device))

    def numbers(self, offset: int, dtype: torch.dtype, count: int) -> Tensor:
        """Return a part of the bytes as numbers, not a copy."""
        return _numbers(self._bytes, offset, dtype, count)


def _gather(unit: Unit, integers_D: Tensor, target: Tensor) -> None:
    for run in unit.runs:
        part = integers_D[run.start : run.start + run.size]
        _numbers(target, run.offset, torch.int32, run.size).copy_(part)
    for one in unit.fixed:
        flat = _numbers(target, one.offset, one.value.dtype, one.value.numel())
        flat.copy_(one.value.reshape(-1))


def _numbers(flat: Tensor, offset: int, dtype: torch.dtype, count: int) -> Tensor:
    return flat[offset : offset + count * dtype.itemsize].view(dtype)
