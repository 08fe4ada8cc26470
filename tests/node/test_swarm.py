"""`shoal swarm`: its arithmetic, and its care for the processes it starts (with stand-ins)."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import msgspec
import pytest

from shoal.node import cli, shipped, swarm, table
from shoal.node.commands import swarm as command
from shoal.node.config import to_toml
from shoal.node.errors import ConfigError
from shoal.node.status import Frontier, Sockets, State, Status, Worker

STAND_IN = Path(__file__).parents[1] / "support" / "stand_in.py"
RUN = {
    "run": {"name": "stand-in", "turns": 40},
    "task": {"name": "text", "model": {"layers": 2, "rate": 0.5, "names": ["a", 'b"']}},
    "swarm": {"admission": "open"},
}


def status(**fields: object) -> Status:
    base = Status(
        version="0",
        peer="12D3KooWabcdef",
        run="00",
        name="stdlib-bytes",
        state=State.FINISHED,
        steps=1200,
        parameters=124_000,
        evaluation=2.08,
        measured=True,
        unit="bits per byte",
        sockets=Sockets(bytes_out=3_000_000),
        published_bytes=900_000,
        frontier=Frontier(hash="aa"),
        fingerprint="bb",
    )
    return msgspec.structs.replace(base, **fields)


# ---------------------------------------------------------------- the run file and the plan


def test_the_run_file_is_adapted_to_the_swarm_and_nothing_else_changes() -> None:
    adapted = swarm.adapt(RUN, peers=8, turns=3, secret=True)
    assert adapted["swarm"] == {"admission": "secret", "min_peers": 8}
    assert adapted["run"] == {"name": "stand-in", "turns": 3}
    assert adapted["task"] == RUN["task"]
    assert RUN["swarm"] == {"admission": "open"}, "the caller's tables stay as they were"
    assert tomllib.loads(to_toml(adapted)) == adapted


def test_what_is_wrong_in_a_run_file_is_left_for_those_who_check_it() -> None:
    odd = {"rnu": {"name": 'x"\n'}, "seed": 7}
    adapted = swarm.adapt(odd, peers=2)
    assert tomllib.loads(to_toml(adapted)) == {**odd, "swarm": {"min_peers": 2}}


def test_the_shipped_run_files_are_found_by_name() -> None:
    assert {"digits", "text"} <= set(shipped.names())
    for name in shipped.names():
        assert swarm.read_run(name)["task"]["name"]


def test_threads_never_exceed_the_cores() -> None:
    assert [swarm.threads_each(2, n) for n in (1, 2, 4, 64)] == [2, 1, 1, 1]
    assert swarm.threads_each(64, 4) == 16


def plan(directory: Path, peers: int = 4, **fields: object) -> swarm.Plan:
    return swarm.Plan(
        run=swarm.adapt(RUN, peers=peers), directory=directory, peers=peers, threads=1, **fields
    )


def test_the_first_founds_and_the_others_join_on_shards_of_their_own(tmp_path: Path) -> None:
    four = plan(tmp_path, extra=("--device", "cpu"))
    lines = [four.argv(0, None), *(four.argv(index, "/ip4/x") for index in (1, 2, 3))]
    assert lines[0][3:5] == ["start", str(tmp_path / "run.toml")]
    assert all(line[3:5] == ["join", "/ip4/x"] for line in lines[1:])
    shards = [line[line.index("--shard") + 1] for line in lines]
    assert shards == ["0/4", "1/4", "2/4", "3/4"]
    assert len({line[line.index("--dir") + 1] for line in lines}) == 4
    assert all(line[-2:] == ["--device", "cpu"] for line in lines)


def test_the_daemons_flags_are_ones_that_start_and_join_know(tmp_path: Path) -> None:
    parser = cli.build()
    secretive = plan(
        tmp_path, secret=tmp_path / "secret", extra=("--data", "/d", "--allow-task", "a.b:C")
    )
    for index, join in ((0, None), (1, "/ip4/x")):
        args = parser.parse_args(secretive.argv(index, join)[3:])
        assert args.paused
        assert args.secret_file == tmp_path / "secret"
        assert args.parent == os.getpid()


def test_what_it_says_to_type_elsewhere_works_where_no_environment_is_active(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    typed = command.join_command(plan(tmp_path), "ADDRESS")
    assert typed.endswith("/shoal join ADDRESS")
    assert os.access(typed.split()[0], os.X_OK)
    (tmp_path / "shoal").touch(mode=0o755)
    assert command.join_command(plan(tmp_path), "ADDRESS") == "shoal join ADDRESS"


def test_it_says_to_join_with_what_a_peer_needs_and_nothing_else(tmp_path: Path) -> None:
    extra = ("--data", "/my texts", "--device", "cuda:0", "--allow-task", "a.b:C")
    typed = command.join_command(plan(tmp_path, secret=tmp_path / "s", extra=extra), "ADDRESS")
    args = cli.build().parse_args(shlex.split(typed)[1:])
    assert args.addresses == ["ADDRESS"]
    assert (args.data, args.allow_task, args.device) == ("/my texts", "a.b:C", None)
    assert args.secret_file == tmp_path / "s"


def test_a_new_directory_is_made_beside_older_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert swarm.new_directory(None, "run").name == "swarm-run"
    assert swarm.new_directory(None, "run").name == "swarm-run-2"
    asked = swarm.new_directory(Path("deep/er"), "run")
    assert swarm.new_directory(Path("deep/er"), "run") == asked, "an empty one may be used"
    (asked / "x").touch()
    with pytest.raises(ConfigError, match="not empty"):
        swarm.new_directory(Path("deep/er"), "run")


# ---------------------------------------------------------------- the arithmetic


def test_the_reference_is_ring_all_reduce_of_float32_gradients() -> None:
    assert swarm.reference_bytes(4, 124_000, 1200) == 2 * 3 / 4 * 4 * 124_000 * 1200
    assert swarm.reference_bytes(1, 124_000, 1200) == 0


def test_the_summary_compares_what_left_the_sockets_with_the_reference() -> None:
    rows: list[Status | None] = [status(), status(sockets=Sockets(bytes_out=5_000_000))]
    summary = swarm.summarize(rows, before=8.0, alone=2.2, seconds=90)
    assert summary.sent == 4_000_000
    assert summary.reference == 4 * 124_000 * 1200
    assert summary.fewer == pytest.approx(148.8)
    assert summary.fewer_by_payload == pytest.approx(661.33, abs=0.01)
    text = "\n".join(command.report(summary))
    assert "8.000 before, 2.080 after" in text
    assert "together 0.120 lower" in text
    assert "149 × fewer" in text
    assert "all 2 equal" in text


def test_one_peer_alone_has_no_reference() -> None:
    summary = swarm.summarize([status()], before=None, alone=None, seconds=1)
    assert summary.fewer is None
    assert "– fewer" in "\n".join(command.report(summary))


def test_a_tiny_model_that_cost_more_is_said_to() -> None:
    assert command._saving(0.25) == "4.0 × more"
    assert command._saving(25.0) == "25 × fewer"


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (status(fingerprint="cc"), "they DIFFER"),
        (status(fingerprint="cc", lag=1), "not comparable"),  # it holds what it has not applied
        (status(fingerprint="cc", frontier=Frontier(hash="dd")), "not comparable"),
        (status(frontier=Frontier(hash="dd")), "not comparable"),
        (status(fingerprint=""), "not comparable"),
        (status(fingerprint="", frontier=Frontier()), "not comparable"),
    ],
)
def test_models_are_one_only_when_frontier_and_fingerprint_are(other: Status, said: str) -> None:
    assert swarm.one_model([status(), status(), None])
    assert not swarm.one_model([status(), other])
    assert not swarm.one_model([other, status()])
    summary = swarm.summarize([status(), other], before=1, alone=None, seconds=1)
    assert said in command.report(summary)[-1]
    assert summary.differ == (said == "they DIFFER")
    assert not summary.equal


def test_nothing_known_is_not_one_model() -> None:
    assert not swarm.one_model([])
    assert not swarm.one_model([None])
    assert not swarm.one_model([status(fingerprint="", frontier=Frontier())] * 2)


def test_a_silent_peer_is_told_even_when_the_others_agree() -> None:
    summary = swarm.summarize([status(), None, status()], before=1, alone=None, seconds=1)
    assert summary.equal
    assert "1 of 3 peers did not answer" in "\n".join(command.report(summary))


def test_what_was_measured_before_the_end_is_not_told_as_the_end() -> None:
    rows = [status(), status(evaluation=9.1, measured=False), None]
    assert swarm.summarize(rows, before=1, alone=None, seconds=1).after == 2.08
    assert swarm.summarize(rows[1:], before=1, alone=None, seconds=1).after is None


class Scripted:
    """Stands in for a swarm: what is seen at each look, the last one for ever."""

    def __init__(self, *looks: list[Status | None], living: Sequence[int] = (0, 1)) -> None:
        self.looks, self.seen, self.indices = looks, 0, living

    def look(self) -> list[Status | None]:
        self.seen += 1
        return self.looks[min(self.seen, len(self.looks)) - 1]

    def living(self) -> list[SimpleNamespace]:
        return [SimpleNamespace(index=index) for index in self.indices]


class Blank:
    def show(self, rows: list[Status | None], elapsed: float) -> None:
        pass


@pytest.mark.parametrize("unit", ["bits per byte", "accuracy"])
def test_before_and_after_are_the_same_look(monkeypatch: pytest.MonkeyPatch, unit: str) -> None:
    monkeypatch.setattr(command, "INTERVAL", 0.0)
    worker = Worker(pid=7)
    quick = status(worker=worker, measured=False, evaluation=9.35, first_evaluation=9.35, unit=unit)
    none = status(worker=worker, measured=False, evaluation=None)
    thorough = status(worker=worker, evaluation=9.3, first_evaluation=9.3, unit=unit)
    scripted = Scripted([none, none], [quick, none], [quick, thorough])
    rows = command._known_at_first(cast(swarm.Swarm, scripted))
    assert scripted.seen == 3
    assert command.first_evaluation(rows) == 9.3
    assert command.first_evaluation([quick, None]) is None


def test_nobody_waits_for_a_measure_that_nobody_can_make(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "INTERVAL", 0.0)
    scripted = Scripted([status(measured=False), None])
    command._known_at_first(cast(swarm.Swarm, scripted))
    assert scripted.seen == 1


def test_an_update_on_its_way_at_the_end_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "INTERVAL", 0.0)
    one = status(worker=Worker(pid=7))
    further = status(worker=Worker(pid=7), fingerprint="cc", frontier=Frontier(hash="dd"))
    scripted = Scripted([one, further], [further, further])
    seen = cast(swarm.Swarm, scripted)
    rows = command._measured(seen, [one, further], Blank(), 1.0, one=True)  # type: ignore[arg-type]
    assert swarm.one_model(rows)
    rows = command._measured(seen, [one, further], Blank(), 1.0, one=False)  # type: ignore[arg-type]
    assert rows == [one, further], "where there was no one model before, none is waited for"


def test_who_has_ended_does_not_answer_and_holds_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "INTERVAL", 0.0)
    measuring = status(worker=Worker(pid=7), measured=False, evaluation=9.0)
    done = status(worker=Worker(pid=7))
    seen = cast(swarm.Swarm, Scripted([measuring, None], [done, None], living=[0]))
    rows = command._measured(seen, [measuring] * 2, Blank(), 1.0, one=True)  # type: ignore[arg-type]
    assert rows == [done, None]
    busy = cast(swarm.Swarm, Scripted([None, done], living=[0, 1]))
    assert command.last_known([measuring, None], busy) == [measuring, done]


def test_only_who_has_a_worker_is_waited_for() -> None:
    assert swarm.measured([status(worker=Worker(pid=7)), None, status(measured=False)])
    assert not swarm.measured([status(), status(measured=False, worker=Worker(pid=7))])


def test_done_means_that_everybody_who_answers_is() -> None:
    done = frozenset({State.FINISHED})
    assert swarm.finished([status(), None], done)
    assert not swarm.finished([status(), status(state=State.TRAINING)], done)
    assert not swarm.finished([None], done)


# ---------------------------------------------------------------- tables


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (999.6, "1.0 kB"),
        (9_949, "9.9 kB"),
        (9_960, "10 kB"),
        (123_456_789, "123 MB"),
        (5e12, "5.0 TB"),
    ],
)
def test_sizes_are_told_in_two_or_three_digits(value: float, text: str) -> None:
    assert table.size(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        (0.0004, "0 ms"),
        (0.35, "350 ms"),
        (59.4, "59 s"),
        (185, "3:05 min"),
        (7620, "2:07 h"),
    ],
)
def test_durations_are_told_in_the_unit_that_fits(value: float | None, text: str) -> None:
    assert table.seconds(value) == text


def shown(renderable: object) -> str:
    from rich.console import Console

    console = Console(width=160, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    with console.file:
        console.print(renderable)
        return console.export_text()


def test_the_table_shows_every_daemon_and_marks_one_model() -> None:
    rows: list[Status | None] = [status(turn=10, turns=40), status(turn=40, turns=40)]
    text = shown(table.daemons(rows, "bits per byte", ["a footer"]))
    assert "10/40" in text
    assert "━━━─────────" in text
    assert text.count("bb =") == 2
    assert "a footer" in text
    assert "silent" in shown(table.daemons([None, status()], "", []))


def test_the_plain_line_holds_the_range_of_turns_and_the_means() -> None:
    rows: list[Status | None] = [
        status(turn=3, turns=40, loss=2.0),
        status(turn=5, turns=40, loss=3.0, fingerprint="cc"),
        None,
    ]
    text = table.line(rows, "bits per byte", 12.0)
    assert "12 s  2 peers  turn 3-5/40  loss 2.500  bits per byte 2.080  sent 6.0 MB in all" in text
    assert "2 models in flight" in text
    assert "one model" in table.line([status(), status()], "", 1.0)
    unknown = status(fingerprint="")
    for rows in ([unknown], [unknown] * 2, [unknown, status()]):
        assert "not all have a model" in table.line(rows, "", 1.0)
    assert "nobody answers" in table.line([None], "", 1.0)


def test_the_overview_shows_peers_and_what_is_wrong() -> None:
    from shoal.node.status import PeerRow

    one = status(
        state=State.DEGRADED, why="log full", join=("/ip4/192.0.2.1/x",), warnings=("clock [x]",)
    )
    rows = [
        PeerRow(id="12D3KooWabcdef", me=True, standing="degraded", turn=3),
        PeerRow(id="12D3KooWuvwxyz", state="failed", standing="training", agrees=False),
    ]
    assert "0 B" not in shown(table._peers(one, rows)), "what nobody said is not nothing"
    text = "".join(map(shown, table.overview(one, rows)))
    assert "degraded: log full" in text
    assert "join: shoal join /ip4/192.0.2.1/x" in text
    assert "abcdef *" in text
    assert "failed" in text
    assert "DIFFERS" in text
    assert "warning: clock [x]" in text


# ---------------------------------------------------------------- the processes


@pytest.fixture
def manners(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Let stand-ins be started in place of daemons, with these manners."""

    def use(*names: str) -> None:
        def argv(self: swarm.Plan, index: int, join: str | None) -> list[str]:
            return [sys.executable, str(STAND_IN), str(self.folder(index)), names[index]]

        monkeypatch.setattr(swarm.Plan, "argv", argv)

    return use


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z"
    except (FileNotFoundError, ProcessLookupError):  # the latter while it is read
        return True


