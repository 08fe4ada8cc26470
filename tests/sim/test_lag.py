"""How far behind a peer knows itself to be: turns of the others per turn of its own."""

import random

import pytest

from shoal.gossip.events import StartTurn
from shoal.node.simulation.simulator import Simulator
from shoal.node.simulation.workers import FakeWorker, SimWorker, Turned, fake_run

pytestmark = pytest.mark.sim


class Listening(FakeWorker):
    """Remember the lag that each turn was told."""

    lags: list[float]

    def turn(self, start: StartTurn) -> Turned:
        self.lags.append(start.lag)
        return FakeWorker.turn(self, start)


@pytest.mark.parametrize("participation", [1.0, 0.5])
def test_a_peer_at_a_quarter_of_the_speed_is_three_turns_behind(participation: float) -> None:
    seen: dict[int, list[float]] = {}

    def workers(simulator: Simulator, index: int) -> SimWorker:
        seconds = (4.0, 4.0) if index == 0 else (1.0, 1.0)
        worker = Listening(simulator.run_, random.Random(index), seconds=seconds, sizes=(20, 60))
        worker.lags = seen[index] = []
        return worker

    run = fake_run(turns=0, participation=participation)
    simulator = Simulator(8, run, seed=2, workers=workers)
    simulator.run(150, lambda _: False)
    slow = seen[0][5:]
    quick = [lag for index in range(1, 8) for lag in seen[index][5:]]
    assert sum(slow) / len(slow) == pytest.approx(3, abs=0.6)
    assert sum(quick) / len(quick) < 0.4
