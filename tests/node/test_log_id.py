"""No number of the own log is used twice, whatever is written last before the process ends."""

from pathlib import Path

import pytest

from shoal.gossip.limits import Limits
from shoal.gossip.names import Author, PeerId, RunId, digest
from shoal.gossip.records import Record, Update
from shoal.node.segments import Disk
from shoal.node.store import DamagedError, Store, StoreFailed

RUN = RunId(digest(b"run"))
ME = PeerId(b"m" * 32)


def update(author: Author, number: int, payload: bytes) -> Record:
    raw = b"record %d of %x" % (number, author.log)
    return Record(
        digest(raw), raw, Update(author, number, number, "dense", digest(payload), len(payload))
    )


def opened(directory: Path, disk: Disk | None = None) -> Store:
    return Store.open(directory, Limits(), run=RUN, disk=disk, segment_bytes=1000)


def written(directory: Path) -> tuple[int, list[int]]:
    """Return the log id, and the sizes of the log's first file after each of its updates."""
    store = opened(directory)
    mine, ends = Author(ME, store.log), []
    for number in range(1, 6):
        payload = b"%d" % number * 200
        store.append(update(mine, number, payload), payload, own=True)
        ends.append((directory / "00000001.seg").stat().st_size)
    store.close()
    return mine.log, ends


def spoil(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


class Ends(Exception):  # noqa: N818 - no error: the process ends here
    pass


class Ending(Disk):
    """The process ends when a file was cut, or when something was written over."""

    def truncate(self, fd: int, size: int) -> None:
        super().truncate(fd, size)
        raise Ends

    def write(self, fd: int, buffers: list[memoryview], offset: int) -> int:
        super().write(fd, buffers, offset)
        raise Ends


def test_an_opening_that_ends_once_damage_is_cut_off_leaves_a_fresh_log_id(tmp_path: Path) -> None:
    log, ends = written(tmp_path)
    spoil(tmp_path / "00000001.seg", ends[0] + 20)  # in the head of the second update
    with pytest.raises(Ends):
        opened(tmp_path, Ending())
    again = opened(tmp_path)
    assert again.counts()[Author(ME, log)] == 1
    assert again.log != log


def test_damage_is_cut_off_only_once_another_log_id_is_written_down(tmp_path: Path) -> None:
    log, ends = written(tmp_path)
    spoil(tmp_path / "00000001.seg", ends[0] + 20)
    before = (tmp_path / "00000001.seg").read_bytes()
    (tmp_path / ".log.json.new").mkdir()  # so that log.json can't be replaced
    store = opened(tmp_path)
    assert store.degraded
    assert (tmp_path / "00000001.seg").read_bytes() == before
    store.close()
    (tmp_path / ".log.json.new").rmdir()
    assert opened(tmp_path).log not in (0, log)


def test_a_damaged_own_update_is_given_up_once_another_log_id_is_written_down(
    tmp_path: Path,
) -> None:
    log, ends = written(tmp_path)
    mine = Author(ME, log)
    spoil(tmp_path / "00000001.seg", ends[1] - 1)  # the payload of the second update
    store = opened(tmp_path, Ending())
    with pytest.raises(Ends):
        store.get(mine, 2)
    again = opened(tmp_path)
    assert again.counts()[mine] == 1
    assert again.log != log


def test_an_unreadable_own_update_stays_while_no_other_log_id_can_be_written(
    tmp_path: Path,
) -> None:
    log, ends = written(tmp_path)
    mine = Author(ME, log)
    spoil(tmp_path / "00000001.seg", ends[1] - 1)
    store = opened(tmp_path)
    (tmp_path / ".log.json.new").mkdir()
    with pytest.raises(DamagedError):
        store.get(mine, 2)
    store.close()
    (tmp_path / ".log.json.new").rmdir()
    again = opened(tmp_path)
    assert again.log == log
    assert again.counts()[mine] == 5, "its number is known to be used"


def test_in_memory_no_own_update_is_taken_under_the_log_id_that_the_disk_keeps(
    tmp_path: Path,
) -> None:
    log, _ = written(tmp_path)
    store = opened(tmp_path)
    store.degrade("disk: full")  # by an update of another peer: the core knows of no fresh log yet
    with pytest.raises(StoreFailed, match="disk: full"):
        store.append(update(Author(ME, log), 6, b"six"), b"six", own=True)
    assert store.waiting == 0
    store.adopt_log(log + 1)  # as the core, told of it, does
    store.append(update(Author(ME, log + 1), 1, b"six"), b"six", own=True)
    assert store.waiting == 1
