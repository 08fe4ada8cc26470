"""A log read from its first byte to its last, with every record and payload checked. No torch.

Nothing is trusted but the genesis, and nothing is written. A log only grows, so that of a running
daemon can be read as well; what it is about to write is left out.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from shoal.gossip.frontier import Frontier, Taken
from shoal.gossip.limits import Limits
from shoal.gossip.names import Author, Hash, Key
from shoal.gossip.records import Proof, Statement, Update
from shoal.gossip.run import Run
from shoal.gossip.snapshot import Snapshot
from shoal.node.admission import Admission
from shoal.node.genesis import Genesis
from shoal.node.identity import peer_text
from shoal.node.segments import Bounds, Disk, Found, Head, Kind, Place, Segments
from shoal.node.store import read_log_id
from shoal.node.wire.fields import WireError
from shoal.node.wire.records import RecordReader

Counts = Mapping[Author, int]

_ENDLESS = 1 << 40
"""Logs, and updates above a hole, that are kept: the files bound them."""


@dataclass(frozen=True, slots=True)
class Wrong:
    """Something in the log that is not as it must be."""

    what: str
    peer: str = ""
    """Its author's peer id; empty when damage leaves no name to trust."""
    log: str = ""
    """Its author's log id, hex."""
    number: int = 0
    place: str = ""
    """Segment and byte."""

    def __str__(self) -> str:
        who = f"update {self.number} of {self.peer} (log {self.log}): " if self.peer else ""
        where = f", in {self.place}" if self.place else ""
        return f"{who}{self.what}{where}"


