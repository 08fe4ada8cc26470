"""What every peer decides alike about an update: from its bytes and the run file, nothing else.

An update that breaks a rule is *present with contribution zero* (design 3.3). Authors test their
own updates with the same function before they publish.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import ClassVar, Protocol

import torch

from shoal.compression.codec import Codec, Decoded, PayloadError, sum_of_squares


class RuleError(ValueError):
    """This update contributes zero; the message begins with the rule that it breaks and a colon."""


@dataclass(frozen=True, slots=True)
class Fragment:
    """A contiguous range of the model, and the codec for the tensors that lie in it."""

    start: int
    size: int
    codec: Codec

    @property
    def range(self) -> slice:
        """Return where it lies in the flat vector."""
        return slice(self.start, self.start + self.size)


@dataclass(frozen=True, slots=True)
class Rules:
    """The rules of one run."""

    kind: str
    fragments: tuple[Fragment, ...]
    """In order; turn t publishes the ((t - 1) mod their number)-th (Streaming DiLoCo)."""
    turns: int
    """Last turn of the run; 0: none."""
    clip: Fraction
    initial_squares: int
    """Σ of squares of the initial model's integers, from the genesis."""

    @property
    def size(self) -> int:
        """Return the number of parameters of the model."""
        return sum(part.size for part in self.fragments)

    @property
    def most_squares(self) -> int:
        """Return the largest Σc² that counts: ⌊clip · initial⌋."""
        return self.clip.numerator * self.initial_squares // self.clip.denominator

    def most_bytes(self) -> dict[str, int]:
        """Return the largest payload of each kind; a larger declared size is never fetched."""
        return {self.kind: max(part.codec.bound(part.size) for part in self.fragments)}

    def fragment(self, turn: int) -> Fragment:
        """Return what an update of this turn is about."""
        return self.fragments[(turn - 1) % len(self.fragments)]

    def judge_record(self, turn: int, kind: str, size: int) -> None:
        """Raise RuleError if the record alone shows that the update cannot count."""
        if kind != self.kind:
            raise RuleError(f"kind: {kind!r} where the run uses {self.kind!r}")
        if turn < 1 or (self.turns and turn > self.turns):
            raise RuleError(f"turn: {turn} is not one of the run's")
        part = self.fragment(turn)
        if size > (most := part.codec.bound(part.size)):
            raise RuleError(f"size: {size} bytes where at most {most} are possible")

    def judge(
        self,
        turn: int,
        kind: str,
        size: int,
        payload: bytes | None,
        device: torch.device | str = "cpu",
    ) -> Decoded:
        """Return what a genuine update contributes, or raise RuleError.

        `payload` may be None only when the record alone decides.
        """
        self.judge_record(turn, kind, size)
        if payload is None:
            raise RuleError("payload: missing")
        if len(payload) != size:
            raise RuleError(f"size: {len(payload)} bytes, the record says {size}")
        part = self.fragment(turn)
        try:
            decoded = part.codec.decode(payload, part.size, device)
        except PayloadError as error:
            raise RuleError(f"payload: {error}") from error
        self.judge_values(decoded)
        return replace(decoded, offset=part.start)

    def judge_values(self, decoded: Decoded) -> None:
        """Raise RuleError if the values are too large together."""
        if (squares := sum_of_squares(decoded.values)) > self.most_squares:
            raise RuleError(f"clip: sum of squares {squares} is above the clip {self.most_squares}")


class TurnRule(Protocol):
    """How the updates of one turn become the turn's contribution (design 3.5).

    The contribution of a turn must be a function of the *set* of its updates; `joined` says by how
    much it changes when one more comes in, so leaving changes it by the negative.
    """

    alone: ClassVar[bool]
    """An update contributes by itself: the others of its turn need not be kept."""

    def joined(self, others: Sequence[Decoded], update: Decoded) -> Decoded:
        """Return contribution(others and update) - contribution(others)."""
        ...


class Sum:
    """Each update contributes by itself: the default."""

    alone: ClassVar[bool] = True

    def joined(self, others: Sequence[Decoded], update: Decoded) -> Decoded:
        """Return the update."""
        return update


TURN_RULES: dict[str, type[TurnRule]] = {"sum": Sum}
