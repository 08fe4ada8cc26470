"""Whole swarms under a turn rule: what an update adds depends on those before it, the model not."""

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b

import pytest

from shoal.gossip.names import Author, Key
from shoal.gossip.records import Update
from shoal.node.simulation.faults import Fault, Network
from shoal.node.simulation.peers import SimPeer
from shoal.node.simulation.simulator import Simulator
from shoal.node.simulation.workers import LANE, Arrived, Delta, FakeWorker, SimWorker, fake_run

pytestmark = pytest.mark.sim

PEERS, TURNS = 5, 10
Turns = dict[int, dict[Key, bytes]]


def of_turn(members: dict[Key, bytes]) -> Delta:
    """A function of the set of a turn's updates, no sum: of each peer the smallest key votes."""
    if not members:
        return 0, 0
    votes = {key.author.peer: members[key] for key in sorted(members, reverse=True)}
    value = blake2b(b"".join(v for _, v in sorted(votes.items())), digest_size=16).digest()
    return int.from_bytes(value[:8], "little"), int.from_bytes(value[8:], "little")


def plus(a: Delta, b: Delta, sign: int = 1) -> Delta:
    return (a[0] + sign * b[0]) & LANE, (a[1] + sign * b[1]) & LANE


@dataclass(slots=True)
class Combining(FakeWorker):
    """Tells of each update by how much the model moved when it came."""

    members: Turns = field(default_factory=dict)
    off: int = 0
    """A fault in memory: the fingerprint is wrong by this."""

    def apply(
        self, updates: Sequence[Arrived], *, sign: int
    ) -> tuple[list[tuple[Key, Delta]], list[tuple[Key, str]]]:
        deltas = []
        for record, payload in updates:
            update = record.statement
            assert isinstance(update, Update)
            key = Key(update.author, update.number)
            members = self.members.setdefault(update.turn, {})
            before = of_turn(members)
            if sign < 0:
                members.pop(key, None)
            elif payload is not None:
                members[key] = payload
            change = plus(of_turn(members), before, -1)
            self.value = plus(self.value, change)
            deltas.append((key, change))
        return deltas, []

    def fingerprint(self) -> Delta:
        return plus(self.value, (self.off, 0))


def combining(simulator: Simulator, index: int) -> SimWorker:
    seed = f"{simulator.seed}/{index}/{simulator.now}"
    return Combining(simulator.run_, random.Random(seed), seconds=(0.3, 2.0), sizes=(100, 3000))


def expected(simulator: Simulator, peer: SimPeer) -> Delta:
    """What the updates below a peer's frontier mean, by themselves."""
    turns: Turns = {}
    for author, count in peer.core.frontier.counts():
        for n in range(1, count + 1):
            record, payload = peer.arrived(Key(author, n))
            assert isinstance(record.statement, Update)
            assert payload is not None
            turns.setdefault(record.statement.turn, {})[Key(author, n)] = payload
    total = (0, 0)
    for members in turns.values():
        total = plus(total, of_turn(members))
    return total


def finished(simulator: Simulator) -> bool:
    return all(p.core.turns.finished() for p in simulator.living()) and simulator.converged()


def play(
    seed: int,
    faults: Iterable[Fault | tuple[Fault, ...]] = (),
    *,
    network: Network | None = None,
    pace: str = "free",
    ends: bool = True,
) -> Simulator:
    run = fake_run(turns=TURNS, combined=True, pace=pace, min_peers=PEERS)
    simulator = Simulator(
        PEERS, run, seed=seed, workers=combining, faults=faults, network=network or Network()
    )
    assert simulator.run(100, finished) == ends
    simulator.run(simulator.now + 30)
    return simulator


def check(simulator: Simulator, peers: Sequence[SimPeer]) -> None:
    """All hold what the set of updates means, and have found out that they agree."""
    assert {p.core.fingerprint for p in peers} == {expected(simulator, peers[0])}
    assert {p.core.agrees() for p in peers} == {True}
    what = {seen.what for seen in simulator.happened}
    assert not what & {"fingerprint-drift", "diverged"}
    assert not any(p.core.counters.get("disagreement") for p in peers)
    assert not any(p.core.agreement._unchecked for p in peers)


@pytest.mark.parametrize("pace", ["free", "lockstep"])
def test_a_bad_network_changes_nothing(pace: str) -> None:
    network = Network(loss=0.1, duplicate=0.1, latency=(0.01, 0.6))
    simulator = play(1, network=network, pace=pace)
    check(simulator, simulator.peers)
    late = [
        (peer.index, key)
        for peer in simulator.peers
        for key in peer.records
        if key.author.peer != peer.id
    ]
    assert len(late) == PEERS * (PEERS - 1) * TURNS


def test_turns_of_a_partition_reach_back_when_it_heals() -> None:
    simulator = play(2, [Fault.partition({0, 1}, at=2.0, to=20.0)])
    check(simulator, simulator.peers)


def test_a_crash_a_new_worker_and_a_lost_disk_change_nothing() -> None:
    simulator = play(
        3,
        [
            Fault.crash(peer=1, at=4.0),
            Fault.restart(peer=1, at=7.0),
            Fault.kill_worker(peer=2, at=5.0, to=8.0),
            Fault.crash(peer=3, at=6.0),
            Fault.restart(peer=3, at=8.0, keep=0),
        ],
    )
    check(simulator, simulator.peers)


def test_what_a_proof_closes_leaves_its_turns() -> None:
    simulator = play(4, [Fault.equivocate(peer=4, at=6.3)], ends=False)
    others, cheat = simulator.peers[:4], simulator.peers[4]
    check(simulator, others)
    closed = {p.core.frontier.closed(Author(cheat.id, cheat.log)) for p in others}
    assert closed != {0}
    assert len(closed) == 1


def test_a_model_that_went_wrong_is_seen_and_rebuilt() -> None:
    simulator = Simulator(
        PEERS,
        fake_run(turns=TURNS, combined=True, min_peers=PEERS),
        seed=5,
        workers=combining,
    )
    simulator.run(4.0)
    broken = simulator.peers[2].worker
    assert isinstance(broken, Combining)
    broken.off = 12345
    assert simulator.run(200, finished)
    simulator.run(simulator.now + 30)
    assert "fingerprint-drift" in {seen.what for seen in simulator.happened}
    assert simulator.peers[2].worker is not broken
    peers = simulator.peers
    assert {p.core.fingerprint for p in peers} == {expected(simulator, peers[0])}
    assert {p.core.agrees() for p in peers} == {True}


class Lying(Combining):
    """Tells a wrong fingerprint from the start, so that it never moves by anything else."""

    __slots__ = ()

    def fingerprint(self) -> Delta:
        return plus(self.value, (1, 1))


def test_who_holds_another_model_is_found_out_at_the_end() -> None:
    def workers(simulator: Simulator, index: int) -> SimWorker:
        made = combining(simulator, index)
        assert isinstance(made, Combining)
        return Lying(made.run, made.rng, made.seconds, made.sizes) if index == 1 else made

    run = fake_run(turns=TURNS, combined=True, min_peers=PEERS)
    simulator = Simulator(PEERS, run, seed=6, workers=workers)
    assert simulator.run(200, finished)
    simulator.run(simulator.now + 60)
    honest = [p for p in simulator.peers if p.index != 1]
    assert {p.core.agreement.verdicts[simulator.peers[1].id] for p in honest} == {False}
    assert {p.core.agrees() for p in simulator.peers} == {False}
