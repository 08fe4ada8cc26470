"""The log: what was acknowledged is there again, what was torn or damaged never counts."""

import errno
import os
import random
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.gossip.limits import Limits
from shoal.gossip.names import NO_HASH, Author, Hash, PeerId, RunId, digest
from shoal.gossip.records import Alive, Proof, Record, Standing, Update
from shoal.node.errors import ConfigError
from shoal.node.segments import HEAD_BYTES, Disk
from shoal.node.store import DamagedError, Store, StoreFailed, StoreFull

RUN = RunId(digest(b"run"))
LIMITS = Limits()
ALICE = Author(PeerId(b"a" * 32), 7)
BOB = Author(PeerId(b"b" * 32), 8)


def update(author: Author, number: int, payload: bytes | None = None) -> Record:
    raw = b"record %d of %x" % (number, author.log)
    statement = Update(
        author=author,
        number=number,
        turn=number,
        kind="dense",
        payload=digest(payload) if payload is not None else Hash(NO_HASH),
        size=len(payload or b""),
    )
    return Record(digest(raw), raw, statement)


def proof(author: Author, number: int) -> Record:
    raw = b"proof %d" % number
    return Record(digest(raw), raw, Proof(author, number, b"one", b"two"))


def opened(directory: Path, **options: object) -> Store:
    return Store.open(directory, LIMITS, run=RUN, **options)  # type: ignore[arg-type]


def fill(store: Store, first: int) -> None:
    for number in range(first, first + 100):
        store.append(update(ALICE, number, b"z" * 100), b"z" * 100)


def last_segment(directory: Path) -> Path:
    return max(directory.glob("*.seg"))


def contents(store: Store) -> list[tuple[Author, int, bytes, bytes | None]]:
    found = []
    for stored in store.records():
        got = store.get(stored.key.author, stored.key.number)
        assert got is not None
        found.append((stored.key.author, stored.key.number, *got))
    return found


def test_what_was_appended_is_there_after_reopening_in_the_same_order(tmp_path: Path) -> None:
    store = opened(tmp_path)
    store.append(update(ALICE, 1, b"one" * 500), b"one" * 500)
    store.append(update(BOB, 1))
    store.append(update(ALICE, 2, b"two"), b"two", own=True)
    store.append(proof(BOB, 2))
    store.keep_admission(BOB.peer, b"signed by the founder")
    before, log = contents(store), store.log
    store.close()
    store = opened(tmp_path)
    assert contents(store) == before
    assert [(a, n) for a, n, *_ in before] == [(ALICE, 1), (BOB, 1), (ALICE, 2)]
    assert store.log == log != 0
    assert store.proofs == {(BOB, 2): b"proof 2"}
    assert store.admissions == {BOB.peer: b"signed by the founder"}
    assert store.counts() == {ALICE: 2, BOB: 1}
    assert store.notes == ()
    assert store.size == sum(p.stat().st_size for p in tmp_path.glob("*.seg"))


def test_payloads_are_served_by_hash(tmp_path: Path) -> None:
    store = opened(tmp_path)
    payload = random.Random(1).randbytes(100_000)
    store.append(update(ALICE, 1, payload), payload)
    name = digest(payload)
    assert store.payload(name) == payload
    assert store.payload(digest(b"other")) is None


def test_the_same_update_is_written_once(tmp_path: Path) -> None:
    store = opened(tmp_path)
    store.append(update(ALICE, 1, b"x"), b"x")
    size = store.size
    store.append(update(ALICE, 1, b"x"), b"x")
    store.append(update(ALICE, 1, b"x"))
    store.append(proof(BOB, 2))
    grown = store.size
    store.append(proof(BOB, 2))
    assert (store.size, len(list(store.records()))) == (grown, 1)
    assert grown > size


def test_a_payload_may_follow_its_record(tmp_path: Path) -> None:
    store = opened(tmp_path)
    store.append(update(ALICE, 1, b"late"))
    assert store.get(ALICE, 1) == (b"record 1 of 7", None)
    store.append(update(ALICE, 1, b"late"), b"late")
    store.close()
    store = opened(tmp_path)
    assert store.get(ALICE, 1) == (b"record 1 of 7", b"late")
    assert len(list(store.records())) == 1


