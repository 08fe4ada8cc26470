"""The seam: one peer's whole life through `Trainer`, and several of them in one process."""

import itertools
import random
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch

from shoal.training import merkle
from shoal.training.exchange import Arrived
from shoal.training.method import TrainingError
from shoal.training.methods.gradient import Gradient
from shoal.training.run import RunError, RunSpec
from shoal.training.trainer import CheckpointError, Setup, Trainer
from shoal.training.turn import Turned

RUN: dict[str, Any] = {
    "run": {"name": "digits", "seed": 1, "turns": 25},
    "task": {"name": "digits", "width": 24},
    "local": {"optimizer": {"name": "sgd", "lr": 0.1, "momentum": 0.9}, "batch": 32, "steps": 10},
    "exchange": {"update": {"kind": "sparse", "density": 0.0625}},
    "swarm": {"min_peers": 4},
}


def changed(**tables: dict[str, Any]) -> dict[str, Any]:
    return {name: {**RUN.get(name, {}), **tables.get(name, {})} for name in {*RUN, *tables}}


def trainer(
    index: int = 0,
    run: dict[str, Any] = RUN,
    *,
    initial: bytes | None = None,
    allow_task: str | None = None,
    **setup: Any,
) -> Trainer:
    ticks = itertools.count()
    spec = RunSpec.parse(run, allow_task=allow_task)
    peer = bytes([index]) * 32
    setup = {"shard": (index, 4), "threads": 1, **setup}
    return Trainer(
        Setup(run=spec, peer=peer, allow_task=allow_task, **setup),
        initial=initial,
        clock=lambda: float(next(ticks)),
    )


def arrived(index: int, number: int, turn: int, turned: Turned) -> Arrived:
    assert turned.payload is not None
    key = (bytes([index]) * 32, 7, number)
    return Arrived(key, turn, turned.kind, turned.payload, len(turned.payload))


def take(one: Trainer, index: int, turn: int, members: float = 4) -> Arrived:
    """Let a peer take one turn that is published and applied to its own ledger."""
    turned = one.turn(turn, members)
    update = arrived(index, turn, turn, turned)
    one.commit(7, turn)
    one.apply([update])
    return update


@pytest.mark.parametrize(
    "update",
    [
        {"kind": "sparse", "density": 0.0625},
        {"kind": "dense", "levels": 3, "momentum": 0.6, "outer_lr": 0.7},
    ],
    ids=["sparse", "dense"],
)
def test_four_peers_end_bit_identical_and_have_learnt(update: dict[str, Any]) -> None:
    """Updates arrive late and in another order everywhere; nobody waits."""
    rng = random.Random(3)
    run = changed(exchange={"update": update})
    peers = [trainer(i, run) for i in range(4)]
    waiting: list[list[Arrived]] = [[] for _ in peers]
    for turn in range(1, 26):
        for i, one in enumerate(peers):
            rng.shuffle(waiting[i])
            due = waiting[i][: rng.randrange(len(waiting[i]) + 1)]
            waiting[i] = waiting[i][len(due) :]
            one.apply(due)
            update_ = take(one, i, turn)
            for j in range(4):
                if j != i:
                    waiting[j].append(update_)
    for one, rest in zip(peers, waiting, strict=True):
        rng.shuffle(rest)
        assert all(outcome.refused is None for outcome in one.apply(rest))
    assert len({one.fingerprint() for one in peers}) == 1
    assert len({one.exchange.snapshot() for one in peers}) == 1
    assert all(one.recompute() == one.fingerprint() for one in peers)
    assert {one.evaluate() for one in peers} == {peers[0].evaluate()}
    assert peers[0].evaluate() > 0.9


