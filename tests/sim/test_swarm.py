"""Swarms of real cores on a simulated network: they converge, whatever the network does to them."""

import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shoal.gossip.events import Pause, StartTurn
from shoal.node.simulation.faults import Fault, Network
from shoal.node.simulation.peers import SimPeer
from shoal.node.simulation.simulator import Simulator
from shoal.node.simulation.workers import FakeWorker, SimWorker, Turned, fake_run

pytestmark = pytest.mark.sim


def small(simulator: Simulator, index: int) -> SimWorker:
    """Payloads that travel inside their records."""
    rng = random.Random(f"{simulator.seed}/{index}/{simulator.now}")
    return FakeWorker(simulator.run_, rng, sizes=(20, 60))


def done(simulator: Simulator) -> bool:
    peers = simulator.living()
    return all(p.core.turns.finished() for p in peers) and simulator.converged()


def check_equal(simulator: Simulator) -> None:
    """Equal frontiers, and models that equal the sum of what lies on the disk."""
    assert simulator.converged()
    peers = simulator.living()
    expected = simulator.expected_fingerprint(peers[0])
    assert expected != (0, 0)
    for peer in peers:
        assert peer.core.fingerprint == expected
        assert simulator.expected_fingerprint(peer) == expected
        assert peer.core.lag() == 0


def updates_of(simulator: Simulator, peer: SimPeer) -> int:
    return sum(n for a, n in simulator.peers[0].core.frontier.counts() if a.peer == peer.id)


def test_four_peers_end_with_every_update_of_each() -> None:
    simulator = Simulator(4, fake_run(min_peers=4), seed=1)
    assert simulator.run(60, done)
    check_equal(simulator)
    assert simulator.peers[0].core.frontier.total() == 40
    assert {p.core.state for p in simulator.peers} == {"finished"}


def test_all_say_that_they_agree_soon_after_the_end() -> None:
    simulator = Simulator(4, fake_run(min_peers=4), seed=1)
    assert simulator.run(60, done)
    simulator.run(simulator.now + 5)
    assert all(p.core.agrees() for p in simulator.peers)
    assert all(len(p.core.agreement.verdicts) == 3 for p in simulator.peers)
    assert all(p.core.settled() == 40 for p in simulator.peers)


def test_loss_duplicates_reordering_and_a_partition_change_nothing() -> None:
    simulator = Simulator(
        32,
        fake_run(min_peers=4),
        seed=2,
        network=Network(loss=0.05, duplicate=0.05, latency=(0.001, 0.2)),
        faults=[Fault.partition(range(16), at=4, to=14)],
        workers=small,
    )
    assert simulator.run(120, done)
    check_equal(simulator)
    assert simulator.peers[0].core.frontier.total() == 320


def test_who_is_cut_off_claims_to_agree_with_nobody() -> None:
    faults = [Fault.partition([0], at=8, to=60)]
    simulator = Simulator(4, fake_run(min_peers=1, turns=100), seed=3, faults=faults, workers=small)
    simulator.run(7)
    cut, others = simulator.peers[0].core, [p.core for p in simulator.peers[1:]]
    assert cut.agrees() is True
    simulator.run(59)  # by then it does not think any more that it is itself that is slow
    assert cut.agrees() is None
    assert cut.verdicts() == {}
    for core in others:
        assert core.agrees() is True, "the others see each other"
        assert cut.me not in core.verdicts()
    simulator.run(110)
    assert all(core.agrees() and len(core.verdicts()) == 3 for core in (cut, *others))


def test_the_same_seed_gives_the_same_trace_and_another_seed_another() -> None:
    def trace(seed: int) -> tuple[str, int, object]:
        simulator = Simulator(
            8,
            fake_run(turns=5),
            seed=seed,
            network=Network(loss=0.1, duplicate=0.1),
            faults=[Fault.crash(peer=2, at=2), Fault.restart(peer=2, at=6)],
        )
        simulator.run(30)
        return simulator.trace(), simulator.steps, simulator.peers[3].core.fingerprint

    assert trace(5) == trace(5)
    assert trace(5)[0] != trace(6)[0]


def test_no_payload_travels_twice_to_one_peer() -> None:
    simulator = Simulator(16, fake_run(), seed=3, network=Network(loss=0.02))
    assert simulator.run(90, done)
    pulls = [n for p in simulator.peers for n in p.pulls.values()]
    assert len(pulls) > 1000
    assert set(pulls) == {1}


def test_links_settle_into_a_tree() -> None:
    """Without loss hardly a record reaches anybody twice."""
    simulator = Simulator(16, fake_run(turns=0), seed=3, workers=small)
    simulator.run(30)

    def duplicates() -> int:
        return sum(p.core.counters.get("duplicate", 0) for p in simulator.peers)

    before, held = duplicates(), simulator.peers[0].core.frontier.total()
    simulator.run(45)
    news = 15 * (simulator.peers[0].core.frontier.total() - held)
    assert duplicates() - before < 0.25 * news


def test_four_idle_peers_say_little() -> None:
    """Per peer and second, all but payloads: the budget of the built-in run is 4 kB."""
    simulator = Simulator(4, fake_run(turns=10, min_peers=4), seed=1, workers=small)
    assert simulator.run(60, done)
    simulator.run(simulator.now + 10)
    before, start = (simulator.messages, simulator.message_bytes), simulator.now
    simulator.run(start + 60)
    assert (simulator.messages - before[0]) / 60 / 4 < 4
    assert (simulator.message_bytes - before[1]) / 60 / 4 < 1000


