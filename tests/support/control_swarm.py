"""Error control in a simulated swarm: real cores and a bad network around workers that hold one.

Lockstep: round t closes when turn t + 1 begins, from the frames of turn t of everybody. So all
peers step from the same point along the same direction, and must hold the same bits for ever.
"""

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from shoal.gossip.events import StartTurn
from shoal.gossip.names import Key
from shoal.gossip.records import Report, Update
from shoal.node.simulation.faults import Fault, Network
from shoal.node.simulation.peers import fake_peer
from shoal.node.simulation.simulator import Simulator
from shoal.node.simulation.workers import (
    LANE,
    Arrived,
    Delta,
    SimWorker,
    Turned,
    contribution,
    fake_run,
)
from shoal.training.control import Control, Remedy, Taken
from shoal.training.frames import Streams

BAD = Network(loss=0.1, duplicate=0.1, latency=(0.01, 0.3))


class Problem(Protocol):
    """What a swarm solves together."""

    def start(self) -> Tensor:
        """Return the first shared point."""
        ...

    def vector(self, index: int, control: Control, x_D: Tensor, turn: int) -> Tensor:
        """Return what author `index` publishes in a turn."""
        ...


@dataclass(slots=True)
class ControlWorker:
    """One peer: a control, the shared point, and the frames of rounds that are not closed."""

    simulator: Simulator
    index: int
    control: Control
    problem: Problem
    step: float
    drop: float = 0.0
    """Share of others' frames that do not reach this worker."""
    joins: bool = False
    """Begin from a keyframe instead of from all frames."""
    x: Tensor = field(init=False)
    closed: int = 0
    sent_bytes: int = 0
    remedies: list[Remedy] = field(default_factory=list)
    path: list[Tensor] = field(default_factory=list)
    _waiting: dict[int, list[tuple[bytes, int, bytes]]] = field(default_factory=dict)
    _value: Delta = (0, 0)
    _rng: random.Random = field(init=False)

    def __post_init__(self) -> None:
        self.x = self.problem.start()
        self._rng = random.Random(f"{self.simulator.seed}/{self.index}")

    def fingerprint(self) -> Delta:
        return self._value

    def apply(
        self, updates: Sequence[Arrived], *, sign: int
    ) -> tuple[list[tuple[Key, Delta]], list[tuple[Key, str]]]:
        assert sign > 0
        deltas = []
        for record, payload in updates:
            update = record.statement
            assert isinstance(update, Update)
            assert payload is not None
            frame = (bytes(update.author.peer), update.number, payload)
            self._waiting.setdefault(update.turn, []).append(frame)
            a, b = contribution(self.simulator.run_, update, payload)
            self._value = (self._value[0] + a) & LANE, (self._value[1] + b) & LANE
            deltas.append((Key(update.author, update.number), (a, b)))
        return deltas, []

    def turn(self, start: StartTurn) -> Turned:
        turn = start.turn
        if self.joins:
            self._join()
        self.close_before(turn)
        payload = None
        if not self.control.listening:
            at_D = self.control.point(self.x)
            vector_D = self.problem.vector(self.index, self.control, at_D, turn)
            payload = self.control.publish(vector_D, key=turn << 16 | self.index)
            self.sent_bytes += len(payload)
        return Turned("fake", payload, Report(turn=turn), self._rng.uniform(0.1, 1.0))

    def commit(self, log: int, number: int) -> None:
        self.control.commit(number)

    def discard(self) -> None:
        self.control.discard()

    def close_before(self, turn: int) -> None:
        """Close the rounds of all earlier turns."""
        for one in sorted(t for t in self._waiting if t < turn):
            for frame in sorted(self._waiting.pop(one)):
                self._feed(*frame)
            self.x = self.x - self.step * self.control.close(self.x)
            self.path.append(self.x)
            self.closed = one

    def _feed(self, author: bytes, number: int, payload: bytes) -> None:
        own = author == fake_peer(self.index, self.simulator.seed)
        if own or self._rng.random() >= self.drop:
            taken = self.control.receive(author, number, payload)
            assert taken in {Taken.APPLIED, Taken.KNOWN}, taken
            return
        lost = self.control.lose(author, number)
        if lost.remedy is Remedy.RESEND and self._rng.random() < 0.5:
            lost = self.control.lose(author, number)  # it got lost once more
        self.remedies.append(lost.remedy)
        if lost.remedy is Remedy.RESEND:
            for n in range(lost.first, lost.last + 1):
                again = self._worker(author).control.resend(author, n)
                assert again is not None
                assert self.control.receive(author, n, again) is Taken.APPLIED
        elif lost.remedy is Remedy.KEYFRAME:
            assert self.control.receive(author, number + 1, payload) is Taken.EARLY
            donor = self._passed(author, number).control
            assert isinstance(donor, Streams)
            self.control.take(donor.keyframe_of(author))
            assert self.control.receive(author, number, payload) is Taken.KNOWN

    def _worker(self, author: bytes) -> "ControlWorker":
        found = next(p.worker for p in self.simulator.peers if p.id == author)
        assert isinstance(found, ControlWorker)
        return found

    def _passed(self, author: bytes, number: int) -> "ControlWorker":
        """Return somebody whose replica is exactly so far; the author may be a frame ahead."""
        for peer in self.simulator.peers:
            worker = peer.worker
            assert isinstance(worker, ControlWorker)
            if getattr(worker.control, "counts", {}).get(author) == number:
                return worker
        raise AssertionError("nobody holds it")

    def _join(self) -> None:
        """Take over what is shared from the first peer, and the point."""
        donor = self.simulator.peers[0].worker
        assert isinstance(donor, ControlWorker)
        self.control.take(donor.control.keyframe())
        self.x, self.closed, self.joins = donor.x.clone(), donor.closed, False
        self._waiting = {t: f for t, f in self._waiting.items() if t > self.closed}


def swarm(
    problem: Problem,
    control: Callable[[bytes], Control],
    *,
    peers: int,
    turns: int,
    step: float,
    seed: int = 0,
    drop: float = 0.0,
    late: int | None = None,
    network: Network = BAD,
    faults: Iterable[Fault | tuple[Fault, ...]] = (),
) -> list[ControlWorker]:
    """Play a run to its end and return the workers, which all hold the same."""

    def worker(simulator: Simulator, index: int) -> SimWorker:
        made = control(bytes(fake_peer(index, simulator.seed)))
        joins = index == late and simulator.now > 0
        return ControlWorker(simulator, index, made, problem, step, drop, joins)

    run = fake_run(turns=turns, pace="lockstep", min_peers=peers - (late is not None))
    simulator = Simulator(
        peers,
        run,
        seed=seed,
        network=Network(**{n: getattr(network, n) for n in Network.__slots__}),
        workers=worker,
        faults=faults,
        absent=[] if late is None else [late],
    )
    assert simulator.run(
        100 + 20 * turns,
        lambda s: all(p.core.turns.finished() for p in s.living()) and s.converged(),
    )
    assert all(p.core.reproducible for p in simulator.peers)
    workers = []
    for peer in simulator.peers:
        assert isinstance(peer.worker, ControlWorker)
        peer.worker.close_before(turns + 1)
        workers.append(peer.worker)
    assert all(torch.equal(one.x, workers[0].x) for one in workers)
    assert len({one.control.checksum() for one in workers}) == 1
    return workers
