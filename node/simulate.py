"""Thousands of gossip cores on one heap: a seeded network, faults as data, fake or real workers.

Everything the daemons' cores do, without their sockets: the same `Protocol` objects are driven by
`(time, seq, peer, event)` off a heap. The same seed gives the same trace.
"""

import gc
import random
import struct
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from heapq import heappop, heappush
from typing import Any
from typing import Protocol as Contract

from shoal.gossip import events as ev
from shoal.gossip.frontier import Counts
from shoal.gossip.limits import Limits, sim
from shoal.gossip.messages import Message, Push
from shoal.gossip.names import Author, Hash, Key, PeerId, RunId, digest
from shoal.gossip.protocol import Protocol
from shoal.gossip.records import (
    Alive,
    Contact,
    Proof,
    Record,
    Report,
    Standing,
    Statement,
    Update,
)
from shoal.gossip.run import Held, Run
from shoal.gossip.snapshot import Line, Snapshot
from shoal.gossip.view import View

LANE = (1 << 64) - 1
MOST = (1 << 32) - 1
"""The largest number that fits into a u32."""
MOST_HAPPENED = 100_000

# ---------------------------------------------------------------- what goes wrong, as data


@dataclass(frozen=True, slots=True)
class Fault:
    """Something that happens to the swarm at a time. Make one with the methods below."""

    kind: str
    at: float
    peer: int = -1
    group: frozenset[int] = frozenset()
    rate: float = 0.0
    keep: int = -1
    donor: int = -1
    lie: str = ""

    @staticmethod
    def crash(*, peer: int, at: float) -> "Fault":
        """kill -9: memory is gone, the log stays."""
        return Fault("crash", at, peer)

    @staticmethod
    def restart(*, peer: int, at: float, keep: int = -1) -> "Fault":
        """Start again from the own log; `keep` rolls it back to its first so many records."""
        return Fault("restart", at, peer, keep=keep)

    @staticmethod
    def start(*, peer: int, at: float, donor: int = -1, lie: str = "") -> "Fault":
        """A peer that joins late: with the log, or with a snapshot of the peer `donor`.

        The donor may lie about the model ("model": its statement fits), the statement alone
        ("fingerprint"), the updates that it has summed ("hashes"), how many of them there are
        ("counts"), who they are of ("author") or of which turns ("turns").
        """
        return Fault("restart", at, peer, donor=donor, lie=lie)

    @staticmethod
    def freeze(*, peer: int, at: float, to: float) -> tuple["Fault", "Fault"]:
        """SIGSTOP and SIGCONT: what arrives meanwhile is handled afterwards."""
        return Fault("freeze", at, peer), Fault("thaw", to, peer)

    @staticmethod
    def partition(group: Iterable[int], *, at: float, to: float) -> tuple["Fault", "Fault"]:
        """`group` and the others cannot reach each other."""
        members = frozenset(group)
        return Fault("cut", at, group=members), Fault("heal", to, group=members)

    @staticmethod
    def lose(rate: float, *, at: float = 0.0) -> "Fault":
        """From now on lose this share of all messages."""
        return Fault("lose", at, rate=rate)

    @staticmethod
    def fill_disk(*, peer: int, at: float, reason: str = "log full") -> "Fault":
        """From now on nothing can be stored ("log full"), or but once ("disk: …")."""
        return Fault(reason, at, peer)

    @staticmethod
    def equivocate(*, peer: int, at: float) -> "Fault":
        """Somebody with a copied key signs another update under the last number of `peer`."""
        return Fault("equivocate", at, peer)

    @staticmethod
    def pause(*, peer: int, at: float) -> "Fault":
        """The operator pauses a peer."""
        return Fault("pause", at, peer)

    @staticmethod
    def resume(*, peer: int, at: float) -> "Fault":
        """The operator lets it train again."""
        return Fault("resume", at, peer)

    @staticmethod
    def depart(*, peer: int, at: float) -> "Fault":
        """The operator says good-bye for good."""
        return Fault("depart", at, peer)

    @staticmethod
    def kill_worker(*, peer: int, at: float, to: float) -> tuple["Fault", "Fault"]:
        """The worker dies; another one starts from nothing at `to`."""
        return Fault("worker-down", at, peer), Fault("worker-up", to, peer)