def test_a_joiner_catches_up_and_trains_from_the_median_turn() -> None:
    simulator = Simulator(
        5, fake_run(turns=0), seed=4, absent=[4], faults=[Fault.start(peer=4, at=20)]
    )
    simulator.run(20)
    turns = sorted(p.core.turn for p in simulator.peers[:4])
    simulator.run(24)
    late = simulator.peers[4]
    assert late.core.state == "training"
    own = [r.statement for k, r in late.records.items() if k.author.peer == late.id]
    assert turns[0] <= min(u.turn for u in own) <= turns[-1] + 3  # type: ignore[union-attr]
    for peer in simulator.peers:
        simulator._later(0.0, peer, Pause())
    simulator.run(30)
    check_equal(simulator)


def test_an_observer_holds_everything_and_publishes_nothing() -> None:
    simulator = Simulator(4, fake_run(turns=6), seed=5, observers=[3])
    assert simulator.run(
        60,
        lambda s: all(p.core.turns.finished() for p in s.peers[:3]) and s.converged(),
    )
    check_equal(simulator)
    assert simulator.peers[3].core.state == "observing"
    assert updates_of(simulator, simulator.peers[3]) == 0
    assert simulator.peers[0].core.frontier.total() == 18


def test_only_those_drawn_publish() -> None:
    simulator = Simulator(8, fake_run(turns=20, participation=0.25), seed=6, workers=small)
    assert simulator.run(90, done)
    check_equal(simulator)
    total = simulator.peers[0].core.frontier.total()
    assert 20 <= total <= 60  # 40 expected
    turned = {p.core.turns.weight.value for p in simulator.peers}
    assert max(turned) <= 8


def test_lockstep_trains_on_equal_models_and_is_reproducible() -> None:
    def models(seed: int) -> list[list[tuple[int, int]]]:
        seen: dict[int, list[tuple[int, int]]] = {}

        class Spying(FakeWorker):
            """Remember from which model each turn was trained."""

            def turn(self, start: StartTurn) -> Turned:
                seen.setdefault(id(self), []).append(self.value)
                return FakeWorker.turn(self, start)

        def spying(simulator: Simulator, index: int) -> SimWorker:
            return Spying(simulator.run_, random.Random(index), sizes=(20, 60))

        run = fake_run(turns=8, min_peers=4, pace="lockstep")
        simulator = Simulator(4, run, seed=seed, workers=spying, network=Network(loss=0.02))
        assert simulator.run(120, done)
        check_equal(simulator)
        assert all(p.core.reproducible for p in simulator.peers)
        return list(seen.values())

    models_of = models(7)
    assert len(models_of) == 4
    assert all(len(turns) == 8 for turns in models_of)
    assert all(turns == models_of[0] for turns in models_of)
    assert len(set(models_of[0])) == 8


def test_lockstep_goes_on_without_the_dead() -> None:
    simulator = Simulator(
        4,
        fake_run(turns=6, min_peers=4, pace="lockstep"),
        seed=8,
        faults=[Fault.crash(peer=3, at=3.5)],
    )
    assert simulator.run(120, done)
    check_equal(simulator)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_equal_sets_mean_equal_fingerprints_whatever_happens(data: st.DataObject) -> None:
    """Crashes with restarts, loss, duplicates, overtaking: at the end all models are equal."""
    seed = data.draw(st.integers(0, 10**6))
    faults: list[Fault | tuple[Fault, ...]] = []
    for peer in data.draw(st.sets(st.integers(0, 5), max_size=3)):
        at = data.draw(st.floats(0.5, 8))
        faults += [Fault.crash(peer=peer, at=at), Fault.restart(peer=peer, at=at + 2)]
    if data.draw(st.booleans()):
        group = data.draw(st.sets(st.integers(0, 5), min_size=1, max_size=3))
        faults.append(Fault.partition(group, at=2, to=data.draw(st.floats(3, 12))))
    if data.draw(st.booleans()):
        faults.append(Fault.kill_worker(peer=1, at=3, to=5))
    network = Network(
        loss=data.draw(st.sampled_from([0.0, 0.1, 0.2])),
        duplicate=data.draw(st.sampled_from([0.0, 0.2])),
        latency=data.draw(st.sampled_from([(0.001, 0.01), (0.01, 0.5)])),
    )
    simulator = Simulator(6, fake_run(turns=5), seed=seed, network=network, faults=faults)
    simulator.run(14)
    assert simulator.run(200, done)
    check_equal(simulator)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_256_peers_converge_through_loss_and_a_partition() -> None:
    # All are there before the first turn, so that nobody joins at a later one: 10 updates each.
    gathered = [Fault.pause(peer=i, at=0) for i in range(256)]
    together = [Fault.resume(peer=i, at=8) for i in range(256)]
    simulator = Simulator(
        256,
        fake_run(min_peers=4),
        seed=1,
        network=Network(loss=0.05, duplicate=0.02),
        faults=[*gathered, *together, *Fault.partition(range(128), at=12, to=22)],
        workers=small,
    )
    simulator.run(23)
    assert simulator.run(200, done)
    check_equal(simulator)
    assert simulator.peers[0].core.frontier.total() == 2560
