"""`shoal compare`: runs side by side, in child processes, with curves of turns and of bytes."""

import argparse
import contextlib
import csv
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from shoal.node import cli, compare
from shoal.node.commands import compare as command
from shoal.node.compare import Point, Result

pytestmark = pytest.mark.sim

RUN = """
[run]
name = "tiny"
turns = 3
[task]
name = "digits"
width = 16
[local]
optimizer = {{ name = "sgd", lr = 0.1 }}
batch = 8
steps = 4
[exchange]
update = {update}
"""
SPARSE = '{ kind = "sparse", density = 0.0625 }'


def write(path: Path, update: str) -> str:
    path.write_text(RUN.format(update=update))
    return str(path)


def test_runs_are_shown_side_by_side(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    files = [write(Path(f"{name}.toml"), SPARSE) for name in ("sparse", "twin")]
    options = ["--peers", "2", "--seeds", "2", "--csv", "a.csv", "--png", "a.png"]
    assert cli.main(["compare", *files, *options]) == 0
    shown = capsys.readouterr()
    assert "2 peers, 2 seeds, 3 turns of 4 steps each, 1,210 parameters" in shown.out
    assert "accuracy held out" in shown.out
    assert "\x1b" not in shown.out
    with Path("a.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(r["run"], r["seed"], r["turn"]) for r in rows] == [
        (name, str(seed), str(turn))
        for name in ("sparse", "twin")
        for seed in range(2)
        for turn in range(4)
    ]
    # The same seed gives the same numbers, another one others.
    numbers = [(r["loss"], r["held_out"], r["published_bytes"]) for r in rows]
    assert numbers[:8] == numbers[8:]
    assert numbers[:4] != numbers[4:8]
    assert all(0 <= float(r["held_out"]) <= 1 for r in rows)
    assert [r["loss"] == "" for r in rows] == [True, False, False, False] * 4
    sent = {r["run"]: float(r["published_bytes"]) for r in rows if r["turn"] == "3"}
    table = {line.split()[0]: line for line in shown.out.splitlines() if line[:6].strip()}
    assert float(re.findall(r"([0-9.]+) ×", table["sparse"])[0]) == pytest.approx(
        # ring all-reduce of float32 gradients of 2 peers in 12 steps, against one other peer
        4 * 1210 * 12 / sent["sparse"],
        rel=0.02,
    )
    assert Path("a.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("argv", "remedy"),
    [
        (["no-such.toml"], "no-such.toml does not exist"),
        (["digits", "--preset", "sparsloco"], "sparseloco"),
        (["digits", "--seeds", "0"], "whole number above zero"),
        (["digits", "--csv", "no/such/folder.csv"], "name another file"),
        (["endless.toml"], "--turns"),
    ],
)
def test_a_mistake_is_found_before_training(
    argv: list[str],
    remedy: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("endless.toml").write_text(RUN.format(update=SPARSE).replace("turns = 3", "turns = 0"))
    assert cli.main(["compare", *argv]) == 2
    said = capsys.readouterr()
    assert remedy in said.err.splitlines()[-1]
    assert not said.out


def test_a_run_that_diverges_fails_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    good = write(Path("good.toml"), SPARSE)
    Path("wild.toml").write_text(RUN.format(update=SPARSE).replace("lr = 0.1", "lr = 1e30"))
    options = ["--peers", "2", "--seeds", "1", "--turns", "4", "--markdown"]
    assert cli.main(["compare", good, "wild.toml", *options]) == 1
    shown = capsys.readouterr().out
    assert re.search(r"^\| good \| [0-9]+ B \|", shown, re.MULTILINE)
    assert "| wild | – | – | – | – | – |" in shown
    assert "wild failed: seed 0: 3 turns in a row were dropped" in shown


@pytest.mark.real
def test_interrupting_ends_the_children(tmp_path: Path) -> None:
    argv = [sys.executable, "-m", "shoal.node.cli", "compare", "digits", "--jobs", "2"]
    argv += ["--turns", "9999"]
    process = subprocess.Popen(argv, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        assert "3 trainings" in process.stderr.readline()
        until = time.monotonic() + 120
        while len(children := descendants(process.pid)) < 2 and time.monotonic() < until:
            time.sleep(0.05)
        assert len(children) == 2
        process.send_signal(signal.SIGINT)
        assert process.wait(120) == cli.INTERRUPTED
        # One that was being started at that moment ends when it sees that its parent is gone.
        until = time.monotonic() + 120
        while not all(map(gone, children)):
            assert time.monotonic() < until
            time.sleep(0.05)
    finally:
        process.kill()
        process.communicate()


@pytest.mark.real
def test_an_interrupt_counts_whichever_thread_it_reaches(tmp_path: Path) -> None:
    code = f"""
        import contextlib, signal, sys, threading, time
        from pathlib import Path
        from shoal.node import cli

        def press():
            while len(list(children())) < 2:
                time.sleep(0.05)
            signal.pthread_kill(threading.get_ident(), signal.SIGINT)

        def children():
            for path in Path("/proc/self/task").glob("*/children"):
                with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                    yield from path.read_text().split()

        threading.Thread(target=press, daemon=True).start()
        found = cli.main(["compare", "digits", "--jobs", "2", "--turns", "9999"])
        sys.exit(found != {cli.INTERRUPTED})
    """
    argv = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(argv, cwd=tmp_path, capture_output=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr.decode()


def descendants(parent: int) -> list[int]:
    """Return the children that its threads have started; a thread may end while we look."""
    found: list[int] = []
    for path in Path(f"/proc/{parent}/task").glob("*/children"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            found += map(int, path.read_text().split())
    return found


def gone(pid: int) -> bool:
    """Tell whether it has ended; whoever inherited it need not have noticed."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def test_means_and_spread_are_over_the_seeds_that_came_to_the_end() -> None:
    def one(seed: int, after: float, failed: str = "") -> Result:
        points = (Point(0, None, 2.0, 0), Point(1, 1.0 + seed, after, 50 + seed))
        plain = {"peers": 3, "parameters": 100, "steps": 10.0, "before": 2.0, "after": after}
        return Result(name="a", seed=seed, failed=failed, points=points, **plain)  # type: ignore[arg-type]

    results = [one(0, 1.0), one(1, 3.0), one(2, 99.0, "it broke")]
    (row,) = compare.rows(results)
    assert row.after is not None
    assert (row.after.mean, row.after.deviation) == pytest.approx((2.0, 2**0.5))
    assert row.per_turn == row.published == 50.5
    assert row.failed == "seed 2: it broke"
    # 2 · 2/3 · 4 bytes · 100 parameters · 10 steps, against two copies of each payload
    assert row.fewer == pytest.approx(sum(16000 / 3 / (2 * b) for b in (50, 51)) / 2)
    curve = {"a": [Point(0, None, 2.0, 0), Point(1, 1.5, 2.0, 50.5)]}
    assert compare.curves(results) == curve
    none = Result(name="b", seed=0, failed="it broke")
    assert compare.curves([*results, none]) == curve, "there is nothing to draw, nor to name"
    panels = command.make_panels([*results, none])
    assert [[line.name for line in panel.lines] for panel in panels] == [["a"], ["a"]]


def test_progress_says_the_measure_of_the_turn_it_names() -> None:
    """What is measured before a turn is the model after the one before: as in the curve."""
    recorders = [compare.Recorder(None) for _ in range(2)]
    for place, recorder in enumerate(recorders):
        recorder.turns = {1: (2.0, 9.0, 10), 2: (1.5, 5.0 + place, 20)}
    said = compare._progress(recorders, 2)
    assert said == {"turn": 1, "held_out": 5.5}
    point = compare._points(recorders, final=4.0)[said["turn"]]
    assert point.held_out == said["held_out"]


def test_what_runs_do_not_have_in_common_is_told_of_all() -> None:
    def one(name: str, turns: int, steps: float, parameters: int, unit: str) -> Result:
        points = tuple(Point(turn, 1.0, 2.0, 50.0 * turn) for turn in range(turns + 1))
        plain = {"peers": 3, "parameters": parameters, "steps": steps, "before": 2.0, "after": 1.0}
        return Result(name=name, seed=0, points=points, unit=unit, **plain)  # type: ignore[arg-type]

    results = [one("a", 4, 120.0, 115_008, "bits per byte"), one("b", 30, 300.0, 4_810, "accuracy")]
    args = argparse.Namespace(peers=3, seeds=1, markdown=True)
    setting = command.report(args, compare.rows(results), results)[0]
    assert setting == (
        "3 peers, 1 seed, 4 or 30 turns of 10 or 30 steps each, 4,810 or 115,008 parameters; "
        "before and after: each task's measure held out"
    )
    setting = command.report(args, compare.rows(results[:1]), results[:1])[0]
    assert "4 turns of 30 steps each, 115,008 parameters; before and after: bits" in setting
