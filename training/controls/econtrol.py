"""EControl: EF21's shared estimate, with a controlled dose of EF14's memory in each frame.

    u = η·e + g - h_i;   Δ = C(u);   h_i ← h_i + Δ;   e ← e + g - h_i;   direction = mean of h_i

Source: Gao, Islamov and Stich, "EControl: fast distributed optimization with compression and error
control", 2023, arXiv 2311.05645. Handles any heterogeneity and noise with linear speed-up in the
number of authors. η = 0 would be EF21 on noisy gradients. Begins at h_i = 0, e = 0; the fixed point
for a constant gradient is h_i = g, e = 0. In exact arithmetic Σ h_i + e = Σ g: what the swarm
stepped along adds up to the gradients, but for a bounded error.

*Shared*: h_i of every author, [size] each. *Private*: e, [size].
*Lost update*: h_i would be wrong for ever: as in EF21, resend or keyframe. A keyframe leaves e as
it is, since past sums are not touched.
*Late joiner*: gets every h_i exactly; its own h_i and e start at zero.
"""

import math
from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor

from shoal.training.control import MIXING, Seat, check_codec, control
from shoal.training.frames import Streams, add

LEAST = 1e-4
"""Contractions below this count as this much."""


@control("econtrol")
class EControl(Streams):
    """Error control."""

    ledger: ClassVar[str] = MIXING
    wants: ClassVar[str] = "contractive"

    def __init__(self, seat: Seat, *, eta: float = 0.0) -> None:
        """`eta`: η, the dose; 0: `papers_eta` of the least contraction measured on frames.

        A larger dose than the theory's makes it diverge with large steps, as EF14 does.
        """
        super().__init__(seat)
        if not 0 <= eta <= 1:
            raise ValueError(f"eta = {eta}; use one in (0, 1], or 0 to have it measured")
        check_codec("econtrol", self.wants, seat.codec)
        self.eta = eta
        self.measured = 1.0
        """The least 1 - ‖C(u) - u‖²/‖u‖² of a frame so far: the codec's δ is at most that."""
        self.error: Tensor | None = None

    def publish(self, vector_D: Tensor, *, key: int = 0) -> bytes:
        """Return the frame of C(η·e + g - h_i)."""
        e_D = self.seat.zeros() if self.error is None else self.error
        u_D = (self.eta or papers_eta(self.measured)) * e_D + vector_D - self.own()
        encoded = self.seat.codec.encode(u_D, key=key)
        h_D = self.own().clone()
        add(h_D, encoded.decoded)
        left_D = u_D.clone()
        add(left_D, encoded.decoded, -1)
        return self._stage(encoded, (e_D + vector_D - h_D, self._measure(u_D, left_D)))

    def _measure(self, u_D: Tensor, left_D: Tensor) -> float:
        whole, left = float(u_D.square().sum()), float(left_D.square().sum())
        if not whole:
            return self.measured
        return min(self.measured, max(LEAST, 1 - left / whole))

    def _keep_private(self, memory: tuple[Tensor, float]) -> None:
        self.error, self.measured = memory

    def _forget_private(self) -> None:
        self.error, self.measured = None, 1.0

    def _private(self) -> dict[str, Tensor]:
        return {} if self.error is None else {"error": self.error}

    def _set_private(self, memory: Mapping[str, Tensor]) -> None:
        self.error = memory.get("error")

    def _numbers(self) -> dict[str, float]:
        return {"measured": self.measured}

    def _set_numbers(self, numbers: Mapping[str, float]) -> None:
        self.measured = numbers["measured"]


def papers_eta(delta: float) -> float:
    """Return η = δ/(3·√(1 - δ)·(1 + √(1 - δ))) of the theory, at most 1."""
    root = math.sqrt(1 - delta)
    return min(1.0, delta / (3 * root * (1 + root))) if root else 1.0
