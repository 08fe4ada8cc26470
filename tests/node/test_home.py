"""A peer's directory: locked, never mixed up with another run's, and whole after a crash."""

import json
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from shoal.gossip.limits import Limits
from shoal.gossip.names import PeerId, digest
from shoal.node import home as module
from shoal.node import identity
from shoal.node.config import NodeConfig, RunFile
from shoal.node.errors import ConfigError
from shoal.node.genesis import Genesis, found
from shoal.node.home import Home, Known, for_joiner, move_aside

LIMITS = Limits()


def run_file(**task: Any) -> RunFile:
    tables = {"run": {"name": "tiny"}, "task": {"name": "text"} | task, "local": {"steps": 3}}
    return RunFile.parse(tables, where="run.toml")


def genesis(run: RunFile | None = None, seed: int = 0) -> Genesis:
    tables = (run or run_file()).tables()
    tables["run"] = tables["run"] | {"seed": seed}
    return found(
        tables,
        parameters=5,
        layout=digest(b"l"),
        initial_root=digest(b"r"),
        initial_squares=3,
        most={"dense": 10},
        founder=PeerId(b"f" * 32),
    )


def test_a_directory_keeps_the_run_it_was_made_for(tmp_path: Path) -> None:
    with Home(tmp_path / "run") as home:
        assert home.genesis(LIMITS) is None
        home.keep(genesis(), founded_from=run_file())
    with Home(tmp_path / "run") as home:
        held = home.genesis(LIMITS)
        assert held == genesis()
        home.keep(genesis())
        with pytest.raises(ConfigError, match=r"holds another run .*--dir"):
            home.keep(genesis(seed=1))
        assert home.genesis(LIMITS) == held


@pytest.mark.parametrize("founder", [True, False])
def test_another_run_file_is_refused_with_the_remedy(tmp_path: Path, founder: bool) -> None:
    given = run_file(model={"width": 64})
    filled = run_file(model={"width": 64, "layers": 2}, block=4096)
    with Home(tmp_path / "run") as home:
        home.keep(genesis(filled), founded_from=given if founder else None)
        held = home.genesis(LIMITS)
        assert held is not None
        home.refuse_another_file(held, given, Path("a.toml"))
        for other in (run_file(model={"width": 32}), run_file(model={"heads": 4})):
            with pytest.raises(ConfigError, match=r"another file than b\.toml.*--new"):
                home.refuse_another_file(held, other, Path("b.toml"))


def test_a_directory_in_use_is_refused_with_the_process_id(tmp_path: Path) -> None:
    with Home(tmp_path / "run"):
        with pytest.raises(
            ConfigError, match=f"in use by the daemon with process id {os.getpid()}"
        ):
            Home(tmp_path / "run")
        with pytest.raises(ConfigError, match="in use"):
            move_aside(tmp_path / "run")
    Home(tmp_path / "run").close()


@pytest.mark.real
def test_the_lock_dies_with_its_process(tmp_path: Path) -> None:
    program = f"""
import time
from pathlib import Path
from shoal.node.home import Home
home = Home(Path({str(tmp_path)!r}))
print("locked", flush=True)
time.sleep(60)
"""
    child = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "locked\n"
    with pytest.raises(ConfigError, match=f"process id {child.pid}"):
        Home(tmp_path)
    child.kill()
    child.wait()
    child.stdout.close()
    Home(tmp_path).close()


def test_new_moves_the_old_directory_aside_whole(tmp_path: Path) -> None:
    path = tmp_path / "run"
    assert move_aside(path) is None
    for number in (1, 2):
        with Home(path) as home:
            home.keep(genesis(seed=number))
        assert move_aside(path) == tmp_path / f"run.old-{number}"
        assert not path.exists()
    with Home(tmp_path / "run.old-2") as home:
        assert home.genesis(LIMITS) == genesis(seed=2)


def test_a_directory_that_can_not_be_made_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"can't be used .*--dir"):
        Home(tmp_path / "file" / "run")


def test_a_joiner_gets_a_directory_named_after_it_and_finds_it_again(tmp_path: Path) -> None:
    run = genesis()
    config = NodeConfig()
    home = for_joiner(tmp_path, run.run_file, run.run_id, config)
    me = home.identity(config)
    assert home.path.name == f"tiny-{str(me)[-6:]}"
    home.keep(run)
    second = for_joiner(tmp_path, run.run_file, run.run_id, config)  # the first is in use
    assert second.path != home.path
    second.close()
    home.close()
    again = for_joiner(tmp_path, run.run_file, run.run_id, config)
    assert again.path == home.path
    assert again.identity(config).peer == me.peer
    again.close()
    other = for_joiner(tmp_path, run.run_file, genesis(seed=9).run_id, config)
    assert other.path not in (home.path, second.path)
    other.close()
    assert not list(tmp_path.glob(".*"))


