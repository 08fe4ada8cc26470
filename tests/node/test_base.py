"""--base: how the model to start from reaches the worker, whatever starts it."""

import os
from pathlib import Path

import pytest

from shoal.node import cli, foreground, genesis, probe
from shoal.node.commands import swarm
from shoal.node.config import NodeConfig
from shoal.training import task


def config(*argv: str) -> NodeConfig:
    return NodeConfig().merged(foreground.local(cli.build().parse_args(argv)))


def test_a_folder_is_found_from_anywhere_and_a_download_stays_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert config("start", "run.toml", "--base", "model").base == str(tmp_path / "model")
    assert config("start", "run.toml", "--base", "~/model").base == os.path.expanduser("~/model")
    fetched = config("start", "run.toml", "--base", "hf://org/name@main")
    assert fetched.base == "hf://org/name@main"
    assert config("start", "run.toml").base == ""
    fetched.save(tmp_path / "node.toml")
    assert NodeConfig.load(tmp_path / "node.toml") == fetched
    again = NodeConfig.load(tmp_path / "node.toml").merged({"base": None})
    assert again.base == "hf://org/name@main", "it need not be said again"


def test_a_swarm_gives_it_to_every_daemon_and_says_how_to_join(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    argv = ["swarm", "digits", "--base", "model", "--data", "notes", "--dir", "out"]
    plan = swarm.make_plan(cli.build().parse_args(argv))
    for index in range(plan.peers):
        given = cli.build().parse_args(plan.argv(index, None if index == 0 else "ADDRESS")[3:])
        assert given.base == str(tmp_path / "model")
    typed = swarm.join_command(plan, "ADDRESS")
    assert typed.endswith(f"shoal join ADDRESS --data {tmp_path}/notes --base {tmp_path}/model")


def test_every_command_that_builds_a_run_takes_it() -> None:
    for words in (
        "start RUN.toml",
        "join ADDRESS",
        "swarm",
        "simulate RUN.toml",
        "compare text",
        "replay",
        "doctor RUN.toml",
    ):
        assert cli.build().parse_args([*words.split(), "--base", "x"]).base == "x", words


def test_the_daemon_knows_the_built_in_tasks_by_the_names_that_the_worker_knows() -> None:
    assert "hf-causal-lm" in genesis.task_names()
    assert list(genesis.task_names()) == task.names()


def test_doctor_hands_it_to_the_trial() -> None:
    tables = {"run": {"name": "x"}, "task": {"name": "hf-causal-lm"}}
    given = {"tables": tables, "members": 2, "data": "", "device": "cpu", "allow_task": ""}
    assert "--base FOLDER" in probe.ask("run", **given, base="")["error"]
    assert "/none is no folder" in probe.ask("run", **given, base="/none")["error"]
