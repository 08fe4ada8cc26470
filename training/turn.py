"""One turn. **Start reading here.**

    θ ← q·model + drift → H local steps → Δ = θ_end - θ → Feedback → Codec.encode → payload

The payload is signed, stored and told to others by the daemon (node/); it comes back to the ledger
through `apply`, like everybody's. A turn that goes wrong is dropped whole: model, residual,
momentum and inner optimizer are as they were at its start.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import blake2b

import torch
from torch import Tensor, nn

from shoal.training import parameters
from shoal.training.exchange import Exchange
from shoal.training.optimizer import Inner
from shoal.training.parameters import Parameters
from shoal.training.rules import RuleError
from shoal.training.task import Task

DROPS = 3
"""So many dropped turns in a row stop the training."""


class TrainingError(RuntimeError):
    """Training cannot go on; the message says why and what to try."""


@dataclass(frozen=True, slots=True)
class Turned:
    """What a turn brought."""

    kind: str
    payload: bytes | None
    """None when the turn was dropped, or publishes nothing."""
    loss: float
    """Mean over the turn's steps, in the task's unit."""
    evaluation: float
    """Held-out measure of the shared model before the turn; NaN when not measured."""
    steps: int
    seconds: float
    """Of the local steps alone."""
    dropped: str | None
    """Why the turn taught nothing."""


@dataclass(frozen=True, slots=True)
class Lesson:
    """What the local steps brought."""

    delta: Tensor
    loss: float
    steps: int
    seconds: float
    problem: str | None


def chance(seed: int, peer: bytes, turn: int) -> int:
    """Return the seed of everything random in this peer's turn."""
    data = seed.to_bytes(8, "little") + turn.to_bytes(8, "little") + peer
    digest = blake2b(data, digest_size=8, person=b"shoal-turn").digest()
    return int.from_bytes(digest, "little") >> 1


@dataclass(slots=True)
class Learner:
    """Takes local steps: the model on its device, its inner optimizer, and the task."""

    task: Task
    model: nn.Module
    parameters: Parameters
    inner: Inner
    rate: Callable[[float], float]
    """Learning rate factor by progress of the run."""
    turns: int
    """Of the whole run; 0: no end, no schedule."""
    clock: Callable[[], float]
    buffers: str
    _drops: int = 0

    def turn(
        self,
        exchange: Exchange,
        *,
        turn: int,
        steps: int,
        weight: float,
        seed: int,
        kind: str,
        evaluate: Callable[[], float],
        publish: bool = True,
    ) -> Turned:
        """Train from the shared model and return the update that says what was learnt.

        Without `publish` the turn's lesson is carried on to the next update.
        """
        start_D = exchange.start()
        evaluation = evaluate()
        self.parameters.write(start_D)
        before = self.inner.remember()
        lesson = self.learn(start_D, turn, steps, seed)
        payload, problem = None, lesson.problem
        if problem is None and not publish:
            exchange.carry(lesson.delta)
        elif problem is None:
            try:
                payload = exchange.publish(lesson.delta, weight, turn=turn, key=seed)
            except RuleError as error:
                problem = str(error)
        if problem is not None:
            self.inner.restore(before)
        self._count(problem)
        return Turned(kind, payload, lesson.loss, evaluation, lesson.steps, lesson.seconds, problem)

    def learn(self, start_D: Tensor, turn: int, steps: int, seed: int) -> Lesson:
        """Take the local steps of a turn from the model as it is, which is `start_D`."""
        device = start_D.device
        batches = self.task.batches(torch.Generator().manual_seed(seed))
        buffers = parameters.floating_buffers(self.model)
        losses, problem, started = [], None, self.clock()
        self.model.train()
        self.inner.clear()
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            for step in range(steps):
                self.inner.scale(self._factor(turn - 1 + step / steps))
                loss = self.task.loss(self.model, next(batches))
                losses.append(loss.detach())
                loss.backward()  # type: ignore[no-untyped-call]
                self.inner.step()
        self.inner.finish()
        mean = float(torch.stack(losses).mean())
        seconds = self.clock() - started
        delta_D = self.parameters.read() - start_D
        if self.buffers == "refuse" and (
            changed := parameters.changed_buffers(self.model, buffers)
        ):
            raise TrainingError(parameters.buffers_refused(changed))
        if not math.isfinite(mean):
            problem = f"the loss became {mean} in turn {turn}"
        elif not bool(torch.isfinite(delta_D).all()):
            problem = f"the model left the finite numbers in turn {turn}"
        if problem:
            parameters.restore_buffers(self.model, buffers)
        return Lesson(delta_D, mean, steps, seconds, problem)

    def _factor(self, turns_done: float) -> float:
        return self.rate(turns_done / self.turns) if self.turns else 1.0

    def _count(self, problem: str | None) -> None:
        self._drops = self._drops + 1 if problem else 0
        if self._drops >= DROPS:
            raise TrainingError(
                f"{DROPS} turns in a row were dropped, the last because {problem}; "
                "lower local.optimizer.lr"
            )
