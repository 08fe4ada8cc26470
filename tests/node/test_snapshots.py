"""A run in K integers: what is given to joiners, what they keep, and what they begin from."""

import asyncio
import shutil
import struct
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.gossip.frontier import Frontier
from shoal.gossip.limits import Limits
from shoal.gossip.names import Author, Hash, PeerId, RunId, digest
from shoal.gossip.records import Record, Update
from shoal.gossip.snapshot import Line
from shoal.node import pipe, snapshots
from shoal.node.addresses import Address
from shoal.node.admission import Admission
from shoal.node.duties import Duties
from shoal.node.errors import ConfigError
from shoal.node.identity import Identity
from shoal.node.snapshots import Donor
from shoal.node.store import Store
from shoal.node.wire import requests
from shoal.node.wire.fields import WireError

ALICE, BOB = Author(PeerId(b"a" * 32), 7), Author(PeerId(b"b" * 32), 8)
ME, OTHER = b"m" * 32, b"o" * 32
POOL = 64
RUN: dict[str, Any] = {
    "run": {"name": "tiny", "seed": 3, "turns": 50},
    "task": {"name": "digits", "width": 8},
    "local": {"steps": 2, "batch": 8},
    "exchange": {
        "update": {"kind": "scalar", "directions": "pool", "pool": POOL, "perturbations": 20}
    },
    "swarm": {"min_peers": 2},
}
SUMS = struct.pack(f"<{POOL}i", *range(POOL))


def update(author: Author, number: int) -> Record:
    raw = b"record %d of %x" % (number, author.log)
    name = digest(b"x")
    return Record(digest(raw), raw, Update(author, number, number, "scalar", name, 1, b"x"))


def filled(count: int) -> Frontier:
    frontier = Frontier()
    for author in (ALICE, BOB):
        for number in range(1, count + 1):
            record = update(author, number)
            assert isinstance(record.statement, Update)
            frontier.add(record.statement, record.id)
    return frontier


# ---------------------------------------------------------------- on the wire

KEY = st.binary(min_size=32, max_size=32)
LINES = st.lists(
    st.builds(
        Line,
        st.builds(
            Author, st.binary(min_size=32, max_size=32).map(PeerId), st.integers(0, 2**64 - 1)
        ),
        st.integers(1, 2**32 - 1),
        KEY.map(Hash),
        st.integers(1, 2**32 - 1),
    ),
    max_size=5,
    unique_by=lambda line: line.author,
).map(lambda lines: tuple(sorted(lines, key=lambda line: line.author)))
LANE = st.integers(0, 2**64 - 1)


@given(LINES, LANE, LANE, st.binary(max_size=100))
def test_a_snapshot_survives_the_wire(
    lines: tuple[Line, ...], low: int, high: int, sums: bytes
) -> None:
    donor = PeerId(b"d" * 32)
    snapshot, again = requests.decode_snapshot(
        requests.encode_snapshot(lines, (low, high), sums), donor
    )
    assert (snapshot.donor, snapshot.lines, snapshot.fingerprint) == (donor, lines, (low, high))
    assert again == sums


@pytest.mark.parametrize("fault", ["order", "count", "turn", "length"])
def test_a_snapshot_that_makes_no_sense_is_refused(fault: str) -> None:
    one, two = (Line(a, 2, digest(b"x"), 3) for a in (ALICE, BOB))
    lines = {
        "order": [two, one],
        "count": [one, replace(two, count=0)],
        "turn": [one, replace(two, turn=0)],
        "length": [one, replace(two, hash=Hash(b"short"))],
    }[fault]
    with pytest.raises(WireError):
        requests.decode_snapshot(requests.encode_snapshot(lines, (1, 2), SUMS), PeerId(b"d" * 32))


# ---------------------------------------------------------------- who gives one


class Worker:
    """What a donor asks."""

    def __init__(self, *answers: snapshots.Sums | Exception) -> None:
        self.answers = list(answers)
        self.asked = 0

    async def sums(self) -> snapshots.Sums:
        self.asked += 1
        await asyncio.sleep(0)
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer


def donor(frontier: Frontier, worker: Worker, log_bytes: int = 10_000) -> tuple[Donor, list[float]]:
    now = [0.0]
    return Donor(frontier, worker.sums, lambda: log_bytes, clock=lambda: now[0]), now