@dataclass(slots=True)
class Network:
    """How messages fare."""

    latency: tuple[float, float] = (0.005, 0.05)
    """Least and most seconds; drawn per message, so messages overtake each other."""
    loss: float = 0.0
    duplicate: float = 0.0
    bytes_per_second: float = 12.5e6
    """Of one payload transfer."""
    break_after: float = 4.0
    """Seconds until a silent link is noticed (keepalive)."""


# ---------------------------------------------------------------- workers


@dataclass(frozen=True, slots=True)
class Turned:
    """What a worker made of a turn."""

    kind: str
    payload: bytes | None
    report: Report
    seconds: float


Delta = tuple[int, int]
Arrived = tuple[Record, bytes | None]
"""An update and its payload."""


class SimWorker(Contract):
    """The worker of one simulated peer: holds the model, never the network."""

    def fingerprint(self) -> Delta:
        """Return the model's fingerprint."""
        ...

    def apply(
        self, updates: Sequence[Arrived], *, sign: int
    ) -> tuple[list[tuple[Key, Delta]], list[tuple[Key, str]]]:
        """Add updates (sign +1) or take them out (−1); return deltas and refusals."""
        ...

    def turn(self, start: ev.StartTurn) -> Turned:
        """Train one turn from the model as it is."""
        ...

    def commit(self, log: int, number: int) -> None:
        """The turn's update got this number."""
        ...

    def discard(self) -> None:
        """The turn's update is not published."""
        ...

    def sums(self) -> Any:
        """Return the model in short, for who begins with a snapshot."""
        ...

    def begin(self, sums: Any) -> None:
        """Hold that model."""
        ...


@dataclass(slots=True)
class FakeWorker:
    """Random payloads whose contribution is a linear hash: equal sets, equal fingerprints."""

    run: Run
    rng: random.Random
    seconds: tuple[float, float] = (0.8, 1.2)
    sizes: tuple[int, int] = (100, 4000)
    value: Delta = (0, 0)

    def fingerprint(self) -> Delta:
        """Return the sum of all contributions."""
        return self.value

    def apply(
        self, updates: Sequence[Arrived], *, sign: int
    ) -> tuple[list[tuple[Key, Delta]], list[tuple[Key, str]]]:
        """Add or take out contributions."""
        deltas, refused = [], []
        for record, payload in updates:
            update = record.statement
            assert isinstance(update, Update)
            key = Key(update.author, update.number)
            delta = contribution(self.run, update, payload)
            if delta == (0, 0):
                refused.append((key, "rules"))
            self.value = (
                (self.value[0] + sign * delta[0]) & LANE,
                (self.value[1] + sign * delta[1]) & LANE,
            )
            deltas.append((key, delta))
        return deltas, refused

    def turn(self, start: ev.StartTurn) -> Turned:
        """Return random bytes."""
        payload = self.rng.randbytes(self.rng.randint(*self.sizes))
        return Turned("fake", payload, Report(turn=start.turn), self.rng.uniform(*self.seconds))

    def commit(self, log: int, number: int) -> None:
        """Keep nothing."""

    def discard(self) -> None:
        """Keep nothing."""

    def sums(self) -> Delta:
        """Return the sum of all contributions."""
        return self.value

    def begin(self, sums: Delta) -> None:
        """Hold this sum."""
        self.value = sums


def contribution(run: Run, update: Update, payload: bytes | None) -> Delta:
    """Return what an update adds to the fake model: a function of its bytes and the rules alone."""
    if payload is None or not run.fetched(update.kind, update.size):
        return (0, 0)
    if 0 < run.turns < update.turn:
        return (0, 0)
    a, b = struct.unpack("<QQ", blake2b(payload, digest_size=16).digest())
    return (a, b)


# ---------------------------------------------------------------- peers


@dataclass(slots=True)
class SimPeer:
    """One simulated daemon: what would be on its disk, and its core while it is up."""

    index: int
    id: PeerId
    log: int
    core: Protocol
    worker: SimWorker
    records: dict[Key, Record] = field(default_factory=dict)
    proofs: list[Record] = field(default_factory=list)
    admissions: dict[PeerId, bytes] = field(default_factory=dict)
    payloads: set[Hash] = field(default_factory=set)
    up: bool = False
    life: int = 0
    """Events for an earlier life are dropped."""
    frozen: list[tuple[float, ev.Event]] | None = None
    applied: dict[Author, int] = field(default_factory=dict)
    links: set[int] = field(default_factory=set)
    disk: str = ""
    """Why nothing can be stored."""
    pulls: dict[Hash, int] = field(default_factory=dict)
    """How often each payload was transferred to us."""
    snapshot: Snapshot | None = None
    """What it began with in place of the log …"""
    sums: Any = None
    """… and the model there."""


