"""One turn. **Start reading here.**

    q·model → local steps (methods/) → what they brought → exchange.publish → payload

The payload is signed, stored and told to others by the daemon (node/); it comes back to the ledger
through `apply`, like everybody's. A turn that goes wrong is dropped whole: model, residual,
momentum and inner optimizer are as they were at its start.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import blake2b

from torch import Tensor

from shoal.compression.codec import Codec
from shoal.training.exchange import Exchange
from shoal.training.lesson import Lesson
from shoal.training.method import Method, TrainingError
from shoal.training.rules import RuleError

DROPS = 3
"""So many dropped turns in a row stop the training."""


@dataclass(frozen=True, slots=True)
class Turned:
    """What a turn brought."""

    kind: str
    payload: bytes | None
    """None when the turn was dropped, or publishes nothing."""
    loss: float
    """Mean over the turn's steps, in the task's unit; NaN when there were none."""
    evaluation: float
    """Held-out measure of the shared model before the turn; NaN when not measured."""
    steps: int
    seconds: float
    """Of the local steps alone."""
    dropped: str | None
    """Why the turn taught nothing."""
    skipped: int = 0
    """Steps that taught nothing, since their loss was not finite."""


def chance(seed: int, peer: bytes, turn: int) -> int:
    """Return the seed of everything random in this peer's turn."""
    data = seed.to_bytes(8, "little") + turn.to_bytes(8, "little") + peer
    digest = blake2b(data, digest_size=8, person=b"shoal-turn").digest()
    return int.from_bytes(digest, "little") >> 1


@dataclass(frozen=True, slots=True)
class Plan:
    """How a turn is to be taken."""

    turn: int
    kind: str
    method: Method
    codec: Codec
    """Bound to this author and turn."""
    steps: int
    weight: float
    """w: by how much of it the update counts."""
    seed: int
    publish: bool = True
    """False: what is learnt goes into the next update instead; what cannot is not learnt."""


class Learner:
    """Takes turns, and counts those that went wrong."""

    def __init__(self) -> None:
        self._drops = 0

    def turn(self, exchange: Exchange, plan: Plan, evaluate: Callable[[], float]) -> Turned:
        """Train from the shared model and return the update that says what was learnt."""
        evaluation = evaluate()
        if not plan.publish and not plan.method.carries:
            return Turned(plan.kind, None, math.nan, evaluation, steps=0, seconds=0, dropped=None)
        lesson = plan.method.learn(
            exchange, plan.codec, turn=plan.turn, steps=plan.steps, seed=plan.seed
        )
        payload, problem = None, lesson.problem
        if problem is None:
            try:
                payload = _publish(exchange, plan, lesson)
            except RuleError as error:
                problem = str(error)
        if problem is not None:
            plan.method.forget()
        self._count(problem, plan.method.remedy)
        return Turned(
            kind=plan.kind,
            payload=payload,
            loss=lesson.loss,
            evaluation=evaluation,
            steps=lesson.steps,
            seconds=lesson.seconds,
            dropped=problem,
            skipped=lesson.skipped,
        )

    def _count(self, problem: str | None, remedy: str) -> None:
        self._drops = self._drops + 1 if problem else 0
        if self._drops >= DROPS:
            raise TrainingError(
                f"{DROPS} turns in a row were dropped, the last because {problem}; {remedy}"
            )


def _publish(exchange: Exchange, plan: Plan, lesson: Lesson) -> bytes | None:
    brought = lesson.brought
    if isinstance(brought, Tensor):
        if plan.publish:
            return exchange.publish(brought, plan.weight, turn=plan.turn, key=plan.seed)
        exchange.carry(brought)
    elif plan.publish:
        return exchange.publish_steps(brought, plan.weight, turn=plan.turn, key=plan.seed)
    return None
