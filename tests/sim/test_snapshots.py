"""Peers that begin with a snapshot in place of the log: equal in the end, whoever lies to them."""

from dataclasses import replace

import pytest

from shoal.gossip import events as ev
from shoal.gossip.messages import Push
from shoal.gossip.records import Proof, Update
from shoal.node.simulate import Fault, Network, SimPeer, Simulator, fake_run, fake_seal

pytestmark = pytest.mark.sim


def done(simulator: Simulator) -> bool:
    return all(p.core.turns.finished() for p in simulator.living()) and simulator.converged()


def dropped(simulator: Simulator) -> list[str]:
    return [seen.details["why"] for seen in simulator.happened if seen.what == "snapshot-dropped"]


def check_equal(simulator: Simulator) -> None:
    """The living hold the sum of all contributions, which a peer with the whole log tells."""
    living = simulator.living()
    whole = next(p for p in living if p.snapshot is None)
    expected = simulator.expected_fingerprint(whole)
    assert {p.core.fingerprint for p in living} == {expected}
    assert len({p.core.frontier.hash for p in living}) == 1


def lowest(peer: SimPeer, of: SimPeer) -> int:
    """Return the first number of `of` that is on this peer's disk."""
    return min(key.number for key in peer.records if key.author.peer == of.id)


@pytest.mark.parametrize("seed", range(4))
def test_a_joiner_fetches_only_what_lies_above_its_snapshot(seed: int) -> None:
    simulator = Simulator(
        6,
        fake_run(turns=40),
        seed=seed,
        network=Network(loss=0.05),
        faults=[Fault.start(peer=5, at=9, donor=1)],
        absent=[5],
    )
    assert simulator.run(120, done)
    check_equal(simulator)
    joiner = simulator.peers[5]
    assert joiner.snapshot is not None
    assert not dropped(simulator)
    assert sum(k.author.peer == joiner.id for k in joiner.records) >= 4, "it trained"
    for author, count in joiner.snapshot.counts():
        assert lowest(joiner, next(p for p in simulator.peers if p.id == author.peer)) == count + 1
    assert joiner.core.agrees()
    assert simulator.peers[0].core.agrees()


def test_it_trains_only_once_somebody_else_has_confirmed_the_snapshot() -> None:
    simulator = Simulator(
        4,
        fake_run(turns=30),
        seed=1,
        faults=[
            *(Fault.crash(peer=p, at=8.9) for p in (2, 3)),
            Fault.start(peer=1, at=9, donor=0),
            *(Fault.restart(peer=p, at=11) for p in (2, 3)),
        ],
        absent=[1],
    )
    joiner = simulator.peers[1]
    simulator.run(9.5)
    assert joiner.core.repair.caught_up()
    assert not joiner.core.joined, "others are known, and have not spoken"
    assert simulator.run(120, done)
    assert joiner.core.joined
    check_equal(simulator)


def test_with_nobody_but_the_donor_there_it_trains_at_once() -> None:
    simulator = Simulator(
        2, fake_run(turns=20), seed=2, faults=[Fault.start(peer=1, at=9, donor=0)], absent=[1]
    )
    simulator.run(10.5)
    assert simulator.peers[1].core.joined
    assert simulator.run(120, done)
    check_equal(simulator)


@pytest.mark.parametrize("lie", ["model", "fingerprint", "hashes"])
@pytest.mark.parametrize("seed", range(3))
def test_a_lie_is_found_out_and_the_log_fetched_after_all(lie: str, seed: int) -> None:
    simulator = Simulator(
        6,
        fake_run(turns=16),
        seed=seed,
        network=Network(loss=0.05),
        faults=[Fault.start(peer=5, at=9, donor=1, lie=lie)],
        absent=[5],
    )
    assert simulator.run(240, done)
    joiner = simulator.peers[5]
    assert joiner.snapshot is None
    assert len(dropped(simulator)) == 1
    check_equal(simulator)
    assert simulator.expected_fingerprint(joiner) == joiner.core.fingerprint
    assert not any(p.core.diverged for p in simulator.peers)


