"""Steps along directions that everyone knows, from losses alone: two forward passes a step.

    ρ = (loss(θ + ε·z) - loss(θ - ε·z)) / 2ε;   step = -lr · ρ

SPSA as MeZO walks it (`training/walk.py`), with random signs. The walk within a turn happens in the
ledger's own integers, which are exact: every step adds an integer times z, and when the turn ends,
or fails, the same numbers are taken out again, so that not a bit remains. So training needs the
weights that a forward pass needs, the ledger, and nothing else of the model's size.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from shoal.compression import perturbation
from shoal.compression.codec import Codec, Directed
from shoal.training import generators, parameters
from shoal.training.exchange import Exchange
from shoal.training.forwards import Forwards
from shoal.training.lesson import Lesson, Steps
from shoal.training.method import Tools, TrainingError, drawn
from shoal.training.walk import WalkSettings

NAN = float("nan")
LARGEST = 2**31 - 1
"""The longest step that the walk goes, in units of q; the wire has room for shorter ones alone."""


class ZerothOrder:
    """Training without gradients, for codecs that are `Directed`."""

    remedy = "lower exchange.update.lr or exchange.update.epsilon"
    carries = False

    def __init__(self, tools: Tools, forwards: Forwards, settings: WalkSettings) -> None:
        self._tools = tools
        self._forwards = forwards
        self._settings = settings

    def learn(
        self, exchange: Exchange, codec: Codec, *, turn: int, steps: int, seed: int
    ) -> Lesson:
        """Measure slopes along as many directions as steps, each on a batch of its own.

        What was learnt here before and is in no update yet (the drift of kinds with gradients) has
        no part in it: slopes are those of the shared model.
        """
        assert isinstance(codec, Directed)
        tools, device = self._tools, self._tools.parameters.device
        directions, shares = self._draw(exchange, codec, steps, seed)
        started, buffers = tools.clock(), parameters.floating_buffers(tools.model)
        losses: list[float] = []
        sizes: list[float] = []
        with generators.seeded(seed, device), walk(exchange) as stride:
            batches = tools.task.batches(torch.Generator().manual_seed(seed))
            for direction, share in zip(directions.tolist(), shares, strict=True):
                key = codec.key(direction)
                loss, slope = self._measure(exchange.integers(), key, drawn(batches))
                rate = self._settings.lr * tools.factor(turn - 1 + len(sizes) / len(shares))
                size = -rate * self._reach(slope * share)
                if self._settings.walk and math.isfinite(size):
                    stride(key, size)
                losses.append(loss)
                sizes.append(size)
        self._check(buffers)
        return lesson(directions, losses, sizes, tools.clock() - started, turn)

    def forget(self) -> None:
        """Do nothing: a turn leaves nothing behind."""

    def _draw(
        self, exchange: Exchange, codec: Directed, steps: int, seed: int
    ) -> tuple[Tensor, list[float]]:
        """Return directions, and by how much the slope along each counts."""
        chances_K = exchange.chances(codec)
        directions = codec.draw(min(steps, codec.perturbations), chances_K, key=seed)
        if chances_K is None or not self._settings.unbiased:
            return directions, [1.0] * len(directions)
        return directions, (1 / (len(chances_K) * chances_K[directions])).tolist()

    def _measure(self, integers_D: Tensor, key: int, batch: object) -> tuple[float, float]:
        """Return the loss here and its slope along z(key); NaN if it is not finite."""
        epsilon = self._settings.epsilon
        above, below = self._forwards.losses(integers_D, key, epsilon, batch)
        return (above + below) / 2, (above - below) / (2 * epsilon)

    def _reach(self, slope: float) -> float:
        """Cut a slope to what the wire has room for; NaN stays."""
        most = self._settings.reach
        return max(-most, min(most, slope)) if math.isfinite(slope) else NAN

    def _check(self, before: dict[str, Tensor]) -> None:
        if not (changed := parameters.changed_buffers(self._tools.model, before)):
            return
        parameters.restore_buffers(self._tools.model, before)
        if self._tools.buffers == "refuse":
            raise TrainingError(parameters.buffers_refused(changed))


@contextmanager
def walk(exchange: Exchange) -> Iterator[Callable[[int, float], None]]:
    """Let steps (key, how far in the unit of parameters) be taken in the ledger's integers.

    Afterwards these are as they were, whatever happened between: int32 wraps.
    """
    integers_D, unit = exchange.integers(), 2.0**exchange.quantum_bits
    keys: list[int] = []
    quanta: list[int] = []

    def stride(key: int, size: float) -> None:
        step = round(max(-LARGEST, min(LARGEST, size * unit)))
        perturbation.accumulate(integers_D, [key], [step])
        keys.append(key)
        quanta.append(step)

    try:
        yield stride
    finally:
        perturbation.accumulate(integers_D, keys, [-step for step in quanta])


def lesson(
    directions: Tensor, losses: list[float], sizes: list[float], seconds: float, turn: int
) -> Lesson:
    """Return what measured steps teach."""
    sizes_S = torch.tensor(sizes, dtype=torch.float64)
    finite = [loss for loss in losses if math.isfinite(loss)]
    skipped = len(losses) - int(torch.isfinite(sizes_S).sum())
    mean = sum(finite) / len(finite) if finite else losses[-1]
    problem = None
    if skipped == len(losses):
        problem = f"the loss was {mean} along every direction of turn {turn}"
    return Lesson(Steps(directions, sizes_S), mean, len(losses), seconds, problem, skipped)
