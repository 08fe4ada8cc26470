"""EF21: say how the gradient differs from what everybody believes that it is.

    v ← (1 - η)·v + η·∇f_i(x);   c = C(v - g_i);   g_i ← g_i + c;   direction = mean of g_i

η = 1 is EF21 (Richtárik, Sokolov and Fatkhullin, 2021, arXiv 2106.05203): for full gradients, no
bound on heterogeneity. η < 1 is EF21-SGDM (Fatkhullin, Tyurin and Richtárik, "Momentum provably
improves error feedback!", 2023, arXiv 2305.15155): without it the noise of small batches does not
average out. v begins at the first gradient, g_i at zero. For a fixed gradient
‖g - g_i‖² ≤ (1 - δ)^t ‖g - g_i⁰‖². Largest steps: `largest_step`.

*Shared*: g_i of every author, [size] each. *Private*: v, [size].
*Lost update*: g_i would be wrong for ever, and with it every later direction; so frames are
numbered, a missing one is asked for again, and if nobody has it a keyframe replaces the replica.
*Late joiner*: gets every g_i exactly; its own starts at zero. Who pauses counts with its last g_i.
"""

import math
from collections.abc import Mapping, Sequence
from typing import ClassVar

from torch import Tensor

from shoal.training.control import MIXING, Seat, check_codec, control
from shoal.training.frames import Streams


@control("ef21")
class Ef21(Streams):
    """EF21, with momentum on request."""

    ledger: ClassVar[str] = MIXING
    wants: ClassVar[str] = "contractive"

    def __init__(self, seat: Seat, *, momentum: float = 1.0) -> None:
        """`momentum`: η, the weight of the newest gradient; 1 for full gradients, 0.1 for noise."""
        super().__init__(seat)
        if not 0 < momentum <= 1:
            raise ValueError(f"momentum = {momentum}; use one in (0, 1]")
        check_codec("ef21", self.wants, seat.codec)
        self.momentum = momentum
        self.velocity: Tensor | None = None

    def publish(self, vector_D: Tensor, *, key: int = 0) -> bytes:
        """Return the frame of C(v - g_i)."""
        v_D = smoothed(self.velocity, vector_D, self.momentum)
        return self._stage(self.seat.codec.encode(v_D - self.own(), key=key), v_D)

    def _keep_private(self, memory: Tensor) -> None:
        self.velocity = memory

    def _forget_private(self) -> None:
        self.velocity = None

    def _private(self) -> dict[str, Tensor]:
        return {} if self.velocity is None else {"velocity": self.velocity}

    def _set_private(self, memory: Mapping[str, Tensor]) -> None:
        self.velocity = memory.get("velocity")


def smoothed(v_D: Tensor | None, vector_D: Tensor, weight: float) -> Tensor:
    """Return (1 - weight)·v + weight·vector, the vector itself at first."""
    if v_D is None or weight == 1:
        return vector_D.clone()
    return (1 - weight) * v_D + weight * vector_D


def xi(delta: float) -> float:
    """Return ξ = (1 + √(1 - δ))/δ - 1, by which a codec of contraction δ slows EF21 down."""
    return (1 + math.sqrt(1 - delta)) / delta - 1


def largest_step(smoothness: float, each: Sequence[float], delta: float, *, new: bool) -> float:
    """Return γ = 1/(L + L̃·ξ): the largest step that the theory allows.

    `smoothness` is L of the mean, `each` the L_i of the authors. L̃ is the square root of the mean
    of L_i² in the first analysis, the plain mean in the later one (`new`; Richtárik, Gasanov and
    Burlachenko, "Error feedback reloaded", 2024, arXiv 2402.10774), which holds for EF21 as it is.
    """
    power = 1 if new else 2
    joint = math.pow(sum(one**power for one in each) / len(each), 1 / power)
    return 1 / (smoothness + joint * xi(delta))