def test_founding_says_what_a_joiner_can_check() -> None:
    founder = trainer()
    founding = founder.founding()
    data = founder.initial_bytes()
    assert founding.parameters == founder.parameters == len(data) // 4 == 64 * 24 + 24 + 250
    assert merkle.root_of(data) == founding.initial_root
    values = torch.frombuffer(bytearray(data), dtype=torch.int32)
    assert founding.initial_squares == sum(v * v for v in values.tolist())
    assert RunSpec.parse(founding.run).filled() == founding.run
    turned = founder.turn(1, 4)
    assert turned.payload is not None
    assert len(turned.payload) <= founding.most_bytes["sparse"]
    assert trainer(1).founding().initial_root == founding.initial_root
    assert trainer(1, changed(run={"seed": 2})).founding().initial_root != founding.initial_root


def test_a_joiner_with_the_founders_integers_holds_the_founders_model() -> None:
    founder = trainer()
    update = take(founder, 0, 1)
    joiner = trainer(1, changed(run={"seed": 2}), initial=founder.initial_bytes())
    joiner.apply([update])
    assert joiner.fingerprint() == founder.fingerprint()
    assert joiner.founding().initial_root == founder.founding().initial_root
    with pytest.raises(RunError, match="bytes of model"):
        trainer(1, initial=founder.initial_bytes()[4:])


def test_a_turn_does_not_touch_the_ledger_until_it_is_applied() -> None:
    one = trainer()
    before = one.fingerprint()
    turned = one.turn(1, 4)
    assert one.fingerprint() == before
    outcome = one.apply([arrived(0, 1, 1, turned)])[0]
    assert one.fingerprint() != before
    one.commit(7, 1)
    back = one.subtract([arrived(0, 1, 1, turned)])[0]
    assert one.fingerprint() == before == one.recompute()
    assert all((a + b) % 2**64 == 0 for a, b in zip(outcome.delta, back.delta, strict=True))


def test_refused_updates_change_nothing_and_say_why() -> None:
    one, before = trainer(), trainer().fingerprint()
    good = arrived(0, 1, 1, one.turn(1, 4))
    assert good.payload is not None
    bad = [
        Arrived(good.key, 26, good.kind, good.payload, good.size),
        Arrived(good.key, 1, "dense", good.payload, good.size),
        Arrived(good.key, 1, good.kind, good.payload[:-1], good.size - 1),
        Arrived(good.key, 1, good.kind, good.payload, good.size + 1),
        Arrived(good.key, 1, good.kind, None, 10**9),
    ]
    for outcomes in (one.apply(bad), one.subtract(bad)):
        assert all(o.refused and o.delta == (0, 0) for o in outcomes)
    assert one.fingerprint() == before


def test_turns_are_reproducible_and_differ_between_peers() -> None:
    payloads = [trainer(i).turn(1, 4).payload for i in (0, 0, 1)]
    assert payloads[0] == payloads[1] != payloads[2]


def test_a_turn_that_is_discarded_gives_its_memory_back() -> None:
    one, other = trainer(), trainer()
    take(one, 0, 1)
    take(other, 0, 1)
    residual = one.exchange.feedback.residual
    one.turn(2, 4)
    one.discard()
    assert one.exchange.feedback.residual is residual
    assert other.exchange.owner == one.exchange.owner == (7, 1)


def test_a_heavier_swarm_takes_smaller_steps() -> None:
    def moved(members: float) -> float:
        one = trainer(run=changed(exchange={"update": {"kind": "dense", "bits": 8}}))
        before = one.exchange.model()
        take(one, 0, 1, members)
        return float((one.exchange.model() - before).norm())

    assert moved(1) == pytest.approx(4 * moved(4), rel=0.02)


def test_steps_follow_the_time_a_turn_shall_take() -> None:
    """The clock of these tests makes each turn take one second."""
    local = {"steps": 0, "turn_seconds": 6.0, "min_steps": 4, "max_steps": 40}
    one = trainer(run=changed(local=local))
    assert [one.turn(t, 4).steps for t in (1, 2, 3)] == [4, 24, 40]
    one = trainer(run=changed(local={"steps": 0, "turn_seconds": 1200.0}))
    assert [one.turn(t, 4).steps for t in (1, 2)] == [1, 1200], "nobody asked for a bound"


