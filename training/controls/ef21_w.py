"""EF21-W: EF21 in which authors with rougher functions weigh more.

    s_i = L_i / mean L;   c = C(∇f_i(x)/s_i - g_i);   g_i ← g_i + c;   direction = mean of s_i·g_i

Source: Richtárik, Gasanov and Burlachenko, "Error feedback reloaded: from quadratic to arithmetic
mean of smoothness constants", 2024, arXiv 2402.10774 (there w_i = s_i/n). For a positively
homogeneous codec, C(a·x) = a·C(x) for a > 0 (top-k, rand-k, sign, low rank), this *is* EF21, and
EF21 may take the same larger step (`controls/ef21.largest_step`). The weights matter for codecs on
a fixed grid, natural compression and absolute thresholds.

Each frame carries the author's L_i as float32 (4 bytes). When a round closes, everybody computes
all s from what was stated and rescales the replicas whose s changed (`g_i ← g_i · s_old/s_new`), so
that s_i·g_i stays what it was; the scales that a round uses are those of the last closed one.

*Shared*: g_i and L_i of every author. *Private*: v, [size], as in EF21.
*Lost update*, *late joiner*: as in EF21; the keyframe holds the scales too.
"""

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from shoal.compression.codec import PayloadError
from shoal.training.control import MIXING, Seat, check_codec, control
from shoal.training.controls.ef21 import smoothed
from shoal.training.frames import Frame, Streams


@control("ef21-w")
class Ef21W(Streams):
    """EF21 with weights."""

    ledger: ClassVar[str] = MIXING
    wants: ClassVar[str] = "contractive"
    extra_bytes = 4

    def __init__(self, seat: Seat, *, smoothness: float = 1.0, momentum: float = 1.0) -> None:
        """`smoothness`: this author's L_i, to any common scale; `momentum`: as in ef21."""
        super().__init__(seat)
        if not 1e-30 < smoothness < 1e30:
            raise ValueError(f"smoothness = {smoothness}; use the L of this author's function")
        if not 0 < momentum <= 1:
            raise ValueError(f"momentum = {momentum}; use one in (0, 1]")
        check_codec("ef21-w", self.wants, seat.codec)
        self.smoothness, self.momentum = smoothness, momentum
        self.velocity: Tensor | None = None
        self.stated: dict[bytes, float] = {}
        """L_i as each author stated it last."""
        self.scales: dict[bytes, float] = {}
        """s_i as of the last closed round; 1 where none was."""

    def publish(self, vector_D: Tensor, *, key: int = 0) -> bytes:
        """Return the frame of C(v/s_i - g_i) and L_i."""
        v_D = smoothed(self.velocity, vector_D, self.momentum)
        scale = self.scales.get(self.seat.author, 1.0)
        encoded = self.seat.codec.encode(v_D / scale - self.own(), key=key)
        stated = torch.tensor([self.smoothness], dtype=torch.float32)
        return self._stage(encoded, v_D, extra=stated.numpy().astype("<f4").tobytes())

    def close(self, x_D: Tensor) -> Tensor:
        """Return the weighted mean; then let what was stated count."""
        total_D = self.seat.zeros()
        for author in sorted(self.replicas):
            total_D += self.scales.get(author, 1.0) * self.replicas[author]
        direction_D = total_D / max(1, len(self.replicas))
        self._rescale()
        return direction_D

    def leave(self, author: bytes) -> None:
        """The author is gone for good; every peer must say so in the same round."""
        super().leave(author)
        self.stated.pop(author, None)
        self.scales.pop(author, None)

    def _rescale(self) -> None:
        mean = sum(self.stated[a] for a in sorted(self.stated)) / max(1, len(self.stated))
        for author in sorted(self.stated):
            old, new = self.scales.get(author, 1.0), self.stated[author] / mean
            if old != new:
                self.replicas[author] *= old / new
                self.scales[author] = new

    def _apply(self, author: bytes, frame: Frame | None) -> None:
        super()._apply(author, frame)
        self.stated.setdefault(author, 1.0)  # who never said anything lawful

    def _set_extra(self, author: bytes, extra: bytes) -> None:
        # A stranger's zero, infinity or NaN is no smoothness: what it stated before stands.
        value = float(torch.frombuffer(bytearray(extra), dtype=torch.float32)[0])
        if 1e-30 < value < 1e30:
            self.stated[author] = value

    def _shared(self) -> dict[str, Tensor]:
        authors = sorted(self.stated)
        pairs = [[self.stated[a], self.scales.get(a, 1.0)] for a in authors]
        rows = {
            f"scale/{a.hex()}": torch.tensor(pair, dtype=torch.float64)
            for a, pair in zip(authors, pairs, strict=True)
        }
        return super()._shared() | rows

    def _check_shared(self, shared: Mapping[str, Tensor], authors: list[bytes]) -> None:
        for author in authors:
            self._check_vector(shared, f"replica/{author.hex()}")
            pair = shared.get(f"scale/{author.hex()}")
            if pair is None or pair.shape != (2,) or pair.dtype != torch.float64:
                raise PayloadError("an author in the keyframe has no scale")
            if not bool(((pair > 1e-60) & (pair < 1e60)).all()):
                raise PayloadError("a scale in the keyframe is out of range")
        if len(shared) != 2 + 2 * len(authors):
            raise PayloadError("the keyframe has more than one replica an author")

    def _take_shared(self, shared: Mapping[str, Tensor], counts: Mapping[bytes, int]) -> None:
        newer = [a for a, count in counts.items() if count > self.counts.get(a, 0)]
        super()._take_shared(shared, counts)
        for author in newer:
            pair = shared[f"scale/{author.hex()}"]
            self.stated[author], self.scales[author] = float(pair[0]), float(pair[1])

    def _set_shared(self, shared: Mapping[str, Tensor]) -> None:
        super()._set_shared(shared)
        pairs = {
            bytes.fromhex(name.removeprefix("scale/")): pair.tolist()
            for name, pair in shared.items()
            if name.startswith("scale/")
        }
        self.stated = {author: pair[0] for author, pair in pairs.items()}
        self.scales = {author: pair[1] for author, pair in pairs.items()}

    def _keep_private(self, memory: Tensor) -> None:
        self.velocity = memory

    def _forget_private(self) -> None:
        self.velocity = None

    def _private(self) -> dict[str, Tensor]:
        return {} if self.velocity is None else {"velocity": self.velocity}

    def _set_private(self, memory: Mapping[str, Tensor]) -> None:
        self.velocity = memory.get("velocity")
