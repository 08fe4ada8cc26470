"""The worker: what is asked of it, what it keeps over a crash, what it says when it fails."""

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch

from shoal.node import duties, pipe, worker
from shoal.node.duties import Duties
from shoal.node.pipe import Blocking, Item, Setup
from shoal.node.supervisor import (
    Supervisor,
    WorkerDied,
    command,
    environment,
)
from shoal.training import merkle
from shoal.training.run import RunError

ME, OTHER = b"m" * 32, b"o" * 32
RUN: dict[str, Any] = {
    "run": {"name": "tiny", "seed": 3, "turns": 50},
    "task": {"name": "digits", "width": 8},
    "local": {"steps": 2, "batch": 8, "optimizer": {"name": "sgd", "lr": 0.1}},
    "exchange": {"update": {"kind": "dense", "levels": 3}},
    "swarm": {"min_peers": 2},
}


def setup(run: dict[str, Any] | None = None, peer: bytes = ME, **local: Any) -> Setup:
    return Setup(run or RUN, peer, **({"device": "cpu", "threads": 1} | local))


def ask(w: Duties, request: pipe.Request, *bodies: bytes) -> Any:
    return w.answer(request, memoryview(b"".join(bodies)))[0]


@pytest.fixture(scope="module")
def founded() -> pipe.Founded:
    answer = ask(Duties(), pipe.Found(setup()))
    assert isinstance(answer, pipe.Founded)
    return answer


def opening(founded: pipe.Founded, directory: Path, **changes: Any) -> pipe.Open:
    values: dict[str, Any] = {
        "setup": setup(founded.run),
        "parameters": founded.parameters,
        "layout": founded.layout,
        "initial_root": founded.initial_root,
        "initial": str(directory / "initial.bin"),
        "checkpoint": str(directory / "checkpoint" / "state"),
    }
    return pipe.Open(**(values | changes))


def opened(founded: pipe.Founded, directory: Path, **changes: Any) -> tuple[Duties, pipe.Opened]:
    w = Duties()
    answer = ask(w, opening(founded, directory, **changes))
    assert isinstance(answer, pipe.Opened)
    return w, answer


def item(number: int, payload: bytes, peer: bytes = ME, **changes: Any) -> Item:
    values: dict[str, Any] = {
        "peer": peer,
        "log": 1,
        "number": number,
        "turn": number,
        "kind": "dense",
        "size": len(payload),
        "length": len(payload),
    }
    return Item(**(values | changes))


def take_turn(w: Duties, number: int) -> bytes:
    """Train turn `number`, publish it as that number, apply it; return the payload."""
    turned, payload = w.answer(pipe.Turn(number, 2.0), memoryview(b""))
    assert isinstance(turned, pipe.Turned)
    data = bytes(payload[0])
    ask(w, pipe.Commit(1, number))
    ask(w, pipe.Apply([item(number, data)]), data)
    return data


# ---------------------------------------------------------------- in this process


def test_the_founding_says_what_the_genesis_needs(founded: pipe.Founded, tmp_path: Path) -> None:
    _, ready = opened(founded, tmp_path)
    initial = (tmp_path / "initial.bin").read_bytes()
    assert founded.parameters == 64 * 8 + 8 + 8 * 10 + 10
    assert len(initial) == 4 * founded.parameters
    assert merkle.root_of(initial) == founded.initial_root
    assert int(founded.initial_squares, 16) > 0
    assert founded.most["dense"] > 0
    assert founded.run["exchange"]["quantum_bits"] == 24
    assert ready.frontier == []
    assert ready.device.startswith("cpu")


def test_another_model_is_refused_with_the_remedy(founded: pipe.Founded, tmp_path: Path) -> None:
    """As many parameters may be another model: one of another configuration."""
    with pytest.raises(RunError, match=r"--base names one .*tokenizer or config\.json") as caught:
        opened(founded, tmp_path, layout=bytes(32))
    assert "\n" not in str(caught.value)