class Audit:
    """What a log holds, and what is wrong with it."""

    def __init__(
        self,
        directory: Path,
        genesis: Genesis,
        *,
        snapshot: Snapshot | None = None,
        running: bool = False,
    ) -> None:
        """Read the whole log; a directory that is not there is an empty one.

        What a `snapshot` stands for need not be here, and nothing is said of it.

        While a daemon runs (`running`), an update that others' ran ahead of may still be on its
        way: a note. Raises OSError for a file that can't be read.
        """
        limits = Limits()
        self.wrong: list[Wrong] = []
        """In the order of the log; what is missing comes last."""
        self.notes: list[str] = []
        """What is odd, but right."""
        self.frontier = Frontier(unordered=_ENDLESS, logs=_ENDLESS)
        """What counts: whole, from 1 without a hole, below a closing."""
        self._start = {} if snapshot is None else dict(snapshot.counts())
        if snapshot is not None:
            self.frontier.start(snapshot.lines)
        self.order: list[Key] = []
        """All that is whole, as it was written."""
        self.signatures = 0
        """Checked and good."""
        self.payload_bytes = 0
        self.turns: tuple[int, int] = (0, 0)
        """First and last of the updates that are whole."""
        self._directory = directory
        self._admission = (
            Admission(genesis.run_id) if genesis.run_file.swarm.admission == "open" else None
        )
        self._segments = Segments(
            directory,
            genesis.run_id,
            bounds=Bounds(record_bytes=limits.message_bytes, payload_bytes=limits.payload_bytes),
            disk=Disk(),
            readonly=True,
        )
        self._records = RecordReader(genesis.run_id, lambda peer, proof: True)
        self._run = Run(genesis.run_id, most_bytes=genesis.most)
        self._places: dict[Author, dict[int, Place]] = {}
        self._bare: dict[Key, Place] = {}
        """Updates that are here without the payload that they need."""
        self._named: dict[Author, set[int]] = {}
        """Numbers that `wrong` names already."""
        self._closings: dict[Author, int] = {}
        for found in self._segments.examine():
            self._look(found)
        self.notes += self._segments.notes
        self._whole = self._without_bare(dict(self.frontier.counts()))
        self._close()
        self._look_for_missing_payloads()
        self._look_for_holes(running=running)
        self._look_for_missing_segments()

    # ------------------------------------------------------------------ questions

    @property
    def segments(self) -> int:
        """Return the number of files."""
        return len(self._segments.sizes)

    @property
    def size(self) -> int:
        """Return their bytes."""
        return self._segments.size

    def lacks(self, counts: Counts) -> Key | None:
        """Return the first update below `counts` that is not here, whole and with its payload.

        Updates that a proof took out of the sum are here like others.
        """
        for author, count in sorted(counts.items()):
            if count > (whole := self._whole.get(author, 0)):
                return Key(author, whole + 1)
        return None

    def at(self, updates: int, frontier_hash: Hash) -> Counts | None:
        """Return the frontier of this size and hash that the log went through, or None."""
        counts = dict(self._start)
        above: dict[Author, set[int]] = {}
        total = sum(counts.values())
        if total == updates and self.frontier.hash_at(counts) == frontier_hash:
            return counts
        for author, number in self.order:
            closed = self._closings.get(author, 0)
            if closed and number >= closed:
                continue
            waiting = above.setdefault(author, set())
            waiting.add(number)
            before = total
            while (following := counts.get(author, 0) + 1) in waiting:
                waiting.remove(following)
                counts[author] = following
                total += 1
            if before < updates <= total and self.frontier.hash_at(counts) == frontier_hash:
                return counts
        return None

    def read(self, key: Key) -> tuple[Update, bytes | None]:
        """Return an update of `order` and its payload; None if it needs none.

        Raises DamageError when it is not what it was when it was checked.
        """
        at = self._places[key.author][key.number]
        head, raw = self._segments.record(at)
        update = self._records.own(raw).statement
        assert isinstance(update, Update)
        payload = self._segments.payload(at, head) if head.has_payload else update.inline
        return update, payload

    def close(self) -> None:
        """Close the files."""
        self._segments.close()

    # ------------------------------------------------------------------ frame by frame

    def _look(self, found: Found) -> None:
        head = found.head
        if head is None:
            self.wrong.append(Wrong(found.wrong, place=self._place(found.at)))
        elif found.wrong:
            self._complain(found.wrong, head.author, head.number, found.at)
        elif head.kind is Kind.FORGOTTEN:
            self.notes.append(
                f"update {head.number} of {_name(head.author)} could not be read and was given "
                f"up by the daemon, in {self._place(found.at)}"
            )
        elif head.kind is Kind.ADMISSION:
            self._look_at_admission(found, head)
        else:
            self._look_at_record(found, head)

    def _look_at_record(self, found: Found, head: Head) -> None:
        try:
            record = self._records.read(found.record)
        except WireError as error:
            self._complain(f"{error.reason}: {error}", head.author, head.number, found.at)
            return
        self.signatures += 1
        statement = record.statement
        expected = Update if head.kind is Kind.UPDATE else Proof
        if not isinstance(statement, expected) or _key(statement) != (head.author, head.number):
            what = f"another record lies in its place: {_describe(statement)}"
            self._complain(what, head.author, head.number, found.at)
        elif isinstance(statement, Update):
            self._take(statement, record.id, found.at, head)
        else:
            closed = self._closings.get(head.author, head.number)
            self._closings[head.author] = min(closed, head.number)

    def _take(self, update: Update, record: Hash, at: Place, head: Head) -> None:
        key = Key(update.author, update.number)
        if head.has_payload and head.payload != update.payload:
            self._complain("its payload is not the one that it names", *key, at)
            return
        taken = self.frontier.add(update, record)
        if taken is Taken.CONFLICT:
            self._complain("its author signed another update of this number, too", *key, at)
            return
        bare = update.inline is None and not head.has_payload
        if taken is Taken.NEW:
            self.order.append(key)
            first, last = self.turns
            self.turns = (min(first or update.turn, update.turn), max(last, update.turn))
        elif bare:
            return  # it is here already, perhaps with its payload
        self._places.setdefault(update.author, {})[update.number] = at
        self._bare.pop(key, None)
        if bare and self._run.fetched(update.kind, update.size):
            self._bare[key] = at
        self.payload_bytes += head.payload_bytes if head.has_payload else len(update.inline or b"")

    def _look_at_admission(self, found: Found, head: Head) -> None:
        if self._admission is None:
            return  # only who has the swarm's secret can check it
        if self._admission.verify(head.author.peer, found.record):
            self.signatures += 1
        else:
            who = peer_text(head.author.peer)
            self.wrong.append(
                Wrong(f"the proof that {who} was admitted is wrong", place=self._place(found.at))
            )

    # ------------------------------------------------------------------ as a whole

    def _without_bare(self, counts: dict[Author, int]) -> dict[Author, int]:
        for author, number in self._bare:
            counts[author] = min(counts.get(author, 0), number - 1)
        return counts

    def _close(self) -> None:
        for author, number in sorted(self._closings.items()):
            if number > self.frontier.summed(author):
                self.frontier.close(author, number)
            else:
                what = "a proof closes its log, and the snapshot has it: start the daemon, which "
                self._complain(what + "then fetches the log", author, number)

    def _look_for_missing_payloads(self) -> None:
        for key, at in sorted(self._bare.items()):
            closed = self._closings.get(key.author, 0)
            if not closed or key.number < closed:
                self._complain("its payload is missing", *key, at)
                self.frontier.lose(*key)

    def _look_for_holes(self, *, running: bool) -> None:
        for author in self.frontier.authors():
            above = self.frontier.logs[author].above
            named = self._named.get(author, set())
            for first, last in self.frontier.missing(author, max(above, default=0)):
                if sum(first <= number <= last for number in named) == last - first + 1:
                    continue
                later = sum(number > last for number in above)
                what = f"missing, although {later} later ones are here"
                if last > first:
                    what = f"missing, and all up to {last}, although {later} later ones are here"
                if running:
                    self.notes.append(f"update {first} of {_name(author)}: {what}: on its way?")
                else:
                    self._complain(what, author, first)

    def _look_for_missing_segments(self) -> None:
        _, count, last = read_log_id(self._directory / "log.json")
        sizes = self._segments.sizes
        if len(sizes) < count or max(sizes, default=0) < last:
            what = f"segments are missing: log.json counts {count}, {len(sizes)} are here"
            self.wrong.append(Wrong(what))
        for path in sorted(self._directory.glob("*.bad")):
            self.notes.append(f"{path.name} was set aside at an earlier start and is not read")

    # ------------------------------------------------------------------ names

    def _complain(self, what: str, author: Author, number: int, at: Place | None = None) -> None:
        place = "" if at is None else self._place(at)
        peer, log = peer_text(author.peer), f"{author.log:016x}"
        self.wrong.append(Wrong(what, peer, log, number, place))
        self._named.setdefault(author, set()).add(number)

    def _place(self, at: Place) -> str:
        return f"{self._segments.path(at.segment).name} at byte {at.offset}"


def _name(author: Author) -> str:
    return f"{peer_text(author.peer)} (log {author.log:016x})"


def _key(statement: Update | Proof) -> Key:
    return Key(statement.author, statement.number)


def _describe(statement: Statement) -> str:
    kind = type(statement).__name__.lower()
    if isinstance(statement, Update | Proof):
        return f"{kind} {statement.number} of {_name(statement.author)}"
    return f"a record of kind {kind}"
