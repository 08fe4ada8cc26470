"""`shoal replay`: one model by every order of one log, and every wrong record named.

The directory is made by training: three authors with the worker's real duties and real keys, whose
records lie in a real log, some with their payload beside them and some with it inside.
"""

import json
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import msgspec
import pytest
import safetensors
import safetensors.torch
import torch
from support.daemons import Daemon, agree, run_file

from shoal.gossip.frontier import Frontier
from shoal.gossip.limits import Limits
from shoal.gossip.names import Author, RunId, digest
from shoal.gossip.records import Proof, Record, Statement, Update
from shoal.node import cli, genesis, pipe
from shoal.node import replay as module
from shoal.node import status as told
from shoal.node.audit import Audit
from shoal.node.duties import Duties
from shoal.node.genesis import Genesis
from shoal.node.home import Home
from shoal.node.identity import Identity, peer_text
from shoal.node.replay import CHECKPOINT, DAEMON, Compared
from shoal.node.segments import Bounds, Disk, Head, Kind, Segments, check_of
from shoal.node.status import State, Status
from shoal.node.store import Store
from shoal.node.wire.records import RecordReader, Sealer

TURNS, CLOSED, SAVED = 8, 6, 7
"""Turns; the number of which the last author signs two updates; turns in the early checkpoint."""
TABLES: dict[str, Any] = {
    "run": {"name": "tiny", "seed": 3, "turns": TURNS},
    "task": {"name": "digits", "width": 4},
    "local": {"steps": 1, "batch": 4, "optimizer": {"name": "sgd", "lr": 0.1}},
    "exchange": {"update": {"kind": "dense", "levels": 3}},
    "swarm": {"min_peers": 3},
}
ALICE, BOB, EVE = range(3)
SEGMENT = "00000001.seg"


def hexadecimal(lanes: tuple[int, int]) -> str:
    return "".join(f"{lane:016x}" for lane in lanes)


def ask(worker: Duties, request: pipe.Request, *bodies: bytes) -> Any:
    return worker.answer(request, memoryview(b"".join(bodies)))[0]


@dataclass
class Trained:
    """A directory made by training, and what is known of it from elsewhere."""

    path: Path
    genesis: Genesis
    identities: list[Identity]
    payloads: dict[tuple[int, int], bytes] = field(default_factory=dict)
    """By author and turn."""
    fingerprint: str = ""
    """That of the first author's worker, at the end."""
    early: tuple[int, str, str] = (0, "", "")
    """Updates, frontier hash and fingerprint when the early checkpoint was written."""
    evaluation: float = 0.0
    kind: str = "dense"

    def author(self, which: int) -> Author:
        return Author(self.identities[which].peer, 7 + which)

    def peer(self, which: int) -> str:
        return peer_text(self.identities[which].peer)

    def seal(self, which: int, statement: Statement, run: RunId | None = None) -> Record:
        return Sealer(self.identities[which], run or self.genesis.run_id).seal(statement)

    def update(self, which: int, number: int, turn: int, data: bytes, **changes: Any) -> Update:
        author = self.author(which)
        return replace(
            Update(author, number, turn, self.kind, digest(data), len(data), data), **changes
        )

    def copy(self, target: Path) -> "Trained":
        shutil.copytree(self.path, target)
        return replace(self, path=target)