def test_a_snapshot_says_where_the_log_goes_on() -> None:
    frontier, counts = filled(5), ((ALICE, 3), (BOB, 5))
    one, _ = donor(frontier, Worker((counts, (7, 8), SUMS)))
    told, sums = requests.decode_snapshot(asyncio.run(one.give()), PeerId(b"d" * 32))
    assert told.counts() == counts
    assert told.lines[0].hash == frontier.logs[ALICE].hash_at(3)
    assert told.lines[0].turn == 3
    assert (told.fingerprint, sums) == ((7, 8), SUMS)


def test_it_is_made_once_in_a_while_for_however_many_ask() -> None:
    counts = ((ALICE, 3),)
    worker = Worker((counts, (1, 1), SUMS), (((ALICE, 4),), (2, 2), SUMS))
    one, now = donor(filled(5), worker)

    async def many() -> list[bytes]:
        return await asyncio.gather(*(one.give() for _ in range(5)))

    assert len(set(asyncio.run(many()))) == 1
    assert worker.asked == 1
    now[0] = snapshots.PINNED
    told, _ = requests.decode_snapshot(asyncio.run(one.give()), PeerId(b"d" * 32))
    assert told.counts() == ((ALICE, 4),)


def test_a_run_that_has_just_begun_is_asked_again() -> None:
    worker = Worker(((), (1, 1), SUMS), (((ALICE, 1),), (1, 1), SUMS))
    one, _ = donor(filled(5), worker)
    assert asyncio.run(one.give()) == b""
    assert asyncio.run(one.give()) != b""


def test_a_run_that_is_more_than_sums_is_asked_once() -> None:
    worker = Worker((((ALICE, 1),), (1, 1), b""))
    one, now = donor(filled(5), worker)
    assert asyncio.run(one.give()) == b""
    now[0] = 1e9
    assert asyncio.run(one.give()) == b""


def test_a_worker_that_is_down_costs_a_joiner_nothing_but_the_log() -> None:
    worker = Worker(ConfigError("down"), (((ALICE, 1),), (1, 1), SUMS))
    one, _ = donor(filled(5), worker)
    assert asyncio.run(one.give()) == b""
    assert asyncio.run(one.give()) != b""


def test_a_short_log_is_better_unless_it_is_not_whole() -> None:
    counts, answer = ((ALICE, 3),), (((ALICE, 3),), (1, 1), SUMS)
    whole, _ = donor(filled(5), Worker(answer), log_bytes=100)
    assert asyncio.run(whole.give()) == b""
    cut = Frontier()
    cut.start([Line(ALICE, 3, digest(b"hash"), 3)])
    short, _ = donor(cut, Worker(answer), log_bytes=100)
    told, _ = requests.decode_snapshot(asyncio.run(short.give()), PeerId(b"d" * 32))
    assert told.counts() == counts
    assert told.lines[0].hash == digest(b"hash")


def test_what_a_closing_took_away_meanwhile_is_not_given() -> None:
    frontier = filled(5)
    frontier.close(ALICE, 2)
    one, _ = donor(frontier, Worker((((ALICE, 3),), (1, 1), SUMS)))
    assert asyncio.run(one.give()) == b""


# ---------------------------------------------------------------- who keeps one


def test_what_was_kept_is_there_again_and_can_be_forgotten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = Line(ALICE, 3, digest(b"hash"), 3)
    given = {b"a" * 32: b"garbage", b"b" * 32: requests.encode_snapshot([line], (5, 6), SUMS)}

    async def fetch(address: Any, peer: PeerId, *_: object) -> bytes:
        return given[bytes(peer)]

    monkeypatch.setattr(snapshots, "fetch_snapshot", fetch)
    path = tmp_path / "snapshot"
    run = RunId(digest(b"run"))
    addresses = [Address("ip4", "127.0.0.1", 1, peer=PeerId(p), run=run) for p in given]
    found = asyncio.run(snapshots.ask(addresses, Admission(run), Identity.generate(), path))
    assert found is not None
    assert found.donor == b"b" * 32, "the first told garbage"
    assert snapshots.load(path, run) == (found, SUMS)
    whole = path.read_bytes()
    for at in (0, 40, 80, len(whole) - 1):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(snapshots.SnapshotError):
            snapshots.load(path, run)
    path.write_bytes(whole)
    with pytest.raises(snapshots.SnapshotError):
        snapshots.load(path, RunId(digest(b"another run")))
    assert snapshots.begin_with(path, run) == (found, SUMS)
    path.write_bytes(whole[:50])
    assert snapshots.begin_with(path, run) is None
    assert not path.exists()
    snapshots.forget(path)
    assert snapshots.load(path, run) is None
    given[b"a" * 32] = b""  # the log is the better way, says the first
    assert asyncio.run(snapshots.ask(addresses, Admission(run), Identity.generate(), path)) is None
    assert not path.exists()


