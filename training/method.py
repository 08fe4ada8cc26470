"""How a peer learns in a turn: the contract of local methods. One file each in `methods/`.

Which method a turn uses follows from its kind of update: vectors come from steps along gradients,
steps along seeded directions from losses alone, coordinates of a subspace from gradients in it.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from torch import nn

from shoal.compression.codec import Codec
from shoal.training.exchange import Exchange
from shoal.training.lesson import Lesson
from shoal.training.parameters import Parameters
from shoal.training.task import Task


class TrainingError(RuntimeError):
    """Training cannot go on; the message says why and what to try."""


def drawn(batches: Iterator[Any]) -> Any:
    """Return the task's next batch; raises TrainingError when it has no more."""
    try:
        return next(batches)
    except StopIteration:
        raise TrainingError(
            "the task's batches() came to an end; let it begin again and yield for ever"
        ) from None


@dataclass(frozen=True, slots=True)
class Tools:
    """What every method works with."""

    task: Task
    model: nn.Module
    parameters: Parameters
    rate: Callable[[float], float]
    """Learning rate factor by progress of the run."""
    turns: int
    """Of the whole run; 0: no end, no schedule."""
    clock: Callable[[], float]
    buffers: str

    def factor(self, turns_done: float) -> float:
        """Return the factor of learning rates when so many turns are done."""
        return self.rate(turns_done / self.turns) if self.turns else 1.0


class Method(Protocol):
    """Local steps of one kind."""

    remedy: str
    """What an operator may change when turn after turn goes wrong."""
    carries: bool
    """What a turn teaches that publishes nothing lives on (`Exchange.carry`). Else such a turn
    would be for nothing, and is skipped."""

    def learn(
        self, exchange: Exchange, codec: Codec, *, turn: int, steps: int, seed: int
    ) -> Lesson:
        """Take the local steps of a turn from where the exchange is, and leave it there.

        `codec` is the turn's, bound to this author. All chance comes from `seed`.
        """
        ...

    def forget(self) -> None:
        """The last lesson was dropped: be as before it."""
        ...