def test_a_named_identity_is_used_and_names_the_directory(tmp_path: Path) -> None:
    key = tmp_path / "my.key"
    identity.create(key)
    config = NodeConfig(identity=str(key))
    run = genesis()
    with for_joiner(tmp_path, run.run_file, run.run_id, config) as home:
        assert home.identity(config).peer == identity.load(key).peer
        assert home.path.name.endswith(str(identity.load(key))[-6:])
        assert not (home.path / "identity.key").exists()
    with Home(tmp_path / "x") as home, pytest.raises(ConfigError, match="does not exist"):
        home.identity(NodeConfig(identity=str(tmp_path / "none.key")))


def test_known_peers_are_remembered_and_bounded(tmp_path: Path) -> None:
    peers = [
        Known(PeerId(bytes([n % 256, n // 256]) * 16), (f"/ip4/10.0.0.1/tcp/{n}",))
        for n in range(module.KNOWN_PEERS + 10)
    ]
    with Home(tmp_path) as home:
        assert home.known_peers() == []
        home.remember_peers(peers)
        assert home.known_peers() == peers[: module.KNOWN_PEERS]
        home.remember_peers(iter(peers[:2]))
        assert home.known_peers() == peers[:2]


@pytest.mark.parametrize(
    "text", ["", "{", "[3]", '[{"peer": "x", "addresses": []}]', "[" * 5000, '{"a": 1}', "null"]
)
def test_illegible_known_peers_are_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "peers.json").write_text(text)
    with Home(tmp_path) as home:
        assert home.known_peers() == []


def test_status_address_and_token_are_for_this_user_alone(tmp_path: Path) -> None:
    with Home(tmp_path) as home:
        token = "a-token"
        home.publish_status("127.0.0.1", 4321, token)
    assert (tmp_path / "token").read_text() == token + "\n"
    status = json.loads((tmp_path / "status.json").read_text())
    assert (status["host"], status["port"]) == ("127.0.0.1", 4321)
    for name in ("token", "status.json"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o600


def test_a_directory_is_waited_for_until_its_daemon_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = Home(tmp_path)
    assert not module.wait_until_free(tmp_path, 0.0)
    monkeypatch.setattr(module.time, "sleep", lambda _: home.close())  # it ends meanwhile
    assert module.wait_until_free(tmp_path, 3600.0)
    assert module.wait_until_free(tmp_path, 0.0)
    with Home(tmp_path):
        pass  # whoever waited holds nothing


def test_the_port_of_the_last_start_is_remembered(tmp_path: Path) -> None:
    with Home(tmp_path) as home:
        assert home.last_port() == 0
        home.publish_status("127.0.0.1", 4321, "a-token", listening=5432)
        assert home.last_port() == 5432


@pytest.mark.parametrize(
    "text", ["", "{", "[3]", "null", '{"listening": "7"}', '{"listening": 65536}', "[" * 5000]
)
def test_an_illegible_port_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "status.json").write_text(text)
    with Home(tmp_path) as home:
        assert home.last_port() == 0


def test_metrics_have_one_line_per_turn_and_are_rotated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "METRICS_BYTES", 200)
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"turn":0,"lo')  # what a crash left
    with Home(tmp_path) as home:
        for turn in range(1, 30):
            home.write_turn({"turn": turn, "loss": 1.5})
    lines = path.with_suffix(".jsonl.1").read_text() + path.read_text()
    turns = [json.loads(line)["turn"] for line in lines.splitlines()]
    assert turns[-1] == 29
    assert turns == list(range(turns[0], 30))
    assert path.stat().st_size <= 250


def test_a_metrics_file_that_can_not_be_written_costs_the_line_only(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").mkdir()
    with Home(tmp_path) as home:
        home.write_turn({"turn": 1})


def test_the_last_turn_is_found_again_also_after_rotation(tmp_path: Path) -> None:
    with Home(tmp_path) as home:
        assert home.last_turn() == {}
        home.write_turn({"turn": 1, "steps": 30})
        home.write_turn({"turn": 2, "steps": 60})
        assert home.last_turn() == {"turn": 2, "steps": 60}
        with (tmp_path / "metrics.jsonl").open("a") as file:
            file.write('{"turn":3,"ste')  # killed while it was written
        assert home.last_turn() == {"turn": 2, "steps": 60}
        (tmp_path / "metrics.jsonl").rename(tmp_path / "metrics.jsonl.1")
        assert home.last_turn() == {"turn": 2, "steps": 60}
