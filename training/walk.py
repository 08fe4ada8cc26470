"""How an author learns without gradients: two losses tell the slope along a direction.

    ρ = (loss(θ + ε·z) - loss(θ - ε·z)) / 2ε;   θ ← θ - lr·ρ·z

SPSA (Spall 1992) as MeZO walks it (Malladi et al. 2023, arXiv 2305.17333). What is published are
the steps -lr·ρ, weighted, as one integer each; the walk itself is forgotten when the turn ends.
"""

import math
from dataclasses import dataclass

from shoal.compression.settings import SettingError

RATE = 100.0
"""The default `lr` times parameters: a step's length² grows with their number, what it gains does
not (MeZO's 1e-7 … 1e-6 for models of 10⁹; .02 for a perceptron of 5000)."""
MOST_RATE = 0.1
"""The largest default `lr`: of a handful of parameters each is no steeper than elsewhere."""
MOST_QUANTUM_BITS = 30
LARGE = 1e9
EPSILONS = 1e-8, 1e4
"""The smallest and the largest ε: below, θ ± ε·z are θ in float32, and all slopes zero."""


def rate_for(parameters: int) -> float:
    """Return the `lr` of a run that names none."""
    return min(RATE / parameters, MOST_RATE)


@dataclass(frozen=True, slots=True)
class WalkSettings:
    """The author's side of `exchange.update` for kinds that step along directions."""

    lr: float = 0.0
    """How far a step goes for a slope of 1; 0: see `rate_for`."""
    epsilon: float = 1e-3
    """ε: how far from the model losses are measured."""
    reach: float = 4.0
    """The slope that the largest step on the wire stands for; steeper ones are cut."""
    walk: bool = True
    """Each slope is measured where the steps before it led (MeZO); false: all where the turn began
    (n-SPSA)."""
    unbiased: bool = False
    """With `sampling = "pro"`: divide slopes by K times the chance of their seed, so that likelier
    seeds do not count more."""

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        if not 0 <= self.lr <= LARGE:
            raise ValueError(f"lr = {self.lr}; use 0 (by the model's size) to {LARGE:g}")
        low, high = EPSILONS
        if not low <= self.epsilon <= high:
            raise ValueError(
                f"epsilon = {self.epsilon}; use {low:g} to {high:g}: float32 weights do not show "
                "smaller steps"
            )
        if not 0 < self.reach <= LARGE:
            raise ValueError(f"reach = {self.reach} must be above 0, and at most {LARGE:g}")

    def exponent(self, quantum_bits: int, peers: float) -> int:
        """Return e such that 127 · 2^e quanta are a peer's step for a slope of `reach`.

        `peers` publish in a turn, on average.
        Raises SettingError when a step is too small for the ledger.
        """
        quanta = self.lr * self.reach / peers * 2.0**quantum_bits
        if quanta < 1:
            remedy = "raise lr"
            # The product of two tiny numbers may be zero.
            bits = quantum_bits + math.ceil(-math.log2(max(quanta, 2.0**-64)))
            if bits <= MOST_QUANTUM_BITS:
                most = 2 ** (31 - bits)
                remedy = f"set exchange.quantum_bits to {bits} (weights stay below {most})"
            raise SettingError(
                f"lr = {self.lr:g}, reach = {self.reach:g}: a peer's largest step is below the "
                f"ledger's unit, 2^-{quantum_bits}; {remedy}"
            )
        return max(0, math.ceil(math.log2(quanta / 127)))