def test_counts_stop_at_a_hole(tmp_path: Path) -> None:
    store = opened(tmp_path)
    for number in (1, 2, 4, 2**63):
        store.append(update(ALICE, number))
    assert store.counts() == {ALICE: 2}
    assert store.has(ALICE, 2**63)
    assert not store.has(ALICE, 3)
    store.append(update(ALICE, 3))
    assert store.counts() == {ALICE: 4}
    store.close()
    assert opened(tmp_path).counts() == {ALICE: 4}


def test_only_updates_and_proofs_are_kept(tmp_path: Path) -> None:
    alive = Record(NO_HASH, b"", Alive(ALICE.peer, 1, 1, Standing.TRAINING))
    with pytest.raises(TypeError, match="Alive"):
        opened(tmp_path).append(alive)


def test_many_segments_read_like_one(tmp_path: Path) -> None:
    store = opened(tmp_path, segment_bytes=1000)
    payloads = [random.Random(n).randbytes(n * 37) for n in range(1, 41)]
    for number, payload in enumerate(payloads, 1):
        store.append(update(ALICE, number, payload), payload, own=number % 3 == 0)
    before = contents(store)
    assert len(list(tmp_path.glob("*.seg"))) > 20
    assert [p for *_, p in before] == payloads
    log = store.log
    store.close()
    store = opened(tmp_path, segment_bytes=1000)
    assert contents(store) == before
    assert (store.log, store.notes) == (log, ())


# ---------------------------------------------------------------- crashes


def test_a_log_cut_at_any_byte_is_a_prefix_and_can_be_written_again(tmp_path: Path) -> None:
    store = opened(tmp_path / "whole")
    ends = [store.size]
    for number in range(1, 6):
        store.append(update(ALICE, number, b"p" * number * 9), b"p" * number * 9, own=True)
        ends.append(store.size)
    before, log = contents(store), store.log
    store.close()
    whole = last_segment(tmp_path / "whole").read_bytes()
    log_id = (tmp_path / "whole" / "log.json").read_bytes()
    directory = tmp_path / "cut"
    directory.mkdir()
    for size in range(ends[2], len(whole)):
        (directory / "00000001.seg").write_bytes(whole[:size])
        (directory / "log.json").write_bytes(log_id)
        store = opened(directory)
        held = sum(1 for end in ends[1:] if end <= size)
        assert contents(store) == before[:held]
        assert store.log == log  # a torn append was never acknowledged: no number is used twice
        assert bool(store.notes) == (size not in ends)
        store.append(update(ALICE, held + 1, b"anew"), b"anew", own=True)
        store.close()
        again = opened(directory)
        assert len(contents(again)) == held + 1
        assert again.notes == ()
        again.close()


class Volatile(Disk):
    """A disk with a cache: remembers what would survive a power cut, by file."""

    def __init__(self) -> None:
        self.safe: dict[str, int] = {}

    def sync(self, fd: int) -> None:
        super().sync(fd)
        self.safe[os.readlink(f"/proc/self/fd/{fd}")] = os.fstat(fd).st_size


Step = tuple[int, int, bool]