class Making:
    """Trains `TURNS` turns, with one worker for each author and the log of the first."""

    def __init__(self, path: Path, **exchange: Any) -> None:
        self.home = Home(path)
        tables = {**TABLES, "exchange": {**TABLES["exchange"], **exchange}}
        identities = sorted((Identity.generate() for _ in range(3)), key=lambda i: i.peer)
        founded = ask(Duties(), pipe.Found(pipe.Setup(tables, identities[0].peer, device="cpu")))
        made = genesis.found(
            founded.run,
            parameters=founded.parameters,
            layout=founded.layout,
            initial_root=founded.initial_root,
            initial_squares=int(founded.initial_squares, 16),
            most=founded.most,
            founder=identities[0].peer,
        )
        self.home.keep(made)
        self.this = Trained(path, made, identities, kind=tables["exchange"]["update"]["kind"])
        self.store = Store.open(self.home.log, Limits(), run=made.run_id)
        self.frontier = Frontier()
        self.workers = [Duties() for _ in identities]
        for which, worker in enumerate(self.workers):
            initial = self.home.initial if which == 0 else path.with_name(f"initial-{which}")
            opening = pipe.Open(
                pipe.Setup(founded.run, identities[which].peer, made.run_id, device="cpu"),
                founded.parameters,
                founded.layout,
                founded.initial_root,
                str(initial),
                str(self.home.checkpoint) if which == 0 else "",
            )
            assert isinstance(ask(worker, opening), pipe.Opened)

    def publish(self, which: int, update: Update, data: bytes | None) -> pipe.Item:
        """Put an update into the log; `data` is None when it is never fetched."""
        record = self.this.seal(which, update)
        self.store.append(record, data if update.inline is None else None, own=which == 0)
        self.frontier.add(update, record.id)
        length = -1 if data is None else len(data)
        return pipe.Item(
            *update.author, update.number, update.turn, update.kind, update.size, length
        )

    def train(self) -> None:
        this = self.this
        for turn in range(1, TURNS + 1):
            items, bodies = [], []
            for which, worker in enumerate(self.workers):
                data = bytes(worker.answer(pipe.Turn(turn, 3.0), memoryview(b""))[1][0])
                this.payloads[which, turn] = data
                update = this.update(which, turn, turn, data)
                if (turn + which) % 2:
                    update = replace(update, inline=None)
                items.append(self.publish(which, update, data))
                bodies.append(data)
                ask(worker, pipe.Commit(7 + which, turn))
            done = [ask(worker, pipe.Apply(items), *bodies) for worker in self.workers]
            if turn == SAVED:
                this.early = (
                    self.frontier.total(),
                    self.frontier.hash.hex(),
                    hexadecimal(done[0].fingerprint),
                )
                ask(self.workers[0], pipe.Save())
                shutil.copy(self.home.checkpoint, this.path / "early")

    def break_rules(self) -> None:
        """Publish what contributes zero: no payload, one too large to be fetched, another kind."""
        huge = self.this.update(BOB, TURNS + 2, 1, b"huge", size=9**9, inline=None)
        bad = [
            self.publish(BOB, self.this.update(BOB, TURNS + 1, TURNS, b"?" * 9), b"?" * 9),
            self.publish(BOB, huge, None),
            self.publish(BOB, self.this.update(BOB, TURNS + 3, 1, b"", kind="other"), b""),
        ]
        done = ask(self.workers[0], pipe.Apply(bad), b"?" * 9)
        assert all(result.refused for result in done.results)

    def equivocate(self) -> None:
        """Let the last author be found out; return the model's fingerprint without her updates."""
        this, eve = self.this, self.this.author(EVE)
        held = self.store.record(eve, CLOSED)
        assert held is not None
        other = this.seal(EVE, this.update(EVE, CLOSED, CLOSED, this.payloads[BOB, 1]))
        one = RecordReader(this.genesis.run_id, lambda peer, proof: True).read(held)
        first, second = sorted((one, other), key=lambda record: record.id)
        self.store.append(this.seal(EVE, Proof(eve, CLOSED, first.raw, second.raw)))
        taken = list(range(TURNS, CLOSED - 1, -1))
        bodies = [this.payloads[EVE, n] for n in taken]
        items = [
            pipe.Item(*eve, n, n, this.kind, len(body), len(body))
            for n, body in zip(taken, bodies, strict=True)
        ]
        done = ask(self.workers[0], pipe.Subtract(items), *bodies)
        this.fingerprint = hexadecimal(done.fingerprint)

    def end(self) -> Trained:
        ask(self.workers[0], pipe.Save())
        self.this.evaluation = ask(self.workers[0], pipe.Evaluate()).value
        self.store.close()
        self.home.close()
        return self.this


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    making = Making(tmp_path_factory.mktemp("replay") / "tiny")
    making.train()
    making.break_rules()
    making.equivocate()
    return making.end()


@pytest.fixture(
    scope="module",
    params=[
        {"rule": "median", "update": {"kind": "scalar", "directions": "common", "lr": 0.02}},
        {"rule": "clip_norm"},
    ],
    ids=["median", "clip_norm"],
)
def ruled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Where what an update adds depends on the others of its turn."""
    making = Making(tmp_path_factory.mktemp("ruled") / "tiny", **request.param)
    making.train()
    making.equivocate()
    return making.end()


@pytest.fixture
def copied(trained: Trained, tmp_path: Path) -> Trained:
    return trained.copy(tmp_path / "tiny")


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """Leave torch's threads as they were."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def replayed(capsys: pytest.CaptureFixture[str], path: Path, *flags: str) -> tuple[int, Any]:
    code = cli.main(["replay", str(path), "--json", *flags])
    captured = capsys.readouterr()
    assert captured.err == ""
    return code, json.loads(captured.out)


