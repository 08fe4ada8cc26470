"""Lockstep in whole swarms: every turn begins from one model, or the run is not reproducible."""

import random
from collections.abc import Iterable

import pytest

from shoal.gossip.events import StartTurn
from shoal.node.simulation.faults import Fault, Network
from shoal.node.simulation.simulator import Simulator
from shoal.node.simulation.workers import FakeWorker, SimWorker, Turned, fake_run

pytestmark = pytest.mark.sim

PEERS = 5
BAD = Network(loss=0.1, duplicate=0.1, latency=(0.01, 0.4))


class Spying(FakeWorker):
    """Remember from which model each turn was trained."""

    begun: dict[int, tuple[int, int]]

    def turn(self, start: StartTurn) -> Turned:
        self.begun[start.turn] = self.value
        return FakeWorker.turn(self, start)


def spying(simulator: Simulator, index: int) -> SimWorker:
    rng = random.Random(f"{simulator.seed}/{index}")
    worker = Spying(simulator.run_, rng, seconds=(0.1, 2.0), sizes=(500, 3000))
    worker.begun = {}
    return worker


def play(
    seed: int, turns: int, *, participation: float = 1.0, absent: Iterable[int] = (), **more: object
) -> Simulator:
    run = fake_run(
        turns=turns,
        pace="lockstep",
        min_peers=PEERS - len(list(absent)),
        participation=participation,
    )
    simulator = Simulator(
        PEERS,
        run,
        seed=seed,
        workers=spying,
        absent=absent,
        **more,  # type: ignore[arg-type]
    )
    assert simulator.run(
        300, lambda s: all(p.core.turns.finished() for p in s.living()) and s.converged()
    )
    return simulator


def differing(simulator: Simulator) -> list[int]:
    """Return the turns that did not begin from one model."""
    begun: dict[int, set[tuple[int, int]]] = {}
    for peer in simulator.peers:
        assert isinstance(peer.worker, Spying)
        for turn, model in peer.worker.begun.items():
            begun.setdefault(turn, set()).add(model)
    return sorted(turn for turn, models in begun.items() if len(models) > 1)


@pytest.mark.parametrize("seed", range(3))
def test_a_bad_network_changes_nothing(seed: int) -> None:
    """Those who finish first say so before their last updates have come."""
    simulator = play(seed, 8, network=BAD)
    assert differing(simulator) == []
    assert all(p.core.reproducible for p in simulator.peers)


@pytest.mark.parametrize("seed", range(3))
def test_who_is_drawn_for_the_first_time_is_waited_for(seed: int) -> None:
    simulator = play(seed, 20, participation=0.4, network=BAD)
    assert differing(simulator) == []
    assert all(p.core.reproducible for p in simulator.peers)


def test_a_joiner_that_changes_a_turn_is_told() -> None:
    changed = 0
    for seed in range(4):
        simulator = play(seed, 15, absent=[4], faults=[Fault.start(peer=4, at=12.3)])
        if differing(simulator):
            changed += 1
            assert not all(p.core.reproducible for p in simulator.peers)
    assert changed