@settings(max_examples=40, deadline=None)
@given(
    steps=st.lists(st.tuples(st.integers(0, 2), st.integers(0, 400), st.booleans()), max_size=30),
    segment_bytes=st.integers(300, 3000),
    seed=st.integers(0, 2**32),
)
def test_a_power_cut_loses_no_own_update(
    steps: Sequence[Step], segment_bytes: int, seed: int
) -> None:
    """Whatever the cache had not written is lost or garbage; what was acknowledged as own is not.

    And no number of the own log is ever given out twice: if one may be missing, the log id is new.
    """
    rng = random.Random(seed)
    disk = Volatile()
    with TemporaryDirectory() as name:
        directory = Path(name).resolve()  # as the kernel names what is open
        store = opened(directory, disk=disk, segment_bytes=segment_bytes)
        numbers: dict[Author, int] = {}
        wrote: dict[tuple[Author, int], bytes] = {}
        own: set[tuple[Author, int]] = set()
        for which, size, is_own in steps:
            author = Author(PeerId(bytes([which]) * 32), which)
            number = numbers[author] = numbers.get(author, 0) + 1
            payload = rng.randbytes(size)
            store.append(update(author, number, payload), payload, own=is_own)
            wrote[author, number] = payload
            if is_own:
                own.add((author, number))
        log = store.log
        store._segments._abandon()  # no sync: the process is gone
        for path in directory.glob("*.seg"):
            data = bytearray(path.read_bytes())
            safe = disk.safe[str(path)]
            cut = rng.randint(safe, len(data))
            tail = bytes(cut - safe) if rng.random() < 0.3 else data[safe:cut]
            path.write_bytes(data[:safe] + tail)
        store = opened(directory, segment_bytes=segment_bytes)
        found = {(a, n): p for a, n, _, p in contents(store)}
        assert own <= found.keys()
        assert found.items() <= wrote.items()
        assert store.log == log or any(".bad" in note for note in store.notes)
        again = opened(directory, segment_bytes=segment_bytes)
        assert {(a, n): p for a, n, _, p in contents(again)} == found
        assert again.log == store.log
        store.close()
        again.close()


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_damage_anywhere_is_set_aside_and_changes_the_log_id(seed: int) -> None:
    rng = random.Random(seed)
    with TemporaryDirectory() as name:
        directory = Path(name)
        store = opened(directory, segment_bytes=700)
        wrote = {}
        for number in range(1, 12):
            payload = rng.randbytes(rng.randrange(200))
            store.append(update(ALICE, number, payload), payload, own=True)
            wrote[ALICE, number] = payload
        log = store.log
        store.close()
        victim = rng.choice(sorted(directory.glob("*.seg")))
        data = bytearray(victim.read_bytes())
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        victim.write_bytes(data)
        try:
            store = opened(directory, segment_bytes=700)
        except ConfigError:
            pytest.fail("a flipped bit must not stop the daemon")
        found = {}
        for stored in store.records():
            try:
                got = store.get(*stored.key)
            except DamagedError:
                got = None
                assert not store.has(*stored.key)
            if got is not None:
                found[stored.key.author, stored.key.number] = got[1]
        assert found.items() <= wrote.items()
        assert len(found) < len(wrote)
        # In a sealed segment a damaged payload is noticed when it is read; all else at opening.
        if store.notes:
            assert store.log != log
            assert victim.with_suffix(".seg.bad").exists()
        else:
            assert len(found) == len(wrote) - 1
        store.close()


def test_a_damaged_payload_is_forgotten_for_good_and_can_be_stored_again(tmp_path: Path) -> None:
    payloads = [bytes([n]) * 400 for n in range(3)]

    def damage() -> Store:
        store = opened(tmp_path, segment_bytes=600)
        for number, payload in enumerate(payloads, 1):
            store.append(update(ALICE, number, payload), payload)
        store.close()
        first = tmp_path / "00000001.seg"
        data = first.read_bytes()
        first.write_bytes(data[:-1] + b"!")
        store = opened(tmp_path, segment_bytes=600)
        with pytest.raises(DamagedError, match="payload does not check"):
            store.get(ALICE, 1)
        return store

    store = damage()
    assert store.payload(digest(payloads[0])) is None
    assert store.get(ALICE, 1) is None
    assert store.counts() == {ALICE: 0}
    log = store.log
    store.close()
    store = opened(tmp_path, segment_bytes=600)
    assert (store.counts(), store.notes, store.log) == ({ALICE: 0}, (), log)
    store.append(update(ALICE, 1, payloads[0]), payloads[0])
    assert store.get(ALICE, 1) == (b"record 1 of 7", payloads[0])
    store.close()
    store = opened(tmp_path, segment_bytes=600)
    assert [p for *_, p in contents(store)] == [payloads[1], payloads[2], payloads[0]]


def test_a_damaged_own_update_means_a_fresh_log_id_after_the_restart(tmp_path: Path) -> None:
    store = opened(tmp_path, segment_bytes=200)
    mine = Author(ALICE.peer, store.log)
    for number in (1, 2):
        store.append(update(mine, number, b"p" * 300), b"p" * 300, own=True)
    store.close()
    first = tmp_path / "00000001.seg"
    first.write_bytes(first.read_bytes()[:-1] + b"!")
    store = opened(tmp_path, segment_bytes=200)
    assert store.log == mine.log
    with pytest.raises(DamagedError):
        store.get(mine, 1)
    for number in (3, 4, 5):  # this process knows which numbers it gave out
        store.append(update(mine, number, b"p" * 300), b"p" * 300, own=True)
    assert store.log == mine.log
    store.close()
    assert opened(tmp_path, segment_bytes=200).log != mine.log


