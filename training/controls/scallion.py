"""SCALLION: SCAFFOLD with one compressed vector up instead of two dense ones.

Each author takes K local steps y ← y - η_l·(∇F_i(y) - c_i + c) from x; with v = (x - y)/(η_l·K):

    δ_i = α·(v - c);   δ̃_i = Q(δ_i);   c_i ← c_i + δ̃_i
    direction = c + mean over the round's frames of δ̃_j;   c ← c + Σ δ̃_j / N

`correction()` is c - c_i; v goes into `publish`; the shared point moves by η_g·η_l·K·direction.
Q is unbiased; α ∈ (0, 1], about 1/(1 + ω). N is how many authors have ever sent a frame.

Source: Huang, Li and Li, "Stochastic controlled averaging for federated learning with
communication compression", 2023, arXiv 2308.08165.

*Shared*: x and c, the same for all because every peer receives every frame; in open gossip c would
need a consensus of its own and the saving would be gone, so this is for swarms of up to 32 peers.
That second vector is why the ledger refuses it. *Private*: c_i, [size].
*Lost update*: every peer must have it before the round closes: resend, else a keyframe (c) together
with x from a peer that has closed the round.
*Late joiner*: gets x and c and starts at c_i = c: its first correction is zero, and counting it in
N leaves c the mean of all c_i. One that leaves stays in c as a bias of (c_i - c)/N, which further
rounds do not remove.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from shoal.training.control import SECOND_VECTOR, Seat, check_codec, control
from shoal.training.frames import Frame, Rounds, add


class Averaging(Rounds):
    """What SCALLION and SCAFCOM share: control variates and their average."""

    ledger: ClassVar[str] = SECOND_VECTOR

    def __init__(self, seat: Seat) -> None:
        super().__init__(seat)
        self.variate: Tensor | None = None
        """c_i; None: c, as long as no own frame counts."""
        self.average = seat.zeros()
        """c."""

    def own(self) -> Tensor:
        """Return c_i."""
        return self.average if self.variate is None else self.variate

    def correction(self) -> Tensor:
        """Return c - c_i."""
        return self.average - self.own()

    def _close(self, x_D: Tensor) -> Tensor:
        direction_D = self.average + self.mean()
        came = sum(frame is not None for frame in self.round.values())
        self.average = self.average + self.mean() * (came / max(1, len(self.counts)))
        return direction_D

    def _apply(self, author: bytes, frame: Frame | None) -> None:
        super()._apply(author, frame)
        # c_i moves by what was published, whether this process made it or its log says so.
        if author == self.seat.author and frame is not None:
            self.variate = self.own().clone()
            add(self.variate, frame.decoded)

    def _shared_with(self, author: bytes) -> tuple[Tensor, ...]:
        return (self.average,)

    def _vectors(self) -> dict[str, Tensor]:
        return {"average": self.average}

    def _set_vectors(self, vectors: Mapping[str, Tensor]) -> None:
        self.average = vectors["average"].clone()

    def _take_shared(self, shared: Mapping[str, Tensor], counts: Mapping[bytes, int]) -> None:
        before = self.count
        super()._take_shared(shared, counts)
        if self.count != before:
            self.variate = None  # what the own frames in between did to it is not known

    def _keep_private(self, memory: Any) -> None:
        pass

    def _forget_private(self) -> None:
        pass

    def _private(self) -> dict[str, Tensor]:
        return {} if self.variate is None else {"variate": self.variate}

    def _set_private(self, memory: Mapping[str, Tensor]) -> None:
        self.variate = memory.get("variate")


@control("scallion")
class Scallion(Averaging):
    """SCAFFOLD through an unbiased codec."""

    wants: ClassVar[str] = "unbiased"

    def __init__(self, seat: Seat, *, alpha: float = 0.5) -> None:
        """`alpha`: α, how much of the change is sent; smaller for coarser codecs."""
        super().__init__(seat)
        if not 0 < alpha <= 1:
            raise ValueError(f"alpha = {alpha}; use one in (0, 1]")
        check_codec("scallion", self.wants, seat.codec)
        self.alpha = alpha

    def publish(self, vector_D: Tensor, *, key: int = 0) -> bytes:
        """Return the frame of Q(α·(v - c))."""
        delta_D = self.alpha * (vector_D - self.average)
        return self._stage(self.seat.codec.encode(delta_D, key=key), None)
