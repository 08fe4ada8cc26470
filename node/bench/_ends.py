"""Both ends of an update: what its author does and what a receiver does, as in a run."""

from dataclasses import replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from shoal.compression.codec import Codec
    from shoal.training.ledger import Ledger


def encode(part: "Codec", x_D: "Tensor") -> bytes:
    """Return the payload and leave in `x_D` what stays behind, as an author does."""
    from shoal.compression import codec

    payload, decoded = part.encode(x_D, key=1)
    codec.subtract(x_D, decoded, 1.0)
    return payload


def apply(part: "Codec", payload: bytes, ledger: "Ledger") -> None:
    """Add what a payload says to a ledger, as a receiver does, fingerprint and all."""
    import torch

    from shoal.compression.codec import written

    decoded = written(part.decode(payload, ledger.size, ledger.model.device), ledger.model.device)
    if decoded.values.dtype != torch.int32:  # a codec for mixing alone
        decoded = replace(decoded, values=decoded.values.round().to(torch.int32))
    ledger.add((b"", 0, 1), 1, decoded)


def empty_ledger(size: int, device: str) -> "Ledger":
    """Return a ledger of zeros in which every update counts by itself."""
    import torch

    from shoal.training.ledger import Ledger
    from shoal.training.turn_rules.sum import Sum

    zeros_D = torch.zeros(size, dtype=torch.int32, device=device)
    return Ledger(zeros_D, Sum())
