"""What a daemon weighs when it has trained: its worker is a process of its own."""

from pathlib import Path

import pytest
from support.daemons import Daemon, run_file
from support.finders import needs_libp2p

from shoal.node.status import State

pytestmark = [pytest.mark.real, pytest.mark.slow, pytest.mark.timeout(1200)]


@pytest.mark.parametrize(
    ("libp2p", "said", "most"),
    [("off", "off", 120e6), pytest.param("0", "running", 200e6, marks=needs_libp2p)],
    ids=["alone", "with libp2p"],
)
def test_a_daemon_is_small(tmp_path: Path, libp2p: str, said: str, most: float) -> None:
    # The C library keeps pools of freed memory, more of them the more cores there are.
    daemon = Daemon(tmp_path / "a", prefix=("env", "MALLOC_ARENA_MAX=2"))
    run = run_file(tmp_path, peers=1, turns=3)
    local = ("--listen", "127.0.0.1:0", "--threads", "1", "--libp2p", libp2p)
    try:
        daemon.start("start", str(run), "--dir", str(daemon.directory), *local)
        status = daemon.wait(
            "finished", lambda s: s.state is State.FINISHED and s.libp2p == said and s.memory
        )
        assert 0 < status.memory < most
        assert daemon.stop() == 0
    finally:
        daemon.end()
