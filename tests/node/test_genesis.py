"""A genesis: made once, hashed, and read from strangers without trusting a byte."""

import random
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import EntryPoint, EntryPoints
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.gossip.limits import Limits
from shoal.gossip.names import PeerId, RunId, digest
from shoal.node import genesis as module
from shoal.node.config import Task
from shoal.node.errors import ConfigError
from shoal.node.genesis import MAGIC, Genesis, check_task, decode, found, parse_run_id
from shoal.proto.v1.run_pb2 import Genesis as Message
from shoal.training import merkle

LIMITS = Limits()
INITIAL = random.Random(3).randbytes(4 * 700_000)
TABLES: dict[str, Any] = {
    "run": {"name": "a-run", "seed": 7},
    "task": {"name": "text", "model": {"width": 64}},
    "local": {"steps": 30, "optimizer": {"name": "muon", "lr": 0.02}},
}


def made(**changes: Any) -> Genesis:
    values: dict[str, Any] = {
        "tables": TABLES,
        "parameters": 700_000,
        "layout": digest(b"layout"),
        "initial_root": merkle.root_of(INITIAL),
        "initial_squares": (1 << 100) + 5,
        "most": {"dense": 5000, "sparse": 400},
        "founder": PeerId(b"f" * 32),
    }
    return found(**(values | changes))


def test_a_genesis_says_what_was_put_into_it() -> None:
    made_here = made()
    read = decode(made_here.raw, LIMITS, where="x", run=made_here.run_id)
    assert read == made_here
    assert read.run_id == digest(read.raw)
    assert (read.parameters, read.initial_squares) == (700_000, (1 << 100) + 5)
    assert read.most == {"dense": 5000, "sparse": 400}
    assert read.run_file.local.optimizer == {"name": "muon", "lr": 0.02}
    assert made(tables=dict(reversed(TABLES.items()))).raw == made_here.raw


def test_every_part_enters_the_run_id() -> None:
    changes: list[dict[str, Any]] = [
        {},
        {"parameters": 1},
        {"layout": digest(b"other")},
        {"initial_root": digest(b"other")},
        {"initial_squares": 0},
        {"most": {"dense": 5001, "sparse": 400}},
        {"founder": PeerId(b"g" * 32)},
        {"tables": TABLES | {"run": {"name": "a-run", "seed": 8}}},
    ]
    assert len({made(**change).run_id for change in changes}) == len(changes)


def test_the_initial_model_is_known_by_its_root() -> None:
    genesis = made()
    assert genesis.is_initial(INITIAL)
    assert not genesis.is_initial(INITIAL[:-1])
    assert not genesis.is_initial(INITIAL + b"\0\0\0\0")
    changed = bytearray(INITIAL)
    changed[1_500_000] ^= 1
    assert not genesis.is_initial(changed)


def test_another_runs_genesis_is_refused_with_both_ids() -> None:
    genesis, other = made(), RunId(digest(b"other"))
    with pytest.raises(ConfigError, match=f"{genesis.run_id.hex()}, not of {other.hex()}"):
        decode(genesis.raw, LIMITS, where="x", run=other)


def message(**changes: Any) -> bytes:
    parsed = Message.FromString(made().raw[len(MAGIC) :])
    for name, value in changes.items():
        if name == "most":
            del parsed.most[:]
            for kind, size in value:
                parsed.most.add(kind=kind, size=size)
        else:
            setattr(parsed, name, value)
    return MAGIC + parsed.SerializeToString(deterministic=True)


@pytest.mark.parametrize(
    ("raw", "complaint"),
    [
        (b"", "not a genesis"),
        (b"shoal-genesis-2\n" + made().raw[len(MAGIC) :], "this version"),
        (MAGIC + b"\xff\xff", "not a genesis"),
        (made().raw + b"\x7a\x01x", "not the one form"),
        (b"x" * (2 << 20), "at most"),
        (message(layout=b"short"), "32 bytes"),
        (message(founder=b""), "32 bytes"),
        (message(parameters=0), "0 parameters"),
        (message(parameters=1 << 60), "parameters"),
        (message(initial_squares=b"\0\1"), "128-bit"),
        (message(initial_squares=b"\1" * 17), "128-bit"),
        (message(most=[]), "sorted list"),
        (message(most=[("b", 1), ("a", 1)]), "sorted list"),
        (message(most=[("a", 1), ("a", 2)]), "sorted list"),
        (message(most=[("../a", 1)]), "no kind"),
        (message(most=[("dense", 1 << 40)]), "at most"),
        (message(run_file=b"{}"), "missing"),
        (message(run_file=b"\xff"), "run file"),
    ],
)
def test_a_strangers_genesis_that_is_not_one_is_refused(raw: bytes, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint) as caught:
        decode(raw, LIMITS, where="from 12D3")
    assert str(caught.value).startswith("from 12D3")


@given(st.binary(max_size=100), st.integers(0, 300), st.booleans())
def test_mangled_bytes_are_refused_or_a_genesis(noise: bytes, at: int, insert: bool) -> None:
    raw = made().raw
    mangled = raw[:at] + noise + raw[at if insert else at + len(noise) :]
    try:
        assert decode(mangled, LIMITS, where="x").raw == mangled
    except ConfigError:
        assert mangled != raw


def test_only_a_task_that_is_here_or_allowed_by_name_is_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    (tmp_path / "text.py").write_text("raise SystemError")
    (tmp_path / "__init__.py").write_text("")
    point = EntryPoint("mine", "nowhere:Task", "shoal.tasks")
    monkeypatch.setattr(module.shoal.training.tasks, "__path__", [str(tmp_path)])
    monkeypatch.setattr(
        module, "entry_points", lambda group: EntryPoints((point,)).select(group=group)
    )
    run_file = made().run_file
    check_task(run_file, "")

    def named(name: str) -> Any:
        return replace(run_file, task=Task(name=name))

    check_task(named("mine"), "")
    check_task(named("pkg.tasks:Mine"), "pkg.tasks:Mine")
    with pytest.raises(ConfigError, match="Known: mine, text"):
        check_task(named("os"), "")
    for allowed in ("", "pkg.tasks:Other", "pkg.tasks"):
        with pytest.raises(ConfigError, match=r"--allow-task pkg\.tasks:Mine"):
            check_task(named("pkg.tasks:Mine"), allowed)


def test_a_run_id_is_read_strictly() -> None:
    run = made().run_id
    assert parse_run_id(run.hex()) == run
    for text in (
        "",
        run.hex()[:-1],
        run.hex().upper(),
        run.hex() + "00",
        "zz" * 32,
        " " + run.hex(),
    ):
        with pytest.raises(ConfigError, match="64 digits"):
            parse_run_id(text)


@pytest.mark.real
def test_reading_a_genesis_needs_no_torch() -> None:
    program = (
        "import sys, shoal.node.genesis as g; g.task_names();"
        "print({'torch', 'numpy'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "set()"