def tree(path: Path) -> dict[Path, tuple[int, bytes]]:
    return {
        file: (file.stat().st_mtime_ns, file.read_bytes())
        for file in path.rglob("*")
        if file.is_file()
    }


# ---------------------------------------------------------------- one model


@pytest.mark.parametrize(
    "flags",
    [
        "",
        "--batch 1",
        "--batch 7 --threads 2",
        "--batch 1000 --threads 1",
        "--shuffle 1 --threads 1",
        "--shuffle 2 --batch 1 --threads 2",
        "--shuffle 3 --batch 7",
        "--shuffle 4 --batch 1000",
    ],
)
def test_every_order_and_batch_gives_the_model_that_was_trained(
    trained: Trained, capsys: pytest.CaptureFixture[str], flags: str
) -> None:
    code, found = replayed(capsys, trained.path, *flags.split())
    assert (code, found["agrees"], found["wrong"], found["notes"]) == (0, True, [], [])
    assert found["fingerprint"] == trained.fingerprint
    counted = 2 * TURNS + 3 + CLOSED - 1
    assert (found["updates"], found["authors"], found["turns"]) == (counted, 3, [1, TURNS])
    [checkpoint] = found["compared"]
    assert (checkpoint["who"], checkpoint["agrees"], checkpoint["updates"]) == (
        CHECKPOINT,
        True,
        counted,
    )
    assert found["refused"] == {"kind": 1, "payload": 1, "size": 1}
    # Every update, and the proof with its two.
    assert found["signatures"] == 3 * TURNS + 3 + 1
    assert found["updates_per_second"] > 0