def test_initial_integers_that_differ_are_asked_for_and_then_used(
    founded: pipe.Founded, tmp_path: Path
) -> None:
    _, theirs = opened(founded, tmp_path)
    integers = (tmp_path / "initial.bin").read_bytes()
    other = {**founded.run, "run": {**founded.run["run"], "seed": 4}}  # makes another model
    here = tmp_path / "here"
    here.mkdir()
    assert isinstance(ask(Duties(), opening(founded, here, setup=setup(other))), pipe.NeedInitial)
    assert not (here / "initial.bin").exists()
    (here / "initial.bin").write_bytes(integers[:-4])  # cut off: dropped, asked for again
    assert isinstance(ask(Duties(), opening(founded, here, setup=setup(other))), pipe.NeedInitial)
    assert not (here / "initial.bin").exists()
    (here / "initial.bin").write_bytes(integers)
    _, mine = opened(founded, here, setup=setup(other))
    assert mine.fingerprint == theirs.fingerprint


def test_another_model_than_the_runs_is_refused(founded: pipe.Founded, tmp_path: Path) -> None:
    wider = {**founded.run, "task": {**founded.run["task"], "width": 9}}
    with pytest.raises(RunError, match=r"another model here, .*install the version"):
        ask(Duties(), opening(founded, tmp_path, setup=setup(wider)))


def test_an_update_moves_the_frontier_and_the_fingerprint_by_what_it_says(
    founded: pipe.Founded, tmp_path: Path
) -> None:
    w, ready = opened(founded, tmp_path)
    turned, payload = w.answer(pipe.Turn(1, 2.0), memoryview(b""))
    assert isinstance(turned, pipe.Turned)
    assert (turned.steps, turned.kind, turned.dropped) == (2, "dense", None)
    assert turned.loss is not None
    assert turned.memory > 0
    data = bytes(payload[0])
    assert ask(w, pipe.Recompute()).fingerprint == ready.fingerprint  # not applied by itself
    ask(w, pipe.Commit(1, 1))
    done = ask(
        w,
        pipe.Apply(
            [item(1, data), item(1, b"?", OTHER), item(2, b"", OTHER, size=9**9, length=-1)]
        ),
        data,
        b"?",
    )
    mine, bad, huge = done.results
    lanes = [(a + b) % 2**64 for a, b in zip(ready.fingerprint, mine.delta, strict=True)]
    assert tuple(lanes) == done.fingerprint == ask(w, pipe.Recompute()).fingerprint
    assert mine.refused is None
    assert mine.delta != (0, 0)
    assert (bad.delta, huge.delta) == ((0, 0), (0, 0))
    assert bad.refused
    assert huge.refused
    assert done.frontier == sorted([(ME, 1, 1), (OTHER, 1, 2)])
    assert done.out_of_range == 0


def test_subtracting_is_applying_backwards(founded: pipe.Founded, tmp_path: Path) -> None:
    w, ready = opened(founded, tmp_path)
    payloads = [take_turn(w, number) for number in (1, 2, 3)]
    after_one = ask(
        w, pipe.Subtract([item(3, payloads[2]), item(2, payloads[1])]), payloads[2], payloads[1]
    )
    assert after_one.frontier == [(ME, 1, 1)]
    whole = ask(
        w, pipe.Apply([item(2, payloads[1]), item(3, payloads[2])]), payloads[1], payloads[2]
    )
    assert whole.frontier == [(ME, 1, 3)]
    back = ask(w, pipe.Reset())
    assert (back.frontier, back.fingerprint) == ([], ready.fingerprint)
    items = [item(n, p) for n, p in enumerate(payloads, 1)]
    assert ask(w, pipe.Apply(items), *payloads).fingerprint == whole.fingerprint


def test_a_discarded_turn_leaves_no_trace(founded: pipe.Founded, tmp_path: Path) -> None:
    def second_payload(name: str, *between: pipe.Request) -> bytes:
        (tmp_path / name).mkdir()
        w, _ = opened(founded, tmp_path / name)
        take_turn(w, 1)
        for request in between:
            w.answer(request, memoryview(b""))
        _, payload = w.answer(pipe.Turn(2, 2.0), memoryview(b""))
        return bytes(payload[0])

    plain = second_payload("plain")
    assert second_payload("discarded", pipe.Turn(2, 2.0), pipe.Discard()) == plain
    assert second_payload("forgotten", pipe.Turn(2, 2.0)) == plain
    assert second_payload("spare", pipe.Discard(), pipe.Commit(1, 9)) == plain


