"""MASHA: compressed extragradient steps around an anchor, for saddle points and games.

Find F(z) = mean F_m(z) = 0, for a game F = (∇_x f, -∇_y f). All know the anchor w and F̄(w).

    z½ = τ·z + (1 - τ)·w - γ·F̄(w)                                  `point(z)`
    MASHA1: g_m = Q(F_m(z½) - F_m(w));                 z ← z½ - γ · mean g_m
    MASHA2: p = γ·(F_m(z½) - F_m(w)) + e_m;  g_m = C(p);  e_m ← p - g_m;  z ← z½ - mean g_m
    with probability 1 - τ (a coin that all toss alike) the next round is an anchor round:
    w ← z and everybody sends F_m(w) as plain floats; z stays.

MASHA1 needs an unbiased codec, MASHA2 a contractive one. The first round is an anchor round. With
1 - τ = k/size anchors cost as many bytes as compressed frames do. Steps: γ about
√(1 - τ)/(L·√(1 + ω/n)) for MASHA1 and √(1 - τ)·δ/L for MASHA2.

Source: Beznosikov, Richtárik, Diskin, Ryabinin and Gasnikov, "Distributed methods with compressed
communication for solving variational inequalities, with theoretical guarantees", 2021,
arXiv 2110.03313. The direction of `close` is (z - z_new)/γ, so step along it with γ itself.

*Shared*: z, w and F̄(w), the same for all: for groups of up to 16 peers that all hear each other.
*Private*: F_m(w) and e_m, [size].
*Lost update*: a compressed frame may be left out of the mean, by all alike ("reweigh"); an anchor's
must come before the round closes: resend, else a keyframe.
*Late joiner*: gets z, w and F̄(w), and listens until the next anchor round, for F̄(w) contains no
F_m(w) of its own.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from shoal.compression import splitmix
from shoal.compression.codec import PayloadError
from shoal.training.control import (
    MIXING,
    ControlError,
    Lost,
    Seat,
    check_codec,
    control,
)
from shoal.training.frames import Frame, Rounds, add


@control("masha")
class Masha(Rounds):
    """MASHA1 and MASHA2."""

    ledger: ClassVar[str] = MIXING
    wants: ClassVar[str] = "either"

    def __init__(
        self, seat: Seat, *, step: float = 0.05, keep: float = 0.75, memory: bool = True
    ) -> None:
        """Take what the run file says.

        `step`: γ. `keep`: τ, the chance that the anchor stays; nearer to 1 costs fewer bytes and
        needs smaller steps. `memory`: MASHA2 with e_m; without it MASHA1.
        """
        super().__init__(seat)
        if not step > 0:
            raise ValueError(f"step = {step} must be above 0")
        if not 0 < keep < 1:
            raise ValueError(f"keep = {keep}; use one in (0, 1)")
        check_codec(
            "masha with memory" if memory else "masha without memory",
            "contractive" if memory else "unbiased",
            seat.codec,
        )
        self.step, self.keep, self.memory = step, keep, memory
        self.anchoring = True
        """The open round is an anchor round."""
        self.anchor = seat.zeros()
        """w."""
        self.field = seat.zeros()
        """F̄(w)."""
        self.own_field: Tensor | None = None
        """F_m(w), as it was sent; None: not part of F̄(w)."""
        self.error: Tensor | None = None
        """e_m."""

    def point(self, x_D: Tensor) -> Tensor:
        """Return z½; in an anchor round z."""
        return x_D if self.anchoring else self._half(x_D)

    @property
    def listening(self) -> bool:
        """Say whether this author can send nothing before the next anchor round."""
        return not self.anchoring and self.own_field is None

    def publish(self, vector_D: Tensor, *, key: int = 0) -> bytes:
        """Return the frame of F_m at `point`; refuse while `listening`."""
        if self.anchoring:
            return self._stage(vector_D.to(self.seat.dtype), None)
        if self.own_field is None:
            raise ControlError("F_m at the anchor was not sent: publish in the next anchor round")
        p_D = vector_D - self.own_field
        if not self.memory:
            return self._stage(self.seat.codec.encode(p_D, key=key), None)
        p_D = self.step * p_D
        if self.error is not None:
            p_D += self.error
        encoded = self.seat.codec.encode(p_D, key=key)
        add(p_D, encoded.decoded, -1)
        return self._stage(encoded, p_D)

    def lose(self, author: bytes, number: int) -> Lost:
        """Go on without a compressed frame; insist on an anchor's."""
        return super().lose(author, number) if self.anchoring else self._skip(author, number)

    def _half(self, x_D: Tensor) -> Tensor:
        return self.keep * x_D + (1 - self.keep) * self.anchor - self.step * self.field

    def _close(self, x_D: Tensor) -> Tensor:
        if self.anchoring:
            own = self.round.get(self.seat.author)
            self.own_field = None if own is None else own.decoded.dense()
            self.anchor, self.field = x_D.clone(), self.mean()
            self.anchoring = False
            return self.seat.zeros()
        change_D = self.mean() * (1.0 if self.memory else self.step)
        direction_D = (x_D - self._half(x_D) + change_D) / self.step
        word = splitmix.words(self.seat.seed, 1, start=self.closed)
        # The upper 32 bits of the word as a fraction: the same coin for everyone.
        self.anchoring = int(splitmix.below(word, 1 << 30)) >= self.keep * (1 << 30)
        return direction_D

    def _open(self, payload: bytes) -> Frame:
        frame = super()._open(payload)
        if frame.dense != self.anchoring:
            raise PayloadError("plain floats belong into anchor rounds, and nothing else does")
        return frame

    def _shared_with(self, author: bytes) -> tuple[Tensor, ...]:
        return self.anchor, self.field

    def _vectors(self) -> dict[str, Tensor]:
        return {"anchor": self.anchor, "field": self.field}

    def _set_vectors(self, vectors: Mapping[str, Tensor]) -> None:
        self.anchor, self.field = vectors["anchor"].clone(), vectors["field"].clone()

    def _marks(self) -> list[int]:
        return [self.closed, int(self.anchoring)]

    def _check_marks(self, marks: list[int]) -> None:
        super()._check_marks(marks)
        if marks[1] > 1:
            raise PayloadError("the keyframe's kind of round is neither of the two")

    def _set_marks(self, marks: list[int]) -> None:
        self.closed, self.anchoring = marks[0], bool(marks[1])

    def _take_shared(self, shared: Mapping[str, Tensor], counts: Mapping[bytes, int]) -> None:
        before = self.closed
        super()._take_shared(shared, counts)
        if self.closed != before:
            self.own_field = self.error = None

    def _keep_private(self, memory: Any) -> None:
        if memory is not None:
            self.error = memory

    def _forget_private(self) -> None:
        self.error = None

    def _private(self) -> dict[str, Tensor]:
        memory = {"own_field": self.own_field, "error": self.error}
        return {name: tensor for name, tensor in memory.items() if tensor is not None}

    def _set_private(self, memory: Mapping[str, Tensor]) -> None:
        self.own_field, self.error = memory.get("own_field"), memory.get("error")
