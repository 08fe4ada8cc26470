"""Who is alive: SWIM and Lifeguard in whole swarms."""

from dataclasses import replace

import pytest

from shoal.gossip.limits import Limits
from shoal.gossip.names import PeerId
from shoal.gossip.records import Standing
from shoal.node.simulation.faults import Fault, Network
from shoal.node.simulation.simulator import Simulator
from shoal.node.simulation.workers import fake_run

pytestmark = pytest.mark.sim


def times(simulator: Simulator, what: str, about: PeerId) -> list[float]:
    return [s.at for s in simulator.happened if s.what == what and s.about == about]


def quiet(peers: int, **more: object) -> Simulator:
    """Return a swarm that knows itself and trains nothing."""
    return Simulator(
        peers,
        fake_run(),
        limits=Limits(),
        full_views=True,
        observers=range(peers),
        **more,  # type: ignore[arg-type]
    )


@pytest.mark.parametrize("seed", range(4))
def test_a_killed_peer_is_noticed_by_all_of_32_within_ten_seconds(seed: int) -> None:
    simulator = quiet(32, seed=seed, faults=[Fault.crash(peer=7, at=5)])
    simulator.run(15)
    assert len(times(simulator, "failed", simulator.peers[7].id)) == 31
    assert {s.about for s in simulator.happened if s.what == "failed"} == {simulator.peers[7].id}


def test_loss_alone_kills_nobody() -> None:
    simulator = quiet(32, seed=9, network=Network(loss=0.05))
    simulator.run(120)
    assert [s for s in simulator.happened if s.what == "failed"] == []
    assert all(len(p.core.view.ring) == 32 for p in simulator.peers)


@pytest.mark.parametrize("peers", [4, 32])
def test_a_frozen_peer_refutes_when_it_thaws(peers: int) -> None:
    simulator = quiet(peers, seed=10, faults=[Fault.freeze(peer=1, at=10, to=15)])
    simulator.run(40)
    frozen = simulator.peers[1]
    assert len(times(simulator, "suspected", frozen.id)) > 0
    assert times(simulator, "failed", frozen.id) == []
    assert frozen.core.membership.incarnation > 1
    assert all(not p.core.membership.suspicions for p in simulator.peers)


def test_a_peer_that_comes_back_is_welcome_and_no_twin_of_itself() -> None:
    simulator = quiet(8, seed=11, faults=[Fault.crash(peer=2, at=5), Fault.restart(peer=2, at=25)])
    simulator.run(24)
    back = simulator.peers[2]
    assert len(times(simulator, "failed", back.id)) == 7
    simulator.run(45)
    assert all(p.core.view.lives(back.id) for p in simulator.peers)
    assert [s for s in simulator.happened if s.what == "twin"] == []
    assert back.core.membership.twin is None


def test_a_restart_at_once_is_no_twin_either() -> None:
    simulator = Simulator(
        4,
        fake_run(turns=30),
        seed=12,
        faults=[Fault.crash(peer=2, at=5), Fault.restart(peer=2, at=5.5)],
    )
    simulator.run(30)
    assert [s for s in simulator.happened if s.what == "twin"] == []
    assert simulator.peers[2].core.state == "training"


def test_the_later_of_two_twins_stops_and_both_say_so() -> None:
    """The same key on a second machine, with an empty disk."""
    simulator = Simulator(4, fake_run(turns=0), seed=13, faults=[Fault.depart(peer=4, at=42)])
    simulator.run(10)
    twin = simulator.twin(1)
    simulator.run(25)
    first, later = simulator.peers[1].core, twin.core
    assert first.membership.twin == "earlier"
    assert later.membership.twin == "later"
    assert later.state == "degraded: another process runs under this key"
    assert first.state == "training"
    assert later.linked() == [], "its links would take the place of the earlier one's"
    held = len([k for k in twin.records if k.author.log == later.log])
    simulator.run(40)
    assert len([k for k in twin.records if k.author.log == later.log]) == held
    assert first.turn > 15
    assert later.linked() == []
    assert all(first.me in simulator.peers[i].core.linked() for i in (0, 2, 3))
    simulator.run(50)
    assert later.state == "leaving"
    others = [simulator.peers[i].core for i in (0, 2, 3)]
    assert all(core.view.lives(first.me) for core in others), "who has left is the later one"
    assert [s for s in simulator.happened if s.what == "left"] == []


def test_halves_find_each_other_after_a_partition() -> None:
    simulator = quiet(16, seed=14, faults=[Fault.partition(range(8), at=5, to=40)])
    simulator.run(39)
    for peer in simulator.peers:
        side = range(8) if peer.index < 8 else range(8, 16)
        assert peer.core.view.ring == sorted(simulator.peers[i].id for i in side)
    simulator.run(80)
    assert all(len(p.core.view.ring) == 16 for p in simulator.peers)


def test_who_leaves_is_gone_at_once_and_not_failed() -> None:
    simulator = quiet(8, seed=15, faults=[Fault.depart(peer=3, at=5), Fault.crash(peer=3, at=5.2)])
    simulator.run(7)
    gone = simulator.peers[3].id
    assert len(times(simulator, "left", gone)) == 7
    simulator.run(30)
    assert times(simulator, "failed", gone) == []


def test_who_failed_long_ago_is_forgotten_and_stays_so() -> None:
    simulator = Simulator(
        6,
        fake_run(),
        seed=16,
        limits=replace(Limits(), keep=30.0),
        observers=range(6),
        faults=[Fault.crash(peer=3, at=5)],
    )
    simulator.run(200)
    gone = simulator.peers[3].id
    for peer in simulator.living():
        assert gone not in peer.core.view.peers()
        assert gone not in peer.core.membership.failed
    forgotten = times(simulator, "forgotten", gone)
    assert len(forgotten) == 5
    assert simulator.now - max(forgotten) > 60


def test_who_left_long_ago_is_forgotten() -> None:
    simulator = Simulator(
        4,
        fake_run(),
        seed=20,
        limits=replace(Limits(), keep=20.0),
        observers=range(4),
        faults=[Fault.depart(peer=3, at=5), Fault.crash(peer=3, at=6)],
    )
    simulator.run(60)
    gone = simulator.peers[3].id
    assert all(gone not in p.core.view.peers() for p in simulator.living())


def test_everybody_learns_everybody_through_one_door() -> None:
    simulator = Simulator(24, fake_run(), seed=17, observers=range(24))
    simulator.run(15)
    for peer in simulator.peers:
        members = peer.core.members()
        assert len(members) == 24
        assert {m.standing for m in members} == {Standing.OBSERVING}
        assert all(m.addresses for m in members)
    assert len({p.core.view.hash for p in simulator.peers}) == 1


def test_degrees_stay_within_bounds() -> None:
    simulator = Simulator(40, fake_run(), seed=18, observers=range(40))
    simulator.run(60)
    degrees = [len(p.core.linked()) for p in simulator.peers]
    assert min(degrees) >= Limits().degree_min
    assert max(degrees) <= 2 * Limits().degree_max


def test_a_ledger_refuses_more_members_than_it_can_hold() -> None:
    simulator = Simulator(
        8, fake_run(), seed=19, limits=replace(Limits(), ledger_members=5), observers=range(8)
    )
    simulator.run(20)
    assert all(len(p.core.view.alive) <= 5 for p in simulator.peers)