def test_evaluation_is_of_the_shared_model_and_as_often_as_asked() -> None:
    one = trainer(run=changed(local={"evaluate_every": 2}))
    found = [one.turn(t, 4).evaluation for t in (1, 2, 3)]
    assert found[0] == found[2] == one.evaluate()
    assert found[1] != found[1]


# ---- checkpoints


def test_a_saved_peer_goes_on_bit_for_bit(tmp_path: Path) -> None:
    run = changed(
        local={"optimizer": {"name": "muon"}},
        exchange={"update": {"kind": "dense", "momentum": 0.6}},
    )
    one = trainer(run=run)
    for turn in (1, 2, 3):
        take(one, 0, turn)
    one.save(tmp_path / "state", frontier={"a": [1, 2]})
    other = trainer(run=run)
    loaded = other.load(tmp_path / "state", own=(7, 3))
    assert loaded.kept
    assert loaded.frontier == {"a": [1, 2]}
    assert other.fingerprint() == one.fingerprint() == other.recompute()
    for turn in (4, 5):
        assert take(one, 0, turn) == take(other, 0, turn)
    assert one.fingerprint() == other.fingerprint()


def test_under_a_turn_rule_a_checkpoint_brings_back_the_memory_and_all_is_applied_again(
    tmp_path: Path,
) -> None:
    run = changed(exchange={"rule": "clip_norm"})
    one, late = trainer(run=run), trainer(1, run)
    empty = one.fingerprint()
    updates = [take(one, 0, turn) for turn in (1, 2)]
    updates.append(arrived(1, 1, 1, late.turn(1, 4)))
    one.apply(updates[2:])
    full = one.fingerprint()
    one.save(tmp_path / "state", frontier=[["aa", 7, 2]])
    other = trainer(run=run)
    for again in (one, other):  # what the one holds is forgotten
        loaded = again.load(tmp_path / "state", own=(7, 2))
        assert (loaded.kept, loaded.frontier) == (True, [])
        assert again.fingerprint() == empty == again.recompute()
        again.apply(updates)
        assert again.fingerprint() == full == again.recompute()
    assert take(one, 0, 3) == take(other, 0, 3)


def test_memory_of_another_update_starts_at_zero(tmp_path: Path) -> None:
    one = trainer()
    take(one, 0, 1)
    one.save(tmp_path / "state")
    for own in ((7, 2), (8, 1), None):
        other = trainer()
        assert not other.load(tmp_path / "state", own=own).kept
        assert other.exchange.feedback.residual is None
        assert other.fingerprint() == one.fingerprint()


def test_damaged_or_foreign_checkpoints_are_refused_and_change_nothing(tmp_path: Path) -> None:
    one = trainer()
    take(one, 0, 1)
    path = tmp_path / "state"
    one.save(path)
    whole = path.read_bytes()
    other = trainer()
    before = other.fingerprint()
    tensor = one.exchange.ledger.model.numpy().tobytes()
    at = whole.index(tensor)
    for data in (b"", whole[:100], whole[:-5], whole[:at] + b"\x55" + whole[at + 1 :]):
        path.write_bytes(data)
        with pytest.raises(CheckpointError):
            other.load(path, own=(7, 1))
    with pytest.raises(CheckpointError):
        other.load(tmp_path / "nothing")
    path.write_bytes(whole)
    with pytest.raises(CheckpointError, match="another model"):
        trainer(run=changed(task={"width": 8})).load(path)
    with pytest.raises(CheckpointError, match="another run"):
        trainer(run_id=b"r" * 32).load(path)
    assert other.fingerprint() == before
    assert [p.name for p in tmp_path.iterdir()] == ["state"]


def test_export_holds_the_shared_model_and_metadata(tmp_path: Path) -> None:
    one = trainer()
    take(one, 0, 1)
    one.export(tmp_path / "out.safetensors", {"run": "digits"})
    with safetensors.safe_open(tmp_path / "out.safetensors", framework="pt") as file:
        assert file.metadata() == {"run": "digits"}
        flat = torch.cat([file.get_tensor(name).reshape(-1) for name in sorted(file.keys())])
    assert torch.equal(flat, one.exchange.model())