def test_a_lie_found_out_after_a_restart_is_dropped_too() -> None:
    simulator = Simulator(
        5,
        fake_run(turns=24),
        seed=7,
        faults=[
            Fault.start(peer=4, at=9, donor=1, lie="model"),
            Fault.crash(peer=4, at=9.4),
            Fault.restart(peer=4, at=12),
        ],
        absent=[4],
    )
    assert simulator.run(240, done)
    assert simulator.peers[4].snapshot is None
    check_equal(simulator)


def test_a_joiner_goes_on_from_its_own_disk_and_gives_snapshots_itself() -> None:
    """In the end nobody is left who has the log from its beginning."""
    simulator = Simulator(
        5,
        fake_run(turns=40),
        seed=3,
        faults=[
            Fault.start(peer=3, at=9, donor=1),
            Fault.crash(peer=3, at=16),
            Fault.restart(peer=3, at=18),
            *(Fault.crash(peer=p, at=26) for p in (0, 1, 2)),
            Fault.start(peer=4, at=30, donor=3),
        ],
        absent=[3, 4],
    )
    assert simulator.run(300, done)
    last, before = simulator.peers[4], simulator.peers[3]
    assert last.snapshot is not None
    assert before.snapshot is not None
    assert last.core.fingerprint == before.core.fingerprint
    assert set(before.pulls.values()) == {1}, "what was on the disk was not fetched again"
    assert sum(count for _, count in last.snapshot.counts()) > sum(
        count for _, count in before.snapshot.counts()
    )


def test_a_joiner_without_one_learns_from_those_that_have_the_log() -> None:
    """One neighbour can't send what it holds as a sum alone: nobody blames it, others are asked."""
    simulator = Simulator(
        5,
        fake_run(turns=24),
        seed=5,
        network=Network(loss=0.05),
        faults=[
            Fault.start(peer=3, at=9, donor=1),
            Fault.start(peer=4, at=16),
        ],
        absent=[3, 4],
    )
    assert simulator.run(240, done)
    check_equal(simulator)
    assert lowest(simulator.peers[4], simulator.peers[0]) == 1
    assert not any(p.core.counters.get("not found") for p in simulator.peers)


def test_a_proof_against_what_a_snapshot_holds_makes_it_fetch_the_log() -> None:
    simulator = Simulator(
        5,
        fake_run(turns=40),
        seed=4,
        faults=[Fault.start(peer=4, at=12, donor=0)],
        absent=[4],
    )
    simulator.run(26)
    joiner, cheat = simulator.peers[4], simulator.peers[2]
    first = next(
        record
        for key, record in simulator.peers[0].records.items()
        if (key.author.peer, key.number) == (cheat.id, 2)
    )
    assert isinstance(first.statement, Update)
    assert joiner.core.frontier.summed(first.statement.author) > 2
    second = fake_seal(replace(first.statement, turn=1))
    smaller, larger = sorted((first, second), key=lambda r: r.id)
    proof = fake_seal(Proof(first.statement.author, 2, smaller.raw, larger.raw))
    told = ev.Received(simulator.peers[1].id, Push((proof,)))
    simulator._push(simulator.now, 0, told, simulator.peers[0].life)
    assert not dropped(simulator)
    others = [p for p in simulator.peers if p is not cheat]
    simulator.run(300, lambda s: len({p.core.fingerprint for p in others}) == 1 and s.now > 90)
    assert dropped(simulator) == ["an update in it does not count"]
    assert {p.core.fingerprint for p in others} == {simulator.expected_fingerprint(joiner)}
    assert joiner.core.frontier.count(first.statement.author) == 1
    assert all(p.core.turns.finished() for p in others)


def test_dropping_comes_before_the_rebuild() -> None:
    simulator = Simulator(
        3,
        fake_run(turns=16),
        seed=1,
        faults=[Fault.start(peer=2, at=9, donor=1)],
        absent=[2],
    )
    simulator.run(9.005)
    core = simulator.peers[2].core
    snapshot = core.footing.snapshot
    assert snapshot is not None
    effects = core.handle(ev.WorkerReady(snapshot.counts(), (1, 2)), simulator.now)
    kinds = [type(e) for e in effects if isinstance(e, ev.DropSnapshot | ev.Rebuild)]
    assert kinds == [ev.DropSnapshot, ev.Rebuild]
