"""The most memory that something needs while it is done."""

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path


def extra(act: Callable[[], object], device: str) -> float | None:
    """Return the most bytes in use during `act` beyond those before it; None: no way to tell."""
    if device.startswith("cuda"):
        import torch

        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        act()
        return float(torch.cuda.max_memory_allocated() - before)
    gc.collect()
    # Freed memory that malloc keeps would serve `act` without ever being seen as memory of its.
    if (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is None:
        return None
    trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
    except OSError:
        return None
    before = _resident("VmRSS")
    act()
    return float(max(0, _resident("VmHWM") - before))


def _resident(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(x.split()[1]) * 1024 for x in lines if x.startswith(name))
