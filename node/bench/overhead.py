"""How much the daemon slows training: `shoal bench overhead`.

Local steps per second of a worker inside a swarm of two, against the same loop bare: the same task,
the same settings, no daemon. Bare and swarm take turns within one run, so that a machine that gets
slower meanwhile slows both. The peer that is measured has one core for its daemon and its worker;
the other peer, a real daemon with a paced fake worker, has another core.
"""

import argparse
import asyncio
import contextlib
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

from shoal.node import client, founding, pipe
from shoal.node.bench._report import Row, add_json, beside, say, show
from shoal.node.config import RunFile, to_toml
from shoal.node.daemon import Daemon
from shoal.node.errors import ConfigError
from shoal.node.founding import Options
from shoal.node.identity import Identity
from shoal.node.status import Status
from shoal.node.supervisor import Supervisor, command, environment

PAIRS = 3
"""Bare and swarm take so many turns."""
TURNS = 12
"""Measured turns of each."""
WARM = 2
"""Turns before them that do not count."""
STEPS = 30
ASKED = 100
"""Times that `/status` is asked for while both train."""
PROMISED = 50.0
"""Milliseconds in which `/status` shall answer meanwhile."""
STARTING = 120.0
"""Seconds that a swarm has to come up."""


class Speed(NamedTuple):
    """Of one stretch of turns, and what the processors did meanwhile."""

    steps: float
    """Local steps per second of local steps: the median over turns."""
    wall: float
    """Local steps per second of the clock: applying, encoding and publishing included."""
    daemon: float = 0.0
    """Processor seconds of the daemon …"""
    worker: float = 0.0
    """… and of its worker."""
    answers: tuple[float, ...] = ()
    """Milliseconds that each answer of `/status` took."""