def test_training_alone_uses_the_same_steps_and_leaves_the_ledger() -> None:
    one = trainer(run=changed(swarm={"min_peers": 1}), shard=(0, 1))
    before = one.fingerprint()
    assert one.alone(250) > 0.9
    assert one.fingerprint() == before


def test_training_alone_stops_in_the_schedule_where_the_swarm_did(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    one = trainer(run=changed(swarm={"min_peers": 1}, run={"turns": 40}), shard=(0, 1))
    taken: list[tuple[int, int]] = []
    learn = Gradient.learn

    def note(self: Gradient, *args: Any, turn: int, steps: int, seed: int) -> Any:
        taken.append((turn, steps))
        return learn(self, *args, turn=turn, steps=steps, seed=seed)

    monkeypatch.setattr(Gradient, "learn", note)
    one.alone(10, turns=4)
    assert taken == [(1, 2), (2, 3), (3, 2), (4, 3)]


# ---- the user's own task, and what can be wrong with it

USER_TASK = '''
"""Fit a line: y = 3x - 1."""
import torch


class Line:
    def __init__(self, place, noise: float = 0.01):
        self.place, self.noise = place, noise

    def model(self):
        return torch.nn.Linear(1, 1)

    def batches(self, generator):
        while True:
            x = torch.rand(self.place.batch, 1, generator=generator)
            yield x, 3 * x - 1 + self.noise * torch.randn(x.shape, generator=generator)

    def loss(self, model, batch):
        x, y = batch
        return (model(x) - y).square().mean()


class Explosive(Line):
    fuse = 2

    def loss(self, model, batch):
        Explosive.fuse -= 1
        return super().loss(model, batch) * (float("nan") if Explosive.fuse < 0 else 1)


class Normed(Line):
    def model(self):
        return torch.nn.Sequential(torch.nn.Linear(1, 4), torch.nn.BatchNorm1d(4),
                                   torch.nn.Linear(4, 1))


class NoLoss:
    def __init__(self, place): pass
    def model(self): return torch.nn.Linear(1, 1)
    def batches(self, generator): yield 1


class NotAModel(Line):
    def model(self): return "a model"


class Broken(Line):
    def loss(self, model, batch): raise KeyError("labels")


class Vector(Line):
    def loss(self, model, batch): return model(batch[0])


class Empty(Line):
    def batches(self, generator): return iter(())


class Odd(Line):
    def __init__(self, place, how=print): super().__init__(place)


class Zero(Line):
    def model(self):
        made = super().model()
        for p in made.parameters():
            torch.nn.init.zeros_(p)
        return made


def nothing(): pass
'''


@pytest.fixture
def user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Make trainers of the classes above, as if a user had written them."""
    name = f"line_{abs(hash(tmp_path))}"
    (tmp_path / f"{name}.py").write_text(USER_TASK)
    monkeypatch.syspath_prepend(tmp_path)

    def make(which: str, run: dict[str, Any] | None = None, **options: Any) -> Trainer:
        path = f"{name}:{which}"
        tables = {
            "run": {"name": "line", **(run or {})},
            "task": {"name": path, **options},
            "local": {"optimizer": {"name": "sgd", "lr": 0.5}, "steps": 5},
            "exchange": {"update": {"kind": "dense", "bits": 8}, "clip": 1000},
        }
        return trainer(0, tables, allow_task=path, shard=None)

    make.module = name  # type: ignore[attr-defined]
    return make


def test_a_users_task_trains(user: Any) -> None:
    one = user("Line", noise=0.0)
    assert one.founding().run["task"]["noise"] == 0.0
    for turn in range(1, 41):
        update = take(one, 0, turn, members=1)
        assert update.payload
    weights = dict(zip(("bias", "weight"), one.exchange.model().tolist(), strict=True))
    assert weights == pytest.approx({"bias": -1, "weight": 3}, abs=0.05)
    assert one.evaluate() != one.evaluate()


def test_an_installed_entry_point_is_found_by_its_name(user: Any, tmp_path: Path) -> None:
    info = tmp_path / "line-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: line\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[shoal.tasks]\nline = {user.module}:Line\n")
    given = {"run": {"name": "line"}, "task": {"name": "line", "noise": 0.5}}
    assert RunSpec.parse(given).task.options == {"noise": 0.5}
    with pytest.raises(RunError, match="did you mean 'noise'"):
        RunSpec.parse({**given, "task": {"name": "line", "nois": 0.5}})


@pytest.mark.parametrize(
    ("which", "answer"),
    [
        ("NoLoss", r"NoLoss without loss\(\)"),
        ("NotAModel", r"returned str, not nn.Module"),
        ("nothing", "Place as its first argument"),
        ("Odd", "cannot stand in a run file"),
        ("Missing", "cannot import task"),
        ("Zero", "all zeros"),
    ],
)
def test_a_task_that_makes_the_wrong_thing_is_answered(user: Any, which: str, answer: str) -> None:
    with pytest.raises(RunError, match=answer):
        user(which)


@pytest.mark.parametrize(
    ("which", "answer"),
    [
        ("Broken", "fails in its first step: KeyError: 'labels'"),
        ("Vector", r"loss\(\) must return a scalar"),
        ("Empty", r"batches\(\) yields nothing"),
        ("Normed", r"buffers 1.running_mean.*run.buffers = 'local'"),
    ],
)
def test_what_fails_in_the_first_step_is_found_before_a_run_is_founded(
    user: Any, which: str, answer: str
) -> None:
    with pytest.raises(RunError, match=answer):
        user(which).founding()


def test_a_joiner_too_refuses_changing_buffers(user: Any) -> None:
    with pytest.raises(TrainingError, match=r"run\.buffers = 'local'"):
        user("Normed").turn(1, 1)


def test_buffers_may_be_local(user: Any, tmp_path: Path) -> None:
    one = user("Normed", run={"buffers": "local"})
    one.founding()
    assert one.turn(1, 1).payload
    one.export(tmp_path / "out")
    with safetensors.safe_open(tmp_path / "out", framework="pt") as file:
        assert "1.running_mean" in file.keys()  # noqa: SIM118


def test_a_turn_that_meets_nan_is_dropped_whole_and_three_stop_the_training(user: Any) -> None:
    user("Line")  # imports the module
    module = __import__(user.module)
    module.Explosive.fuse = 5
    one = user("Explosive")
    take(one, 0, 1, members=1)
    before = (one.fingerprint(), one.exchange.feedback.residual.clone(), one.exchange.owner)
    optimizer = repr(one._inners["inner"].remember())
    for turn in (2, 3):
        turned = one.turn(turn, 1)
        assert turned.payload is None
        assert "nan" in turned.dropped
    assert one.fingerprint() == before[0]
    assert torch.equal(one.exchange.feedback.residual, before[1])
    assert one.exchange.owner == before[2]
    assert repr(one._inners["inner"].remember()) == optimizer
    module.Explosive.fuse = 100
    assert one.turn(4, 1).payload
    module.Explosive.fuse = 0
    one.turn(5, 1)
    one.turn(6, 1)
    with pytest.raises(TrainingError, match=r"3 turns in a row .* lower local.optimizer.lr"):
        one.turn(7, 1)


def test_devices_that_are_not_there_are_answered() -> None:
    with pytest.raises(RunError, match="unknown"):
        trainer(device="gpu")
    if not torch.cuda.is_available():
        with pytest.raises(RunError, match="--device cpu"):
            trainer(device="cuda")
    with pytest.raises(RunError, match="shard 4/4"):
        trainer(shard=(4, 4))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")
def test_a_peer_on_cuda_and_one_on_the_cpu_hold_one_model() -> None:
    here, there = trainer(0), trainer(1, device="cuda")
    for turn in (1, 2, 3):
        updates = [take(here, 0, turn), take(there, 1, turn)]
        here.apply(updates[1:])
        there.apply(updates[:1])
    assert here.fingerprint() == there.fingerprint() == there.recompute()
    assert here.exchange.snapshot() == there.exchange.snapshot()