def test_an_adopted_log_id_is_the_one_of_the_next_opening(tmp_path: Path) -> None:
    store = opened(tmp_path)
    store.adopt_log(77)
    store.append(update(Author(ALICE.peer, 77), 1), own=True)
    store.close()
    assert opened(tmp_path).log == 77


@pytest.mark.parametrize("victim", ["00000001.seg", "00000003.seg", "log.json"])
def test_a_lost_file_means_a_fresh_log_id(tmp_path: Path, victim: str) -> None:
    store = opened(tmp_path, segment_bytes=200)
    for number in range(1, 4):
        store.append(update(ALICE, number), own=True)
    log = store.log
    store.close()
    assert (tmp_path / "00000002.seg").exists()
    (tmp_path / victim).unlink()
    store = opened(tmp_path, segment_bytes=200)
    assert store.log != log
    store.close()
    assert opened(tmp_path, segment_bytes=200).log == store.log


def test_a_log_of_another_run_is_refused_with_the_file_named(tmp_path: Path) -> None:
    store = opened(tmp_path)
    store.append(update(ALICE, 1))
    store.close()
    with pytest.raises(ConfigError, match=r"00000001\.seg belongs to another run"):
        Store.open(tmp_path, LIMITS, run=RunId(digest(b"other")))


def test_reading_only_changes_nothing_on_disk(tmp_path: Path) -> None:
    store = opened(tmp_path)
    store.append(update(ALICE, 1, b"x"), b"x")
    store.append(update(ALICE, 2, b"y"), b"y")
    store.close()
    path = last_segment(tmp_path)
    path.write_bytes(path.read_bytes()[:-1])
    before = {p: p.read_bytes() for p in tmp_path.iterdir()}
    store = opened(tmp_path, readonly=True)
    assert [n for _, n, *_ in contents(store)] == [1]
    with pytest.raises(StoreFailed, match="reading only"):
        store.append(update(ALICE, 2))
    assert {p: p.read_bytes() for p in tmp_path.iterdir()} == before


# ---------------------------------------------------------------- full and failing disks


def test_at_its_bound_the_log_is_full_but_proofs_still_fit(tmp_path: Path) -> None:
    store = Store.open(tmp_path, replace(LIMITS, log_bytes=2000), run=RUN)
    with pytest.raises(StoreFull, match=r"^log full$"):
        fill(store, 1)
    held = store.counts()[ALICE]
    assert 0 < store.size <= 2000
    store.append(proof(BOB, 1))
    store.keep_admission(BOB.peer, b"proof")
    store.close()
    store = opened(tmp_path)
    assert store.counts() == {ALICE: held}
    assert list(store.proofs) == [(BOB, 1)]


class Sick(Disk):
    """A disk that fails as told: which call, and after writing how many bytes."""

    def __init__(self, fail: str, code: int, partial: int = 0) -> None:
        self.fail, self.code, self.partial = fail, code, partial
        self.well = True

    def _maybe(self, call: str) -> None:
        if not self.well and call in self.fail:
            raise OSError(self.code, os.strerror(self.code))

    def write(self, fd: int, buffers: list[memoryview], offset: int) -> int:
        if not self.well and "write" in self.fail and self.partial:
            done = os.pwrite(fd, b"".join(buffers)[: self.partial], offset)
            self.partial = 0
            return done
        self._maybe("write")
        return super().write(fd, buffers, offset)

    def sync(self, fd: int) -> None:
        self._maybe("sync")
        super().sync(fd)

    def truncate(self, fd: int, size: int) -> None:
        self._maybe("truncate")
        super().truncate(fd, size)


@pytest.mark.parametrize("partial", [0, 1, HEAD_BYTES - 1, HEAD_BYTES + 3, HEAD_BYTES + 15])
@pytest.mark.parametrize("fail", ["write", "sync", "write truncate", "sync truncate"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EIO])
def test_a_failed_append_leaves_nothing_and_the_next_one_counts(
    tmp_path: Path, fail: str, code: int, partial: int
) -> None:
    disk = Sick(fail, code, partial)
    store = opened(tmp_path, disk=disk)
    store.append(update(ALICE, 1, b"before"), b"before", own=True)
    disk.well = False
    with pytest.raises(StoreFailed, match=f"^disk: {os.strerror(code)}$"):
        store.append(update(ALICE, 2, b"never"), b"never", own=True)
    assert not store.has(ALICE, 2)
    disk.well = True
    store.append(update(ALICE, 2, b"after"), b"after", own=True)
    expected = [(ALICE, 1, b"record 1 of 7", b"before"), (ALICE, 2, b"record 2 of 7", b"after")]
    assert contents(store) == expected
    store.close()
    assert contents(opened(tmp_path)) == expected


