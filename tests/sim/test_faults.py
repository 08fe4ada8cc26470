"""What goes wrong in a ledger run: crashes, disks, cheats. The others always end up equal."""

from dataclasses import replace

import pytest

from shoal.gossip import events as ev
from shoal.gossip.limits import sim
from shoal.gossip.messages import Push
from shoal.gossip.names import Author, Hash, Key, digest
from shoal.gossip.records import Update
from shoal.node.simulation.faults import Fault, Network
from shoal.node.simulation.peers import SimPeer, fake_peer, fake_seal
from shoal.node.simulation.simulator import Simulator
from shoal.node.simulation.workers import fake_run

pytestmark = pytest.mark.sim


def done(simulator: Simulator) -> bool:
    return all(p.core.turns.finished() for p in simulator.living()) and simulator.converged()


def check_equal(peers: list[SimPeer], simulator: Simulator) -> None:
    expected = simulator.expected_fingerprint(peers[0])
    assert len({p.core.frontier.hash for p in peers}) == 1
    assert {p.core.fingerprint for p in peers} == {expected}


def test_a_restarted_peer_goes_on_with_its_own_log_and_asks_for_the_tail_only() -> None:
    simulator = Simulator(
        4,
        fake_run(turns=12),
        seed=1,
        faults=[Fault.crash(peer=2, at=5), Fault.restart(peer=2, at=9)],
    )
    simulator.run(8.9)
    peer = simulator.peers[2]
    had, log = len(peer.records), peer.log
    assert simulator.run(60, done)
    check_equal(simulator.peers, simulator)
    assert {k.author.log for k in peer.records if k.author.peer == peer.id} == {log}
    assert had > 5
    assert set(peer.pulls.values()) == {1}, "what was on the disk was not fetched again"


def test_a_rolled_back_disk_never_uses_a_number_twice() -> None:
    simulator = Simulator(
        4,
        fake_run(turns=12),
        seed=2,
        faults=[Fault.crash(peer=2, at=6), Fault.restart(peer=2, at=7, keep=3)],
    )
    assert simulator.run(60, done)
    check_equal(simulator.peers, simulator)
    assert [s for s in simulator.happened if s.what == "equivocation"] == []
    peer = simulator.peers[2]
    logs = {k.author.log for k in peer.records if k.author.peer == peer.id}
    assert len(logs) == 2, "its lost updates were adopted, and a fresh log begun"


def test_a_lost_disk_starts_a_fresh_log() -> None:
    simulator = Simulator(
        4,
        fake_run(turns=12),
        seed=3,
        faults=[Fault.crash(peer=2, at=6), Fault.restart(peer=2, at=7, keep=0)],
    )
    assert simulator.run(60, done)
    check_equal(simulator.peers, simulator)
    assert [s for s in simulator.happened if s.what == "equivocation"] == []


def test_equivocation_is_proved_and_subtracted_everywhere() -> None:
    simulator = Simulator(6, fake_run(turns=10), seed=4, faults=[Fault.equivocate(peer=5, at=5.3)])
    simulator.run(40)
    others, cheat = simulator.peers[:5], simulator.peers[5]
    author = Author(cheat.id, cheat.log)
    check_equal(others, simulator)
    closed = {p.core.frontier.closed(author) for p in others}
    assert len(closed) == 1
    assert closed != {0}
    for peer in others:
        assert peer.core.frontier.count(author) == min(closed) - 1
        assert peer.applied.get(author, 0) == min(closed) - 1
        assert peer.core.agrees()
        assert cheat.id in peer.core.equivocation.accused
        assert cheat.id not in peer.core.linked()
        assert len(peer.proofs) >= 1
    assert cheat.core.state.startswith("degraded: two updates under one number")


def test_an_accused_key_with_a_fresh_log_knows_that_nobody_hears_it() -> None:
    simulator = Simulator(
        4,
        fake_run(turns=0),
        seed=4,
        faults=[
            Fault.equivocate(peer=3, at=5.3),
            Fault.crash(peer=3, at=12),
            Fault.restart(peer=3, at=13, keep=0),
        ],
    )
    simulator.run(12)
    first = simulator.peers[3].log
    simulator.peers[3].proofs.clear()
    simulator.run(40)
    again = simulator.peers[3]
    assert again.core.log != first
    assert again.core.state.startswith("degraded: two updates under one number")


