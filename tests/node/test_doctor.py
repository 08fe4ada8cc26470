"""What `shoal doctor` says: one line each, with the remedy, and the exit code."""

import json
import os
import resource
import shutil
import socket
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest

import shoal.training
from shoal.node import addresses, checkup, cli, identity, probe
from shoal.node.checkup import OK, PROBLEM, WARNING, Finding
from shoal.node.config import NodeConfig

DIGITS = next(Path(p) / "runs" / "digits.toml" for p in shoal.training.__path__)
TORCH = {
    "version": "2.13.0",
    "threads": 2,
    "cuda": [],
    "cuda_build": None,
    "muon": True,
    "device": "cpu",
    "works": True,
}
TRIAL = {
    "quorum": 0,
    "parameters": 1_000_000,
    "kind": "dense",
    "payload": 200_000,
    "most": 210_000,
    "step_seconds": 0.1,
    "encode_seconds": 0.1,
    "apply_seconds": 0.01,
    "steps": 30,
    "participation": 1.0,
}
Answers = dict[str, dict[str, Any]]
Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> Answers:
    """What the child processes say, and a machine with room; tests change it."""
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**13, 0, 10**13))
    monkeypatch.setattr(resource, "getrlimit", lambda _: (4096, 4096))
    said: Answers = {"torch": dict(TORCH), "libp2p": {"state": "running"}, "run": dict(TRIAL)}
    monkeypatch.setattr(probe, "ask", lambda what, **given: said[what])
    return said


def examined(path: Path, **given: object) -> dict[str, list[Finding]]:
    about = checkup.Subject(path, config=NodeConfig(listen="127.0.0.1:0").merged(given))
    found: dict[str, list[Finding]] = {}
    for finding in checkup.examine(about)[0]:
        found.setdefault(finding.name, []).append(finding)
    return found


def bad(found: dict[str, list[Finding]]) -> list[Finding]:
    return [f for each in found.values() for f in each if f.state == PROBLEM]


def test_a_healthy_machine_has_no_problem(answers: Answers, tmp_path: Path) -> None:
    found = examined(tmp_path)
    assert bad(found) == []
    assert {"python", "torch", "device", "disk", "files", "port", "addresses", "libp2p"} <= set(
        found
    )


