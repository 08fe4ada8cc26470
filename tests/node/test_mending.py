"""What a disk did not take is on it once it is well, as if it had been written at once."""

import errno
import os
from dataclasses import replace
from pathlib import Path

import pytest

from shoal.gossip.limits import Limits
from shoal.gossip.names import Author, PeerId, RunId, digest
from shoal.gossip.records import Proof, Record, Update
from shoal.node import store as store_module
from shoal.node.segments import Disk
from shoal.node.store import Store, StoreFailed, StoreFull

RUN = RunId(digest(b"run"))
LIMITS = Limits()
BOB = Author(PeerId(b"b" * 32), 8)


class Failing(Disk):
    """A disk that fails in the calls named, and knows what of a file a power cut would leave."""

    def __init__(self, *calls: str) -> None:
        self.calls = calls
        self.safe = 0

    def _maybe(self, call: str) -> None:
        if call in self.calls:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    def write(self, fd: int, buffers: list[memoryview], offset: int) -> int:
        self._maybe("write")
        return super().write(fd, buffers, offset)

    def sync(self, fd: int) -> None:
        self._maybe("sync")
        super().sync(fd)
        self.safe = os.fstat(fd).st_size

    def truncate(self, fd: int, size: int) -> None:
        self._maybe("truncate")
        super().truncate(fd, size)


def update(author: Author, number: int) -> tuple[Record, bytes]:
    payload, raw = b"%d" % number * 100, b"record %d of %x" % (number, author.log)
    body = Update(author, number, number, "dense", digest(payload), len(payload))
    return Record(digest(raw), raw, body), payload


def opened(directory: Path, disk: Disk | None = None, limits: Limits = LIMITS) -> Store:
    return Store.open(directory, limits, run=RUN, disk=disk)


def sick(directory: Path, *calls: str, limits: Limits = LIMITS) -> tuple[Store, Failing, Author]:
    """Return a store with one update of BOB, in memory from now on, and the fresh own log."""
    disk = Failing()
    store = opened(directory, disk, limits)
    store.append(*update(BOB, 1))
    disk.calls = calls
    mine = Author(PeerId(b"m" * 32), store.degrade("disk: sick"))
    store.adopt_log(mine.log)
    return store, disk, mine


def test_a_log_that_was_sick_at_opening_is_not_mended(tmp_path: Path) -> None:
    store = opened(tmp_path)
    store.append(*update(BOB, 1))
    store.close()
    path = tmp_path / "00000001.seg"
    path.write_bytes(path.read_bytes()[:-1])
    before = {p: p.read_bytes() for p in tmp_path.iterdir()}
    store = opened(tmp_path, Failing("truncate"))
    why = store.degraded
    assert not store.mend()
    assert store.degraded == why != ""
    assert {p: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_an_own_update_is_synced_before_it_counts_as_mended(tmp_path: Path) -> None:
    store, disk, mine = sick(tmp_path, "write")
    for number in (1, 2):
        store.append(*update(mine, number), own=True)
    disk.calls, disk.safe = (), 0
    assert not store.mend(most=1)
    assert disk.safe == (tmp_path / "00000001.seg").stat().st_size
    assert store.mend()
    assert [s.own for s in store.records()] == [False, True, True]
    store.close()
    assert [s.own for s in opened(tmp_path).records()] == [False, True, True]


def test_the_log_id_of_the_next_opening_waits_until_all_is_synced(tmp_path: Path) -> None:
    store, disk, mine = sick(tmp_path, "write")
    store.append(*update(BOB, 2))
    recorded = (tmp_path / "log.json").read_bytes()
    disk.calls = ("sync",)
    assert not store.mend()
    assert store.degraded == "disk: Input/output error"
    assert (tmp_path / "log.json").read_bytes() == recorded
    disk.calls = ()
    assert store.mend()
    assert store.log == mine.log
    assert (tmp_path / "log.json").read_bytes() != recorded
    store.close()
    assert opened(tmp_path).counts() == {BOB: 2}


def test_a_log_id_that_cannot_be_written_down_leaves_the_log_in_memory(tmp_path: Path) -> None:
    store, disk, mine = sick(tmp_path, "write")
    store.append(*update(mine, 1), own=True)
    disk.calls = ()
    (tmp_path / ".log.json.new").mkdir()
    assert not store.mend()
    assert store.degraded
    (tmp_path / ".log.json.new").rmdir()
    assert store.mend()
    store.close()
    again = opened(tmp_path)
    assert (again.log, again.counts()) == (mine.log, {BOB: 1, mine: 1})


def test_what_is_written_makes_room_in_memory(tmp_path: Path) -> None:
    store, disk, _ = sick(tmp_path, "write", limits=replace(LIMITS, staging_bytes=800))
    for number in (2, 3, 4):
        store.append(*update(BOB, number))
    with pytest.raises(StoreFull):
        store.append(*update(BOB, 5))
    disk.calls = ()
    assert not store.mend(most=1)
    store.append(*update(BOB, 5))
    with pytest.raises(StoreFull):
        store.append(*update(BOB, 6))
    in_memory = store.size - (tmp_path / "00000001.seg").stat().st_size
    assert 0 < in_memory <= 800
    assert store.mend()
    assert store.size == (tmp_path / "00000001.seg").stat().st_size


def test_no_more_bytes_are_written_at_once_than_the_loop_can_wait_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, disk, _ = sick(tmp_path, "write")
    for number in range(2, 8):
        store.append(*update(BOB, number))
    disk.calls = ()
    monkeypatch.setattr(store_module, "MENDED_BYTES", 400)
    assert not store.mend()
    assert store.waiting == 4, "the second of some 230 bytes each goes beyond"
    assert store.mend(most=None)


def test_a_proof_that_a_disk_refused_is_written_once_it_is_well(tmp_path: Path) -> None:
    disk = Failing()
    store = opened(tmp_path, disk)
    store.append(*update(BOB, 1))
    raw = b"two of one number"
    proof = Record(digest(raw), raw, Proof(BOB, 1, b"one", b"two"))
    disk.calls = ("write",)
    with pytest.raises(StoreFailed):
        store.append(proof)
    with pytest.raises(StoreFailed):
        store.keep_admission(BOB.peer, b"signed")
    assert not store.whole
    disk.calls = ()
    assert store.mend()
    store.close()
    again = opened(tmp_path)
    assert (again.proofs, again.admissions) == ({(BOB, 1): raw}, {BOB.peer: b"signed"})


def test_nothing_is_on_disk_of_what_was_refused_since_its_file_was_not_written_down(
    tmp_path: Path,
) -> None:
    store = opened(tmp_path)
    (tmp_path / ".log.json.new").mkdir()  # so that log.json can't be replaced
    with pytest.raises(StoreFailed):
        store.append(*update(Author(BOB.peer, store.log), 1), own=True)
    store.close()
    assert opened(tmp_path).counts() == {}
