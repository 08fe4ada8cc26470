"""What an operator may get wrong, typed as a stranger would: one line, the remedy, exit code 2."""

import asyncio
import contextlib
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from support.daemons import Daemon, run_file

from shoal.node.identity import Identity

pytestmark = [pytest.mark.real, pytest.mark.timeout(1200)]

LOCAL = ("--listen", "127.0.0.1:0", "--threads", "1")
BASE = {
    "run": 'name = "digits"\nturns = 2',
    "task": 'name = "digits"',
    "local": 'optimizer = { name = "adamw", lr = 3e-3 }\nsteps = 1',
    "exchange": 'update = { kind = "dense", levels = 3 }',
    "swarm": "min_peers = 1",
}


@dataclass
class Said:
    """What a command that must fail said."""

    line: str
    """Its last line on stderr, without the name of the program."""
    before: list[str]
    """Lines of the log before that."""


def run_toml(folder: Path, name: str = "run.toml", **tables: str) -> Path:
    path = folder / name
    text = "\n".join(f"[{table}]\n{body}" for table, body in (BASE | tables).items())
    path.write_text(text)
    return path


def refused(folder: Path, *argv: object, path: Path | None = None) -> Said:
    """Run a command that the operator got wrong; check what holds for all of them."""
    env = dict(os.environ, **({"PYTHONPATH": str(path)} if path else {}))
    process = subprocess.Popen(
        [sys.executable, "-m", "shoal.node.cli", *map(str, argv)],
        cwd=folder,
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=300)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        out, err = process.communicate()
        raise AssertionError(f"it does not end:\n{out}\n{err}") from None
    *before, last = err.splitlines() or [""]
    assert process.returncode == 2, err
    assert last.startswith("shoal: "), err
    assert "Traceback" not in err
    assert not out, "nothing is printed that looks like success"
    assert len(last) < 1000, "one line that a person can read"
    assert not alive(folder), "no process is left behind"
    return Said(last.removeprefix("shoal: "), before)


def alive(folder: Path) -> list[str]:
    """Return the processes that work in this folder."""
    found = []
    for each in Path("/proc").iterdir():
        if each.name.isdecimal():
            try:
                where = (each / "cwd").readlink()
                words = (each / "cmdline").read_bytes()
            except OSError:
                continue
            if where == folder and b"shoal" in words:
                found.append(words.decode(errors="replace"))
    return found


# ---------------------------------------------------------------- run files


@pytest.mark.parametrize(
    ("table", "body", "expected"),
    [
        ("rum", "", "unknown key 'rum': did you mean 'run'"),
        ("run", 'name = "d"\nsede = 3', "unknown key 'sede' in [run]: did you mean 'seed'"),
        ("local", "stesp = 1", "unknown key 'stesp' in [local]: did you mean 'steps'"),
        ("exchange", 'paces = "free"', "did you mean 'pace'"),
        ("swarm", "min_peer = 1", "did you mean 'min_peers'"),
        ("swarm", 'admission = "invite"', "not built yet; use 'open' or 'secret'"),
        ("exchange", 'mode = "mixing"', 'not built yet; use mode = "ledger"'),
        ("swarm", 'min_peers = "x"', "expected a whole number"),
        ("task", 'name = "digit"', "Known: digits, hf-causal-lm, saddle, text"),
        ("run", 'name = "../x"', "holds no paths"),
        ("local", "optimizer = { lr = nan }", "expected a finite number"),
        ("run", 'name = "d', "is not valid TOML"),
    ],
)
def test_a_run_file_with_a_mistake(tmp_path: Path, table: str, body: str, expected: str) -> None:
    said = refused(tmp_path, "start", run_toml(tmp_path, **{table: body}), "--dir", "d", *LOCAL)
    assert expected.replace('"', "'") in said.line.replace('"', "'")
    assert not said.before
    assert not (tmp_path / "d" / "genesis").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("table", "body", "expected"),
    [
        ("task", 'name = "text"\nmodel = { widht = 3 }', "did you mean 'width'"),
        ("local", 'optimizer = { name = "adamw", lrr = 1 }', "did you mean 'lr'"),
        ("local", 'optimizer = { name = "adamv" }', "did you mean 'adamw'"),
        ("exchange", 'update = { kind = "dense", levles = 3 }', "did you mean 'levels'"),
        ("exchange", 'update = { kind = "dens" }', "did you mean 'dense'"),
        ("exchange", 'update = { kind = "dense", levels = 5 }', "use 2 or 3"),
    ],
)
def test_an_option_of_a_part_with_a_mistake(
    tmp_path: Path, table: str, body: str, expected: str
) -> None:
    said = refused(tmp_path, "start", run_toml(tmp_path, **{table: body}), "--dir", "d", *LOCAL)
    assert expected in said.line
    assert not (tmp_path / "d" / "genesis").exists()