def test_an_own_update_that_could_not_be_synced_never_comes_back(tmp_path: Path) -> None:
    disk = Sick("sync truncate", errno.EIO)
    store = opened(tmp_path, disk=disk)
    store.append(update(ALICE, 1, b"before"), b"before", own=True)
    disk.well = False
    with pytest.raises(StoreFailed):
        store.append(update(ALICE, 2, b"never"), b"never", own=True)
    store.close()
    assert opened(tmp_path).counts() == {ALICE: 1}


def test_a_sick_disk_leaves_training_in_memory_under_a_fresh_log_id(tmp_path: Path) -> None:
    disk = Sick("write", errno.ENOSPC)
    store = Store.open(tmp_path, replace(LIMITS, staging_bytes=2000), run=RUN, disk=disk)
    store.append(update(ALICE, 1, b"disk"), b"disk")
    log = store.log
    disk.well = False
    with pytest.raises(StoreFailed):
        store.append(update(ALICE, 2, b"mem"), b"mem")
    fresh = store.degrade("disk: full")
    assert fresh == store.log != log
    mine = Author(ALICE.peer, fresh)
    store.append(update(ALICE, 2, b"mem"), b"mem")
    store.append(update(mine, 1, b"mine"), b"mine", own=True)
    assert store.counts() == {ALICE: 2, mine: 1}
    assert store.get(mine, 1) == (b"record 1 of %x" % fresh, b"mine")
    assert store.payload(digest(b"mem")) == b"mem"
    assert store.payload(digest(b"mine")) == b"mine"
    assert [s.key.number for s in store.records()] == [1, 2, 1]
    with pytest.raises(StoreFull):
        fill(store, 3)
    store.close()
    store = opened(tmp_path)
    assert store.counts() == {ALICE: 1}
    assert store.log == log  # nothing was published under its number 2 from here


def test_what_a_full_disk_did_not_take_is_written_in_order_once_it_has_room(
    tmp_path: Path,
) -> None:
    disk = Sick("write", errno.ENOSPC)
    store = opened(tmp_path, disk=disk)
    store.append(update(ALICE, 1, b"disk"), b"disk", own=True)
    disk.well = False
    with pytest.raises(StoreFailed):
        store.append(update(ALICE, 2, b"never"), b"never", own=True)
    mine = Author(ALICE.peer, store.degrade("disk: full"))
    store.adopt_log(mine.log)  # as the core, told of it, answers
    for number in (1, 2, 3):
        store.append(update(BOB, number, b"same"), b"same")
        store.append(update(mine, number, b"%d" % number), b"%d" % number, own=True)
    store.append(proof(BOB, 9))
    store.keep_admission(BOB.peer, b"signed")
    before = contents(store)
    assert not store.mend()
    assert (store.waiting, store.whole) == (6, False)
    assert store.degraded == f"disk: {os.strerror(errno.ENOSPC)}"
    disk.well = True
    assert not store.mend(most=2), "as much as was asked for"
    assert (store.waiting, contents(store)) == (4, before)
    assert store.payload(digest(b"same")) == b"same"
    store.append(update(mine, 4, b"4"), b"4", own=True)
    assert store.waiting == 5, "nothing overtakes what came before it"
    assert store.mend()
    assert (store.waiting, store.whole, store.degraded) == (0, True, "")
    store.append(update(mine, 5, b"5"), b"5", own=True)
    after, proofs = contents(store), store.proofs
    assert after[: len(before)] == before
    assert store.counts() == {ALICE: 1, BOB: 3, mine: 5}
    assert store.size == sum(p.stat().st_size for p in tmp_path.glob("*.seg"))
    store.close()
    again = opened(tmp_path)
    assert (contents(again), again.log, again.notes) == (after, mine.log, ())
    assert (again.proofs, again.admissions) == (proofs, {BOB.peer: b"signed"})


