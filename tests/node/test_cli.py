"""The command line as a person meets it: quick help, one clear line for every mistake."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from shoal.node import cli, client, foreground, shipped
from shoal.node.errors import ConfigError
from shoal.node.journal import Journal


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """Run a command that must fail; return its one line."""
    assert cli.main(argv) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("shoal: ")
    assert captured.err.count("\n") == 1
    return captured.err


@pytest.mark.parametrize(
    ("argv", "remedy"),
    [
        ([], "COMMAND"),
        (["swarn"], "did you mean swarm?"),
        (["start"], "RUN.toml|DIR"),
        (["start", "x", "--lisen", "0.0.0.0:1"], "did you mean --listen?"),
        (["start", "x", "--listen", "7464"], "HOST:PORT"),
        (["start", "x", "--listen", "0.0.0.0:99999"], "HOST:PORT"),
        (["start", "x", "--libp2p", "on"], "off, or a TCP port"),
        (["start", "x", "--libp2p", "65536"], "off, or a TCP port"),
        (["join", "x", "--libp2p-peer", "/ip4/203.0.113.5/tcp/4001"], "/p2p/12D3KooW"),
        (["start", "x", "--shard", "4/4"], "3/4"),
        (["start", "x", "--threads", "0"], "above zero"),
        (["start", "x", "--limits", "moon"], "wan"),
        (["swarm", "--peers", "-1"], "above zero"),
        (["swarm", "--peers", "1000"], "shoal simulate"),
        (["swarm", "--minutes", "nan"], "above zero"),
        (["swarm", "--minutes", "1", "--turns", "1"], "not allowed with"),
        (["swarm", "no-such.toml"], "no-such.toml does not exist"),
        (["status", "--wach"], "did you mean --watch?"),
        (["bench", "no-such"], "no-such"),
        (["simulate", "no-such.toml"], "no-such.toml"),
    ],
)
def test_a_mistake_is_one_line_with_the_remedy_and_exit_code_2(
    argv: list[str],
    remedy: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert remedy in refused(capsys, *argv)
    assert list(tmp_path.iterdir()) == [], "a refused command leaves nothing behind"


def test_a_run_file_that_is_not_toml_names_the_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("bad.toml").write_text("[run]\nname = \n")
    assert "line 2" in refused(capsys, "swarm", "bad.toml")


def test_an_error_of_many_lines_is_told_in_one(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def find(directory: Path | None) -> Path:
        raise ConfigError("first\n  second")

    monkeypatch.setattr(client, "find", find)
    assert refused(capsys, "status") == "shoal: first second\n"


def test_a_flag_that_is_right_is_not_suggested(capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(capsys, "replay", "x", "--shuffle", "often")
    assert "--shuffle" in said
    assert "did you mean" not in said


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\n"
        "from shoal.node.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'numpy', 'grpc', 'aiohttp', 'rich', 'msgspec', 'cryptography'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=200
    )
    assert "first steps" in done.stdout


def test_every_command_of_the_folder_is_in_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        cli.main(["--help"])
    assert left.value.code == 0
    shown = capsys.readouterr().out
    files = (Path(__file__).parents[2] / "node" / "commands").glob("[a-z]*.py")
    for name in (path.stem for path in files):
        assert f"\n    {name} " in shown


@pytest.mark.parametrize(
    "command",
    [
        "swarm",
        "start",
        "join",
        "status",
        "pause",
        "resume",
        "leave",
        "export",
        "simulate",
        "bench",
        "compare",
    ],
)
def test_every_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        cli.main([command, "--help"])
    assert left.value.code == 0
    assert command in capsys.readouterr().out


@pytest.mark.parametrize("command", ["swarm", "simulate", "compare"])
@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("ef21", "cannot be used with the ledger: keeps state that sender and receivers share"),
        ("scafcom", "cannot be used with the ledger: needs a second shared vector"),
        ("sparsloco", "did you mean 'sparseloco'?"),
    ],
)
def test_a_recipe_that_can_not_be_had_is_refused_with_the_reason(
    command: str,
    name: str,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main([command, "digits", "--preset", name]) == 2
    assert said in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["swarm", "simulate", "compare"])
def test_the_help_names_every_run_file_that_is_shipped(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "1000")  # no name is broken at its hyphen
    with pytest.raises(SystemExit):
        cli.main([command, "--help"])
    shown = capsys.readouterr().out.replace(",", " ").split()
    assert set(shipped.names()) <= set(shown)


def test_version_is_the_installed_one(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["--version"])
    assert capsys.readouterr().out.split() == ["shoal", cli.version()]


@pytest.mark.real
def test_a_reader_that_has_seen_enough_is_no_error() -> None:
    """`shoal --help | head -1`."""
    command = f"{sys.executable} -m shoal.node.cli swarm --help | head -1"
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command],
        env={**os.environ, "LC_ALL": "C"},  # bash would complain of a language that is not there
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.stderr == ""


# ---------------------------------------------------------------- finding the daemon


def run_at(directory: Path, content: object = None) -> Path:
    directory.mkdir(parents=True)
    address = {"host": "127.0.0.1", "port": 9} if content is None else content
    (directory / "status.json").write_text(json.dumps(address))
    (directory / "token").write_text("t\n")
    (directory / "genesis").touch()
    return directory


def test_the_directory_itself_or_the_only_run_below_it_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_at(tmp_path / "only")
    assert client.find(run) == run
    monkeypatch.chdir(tmp_path)
    assert client.find(None).resolve() == run
    monkeypatch.chdir(run)
    assert client.find(None) == run


def test_two_runs_are_named_and_neither_is_guessed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_at(tmp_path / "one")
    run_at(tmp_path / "two")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"2 runs .* one, two"):
        client.find(None)


def test_of_two_runs_the_one_whose_daemon_answers_is_meant(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_at(tmp_path / "one")
    run_at(tmp_path / "two")
    answering = {"two"}
    monkeypatch.setattr(client, "connect_if_running", lambda p: p if p.name in answering else None)
    assert client.find(tmp_path).name == "two"
    answering.add("one")
    with pytest.raises(ConfigError, match=r"2 running runs .* name one of them"):
        client.find(tmp_path)


def test_no_run_names_what_makes_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="shoal start"):
        client.find(tmp_path)


def test_a_daemon_that_is_gone_is_said_to_be(tmp_path: Path) -> None:
    run = run_at(tmp_path / "gone")
    assert client.connect_if_running(run) is None
    with pytest.raises(ConfigError, match="shoal start"):
        client.connect(run)


@pytest.mark.parametrize("content", [[], {"host": "x"}, {"host": "x", "port": "y"}])
def test_a_damaged_address_file_is_named(tmp_path: Path, content: object) -> None:
    run = run_at(tmp_path / "damaged", content)
    with pytest.raises(ConfigError, match=r"status\.json is damaged"):
        client.connect(run)


def test_a_daemon_that_is_frozen_is_not_said_to_be_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_at(tmp_path / "frozen")
    monkeypatch.setattr(client, "TIMEOUT", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = {"host": "127.0.0.1", "port": silent.getsockname()[1], "pid": 1}
        (run / "status.json").write_text(json.dumps(address))
        with pytest.raises(ConfigError, match=r"no answer in 0\.1 s.*status\.json"):
            client.connect(run)


def test_a_line_of_the_log_names_an_events_numbers_as_events_does(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO")
    journal = Journal(8)
    journal.add("published", "12D3KooW", {"turn": 3, "name": "two words"})
    (record,) = caplog.records
    line = foreground.Lines().format(record)
    assert line.endswith(" published peer=12D3KooW turn=3 name='two words'")