def test_the_order_really_differs(trained: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    orders: list[tuple[object, ...]] = []

    def noted(options: module.Options) -> None:
        keys: list[object] = []
        original = Audit.read
        monkeypatch.setattr(
            Audit, "read", lambda log, key: (keys.append(key), original(log, key))[1]
        )
        module.replay(trained.path, options)
        monkeypatch.setattr(Audit, "read", original)
        orders.append(tuple(keys))

    for seed in (None, 1, 2, 2):
        noted(module.Options(shuffle=seed))
    assert len(set(orders)) == 3
    assert orders[2] == orders[3]
    assert len({frozenset(order) for order in orders}) == 1


def test_a_checkpoint_from_before_a_proof_agrees_at_its_own_frontier(
    copied: Trained, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(copied.path / "early", Home(copied.path, readonly=True).checkpoint)
    for flags in ([], ["--shuffle", "5", "--batch", "3"]):
        code, found = replayed(capsys, copied.path, *flags)
        assert code == 0
        assert found["fingerprint"] == copied.fingerprint
        [checkpoint] = found["compared"]
        updates, _, fingerprint = copied.early
        assert (checkpoint["agrees"], checkpoint["updates"]) == (True, updates)
        assert checkpoint["stated"] == checkpoint["rebuilt"] == fingerprint != copied.fingerprint


@pytest.mark.parametrize(
    "flags", ["", "--batch 1", "--shuffle 1", "--shuffle 2 --batch 1", "--shuffle 3 --batch 7"]
)
@pytest.mark.parametrize("early", [False, True])
def test_under_a_turn_rule_order_batches_and_the_way_there_and_back_change_nothing(
    ruled: Trained,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    flags: str,
    early: bool,
) -> None:
    """With the early checkpoint the model goes past a closing, and back to what counts."""
    this = ruled.copy(tmp_path / "tiny")
    if early:
        shutil.copy(this.path / "early", Home(this.path, readonly=True).checkpoint)
    code, found = replayed(capsys, this.path, *flags.split())
    assert (code, found["agrees"], found["wrong"], found["refused"]) == (0, True, [], {})
    assert found["fingerprint"] == this.fingerprint
    [checkpoint] = found["compared"]
    assert checkpoint["agrees"]
    assert checkpoint["stated"] == (this.early[2] if early else this.fingerprint)


def test_nothing_is_written_and_no_lock_is_needed(
    copied: Trained, capsys: pytest.CaptureFixture[str]
) -> None:
    with Home(copied.path):  # as a daemon holds it
        before = tree(copied.path)
        assert replayed(capsys, copied.path)[0] == 0
        assert tree(copied.path) == before


def test_the_initial_model_is_made_from_the_seed_when_its_file_is_damaged_or_gone(
    copied: Trained, capsys: pytest.CaptureFixture[str]
) -> None:
    initial = copied.path / "initial.bin"
    initial.write_bytes(initial.read_bytes()[:-4] + b"????")
    assert replayed(capsys, copied.path)[1]["fingerprint"] == copied.fingerprint
    initial.unlink()
    assert replayed(capsys, copied.path)[1]["fingerprint"] == copied.fingerprint


def test_people_read_what_agrees_and_what_counts_zero(
    trained: Trained, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["replay", str(trained.path), "--evaluate"]) == 0
    out = capsys.readouterr().out
    assert f"fingerprint {trained.fingerprint} at frontier" in out
    assert f"held out  {trained.evaluation:.4f} accuracy" in out
    assert "agrees    the checkpoint has the same model after 24 updates" in out
    assert "refused   3 updates count zero: kind 1, payload 1, size 1" in out
    assert f"update {TURNS + 3} of {trained.peer(BOB)} (log 0000000000000008): kind: 'other'" in out
    assert f"of {trained.peer(EVE)} is closed at {CLOSED}" in out
    assert "WRONG" not in out


# ---------------------------------------------------------------- a log that was tampered with

Frame = tuple[Head, bytes, bytes]
"""Head, record, payload."""


def segments(this: Trained) -> Segments:
    return Segments(
        this.path / "log", this.genesis.run_id, bounds=Bounds(), disk=Disk(), readonly=False
    )


def frames(this: Trained) -> list[Frame]:
    log = segments(this)
    found = [(f.head, f.record, f.at) for f in log.examine()]
    read = [(h, r, log.payload(at, h) if h.has_payload else b"") for h, r, at in found if h]
    log.close()
    return read


def rewrite(this: Trained, kept: list[Frame]) -> None:
    """Write the log anew, with heads that fit what they head."""
    for path in (this.path / "log").glob("*.seg"):
        path.unlink()
    log = segments(this)
    for head, record, payload in kept:
        fitting = replace(
            head,
            record_bytes=len(record),
            check=check_of(record),
            payload=digest(payload) if head.has_payload else head.payload,
            payload_bytes=len(payload),
        )
        log.append(fitting, record, payload, sync=False)
    log.close()


def place(kept: list[Frame], author: Author, number: int, kind: Kind = Kind.UPDATE) -> int:
    return next(
        i
        for i, (head, _, _) in enumerate(kept)
        if (head.kind, head.author, head.number) == (kind, author, number)
    )


def test_the_log_is_what_it_was_when_it_is_written_anew(
    copied: Trained, capsys: pytest.CaptureFixture[str]
) -> None:
    """The tests below change one thing; this one changes none."""
    rewrite(copied, frames(copied))
    assert replayed(capsys, copied.path)[0] == 0


def first_wrong(
    this: Trained, capsys: pytest.CaptureFixture[str]
) -> tuple[str | None, int, str, Any]:
    """Return whom and what the first complaint names, and the whole report."""
    code, found = replayed(capsys, this.path)
    assert code == 1
    assert not found["agrees"]
    wrong = found["wrong"][0]
    return wrong["peer"], wrong["number"], wrong["what"], found


def test_no_flipped_byte_goes_unseen(copied: Trained) -> None:
    """Every part of a file is under some check: its head, heads, records, payloads."""
    path = copied.path / "log" / SEGMENT
    whole = path.read_bytes()
    assert not Audit(path.parent, copied.genesis).wrong
    for at in range(0, len(whole), 61):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x10]) + whole[at + 1 :])
        log = Audit(path.parent, copied.genesis)
        assert log.wrong, at
        # The rest is still looked at: nothing but that frame is lost.
        assert log.signatures >= 3 * TURNS + 3, at
        log.close()


