"""Runs with a turn rule through the worker and the simulator: one model, however it came."""

import json
import random
import tomllib
from pathlib import Path
from typing import Any

import pytest

from shoal.gossip.records import Update
from shoal.node import pipe, rehearsal
from shoal.node.config import RunFile, canonical
from shoal.node.duties import Duties
from shoal.node.errors import ConfigError
from shoal.node.pipe import Item
from shoal.node.simulation.faults import Fault, Network
from shoal.node.simulation.peers import SimPeer
from shoal.training import payloads, turn_rule, turns
from shoal.training.run import RunSpec
from shoal.training.trainer import Trainer

TURNS, LATE = 6, 3
PEERS = [bytes([i]) * 32 for i in (1, 2, 3, 4)]
SCALARS = {"kind": "scalar", "directions": "common", "perturbations": 4, "lr": 0.02}
RUNS: dict[str, dict[str, Any]] = {
    "median": {"rule": "median", "update": SCALARS},
    "trimmed": {"rule": {"name": "trimmed_mean", "cut": 0.3}, "update": SCALARS},
    "clip": {"rule": "clip", "update": SCALARS},
    "clip-scalars": {"rule": "clip_norm", "update": {**SCALARS, "directions": "own"}},
    "clip-dense": {"rule": "clip_norm", "update": {"kind": "dense", "levels": 3}},
    "clip-sparse": {"rule": "clip_norm", "update": {"kind": "sparse", "density": 0.1}},
}


def tables(exchange: dict[str, Any], **run: Any) -> dict[str, Any]:
    return {
        "run": {"name": "tiny", "seed": 3, "turns": 50, **run},
        "task": {"name": "digits", "width": 8},
        "local": {"steps": 2, "batch": 8, "optimizer": {"name": "sgd", "lr": 0.1}},
        "exchange": exchange,
        "swarm": {"min_peers": len(PEERS)},
    }


def ask(worker: Duties, request: pipe.Request, *bodies: bytes) -> Any:
    return worker.answer(request, memoryview(b"".join(bodies)))[0]


class Swarm:
    """Workers of one run, whose updates are handed on by hand."""

    def __init__(self, folder: Path, exchange: dict[str, Any]) -> None:
        self.folder = folder
        setup = pipe.Setup(tables(exchange), PEERS[0], device="cpu", threads=1)
        self.founded = ask(Duties(), pipe.Found(setup))
        assert isinstance(self.founded, pipe.Founded)
        self.updates: list[tuple[Item, bytes]] = []
        self.workers = [self.open(peer)[0] for peer in PEERS]

    def open(self, peer: bytes, **more: Any) -> tuple[Duties, pipe.Opened]:
        founded, worker = self.founded, Duties()
        (self.folder / "spill").mkdir(exist_ok=True)
        setup = pipe.Setup(
            founded.run,
            peer,
            bytes(range(32)),
            device="cpu",
            threads=1,
            directory=str(self.folder / "spill"),
        )
        opened = ask(
            worker,
            pipe.Open(
                setup,
                founded.parameters,
                founded.layout,
                founded.initial_root,
                str(self.folder / "initial.bin"),
                str(self.folder / peer[:1].hex() / "state"),
                **more,
            ),
        )
        assert isinstance(opened, pipe.Opened)
        return worker, opened

    def turn(self, turn: int) -> list[tuple[Item, bytes]]:
        """Let every worker take a turn; return the updates, not yet applied."""
        made = []
        for peer, worker in zip(PEERS, self.workers, strict=True):
            turned, body = worker.answer(pipe.Turn(turn, 4.0), memoryview(b""))
            data = bytes(body[0])
            ask(worker, pipe.Commit(7, turn))
            made.append((Item(peer, 7, turn, turn, turned.kind, len(data), length=len(data)), data))
        self.updates += made
        return made

    def train(self) -> None:
        """Take turns; the last peer's of one turn arrive much later, all in other orders."""
        rng, late = random.Random(1), []
        for turn in range(1, TURNS + 1):
            made = self.turn(turn)
            if turn == LATE:
                late = [made.pop()]
            for worker in self.workers:
                rng.shuffle(made)
                cut = rng.randrange(len(made) + 1)
                give(worker, made[:cut])
                give(worker, made[cut:])
        for worker in self.workers:
            give(worker, late)

    def state(self, worker: Duties) -> tuple[Any, Any]:
        done = ask(worker, pipe.Recompute())
        return done.fingerprint, done.frontier


def give(worker: Duties, updates: list[tuple[Item, bytes]]) -> Any:
    """Apply updates; the fingerprint moves by what the answers say."""
    before = ask(worker, pipe.Apply([])).fingerprint
    done = ask(worker, pipe.Apply([item for item, _ in updates]), *(data for _, data in updates))
    assert not any(result.refused for result in done.results)
    deltas = [result.delta for result in done.results]
    moved = [sum(lane) % 2**64 for lane in zip(before, *deltas, strict=True)]
    assert tuple(moved) == tuple(done.fingerprint)
    return done


