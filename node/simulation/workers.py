"""Workers of simulated peers: the contract, and fakes whose model is a linear hash."""

import random
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, Protocol

from shoal.gossip import events as ev
from shoal.gossip.names import Key, RunId, digest
from shoal.gossip.records import Record, Report, Update
from shoal.gossip.run import Run

LANE = (1 << 64) - 1

Delta = tuple[int, int]
Arrived = tuple[Record, bytes | None]
"""An update and its payload."""


@dataclass(frozen=True, slots=True)
class Turned:
    """What a worker made of a turn."""

    kind: str
    payload: bytes | None
    report: Report
    seconds: float


class SimWorker(Protocol):
    """The worker of one simulated peer: holds the model, never the network."""

    def fingerprint(self) -> Delta:
        """Return the model's fingerprint."""
        ...

    def apply(
        self, updates: Sequence[Arrived], *, sign: int
    ) -> tuple[list[tuple[Key, Delta]], list[tuple[Key, str]]]:
        """Add updates (sign +1) or take them out (−1); return deltas and refusals."""
        ...

    def turn(self, start: ev.StartTurn) -> Turned:
        """Train one turn from the model as it is."""
        ...

    def commit(self, log: int, number: int) -> None:
        """The turn's update got this number."""
        ...

    def discard(self) -> None:
        """The turn's update is not published."""
        ...

    def sums(self) -> Any:
        """Return the model in short, for who begins with a snapshot."""
        ...

    def begin(self, sums: Any) -> None:
        """Hold that model."""
        ...


@dataclass(slots=True)
class FakeWorker:
    """Random payloads whose contribution is a linear hash: equal sets, equal fingerprints."""

    run: Run
    rng: random.Random
    seconds: tuple[float, float] = (0.8, 1.2)
    sizes: tuple[int, int] = (100, 4000)
    value: Delta = (0, 0)

    def fingerprint(self) -> Delta:
        """Return the sum of all contributions."""
        return self.value

    def apply(
        self, updates: Sequence[Arrived], *, sign: int
    ) -> tuple[list[tuple[Key, Delta]], list[tuple[Key, str]]]:
        """Add or take out contributions."""
        deltas, refused = [], []
        for record, payload in updates:
            update = record.statement
            assert isinstance(update, Update)
            key = Key(update.author, update.number)
            delta = contribution(self.run, update, payload)
            if delta == (0, 0):
                refused.append((key, "rules"))
            self.value = (
                (self.value[0] + sign * delta[0]) & LANE,
                (self.value[1] + sign * delta[1]) & LANE,
            )
            deltas.append((key, delta))
        return deltas, refused

    def turn(self, start: ev.StartTurn) -> Turned:
        """Return random bytes."""
        payload = self.rng.randbytes(self.rng.randint(*self.sizes))
        return Turned("fake", payload, Report(turn=start.turn), self.rng.uniform(*self.seconds))

    def commit(self, log: int, number: int) -> None:
        """Keep nothing."""

    def discard(self) -> None:
        """Keep nothing."""

    def sums(self) -> Delta:
        """Return the sum of all contributions."""
        return self.value

    def begin(self, sums: Delta) -> None:
        """Hold this sum."""
        self.value = sums


def contribution(run: Run, update: Update, payload: bytes | None) -> Delta:
    """Return what an update adds to the fake model: a function of its bytes and the rules alone."""
    if payload is None or not run.fetched(update.kind, update.size):
        return (0, 0)
    if 0 < run.turns < update.turn:
        return (0, 0)
    a, b = struct.unpack("<QQ", blake2b(payload, digest_size=16).digest())
    return (a, b)


def fake_run(*, turns: int = 10, seed: int = 0, **others: object) -> Run:
    """Return a run for fake workers."""
    run_id = RunId(digest(b"fake run %d" % seed))
    return Run(run_id, turns=turns, most_bytes={"fake": 100_000}, **others)  # type: ignore[arg-type]
