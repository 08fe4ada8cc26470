"""Notices when parameters are used, whoever uses them."""

from collections.abc import Callable, Container
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class Trap(TorchFunctionMode):
    """While entered, calls `touched` with a known tensor before anything looks at its numbers.

    Of this thread's calls into torch from Python; known are tensors by their ids.
    """

    def __init__(self, known: Container[int], touched: Callable[[Tensor], None]) -> None:
        super().__init__()
        self._known, self._touched = known, touched

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in _HARMLESS:
            for given in (*args, *kwargs.values()):
                for one in given if isinstance(given, list | tuple) else (given,):
                    if id(one) in self._known:
                        self._touched(one)
        return func(*args, **kwargs)


_ASKED = (
    *("device", "dtype", "shape", "ndim", "requires_grad", "grad", "grad_fn", "is_leaf", "layout"),
    *("is_cuda", "is_cpu", "is_meta", "is_sparse", "is_quantized", "itemsize", "nbytes"),
)
_HARMLESS: set[Any] = {
    *(getattr(torch.Tensor, name).__get__ for name in _ASKED if hasattr(torch.Tensor, name)),
    *(torch.Tensor.size, torch.Tensor.dim, torch.Tensor.numel, torch.Tensor.nelement),
    *(torch.Tensor.__len__, torch.Tensor.element_size, torch.Tensor.get_device),
    *(torch.Tensor.is_floating_point, torch.Tensor.is_complex, torch.Tensor.requires_grad_),
    torch.Tensor.data.__set__,  # type: ignore[attr-defined]
}
"""What may be asked of a tensor, or done to it, without its numbers."""