def test_forks_below_are_found_by_bisection() -> None:
    """Two peers hold different branches from number 3 on; nobody ever pushed both."""
    simulator = Simulator(4, fake_run(turns=1), seed=5, observers=range(4))
    simulator.run(5)
    ghost = Author(fake_peer(99, 5), 7)
    for peer in simulator.peers:
        peer.core.admissions.peers[ghost.peer] = b"admitted"

    def branch(name: int) -> tuple[Push, ...]:
        pushes = []
        for n in range(1, 41):
            payload = b"%d of %d" % (n, name if n >= 3 else 0)
            simulator.payloads[digest(payload)] = payload
            update = Update(ghost, n, n, "fake", digest(payload), len(payload), payload)
            pushes.append(Push((fake_seal(update),)))
        return tuple(pushes)

    simulator._cuts.append(frozenset({0, 1}))
    for index, name in ((0, 1), (2, 2)):
        peer = simulator.peers[index]
        for push in branch(name):
            simulator._later(0.1, peer, ev.Received(simulator.peers[3 - index].id, push))
    simulator.run(8)
    assert simulator.peers[1].core.frontier.count(ghost) == 40
    assert simulator.peers[3].core.frontier.count(ghost) == 40
    simulator._cuts.clear()
    simulator.run(40)
    for peer in simulator.peers:
        assert peer.core.frontier.closed(ghost) == 3
        assert peer.core.frontier.count(ghost) == 2
    check_equal(simulator.peers, simulator)


def test_a_full_log_stops_publishing_and_goes_on_serving() -> None:
    simulator = Simulator(4, fake_run(turns=8), seed=6, faults=[Fault.fill_disk(peer=3, at=4)])
    simulator.run(40)
    full = simulator.peers[3]
    assert full.core.state == "degraded: log full"
    check_equal(simulator.peers[:3], simulator)
    author = Author(full.id, full.log)
    assert simulator.peers[0].core.frontier.count(author) < 8
    assert len(full.core.arrivals.waiting) == 0, "it pulls nothing that it cannot keep"


def test_a_disk_error_starts_a_fresh_log_in_memory() -> None:
    simulator = Simulator(
        4, fake_run(turns=8), seed=7, faults=[Fault.fill_disk(peer=3, at=4.2, reason="disk: EIO")]
    )
    assert simulator.run(60, done)
    check_equal(simulator.peers, simulator)
    peer = simulator.peers[3]
    if peer.core.turns.unwritable:
        assert peer.core.state == "degraded: disk"
        assert peer.core.log != peer.log


def test_a_worker_that_dies_takes_nothing_with_it() -> None:
    simulator = Simulator(
        4, fake_run(turns=8), seed=8, faults=[Fault.kill_worker(peer=1, at=3, to=6)]
    )
    simulator.run(5)
    assert simulator.peers[1].core.state == "degraded: worker: killed"
    assert simulator.run(60, done)
    check_equal(simulator.peers, simulator)
    assert simulator.peers[0].core.frontier.total() == 32


def test_a_wrong_model_is_rebuilt_once() -> None:
    simulator = Simulator(4, fake_run(turns=0), seed=9, limits=replace(sim(), progress_interval=2))
    simulator.run(10)
    worker = simulator.peers[2].worker
    worker.value = (worker.value[0] ^ 1, worker.value[1])  # type: ignore[attr-defined]
    simulator.run(30)
    drift = [s for s in simulator.happened if s.what == "fingerprint-drift"]
    assert [s.peer for s in drift] == [2]
    assert not any(p.core.diverged for p in simulator.peers)
    assert all(p.core.agrees() for p in simulator.peers)


def test_a_swarm_that_cannot_agree_says_so() -> None:
    """One peer's worker computes something else, consistently: rebuilding does not help."""

    def workers(simulator: Simulator, index: int):  # type: ignore[no-untyped-def]
        from shoal.node.simulation.simulator import fake_workers

        worker = fake_workers(simulator, index)
        if index == 2:
            worker.run = replace(worker.run, turns=3)  # type: ignore[attr-defined]
        return worker

    simulator = Simulator(
        4, fake_run(turns=0), seed=10, limits=replace(sim(), progress_interval=2), workers=workers
    )
    simulator.run(60)
    assert all(p.core.state.startswith("diverged") for p in simulator.peers)


def offer(simulator: Simulator, to: int, update: Update) -> None:
    push = Push((fake_seal(update),))
    simulator._later(0.1, simulator.peers[to], ev.Received(simulator.peers[to + 1].id, push))


