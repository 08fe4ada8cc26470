"""--device-memory: how the size reaches the worker, whatever starts it; steps that were skipped."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shoal.node import cli, foreground, founding, pipe, probe
from shoal.node.commands import swarm
from shoal.node.config import NodeConfig, RunFile, parse_size
from shoal.node.duties import Duties
from shoal.node.errors import ConfigError
from shoal.node.home import Home
from shoal.node.identity import Identity

TABLES = {"run": {"name": "digits"}, "task": {"name": "digits"}}
SIZES = {
    "": 0,
    "1B": 1,
    "12kB": 12_000,
    "12 KiB": 12_288,
    "800MB": 800_000_000,
    "1.5GiB": 3 << 29,
    "2GB": 2_000_000_000,
    "1TB": 10**12,
}


def test_sizes_are_read_as_people_write_them() -> None:
    assert {text: parse_size(text) for text in SIZES} == SIZES
    for text in ("2", "GB", "-1GB", "0GB", "1.GB", "1e3MB", "2 GBit", "2iB", " 2GB", "٢GB"):
        with pytest.raises(ConfigError, match="write a size such as 800MB"):
            parse_size(text)
    with pytest.raises(ConfigError, match="write a size"):
        NodeConfig(device_memory="much")


def test_it_is_kept_and_reaches_the_worker(tmp_path: Path) -> None:
    args = cli.build().parse_args(["start", "run.toml", "--device-memory", "3MB"])
    config = NodeConfig().merged(foreground.local(args))
    config.save(tmp_path / "node.toml")
    assert NodeConfig.load(tmp_path / "node.toml").device_memory == "3MB"
    file = RunFile.parse(TABLES, where="run.toml")
    with Home(tmp_path / "home") as home:
        for local, expected in ((config, 3_000_000), (NodeConfig(), 0)):
            setup = founding.setup(file, local, Identity.generate(), home)
            assert setup.device_memory == expected


def test_a_swarm_gives_it_to_every_daemon() -> None:
    argv = ["swarm", "digits", "--device-memory", "3MB", "--dir", "out"]
    plan = swarm.make_plan(cli.build().parse_args(argv))
    for index in range(plan.peers):
        given = cli.build().parse_args(plan.argv(index, None if index == 0 else "ADDRESS")[3:])
        assert given.device_memory == "3MB"


def test_a_wrong_size_is_refused_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["start", "run.toml", "--device-memory", "much"]) == 2
    assert "write a size such as 800MB, 2GB or 1.5GiB" in capsys.readouterr().err


def test_doctor_hands_it_to_the_trial() -> None:
    tables = {
        "run": {"name": "digits"},
        "task": {"name": "digits"},
        "exchange": {"update": {"kind": "scalar"}},
    }
    given = {"members": 2, "data": "", "base": "", "device": "cpu", "allow_task": ""}
    found = probe.ask("run", tables=tables, **given, device_memory=1000)
    assert "--device-memory: two of this model's blocks" in found["error"]


# ---- in the worker

TASK = """
import torch


class Holes:
    drawn = 0

    def __init__(self, place): pass
    def model(self): return torch.nn.Linear(3, 1)
    def batches(self, generator):
        while True:
            yield torch.randn(4, 3, generator=generator)
    def loss(self, model, batch):
        Holes.drawn += 1
        factor = float("nan") if Holes.drawn % 10 == 3 else 1.0
        return model(batch).square().mean() * factor
"""


def opened(directory: Path, founded: pipe.Founded, setup: pipe.Setup) -> tuple[Duties, Any]:
    worker = Duties()
    initial = directory / "initial.bin"
    request = pipe.Open(
        setup, founded.parameters, founded.layout, founded.initial_root, str(initial)
    )
    return worker, worker.answer(request, memoryview(b""))[0]


def test_skipped_steps_are_said_and_the_initial_model_lies_in_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "holes_in_losses.py").write_text(TASK)
    monkeypatch.syspath_prepend(str(tmp_path))
    name = "holes_in_losses:Holes"
    run = {
        "run": {"name": "holes"},
        "task": {"name": name},
        "exchange": {"update": {"kind": "scalar", "perturbations": 10, "lr": 0.01}},
    }
    for memory in (0, 10_000):
        setup = pipe.Setup(
            run, b"m" * 32, device="cpu", device_memory=memory, threads=1, allow_task=name
        )
        founded = Duties().answer(pipe.Found(setup), memoryview(b""))[0]
        assert isinstance(founded, pipe.Founded)
        worker, ready = opened(tmp_path, founded, setup)
        assert (ready.device, ready.frontier) == ("cpu (1 threads)", [])
        __import__("holes_in_losses").Holes.drawn = 0
        caplog.clear()
        turned, body = worker.answer(pipe.Turn(1, 1.0), memoryview(b""))
        assert isinstance(turned, pipe.Turned)
        assert (turned.steps, turned.skipped, turned.dropped) == (10, 2, None)
        assert [r.getMessage() for r in caplog.records] == [
            "turn 1: 2 of 10 steps skipped, since their loss was not finite"
        ]
        payload = bytes(body[0])
        item = pipe.Item(b"m" * 32, 1, 1, 1, "scalar", len(payload), len(payload))
        moved = worker.answer(pipe.Apply([item]), memoryview(payload))[0]
        assert isinstance(moved, pipe.Done)
        assert moved.fingerprint != ready.fingerprint
        assert worker._trainer is not None
        assert isinstance(worker._trainer._initial, np.memmap)
        back = worker.answer(pipe.Reset(), memoryview(b""))[0]
        assert isinstance(back, pipe.Done)
        assert back.fingerprint == ready.fingerprint
