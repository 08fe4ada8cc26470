"""What the local steps of a turn brought: a change of the model, or steps along directions."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Steps:
    """Steps along directions that everyone can regenerate (`compression.codec.Directed`)."""

    directions: Tensor
    """int64[S]: their numbers, as `Directed.draw` returned them."""
    sizes: Tensor
    """float64[S], in the unit of parameters: how far the model is to go along each. A step that
    could not be measured is NaN and counts zero."""


@dataclass(frozen=True, slots=True)
class Lesson:
    """What a turn taught."""

    brought: Tensor | Steps
    """The change of the float model, to be added; or steps."""
    loss: float
    """Mean over the turn's steps, in the task's unit."""
    steps: int
    seconds: float
    """Of the local steps alone."""
    problem: str | None = None
    """Why nothing of it may be published."""
    skipped: int = 0
    """Steps that taught nothing, since their loss was not finite."""