def test_a_checkpoint_goes_on_exactly_where_it_was_saved(
    founded: pipe.Founded, tmp_path: Path
) -> None:
    w, _ = opened(founded, tmp_path)
    for number in (1, 2):
        take_turn(w, number)
    done = ask(w, pipe.Recompute())
    _, expected = w.answer(pipe.Turn(3, 2.0), memoryview(b""))
    ask(w, pipe.Stop())  # the turn that no number has is not in what it leaves
    held = [(ME, 1, 2), (OTHER, 5, 9)]
    again, ready = opened(founded, tmp_path, held=held, own=(1, 2))
    assert (ready.frontier, ready.fingerprint) == ([(ME, 1, 2)], done.fingerprint)
    assert (ready.kept, ready.note) == (True, "")
    _, payload = again.answer(pipe.Turn(3, 2.0), memoryview(b""))
    assert bytes(payload[0]) == bytes(expected[0])


def test_what_a_turn_taught_that_publishes_nothing_is_saved(
    founded: pipe.Founded, tmp_path: Path
) -> None:
    w, _ = opened(founded, tmp_path)
    ask(w, pipe.Turn(1, 2.0, publish=False))
    _, expected = w.answer(pipe.Turn(2, 2.0), memoryview(b""))
    ask(w, pipe.Stop())
    again, ready = opened(founded, tmp_path)
    assert (ready.kept, ready.note) == (True, "")
    _, payload = again.answer(pipe.Turn(2, 2.0), memoryview(b""))
    assert bytes(payload[0]) == bytes(expected[0])


def test_residual_and_momentum_start_at_zero_when_the_last_number_is_another(
    founded: pipe.Founded, tmp_path: Path
) -> None:
    w, _ = opened(founded, tmp_path)
    take_turn(w, 1)
    done = ask(w, pipe.Recompute())
    ask(w, pipe.Save())
    for own in ((1, 2), (2, 1), None):
        _, ready = opened(founded, tmp_path, held=[(ME, 1, 2)], own=own)
        assert (ready.kept, ready.fingerprint) == (False, done.fingerprint)


def test_no_checkpoint_is_written_of_what_the_log_on_disk_lacks(
    founded: pipe.Founded, tmp_path: Path
) -> None:
    w, _ = opened(founded, tmp_path)
    take_turn(w, 1)
    done = ask(w, pipe.Recompute())
    ask(w, pipe.Save())
    ask(w, pipe.Turn(2, 2.0))
    w._saved_at -= 1e6  # long ago: one is due
    ask(w, pipe.Commit(1, 2, save=False))
    ask(w, pipe.Stop(save=False))
    _, ready = opened(founded, tmp_path, held=[(ME, 1, 1)], own=(1, 1))
    assert (ready.kept, ready.note, ready.fingerprint) == (True, "", done.fingerprint)


def test_a_checkpoint_beyond_the_log_is_not_used(founded: pipe.Founded, tmp_path: Path) -> None:
    w, start = opened(founded, tmp_path)
    for number in (1, 2):
        take_turn(w, number)
    ask(w, pipe.Stop())
    _, ready = opened(founded, tmp_path, held=[(ME, 1, 1)], own=(1, 1))
    assert (ready.frontier, ready.fingerprint) == ([], start.fingerprint)
    assert (ready.kept, ready.note) == (False, "the checkpoint goes beyond the log")