@pytest.mark.parametrize(("kind", "size"), [("fake", 100_001), ("unheard", 10)])
def test_an_update_against_the_rules_counts_zero_and_is_never_fetched(kind: str, size: int) -> None:
    simulator = Simulator(4, fake_run(turns=3), seed=11)
    assert simulator.run(30, done)
    ghost = Author(fake_peer(99, 5), 7)
    for peer in simulator.peers:
        peer.core.admissions.peers[ghost.peer] = b"admitted"
    before = {p.core.fingerprint for p in simulator.peers}
    offer(simulator, 0, Update(ghost, 1, 1, kind, Hash(digest(b"huge")), size))
    simulator.run(simulator.now + 10)
    for peer in simulator.peers:
        assert peer.core.frontier.count(ghost) == 1
        assert peer.applied[ghost] == 1
        assert digest(b"huge") not in peer.pulls
    assert {p.core.fingerprint for p in simulator.peers} == before


def test_records_of_strangers_wait_for_their_admission() -> None:
    simulator = Simulator(4, fake_run(turns=1), seed=12, observers=range(4))
    simulator.run(5)
    ghost = Author(fake_peer(99, 5), 7)
    simulator._index[ghost.peer] = 3
    update = Update(ghost, 1, 1, "fake", digest(b"x"), 1, b"x")
    offer(simulator, 0, update)
    simulator.run(8)
    core = simulator.peers[0].core
    assert core.frontier.count(ghost) == 0
    assert core.admissions.strangers.held == 1
    simulator.peers[1].core.admissions.peers[ghost.peer] = b"admitted"
    offer(simulator, 0, update)
    simulator.run(20)
    assert all(p.core.frontier.count(ghost) == 1 for p in simulator.peers)
    assert all(ghost.peer in p.admissions for p in simulator.peers)


def test_strangers_cannot_fill_the_memory() -> None:
    simulator = Simulator(
        2, fake_run(turns=1), seed=13, limits=replace(sim(), held_records=80), observers=range(2)
    )
    simulator.run(3)
    for i in range(50):
        ghost = Author(fake_peer(100 + i, 5), 7)
        offer(simulator, 0, Update(ghost, 1, 1, "fake", digest(b"x"), 1, b"x"))
    simulator.run(5)
    core = simulator.peers[0].core
    assert core.admissions.strangers.held == 10
    assert core.counters["stranger-dropped"] == 40


def test_an_author_above_its_rate_is_delayed_not_lost() -> None:
    simulator = Simulator(
        4, fake_run(turns=10), seed=14, limits=replace(sim(), updates_per_minute=6.0)
    )
    assert simulator.run(300, done)
    check_equal(simulator.peers, simulator)
    assert any(p.core.counters.get("update-delayed") for p in simulator.peers)
    assert simulator.peers[0].core.frontier.total() == 40


def test_a_banned_peer_is_not_heard() -> None:
    simulator = Simulator(3, fake_run(turns=1), seed=15, observers=range(3))
    simulator.run(5)
    bad = simulator.peers[1].id
    for _ in range(5):
        simulator._later(0.0, simulator.peers[0], ev.Misbehaved(bad, "signature"))
    simulator.run(5.5)
    core = simulator.peers[0].core
    assert bad not in core.linked()
    author = Author(simulator.peers[2].id, 1)
    offer(simulator, 0, Update(author, 1, 1, "fake", digest(b"x"), 1, b"x"))
    simulator.run(5.8)
    assert Key(author, 1) not in simulator.peers[0].records
    assert core.counters["misbehaved:signature"] == 5


def test_heavy_loss_only_delays() -> None:
    simulator = Simulator(8, fake_run(turns=5), seed=16, network=Network(loss=0.3))
    assert simulator.run(300, done)
    check_equal(simulator.peers, simulator)


def test_pause_and_resume() -> None:
    simulator = Simulator(
        3,
        fake_run(turns=0),
        seed=17,
        faults=[Fault.pause(peer=1, at=5), Fault.resume(peer=1, at=15)],
    )
    simulator.run(8)
    peer = simulator.peers[1]
    assert peer.core.state == "paused"
    turn = peer.core.turn
    held = peer.core.frontier.total()
    simulator.run(14)
    assert peer.core.turn == turn
    assert peer.core.frontier.total() > held, "it goes on taking in"
    simulator.run(20)
    assert peer.core.state == "training"
    assert peer.core.turn > turn
