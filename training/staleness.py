"""How much a late update counts: a factor of its author's weight by how far it is behind. No torch.

The lag is measured by the author: how many turns the others made, on the mean, while it made its
last one, beyond that one. A peer as fast as the others has lag 0, one at a quarter of their speed
lag 3. (Xie, Koyejo and Gupta, "Asynchronous federated optimization", arXiv 1903.03934, section 5;
in the ledger the factor goes into the integers before rounding, receivers only add.)
"""

from dataclasses import dataclass

CURVES = ("constant", "polynomial", "hinge")


@dataclass(frozen=True, slots=True)
class Staleness:
    """`exchange.staleness`: the curve and its two parameters."""

    curve: str = "constant"
    """`constant`: 1; `polynomial`: (1 + lag)^-a; `hinge`: 1 / (1 + a·(lag - b)) beyond lag b."""
    a: float = 0.5
    b: float = 4.0

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        if self.curve not in CURVES:
            raise ValueError(f"curve = {self.curve!r} is unknown; use one of {', '.join(CURVES)}")
        if not 0 <= self.a <= 100 or not 0 <= self.b <= 1e6:
            raise ValueError(f"a = {self.a}, b = {self.b}; use 0 <= a <= 100 and b >= 0")

    def factor(self, lag: float) -> float:
        """Return the factor, in (0, 1]; `lag` in turns, negative ones count as 0."""
        lag = max(lag, 0.0)
        if self.curve == "polynomial":
            return float((1 + lag) ** -self.a)
        if self.curve == "hinge" and lag > self.b:
            return 1 / (1 + self.a * (lag - self.b))
        return 1.0
