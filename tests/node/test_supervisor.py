"""The worker's death is noticed, explained and survived. The children here need no torch."""

import asyncio
import errno
import os
import signal
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from shoal.node import pipe
from shoal.node.errors import ConfigError
from shoal.node.supervisor import (
    Supervisor,
    WorkerDied,
    WorkerGone,
    WorkerRefused,
    command,
    environment,
)

pytestmark = pytest.mark.real

CHILD = """
import os, signal, socket, sys, time
from shoal.node import pipe
link = pipe.Blocking(socket.socket(fileno=int(sys.argv[1])))
def answer(request, body):
    match request:
        case pipe.Turn(turn, members):
            print("noise on stdout", turn)
            if members < 0:
                time.sleep(-members)
            return pipe.Turned("dense", float(turn), None, 1, 0.0), [bytes([turn % 256]) * 1000]
        case pipe.Evaluate():
            os.kill(os.getpid(), signal.SIGKILL)
        case pipe.Save():
            print("Traceback (most recent call last):", file=sys.stderr)
            print("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate", file=sys.stderr)
            sys.exit(1)
        case pipe.Reset():
            return pipe.Failed("ValueError: bad shape (task.py:3)", "crash"), []
        case pipe.Recompute():
            return pipe.Failed("no corpus in /x: give --data", "config"), []
        case pipe.Discard():
            link.sock.sendall(b"garbage that is no frame at all")
            time.sleep(60)
        case pipe.Commit():
            os.close(link.sock.fileno())
            time.sleep(60)
        case pipe.Export(path):
            print("x" * 5_000_000)
            print(("y" * 99 + "\\n") * 12_000)
            print("noise is over")
            print("environment", os.environ["OMP_NUM_THREADS"], sorted(os.listdir("/proc/self/fd")))
            return pipe.Ready(), []
        case pipe.Stop():
            return pipe.Ready(), []
while True:
    try:
        header, body = link.receive()
    except EOFError:
        break
    request = pipe.decode_request(header)
    message, payload = answer(request, body)
    link.send(message, payload)
    if isinstance(message, pipe.Failed):
        sys.exit(1)
    if isinstance(request, pipe.Stop) and "stubborn" not in sys.argv[0]:
        break
    while isinstance(request, pipe.Stop):
        time.sleep(1)
"""


def drive(
    tmp_path: Path,
    scenario: Callable[[Supervisor], Awaitable[None]],
    *,
    name: str = "child.py",
    tries: int = 5,
) -> None:
    """Run a scenario with a supervisor whose child is the program above; leave nothing behind."""
    program = tmp_path / name
    program.write_text(CHILD)

    async def run() -> None:
        supervisor = Supervisor(
            [sys.executable, str(program)],
            env=environment(1),
            log=tmp_path / "worker.log",
            tries=tries,
            backoff=0.01,
        )
        pids = []
        try:
            await supervisor.start()
            pids.append(supervisor.pid)
            await scenario(supervisor)
            pids.append(supervisor.pid)
        finally:
            await supervisor.stop(grace=2.0)
        assert supervisor.pid is None
        for pid in pids:
            if pid is not None:
                with pytest.raises(ProcessLookupError):
                    os.kill(pid, 0)

    asyncio.run(run())


async def good_turn(supervisor: Supervisor, turn: int = 7) -> None:
    turned, payload = await supervisor.ask_body(pipe.Turn(turn, 1.0), pipe.Turned)
    assert (turned.loss, payload) == (float(turn), bytes([turn]) * 1000)


def test_questions_are_answered_in_order_and_noise_on_stdout_is_harmless(tmp_path: Path) -> None:
    async def scenario(supervisor: Supervisor) -> None:
        answers = await asyncio.gather(
            *(supervisor.ask(pipe.Turn(n, 1.0), pipe.Turned) for n in range(20))
        )
        assert [a.loss for a in answers] == list(range(20))
        await supervisor.ask(pipe.Export("x"), pipe.Ready)

    drive(tmp_path, scenario)
    text = (tmp_path / "worker.log").read_text() + (tmp_path / "worker.log.1").read_text()
    assert "noise on stdout 19" in text
    assert text.count("y" * 99) == 12_000
    line = next(x for x in text.splitlines() if x.startswith("environment"))
    # Threads as told; of the daemon's descriptors only the pipe (and that of the listing itself).
    assert line.startswith("environment 1 ['0', '1', ")
    assert line.count(",") == 4


@pytest.mark.parametrize(
    ("request_", "reason"),
    [
        (pipe.Evaluate(), "worker: killed by signal 9 (SIGKILL; out of memory?)"),
        (pipe.Save(), "worker: ended with code 1: torch.OutOfMemoryError: CUDA out of memory. Tr"),
        (pipe.Reset(), "worker: ValueError: bad shape (task.py:3)"),
        (pipe.Discard(), "worker: broke the pipe's rules (a frame of"),
    ],
)
def test_a_death_is_one_line_with_its_reason_and_the_next_start_works(
    tmp_path: Path, request_: pipe.Request, reason: str
) -> None:
    async def scenario(supervisor: Supervisor) -> None:
        with pytest.raises(WorkerDied) as caught:
            await supervisor.ask(request_, pipe.Ready)
        assert caught.value.reason.startswith(reason)
        assert supervisor.reason == caught.value.reason
        assert supervisor.pid is None
        with pytest.raises(WorkerDied):
            await supervisor.ask(pipe.Turn(1, 1.0), pipe.Turned)
        await supervisor.start()
        assert supervisor.restarts == 1
        await good_turn(supervisor)

    drive(tmp_path, scenario)