def fake_seal(statement: Statement) -> Record:
    """Make a record without a signature: its bytes are the statement written out."""
    raw = repr(statement).encode()
    return Record(digest(raw), raw, statement)


def fake_peer(index: int, seed: int = 0) -> PeerId:
    """Return an id spread over the ring like a public key."""
    return PeerId(digest(b"peer %d of %d" % (index, seed)))


@dataclass(frozen=True, slots=True)
class Seen:
    """One line of what happened."""

    at: float
    peer: int
    what: str
    about: PeerId | None
    details: dict[str, str | int | float]


_DISCOVER = Fault("discover", 0.0)
"""A daemon without links looks for the swarm again."""
_ORDERS: dict[str, ev.Event] = {
    "pause": ev.Pause(),
    "resume": ev.Resume(),
    "depart": ev.Depart(),
}


class Simulator:
    """N cores, one heap, one seed."""

    def __init__(
        self,
        peers: int,
        run: Run,
        *,
        seed: int,
        limits: Limits | None = None,
        network: Network | None = None,
        faults: Iterable[Fault | tuple[Fault, ...]] = (),
        workers: Callable[["Simulator", int], SimWorker] | None = None,
        seal: Callable[[Statement], Record] = fake_seal,
        absent: Iterable[int] = (),
        full_views: bool = False,
        observers: Iterable[int] = (),
    ) -> None:
        self.run_, self.seed, self.limits = run, seed, limits or sim()
        self.network = network or Network()
        self.rng = random.Random(seed)
        self.now = 0.0
        self.steps = 0
        self.messages = 0
        self.message_bytes = 0
        self.happened: list[Seen] = []
        self.payloads: dict[Hash, bytes] = {}
        self._seal = seal
        self._make_worker = workers or _fake_workers
        self._observers = set(observers)
        self._heap: list[tuple[float, int, int, int, ev.Event | Fault]] = []
        self._seq = 0
        self._trace = blake2b(digest_size=16)
        self._cuts: list[frozenset[int]] = []
        self._index: dict[PeerId, int] = {}
        self._twins: dict[int, int] = {}
        self._shared = self._full_view(peers) if full_views else None
        self.peers = [self._make(i) for i in range(peers)]
        for fault in faults:
            for one in fault if isinstance(fault, tuple) else (fault,):
                self._push(one.at, one.peer, one)
        late = set(absent)
        for i in range(peers):
            if i not in late:
                self._boot(self.peers[i], first=not any(j not in late for j in range(i)))

    # ------------------------------------------------------------ making peers

    def _make(self, index: int) -> SimPeer:
        peer = fake_peer(index, self.seed)
        self._index[peer] = index
        log = self.rng.getrandbits(64)
        core = self._core(index, peer, log, Held())
        return SimPeer(index, peer, log, core, self._make_worker(self, index))

    def _core(self, index: int, peer: PeerId, log: int, held: Held) -> Protocol:
        run = replace(self.run_, observe=True) if index in self._observers else self.run_
        rng = random.Random(self.rng.getrandbits(64))
        boot = index if self._shared and not self.now else self.rng.getrandbits(64)
        return Protocol(run, peer, log, boot, self._seal, rng, self.limits, held)

    def _full_view(self, peers: int) -> View:
        view = View()
        for i in range(peers):
            peer = fake_peer(i, self.seed)
            observes = i in self._observers
            standing = Standing.OBSERVING if observes else Standing.TRAINING
            view.put(self._seal(Alive(peer, 1, i, standing)))
            view.put(self._seal(Contact(peer, 1, (str(i),), b"admitted")))
        view.ring = sorted(view.alive)
        return view

    def _boot(
        self, peer: SimPeer, *, first: bool = False, keep: int = -1, donor: int = -1, lie: str = ""
    ) -> None:
        if peer.up:
            return
        if donor >= 0:
            self._give_snapshot(self.peers[donor], peer, lie)
        if keep >= 0:
            peer.records = dict(list(peer.records.items())[:keep])
        own = [k.author.log for k in peer.records if k.author.peer == peer.id]
        peer.log = own[-1] if own else (peer.log if not peer.life else self.rng.getrandbits(64))
        records = peer.records
        held = Held(
            tuple(records.values()),
            tuple(peer.proofs),
            dict(peer.admissions),
            records.get,
            peer.snapshot,
            self._shared,
        )
        peer.core = self._core(peer.index, peer.id, peer.log, held)
        peer.up, peer.frozen = True, None
        peer.links = set()
        alone = (first and not peer.life) or self._shared is not None
        self._handle(peer, ev.Start((str(peer.index),), b"admitted", alone))
        self._worker_up(peer)
        if self._shared is None:
            self._bootstrap(peer)

    def _bootstrap(self, peer: SimPeer) -> None:
        """Dial somebody who is up, as the daemon's discovery would."""
        others = [p for p in self.peers if p.up and p is not peer and self._reaches(p, peer)]
        if others:
            other = others[0] if not self.now else self.rng.choice(others)
            self._connect(peer, ev.Connect(other.id, ()))

    def _give_snapshot(self, donor: SimPeer, peer: SimPeer, lie: str) -> None:
        logs, sums = donor.core.frontier.logs, donor.worker.sums()
        fingerprint = donor.worker.fingerprint()
        steady = lie or donor.core.steady()
        if not steady or any(count > logs[a].count for a, count in donor.applied.items()):
            return  # as node/snapshots.py does
        if lie == "model":
            sums = fingerprint = (sums[0] ^ 1, sums[1])
        elif lie == "fingerprint":
            fingerprint = (fingerprint[0] ^ 1, fingerprint[1])
        peer.sums = sums
        lines = [
            Line(
                author,
                MOST if lie == "counts" else count,
                digest(author.peer) if lie == "hashes" else logs[author].hash_at(count),
                MOST if lie == "turns" else logs[author].turn_at(count),
            )
            for author, count in donor.applied.items()
            if count
        ]
        if lie == "author":
            lines.append(Line(Author(peer.id, 1), 3, digest(b"nothing"), MOST))
        by_author = sorted(lines, key=lambda line: line.author)
        peer.snapshot = Snapshot(donor.id, tuple(by_author), fingerprint)

    def _begin(self, peer: SimPeer) -> None:
        peer.worker, peer.applied = self._make_worker(self, peer.index), {}
        if peer.snapshot is not None:
            peer.worker.begin(peer.sums)
            peer.applied = dict(peer.snapshot.counts())

    def _worker_up(self, peer: SimPeer) -> None:
        self._begin(peer)
        counts = tuple(sorted(peer.applied.items()))
        self._later(0.01, peer, ev.WorkerReady(counts, peer.worker.fingerprint()))

    # ------------------------------------------------------------ the heap

    def _push(self, at: float, peer: int, event: ev.Event | Fault, life: int = -1) -> None:
        self._seq += 1
        heappush(self._heap, (at, self._seq, peer, life, event))

    def _later(self, seconds: float, peer: SimPeer, event: ev.Event) -> None:
        self._push(self.now + seconds, peer.index, event, peer.life)

    def run(self, until: float, stop: Callable[["Simulator"], bool] | None = None) -> bool:
        """Go on until `until`, or until `stop` (asked every simulated second) says so."""
        # Millions of objects live and hardly any die in cycles: looking for those takes a tenth.
        thresholds = gc.get_threshold()
        gc.set_threshold(200_000, 100, 100)
        try:
            return self._run(until, stop)
        finally:
            gc.set_threshold(*thresholds)

    def _run(self, until: float, stop: Callable[["Simulator"], bool] | None) -> bool:
        next_question = self.now
        while self._heap and self._heap[0][0] <= until:
            at, _, index, life, event = heappop(self._heap)
            self.now = at
            if stop is not None and at >= next_question:
                next_question = at + 1.0
                if stop(self):
                    return True
            if isinstance(event, Fault) and event is not _DISCOVER:
                self._strike(event)
                continue
            peer = self.peers[index]
            if peer.life == life and peer.up:
                if not isinstance(event, Fault):
                    self._happen(peer, event)
                elif not peer.links:
                    self._bootstrap(peer)
        self.now = max(self.now, until)
        return stop is not None and stop(self)

    def _happen(self, peer: SimPeer, event: ev.Event) -> None:
        if peer.frozen is not None:
            peer.frozen.append((self.now, event))
            return
        self.steps += 1
        name = type(event).__name__
        if isinstance(event, ev.LinkDown) and not peer.links:
            self._push(self.now + 2 + 3 * self.rng.random(), peer.index, _DISCOVER, peer.life)
        if isinstance(event, ev.Received):
            name = type(event.message).__name__
        self._trace.update(struct.pack("<dI", self.now, peer.index) + name.encode())
        self._handle(peer, event)

    def trace(self) -> str:
        """Return a hash over all that happened so far, in order."""
        return self._trace.copy().hexdigest()

    def _handle(self, peer: SimPeer, event: ev.Event) -> None:
        for effect in peer.core.handle(event, self.now):
            self._perform(peer, effect)

    # ------------------------------------------------------------ effects

    def _perform(self, peer: SimPeer, effect: ev.Effect) -> None:
        match effect:
            case ev.Send(to, message):
                self._send(peer, self._index[to], message)
            case ev.DropSnapshot():
                peer.snapshot = None
            case ev.Wake(at):
                self._push(max(at, self.now), peer.index, ev.Tick(), peer.life)
            case ev.Connect():
                self._connect(peer, effect)
            case ev.Disconnect(to, reason):
                self._break(peer.index, self._index[to], reason, 0.0)
            case ev.Pull():
                self._pull(peer, effect)
            case ev.Store(record, own):
                self._store(peer, record, own)
            case ev.KeepAdmission(about, admission):
                peer.admissions[about] = admission
            case ev.Happened(what, about, details):
                if len(self.happened) < MOST_HAPPENED:
                    self.happened.append(Seen(self.now, peer.index, what, about, details))
            case _:
                self._ask_worker(peer, effect)

    def _reaches(self, a: SimPeer, b: SimPeer) -> bool:
        return b.up and not any((a.index in g) != (b.index in g) for g in self._cuts)

    def _delay(self) -> float:
        return self.rng.uniform(*self.network.latency)

    def _send(self, sender: SimPeer, to: int, message: Message) -> None:
        if to in self._twins:
            self._send_one(sender, self._twins[to], message)
        self._send_one(sender, to, message)

    def _send_one(self, sender: SimPeer, to: int, message: Message) -> None:
        self.messages += 1
        if isinstance(message, Push):
            self.message_bytes += sum(len(r.raw) for r in message.records)
        target, network = self.peers[to], self.network
        copies = 1 + (network.duplicate > 0 and self.rng.random() < network.duplicate)
        for _ in range(copies):
            if network.loss and self.rng.random() < network.loss:
                continue
            if self._reaches(sender, target):
                self._later(self._delay(), target, ev.Received(sender.id, message))

    def _connect(self, peer: SimPeer, effect: ev.Connect) -> None:
        other = self.peers[self._index[effect.peer]]
        delay = 2 * self._delay()
        if not self._reaches(peer, other) or other.frozen is not None:
            self._later(1.0, peer, ev.LinkDown(other.id, "unreachable"))
            return
        if other.index not in peer.links:
            peer.links.add(other.index)
            other.links.add(peer.index)
        self._later(delay, peer, ev.LinkUp(other.id, b"admitted"))
        self._later(delay, other, ev.LinkUp(peer.id, b"admitted"))

    def _break(self, a: int, b: int, reason: str, after: float) -> None:
        one, other = self.peers[a], self.peers[b]
        if b not in one.links:
            return
        one.links.discard(b)
        other.links.discard(a)
        delay = after + self._delay()
        self._later(delay, one, ev.LinkDown(other.id, reason))
        self._later(delay, other, ev.LinkDown(one.id, reason))

    def _pull(self, peer: SimPeer, pull: ev.Pull) -> None:
        source = self.peers[self._index[pull.peer]]
        lost = self.network.loss and self.rng.random() < self.network.loss
        has = pull.payload in source.payloads
        if lost or not has or not self._reaches(peer, source):
            event: ev.Event = ev.PullFailed(pull.peer, pull.payload, "unreachable")
            self._later(0.5, peer, event)
            return
        peer.pulls[pull.payload] = peer.pulls.get(pull.payload, 0) + 1
        seconds = 2 * self._delay() + pull.size / self.network.bytes_per_second
        peer.payloads.add(pull.payload)
        self._later(seconds, peer, ev.Pulled(pull.payload))

    def _store(self, peer: SimPeer, record: Record, own: bool) -> None:
        if peer.disk:
            self._later(0.001, peer, ev.StoreFailed(record, peer.disk))
            if peer.disk.startswith("disk"):
                peer.disk = ""  # the daemon keeps the log in memory from here on
            return
        match record.statement:
            case Update() as update:
                key = Key(update.author, update.number)
                peer.records.setdefault(key, record)
                if update.inline is not None:
                    self.payloads[update.payload] = update.inline
                    peer.payloads.add(update.payload)
                if own:
                    peer.worker.commit(update.author.log, update.number)
            case Proof():
                peer.proofs.append(record)
            case _:
                raise ValueError(f"only updates and proofs are stored, not {record.statement}")
        self._later(0.002 if own else 0.0, peer, ev.Stored(record))

    # ------------------------------------------------------------ workers

    def _ask_worker(self, peer: SimPeer, effect: ev.Effect) -> None:
        match effect:
            case ev.StartTurn():
                self._later(0.001, peer, self._applied(peer, effect.frontier))
                self._turn(peer, effect)
            case ev.Apply(frontier):
                self._later(0.001, peer, self._applied(peer, frontier))
            case ev.Subtract(author, first, last):
                self._subtract(peer, author, first, last)
                self._later(0.001, peer, self._state(peer, [], []))
            case ev.Rebuild():
                self._begin(peer)
                applied = self._applied(peer, peer.core.frontier.counts())
                self._later(0.1, peer, ev.Rebuilt(applied))
            case ev.Discard():
                peer.worker.discard()
            case _:
                raise ValueError(f"no worker does {effect}")

    def _turn(self, peer: SimPeer, start: ev.StartTurn) -> None:
        turned = peer.worker.turn(start)
        payload = turned.payload if start.publish else None
        if payload is None:
            peer.worker.discard()
            done = ev.TurnDone(start.turn, turned.kind, None, 0, None, turned.report)
        else:
            name = digest(payload)
            self.payloads[name] = payload
            peer.payloads.add(name)
            inline = payload if len(payload) <= self.limits.inline_bytes else None
            done = ev.TurnDone(start.turn, turned.kind, name, len(payload), inline, turned.report)
        self._later(turned.seconds, peer, done)

    def _arrived(self, peer: SimPeer, key: Key) -> Arrived:
        record = peer.records[key]
        assert isinstance(record.statement, Update)
        name = record.statement.payload
        return record, self.payloads[name] if name in peer.payloads else None

    def _applied(self, peer: SimPeer, frontier: Counts) -> ev.Applied:
        updates = [
            self._arrived(peer, Key(author, n))
            for author, count in frontier
            for n in range(peer.applied.get(author, 0) + 1, count + 1)
        ]
        deltas, refused = peer.worker.apply(updates, sign=+1)
        for author, count in frontier:
            peer.applied[author] = max(count, peer.applied.get(author, 0))
        return self._state(peer, deltas, refused)

    def _subtract(self, peer: SimPeer, author: Author, first: int, last: int) -> None:
        updates = [self._arrived(peer, Key(author, n)) for n in range(first, last + 1)]
        peer.worker.apply(updates, sign=-1)
        peer.applied[author] = first - 1

    def _state(
        self, peer: SimPeer, deltas: list[tuple[Key, Delta]], refused: list[tuple[Key, str]]
    ) -> ev.Applied:
        frontier = tuple(sorted((a, n) for a, n in peer.applied.items() if n))
        return ev.Applied(frontier, peer.worker.fingerprint(), tuple(deltas), tuple(refused))

    # ------------------------------------------------------------ faults

    def _strike(self, fault: Fault) -> None:
        self._trace.update(struct.pack("<dI", fault.at, fault.peer & 0xFFFFFFFF))
        match fault.kind:
            case "cut":
                self._cuts.append(fault.group)
                self._break_across(fault.group)
            case "heal":
                self._cuts.remove(fault.group)
            case "lose":
                self.network.loss = fault.rate
            case _:
                self._strike_peer(fault, self.peers[fault.peer])

    def _strike_peer(self, fault: Fault, peer: SimPeer) -> None:
        match fault.kind:
            case "crash":
                self._crash(peer)
            case "restart":
                self._boot(peer, keep=fault.keep, donor=fault.donor, lie=fault.lie)
            case "freeze":
                peer.frozen = []
            case "thaw":
                waiting, peer.frozen = peer.frozen or [], None
                for _, event in waiting:
                    self._push(self.now, peer.index, event, peer.life)
            case "equivocate":
                self._equivocate(peer)
            case "worker-down":
                self._later(0.0, peer, ev.WorkerDown("killed"))
            case "worker-up":
                self._worker_up(peer)
            case "pause" | "resume" | "depart":
                events: dict[str, ev.Event] = {
                    "pause": ev.Pause(),
                    "resume": ev.Resume(),
                    "depart": ev.Depart(),
                }
                self._later(0.0, peer, events[fault.kind])
            case reason:
                peer.disk = reason

    def _break_across(self, group: frozenset[int]) -> None:
        for peer in self.peers:
            for other in sorted(peer.links):
                if peer.index < other and (peer.index in group) != (other in group):
                    self._break(peer.index, other, "silent", self.network.break_after)

    def _crash(self, peer: SimPeer) -> None:
        for other in sorted(peer.links):
            self._break(peer.index, other, "reset", 0.0)
        peer.up = False
        peer.life += 1

    def _equivocate(self, peer: SimPeer) -> None:
        """Let the other update be heard first by whoever is farthest from its author."""
        own = sorted(k for k in peer.records if k.author == (peer.id, peer.core.log))
        if not own:
            return
        payload = b"another update under the same number"
        update = peer.records[own[-1]].statement
        assert isinstance(update, Update)
        name = digest(payload)
        self.payloads[name] = payload
        other = Update(
            own[-1].author, own[-1].number, update.turn, update.kind, name, len(payload), payload
        )
        record = self._seal(other)
        for target in [p for p in self.peers if p.up and p is not peer][:2]:
            self._later(self._delay(), target, ev.Received(peer.id, Push((record,))))

    def twin(self, index: int) -> SimPeer:
        """Start a second process under the key of a peer; what goes to the key reaches both."""
        first = self.peers[index]
        log = self.rng.getrandbits(64)
        core = self._core(index, first.id, log, Held())
        place = len(self.peers)
        twin = SimPeer(place, first.id, log, core, self._make_worker(self, place))
        self.peers.append(twin)
        self._twins[index] = place
        self._boot(twin)
        return twin

    # ------------------------------------------------------------ questions

    def living(self) -> list[SimPeer]:
        """Return the peers that are up."""
        return [p for p in self.peers if p.up]

    def converged(self) -> bool:
        """Say whether all living peers hold one frontier and have applied it."""
        living = self.living()
        return len({p.core.frontier.hash for p in living}) == 1 and all(
            tuple(sorted((a, n) for a, n in p.applied.items() if n)) == p.core.frontier.counts()
            for p in living
        )

    def expected_fingerprint(self, peer: SimPeer) -> Delta:
        """Sum the contributions below this peer's frontier from its disk, by themselves.

        The peer must have the whole log.
        """
        a = b = 0
        for author, count in peer.core.frontier.counts():
            for n in range(1, count + 1):
                record, payload = self._arrived(peer, Key(author, n))
                assert isinstance(record.statement, Update)
                delta = contribution(self.run_, record.statement, payload)
                a, b = (a + delta[0]) & LANE, (b + delta[1]) & LANE
        return a, b


def _fake_workers(simulator: Simulator, index: int) -> SimWorker:
    return FakeWorker(simulator.run_, random.Random(f"{simulator.seed}/{index}/{simulator.now}"))


def fake_run(*, turns: int = 10, seed: int = 0, **others: object) -> Run:
    """Return a run for fake workers."""
    run_id = RunId(digest(b"fake run %d" % seed))
    return Run(run_id, turns=turns, most_bytes={"fake": 100_000}, **others)  # type: ignore[arg-type]