@pytest.fixture(params=RUNS)
def swarm(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Swarm:
    """Everything counts as too large to be kept, and most as too large for memory."""
    monkeypatch.setattr(turns, "SMALL", 0)
    monkeypatch.setattr(payloads, "IN_MEMORY", 500)
    return Swarm(tmp_path, RUNS[request.param])


def test_orders_batches_and_late_updates_leave_no_trace(swarm: Swarm) -> None:
    swarm.train()
    states = [swarm.state(worker) for worker in swarm.workers]
    assert all(state == states[0] for state in states)
    fresh, start = swarm.open(PEERS[0])
    for update in reversed(swarm.updates):
        give(fresh, [update])
    assert swarm.state(fresh) == states[0]
    # A closing: what one log said from a number on is taken out, last first.
    gone = [u for u in swarm.updates if u[0].peer == PEERS[2] and u[0].number >= 4][::-1]
    left = [u for u in swarm.updates if u not in gone]
    done = ask(fresh, pipe.Subtract([item for item, _ in gone]), *(data for _, data in gone))
    again, _ = swarm.open(PEERS[0])
    give(again, left)
    assert tuple(done.fingerprint) == tuple(swarm.state(again)[0])
    give(fresh, gone[::-1])
    assert swarm.state(fresh) == states[0]
    # A rebuild.
    reset = ask(fresh, pipe.Reset())
    assert (tuple(reset.fingerprint), reset.frontier) == (tuple(start.fingerprint), [])
    give(fresh, swarm.updates)
    assert swarm.state(fresh) == states[0]


def test_a_restart_applies_all_again_and_goes_on_as_if_nothing_had_been(swarm: Swarm) -> None:
    """A checkpoint holds sums, and a late update needs the others of its turn one by one."""
    late = swarm.turn(1).pop()
    first = [u for u in swarm.updates if u is not late]
    for worker in swarm.workers:
        give(worker, first)
    second = swarm.turn(2)
    for worker in swarm.workers:
        give(worker, second)
    ask(swarm.workers[0], pipe.Stop())
    held = [(peer, 7, 2) for peer in PEERS]
    again, ready = swarm.open(PEERS[0], held=held, own=(7, 2))
    _, fresh = swarm.open(PEERS[1])
    assert (ready.frontier, ready.kept, ready.note) == ([], True, "")
    assert ready.fingerprint == fresh.fingerprint
    give(again, first + second)
    for worker in (again, swarm.workers[1]):
        give(worker, [late])
    assert swarm.state(again) == swarm.state(swarm.workers[1])
    give(swarm.workers[0], [late])
    bodies = [w.answer(pipe.Turn(3, 4.0), memoryview(b""))[1][0] for w in (again, swarm.workers[0])]
    assert bytes(bodies[0]) == bytes(bodies[1])


def test_the_run_file_of_a_founded_run_names_the_rule_in_full(swarm: Swarm) -> None:
    rule = swarm.founded.run["exchange"]["rule"]
    assert isinstance(rule, dict)
    assert json.loads(json.dumps(rule)) == rule


# ---------------------------------------------------------------- a whole swarm


@pytest.mark.sim
@pytest.mark.parametrize("name", ["median", "clip-scalars", "clip-sparse"])
def test_what_a_partition_kept_back_reaches_old_turns_bit_for_bit(name: str) -> None:
    """Two peers train on alone; when they are back, every model is that of the set of updates."""
    run = tables(RUNS[name], turns=12)
    simulator = rehearsal.rehearse(run, 4, seed=2, network=Network(duplicate=0.1))
    for fault in (
        *Fault.partition({2, 3}, at=0.4, to=6.0),
        *Fault.kill_worker(peer=1, at=7.0, to=8.0),
    ):
        simulator._push(fault.at, fault.peer, fault)
    assert simulator.run(300.0, rehearsal.done)
    simulator.run(simulator.now + 30)
    peers = simulator.living()
    late = [turns_of(peer, other) for peer in peers for other in peers if other is not peer]
    assert any(arrived[0] > 2 for arrived in late), "some turns came after later ones"
    logs = [
        [peer.arrived(key) for key in sorted(peer.records)]  # by author, not by turn
        for peer in peers
    ]
    fresh = simulator._make_worker(simulator, 0)
    fresh.apply(logs[0], sign=+1)
    prints = {peer.worker.fingerprint() for peer in peers}
    assert prints == {fresh.fingerprint()}
    models = [worker_of(peer.worker).exchange.snapshot() for peer in peers]
    assert set(models) == {worker_of(fresh).exchange.snapshot()}
    assert {peer.core.agrees() for peer in peers} == {True}
    assert not any(peer.core.counters.get("disagreement") for peer in peers)


def worker_of(worker: object) -> Trainer:
    assert isinstance(worker, rehearsal.TrainingWorker)
    return worker.trainer


def turns_of(peer: SimPeer, other: SimPeer) -> tuple[int, ...]:
    """Return, over the updates of `other`, by how many turns each came late to `peer`."""
    newest, behind = 0, [0]
    for record in peer.records.values():
        update = record.statement
        assert isinstance(update, Update)
        if update.author.peer == other.id:
            behind.append(newest - update.turn)
        newest = max(newest, update.turn)
    return tuple(sorted(behind, reverse=True))


# ---------------------------------------------------------------- the run file


@pytest.mark.parametrize(
    "rule", ["median", {"name": "trimmed_mean", "cut": 0.3}, {"name": "clip", "quorum": 2}]
)
def test_a_run_file_carries_a_name_or_a_table(rule: Any) -> None:
    given = tables({"rule": rule, "update": SCALARS})
    read = RunFile.parse(given, where="here")
    assert read.exchange.combines()
    again = RunFile.parse(tomllib.loads(read.to_toml()), where="there")
    assert again == read
    filled = RunSpec.parse(again.tables()).filled()
    stored = RunFile.from_canonical(canonical(filled), where="genesis")
    assert stored.exchange.rule == turn_rule.filled(rule, peers=len(PEERS))
    assert not RunFile.parse(tables({"rule": "sum"}), where="here").exchange.combines()


def test_a_rule_that_is_neither_is_one_line() -> None:
    with pytest.raises(ConfigError, match=r"exchange\.rule = 3: expected"):
        RunFile.parse(tables({"rule": 3}), where="here")