def test_every_problem_and_warning_names_a_remedy(
    answers: Answers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers["torch"] |= {"works": False, "why": "CUDA driver too old", "device": "cuda"}
    answers["libp2p"] = {"state": "off: libp2p is not installed; pip install 'shoal[libp2p]'"}
    monkeypatch.setattr(resource, "getrlimit", lambda _: (100, 100))
    monkeypatch.setattr(addresses, "machine", lambda: ["127.0.0.1"])
    found = examined(tmp_path, listen=":0")
    complaints = [f for each in found.values() for f in each if f.state != OK]
    assert {f.name for f in complaints} == {"device", "libp2p", "files", "addresses"}
    assert all(f.remedy for f in complaints)


def test_a_port_in_use_is_a_problem_and_a_free_one_is_not(answers: Answers, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        where = f"127.0.0.1:{other.getsockname()[1]}"
        [finding] = examined(tmp_path, listen=where)["port"]
        assert finding.state == PROBLEM
        assert f"{where} is in use" in finding.text
        assert "--listen" in finding.remedy
    assert examined(tmp_path, listen=where)["port"][0].state == OK


def test_an_address_of_another_machine_cannot_be_listened_on(
    answers: Answers, tmp_path: Path
) -> None:
    [finding] = examined(tmp_path, listen="203.0.113.77:7464")["port"]
    assert finding.state == PROBLEM
    assert "address of this machine" in finding.remedy


@pytest.mark.parametrize(
    ("change", "name", "state", "part"),
    [
        ({"error": "No module named 'torch'"}, "torch", PROBLEM, "No module named"),
        ({"muon": False, "version": "2.4.0"}, "torch", PROBLEM, "too old"),
        ({"works": False, "why": "no kernel image"}, "device", PROBLEM, "no kernel image"),
        ({"cuda": ["H200"], "device": "cuda"}, "device", OK, "H200"),
    ],
)
def test_what_torch_says(
    answers: Answers, tmp_path: Path, change: dict[str, Any], name: str, state: str, part: str
) -> None:
    answers["torch"] |= change
    [finding] = examined(tmp_path)[name]
    assert finding.state == state
    assert part in finding.text


@pytest.mark.parametrize(
    ("free", "state"), [(10**12, OK), (8 << 30, WARNING), (100 << 20, PROBLEM)]
)
def test_disk_is_measured_against_what_the_log_may_take(
    answers: Answers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int, state: str
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(free, 0, free))
    [finding] = examined(tmp_path / "not" / "yet" / "made")["disk"]
    assert finding.state == state
    assert (finding.remedy == "") == (state == OK)


def test_a_directory_that_cannot_be_written_is_a_problem(
    answers: Answers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Asked, not tried: root, who runs tests in a container, may write everywhere.
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    [finding] = examined(tmp_path)["disk"]
    assert finding.state == PROBLEM
    assert "--dir" in finding.remedy


@pytest.mark.parametrize(
    ("limits", "state", "remedy"),
    [
        ((1024, 4096), OK, ""),
        ((resource.RLIM_INFINITY, resource.RLIM_INFINITY), OK, ""),
        ((512, 4096), WARNING, "ulimit"),
        ((128, 4096), PROBLEM, "ulimit"),
        ((128, 128), PROBLEM, "limits.conf"),
    ],
)
def test_few_open_files(
    answers: Answers,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    limits: tuple[int, int],
    state: str,
    remedy: str,
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: limits)
    [finding] = examined(tmp_path)["files"]
    assert finding.state == state
    assert remedy in finding.remedy


def test_a_key_file_open_to_others_is_a_problem(answers: Answers, tmp_path: Path) -> None:
    path = tmp_path / "identity.key"
    assert "identity" not in examined(tmp_path)
    identity.create(path)
    [finding] = examined(tmp_path)["identity"]
    assert finding.state == OK
    assert str(identity.load(path)) in finding.text
    path.chmod(0o644)
    [finding] = examined(tmp_path)["identity"]
    assert finding.state == PROBLEM
    assert "chmod 600" in finding.text


def test_a_named_key_file_must_exist(answers: Answers, tmp_path: Path) -> None:
    [finding] = examined(tmp_path, identity=tmp_path / "nowhere.key")["identity"]
    assert finding.state == PROBLEM


def test_a_damaged_genesis_is_a_problem_and_the_rest_goes_on(
    answers: Answers, tmp_path: Path
) -> None:
    (tmp_path / "genesis").write_bytes(b"not a genesis")
    found = examined(tmp_path)
    assert [f.name for f in bad(found)] == ["directory"]


def test_loopback_alone_is_a_warning_unless_an_address_is_told(
    answers: Answers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(addresses, "machine", lambda: ["127.0.0.1", "::1"])
    [finding] = examined(tmp_path, listen=":0")["addresses"]
    assert finding.state == WARNING
    told = ["/dns4/me.example/tcp/7464"]
    assert examined(tmp_path, listen=":0", advertise=told)["addresses"][0].state == OK
    [finding] = examined(tmp_path, advertise=["me.example:7464"])["addresses"]
    assert finding.state == PROBLEM


def test_without_libp2p_it_warns_and_exits_well(
    answers: Answers, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answers["libp2p"] = {"state": "off: libp2p is not installed; pip install 'shoal[libp2p]'"}
    assert cli.main(["doctor", "--listen", "127.0.0.1:0"]) == 0
    shown = capsys.readouterr().out
    assert "warning  libp2p: off: libp2p is not installed -> pip install 'shoal[libp2p]'" in shown


# ---------------------------------------------------------------- with a run


def test_the_estimate_is_the_arithmetic_of_the_design() -> None:
    it = checkup.estimated(TRIAL, 4)
    assert it.turn_seconds == pytest.approx(30 * 0.1 + 0.1 + 3 * 0.01)
    sent = 3 * (200_000 + checkup.RECORD_BYTES)
    assert it.received_per_second == pytest.approx(sent / it.turn_seconds)
    # 2(N-1)/N · 4 · parameters · steps against what each peer sends in the same turn.
    assert it.all_reduce == pytest.approx(1.5 * 4e6 * 30 / sent)
    assert it.decoding == pytest.approx(0.03 / it.turn_seconds)


def test_who_is_not_drawn_for_a_turn_sends_nothing_in_it() -> None:
    it, all_publish = (checkup.estimated(TRIAL | {"participation": p}, 4) for p in (0.25, 1.0))
    assert it.all_reduce == pytest.approx(4 * all_publish.all_reduce)
    assert it.decoding * it.turn_seconds == pytest.approx(3 * 0.01 / 4)


TINY = {
    "run": {"name": "x", "turns": 99},
    "task": {"name": "digits", "width": 4},
    "local": {"steps": 30, "batch": 2, "optimizer": {"name": "sgd", "lr": 0.1}},
    "swarm": {"min_peers": 2},
}
DENSE = {"kind": "dense", "levels": 3}
SLOPES = {"kind": "scalar", "directions": "own", "perturbations": 16}


def trial(update: Any, **local: object) -> dict[str, Any]:
    tables = TINY | {"exchange": {"update": update}, "local": {**TINY["local"], **local}}
    return probe.run_here(tables, 2, "", "cpu", "")


def test_steps_are_those_that_turns_of_the_run_take() -> None:
    assert trial(DENSE)["steps"] == 30
    assert trial(SLOPES)["steps"] == 16, "one for each slope, whatever local.steps says"
    by_time = {"steps": 0, "turn_seconds": 8e4, "min_steps": 2, "max_steps": 70}
    assert trial(DENSE, **by_time)["steps"] == 70


def test_kinds_that_take_turns_are_told_together() -> None:
    both, dense, slopes = trial([DENSE | {"every": 5}, SLOPES]), trial(DENSE), trial(SLOPES)
    assert both["kind"] == "dense or scalar"
    assert both["steps"] == round((30 + 4 * 16) / 5)
    mean = (dense["payload"] + 4 * slopes["payload"]) / 5
    assert both["payload"] == pytest.approx(mean, rel=0.05)


def test_a_shipped_run_is_known_by_its_name(answers: Answers) -> None:
    about = checkup.subject(Path("digits"), {}, 0)
    assert about.run == checkup.subject(DIGITS, {}, 0).run


@pytest.mark.parametrize(("peers", "problems", "warnings"), [(4, 0, 0), (300, 0, 1), (600, 1, 1)])
def test_a_swarm_too_large_is_said(
    answers: Answers, tmp_path: Path, peers: int, problems: int, warnings: int
) -> None:
    about = checkup.subject(DIGITS, {"listen": "127.0.0.1:0"}, peers)
    findings, estimate = checkup.examine(about)
    mine = [f for f in findings if f.name == "run"]
    assert sum(f.state == PROBLEM for f in mine) == problems
    assert sum(f.state == WARNING for f in mine) == warnings
    assert estimate is not None
    assert estimate.peers == peers


@pytest.mark.parametrize(("quorum", "warned"), [(0, False), (1, True), (2, True), (3, False)])
def test_a_quorum_that_one_peer_decides_is_said(
    answers: Answers, quorum: int, warned: bool
) -> None:
    answers["run"]["quorum"] = quorum
    findings, _ = checkup.examine(checkup.subject(DIGITS, {"listen": "127.0.0.1:0"}, 4))
    said = [f for f in findings if f.state == WARNING and "quorum" in f.text]
    assert bool(said) == warned
    assert all("set swarm.min_peers" in f.remedy for f in said)


def test_the_trial_says_the_quorum_of_rules_that_have_votes() -> None:
    tables = {
        "run": {"name": "x", "turns": 9},
        "task": {"name": "digits"},
        "local": {"steps": 1, "batch": 2},
        "exchange": {"update": {"kind": "scalar", "directions": "common"}},
        "swarm": {"min_peers": 2},
    }
    for rule, quorum in (("median", 2), ({"name": "clip", "quorum": 5}, 5), ("clip_norm", 0)):
        asked = {**tables, "exchange": {**tables["exchange"], "rule": rule}}
        assert probe.run_here(asked, 2, "", "cpu", "")["quorum"] == quorum


def test_a_run_that_cannot_be_trained_here_is_a_problem(
    answers: Answers, capsys: pytest.CaptureFixture[str]
) -> None:
    answers["run"] = {"error": "task 'text': no text in /nowhere"}
    assert cli.main(["doctor", str(DIGITS), "--listen", "127.0.0.1:0", "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] is False
    assert report["estimate"] is None
    assert [f["text"] for f in report["findings"] if f["state"] == PROBLEM] == [
        "task 'text': no text in /nowhere"
    ]


def test_a_run_file_with_an_unknown_key_is_the_operators_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run.toml"
    path.write_text(DIGITS.read_text() + "\n[swarmm]\n")
    assert cli.main(["doctor", str(path)]) == 2
    assert "swarm" in capsys.readouterr().err


# ---------------------------------------------------------------- the child processes themselves


@pytest.mark.real
def test_the_probes_answer_and_leave_no_torch_behind() -> None:
    code = (
        "import json, sys\n"
        "from shoal.node import checkup, probe\n"
        f"from pathlib import Path\nfrom shoal.node.config import RunFile\n"
        f"tables = RunFile.load(Path({str(DIGITS)!r})).tables()\n"
        "found = {'torch': probe.ask('torch', device=''), 'libp2p': probe.ask('libp2p'),\n"
        "  'run': probe.ask('run', tables=tables, members=2, data='', device='cpu',"
        " allow_task='')}\n"
        "found['held'] = [m for m in ('torch', 'libp2p', 'numpy') if m in sys.modules]\n"
        "print(json.dumps(found))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert found["held"] == []
    assert found["torch"]["works"]
    assert found["libp2p"]["state"] == "running" or found["libp2p"]["state"].startswith("off: ")
    assert set(TRIAL) == set(found["run"])
    assert 0 < found["run"]["payload"] <= found["run"]["most"]
    assert checkup.estimated(found["run"], 2).all_reduce > 1


@pytest.mark.real
def test_a_probe_that_fails_says_its_last_line(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "error" in probe.ask("run", tables={}, members=2, data="", device="", allow_task="")
    assert "not_an_argument" in probe.ask("torch", not_an_argument=1)["error"]
    monkeypatch.setitem(probe.LONGEST, "libp2p", 0.01)
    assert "no answer within" in probe.ask("libp2p")["error"]