@pytest.mark.parametrize("part", ["record", "payload", "head"])
def test_a_flipped_byte_is_named(
    copied: Trained, capsys: pytest.CaptureFixture[str], part: str
) -> None:
    path = copied.path / "log" / SEGMENT
    log = segments(copied)
    at, head = next(
        (f.at, f.head)
        for f in log.examine()
        if f.head and f.head.has_payload and (f.head.author, f.head.number)[0] == copied.author(BOB)
    )
    offset = {"record": 120 + 20, "payload": head.frame_bytes - 1, "head": 40}[part] + at.offset
    log.close()
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)
    peer, number, what, found = first_wrong(copied, capsys)
    if part == "head":  # it may say anything now; the number is missing then
        assert (peer, what) == ("", "the head of a frame does not check")
        peer, number = found["wrong"][1]["peer"], found["wrong"][1]["number"]
        assert "missing, although" in found["wrong"][1]["what"]
    else:
        assert what == f"a {part} does not check"
    assert (peer, number) == (copied.peer(BOB), head.number)
    assert found["wrong"][0]["place"] == f"{SEGMENT} at byte {at.offset}"
    # Whoever held that update has another model than what is left.
    assert found["compared"][0]["agrees"] is False
    assert f"holds update {number} of {copied.peer(BOB)}" in found["compared"][0]["text"]


Change = Callable[[Trained, list[Frame]], tuple[int, int, str]]
"""Changes a log; says whom and what the first complaint names."""


def with_payload(this: Trained, kept: list[Frame], which: int, but: int = 0) -> int:
    return next(
        i
        for i, (head, _, _) in enumerate(kept)
        if head.has_payload and head.author == this.author(which) and head.number > but
    )


def exchange_payloads(this: Trained, kept: list[Frame]) -> tuple[int, int, str]:
    one, other = with_payload(this, kept, BOB, 2), with_payload(this, kept, ALICE)
    head, record, _ = kept[one]
    kept[one] = (head, record, kept[other][2])
    return BOB, head.number, "its payload is not the one that it names"


def exchange_records(this: Trained, kept: list[Frame]) -> tuple[int, int, str]:
    one, other = place(kept, this.author(BOB), 2), place(kept, this.author(BOB), 3)
    (first, record, payload), (second, record_2, payload_2) = kept[one], kept[other]
    kept[one], kept[other] = (first, record_2, payload_2), (second, record, payload)
    return BOB, 2, f"another record lies in its place: update 3 of {this.peer(BOB)}"


def sign_for_another_run(this: Trained, kept: list[Frame]) -> tuple[int, int, str]:
    at = place(kept, this.author(BOB), 4)
    update = this.update(BOB, 4, 4, this.payloads[BOB, 4])
    record = this.seal(BOB, update, RunId(digest(b"another run"))).raw
    kept[at] = (replace(kept[at][0], has_payload=False), record, b"")
    return BOB, 4, "signature: not signed by its author for this run"


def forge(this: Trained, kept: list[Frame]) -> tuple[int, int, str]:
    at = place(kept, this.author(BOB), 5)
    record = kept[at][1]
    kept[at] = (kept[at][0], bytes([record[0] ^ 1]) + record[1:], kept[at][2])
    return BOB, 5, "signature: not signed by its author for this run"


def leave_one_out(this: Trained, kept: list[Frame]) -> tuple[int, int, str]:
    del kept[place(kept, this.author(BOB), 5)]
    return BOB, 5, f"missing, although {TURNS + 3 - 5} later ones are here"


def leave_some_out(this: Trained, kept: list[Frame]) -> tuple[int, int, str]:
    for number in (5, 6):
        del kept[place(kept, this.author(BOB), number)]
    return BOB, 5, f"missing, and all up to 6, although {TURNS + 3 - 6} later ones are here"


def cut_payloads(this: Trained, kept: list[Frame]) -> tuple[int, int, str]:
    at = with_payload(this, kept, ALICE)
    kept[at] = (replace(kept[at][0], has_payload=False), kept[at][1], b"")
    return ALICE, kept[at][0].number, "its payload is missing"


def sign_two(this: Trained, kept: list[Frame]) -> tuple[int, int, str]:
    """Two updates of one number, and nobody's proof of it."""
    head, _, _ = kept[place(kept, this.author(BOB), 3)]
    other = this.seal(BOB, this.update(BOB, 3, 3, b"another")).raw
    kept.append((replace(head, has_payload=False), other, b""))
    return BOB, 3, "its author signed another update of this number, too"


def forge_proof(this: Trained, kept: list[Frame]) -> tuple[int, int, str]:
    at = place(kept, this.author(EVE), CLOSED, Kind.PROOF)
    record = bytearray(kept[at][1])
    record[-1] ^= 1
    kept[at] = (kept[at][0], bytes(record), b"")
    return EVE, CLOSED, "not"


