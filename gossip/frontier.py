"""Which updates are in: counts and running hashes per author, holes, closings, what is settled.

The *frontier* counts, for each author, the updates held without a hole. `frontier_hash` stands for
all of it: BLAKE2b-256 over the lines `peer ‖ log ‖ count ‖ closed ‖ running hash` (log as u64,
counts as u32, big endian) of all authors in order; lines without updates and closing are left out.
Where a log began with a snapshot, nothing is known of the updates that it stands for but how many
they are, their running hash and their largest turn.
"""

import struct
from array import array
from bisect import bisect_right, insort
from collections.abc import Iterable, Iterator, Mapping
from enum import Enum

from shoal.gossip.messages import Entry
from shoal.gossip.names import NO_HASH, Author, Hash, PeerId, digest, running
from shoal.gossip.records import Update
from shoal.gossip.snapshot import Line

_LINE = struct.Struct(">32sQII32s")

SURE = 16
"""Updates above a hole that every log may have, however many those of others are."""

Counts = tuple[tuple[Author, int], ...]
"""A version vector as it travels: sorted by author, zero counts left out."""


class Taken(Enum):
    """What became of an update offered to a frontier."""

    NEW = 1
    KNOWN = 2
    CONFLICT = 3
    """Another record is held under this number: the author equivocated."""
    CLOSED = 4
    """The log is closed at this number or below: the update counts for nobody."""
    REFUSED = 5
    """Too far above a hole, or one log too many: ask again later."""


def line(author: Author, count: int, closed: int, run: bytes) -> bytes:
    """Return one author's line of a frontier hash."""
    return _LINE.pack(author.peer, author.log, count, closed, run)


def entries_hash(entries: Iterable[Entry]) -> Hash:
    """Return the frontier hash of entries sorted by author."""
    return digest(
        b"".join(line(e.author, e.count, e.closed, e.hash) for e in entries if e.count or e.closed)
    )


class Log:
    """One author's updates: a running hash and a turn per number, and what lies above a hole."""

    __slots__ = ("_hashes", "_line", "_start", "_turns", "above", "back", "closed", "summed")

    def __init__(self) -> None:
        self.summed = 0
        """How many, from 1 on, a snapshot stands for: nothing is known of them one by one."""
        self._start = NO_HASH, 0
        """Running hash after them, and their largest turn."""
        self._hashes = bytearray()
        self._turns = array("L")
        """The largest turn up to each number after them."""
        self.back: dict[int, int] = {}
        """Number → turn, of updates whose turn is below that of one before them."""
        self.above: dict[int, tuple[Hash, int]] = {}
        """Number → (record id, turn)."""
        self.closed = 0
        self._line: bytes | None = None

    @property
    def count(self) -> int:
        """How many updates are in without a hole."""
        return self.summed + len(self._turns)

    @property
    def latest(self) -> int:
        """The largest turn so far; 0 before the first update."""
        return self.turn_at(self.count)

    @property
    def signed(self) -> int:
        """The largest turn of those that no snapshot stands for; 0 without such."""
        if len(self.back) < len(self._turns):
            return self._turns[-1]
        return max(self.back.values(), default=0)

    def start(self, line: Line) -> None:
        """Begin an empty log with what a snapshot stands for."""
        self.summed, self._start = line.count, (line.hash, line.turn)
        self._line = None

    def hash_at(self, count: int) -> Hash:
        """Return the running hash after `count` updates, of which none is below `summed`."""
        end = 32 * (count - self.summed)
        return Hash(bytes(self._hashes[end - 32 : end])) if end > 0 else self._start[0]

    def line(self, author: Author) -> bytes:
        """Return this log's line of the frontier hash."""
        if self._line is None:
            empty = not self.count and not self.closed
            self._line = (
                b"" if empty else line(author, self.count, self.closed, self.hash_at(self.count))
            )
        return self._line

    def append(self, record: Hash, turn: int) -> None:
        """Take the next number in."""
        self._hashes += running(self.hash_at(self.count), record)
        # The largest turn so far: an author's turns must not decrease, and a liar's do not matter.
        latest = max(turn, self.latest)
        self._turns.append(latest)
        if turn < latest:
            self.back[self.count] = turn
        self._line = None

    def close(self, number: int) -> None:
        """Forget everything from `number` on."""
        self.closed = number
        self.cut(number - 1)
        self.above = {n: v for n, v in self.above.items() if n < number}

    def cut(self, count: int) -> None:
        """Go back to the first `count` updates, of which none is below `summed`."""
        del self._turns[count - self.summed :], self._hashes[32 * (count - self.summed) :]
        self.back = {n: turn for n, turn in self.back.items() if n <= count}
        self._line = None

    def prefix(self, turn: int) -> int:
        """Return how many updates precede the first one of a turn after `turn`."""
        return self.summed + bisect_right(self._turns, turn)

    def turn_at(self, count: int) -> int:
        """Return the largest turn of the first `count` updates, of which none is below `summed`."""
        place = count - self.summed
        return self._turns[place - 1] if place > 0 else self._start[1]

    def turn(self, number: int) -> int:
        """Return the turn of an update that is in; 0 for others, and those of a snapshot."""
        if not self.summed < number <= self.count:
            return 0
        return self.back.get(number, self._turns[number - self.summed - 1])