def in_directory(tmp_path: Path, *flags: str) -> list[str]:
    run = tmp_path / "stand-in.toml"
    run.write_text(to_toml(RUN))
    return ["swarm", str(run), "--dir", str(tmp_path / "swarm"), *flags]


@pytest.mark.real
def test_a_swarm_ends_with_a_summary_and_no_process(
    tmp_path: Path, manners: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    manners("good", "good", "good")
    assert cli.main(in_directory(tmp_path, "--peers", "3")) == 0
    out = capsys.readouterr().out
    assert "shoal join /ip4/127.0.0.1/tcp/1/p2p/peer-1/run/00" in out
    assert "bits per byte: 3.500 before, 3.100 after" in out
    assert "all 3 equal (f4)" in out
    summary = json.loads((tmp_path / "swarm" / "summary.json").read_bytes())
    assert summary["equal"] is True
    assert summary["steps"] == 120
    for number in (1, 2, 3):
        assert (tmp_path / "swarm" / f"peer-{number}" / "left-cleanly").exists()
        assert "turn 4" in (tmp_path / "swarm" / f"peer-{number}.log").read_text()


@pytest.mark.real
def test_different_models_end_with_exit_code_1(
    tmp_path: Path,
    manners: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(command, "SETTLING", 1.0)
    manners("good", "other")
    assert cli.main(in_directory(tmp_path, "--peers", "2")) == 1
    assert "DIFFER" in capsys.readouterr().out


@pytest.mark.real
def test_a_daemon_that_dies_is_named_with_its_last_line_and_the_others_go_on(
    tmp_path: Path, manners: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    manners("good", "late", "good")
    assert cli.main(in_directory(tmp_path, "--peers", "3")) == 1
    out = capsys.readouterr().out
    assert "peer 2 ended with 7: MemoryError: out of memory" in out
    assert "1 of 3 peers did not answer at the end; the others are equal" in out


@pytest.mark.real
@pytest.mark.parametrize(
    ("manner", "said"),
    [
        ("early", "peer 2 ended with 1: Traceback: something broke"),
        ("refuses", "shoal: --data /nowhere does not exist; name a folder of text"),
    ],
)
def test_a_daemon_that_cannot_start_ends_the_swarm_with_its_reason(
    tmp_path: Path,
    manners: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
    manner: str,
    said: str,
) -> None:
    manners("good", manner)
    assert cli.main(in_directory(tmp_path, "--peers", "2")) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert (tmp_path / "swarm" / "peer-1" / "left-cleanly").exists()


@pytest.mark.real
def test_a_run_that_its_founder_refuses_leaves_no_directory(
    tmp_path: Path, manners: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    manners("refuses", "good")
    assert cli.main(in_directory(tmp_path, "--peers", "2")) == 2
    assert "--data /nowhere does not exist" in capsys.readouterr().err
    assert not (tmp_path / "swarm").exists()


def test_a_bad_run_file_is_refused_by_its_own_name_before_there_is_a_directory(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = tmp_path / "bad.toml"
    bad.write_text(to_toml({**RUN, "run": {"name": "x", "turnz": 3}}))
    assert cli.main(["swarm", str(bad), "--dir", str(tmp_path / "swarm")]) == 2
    said = capsys.readouterr()
    assert said.err.startswith(f"shoal: {bad}: unknown key 'turnz'")
    assert not said.out
    assert list(tmp_path.iterdir()) == [bad]


@pytest.mark.real
def test_a_deaf_daemon_is_killed_with_its_worker(
    tmp_path: Path, manners: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(swarm, "ENDING", 0.5)
    manners("deaf", "good")
    assert cli.main(in_directory(tmp_path, "--peers", "2")) == 0
    worker = int((tmp_path / "swarm" / "peer-1" / "worker.pid").read_text())
    until = time.monotonic() + 120
    while not gone(worker):
        assert time.monotonic() < until
        time.sleep(0.05)


DRIVER = """
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import cast
from shoal.node import cli, swarm
swarm.Plan.argv = lambda self, index, join: [
    sys.executable, {stand_in!r}, str(self.folder(index)), "good"]
swarm.Swarm.begin = lambda self: None  # they stay paused: the swarm waits for ever
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.real
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupted_swarm_leaves_no_process_behind(tmp_path: Path, number: int) -> None:
    code = DRIVER.format(stand_in=str(STAND_IN))
    argv = [sys.executable, "-c", code, *in_directory(tmp_path, "--peers", "2")]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    with process.stdout as out:
        while "shoal join" not in out.readline():
            assert process.poll() is None
        time.sleep(0.3)
        process.send_signal(number)
        assert process.wait(120) == 130
    for peer in (1, 2):
        assert (tmp_path / "swarm" / f"peer-{peer}" / "left-cleanly").exists()


@pytest.mark.real
@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's death signal is Linux'")
def test_a_daemon_ends_with_its_parent_however_that_dies() -> None:
    child = "import os, sys, time; from shoal.node.swarm import end_with_parent; "
    child += "end_with_parent(int(sys.argv[1])); print(os.getpid(), flush=True); time.sleep(600)"
    parent = (
        "import os, subprocess, sys, time\n"
        f"subprocess.Popen([sys.executable, '-c', {child!r}, str(os.getpid())])\n"
        "time.sleep(600)"
    )
    process = subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    with process.stdout as out:
        pid = int(out.readline())
    process.kill()
    process.wait()
    until = time.monotonic() + 120
    while not gone(pid):
        assert time.monotonic() < until
        time.sleep(0.05)