def register(parser: argparse.ArgumentParser) -> None:
    """Add the flags."""
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Measure and print."""
    with (
        tempfile.TemporaryDirectory(prefix="shoal-overhead-") as folder,
        contextlib.redirect_stdout(sys.stderr),  # what the daemon in this process says
    ):
        bare, swarm = asyncio.run(_measure(Path(folder)))
    show("overhead", rows(bare, swarm), as_json=args.json)
    return 0


def rows(bare: list[Speed], swarm: list[Speed]) -> list[Row]:
    """Return medians over the pairs, the swarm beside the bare loop."""
    found = [
        beside(
            "local steps/s in a swarm of 2, beside the bare loop",
            statistics.median(s.steps for s in swarm),
            "steps/s",
            statistics.median(s.steps for s in bare),
        ),
        beside(
            "steps per second of the clock, beside the bare loop",
            statistics.median(s.wall for s in swarm),
            "steps/s",
            statistics.median(s.wall for s in bare),
        ),
    ]
    slower = [1 - s.steps / b.steps for b, s in zip(bare, swarm, strict=True)]
    found.append(
        Row("training slowed by the daemon, median of pairs", statistics.median(slower) * 100, "%")
    )
    found.append(Row("the same, worst pair", max(slower) * 100, "%"))
    found.append(
        beside(
            "processor seconds of the daemon, beside its worker's",
            sum(s.daemon for s in swarm),
            "s",
            sum(s.worker for s in swarm),
        )
    )
    answers = sorted(each for s in swarm for each in s.answers)
    late = answers[len(answers) * 95 // 100]
    found.append(
        beside(
            "/status answers while it trains, median", statistics.median(answers), "ms", PROMISED
        )
    )
    found.append(beside("the same, 95 of 100 are faster", late, "ms", PROMISED))
    return found


async def _measure(folder: Path) -> tuple[list[Speed], list[Speed]]:
    ours, theirs = _cores()
    run_file = folder / "run.toml"
    run_file.write_text(to_toml(_run()), "utf-8")
    bare, swarm = [], []
    for pair in range(PAIRS):
        say(f"pair {pair + 1} of {PAIRS}: bare")
        with _pinned(ours):
            bare.append(await _bare(RunFile.load(run_file), folder / f"bare-{pair}"))
        say(f"pair {pair + 1} of {PAIRS}: swarm")
        pace = STEPS / bare[-1].wall
        swarm.append(await _swarm(run_file, folder / f"swarm-{pair}", pace, ours, theirs))
    return bare, swarm


def _run() -> dict[str, Any]:
    text = resources.files("shoal.training").joinpath("runs/text.toml").read_text("utf-8")
    tables = tomllib.loads(text)
    tables["run"] |= {"name": "overhead", "turns": 0}
    tables["local"] |= {"steps": STEPS, "evaluate_every": 0}
    tables["local"]["optimizer"]["schedule"] = "constant"
    tables["swarm"]["min_peers"] = 2
    return tables


# ---------------------------------------------------------------- the bare loop


async def _bare(run_file: RunFile, folder: Path) -> Speed:
    """Let a worker take turns with nobody to talk to."""
    folder.mkdir()
    setup = pipe.Setup(
        run=run_file.tables(),
        peer=Identity.generate().peer,
        shard=(0, 2),
        device="cpu",
        threads=1,
    )
    supervisor = Supervisor(command(), env=environment(1), log=folder / "worker.log")
    await supervisor.start()
    try:
        founded = await supervisor.ask(pipe.Found(setup), pipe.Founded)
        opening = pipe.Open(
            setup=setup,
            parameters=founded.parameters,
            layout=founded.layout,
            initial_root=founded.initial_root,
            initial=str(folder / "initial.bin"),
        )
        await supervisor.ask(opening, pipe.Opened)
        speeds, began = [], 0.0
        for turn in range(1, WARM + TURNS + 1):
            if turn == WARM + 1:
                began = time.perf_counter()
            turned, payload = await supervisor.ask_body(pipe.Turn(turn, 2.0), pipe.Turned)
            await supervisor.ask(pipe.Commit(1, turn), pipe.Ready)
            item = pipe.Item(setup.peer, 1, turn, turn, turned.kind, len(payload), len(payload))
            await supervisor.ask(pipe.Apply([item]), pipe.Done, payload)
            if turn > WARM:
                speeds.append(turned.steps / turned.seconds)
        wall = STEPS * TURNS / (time.perf_counter() - began)
    finally:
        await supervisor.stop()
    return Speed(statistics.median(speeds), wall)


# ---------------------------------------------------------------- the swarm


async def _swarm(
    run_file: Path, folder: Path, pace: float, ours: set[int], theirs: set[int]
) -> Speed:
    """Let a daemon train beside another one whose worker is paced."""
    folder.mkdir()
    mine, other = folder / "measured", folder / "other"
    argv = [sys.executable, "-m", "shoal.node.cli", "start", str(run_file), "--dir", str(mine)]
    argv += ["--listen", "127.0.0.1:0", "--shard", "0/2", "--threads", "1", "--device", "cpu"]
    with _pinned(ours), (folder / "measured.log").open("wb") as out:
        process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=out, stderr=out)
    try:
        join = await _address(process, mine, folder / "measured.log")
        with _pinned(theirs):
            partner = await _partner(join, other, pace)
            serving = asyncio.create_task(partner.run())
            try:
                return await _watch(process.pid, mine, other, serving)
            finally:
                await partner.leave()
                await serving
                partner.place.home.close()
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


async def _partner(join: str, folder: Path, pace: float) -> Daemon:
    """Return the other daemon, not started yet: this process, with the fake worker."""
    local = {"listen": "127.0.0.1:0", "shard": "1/2", "threads": 1, "device": "cpu"}
    with contextlib.redirect_stderr(io.StringIO()):
        place = await founding.join([join], Options(directory=folder, local=local))
    daemon = Daemon(place)
    fake = Supervisor(
        [sys.executable, "-m", "shoal.node.bench._paced", str(pace)],
        env=environment(1),
        log=place.home.path / "worker.log",
    )
    daemon.supervisor = daemon.foreman.supervisor = fake
    return daemon


async def _address(process: "subprocess.Popen[bytes]", folder: Path, log: Path) -> str:
    """Wait until the founder says where it can be joined."""
    until = time.monotonic() + STARTING
    while time.monotonic() < until:
        if process.poll() is not None:
            raise ConfigError(f"the measured daemon ended: {log.read_text()[-500:]}")
        status = await _status(folder)
        if status is not None and status.join:
            return status.join[0]
        await asyncio.sleep(0.2)
    raise ConfigError(f"the measured daemon is not up after {STARTING:.0f} s; see {log}")


async def _status(folder: Path) -> Status | None:
    found = await asyncio.to_thread(client.connect_if_running, folder)
    return None if found is None else await asyncio.to_thread(found.status)


async def _watch(daemon: int, folder: Path, other: Path, serving: "asyncio.Task[int]") -> Speed:
    """Measure the turns that the daemon in `folder` takes while both train."""
    until = time.monotonic() + STARTING
    while (status := await _status(other)) is None or not status.turn:
        if serving.done() or time.monotonic() > until:
            raise ConfigError(f"the other daemon does not train: {status and status.why}")
        await asyncio.sleep(0.5)
    mine = await _status(folder)
    worker = mine.worker.pid if mine is not None and mine.worker.pid is not None else 0
    began, begun = await _next_turn(folder, len(_turns(folder)) + WARM)
    before = _processor(daemon), _processor(worker)
    ended, end = await _next_turn(folder, begun + TURNS)
    after = _processor(daemon), _processor(worker)
    answers = await asyncio.to_thread(_asked, folder)
    turns = _turns(folder)[begun:end]
    status = await _status(other)
    if status is None or not status.neighbours:
        raise ConfigError("the two daemons lost each other while they were measured")
    median = statistics.median(STEPS / turn["seconds"] for turn in turns)
    wall = STEPS * len(turns) / (ended - began)
    return Speed(median, wall, after[0] - before[0], after[1] - before[1], answers)


def _asked(folder: Path) -> tuple[float, ...]:
    """Return how long each answer of `/status` took, in ms, a connection for each."""
    daemon, took = client.from_file(folder), []
    if daemon is None:
        raise ConfigError(f"the measured daemon is gone; see {folder.parent}")
    for _ in range(ASKED):
        began = time.perf_counter()
        daemon.status()
        took.append((time.perf_counter() - began) * 1000)
        time.sleep(0.02)
    return tuple(took)


async def _next_turn(folder: Path, count: int) -> tuple[float, int]:
    """Wait until so many turns were taken; return when it was, and how many they are."""
    until = time.monotonic() + STARTING
    while len(_turns(folder)) < count:
        if time.monotonic() > until:
            raise ConfigError(f"the measured daemon takes no turns; see {folder.parent}")
        await asyncio.sleep(0.02)
    return time.perf_counter(), len(_turns(folder))


def _turns(folder: Path) -> list[dict[str, Any]]:
    try:
        text = (folder / "metrics.jsonl").read_text("utf-8")
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


# ---------------------------------------------------------------- cores


def _processor(pid: int) -> float:
    """Return the processor seconds that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text("utf-8").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _cores() -> tuple[set[int], set[int]]:
    """Return the core of the peer that is measured, and the cores of the other."""
    cores = sorted(os.sched_getaffinity(0))
    return ({cores[0]}, set(cores[1:])) if len(cores) > 1 else (set(cores), set(cores))


@contextlib.contextmanager
def _pinned(cores: set[int]) -> Iterator[None]:
    """Let this process, and what it starts meanwhile, run on these cores."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
