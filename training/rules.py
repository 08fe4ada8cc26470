"""What every peer decides alike about an update: from its bytes and the run file, nothing else.

An update that breaks a rule is *present with contribution zero* (design 3.3). Authors test their
own updates with the same function before they publish.
"""

from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import combinations
from math import lcm

import torch

from shoal.compression.codec import (
    Codec,
    Contribution,
    Origin,
    PayloadError,
    at,
    squares_of,
)


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
class Plane:
    """One of the kinds of update of a run: which turns are its own, and how they look."""

    kind: str
    fragments: tuple[Fragment, ...]
    """In order; each of the plane's turns publishes the next one (Streaming DiLoCo)."""
    every: int = 1
    """It has the turns that this number divides, but for those of the planes before it."""


@dataclass(frozen=True, slots=True)
class Rules:
    """The rules of one run."""

    planes: tuple[Plane, ...]
    """The last has `every` = 1, so that every turn is one's."""
    turns: int
    """Last turn of the run; 0: none."""
    clip: Fraction
    initial_squares: int
    """Σ of squares of the initial model's integers, from the genesis."""
    run: bytes = bytes(32)
    """The run id: where seeds come from."""

    @property
    def size(self) -> int:
        """Return the number of parameters of the model."""
        return sum(part.size for part in self.planes[0].fragments)

    @property
    def most_squares(self) -> int:
        """Return the largest Σc² that counts: ⌊clip · initial⌋."""
        return self.clip.numerator * self.initial_squares // self.clip.denominator

    def most_bytes(self) -> dict[str, int]:
        """Return the largest payload of each kind; a larger declared size is never fetched."""
        most: dict[str, int] = {}
        for plane in self.planes:
            sizes = [part.codec.bound(part.size) for part in plane.fragments]
            most[plane.kind] = max(most.get(plane.kind, 0), *sizes)
        return most

    def plane(self, turn: int) -> int:
        """Return the number of the plane whose turn it is."""
        return next(i for i, plane in enumerate(self.planes) if turn % plane.every == 0)

    def fragment(self, turn: int) -> Fragment:
        """Return what an update of this turn is about."""
        number = self.plane(turn)
        fragments = self.planes[number].fragments
        if len(fragments) == 1:
            return fragments[0]
        return fragments[(self._turns_of(number, turn) - 1) % len(fragments)]

    def codec(self, turn: int, author: bytes) -> Codec:
        """Return the codec of this author's update of this turn."""
        return at(self.fragment(turn).codec, Origin(self.run, author, turn))

    def judge_record(self, turn: int, kind: str, size: int) -> None:
        """Raise RuleError if the record alone shows that the update cannot count."""
        if turn < 1 or (self.turns and turn > self.turns):
            raise RuleError(f"turn: {turn} is not one of the run's")
        if kind != (wanted := self.planes[self.plane(turn)].kind):
            raise RuleError(f"kind: {kind!r} where the run uses {wanted!r}")
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
        *,
        author: bytes = bytes(32),
    ) -> Contribution:
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
            decoded = self.codec(turn, author).decode(payload, part.size, device)
        except PayloadError as error:
            raise RuleError(f"payload: {error}") from error
        self.judge_values(decoded)
        return replace(decoded, offset=part.start)

    def judge_values(self, decoded: Contribution) -> None:
        """Raise RuleError if the values are too large together."""
        if (squares := squares_of(decoded)) > self.most_squares:
            raise RuleError(f"clip: sum of squares {squares} is above the clip {self.most_squares}")

    def _turns_of(self, number: int, turn: int) -> int:
        """Return how many of the turns up to this one are this plane's: inclusion, exclusion."""
        count = 0
        for size in range(number + 1):
            for some in combinations(self.planes[:number], size):
                count += (-1) ** size * (
                    turn // lcm(self.planes[number].every, *(plane.every for plane in some))
                )
        return count
