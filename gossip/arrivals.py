"""From an update heard of to an update held: its payload is pulled, then both are stored.

An update is passed on only once it is stored, so whoever pushes or announces one has its payload.
"""

from dataclasses import dataclass, field

from shoal.gossip.events import Pull, Store
from shoal.gossip.frontier import Frontier, Taken
from shoal.gossip.limits import Limits
from shoal.gossip.names import Author, Hash, Key, PeerId
from shoal.gossip.outbox import Outbox
from shoal.gossip.records import Record, Update
from shoal.gossip.run import Run
from shoal.gossip.timers import Timers

MOST_SOURCES = 8
PULLS_PER_SOURCE = 4
MOST_STORE_TRIES = 3
MOST_FAILURES = 24
"""Pulls of one payload that may fail, and looks for a source that may find none, before it is
given up: the update is forgotten, and taken again when it is heard of again."""
SURE = 16
"""Waiting updates that every peer may have, however many those of others are."""


@dataclass(slots=True)
class Fetch:
    """One payload on its way, and the records that wait for it."""

    size: int
    keys: list[Key]
    sources: list[PeerId]
    source: PeerId | None = None
    """Who is sending it now."""
    failures: int = 0
    """Pulls that failed, and searches for a source in vain."""


@dataclass(slots=True)
class Arrivals:
    """What is heard of and not yet held."""

    run: Run
    limits: Limits
    timers: Timers
    out: Outbox
    frontier: Frontier
    waiting: dict[Author, dict[int, Record]] = field(default_factory=dict)
    fetches: dict[Hash, Fetch] = field(default_factory=dict)
    tries: dict[Key, int] = field(default_factory=dict)
    """How often storing failed."""
    heard_from: dict[Hash, set[PeerId]] = field(default_factory=dict)
    """Record id → who has it: they need not be told when we have it too."""
    full: bool = False
    """The log is full: nothing more can be held."""
    _count: int = 0
    _shares: dict[PeerId, int] = field(default_factory=dict)
    """How many of them are of one peer."""
    _active: int = 0
    _bytes: int = 0
    _busy: dict[PeerId, int] = field(default_factory=dict)
    _offers: dict[PeerId, dict[Hash, None]] = field(default_factory=dict)
    """Who could send which payloads that nobody sends now."""

    def look(self, record: Record, update: Update) -> tuple[Taken, Record | None]:
        """Say what this record would be; with a CONFLICT, the other one if it waits here."""
        taken = self.frontier.look(update, record.id)
        other = self.waiting.get(update.author, {}).get(update.number)
        if taken is not Taken.NEW or other is None:
            return taken, None
        return (Taken.KNOWN, None) if other.id == record.id else (Taken.CONFLICT, other)

    def take(self, record: Record, update: Update, source: PeerId | None, *, own: bool) -> Taken:
        """Begin to get hold of a new update: pull its payload from `source` or store it at once."""
        peer = update.author.peer
        share = self._shares.get(peer, 0)
        # What nobody delivers waits; a share of what is left keeps it from filling all the room.
        if not own and (
            self.full or share >= max(SURE, (self.limits.unordered - self._count) // 2)
        ):
            return Taken.REFUSED
        fetch = self.fetches.get(update.payload)
        if not own and fetch is not None and fetch.size != update.size:
            return Taken.REFUSED  # one of the two lies about the size: let one show it
        self._shares[peer] = share + 1
        self.waiting.setdefault(update.author, {})[update.number] = record
        self._count += 1
        self.heard_from[record.id] = {source} if source is not None else set()
        if own or not self._needs_payload(update):
            self.out.add(Store(record, own))
        else:
            self._want_payload(update, source)
        return Taken.NEW

    def roomy(self) -> bool:
        """Say whether more may be asked for at once: what waits is well below its bound."""
        return not self.full and self._count < self.limits.unordered // 4

    def _needs_payload(self, update: Update) -> bool:
        return update.inline is None and self.run.fetched(update.kind, update.size)

    def _want_payload(self, update: Update, source: PeerId | None) -> None:
        fetch = self.fetches.get(update.payload)
        if fetch is None:
            fetch = self.fetches[update.payload] = Fetch(update.size, [], [])
        fetch.keys.append(Key(update.author, update.number))
        if source is not None:
            self._add_source(update.payload, fetch, source)

    def _add_source(self, payload: Hash, fetch: Fetch, source: PeerId) -> None:
        known = source in fetch.sources or source == fetch.source
        if not known and len(fetch.sources) < MOST_SOURCES:
            fetch.sources.append(source)
            if fetch.source is None:
                self._offer(payload, source)

    def holds(self, source: PeerId, author: Author, count: int, summed: int = 0) -> None:
        """`source` has the first `count` updates of `author`: pull from it what still lacks.

        It can't send the first `summed` of them.
        """
        for number, record in self.waiting.get(author, {}).items():
            if summed < number <= count and isinstance(record.statement, Update):
                self.also(source, record.id, record.statement)

    def also(self, source: PeerId, record: Hash, update: Update) -> None:
        """`source` has this update as well."""
        if (heard := self.heard_from.get(record)) is not None:
            heard.add(source)
        if fetch := self.fetches.get(update.payload):
            self._add_source(update.payload, fetch, source)

    # ------------------------------------------------------------ pulling

    def pump(self) -> None:
        """Start as many pulls as the bounds allow: of the least busy peer, what it offered first.

        Thousands may wait for one busy peer: only peers are looked at here, never all that waits.
        """
        while self._active < self.limits.pulls:
            free = [p for p in self._offers if self._busy.get(p, 0) < PULLS_PER_SOURCE]
            if not free:
                return
            peer = min(free, key=lambda p: self._busy.get(p, 0))
            payload = next(iter(self._offers[peer]))
            fetch = self.fetches[payload]
            if self._active and self._bytes + fetch.size > self.limits.staging_bytes:
                return
            self._start(payload, fetch, peer)

    def _start(self, payload: Hash, fetch: Fetch, peer: PeerId) -> None:
        self._withdraw(payload, fetch)
        fetch.sources.remove(peer)
        fetch.source = peer
        self._active += 1
        self._bytes += fetch.size
        self._busy[peer] = self._busy.get(peer, 0) + 1
        self.out.add(Pull(peer, payload, fetch.size))

    def _stopped(self, payload: Hash, fetch: Fetch) -> None:
        if fetch.source is not None:
            self._active -= 1
            self._bytes -= fetch.size
            self._busy[fetch.source] -= 1
            if not self._busy[fetch.source]:
                del self._busy[fetch.source]
            fetch.source = None
            for source in fetch.sources:
                self._offer(payload, source)

    def _offer(self, payload: Hash, source: PeerId) -> None:
        self._offers.setdefault(source, {})[payload] = None

    def _withdraw(self, payload: Hash, fetch: Fetch) -> None:
        for source in fetch.sources:
            if offers := self._offers.get(source):
                offers.pop(payload, None)
                if not offers:
                    del self._offers[source]

    def pulled(self, payload: Hash) -> None:
        """A payload is here: store the records that waited for it."""
        fetch = self.fetches.get(payload)
        if fetch is None:
            return
        self._unfetch(payload, fetch)
        for author, number in fetch.keys:
            if record := self.waiting.get(author, {}).get(number):
                self.out.add(Store(record))

    def failed(self, peer: PeerId, payload: Hash) -> bool:
        """A pull failed: try another source; say whether there is none left."""
        fetch = self.fetches.get(payload)
        if fetch is None or fetch.source != peer:
            return False
        self._stopped(payload, fetch)
        fetch.failures += 1
        self.out.count("pull-failed")
        return not fetch.sources

    def give_up(self, payload: Hash) -> list[Hash]:
        """Forget a payload that nobody delivers; return the records that waited for it.

        Empty while there is hope.
        """
        fetch = self.fetches[payload]
        fetch.failures += 1
        if fetch.failures < MOST_FAILURES or fetch.source is not None:
            return []
        self._unfetch(payload, fetch)
        lost = []
        for author, number in fetch.keys:
            record = self.waiting.get(author, {}).get(number)
            if record is not None and isinstance(record.statement, Update):
                lost.append(record.id)
                self._drop(record.statement)
        self.out.count("given-up", len(lost))
        return lost

    # ------------------------------------------------------------ storing

    def stored(self, record: Record, update: Update) -> bool:
        """The log holds `record`; say whether it is in (False: its log was closed meanwhile)."""
        if not self._drop(update):
            return False
        self.tries.pop(Key(update.author, update.number), None)
        return self.frontier.add(update, record.id) is Taken.NEW

    def store_failed(self, record: Record, update: Update, reason: str) -> bool:
        """The log does not hold it; say whether the update is given up."""
        key = Key(update.author, update.number)
        if reason == "log full":
            self.full = True
        tries = self.tries.get(key, 0) + 1
        if not self.full and tries < MOST_STORE_TRIES:
            # A driver whose disk failed keeps the log in memory: ask again.
            self.tries[key] = tries
            self.out.add(Store(record))
            return False
        self.tries.pop(key, None)
        self._drop(update)
        return True

    def forget(self, update: Update) -> bool:
        """Wait for this update no longer; say whether we did."""
        return self._drop(update)

    def _drop(self, update: Update) -> bool:
        numbers = self.waiting.get(update.author, {})
        record = numbers.pop(update.number, None)
        if record is None:
            return False
        self.heard_from.pop(record.id, None)
        self._count -= 1
        peer = update.author.peer
        self._shares[peer] -= 1
        if not self._shares[peer]:
            del self._shares[peer]
        if not numbers:
            del self.waiting[update.author]
        return True

    def close(self, author: Author, number: int) -> None:
        """Nothing of `author` counts from `number` on: stop fetching it."""
        for record in [r for n, r in self.waiting.get(author, {}).items() if n >= number]:
            if isinstance(record.statement, Update):
                self._drop(record.statement)
                self._unwant(record.statement)

    def _unwant(self, update: Update) -> None:
        fetch, key = self.fetches.get(update.payload), Key(update.author, update.number)
        if fetch is None or key not in fetch.keys:
            return
        fetch.keys.remove(key)
        if not fetch.keys:
            self._unfetch(update.payload, fetch)

    def _unfetch(self, payload: Hash, fetch: Fetch) -> None:
        self._stopped(payload, fetch)
        self._withdraw(payload, fetch)
        del self.fetches[payload]