def test_no_number_is_used_twice_when_the_log_is_on_disk_in_part(tmp_path: Path) -> None:
    disk = Sick("write", errno.ENOSPC)
    store = opened(tmp_path, disk=disk)
    store.append(update(ALICE, 1), own=True)
    disk.well = False
    mine = Author(ALICE.peer, store.degrade("disk: full"))
    store.adopt_log(mine.log)
    for number in (1, 2, 3):
        store.append(update(mine, number), own=True)
    disk.well = True
    assert not store.mend(most=2)
    store.close()  # as killed here: others may have heard of number 3
    again = opened(tmp_path)
    assert again.counts() == {ALICE: 1, mine: 2}
    assert again.log == ALICE.log or again.log not in (0, mine.log)


def test_anothers_update_that_had_to_wait_leaves_the_own_log_id(tmp_path: Path) -> None:
    disk = Sick("write", errno.ENOSPC)
    store = opened(tmp_path, disk=disk)
    log = store.log
    disk.well = False
    store.degrade("disk: full")
    store.append(update(BOB, 1, b"x"), b"x")
    disk.well = True
    assert store.mend()
    assert store.log == log
    store.append(update(Author(ALICE.peer, log), 1), own=True)
    assert store.waiting == 0


def test_a_disk_that_is_full_until_the_end_keeps_what_it_had(tmp_path: Path) -> None:
    disk = Sick("write sync truncate", errno.ENOSPC)
    store = opened(tmp_path, disk=disk)
    store.append(update(ALICE, 1, b"disk"), b"disk", own=True)
    log, disk.well = store.log, False
    mine = Author(ALICE.peer, store.degrade("disk: full"))
    store.adopt_log(mine.log)
    store.append(update(mine, 1, b"memory"), b"memory", own=True)
    assert not store.mend(most=None)
    assert store.waiting == 1
    store.close()
    again = opened(tmp_path)
    assert (again.counts(), again.log) == ({ALICE: 1}, log)


def test_a_segment_that_could_not_be_written_down_holds_nothing_that_was_refused(
    tmp_path: Path,
) -> None:
    store = opened(tmp_path)
    (tmp_path / ".log.json.new").mkdir()  # so that log.json can't be replaced
    with pytest.raises(StoreFailed):
        store.append(update(ALICE, 1, b"never"), b"never", own=True)
    (tmp_path / ".log.json.new").rmdir()
    store.append(update(ALICE, 1, b"after"), b"after", own=True)
    store.close()
    again = opened(tmp_path)
    assert contents(again) == [(ALICE, 1, b"record 1 of 7", b"after")]


def test_a_disk_that_is_sick_at_opening_leaves_a_degraded_store(tmp_path: Path) -> None:
    store = opened(tmp_path)
    store.append(update(ALICE, 1, b"one"), b"one")
    store.append(update(ALICE, 2, b"two"), b"two")
    log = store.log
    store.close()
    path = last_segment(tmp_path)
    path.write_bytes(path.read_bytes()[:-1])
    disk = Sick("truncate", errno.EROFS)
    disk.well = False
    store = opened(tmp_path, disk=disk)
    assert store.degraded == "disk: Read-only file system"
    assert store.log != log
    assert store.counts() == {ALICE: 1}
    store.append(update(ALICE, 2, b"two"), b"two")
    assert store.counts() == {ALICE: 2}


@pytest.mark.real
def test_a_real_file_size_limit_is_a_failed_append(tmp_path: Path) -> None:
    """RLIMIT_FSIZE makes the kernel write part of a frame and then refuse, as a full disk does."""
    program = f"""
import resource, sys
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parent)!r})
import test_store as t
store = t.opened(Path({str(tmp_path)!r}))
resource.setrlimit(resource.RLIMIT_FSIZE, (3000, resource.RLIM_INFINITY))
try:
    for number in range(1, 100):
        store.append(t.update(t.ALICE, number, b'q' * 500), b'q' * 500, own=True)
except t.StoreFailed as failed:
    print(number - 1, store.size, failed.reason)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=200
    )
    held, size, reason = done.stdout.strip().split(" ", 2)
    assert reason == "disk: File too large"
    assert last_segment(tmp_path).stat().st_size == int(size) < 3000
    assert opened(tmp_path).counts() == {ALICE: int(held)}
    assert int(held) > 0