@pytest.mark.parametrize("how", ["cut", "flipped", "empty", "other"])
def test_a_damaged_checkpoint_is_not_used(founded: pipe.Founded, tmp_path: Path, how: str) -> None:
    w, start = opened(founded, tmp_path)
    take_turn(w, 1)
    ask(w, pipe.Save())
    path = tmp_path / "checkpoint" / "state"
    data = bytearray(path.read_bytes())
    match how:
        case "cut":
            data = data[: len(data) // 2]
        case "flipped":
            # The ledger is one of the tensors: find a byte of it by its values.
            w2 = ask(w, pipe.Export(str(tmp_path / "m"))) and w
            ledger = w2._ready().exchange.snapshot()[:64]
            data[data.index(ledger) + 3] ^= 1
        case "empty":
            data = bytearray()
        case "other":
            data = bytearray(safetensors.torch.save({}, {"shoal": "{}"}))
    path.write_bytes(data)
    _, ready = opened(founded, tmp_path, held=[(ME, 1, 1)], own=(1, 1))
    assert (ready.frontier, ready.fingerprint, ready.kept) == ([], start.fingerprint, False)
    assert ready.note


def test_a_checkpoint_that_does_not_fit_is_no_reason_to_die(
    founded: pipe.Founded, tmp_path: Path
) -> None:
    """Another version of the optimizer, say; the log is enough to start from."""
    w, before = opened(founded, tmp_path)
    payload = take_turn(w, 1)
    ask(w, pipe.Save())
    path = tmp_path / "checkpoint" / "state"
    with safetensors.safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    tensors["inner/9/0/momentum_buffer"] = tensors["ledger"].float()
    safetensors.torch.save_file(tensors, path, metadata)
    w, ready = opened(founded, tmp_path, held=[(ME, 1, 1)], own=(1, 1))
    assert "IndexError" in ready.note
    assert (ready.frontier, ready.fingerprint) == ([], before.fingerprint)
    ask(w, pipe.Apply([item(1, payload)]), payload)
    take_turn(w, 2)


def test_a_disk_that_takes_no_initial_model_stops_nothing(
    founded: pipe.Founded, tmp_path: Path
) -> None:
    _, ready = opened(founded, tmp_path, initial=str(tmp_path / "missing" / "initial.bin"))
    assert ready.frontier == []


def test_an_export_that_the_disk_refuses_is_said_and_the_worker_lives(
    founded: pipe.Founded, tmp_path: Path
) -> None:
    w, _ = opened(founded, tmp_path)
    answer = ask(w, pipe.Export(str(tmp_path / "missing" / "model.safetensors")))
    assert "model.safetensors can't be written" in answer.problem
    take_turn(w, 1)


def test_checkpoints_are_written_at_a_bounded_rate(
    founded: pipe.Founded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    w, _ = opened(founded, tmp_path)
    path = tmp_path / "checkpoint" / "state"
    take_turn(w, 1)
    assert not path.exists()
    monkeypatch.setattr(duties, "CHECKPOINT_SECONDS", 0.0)
    monkeypatch.setattr(w, "_saving_took", 1e9)
    take_turn(w, 2)
    assert not path.exists()  # it would take more than its share of the time
    monkeypatch.setattr(w, "_saving_took", 0.0)
    take_turn(w, 3)
    written = path.stat().st_mtime_ns
    ask(w, pipe.Evaluate())
    ask(w, pipe.Turn(4, 2.0))
    assert path.stat().st_mtime_ns == written


def test_a_disk_that_takes_no_checkpoint_stops_nothing(
    founded: pipe.Founded, tmp_path: Path
) -> None:
    w, _ = opened(founded, tmp_path)
    (tmp_path / "checkpoint").write_text("in the way")
    take_turn(w, 1)
    assert isinstance(ask(w, pipe.Save()), pipe.Ready)
    (tmp_path / "checkpoint").unlink()
    (tmp_path / "checkpoint" / "state.partial" / "in the way").mkdir(parents=True)
    take_turn(w, 2)
    assert isinstance(ask(w, pipe.Save()), pipe.Ready)
    take_turn(w, 3)


def test_equal_models_make_equal_files(founded: pipe.Founded, tmp_path: Path) -> None:
    """So that people can compare what two peers exported by its checksum."""
    w, _ = opened(founded, tmp_path)
    told = {name: name * 9 for name in "zyxwvutsrqponmlkjihgfedcba"}
    written = []
    for order in (told, dict(reversed(told.items()))):
        ask(w, pipe.Export(str(tmp_path / "model"), order))
        written.append((tmp_path / "model").read_bytes())
        with safetensors.safe_open(tmp_path / "model", framework="pt") as file:
            assert file.metadata() == told
    assert written[0] == written[1]
    size = int.from_bytes(written[0][:8], "little")
    names = list(json.loads(written[0][8 : 8 + size])["__metadata__"])
    assert names == sorted(told)


def test_the_export_is_the_model_with_the_metadata_given(
    founded: pipe.Founded, tmp_path: Path
) -> None:
    w, _ = opened(founded, tmp_path)
    ask(w, pipe.Export(str(tmp_path / "out.safetensors"), {"run_file": "x"}))
    tensors = safetensors.torch.load_file(tmp_path / "out.safetensors")
    assert sum(t.numel() for t in tensors.values()) == founded.parameters
    measured = ask(w, pipe.Evaluate())
    assert 0 <= measured.value <= 1


# ---------------------------------------------------------------- as a process

TASK = """
import sys, torch
from torch import nn
print("noise at import")
class Noisy:
    def __init__(self, place, *, fail: str = ""):
        self.fail, self.steps = fail, 0
    def model(self):
        print("noise in model()")
        return nn.Linear(4, 3)
    def batches(self, generator):
        while True:
            yield torch.randn(2, 4, generator=generator)
    def loss(self, model, batch):
        self.steps += 1
        print("noise in loss()", flush=True)
        sys.stderr.write("and on stderr\\n")
        if self.fail == "first" or (self.fail == "later" and self.steps > 2):
            raise ValueError("shapes do\\nnot match: 3 and 4")
        if self.fail == "exit":
            sys.exit("bye")
        if self.fail == "interrupt":
            raise KeyboardInterrupt
        return model(batch).square().mean() * (float("nan") if self.fail == "nan" else 1.0)
def wrong(place):
    return 3
"""


def drive(
    tmp_path: Path, scenario: Callable[[Supervisor], Awaitable[None]], *, tries: int = 5
) -> None:
    """Run a scenario with a real worker process that can import the task above."""
    (tmp_path / "mytask.py").write_text(TASK)

    async def run() -> None:
        env = environment(1) | {"PYTHONPATH": str(tmp_path)}
        supervisor = Supervisor(
            command(), env=env, log=tmp_path / "worker.log", tries=tries, backoff=0.01
        )
        try:
            await supervisor.start()
            await scenario(supervisor)
        finally:
            await supervisor.stop()

    asyncio.run(run())


def noisy(name: str = "mytask:Noisy", **options: Any) -> Setup:
    run = {
        **RUN,
        "run": {"name": "noisy", "seed": 1},
        "task": {"name": name, **options},
    }
    return setup(run, allow_task=name)


@pytest.mark.real
def test_a_worker_killed_and_started_again_rebuilds_the_same_model(tmp_path: Path) -> None:
    async def scenario(supervisor: Supervisor) -> None:
        founded = await supervisor.ask(pipe.Found(setup()), pipe.Founded)
        start = opening(founded, tmp_path)
        await supervisor.ask(start, pipe.Opened)
        payloads = []
        for number in (1, 2):
            _, payload = await supervisor.ask_body(pipe.Turn(number, 2.0), pipe.Turned)
            await supervisor.ask(pipe.Commit(1, number), pipe.Ready)
            payloads.append(payload)
        items = [item(n, p) for n, p in enumerate(payloads, 1)]
        before = await supervisor.ask(pipe.Apply(items), pipe.Done, *payloads)
        assert supervisor.pid is not None
        os.kill(supervisor.pid, signal.SIGKILL)
        with pytest.raises(WorkerDied, match="signal 9"):
            await supervisor.ask(pipe.Turn(3, 2.0), pipe.Turned)
        await supervisor.start()
        ready = await supervisor.ask(start, pipe.Opened)
        assert ready.frontier == []
        after = await supervisor.ask(pipe.Apply(items), pipe.Done, *payloads)
        assert (after.fingerprint, after.frontier) == (before.fingerprint, before.frontier)

    drive(tmp_path, scenario)


@pytest.mark.real
def test_a_users_task_may_print_fail_and_exit(tmp_path: Path) -> None:
    async def scenario(supervisor: Supervisor) -> None:
        founded = await supervisor.ask(pipe.Found(noisy()), pipe.Founded)
        assert founded.parameters == 15
        broken = noisy(fail="later")
        await supervisor.ask(opening(founded, tmp_path, setup=broken), pipe.Opened)
        turned, payload = await supervisor.ask_body(pipe.Turn(1, 2.0), pipe.Turned)
        assert turned.steps == 2
        assert payload
        reason = r"^worker: ValueError: shapes do not match: 3 and 4 \(.*mytask.py:\d+\)$"
        with pytest.raises(WorkerDied, match=reason):
            await supervisor.ask(pipe.Turn(2, 2.0), pipe.Turned)
        await supervisor.start()
        broken = noisy(fail="exit")
        await supervisor.ask(opening(founded, tmp_path, setup=broken), pipe.Opened)
        with pytest.raises(WorkerDied, match=r"^worker: SystemExit: bye \(.*mytask.py:\d+\)$"):
            await supervisor.ask(pipe.Turn(1, 2.0), pipe.Turned)

    drive(tmp_path, scenario)
    words = (tmp_path / "worker.log").read_text()
    for noise in ("noise at import", "noise in model()", "noise in loss()", "and on stderr"):
        assert noise in words


# ---------------------------------------------------------------- what it says when it fails


def last_word(*requests: pipe.Request) -> tuple[int, pipe.Answer]:
    """Return the exit code of a worker that is asked all this, and what it answered last."""
    ours, theirs = socket.socketpair()
    link = Blocking(ours)
    codes: list[int] = []
    thread = threading.Thread(target=lambda: codes.append(worker.serve(Blocking(theirs))))
    thread.start()
    answer: pipe.Answer = pipe.Ready()
    for request in requests:
        link.send(request)
        answer = pipe.decode_answer(link.receive()[0])
        if isinstance(answer, pipe.Failed):
            break
    ours.close()
    thread.join()
    theirs.close()
    return codes[0], answer


@pytest.mark.parametrize(
    ("fail", "kind", "reason"),
    [
        ("first", "crash", r"^ValueError: shapes do not match: 3 and 4 \(.*mytask.py:\d+\)$"),
        ("nan", "config", r"^3 turns in a row were dropped, .*lower local.optimizer.lr$"),
        ("interrupt", "crash", r"^KeyboardInterrupt \(.*mytask.py:\d+\)$"),
        ("exit", "crash", r"^SystemExit: bye \(.*mytask.py:\d+\)$"),
    ],
)
def test_a_task_that_fails_in_training_is_one_line(
    tmp_path: Path, mytask: None, fail: str, kind: str, reason: str
) -> None:
    founded = ask(Duties(), pipe.Found(noisy()))
    start = opening(founded, tmp_path, setup=noisy(fail=fail))
    code, answer = last_word(start, *(pipe.Turn(n, 2.0) for n in range(1, 9)))
    assert isinstance(answer, pipe.Failed)
    assert answer.kind == kind
    assert re.search(reason, answer.error), answer.error
    assert code == (worker.EXIT_CONFIG if kind == "config" else 1)


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        (noisy("nowhere.at.all:Task"), "cannot import task 'nowhere.at.all:Task'"),
        (noisy("mytask:wrong"), r"made a int without model, batches, loss\(\)"),
        (noisy(fial="x"), "did you mean 'fail'"),
        (noisy(fail="first"), "ValueError: shapes do not match"),
        (setup(device="cuda:9"), "cuda:9"),
        (setup({**RUN, "task": {"name": "text"}}, data="/no/such/corpus"), "/no/such/corpus"),
        (setup(shard=(99_998, 99_999)), "shard .* is empty"),
        (
            setup({**RUN, "local": {"optimizer": {"name": "adamv"}, "steps": 1}}),
            "did you mean 'adamw'",
        ),
    ],
)
def test_what_the_operator_must_mend_is_one_clear_line(
    mytask: None, asked: Setup, reason: str
) -> None:
    _, answer = last_word(pipe.Found(asked))
    assert isinstance(answer, pipe.Failed)
    assert re.search(reason, answer.error), answer.error
    assert "\n" not in answer.error