# ---------------------------------------------------------------- the log above one


def test_a_log_goes_on_above_a_snapshot_and_is_plain_without_it(tmp_path: Path) -> None:
    limits, run = Limits(), RunId(digest(b"run"))
    store = Store.open(tmp_path, limits, run=run, summed={ALICE: 10, BOB: 2})
    assert store.counts() == {ALICE: 10, BOB: 2}
    for number in (12, 11, 14):
        store.append(update(ALICE, number))
    assert store.counts() == {ALICE: 12, BOB: 2}
    assert store.record(*(ALICE, 14)) == update(ALICE, 14).raw
    assert store.record(ALICE, 10) is None
    store.close()
    again = Store.open(tmp_path, limits, run=run, summed={ALICE: 10, BOB: 2})
    assert again.counts() == {ALICE: 12, BOB: 2}
    assert [s.key.number for s in again.records()] == [12, 11, 14]
    again.forget_snapshot()
    assert again.counts() == {ALICE: 0, BOB: 0}
    for number in [13, *range(10, 0, -1)]:
        again.append(update(ALICE, number))
    assert again.counts() == {ALICE: 14, BOB: 0}
    for number in range(1, 15):
        assert again.record(ALICE, number) == update(ALICE, number).raw
    again.close()


# ---------------------------------------------------------------- the model at one


def setup(run: dict[str, Any]) -> pipe.Setup:
    return pipe.Setup(run, ME, device="cpu", threads=1)


def ask(worker: Duties, request: pipe.Request, *bodies: bytes) -> Any:
    return worker.answer(request, memoryview(b"".join(bodies)))[0]


def begun(
    founded: pipe.Founded,
    directory: Path,
    told: pipe.Summed | None = None,
    sums: bytes = b"",
    held: Sequence[tuple[bytes, int, int]] = (),
) -> tuple[Duties, pipe.Opened]:
    """Open a worker, with a snapshot if there is one."""
    directory.mkdir(exist_ok=True)
    worker = Duties()
    request = pipe.Open(
        setup=setup(founded.run),
        parameters=founded.parameters,
        layout=founded.layout,
        initial_root=founded.initial_root,
        initial=str(directory / "initial.bin"),
        checkpoint=str(directory / "checkpoint" / "state"),
        held=list(held),
        summed=[] if told is None else told.frontier,
    )
    answer = ask(worker, request, sums)
    assert isinstance(answer, pipe.Opened)
    return worker, answer


@pytest.fixture(scope="module")
def founded() -> pipe.Founded:
    answer = ask(Duties(), pipe.Found(setup(RUN)))
    assert isinstance(answer, pipe.Founded)
    return answer


def payloads(count: int) -> list[bytes]:
    return [bytes(((7 * n + 3 * k) % 5 - 2) & 255 for k in range(20)) for n in range(count)]


def apply(worker: Duties, first: int, last: int) -> pipe.Done:
    given = payloads(last)[first - 1 :]
    items = [
        pipe.Item(OTHER, 1, number, number, "scalar", len(data), len(data))
        for number, data in enumerate(given, first)
    ]
    done = ask(worker, pipe.Apply(items), *given)
    assert isinstance(done, pipe.Done)
    assert not any(result.refused for result in done.results)
    return done


def summed(worker: Duties) -> tuple[pipe.Summed, bytes]:
    answer, body = worker.answer(pipe.Sums(), memoryview(b""))
    assert isinstance(answer, pipe.Summed)
    return answer, b"".join(bytes(part) for part in body)


def test_who_begins_with_the_sums_holds_the_same_model_ever_after(
    founded: pipe.Founded, tmp_path: Path
) -> None:
    one, _ = begun(founded, tmp_path / "one")
    apply(one, 1, 6)
    told, sums = summed(one)
    assert len(sums) == 4 * POOL
    two, answer = begun(founded, tmp_path / "two", told, sums)
    assert (answer.frontier, answer.fingerprint) == (told.frontier, told.fingerprint)
    assert apply(two, 7, 9).fingerprint == apply(one, 7, 9).fingerprint
    assert summed(two) == summed(one)
    ask(two, pipe.Reset())
    assert summed(two) == (told, sums), "it begins where it began"
    ask(two, pipe.Reset(whole=True))
    assert apply(two, 1, 9).fingerprint == ask(one, pipe.Recompute()).fingerprint


