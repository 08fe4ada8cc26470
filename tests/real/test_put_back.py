"""A directory that is put back to what it was, as from a backup, does not convict its owner."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.daemons import Daemon, agree, run_file

pytestmark = [pytest.mark.real, pytest.mark.slow, pytest.mark.timeout(2400)]
LOCAL = ("--listen", "127.0.0.1:0", "--libp2p", "off", "--threads", "1")


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[tuple[Daemon, Daemon]]:
    a, b = Daemon(tmp_path / "a"), Daemon(tmp_path / "b")
    yield a, b
    for daemon in (a, b):
        daemon.end()


@pytest.mark.parametrize("turns", [0, 3], ids=["before its first update", "after some"])
def test_no_number_is_used_twice(turns: int, tmp_path: Path, pair: tuple[Daemon, Daemon]) -> None:
    a, b = pair
    run = run_file(tmp_path, turns=0, peers=1, pace="turn_seconds = 0.5")
    paused = () if turns else ("--paused",)
    a.start("start", str(run), "--dir", str(a.directory), *LOCAL, *paused)
    a.wait("where the backup is made", lambda s: s.join and s.turn >= turns)
    assert a.stop() == 0
    shutil.copytree(a.directory, tmp_path / "backup")

    a.start()
    address = a.wait("up", lambda s: s.join).join[0]
    b.start("join", address, "--dir", str(b.directory), *LOCAL)
    for daemon in pair:
        daemon.wait(
            "training together", lambda s: s.turn >= turns + 4 and s.members == 2 and s.agrees
        )
    assert (b.stop(), a.stop()) == (0, 0)

    shutil.rmtree(a.directory)
    shutil.copytree(tmp_path / "backup", a.directory)
    a.start()
    address = a.wait("training alone", lambda s: s.join and s.turn >= turns + 2).join[0]
    b.start("join", address, "--dir", str(b.directory), *LOCAL)
    for daemon in pair:
        daemon.wait(
            "together again", lambda s: s.members == 2 and s.agrees and s.frontier.authors > 2
        )
        daemon.client().post("pause")
    assert agree(list(pair))
    assert not [e for d in pair for e in d.events() if e.what == "equivocation"]
    assert (a.stop(), b.stop()) == (0, 0)
