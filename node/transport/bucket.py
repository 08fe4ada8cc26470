"""A token bucket: how long somebody who sends too much has to wait. No clock."""

from dataclasses import dataclass


@dataclass(slots=True)
class Bucket:
    """`rate` tokens a second, `burst` at most. What is taken too early is a debt to wait for."""

    rate: float
    burst: float
    level: float
    at: float = 0.0

    @staticmethod
    def full(rate: float, *, seconds: float, now: float) -> "Bucket":
        """Return a bucket that holds `seconds` worth of tokens."""
        return Bucket(rate, rate * seconds, rate * seconds, now)

    def take(self, tokens: float, now: float) -> float:
        """Take `tokens`; return the seconds until they were really there."""
        self.level = min(self.burst, self.level + (now - self.at) * self.rate) - tokens
        self.at = now
        return max(0.0, -self.level / self.rate)
