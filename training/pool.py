"""What the ledger holds of each seed of a run's pool: with one, the whole run is K integers.

    model = q · (initial + Σ_k a_k · z(key_k) mod 2³²)

FedKSeed (Qin et al. 2024, arXiv 2312.06353), kept as updates come and go, so that subtracting is
exact. Besides the sums a_k it remembers how large the steps along each seed were, from which its
Pro variant (sec. 3.4) draws: seeds along which the loss moved more are likelier.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def seeds(codec: Any) -> int:
    """Return how many seeds the pool has that a codec's directions are from; 0: it has none."""
    return int(codec.pool) if getattr(codec, "directions", "") == "pool" else 0


def chances(scores_K: Tensor) -> Tensor:
    """Return how likely seeds of these scores are: softmax of scores brought to [0, 1].

    float64[K] of sum 1; the likeliest is at most e times as likely as the least likely.
    """
    scores_K = scores_K.to(torch.float64)
    low, high = scores_K.min(), scores_K.max()
    span = high - low if high > low else torch.ones((), dtype=torch.float64)
    return torch.softmax((scores_K - low) / span, 0)


class Pool:
    """Sums and history of K seeds."""

    def __init__(self, size: int) -> None:
        self.size = size
        """K."""
        self.clear()

    def clear(self) -> None:
        """Be as before the first update."""
        self._sums = torch.zeros(self.size, dtype=torch.int32)
        self._counts = torch.zeros(self.size, dtype=torch.int64)
        self._totals = torch.zeros(self.size, dtype=torch.int64)

    @property
    def sums(self) -> Tensor:
        """Return int32[K]: a, modulo 2³²."""
        return self._sums

    def change(self, directions: Tensor, coefficients: Tensor, sign: int) -> None:
        """Let steps (int64, in units of q, along seeds of these numbers) come (1) or go (-1).

        An update counts once in the history of each of its seeds, with all it says of it.
        """
        self._sums.index_add_(0, directions, (sign * coefficients).to(torch.int32))  # wraps
        self._counts.index_add_(0, directions, torch.full_like(directions, sign))
        self._totals.index_add_(0, directions, sign * coefficients.abs())

    def weights(self, count: int) -> Tensor:
        """Return how likely the first `count` seeds are to be drawn, float64, of sum 1.

        A seed's score is the mean size of its steps, the history beginning with one of zero. What
        would be cut in the paper cannot be on the wire; units and scale do not matter.
        """
        counts_K, totals_K = self._counts[:count], self._totals[:count]
        return chances(totals_K.clamp(min=0).to(torch.float64) / (counts_K.clamp(min=0) + 1))

    def to_bytes(self) -> bytes:
        """Return the sums: 4 bytes each, little-endian."""
        return self._sums.numpy().astype("<i4").tobytes()

    def from_bytes(self, data: bytes) -> None:
        """Set the sums; the history is not known. Raises ValueError for another length."""
        if len(data) != 4 * self.size:
            raise ValueError(f"{len(data)} bytes of sums where {4 * self.size} were expected")
        self.clear()
        self._sums.copy_(torch.frombuffer(bytearray(data), dtype=torch.int32))

    def tensors(self) -> dict[str, Tensor]:
        """Return everything by name, for a checkpoint."""
        return {"pool/sums": self._sums, "pool/counts": self._counts, "pool/totals": self._totals}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Set everything as `tensors` returned it; raises ValueError for what does not fit."""
        for name, mine in self.tensors().items():
            given = tensors.get(name)
            if given is None or given.shape != mine.shape or given.dtype != mine.dtype:
                raise ValueError(f"{name} is missing, or of another pool")
        for name, mine in self.tensors().items():
            mine.copy_(tensors[name])