TASKS = """
import torch
from torch import nn

def nothing(place): return None
def raises(place): raise RuntimeError("no such disk")

class Task:
    def __init__(self, place): pass
    def model(self): return nn.Linear(4, 4)
    def batches(self, generator):
        while True:
            yield torch.randn(8, 4, generator=generator)
    def loss(self, model, batch): return model(batch).square().mean()

class Buffers(Task):
    def model(self): return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))

class Raises(Task):
    def loss(self, model, batch): raise ValueError("shapes\\ndo not fit")

class Vector(Task):
    def loss(self, model, batch): return model(batch)

class Dies(Task):
    def loss(self, model, batch):
        import os
        os.kill(os.getpid(), 9)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("absent:Task", "cannot import task 'absent:Task': No module named 'absent'; install it"),
        ("mine:Tusk", "has no attribute 'Tusk'"),
        ("mine:nothing", "made a NoneType without model, batches, loss()"),
        ("mine:raises", "RuntimeError: no such disk"),
        ("mine:Buffers", "set run.buffers = 'local'"),
        ("mine:Raises", "fails in its first step: ValueError: shapes do not fit"),
        ("mine:Vector", "loss() must return a scalar"),
        ("mine:Dies", "SIGKILL; out of memory?"),
    ],
)
def test_a_task_that_cannot_be_trained(tmp_path: Path, name: str, expected: str) -> None:
    modules = tmp_path / "modules"
    modules.mkdir()
    (modules / "mine.py").write_text(TASKS)
    run = run_toml(tmp_path, run='name = "own"', task=f'name = "{name}"')
    said = refused(tmp_path, "start", run, "--dir", "d", *LOCAL, path=modules)
    assert expected in said.line
    assert not (tmp_path / "d" / "genesis").exists()


# ---------------------------------------------------------------- flags


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--listen", "nonsense"], "give HOST:PORT"),
        (["--listen", "127.0.0.1:99999"], "give HOST:PORT"),
        (["--listen", "203.0.113.7:0"], "no address of this machine: use 0.0.0.0"),
        (["--shard", "5/5"], "the last of 5 is 4/5"),
        (["--advertise", "nonsense"], "one looks like /ip4/"),
        (["--identity", "absent.key"], "leave --identity out"),
        (["--secret-file", "absent"], "check --secret-file"),
        (["--allow-task", "nonsense"], "package.module:Factory"),
        (["--dir", "/proc/x"], "choose another directory with --dir"),
        (["--dir", "run.toml"], "choose another directory with --dir"),
        (["--thread", "1"], "did you mean --threads"),
    ],
)
def test_a_flag_with_a_mistake(tmp_path: Path, argv: list[str], expected: str) -> None:
    run = run_toml(tmp_path)
    flags = argv if "--dir" in argv else ["--dir", "d", *argv]
    local = () if "--listen" in argv else LOCAL
    said = refused(tmp_path, "start", run, *local, *flags)
    assert expected in said.line
    assert not said.before
    assert not (tmp_path / "d" / "genesis").exists()


@pytest.mark.slow
def test_files_that_cannot_be_used(tmp_path: Path) -> None:
    run = run_toml(tmp_path)
    assert "does not exist" in refused(tmp_path, "start", "absent.toml").line
    assert "holds no run" in refused(tmp_path, "start", tmp_path).line
    assert [p.name for p in tmp_path.iterdir()] == ["run.toml"], "nothing is left there"

    key = tmp_path / "a.key"
    key.write_bytes(b"garbage")
    key.chmod(0o600)
    start = ("start", run, "--dir", "d", *LOCAL, "--identity")
    assert "holds no Ed25519 key" in refused(tmp_path, *start, key).line
    key.chmod(0o644)
    assert "open to others (mode 0644): chmod 600 it" in refused(tmp_path, *start, key).line
    assert "make it readable" in refused(tmp_path, *start, tmp_path).line


def test_a_port_in_use_is_said_before_anything_is_built(tmp_path: Path) -> None:
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        listen = f"127.0.0.1:{busy.getsockname()[1]}"
        said = refused(tmp_path, "start", run_toml(tmp_path), "--dir", "d", "--listen", listen)
    assert f"can't listen on {listen}: the port is in use" in said.line
    assert not said.before
    assert not (tmp_path / "d" / "genesis").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("files", "argv", "expected"),
    [
        (None, (), "does not exist; name a file or a folder of text"),
        ({}, (), "holds no text"),
        ({"a.txt": "hello"}, ("--shard", "3/64"), "shard of"),
        ({"a.txt": "hello"}, ("--device", "tpu"), "use cpu, cuda or auto"),
    ],
)
def test_data_and_device(
    tmp_path: Path, files: dict[str, str] | None, argv: tuple[str, ...], expected: str
) -> None:
    data = tmp_path / "data"
    if files is not None:
        data.mkdir()
        for name, text in files.items():
            (data / name).write_text(text)
    task = 'name = "text"\nmodel = { layers = 1, width = 16, heads = 2, context = 16 }'
    run = run_toml(tmp_path, task=task)
    said = refused(tmp_path, "start", run, "--dir", "d", *LOCAL, "--data", data, *argv)
    assert expected in said.line


# ---------------------------------------------------------------- joining, and directories


@pytest.fixture(scope="module")
def founder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    folder = tmp_path_factory.mktemp("founder")
    daemon = Daemon(folder / "d")
    run = run_file(folder, peers=1, turns=2, admission="secret")
    daemon.start("start", str(run), "--dir", str(daemon.directory), *LOCAL)
    try:
        daemon.wait("done", lambda s: s.join and s.state == "finished" and s.measured)
        assert daemon.stop() == 0
        shutil.copytree(daemon.directory, still(daemon))
        daemon.start()
        daemon.wait("up again", lambda s: s.join)
        yield daemon
    finally:
        daemon.end()


def still(founder: Daemon) -> Path:
    """Return a copy of its directory, made while nobody wrote there."""
    return founder.directory.with_name("still")


@pytest.mark.slow
def test_addresses_that_lead_nowhere(tmp_path: Path, founder: Daemon) -> None:
    status = founder.wait("up", lambda s: s.join)
    place, _, rest = status.join[0].partition("/p2p/")
    peer, _, run = rest.partition("/run/")
    secret = founder.directory / "secret"
    other = str(Identity.generate())

    def join(*argv: object) -> str:
        said = refused(tmp_path, "join", *argv, *LOCAL)
        assert not said.before
        return said.line

    with_secret = ("--secret-file", secret)
    wrong = join(f"{place}/p2p/{other}/run/{run}", *with_secret)
    assert other in wrong
    assert peer in wrong
    nobody = join(f"{place}/run/{run}", *with_secret)
    assert "names no peer" in nobody
    assert f"{peer} answers there" in nobody
    assert "names no run" in join(f"{place}/p2p/{peer}")
    assert "is it cut off?" in join(f"{place}/p2p/{peer}/run/abcd")
    assert "one looks like /ip4/" in join("localhost:7464")
    dead = join(f"/ip4/127.0.0.1/tcp/1/p2p/{peer}/run/{run}", *with_secret)
    assert "can't be reached" in dead
    assert "does that daemon run?" in dead
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        port = silent.getsockname()[1]
        line = join(f"/ip4/127.0.0.1/tcp/{port}/p2p/{peer}/run/{run}", *with_secret)
    assert "no answer in 5 s" in line

    # The door is shut without the secret, with another one, and with a passphrase.
    assert "secret" in join(status.join[0])
    passphrase = tmp_path / "phrase"
    passphrase.write_text("correct horse")
    passphrase.chmod(0o600)
    assert "passphrases are refused" in join(status.join[0], "--secret-file", passphrase)
    assert not [p for p in tmp_path.iterdir() if p != passphrase], "nothing was made"


@pytest.mark.slow
def test_something_else_answers_there(tmp_path: Path) -> None:
    async def scenario() -> Said:
        async def http(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.read(10)
            writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
            writer.close()

        server = await asyncio.start_server(http, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        peer, run = str(Identity.generate()), "ab" * 32
        address = f"/ip4/127.0.0.1/tcp/{port}/p2p/{peer}/run/{run}"
        async with server:
            return await asyncio.to_thread(refused, tmp_path, "join", address, *LOCAL)

    said = asyncio.run(scenario())
    assert "is it Shoal's port?" in said.line


@pytest.mark.slow
def test_a_directory_that_is_taken(tmp_path: Path, founder: Daemon) -> None:
    directory, run = founder.directory, founder.directory.with_name("run.toml")
    for argv in (
        ("start", directory),
        ("start", run, "--dir", directory),
        ("start", run, "--dir", directory, "--new"),
    ):
        assert "is in use by the daemon with process id" in refused(tmp_path, *argv, *LOCAL).line
    assert founder.wait("as before", lambda s: s.join)

    # Another run's directory.
    other = tmp_path / "other"
    other.mkdir()
    shutil.copy(directory / "genesis", other / "genesis")
    shutil.copy(directory / "run.toml", other / "run.toml")
    said = refused(tmp_path, "start", run_toml(tmp_path), "--dir", other, *LOCAL)
    assert "holds a run of another file" in said.line
    assert "--new" in said.line
    address = f"/ip4/127.0.0.1/tcp/1/p2p/{Identity.generate()}/run/{'ab' * 32}"
    said = refused(tmp_path, "join", address, "--dir", other, *LOCAL)
    assert "holds another run" in said.line
    assert (other / "genesis").read_bytes() == (directory / "genesis").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("genesis", b"garbage", "not a genesis"),
        ("genesis", b"", "not a genesis"),
        ("node.toml", b"\xff\xfe", "is not UTF-8"),
        ("node.toml", b'lisen = "x"\n', "did you mean 'listen'"),
        ("node.toml", b"listen = 7\n", "expected a text"),
        ("identity.key", b"garbage", "holds no Ed25519 key"),
        ("secret", b"garbage", "secret"),
    ],
)
def test_a_damaged_directory_is_refused_untouched(
    tmp_path: Path, founder: Daemon, name: str, content: bytes, expected: str
) -> None:
    directory = tmp_path / "copy"
    shutil.copytree(still(founder), directory)
    if name != "node.toml":
        toml = (directory / "node.toml").read_text()
        (directory / "node.toml").write_text(toml.replace(str(founder.directory), str(directory)))
    (directory / name).write_bytes(content)
    log = sorted(p.read_bytes() for p in (directory / "log").iterdir())
    said = refused(tmp_path, "start", directory, *LOCAL)
    assert expected in said.line
    assert str(directory) in said.line
    assert (directory / name).read_bytes() == content
    assert sorted(p.read_bytes() for p in (directory / "log").iterdir()) == log


@pytest.mark.slow
@pytest.mark.parametrize(
    "damage", ["peers.json", "metrics.jsonl", "checkpoint/worker.safetensors", "initial.bin"]
)
def test_what_can_be_made_anew_is(tmp_path: Path, founder: Daemon, damage: str) -> None:
    daemon = Daemon(tmp_path / "copy")
    shutil.copytree(still(founder), daemon.directory)
    (daemon.directory / "status.json").unlink()  # it is the founder's
    (daemon.directory / damage).parent.mkdir(exist_ok=True)
    (daemon.directory / damage).write_bytes(b"garbage \xff" * 99)
    before = founder.wait("as before", lambda s: s.measured)
    daemon.start("start", str(daemon.directory), *LOCAL)
    try:
        # A worker that has to rebuild shows the fingerprints on the way to where it was.
        daemon.wait("back", lambda s: s.worker.pid and s.fingerprint == before.fingerprint)
        assert daemon.stop() == 0
        assert "Traceback" not in daemon.said()
    finally:
        daemon.end()


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_a_full_disk(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4k", "tmpfs", str(disk)], check=False
    )
    if mounted.returncode:
        pytest.skip("no disk can be mounted here")
    try:
        (disk / "filler").write_bytes(bytes(4096))
        said = refused(tmp_path, "start", run_toml(tmp_path), "--dir", disk / "d", *LOCAL)
        assert "No space left" in said.line
        assert not (disk / "d" / "genesis").exists()
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_a_disk_that_has_filled_up_since(tmp_path: Path, founder: Daemon) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(disk)], check=False
    )
    if mounted.returncode:
        pytest.skip("no disk can be mounted here")
    try:
        shutil.copytree(still(founder), disk / "d")
        genesis = (disk / "d" / "genesis").read_bytes()
        with contextlib.suppress(OSError), (disk / "filler").open("wb", buffering=0) as filler:
            while filler.write(bytes(4096)):
                pass
        said = refused(tmp_path, "start", disk / "d", *LOCAL)
        assert "No space left" in said.line
        assert str(disk) in said.line
        assert "free some space" in said.line
        assert (disk / "d" / "genesis").read_bytes() == genesis
    finally:
        subprocess.run(["umount", str(disk)], check=True)
