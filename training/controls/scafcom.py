"""SCAFCOM: SCALLION for contractive codecs, steadied by a local momentum.

With v = (x - y)/(η_l·K) after K corrected local steps, so that v + c_i - c is the mean of the plain
local gradients:

    v_i ← (1 - β)·v_i + β·(v + c_i - c);   δ̃_i = C(v_i - c_i);   c_i ← c_i + δ̃_i
    direction = c + mean over the round's frames of δ̃_j;   c ← c + Σ δ̃_j / N

`correction()` is c - c_i; v goes into `publish`; the shared point moves by η_g·η_l·K·direction. c_i
is what EF21 calls g_i, and c the mean of all: what the codec drops stays in v_i - c_i. v_i begins
at the first mean gradient.

Source: Huang, Li and Li, "Stochastic controlled averaging for federated learning with
communication compression", 2023, arXiv 2308.08165.

*Shared*: x and c, as in SCALLION (`controls/scallion.py`), with its reason against the ledger and
its answers about lost updates, late joiners and those that leave. *Private*: c_i and v_i, [size].
"""

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor

from shoal.training.control import Seat, check_codec, control
from shoal.training.controls.ef21 import smoothed
from shoal.training.controls.scallion import Averaging


@control("scafcom")
class Scafcom(Averaging):
    """SCAFFOLD through a contractive codec."""

    wants: ClassVar[str] = "contractive"

    def __init__(self, seat: Seat, *, momentum: float = 0.2) -> None:
        """`momentum`: β, the weight of the newest round; 1 for none."""
        super().__init__(seat)
        if not 0 < momentum <= 1:
            raise ValueError(f"momentum = {momentum}; use one in (0, 1]")
        check_codec("scafcom", self.wants, seat.codec)
        self.momentum = momentum
        self.velocity: Tensor | None = None

    def publish(self, vector_D: Tensor, *, key: int = 0) -> bytes:
        """Return the frame of C(v_i - c_i)."""
        v_D = smoothed(self.velocity, vector_D + self.own() - self.average, self.momentum)
        return self._stage(self.seat.codec.encode(v_D - self.own(), key=key), v_D)

    def _keep_private(self, memory: Tensor) -> None:
        self.velocity = memory

    def _forget_private(self) -> None:
        self.velocity = None

    def _private(self) -> dict[str, Tensor]:
        more = {} if self.velocity is None else {"velocity": self.velocity}
        return super()._private() | more

    def _set_private(self, memory: Mapping[str, Tensor]) -> None:
        super()._set_private(memory)
        self.velocity = memory.get("velocity")
