"""`shoal swarm` with real daemons: two of them, a small task, a few turns."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch

from shoal.node import cli, client
from shoal.node.errors import ConfigError
from shoal.node.home import Home

pytestmark = [pytest.mark.real, pytest.mark.timeout(480)]


def tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    with safetensors.safe_open(path, framework="pt") as file:
        return safetensors.torch.load_file(path), dict(file.metadata())


def same(one: Path, other: Path) -> bool:
    (left, said), (right, says) = tensors(one), tensors(other)
    equal = left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)
    return equal and said == says


def test_a_swarm_agrees_and_its_model_is_the_same_on_disk_and_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    flags = ["--peers", "2", "--turns", "6", "--secret", "--baseline", "--timeout", "300"]
    assert cli.main(["swarm", "digits", *flags]) == 0
    out = capsys.readouterr().out
    folder = tmp_path / "swarm-digits"
    assert f"--secret-file {folder}/secret" in out
    assert re.search(r"all 2 equal \([0-9a-f]{32}\)", out)
    assert "one peer alone on its shard" in out

    summary = json.loads((folder / "summary.json").read_bytes())
    assert summary["unit"] == "accuracy"
    assert summary["after"] > summary["before"] + 0.2
    assert summary["steps"] == 60
    assert 0 < summary["published"] < summary["sent"] < 2_000_000

    # The daemons are gone; their logs, summed anew, mean the model that was exported alive.
    with pytest.raises(ConfigError, match="no daemon runs"):
        client.connect(folder / "peer-2")
    assert cli.main(["export", str(tmp_path / "again.safetensors"), str(folder / "peer-2")]) == 0
    assert same(folder / "model.safetensors", tmp_path / "again.safetensors")
    _, says = tensors(tmp_path / "again.safetensors")
    assert json.loads(says["run"])["run"]["name"] == "digits"


def test_commands_find_the_daemon_by_its_directory(tmp_path: Path) -> None:
    """start, status, pause, resume, export, leave: as a person would type them."""
    run = tmp_path / "run.toml"
    run.write_text(
        '[run]\nname = "small"\n[task]\nname = "digits"\n[local]\nsteps = 5\n'
        'optimizer = { name = "sgd", lr = 0.1 }\n'
    )
    shoal = [sys.executable, "-m", "shoal.node.cli"]
    here = {"cwd": tmp_path, "text": True, "timeout": 300}
    log = (tmp_path / "log").open("w")
    daemon = subprocess.Popen(
        [*shoal, "start", str(run), "--listen", "127.0.0.1:0", "--threads", "1"],
        cwd=tmp_path,
        stdout=log,
        stderr=subprocess.STDOUT,
    )
    try:
        wait_for(lambda: "join: shoal join /ip4/127.0.0.1/" in (tmp_path / "log").read_text())
        found = client.connect(client.find(tmp_path))
        wait_for(lambda: found.status().turn >= 2)
        shown = subprocess.run([*shoal, "status"], capture_output=True, check=True, **here)
        assert "training" in shown.stdout
        assert found.status().peer[-6:] in shown.stdout
        assert f"shoal join {found.status().join[0]}\n" in shown.stdout, "in one line"

        subprocess.run([*shoal, "pause"], check=True, **here)
        wait_for(lambda: found.status().state == "paused" and not found.status().lag)
        told = subprocess.run([*shoal, "status", "--json"], capture_output=True, check=True, **here)
        both = json.loads(told.stdout)
        assert both["status"]["state"] == "paused"
        assert both["peers"][0]["me"] is True

        # The turn under way when it was paused still comes in; the worker answers in order.
        subprocess.run([*shoal, "export", "settled.safetensors"], check=True, **here)
        wait_for(lambda: not found.status().lag)
        for target in ("a.safetensors", "b.safetensors"):
            subprocess.run([*shoal, "export", target], check=True, **here)
        assert same(tmp_path / "a.safetensors", tmp_path / "b.safetensors")

        turn = found.status().turn
        subprocess.run([*shoal, "resume"], check=True, **here)
        wait_for(lambda: found.status().turn > turn)
        subprocess.run([*shoal, "leave"], check=True, **here)
        Home(tmp_path / "small").close()  # it is free: what has left can be started again
        assert daemon.wait(120) == 0
    finally:
        if daemon.poll() is None:
            os.kill(daemon.pid, 9)
            daemon.wait()
        log.close()


def wait_for(condition, seconds: float = 200.0) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.2)