def test_a_worker_killed_from_outside_is_noticed_while_nothing_is_asked(tmp_path: Path) -> None:
    async def scenario(supervisor: Supervisor) -> None:
        dead = asyncio.create_task(supervisor.dead())
        await good_turn(supervisor)
        assert not dead.done()
        assert supervisor.pid is not None
        os.kill(supervisor.pid, signal.SIGKILL)
        async with asyncio.timeout(30):
            assert await dead == "worker: killed by signal 9 (SIGKILL; out of memory?)"
        await supervisor.start()
        await good_turn(supervisor)

    drive(tmp_path, scenario)


def test_a_worker_killed_in_the_middle_of_a_turn_fails_all_who_wait(tmp_path: Path) -> None:
    async def scenario(supervisor: Supervisor) -> None:
        turn = asyncio.create_task(supervisor.ask(pipe.Turn(1, -30.0), pipe.Turned))
        behind = asyncio.create_task(supervisor.ask(pipe.Turn(2, 1.0), pipe.Turned))
        await asyncio.sleep(0.3)
        assert supervisor.pid is not None
        os.kill(supervisor.pid, signal.SIGTERM)
        for task in (turn, behind):
            with pytest.raises(WorkerDied, match="signal 15"):
                await task

    drive(tmp_path, scenario)


def test_a_refusal_is_the_operators_affair(tmp_path: Path) -> None:
    async def scenario(supervisor: Supervisor) -> None:
        with pytest.raises(ConfigError, match="no corpus in /x: give --data") as caught:
            await supervisor.ask(pipe.Recompute(), pipe.Done)
        assert isinstance(caught.value, WorkerRefused)

    drive(tmp_path, scenario)


def test_it_gives_up_after_so_many_deaths_without_a_good_turn(tmp_path: Path) -> None:
    async def die(supervisor: Supervisor) -> None:
        with pytest.raises(WorkerDied):
            await supervisor.ask(pipe.Reset(), pipe.Done)

    async def scenario(supervisor: Supervisor) -> None:
        await die(supervisor)
        await supervisor.start()
        await good_turn(supervisor)  # the count begins anew
        for _ in range(3):
            await supervisor.start()
            await die(supervisor)
        with pytest.raises(WorkerGone, match=r"bad shape .*gave up after 3 starts without a turn"):
            await supervisor.start()
        assert supervisor.restarts == 3

    drive(tmp_path, scenario, tries=3)


def test_a_machine_without_room_for_a_process_is_a_death_like_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def refuse(*command: str, **options: object) -> None:
        raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    monkeypatch.setattr(asyncio, "create_subprocess_exec", refuse)

    async def run() -> None:
        supervisor = Supervisor(command(), tries=2, backoff=0.01)
        for _ in range(2):
            with pytest.raises(WorkerDied, match=r"can't be started \(Resource temporarily"):
                await supervisor.start()
        with pytest.raises(WorkerGone, match="gave up after 2 starts"):
            await supervisor.start()
        assert supervisor.pid is None

    asyncio.run(run())


def test_an_answer_that_nobody_waits_for_is_dropped(tmp_path: Path) -> None:
    async def scenario(supervisor: Supervisor) -> None:
        for seconds in (0.0, 0.1, 0.2):
            task = asyncio.create_task(supervisor.ask(pipe.Turn(1, -0.3), pipe.Turned))
            await asyncio.sleep(seconds)
            task.cancel()
            await good_turn(supervisor, turn=9)

    drive(tmp_path, scenario)


def test_a_wrong_kind_of_answer_ends_the_worker(tmp_path: Path) -> None:
    async def scenario(supervisor: Supervisor) -> None:
        with pytest.raises(WorkerDied, match="answered Turned to Turn"):
            await supervisor.ask(pipe.Turn(1, 1.0), pipe.Measured)
        assert supervisor.pid is None

    drive(tmp_path, scenario)


def test_a_pipe_that_closes_is_a_death_even_if_the_process_lives(tmp_path: Path) -> None:
    async def scenario(supervisor: Supervisor) -> None:
        with pytest.raises(WorkerDied, match="closed its pipe and did not end"):
            async with asyncio.timeout(50):  # it would end by itself after 60
                await supervisor.ask(pipe.Commit(1, 1), pipe.Ready)

    drive(tmp_path, scenario)


def test_a_worker_that_will_not_stop_is_killed_after_the_grace(tmp_path: Path) -> None:
    async def scenario(supervisor: Supervisor) -> None:
        began = time.monotonic()
        await supervisor.stop(grace=0.5)
        assert time.monotonic() - began > 0.4
        assert supervisor.reason == ""
        await supervisor.start()

    drive(tmp_path, scenario, name="stubborn.py")


def test_a_stop_that_is_cancelled_kills_at_once(tmp_path: Path) -> None:
    async def scenario(supervisor: Supervisor) -> None:
        stop = asyncio.create_task(supervisor.stop(grace=60))
        await asyncio.sleep(0.3)
        stop.cancel()
        with pytest.raises(asyncio.CancelledError):
            await stop
        async with asyncio.timeout(30):
            await supervisor.dead()

    drive(tmp_path, scenario, name="stubborn.py")


def test_a_command_that_can_not_run_is_an_error_at_once() -> None:
    async def run() -> None:
        with pytest.raises(FileNotFoundError):
            await Supervisor(["/no/such/program"]).start()

    asyncio.run(run())


def test_the_real_command_is_this_python() -> None:
    assert command() == [sys.executable, "-m", "shoal.node.worker"]
    assert environment(3)["OMP_NUM_THREADS"] == "3"


def test_workers_that_share_cores_do_not_spin_unless_the_operator_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    assert environment(0)["GOMP_SPINCOUNT"] == "3000"
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    assert environment(0)["GOMP_SPINCOUNT"] == "7"
