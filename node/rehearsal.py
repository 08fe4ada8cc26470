"""A run rehearsed in one process: every peer really trains, on the simulator's network and clock.

The cores, the turns, the codecs and the ledgers are the ones that daemons use; only sockets, disks
and signatures are simulated. The same seed gives the same trace and the same models.
"""

import random
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from shoal.gossip.events import StartTurn
from shoal.gossip.names import Key, RunId, digest
from shoal.gossip.records import Report, Standing, Update
from shoal.gossip.run import Run
from shoal.node.config import canonical
from shoal.node.errors import ConfigError
from shoal.node.simulation.faults import Network
from shoal.node.simulation.peers import fake_peer
from shoal.node.simulation.simulator import Simulator
from shoal.node.simulation.workers import Arrived, Delta, SimWorker, Turned
from shoal.node.worker import failure
from shoal.training import exchange
from shoal.training.method import TrainingError
from shoal.training.run import RunError, RunSpec
from shoal.training.trainer import Founding, Setup, Trainer

STEP_SECONDS = 0.05
"""Simulated seconds of a local step; each peer is up to a quarter slower or faster."""


@dataclass(slots=True)
class TrainingWorker:
    """A worker of the simulator that holds a real `Trainer`."""

    trainer: Trainer
    pace: float
    """Simulated seconds of a step."""
    last: Report = field(default_factory=Report)
    steps: int = 0
    published: int = 0
    """Payload bytes."""

    def fingerprint(self) -> Delta:
        """Return the model's fingerprint."""
        return self.trainer.fingerprint()

    def apply(
        self, updates: Sequence[Arrived], *, sign: int
    ) -> tuple[list[tuple[Key, Delta]], list[tuple[Key, str]]]:
        """Take updates in (sign +1) or out (-1)."""
        arrived = [_arrived(record.statement, payload) for record, payload in updates]
        act = self.trainer.apply if sign > 0 else self.trainer.subtract
        outcomes = zip(updates, act(arrived), strict=True)
        named = [(_key(record.statement), outcome) for (record, _), outcome in outcomes]
        refused = [(key, outcome.refused) for key, outcome in named if outcome.refused is not None]
        return [(key, outcome.delta) for key, outcome in named], refused

    def turn(self, start: StartTurn) -> Turned:
        """Train one turn for real; how long it takes is simulated."""
        try:
            turned = self.trainer.turn(
                start.turn, start.members, lag=start.lag, publish=start.publish
            )
        except (RunError, TrainingError) as error:
            raise ConfigError(str(error)) from error
        except Exception as error:  # the user's task may raise anything
            traceback.print_exc()
            raise ConfigError(f"a worker failed: {failure(error).error}") from error
        self.steps += turned.steps
        self.published += len(turned.payload or b"")
        self.last = Report(
            turn=start.turn, steps=self.steps, loss=turned.loss, evaluation=turned.evaluation
        )
        return Turned(turned.kind, turned.payload, self.last, self.pace * turned.steps)

    def commit(self, log: int, number: int) -> None:
        """The turn's update got this number."""
        self.trainer.commit(log, number)

    def discard(self) -> None:
        """The turn's update is not published."""
        self.trainer.discard()

    def sums(self) -> bytes | None:
        """Return what the run added along the seeds of its pool; None where it is more."""
        return self.trainer.exchange.sums()

    def begin(self, sums: bytes) -> None:
        """Hold the initial model and these sums."""
        self.trainer.begin(sums)

    def evaluate(self) -> float:
        """Return the task's measure of the shared model as it is now."""
        return self.trainer.evaluate()


def _key(update: object) -> Key:
    assert isinstance(update, Update)
    return Key(update.author, update.number)


def _arrived(update: object, payload: bytes | None) -> exchange.Arrived:
    assert isinstance(update, Update)
    key = (update.author.peer, update.author.log, update.number)
    return exchange.Arrived(key, update.turn, update.kind, payload, update.size)


class _Workers:
    """Makes the peers' workers; the initial model is made once."""

    def __init__(
        self,
        spec: RunSpec,
        peers: int,
        *,
        data: str | None,
        base: str | None,
        allow: str | None,
    ) -> None:
        self._spec, self._peers, self._allow = spec, peers, allow
        self._data, self._base = data, base
        self._initial: bytes | None = None
        self.run_id = bytes(32)
        """Of the run, once it is founded."""
        self.founding: Founding | None = None

    def __call__(self, simulator: Simulator, index: int) -> SimWorker:
        """Return the worker of peer `index`."""
        trainer = self.trainer(fake_peer(index, simulator.seed), index)
        pace = STEP_SECONDS * random.Random(f"{simulator.seed}/pace/{index}").uniform(0.75, 1.25)
        return TrainingWorker(trainer, pace)

    def trainer(self, peer: bytes, index: int) -> Trainer:
        """Return a trainer with the run's initial model."""
        setup = Setup(
            run=self._spec,
            peer=peer,
            run_id=self.run_id,
            data=self._data,
            base=self._base,
            shard=(index, self._peers),
            threads=1,
            allow_task=self._allow,
        )
        # Real time would make the number of steps, and so the trace, differ from run to run.
        trainer = Trainer(setup, initial=self._initial, clock=lambda: 0.0)
        self._initial = self._initial or trainer.initial_bytes()
        return trainer

    def found(self) -> Founding:
        """Try the run as a founder does."""
        return self.trainer(fake_peer(0), 0).founding()


def rehearse(
    tables: Mapping[str, Any],
    peers: int,
    *,
    seed: int,
    network: Network,
    data: str | None = None,
    base: str | None = None,
    allow_task: str | None = None,
) -> Simulator:
    """Return a simulator of `peers` that train this run; raises ConfigError."""
    try:
        spec = RunSpec.parse(tables, allow_task=allow_task)
        workers = _Workers(spec, peers, data=data, base=base, allow=allow_task)
        founding = workers.found()
    except RunError as error:
        raise ConfigError(str(error)) from error
    if not spec.local.steps and any(plane.by_time for plane in spec.planes):
        raise ConfigError(
            "turn_seconds follows the clock, which a simulation has not: set local.steps instead"
        )
    workers.run_id = digest(canonical(founding.run))
    run = Run(
        RunId(workers.run_id),
        turns=spec.run.turns,
        min_peers=spec.swarm.min_peers,
        participation=spec.exchange.participation,
        pace=spec.exchange.pace,
        combined=spec.exchange.combines(),
        topology=spec.swarm.topology,
        most_bytes=founding.most_bytes,
    )
    return Simulator(peers, run, seed=seed, network=network, workers=workers)


def done(simulator: Simulator) -> bool:
    """Return whether every living peer is finished and holds what all hold."""
    standing = {peer.core.membership.standing for peer in simulator.living()}
    return standing == {Standing.FINISHED} and simulator.converged()
