"""Handwritten digits (scikit-learn's, 1797 images of 8 × 8) with a small perceptron.

Shapes: B batch, P = 64 pixels, C = 10 classes.
"""

from collections.abc import Iterator
from hashlib import blake2b

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  what everybody calls it

from shoal.compression.settings import SettingError
from shoal.training.task import Place, task

HELD_OUT = 5
"""One image in so many is held out."""


@task("digits")
class Digits:
    """Classify digits; the measure is the accuracy on held-out images."""

    unit = "accuracy"

    def __init__(self, place: Place, *, width: int = 64, alpha: float = 0.0) -> None:
        """`alpha`: Dirichlet(α) label skew between shards (0.1 is harsh); 0 deals evenly."""
        if width < 1 or alpha < 0:
            raise ValueError(f"width = {width}, alpha = {alpha}; use width >= 1 and alpha >= 0")
        self._place = place
        self._width = width
        self._alpha = alpha
        self._loaded: tuple[Tensor, Tensor, Tensor, Tensor] | None = None

    def model(self) -> nn.Module:
        """Return the perceptron."""
        return nn.Sequential(nn.Linear(64, self._width), nn.ReLU(), nn.Linear(self._width, 10))

    def batches(self, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        """Draw images of the own shard with replacement."""
        x_NP, y_N, _, _ = self._data()
        while True:
            drawn_B = torch.randint(len(x_NP), (self._place.batch,), generator=generator)
            yield x_NP[drawn_B], y_N[drawn_B]

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Return the cross-entropy in nats."""
        device = next(model.parameters()).device
        x_BP, y_B = (part.to(device) for part in batch)
        return F.cross_entropy(model(x_BP), y_B)

    @torch.no_grad()
    def evaluate(self, model: nn.Module, *, thorough: bool = False) -> float:
        """Return the accuracy on the held-out images."""
        _, _, x_NP, y_N = self._data()
        device = next(model.parameters()).device
        hits_N = model(x_NP.to(device)).argmax(1).cpu() == y_N
        return float(hits_N.float().mean())

    def _data(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return own images and labels, held-out images and labels."""
        if self._place.data is not None:
            raise SettingError(f"task digits brings its own images: leave out {self._place.data}")
        if self._loaded is None:
            from sklearn.datasets import load_digits  # takes a second; other tasks need not wait

            images, labels = load_digits(return_X_y=True)
            hashes = np.array([self._hash(i) for i in range(len(labels))], dtype=np.uint64)
            held_out = hashes % HELD_OUT == 0
            mine = np.flatnonzero(~held_out & self._shard(labels, hashes // HELD_OUT))
            if not len(mine):
                raise SettingError("this peer's shard of the digits is empty; use fewer shards")
            x_NP = torch.tensor(images / 16, dtype=torch.float32)
            y_N = torch.tensor(labels)
            out = np.flatnonzero(held_out)
            self._loaded = x_NP[mine], y_N[mine], x_NP[out], y_N[out]
        return self._loaded

    def _shard(self, labels: NDArray[np.int64], hashes: NDArray[np.uint64]) -> NDArray[np.bool_]:
        """Say which images are of this peer's shard."""
        place = self._place
        if place.shard is not None:
            index, count = place.shard
        else:
            index = int.from_bytes(blake2b(place.peer, digest_size=8).digest(), "little")
            count = place.min_peers
            index %= count
        if not self._alpha:
            even: NDArray[np.bool_] = hashes % count == index
            return even
        # Each class is cut between the shards at the same random proportions on every peer.
        rng = np.random.default_rng([place.seed, count])
        mine = np.zeros(len(labels), bool)
        for label in range(10):
            of_class = np.flatnonzero(labels == label)
            of_class = of_class[np.argsort(hashes[of_class], kind="stable")]
            cuts = np.cumsum(rng.dirichlet([self._alpha] * count)) * len(of_class)
            start = int(cuts[index - 1]) if index else 0
            end = len(of_class) if index == count - 1 else int(cuts[index])
            mine[of_class[start:end]] = True
        return mine

    def _hash(self, image: int) -> int:
        key = self._place.seed.to_bytes(8, "little")
        found = blake2b(image.to_bytes(4, "little"), digest_size=8, key=key)
        return int.from_bytes(found.digest(), "little")