@pytest.mark.parametrize(
    "change",
    [
        exchange_payloads,
        exchange_records,
        sign_for_another_run,
        forge,
        leave_one_out,
        leave_some_out,
        cut_payloads,
        sign_two,
        forge_proof,
    ],
)
def test_what_was_tampered_with_is_named(
    copied: Trained, capsys: pytest.CaptureFixture[str], change: Change
) -> None:
    kept = frames(copied)
    which, number, what = change(copied, kept)
    rewrite(copied, kept)
    peer, said_number, said, _ = first_wrong(copied, capsys)
    assert (peer, said_number) == (copied.peer(which), number)
    assert what in said


def test_a_proof_takes_out_of_the_model_what_it_closes(
    copied: Trained, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without the proof the same log means another model, which nobody states."""
    kept = frames(copied)
    del kept[place(kept, copied.author(EVE), CLOSED, Kind.PROOF)]
    rewrite(copied, kept)
    code, found = replayed(capsys, copied.path)
    assert code == 0  # the checkpoint's frontier is below: it agrees there
    assert found["notes"] == [
        "nobody has stated a fingerprint with the last 3 updates in it: the model was compared as "
        "it was before them"
    ]
    assert found["closed"] == []
    assert found["updates"] == 3 * TURNS + 3
    assert found["fingerprint"] != copied.fingerprint
    assert found["compared"][0]["stated"] == copied.fingerprint


def test_half_a_frame_at_the_end_is_an_interrupted_write(
    copied: Trained, capsys: pytest.CaptureFixture[str]
) -> None:
    path = copied.path / "log" / SEGMENT
    whole = path.read_bytes()
    for more in (whole[60:100], whole[52:400]):
        path.write_bytes(whole + more)
        code, found = replayed(capsys, copied.path)
        assert (code, found["fingerprint"]) == (0, copied.fingerprint)
        assert "half a frame" in found["notes"][0]


def test_what_the_end_of_the_log_lost_is_named_by_the_checkpoint(
    copied: Trained, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = frames(copied)
    lost = place(kept, copied.author(ALICE), TURNS)
    rewrite(copied, kept[:lost])
    code, found = replayed(capsys, copied.path)
    assert code == 1
    assert found["wrong"] == []
    text = found["compared"][0]["text"]
    assert text.startswith(f"holds update {TURNS} of {copied.peer(ALICE)} ")


def test_a_file_that_is_missing_or_of_another_run_is_named(
    copied: Trained, capsys: pytest.CaptureFixture[str]
) -> None:
    path = copied.path / "log" / SEGMENT
    _, _, what, _ = first_wrong(replace_run(copied), capsys)
    assert "belongs to another run" in what
    path.unlink()
    peer, _, what, found = first_wrong(copied, capsys)
    assert peer == ""
    assert what == "segments are missing: log.json counts 1, 0 are here"
    assert found["updates"] == 0


def replace_run(this: Trained) -> Trained:
    """Put the log of another run into the directory."""
    kept = frames(this)
    raw = replace(this.genesis, raw=this.genesis.raw + b"?")
    rewrite(replace(this, genesis=raw), kept)
    return this


# ---------------------------------------------------------------- others' words


def change_checkpoint(this: Trained, change: Callable[[torch.Tensor], None], lie: bool) -> None:
    """Let the checkpoint hold another model, with the fingerprint of that one or of the old."""
    path = Home(this.path, readonly=True).checkpoint
    with safetensors.safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = safetensors.torch.load_file(path)
    change(tensors["ledger"])
    if not lie:
        state = json.loads(metadata["shoal"])
        lanes = module.offline.make_trainer(
            Home(this.path, readonly=True), this.genesis
        ).exchange.ledger.lanes_of(tensors["ledger"])
        metadata["shoal"] = json.dumps(state | {"fingerprint": lanes})
    safetensors.torch.save_file(tensors, path, metadata)


def add_one(ledger: torch.Tensor) -> None:
    ledger[5] += 1


def test_a_checkpoint_of_another_model_differs(
    copied: Trained, capsys: pytest.CaptureFixture[str]
) -> None:
    change_checkpoint(copied, add_one, lie=False)
    assert cli.main(["replay", str(copied.path)]) == 1
    out = capsys.readouterr().out
    assert "DIFFERS   the checkpoint has another model after 24 updates: fingerprint " in out
    assert f"by the log {copied.fingerprint}" in out


def test_a_damaged_checkpoint_agrees_with_nothing(
    copied: Trained, capsys: pytest.CaptureFixture[str]
) -> None:
    change_checkpoint(copied, add_one, lie=True)
    code, found = replayed(capsys, copied.path)
    assert code == 1
    assert "its fingerprint does not match its model" in found["compared"][0]["text"]
    assert found["fingerprint"] == copied.fingerprint


def test_without_daemon_and_checkpoint_nothing_is_compared(
    copied: Trained, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(copied.path / "checkpoint")
    assert cli.main(["replay", str(copied.path)]) == 0
    assert "nothing to compare with" in capsys.readouterr().out


@contextmanager
def daemon(this: Trained, *said: Status) -> Iterator[None]:
    """Answer on a status port as a daemon of that directory would; the last word is repeated."""
    words = list(said)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = msgspec.json.encode(words.pop(0) if len(words) > 1 else words[0])
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        Home(this.path, readonly=True).publish_status("127.0.0.1", server.server_port, "token")
        try:
            yield
        finally:
            server.shutdown()
            thread.join()


def saying(this: Trained, frontier: tuple[int, str], fingerprint: str, **more: Any) -> Status:
    return Status(
        version="1",
        peer=this.peer(ALICE),
        run=more.pop("run", this.genesis.run_id.hex()),
        name="tiny",
        state=State.TRAINING,
        frontier=told.Frontier(authors=3, updates=frontier[0], hash=frontier[1]),
        fingerprint=fingerprint,
        **more,
    )


def compared(
    this: Trained, capsys: pytest.CaptureFixture[str], *said: Status
) -> tuple[int, Compared]:
    """Replay while a daemon says this; return the exit code and what came of its word."""
    with daemon(this, *said):
        code, found = replayed(capsys, this.path)
    assert found["running"]
    assert found["fingerprint"] == this.fingerprint
    [word] = [each for each in found["compared"] if each["who"] == DAEMON]
    return code, Compared(**word)


def final(this: Trained) -> tuple[int, str]:
    log = Audit(this.path / "log", this.genesis)
    log.close()
    return log.frontier.total(), log.frontier.hash.hex()


def test_a_running_daemon_is_compared_at_its_own_frontier(
    copied: Trained, capsys: pytest.CaptureFixture[str]
) -> None:
    busy = saying(copied, (0, ""), "", lag=3)
    now = saying(copied, final(copied), copied.fingerprint)
    code, word = compared(copied, capsys, busy, busy, busy, now)
    assert (code, word.agrees, word.updates) == (0, True, 24)


def test_the_log_may_have_grown_since_the_daemon_was_asked(
    copied: Trained, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = frames(copied)
    del kept[place(kept, copied.author(EVE), CLOSED, Kind.PROOF)]
    rewrite(copied, kept)
    copied.fingerprint = module.replay(copied.path, module.Options()).fingerprint
    updates, frontier, fingerprint = copied.early
    code, word = compared(copied, capsys, saying(copied, (updates, frontier), fingerprint))
    assert (code, word.agrees, word.updates) == (0, True, 3 * SAVED)
    assert word.stated == word.rebuilt == fingerprint


def test_a_daemon_with_another_model_differs(
    copied: Trained, capsys: pytest.CaptureFixture[str]
) -> None:
    other = f"{int(copied.fingerprint, 16) ^ 1:032x}"
    code, word = compared(copied, capsys, saying(copied, final(copied), other))
    assert (code, word.agrees) == (1, False)
    assert word.text.startswith("has another model after 24 updates")
    # The worker had not told yet that it moved: its second word counts.
    late = saying(copied, final(copied), other)
    told_later = saying(copied, final(copied), copied.fingerprint)
    code, word = compared(copied, capsys, *[late] * 4, told_later)
    assert (code, word.agrees) == (0, True)


def test_a_daemon_that_counts_what_the_log_does_not_hold_differs(
    copied: Trained, capsys: pytest.CaptureFixture[str]
) -> None:
    other = saying(copied, (24, digest(b"other").hex()), copied.fingerprint)
    code, word = compared(copied, capsys, other)
    assert (code, word.agrees) == (1, False)
    assert "the log never held just those" in word.text
    sick = msgspec.structs.replace(
        other, warnings=("the log is kept in memory only: disk: No space left on device",)
    )
    code, word = compared(copied, capsys, sick)
    assert (code, word.agrees) == (0, None)
    assert "No space left on device" in word.text


def test_a_daemon_that_never_rests_is_not_waited_for(
    copied: Trained, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PATIENCE", 0.3)
    busy = saying(copied, final(copied), copied.fingerprint, lag=1)
    code, word = compared(copied, capsys, busy)
    assert (code, word.agrees) == (0, None)


def test_a_hole_in_the_log_of_a_running_daemon_may_still_be_filled(
    copied: Trained, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(copied.path / "checkpoint")
    kept = frames(copied)
    leave_one_out(copied, kept)
    rewrite(copied, kept)
    copied.fingerprint = module.replay(copied.path, module.Options()).fingerprint
    code, word = compared(copied, capsys, saying(copied, final(copied), copied.fingerprint))
    assert (code, word.agrees) == (0, True)


def test_a_port_that_now_belongs_to_another_run_is_no_daemon_of_this_one(
    copied: Trained, capsys: pytest.CaptureFixture[str]
) -> None:
    with daemon(copied, saying(copied, final(copied), "00" * 16, run="ab" * 32)):
        code, found = replayed(capsys, copied.path)
    assert (code, found["running"]) == (0, False)


# ---------------------------------------------------------------- the operator's mistakes


@pytest.mark.parametrize(
    ("flags", "remedy"),
    [
        (["--data", "x"], "--data is for --evaluate"),
        (["--evaluate", "--data", "/no/such"], "brings its own images"),
        (["--shuffle", "x"], "invalid int value"),
        (["--batch", "0"], "above zero"),
        (["--threads", "0"], "above zero"),
        (["--device", "tpu"], "use cpu, cuda or auto"),
    ],
)
def test_a_mistake_is_one_line(
    trained: Trained, capsys: pytest.CaptureFixture[str], flags: list[str], remedy: str
) -> None:
    assert cli.main(["replay", str(trained.path), *flags]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert remedy in captured.err
    assert captured.err.count("\n") == 1


def test_a_directory_without_a_run_stays_as_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["replay", str(tmp_path)]) == 2
    assert "no run in" in capsys.readouterr().err
    assert cli.main(["replay", str(tmp_path / "nowhere")]) == 2
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- real daemons


@pytest.mark.real
@pytest.mark.slow
def test_two_real_daemons_replay_to_one_model_while_they_run_and_after(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_file(tmp_path, turns=20, peers=2, pace="turn_seconds = 0.5\nmin_steps = 20")
    flags = ("--listen", "127.0.0.1:0", "--threads", "1")
    one, two = Daemon(tmp_path / "one"), Daemon(tmp_path / "two")
    try:
        one.start("start", str(run), "--dir", str(one.directory), "--paused", *flags)
        join = one.wait("up", lambda s: s.join).join[0]
        two.start("join", join, "--dir", str(two.directory), "--paused", *flags)
        for each in (one, two):  # nobody is done before the other is there
            each.wait("together", lambda s: s.members == 2 and s.worker.pid and s.fingerprint)
        for each in (one, two):
            each.client().post("resume")
        one.wait("training", lambda s: s.turn >= 3 and s.frontier.authors == 2)
        code, found = replayed(capsys, one.directory)
        assert (code, found["running"]) == (0, True), found
        assert found["wrong"] == []
        finished = [d.wait("finished", lambda s: s.state is State.FINISHED) for d in (one, two)]
        assert all(status.first_evaluation is not None for status in finished)
        fingerprint = agree([one, two])
        for each in (one, two):
            code, found = replayed(capsys, each.directory, "--evaluate")
            assert (code, found["fingerprint"]) == (0, fingerprint), found
            [word] = [c for c in found["compared"] if c["who"] == DAEMON]
            assert word["agrees"] is True
            assert found["evaluation"] > 0.5
        one.kill()
        assert two.stop() == 0
        sizes = set()
        for each, seed in ((one, "1"), (two, "2")):
            code, found = replayed(capsys, each.directory, "--shuffle", seed, "--batch", "7")
            assert (code, found["running"], found["fingerprint"]) == (0, False, fingerprint), found
            sizes.add((found["updates"], found["frontier"]))
        assert len(sizes) == 1
    finally:
        for each in (one, two):
            if each.process is not None and each.process.poll() is None:
                each.kill()
