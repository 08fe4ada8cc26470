"""EF14: the author remembers what the codec dropped and adds it to the next gradient.

    p = e + γ·g;   c = C(p);   e ← p - c;   direction = mean of c / γ

Source: Seide et al., "1-bit stochastic gradient descent", Interspeech 2014; Stich, Cordonnier and
Jaggi, "Sparsified SGD with memory", 2018, arXiv 1809.07599. γ is the step and lies inside the
memory, so that it may change between rounds. In exact arithmetic Σ c + e = Σ γ·g.

Nothing is shared, so this one needs no frames in order; the ledger has it built in, with decay
(`shoal.training.feedback`). It is here to be compared with on equal terms.

*Lost update*: the mass is lost for whoever lost it: `lose` answers "reweigh". An author that
learns that nobody got a frame takes it back into e with `lose` of its own frame.
*Late joiner*: begins with e = 0 and needs the model alone.
*Private*: e, [size].
"""

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor

from shoal.training.control import ControlError, Lost, Seat, check_codec, control
from shoal.training.frames import Rounds, add


@control("ef14")
class Ef14(Rounds):
    """Error feedback as of 2014."""

    ledger: ClassVar[str] = ""
    wants: ClassVar[str] = "contractive"

    def __init__(self, seat: Seat, *, step: float = 1.0) -> None:
        """`step`: γ, by which a gradient is multiplied before it enters the memory."""
        super().__init__(seat)
        if not step > 0:
            raise ValueError(f"step = {step} must be above 0")
        check_codec("ef14", self.wants, seat.codec)
        self.step = step
        self.error: Tensor | None = None

    def publish(self, vector_D: Tensor, *, key: int = 0) -> bytes:
        """Return the frame of e + γ·g."""
        p_D = self.step * vector_D
        if self.error is not None:
            p_D += self.error
        encoded = self.seat.codec.encode(p_D, key=key)
        add(p_D, encoded.decoded, -1)
        return self._stage(encoded, p_D)

    def lose(self, author: bytes, number: int) -> Lost:
        """Go on without it; an own frame that nobody got returns into the memory."""
        if author != self.seat.author:
            return self._skip(author, number)
        frame = self.round.get(author)
        if frame is None or number != self.count:
            raise ControlError(f"frame {number} is not in the open round: it has been used")
        self.error = self.seat.zeros() if self.error is None else self.error
        add(self.error, frame.decoded)
        return self._skip(author, number)

    def _close(self, x_D: Tensor) -> Tensor:
        return self.mean() / self.step

    def _shared_with(self, author: bytes) -> tuple[Tensor, ...]:
        return ()

    def _vectors(self) -> dict[str, Tensor]:
        return {}

    def _set_vectors(self, vectors: Mapping[str, Tensor]) -> None:
        pass

    def _keep_private(self, memory: Tensor) -> None:
        self.error = memory

    def _forget_private(self) -> None:
        self.error = None

    def _private(self) -> dict[str, Tensor]:
        return {} if self.error is None else {"error": self.error}

    def _set_private(self, memory: Mapping[str, Tensor]) -> None:
        self.error = memory.get("error")
