"""What the core costs by the thousand: `shoal bench simulator`.

Two swarms of simulated peers on one core of this machine. 256 ledger peers with fake workers make
10 updates each while 5 % of all messages are lost and the halves are cut apart for ten seconds.
5000 peers that know each other take in one record and notice that 50 of them were killed. The
yardsticks are the design's bounds (design 12).
"""

import argparse
import random
import resource
import time
from dataclasses import replace

from shoal.gossip.limits import sim
from shoal.node.bench._report import Row, add_json, beside, show
from shoal.node.simulation.faults import Fault, Network
from shoal.node.simulation.simulator import Simulator
from shoal.node.simulation.workers import FakeWorker, SimWorker, fake_run

LEDGER_SECONDS, LEDGER_GIB = 120.0, 4.0
CROWD_SECONDS, CROWD_GIB = 300.0, 6.0
MOST_SIMULATED = 300.0


def register(parser: argparse.ArgumentParser) -> None:
    """Add the flags."""
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Measure and print; 1 if a swarm did not get there or took more than its yardstick."""
    ledger_ok, ledger_rows = ledger()
    crowd_ok, crowd_rows = crowd()
    rows = [*ledger_rows, *crowd_rows]
    show("simulator", rows, as_json=args.json)
    slow = any(row.ratio is not None and row.ratio > 1 for row in rows)
    return int(slow or not (ledger_ok and crowd_ok))


def ledger(peers: int = 256, updates: int = 10) -> tuple[bool, list[Row]]:
    """Let ledger peers converge through loss and a partition."""
    start = time.perf_counter()
    # All are there before the first turn: who joins later starts at a later one.
    gathered = [Fault.pause(peer=i, at=0) for i in range(peers)]
    together = [Fault.resume(peer=i, at=8) for i in range(peers)]
    simulator = Simulator(
        peers,
        fake_run(turns=updates, min_peers=4),
        seed=1,
        network=Network(loss=0.05, duplicate=0.02),
        faults=[*gathered, *together, *Fault.partition(range(peers // 2), at=12, to=22)],
        workers=small_payloads,
    )
    simulator.run(23)
    done = simulator.run(MOST_SIMULATED, _finished)
    done = done and simulator.peers[0].core.frontier.total() == peers * updates
    what = f"{peers} ledger peers"
    rows = [
        beside(f"{what}, seconds", time.perf_counter() - start, "s", LEDGER_SECONDS),
        beside(f"{what}, memory so far", _peak(), "GiB", LEDGER_GIB),
        Row(f"{what}, simulated seconds", simulator.now, "s"),
        Row(f"{what}, events", simulator.steps, "events"),
        Row(f"{what}, one frontier and one model", float(done and _equal(simulator)), "yes"),
    ]
    return done and _equal(simulator), rows


def crowd(peers: int = 5000, kills: int = 50) -> tuple[bool, list[Row]]:
    """Let one record reach everybody, and everybody notice the killed."""
    start = time.perf_counter()
    killed = random.Random(1).sample(range(1, peers), kills)
    simulator = Simulator(
        peers,
        fake_run(turns=1),
        seed=1,
        limits=replace(sim(), ledger_members=2 * peers),
        workers=small_payloads,
        full_views=True,
        observers=range(1, peers),
        faults=[Fault.crash(peer=i, at=10.0) for i in killed],
    )
    simulator.run(MOST_SIMULATED, lambda s: s.now > 1 and _all_hold(s))
    reached = simulator.now
    simulator.run(max(10.5, simulator.now))
    done = simulator.run(MOST_SIMULATED, lambda s: _all_noticed(s, kills))
    what = f"{peers} peers"
    rows = [
        beside(f"{what}, seconds", time.perf_counter() - start, "s", CROWD_SECONDS),
        beside(f"{what}, memory", _peak(), "GiB", CROWD_GIB),
        Row(f"{what}, one record at all after simulated", reached, "s"),
        Row(f"{what}, {kills} kills noticed after simulated", simulator.now - 10.0, "s"),
        Row(f"{what}, events", simulator.steps, "events"),
        Row(f"{what}, falsely failed", float(_falsely(simulator, set(killed))), "peers"),
    ]
    return done, rows


def small_payloads(simulator: Simulator, index: int) -> SimWorker:
    """Return a worker whose payloads travel inside their records."""
    rng = random.Random(f"{simulator.seed}/{index}/{simulator.now}")
    return FakeWorker(simulator.run_, rng, sizes=(50, 200))


def _finished(simulator: Simulator) -> bool:
    return all(p.core.turns.finished() for p in simulator.living()) and simulator.converged()


def _equal(simulator: Simulator) -> bool:
    expected = simulator.expected_fingerprint(simulator.peers[0])
    return all(p.core.fingerprint == expected for p in simulator.peers)


def _all_hold(simulator: Simulator) -> bool:
    return all(p.core.frontier.version for p in simulator.living())


def _all_noticed(simulator: Simulator, kills: int) -> bool:
    size = len(simulator.peers) - kills
    return all(len(p.core.view.ring) <= size for p in simulator.living())


def _falsely(simulator: Simulator, killed: set[int]) -> int:
    gone = {simulator.peers[i].id for i in killed}
    return len({p for peer in simulator.living() for p in peer.core.membership.failed} - gone)


def _peak() -> float:
    """Return the most memory this process has held, in GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20)