def test_after_a_crash_its_checkpoint_counts_or_else_the_snapshot(
    founded: pipe.Founded, tmp_path: Path
) -> None:
    one, _ = begun(founded, tmp_path / "one")
    apply(one, 1, 6)
    told, sums = summed(one)
    two, _ = begun(founded, tmp_path / "two", told, sums)
    done = apply(two, 7, 8)
    ask(two, pipe.Save())
    held = done.frontier
    _, again = begun(founded, tmp_path / "two", told, sums, held=held)
    assert (again.frontier, again.fingerprint) == (held, done.fingerprint)
    state = tmp_path / "two" / "checkpoint" / "state"
    shutil.copy(state, tmp_path / "state")
    state.write_bytes(b"damaged")
    _, again = begun(founded, tmp_path / "two", told, sums, held=held)
    assert again.note
    assert (again.frontier, again.fingerprint) == (told.frontier, told.fingerprint)
    shutil.copy(tmp_path / "state", state)
    _, again = begun(founded, tmp_path / "two", told, sums, held=told.frontier)
    assert "beyond the log" in again.note
    assert (again.frontier, again.fingerprint) == (told.frontier, told.fingerprint)


@pytest.mark.parametrize("sums", [b"", b"x" * 12, bytes(4 * POOL + 4)])
def test_sums_of_another_size_are_not_used(
    founded: pipe.Founded, tmp_path: Path, sums: bytes
) -> None:
    """The core then sees that the model is not where the snapshot should be, and drops it."""
    _, fresh = begun(founded, tmp_path / "one")
    told = pipe.Summed([(OTHER, 1, 5)], (1, 2))
    _, answer = begun(founded, tmp_path / "two", told, sums)
    assert answer.frontier == []
    assert answer.fingerprint == fresh.fingerprint


def test_a_run_that_is_more_than_sums_gives_none(tmp_path: Path) -> None:
    run = RUN | {"exchange": {"update": {"kind": "dense", "levels": 3}}}
    answer = ask(Duties(), pipe.Found(setup(run)))
    worker, _ = begun(answer, tmp_path / "one")
    assert summed(worker)[1] == b""
    _, other = begun(answer, tmp_path / "two", pipe.Summed([(OTHER, 1, 5)], (1, 2)), SUMS)
    assert other.frontier == []


def test_a_checkpoint_of_a_model_that_began_with_a_dropped_snapshot_is_not_taken(
    founded: pipe.Founded, tmp_path: Path
) -> None:
    """Killed once the log was fetched and before another was written: it would seem to fit."""
    one, fresh = begun(founded, tmp_path / "one")
    apply(one, 1, 6)
    told, sums = summed(one)
    wrong = struct.pack(f"<{POOL}i", *range(1, POOL + 1))
    two, _ = begun(founded, tmp_path / "two", told, wrong)
    held = apply(two, 7, 8).frontier
    ask(two, pipe.Save())
    _, same = begun(founded, tmp_path / "two", told, wrong, held=held)
    assert (same.frontier, same.note) == (held, "")
    _, other = begun(founded, tmp_path / "two", told, sums, held=held)
    assert (other.frontier, other.fingerprint) == (told.frontier, told.fingerprint)
    assert "began elsewhere" in other.note
    _, plain = begun(founded, tmp_path / "two", held=held)
    assert (plain.frontier, plain.fingerprint) == ([], fresh.fingerprint)
    assert "began elsewhere" in plain.note


def test_what_was_given_out_is_not_given_again_once_it_does_not_stand() -> None:
    frontier, counts = filled(5), ((ALICE, 3), (BOB, 5))
    later = ((ALICE, 1), (BOB, 5))
    one, _ = donor(frontier, Worker((counts, (7, 8), SUMS), (later, (5, 6), SUMS)))
    assert asyncio.run(one.give())
    frontier.close(ALICE, 2)
    told, _ = requests.decode_snapshot(asyncio.run(one.give()), PeerId(b"d" * 32))
    assert (told.counts(), told.fingerprint) == (later, (5, 6))


def test_nothing_is_given_of_a_model_that_nobody_has_confirmed() -> None:
    counts = ((ALICE, 3),)
    steady = [False, True, False, True, True]
    worker = Worker((counts, (1, 1), SUMS), (counts, (2, 2), SUMS))
    one = Donor(filled(5), worker.sums, lambda: 10_000, lambda: steady.pop(0))
    assert asyncio.run(one.give()) == b""
    assert worker.asked == 0
    assert asyncio.run(one.give()) == b"", "it went while the worker summed"
    assert asyncio.run(one.give()) != b""
