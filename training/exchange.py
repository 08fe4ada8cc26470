"""The seam between what a peer learns and how peers exchange it; one file per mode in `exchanges/`.

A mode is: publish a turn, take in what arrived, snapshot, restore, fingerprint (design 11). The
ledger is one; mixing will be another.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from shoal.compression.codec import Directed
from shoal.training.fingerprint import Lanes
from shoal.training.lesson import Steps


@dataclass(frozen=True, slots=True)
class Arrived:
    """A genuine update (signature and hash hold) that is to be taken in."""

    key: tuple[bytes, int, int]
    turn: int
    kind: str
    payload: bytes | None
    """None when the record alone shows that it cannot count: it was never fetched."""
    size: int
    """As the record declares it."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of an update."""

    key: tuple[bytes, int, int]
    delta: Lanes
    """By how much it changed the fingerprint: a function of its bytes alone. Under a turn rule they
    are changes of turns instead, and only their sum means something."""
    refused: str | None
    """The rule it breaks; then it contributes zero, here as everywhere."""


class Exchange(Protocol):
    """How one peer's model takes part in the swarm's."""

    @property
    def quantum_bits(self) -> int:
        """Return b of the unit q = 2^-b."""
        ...

    def model(self) -> Tensor:
        """Return the shared model as a float32 vector."""
        ...

    def integers(self) -> Tensor:
        """Return the shared model's int32 in units of q, not a copy."""
        ...

    def start(self) -> Tensor:
        """Return the vector to train from: the shared model and what was learnt here since."""
        ...

    def chances(self, codec: Directed) -> Tensor | None:
        """Return how likely this codec's author is to draw each direction, float64 of sum 1.

        None: the codec decides.
        """
        ...

    def publish(self, delta_D: Tensor, weight: float, *, turn: int, key: int) -> bytes:
        """Return the payload of a turn that moved `start` by `delta_D`; it stays pending."""
        ...

    def publish_steps(self, steps: Steps, weight: float, *, turn: int, key: int) -> bytes:
        """Return the payload of a turn that went these steps; it stays pending."""
        ...

    def carry(self, delta_D: Tensor) -> None:
        """Keep what a turn taught that publishes nothing; a later turn's payload holds it."""
        ...

    def commit(self, log: int, number: int) -> None:
        """The pending payload was published under this number."""
        ...

    def discard(self) -> None:
        """The pending payload will never be published."""
        ...

    def apply(self, updates: Sequence[Arrived]) -> list[Outcome]:
        """Take in updates; never raises for what others sent."""
        ...

    def subtract(self, updates: Sequence[Arrived]) -> list[Outcome]:
        """Take updates out again."""
        ...

    def fingerprint(self) -> Lanes:
        """Return the running fingerprint."""
        ...

    def recompute(self) -> Lanes:
        """Return the fingerprint computed afresh."""
        ...

    def snapshot(self) -> bytes:
        """Return the shared state."""
        ...

    def restore(self, data: bytes) -> None:
        """Set the shared state."""
        ...