class Frontier:
    """A grow-only set of updates, seen through counts. Merging is commutative and idempotent."""

    def __init__(self, *, unordered: int = 4096, logs: int = 4096) -> None:
        self.logs: dict[Author, Log] = {}
        self._order: list[Author] = []
        self._unordered = 0
        self._most_unordered = unordered
        self._most_logs = logs
        self._hash: Hash | None = None
        self.version = 0
        """Grows with every change of a count or closing."""
        self.closings = 0
        """How many logs are closed."""

    # ------------------------------------------------------------ questions

    def count(self, author: Author) -> int:
        """Return how many of this author's updates are in without a hole."""
        log = self.logs.get(author)
        return log.count if log else 0

    def turn(self, author: Author, number: int) -> int:
        """Return the turn of an update that is in; 0 for others, and those of a snapshot."""
        log = self.logs.get(author)
        return log.turn(number) if log else 0

    def summed(self, author: Author) -> int:
        """Return how many of this author's updates a snapshot stands for."""
        log = self.logs.get(author)
        return log.summed if log else 0

    def closed(self, author: Author) -> int:
        """Return the number from which the log is closed; 0 while it is open."""
        log = self.logs.get(author)
        return log.closed if log else 0

    def authors(self) -> list[Author]:
        """Return all authors, sorted."""
        return self._order

    def counts(self) -> Counts:
        """Return the version vector."""
        return tuple((a, n) for a in self._order if (n := self.logs[a].count))

    def up_to_turn(self, turn: int) -> Counts:
        """Return the version vector of the updates of turns ≤ `turn` (lockstep)."""
        return tuple((a, n) for a in self._order if (n := self.logs[a].prefix(turn)))

    def total(self) -> int:
        """Return the number of updates in."""
        return sum(log.count for log in self.logs.values())

    def entry(self, author: Author) -> Entry:
        """Return one author's line."""
        log = self.logs[author]
        return Entry(author, log.count, log.hash_at(log.count), log.closed, log.summed)

    def entries(self) -> tuple[Entry, ...]:
        """Return the whole frontier, sorted by author."""
        return tuple(e for e in map(self.entry, self._order) if e.count or e.closed)

    @property
    def hash(self) -> Hash:
        """The hash of the whole frontier."""
        if self._hash is None:
            self._hash = digest(b"".join([self.logs[a].line(a) for a in self._order]))
        return self._hash

    def hash_at(self, counts: Mapping[Author, int]) -> Hash | None:
        """Return the hash of this frontier cut back to `counts`.

        None if it is not so far, or if that is below what a snapshot stands for.
        """
        lines, get, known = [], counts.get, 0
        for author in self._order:
            log, count = self.logs[author], get(author, 0)
            if not log.summed <= count <= log.count:
                return None
            if count:
                known += 1
                lines.append(line(author, count, log.closed, log.hash_at(count)))
            elif log.closed:
                lines.append(line(author, 0, log.closed, NO_HASH))
        return digest(b"".join(lines)) if known == len(counts) else None

    def missing(self, author: Author, up_to: int) -> list[tuple[int, int]]:
        """Return the ranges of numbers ≤ `up_to` that are neither in nor above a hole."""
        log = self.logs.get(author)
        if log is None:
            return [(1, up_to)] if up_to else []
        if log.closed:
            up_to = min(up_to, log.closed - 1)
        ranges, first = [], log.count + 1
        for number in (*sorted(n for n in log.above if n <= up_to), up_to + 1):
            if number > first:
                ranges.append((first, number - 1))
            first = number + 1
        return ranges

    def look(self, update: Update, record: Hash) -> Taken:
        """Say what `add` would answer, without changing anything."""
        log = self.logs.get(update.author)
        if log is None:
            return Taken.NEW if len(self.logs) < self._most_logs else Taken.REFUSED
        number = update.number
        if log.closed and number >= log.closed:
            return Taken.CLOSED
        if number <= log.summed:
            return Taken.KNOWN
        if number <= log.count:
            same = running(log.hash_at(number - 1), record) == log.hash_at(number)
            return Taken.KNOWN if same else Taken.CONFLICT
        if number in log.above:
            return Taken.KNOWN if log.above[number][0] == record else Taken.CONFLICT
        # A share of what is left, so that one author's holes leave room for those of others.
        share = max(SURE, (self._most_unordered - self._unordered) // 2)
        if number > log.count + 1 and len(log.above) >= share:
            return Taken.REFUSED
        return Taken.NEW

    # ------------------------------------------------------------ changes

    def start(self, lines: Iterable[Line]) -> None:
        """Begin an empty frontier with what a snapshot stands for."""
        for each in lines:
            self._log(each.author).start(each)
        self._changed()

    def forget_summed(self) -> list[tuple[Author, int, int]]:
        """Hold nothing of the logs that began with a snapshot.

        Return of each what the snapshot stood for, and the last number that was held.
        """
        found = [(author, log) for author, log in self.logs.items() if log.summed]
        for author, log in found:
            fresh = self.logs[author] = Log()
            fresh.closed = log.closed
            self._unordered -= len(log.above)
        self._changed()
        return [(a, log.summed, max(log.above, default=log.count)) for a, log in found]

    def add(self, update: Update, record: Hash) -> Taken:
        """Take an update in, or keep it above a hole."""
        taken = self.look(update, record)
        if taken is Taken.NEW:
            log = self._log(update.author)
            log.above[update.number] = (record, update.turn)
            self._unordered += 1
            while (number := log.count + 1) in log.above:
                log.append(*log.above.pop(number))
                self._unordered -= 1
                self._changed()
        return taken

    def lose(self, author: Author, number: int) -> int:
        """Hold this update, and what was in after it, no longer; return what the count was."""
        log = self.logs.get(author)
        if log is None:
            return 0
        count = log.count
        if log.above.pop(number, None) is not None:
            self._unordered -= 1
        elif log.summed < number <= count:
            log.cut(number - 1)
            self._changed()
        return count

    def close(self, author: Author, number: int) -> bool:
        """Close a log at `number`, above `summed` (the smallest wins); say if anything changed."""
        log = self._log(author)
        if log.closed and log.closed <= number:
            return False
        before = len(log.above)
        self.closings += not log.closed
        log.close(number)
        self._unordered -= before - len(log.above)
        self._changed()
        return True

    def _changed(self) -> None:
        self._hash = None
        self.version += 1

    def _log(self, author: Author) -> Log:
        log = self.logs.get(author)
        if log is None:
            log = self.logs[author] = Log()
            insort(self._order, author)
        return log


class Rows:
    """What each member has stated to hold: one row of u32 counts per member (design 3.4).

    Only statements whose running hash equals ours are entered, so that settled means settled on
    the same updates.
    """

    def __init__(self) -> None:
        self._column: dict[Author, int] = {}
        self._rows: dict[PeerId, array[int]] = {}

    def state(self, member: PeerId, author: Author, count: int) -> None:
        """`member` holds the first `count` updates of `author`, as we do."""
        column = self._column.setdefault(author, len(self._column))
        row = self._rows.setdefault(member, array("I"))
        if column >= len(row):
            row.extend([0] * (len(self._column) - len(row)))
        row[column] = max(row[column], count)

    def state_all(self, member: PeerId, counts: Counts) -> None:
        """`member` holds so much of each author, as we do."""
        columns = self._column
        for author, _ in counts:
            columns.setdefault(author, len(columns))
        row = self._rows.setdefault(member, array("I"))
        row.extend([0] * (len(columns) - len(row)))
        for author, count in counts:
            column = columns[author]
            if row[column] < count:
                row[column] = count

    def holds(self, member: PeerId, author: Author) -> int:
        """Return how many updates of `author` this member has stated to hold."""
        column, row = self._column.get(author), self._rows.get(member)
        return row[column] if row is not None and column is not None and column < len(row) else 0

    def forget(self, member: PeerId) -> None:
        """`member` no longer counts."""
        self._rows.pop(member, None)

    def settled(
        self, frontier: Frontier, members: Iterable[PeerId]
    ) -> Iterator[tuple[Author, int]]:
        """Yield for each author how many updates every one of `members` (not us) holds."""
        others = sorted(members)
        for author in frontier.authors():
            least = min((self.holds(m, author) for m in others), default=frontier.count(author))
            yield author, min(least, frontier.count(author))
