"""What a daemon tells of itself, alone and started again: totals go on, nothing old is told as new.

A real daemon and its worker.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.daemons import Daemon, run_file

from shoal.node.status import State


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    made = Daemon(tmp_path / "one")
    yield made
    if made.process is not None and made.process.poll() is None:
        made.kill()


@pytest.mark.real
def test_totals_go_on_and_what_is_told_at_the_end_is_of_the_end(
    tmp_path: Path, daemon: Daemon
) -> None:
    run = run_file(tmp_path, turns=3, peers=1, pace="steps = 5")
    flags = ("--dir", str(daemon.directory), "--listen", "127.0.0.1:0", "--libp2p", "off")
    daemon.start("start", str(run), *flags)
    done = daemon.wait("finished", lambda s: s.state is State.FINISHED and s.measured)
    assert (done.turn, done.steps, done.lag) == (3, 15, 0)
    assert done.steps_per_second is None, "nothing is trained"
    log = daemon.directory / "metrics.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line["members"] for line in lines] == [done.members] * 3
    assert done.published_bytes == sum(line["payload_bytes"] for line in lines)
    [row] = daemon.client().peers()
    assert (row.turn, row.steps, row.loss) == (done.turn, done.steps, done.loss)
    assert row.evaluation == done.evaluation, "not what it was before the last turn"
    daemon.kill()

    earlier = lines[-1] | {"bytes_in": 5_000_000, "bytes_out": 7_000_000}
    with log.open("a") as file:
        file.write(json.dumps(earlier) + "\n" + '{"turn":4,"steps"')
    daemon.start()
    again = daemon.wait("back", lambda s: s.measured)
    assert (again.turn, again.steps, again.published_bytes) == (3, 15, done.published_bytes)
    assert (again.evaluation, again.fingerprint) == (done.evaluation, done.fingerprint)
    assert again.sockets.bytes_in >= 5_000_000
    assert again.sockets.bytes_out >= 7_000_000
    [row] = daemon.client().peers()
    assert (row.turn, row.steps) == (3, 15)