@pytest.fixture
def mytask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mytask.py").write_text(TASK)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "mytask", raising=False)


# ---------------------------------------------------------------- how it ends


PARENT = """
import asyncio
from shoal.node.supervisor import Supervisor, command, environment
async def run():
    supervisor = Supervisor(command(), env=environment(1))
    await supervisor.start()
    print(supervisor.pid, flush=True)
    await asyncio.sleep(600)
asyncio.run(run())
"""


@pytest.mark.real
def test_the_worker_dies_with_a_daemon_that_is_killed() -> None:
    daemon = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(PARENT)], stdout=subprocess.PIPE, text=True
    )
    assert daemon.stdout is not None
    pid = int(daemon.stdout.readline())
    assert alive(pid)
    daemon.kill()
    daemon.wait()
    daemon.stdout.close()
    until = time.monotonic() + 120
    while alive(pid) and time.monotonic() < until:
        time.sleep(0.05)
    if alive(pid):
        os.kill(pid, signal.SIGKILL)
        pytest.fail("the worker outlived its daemon")


def alive(pid: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):  # the latter while it is read
        return False


@pytest.mark.real
def test_a_pipe_that_talks_nonsense_ends_the_worker() -> None:
    ours, theirs = socket.socketpair()
    arguments: Sequence[str] = [*command(), str(theirs.fileno()), str(os.getpid())]
    child = subprocess.Popen(
        arguments, pass_fds=(theirs.fileno(),), stderr=subprocess.PIPE, text=True
    )
    theirs.close()
    ours.sendall(pipe.encode(pipe.Ready())[0])
    assert child.stderr is not None
    assert "PipeError: not a message" in child.stderr.read()
    child.stderr.close()
    assert child.wait(120) == worker.EXIT_PIPE
    ours.close()
