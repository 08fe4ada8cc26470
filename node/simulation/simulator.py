"""Thousands of gossip cores on one heap: a seeded network, faults as data, fake or real workers.

Everything the daemons' cores do, without their sockets: the same `Protocol` objects are driven by
`(time, seq, peer, event)` off a heap. The same seed gives the same trace.
"""

import gc
import random
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from hashlib import blake2b
from heapq import heappop, heappush

from shoal.gossip import events as ev
from shoal.gossip.limits import Limits, sim
from shoal.gossip.messages import Message, Push
from shoal.gossip.names import Hash, Key, PeerId, digest
from shoal.gossip.protocol import Protocol
from shoal.gossip.records import (
    Alive,
    Contact,
    Proof,
    Record,
    Standing,
    Statement,
    Update,
)
from shoal.gossip.run import Held, Run
from shoal.gossip.view import View
from shoal.node.simulation.faults import Fault, Network
from shoal.node.simulation.peers import SimPeer, fake_peer, fake_seal
from shoal.node.simulation.workers import LANE, Delta, FakeWorker, SimWorker, contribution

MOST_HAPPENED = 100_000


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
        self._make_worker = workers or fake_workers
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
        return SimPeer(index, peer, log, core, self._make_worker(self, index), self.payloads)

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
            peer.take_snapshot(self.peers[donor], lie)
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
        if peer.core.membership.retired:
            return
        others = [p for p in self.peers if p.up and p is not peer and self._reaches(p, peer)]
        if others:
            other = others[0] if not self.now else self.rng.choice(others)
            self._connect(peer, ev.Connect(other.id, ()))

    def _worker_up(self, peer: SimPeer) -> None:
        peer.begin(self._make_worker(self, peer.index))
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

    def _ask_worker(self, peer: SimPeer, effect: ev.Effect) -> None:
        match effect:
            case ev.StartTurn():
                self._later(0.001, peer, peer.apply(effect.frontier))
                self._turn(peer, effect)
            case ev.Apply(frontier):
                self._later(0.001, peer, peer.apply(frontier))
            case ev.Subtract(author, first, last):
                self._later(0.001, peer, peer.subtract(author, first, last))
            case ev.Rebuild():
                peer.begin(self._make_worker(self, peer.index))
                applied = peer.apply(peer.core.frontier.counts())
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
                self._later(0.0, peer, _ORDERS[fault.kind])
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
        twin = SimPeer(place, first.id, log, core, self._make_worker(self, place), self.payloads)
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
                record, payload = peer.arrived(Key(author, n))
                assert isinstance(record.statement, Update)
                delta = contribution(self.run_, record.statement, payload)
                a, b = (a + delta[0]) & LANE, (b + delta[1]) & LANE
        return a, b


def fake_workers(simulator: Simulator, index: int) -> SimWorker:
    """Make the fake worker of a peer."""
    return FakeWorker(simulator.run_, random.Random(f"{simulator.seed}/{index}/{simulator.now}"))
