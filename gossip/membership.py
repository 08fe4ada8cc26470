"""Which peers are alive, decided by SWIM with Lifeguard. No I/O.

Every probe interval one member is pinged; without an answer through `indirect_probes` others;
then it is suspected, with a signed `Suspect`. A suspicion that is not refuted (by an `Alive` of a
higher incarnation, which only the suspect can sign) ends in *failed*: each peer decides that alone
when its own timer runs out, sooner the more independent accusers it hears (Lifeguard, sec. IV-B).
Failed members are still pinged, ever more rarely, and forgotten after `keep`.

Under one key another process may run: our own past, whose records still circulate, or a twin. An
`Alive` names the other process it has heard of (`against`). Nobody but a living process can name
our boot: then it is a twin. Who is named before it has named the other is the earlier and goes on;
the later one stops publishing; if both named each other first, both stop.
"""

import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from math import log, log10

from shoal.gossip.limits import Limits
from shoal.gossip.messages import Ack, Nack, Ping, PingRequest
from shoal.gossip.names import PeerId
from shoal.gossip.outbox import Outbox
from shoal.gossip.records import (
    HIGHEST,
    Alive,
    Contact,
    Leave,
    Record,
    Standing,
    Statement,
    Suspect,
)
from shoal.gossip.timers import Timers
from shoal.gossip.view import View

LEAP = 1 << 32
"""A doubt so far above what its subject has stated is a lie, told to use up all incarnations."""
MOST_HURRIED = 64
MOST_RTTS = 64
MOST_RELAYS = 256


@dataclass(slots=True)
class Suspicion:
    """One member under suspicion at `incarnation`."""

    incarnation: int
    start: float
    accusers: list[PeerId]
    record: Record
    """The first accusation, to pass on."""


@dataclass(slots=True)
class Failed:
    """A member that did not refute in time."""

    incarnation: int
    since: float
    interval: float
    """Until it is pinged again; doubles."""
    record: Record


@dataclass(slots=True)
class Probe:
    """The ping under way."""

    target: PeerId
    nonce: int
    sent: float
    helpers: int = 0
    nacks: int = 0
    indirect: bool = False


@dataclass(slots=True)
class Relay:
    """A ping made for somebody else."""

    asker: PeerId
    nonce: int


def suspicion_time(
    members: int, confirmations: int, expected: int, interval: float, mult: float, most: float
) -> float:
    """Return how long a suspicion lasts after `confirmations` of `expected` (Lifeguard, IV-B)."""
    # Below 32 members the logarithm is held at 1.5: a laptop's four peers get 6 s, not 4.
    least = mult * max(1.5, log10(max(members, 1))) * interval
    if expected < 1:
        return least
    longest = most * least
    share = log(confirmations + 1) / log(expected + 1)
    return max(least, longest - (longest - least) * share)


@dataclass(slots=True)
class Membership:
    """Join, probe, suspect, fail, refute, leave."""

    me: PeerId
    boot: int
    limits: Limits
    rng: random.Random
    timers: Timers
    out: Outbox
    publish: Callable[[Statement], None]
    """Sign a statement of ours and let everybody have it."""
    view: View = field(default_factory=View)
    standing: Standing = Standing.JOINING
    incarnation: int = 0
    sequence: int = 0
    """Of our contact record."""
    contact: tuple[tuple[str, ...], bytes] | None = None
    suspicions: dict[PeerId, Suspicion] = field(default_factory=dict)
    failed: dict[PeerId, Failed] = field(default_factory=dict)
    forgotten: dict[PeerId, int] = field(default_factory=dict)
    """Incarnations of members no longer kept, so that late records do not bring them back."""
    named: int = 0
    """The boot of the other process under our key that we have named."""
    twin: str | None = None
    """"earlier" or "later" when another process runs under our key."""
    leaving: bool = False
    changes: int = 0
    """Grows whenever the ring does: the topology is stale."""
    health: int = 0
    """Lifeguard's local health: 0 is well; probes are slower by 1 + health."""
    probe: Probe | None = None
    hurried: list[PeerId] = field(default_factory=list)
    relays: dict[int, Relay] = field(default_factory=dict)
    rtts: dict[PeerId, float] = field(default_factory=dict)
    """Round-trip times of the last direct answers, of the `MOST_RTTS` peers asked last."""
    _cursor: int = 0
    _offset: int = 0
    _stride: int = 1

    # ------------------------------------------------------------ about ourselves

    def start(self, addresses: tuple[str, ...], admission: bytes, now: float) -> None:
        """Say that we are here and where."""
        self.view.list(self.me)
        self.changes += 1
        self.contact = (addresses, admission)
        if not self._known_already():
            self.say_contact()
            self.say_alive()
        self._draw_stride()
        self.timers.set("probe", now + self.rng.random() * self.limits.probe_interval)

    def _known_already(self) -> bool:
        """Say whether the view we start with says of us what we would (large simulations)."""
        alive, contact = self.view.alive.get(self.me), self.view.contacts.get(self.me)
        if alive is None or contact is None:
            return False
        said, where = alive.statement, contact.statement
        if not isinstance(said, Alive) or not isinstance(where, Contact):
            return False
        same = (said.boot, said.standing) == (self.boot, self.standing)
        if same and self.contact == (where.addresses, where.admission):
            self.incarnation, self.sequence = said.incarnation, where.sequence
            return True
        return False

    def say_alive(self, above: int = 0) -> None:
        """State our standing at an incarnation above everything heard."""
        self.incarnation = min(max(self.incarnation, above) + 1, HIGHEST)
        self.publish(Alive(self.me, self.incarnation, self.boot, self.standing, self.named))

    def say_contact(self, above: int = 0) -> None:
        """State our addresses."""
        if self.contact is not None:
            self.sequence = min(max(self.sequence, above) + 1, HIGHEST)
            self.publish(Contact(self.me, self.sequence, *self.contact))

    def stand(self, standing: Standing) -> None:
        """Say what we are doing now, if that is new."""
        if standing is not self.standing:
            self.standing = standing
            if self.incarnation and not self.leaving:
                self.say_alive()

    @property
    def retired(self) -> bool:
        """Whether this process gives way to an earlier one under its key: it links to nobody."""
        return self.twin == "later"

    def leave(self) -> None:
        """Say good-bye."""
        self.leaving = True
        if self.retired:
            return  # whoever goes on under this key has not left
        self.incarnation = min(self.incarnation + 1, HIGHEST)
        self.publish(Leave(self.me, self.incarnation))

    def _heard_of_me(self, alive: Alive) -> None:
        if alive.boot == self.boot:
            self.incarnation = max(self.incarnation, alive.incarnation)
            return
        if alive.against == self.boot and self.twin is None:
            self.twin = "later" if self.named == alive.boot else "earlier"
            self.out.happened("twin", self.me, role=self.twin)
        if alive.incarnation >= self.incarnation:
            self.named = alive.boot
            # Two twins in step would outbid each other for ever as fast as the network carries.
            self.timers.hurry("outbid", self._now + (1.0 if self.twin else 0.0))
            self.incarnation = max(self.incarnation, alive.incarnation)

    _now: float = 0.0

    # ------------------------------------------------------------ records of others

    def take(self, record: Record, now: float) -> bool:
        """Take in a record of membership; say whether it is news worth passing on."""
        self._now = now
        match record.statement:
            case Alive() as alive:
                return self._take_alive(record, alive, now)
            case Leave() as leave:
                return self._take_leave(record, leave, now)
            case Contact() as contact:
                return self._take_contact(record, contact)
            case Suspect() as suspect:
                return self._take_suspect(record, suspect, now)
        return False

    def newer(self, record: Record) -> Record | None:
        """Return what outdates this record, so that its author can be told."""
        held: Record | None = None
        match record.statement:
            case Alive(peer=peer) | Leave(peer=peer):
                held = self.view.alive.get(peer) or self.view.left.get(peer)
            case Contact(peer=peer):
                held = self.view.contacts.get(peer)
        return held if held is not None and held.id != record.id else None

    def _take_alive(self, record: Record, alive: Alive, now: float) -> bool:
        peer = alive.peer
        if peer == self.me:
            self._heard_of_me(alive)
            return False
        if not self._is_news(peer, (alive.incarnation, alive.boot)):
            return False
        if peer not in self.view.alive and not self._room(self.view.alive):
            self.out.count("view-full")
            return False
        met = peer in self.view.alive
        self.view.put(record)
        self.forgotten.pop(peer, None)
        self.timers.cancel("forget", peer)
        if (failed := self.failed.get(peer)) is not None:
            if alive.incarnation > failed.incarnation:
                self._recover(peer, now)
            return True
        if (doubt := self.suspicions.get(peer)) and alive.incarnation > doubt.incarnation:
            self._unsuspect(peer)
        if self.view.list(peer):
            self.changes += 1
            self.out.happened("recovered" if met else "joined", peer)
        return True

    def _is_news(self, peer: PeerId, stamp: tuple[int, int]) -> bool:
        held = self.view.alive.get(peer)
        if held is not None and isinstance(held.statement, Alive):
            return stamp > (held.statement.incarnation, held.statement.boot)
        return stamp[0] > max(self.view.incarnation(peer), self.forgotten.get(peer, 0))

    def _take_leave(self, record: Record, leave: Leave, now: float) -> bool:
        peer = leave.peer
        if peer == self.me:
            if not self.leaving and leave.incarnation >= self.incarnation:
                self.incarnation = leave.incarnation
                self.timers.hurry("outbid", now)
            return False
        gone = peer in self.view.left
        if leave.incarnation == self.forgotten.get(peer) and peer not in self.view.alive:
            return False
        if not gone and peer not in self.view.alive and not self._room(self.view.left):
            self.out.count("view-full")
            return False
        known = max(self.view.incarnation(peer), self.forgotten.get(peer, 0))
        if leave.incarnation < known or (gone and leave.incarnation == known):
            return False
        self.view.put(record)
        self._unsuspect(peer)
        self._unfail(peer)
        if self.view.unlist(peer):
            self.changes += 1
            self.out.happened("left", peer)
        self.timers.set("forget", now + self.limits.keep, peer)
        return True

    def _take_contact(self, record: Record, contact: Contact) -> bool:
        peer, held = contact.peer, self.view.contacts.get(contact.peer)
        if peer == self.me:
            if contact.sequence > self.sequence or (
                contact.sequence == self.sequence
                and self.contact is not None
                and contact.addresses != self.contact[0]
            ):
                self.sequence = contact.sequence
                self.timers.hurry("outbid", self._now)
            return False
        if peer in self.forgotten:
            return False  # without a life of its peer nobody would ever forget it again
        if held is None and not self._room(self.view.contacts):
            self.out.count("view-full")
            return False
        if held is not None and isinstance(held.statement, Contact):
            if contact.sequence < held.statement.sequence:
                return False
            if contact.sequence == held.statement.sequence and record.id <= held.id:
                return False
        self.view.put(record)
        return True

    # ------------------------------------------------------------ suspicion

    def _take_suspect(self, record: Record, suspect: Suspect, now: float) -> bool:
        peer = suspect.peer
        if peer == self.me:
            self.refute(suspect.incarnation)
            return False
        if peer in self.failed or not self.view.lives(peer):
            return False
        if not 0 <= suspect.incarnation - self.view.incarnation(peer) < LEAP:
            return False
        doubt = self.suspicions.get(peer)
        if doubt is None or suspect.incarnation > doubt.incarnation:
            self._suspect(peer, suspect.incarnation, record, suspect.accuser, now)
            return True
        if suspect.accuser in doubt.accusers or len(doubt.accusers) > self._expected():
            return False
        doubt.accusers.append(suspect.accuser)
        self._set_expiry(peer, doubt)
        return True

    def _suspect(
        self, peer: PeerId, incarnation: int, record: Record, accuser: PeerId, now: float
    ) -> None:
        doubt = Suspicion(incarnation, now, [accuser], record)
        self.suspicions[peer] = doubt
        self._set_expiry(peer, doubt)
        self.out.happened("suspected", peer)

    def _set_expiry(self, peer: PeerId, doubt: Suspicion) -> None:
        limits = self.limits
        lasts = suspicion_time(
            len(self.view.ring),
            len(doubt.accusers) - 1,
            self._expected(),
            limits.probe_interval,
            limits.suspicion_mult,
            limits.suspicion_max_mult,
        )
        self.timers.set("expire", doubt.start + lasts, peer)

    def _expected(self) -> int:
        """Return how many confirmations shorten a suspicion to its least."""
        expected = self.limits.suspicion_mult - 2
        return expected if len(self.view.ring) - 2 >= expected else 0

    def _accuse(self, peer: PeerId, now: float) -> None:
        """We could not reach `peer`: say so, unless enough others have."""
        if not self.view.lives(peer) or peer == self.me:
            return
        doubt = self.suspicions.get(peer)
        if doubt and (self.me in doubt.accusers or len(doubt.accusers) > self._expected()):
            return
        incarnation = doubt.incarnation if doubt else self.view.incarnation(peer)
        self._now = now
        self.publish(Suspect(self.me, peer, incarnation))

    def _unsuspect(self, peer: PeerId) -> None:
        if self.suspicions.pop(peer, None):
            self.timers.cancel("expire", peer)

    def _expire(self, peer: PeerId, now: float) -> None:
        """Nobody refuted in time."""
        doubt = self.suspicions.pop(peer, None)
        if doubt is None:
            return
        interval = self.limits.retry_failed
        self.failed[peer] = Failed(doubt.incarnation, now, interval, doubt.record)
        self.timers.set("retry", now + interval * (0.5 + self.rng.random()), peer)
        if self.view.unlist(peer):
            self.changes += 1
        self.out.happened("failed", peer)

    def refute(self, incarnation: int) -> None:
        """Somebody doubts us at `incarnation`: outbid that (and mind our own health)."""
        if 0 <= incarnation - self.incarnation < LEAP and not self.leaving:
            self._feel(+1)
            self.say_alive(incarnation)

    def _unfail(self, peer: PeerId) -> bool:
        self.timers.cancel("retry", peer)
        return self.failed.pop(peer, None) is not None

    def _recover(self, peer: PeerId, now: float) -> None:
        self._unfail(peer)
        if self.view.list(peer):
            self.changes += 1
        self.out.happened("recovered", peer)
        # Where one comes back a whole half of the swarm may: try all the failed soon.
        for other in sorted(self.failed):
            self.failed[other].interval = self.limits.retry_failed
            self.timers.hurry("retry", now + 2 * self.rng.random(), other)

    def heard_from(self, peer: PeerId, now: float) -> None:
        """A message of `peer` arrived: if we think it failed, or forgot it, ask it to refute."""
        if peer in self.failed:
            self.timers.hurry("retry", now, peer)
        elif peer in self.forgotten and not self.timers.pending("welcome", peer):
            # It may know of no higher incarnation than the one we forgot.
            self.timers.set("welcome", now + self.limits.retry_failed, peer)
            self.out.send(peer, Ping(self._nonce(), self.forgotten[peer]))

    def doubts(self, peer: PeerId) -> int | None:
        """Return the incarnation at which `peer` is suspected or failed."""
        if doubt := self.suspicions.get(peer) or self.failed.get(peer):
            return doubt.incarnation
        return None

    def doubt_record(self, peer: PeerId) -> Record | None:
        """Return an accusation of `peer`, for those who only hear that it was alive."""
        doubt = self.suspicions.get(peer) or self.failed.get(peer)
        return doubt.record if doubt else None

    # ------------------------------------------------------------ probing

    def on_time(self, what: str, whom: PeerId, now: float) -> bool:
        """Do what is due; say whether it was ours to do."""
        self._now = now
        match what:
            case "probe":
                self._next_probe(now)
            case "probe-indirect":
                self._ask_helpers()
            case "relay":
                self._give_up_relay(int.from_bytes(whom, "big"))
            case "expire":
                self._expire(whom, now)
            case "retry":
                self._retry(whom, now)
            case "forget":
                self._forget(whom)
            case "welcome":
                pass
            case "outbid":
                self.say_alive()
                self.say_contact()
            case _:
                return False
        return True

    def hurry(self, peer: PeerId, now: float) -> None:
        """The link to `peer` broke: probe it next."""
        if self.view.lives(peer) and peer not in self.hurried and len(self.hurried) < MOST_HURRIED:
            self.hurried.append(peer)
            if self.probe is None:
                self.timers.hurry("probe", now)

    def _next_probe(self, now: float) -> None:
        if self.probe is not None:
            self._probe_failed(self.probe, now)
        pace = 1 + self.health
        self.timers.set("probe", now + self.limits.probe_interval * pace)
        target = self._next_target()
        if target is None:
            self.probe = None
            return
        self.probe = Probe(target, self._nonce(), now)
        self.timers.set("probe-indirect", now + self.limits.probe_timeout * pace)
        # Lifeguard's buddy system: whom we doubt learns it from us first.
        self.out.send(target, Ping(self.probe.nonce, self.doubts(target)))

    def _next_target(self) -> PeerId | None:
        """Return the next member, each once per round in an order of our own."""
        while self.hurried:
            peer = self.hurried.pop(0)
            if self.view.lives(peer):
                return peer
        ring = self.view.ring
        for _ in range(2):
            self._cursor += 1
            if self._cursor >= len(ring):
                self._draw_stride()
            peer = ring[(self._offset + self._cursor * self._stride) % len(ring)]
            if peer != self.me:
                return peer
        return None

    def _draw_stride(self) -> None:
        """Draw a new round: a step that reaches every place of the ring before it repeats."""
        size = max(len(self.view.ring), 1)
        self._offset, self._cursor = self.rng.randrange(size), 0
        self._stride = next(
            s for s in (self.rng.randrange(1, size + 1) for _ in range(10_000)) if _coprime(s, size)
        )

    def _nonce(self) -> int:
        return self.rng.getrandbits(64)

    def _ask_helpers(self) -> None:
        probe = self.probe
        if probe is None or probe.indirect:
            return
        probe.indirect = True
        for helper in self.sample(self.limits.indirect_probes, without=probe.target):
            probe.helpers += 1
            self.out.send(helper, PingRequest(probe.nonce, probe.target))

    def sample(self, count: int, *, without: PeerId) -> list[PeerId]:
        """Return up to `count` random living members that nobody doubts."""
        ring, chosen = self.view.ring, list[PeerId]()
        for _ in range(4 * count):
            peer = ring[self.rng.randrange(len(ring))]
            if peer not in (self.me, without, *chosen) and peer not in self.suspicions:
                chosen.append(peer)
                if len(chosen) == count:
                    break
        return chosen

    def _probe_failed(self, probe: Probe, now: float) -> None:
        self.probe = None
        # Lifeguard, IV-A: helpers that did not even say "nack" point at ourselves.
        self._feel(probe.helpers - probe.nacks if probe.helpers else 1)
        self._accuse(probe.target, now)

    def _feel(self, change: int) -> None:
        self.health = max(0, min(self.limits.awareness_max - 1, self.health + change))

    def on_message(
        self, peer: PeerId, message: Ping | Ack | PingRequest | Nack, now: float
    ) -> None:
        """Answer a probe or learn from an answer."""
        self._now = now
        match message:
            case Ping(nonce, suspected):
                if suspected is not None:
                    self._refute_to(peer, suspected)
                self.out.send(peer, Ack(nonce))
            case PingRequest(nonce, target):
                self._relay(peer, nonce, target, now)
            case Ack(nonce):
                self._answered(peer, nonce, now)
            case Nack(nonce):
                if self.probe is not None and self.probe.nonce == nonce:
                    self.probe.nacks += 1

    def _refute_to(self, peer: PeerId, suspected: int) -> None:
        self.refute(suspected)
        # The doubter may not be among our links: tell it directly.
        if record := self.view.alive.get(self.me):
            self.out.push(peer, record)

    def _answered(self, peer: PeerId, nonce: int, now: float) -> None:
        if self.probe is not None and self.probe.nonce == nonce:
            if peer == self.probe.target:
                self.rtts.pop(peer, None)
                self.rtts[peer] = now - self.probe.sent
                if len(self.rtts) > MOST_RTTS:
                    del self.rtts[next(iter(self.rtts))]
            self.probe = None
            self.timers.cancel("probe-indirect")
            self._feel(-1)
        elif relay := self.relays.pop(nonce, None):
            self.timers.cancel("relay", nonce.to_bytes(8, "big"))
            self.out.send(relay.asker, Ack(relay.nonce))

    def _relay(self, asker: PeerId, nonce: int, target: PeerId, now: float) -> None:
        if len(self.relays) >= MOST_RELAYS or target == self.me:
            return
        own = self._nonce()
        self.relays[own] = Relay(asker, nonce)
        # Nack before the asker's own interval ends.
        self.timers.set("relay", now + 0.8 * self.limits.probe_timeout, own.to_bytes(8, "big"))
        self.out.send(target, Ping(own, self.doubts(target)))

    def _give_up_relay(self, own: int) -> None:
        if relay := self.relays.get(own):
            self.out.send(relay.asker, Nack(relay.nonce))
            del self.relays[own]

    # ------------------------------------------------------------ the failed

    def _retry(self, peer: PeerId, now: float) -> None:
        failed = self.failed.get(peer)
        if failed is None:
            return
        if now - failed.since > self.limits.keep:
            self._forget(peer)
            return
        self.timers.set("retry", now + failed.interval * (0.75 + self.rng.random() / 2), peer)
        failed.interval = min(2 * failed.interval, self.limits.retry_failed_max)
        self.out.send(peer, Ping(self._nonce(), failed.incarnation))

    def _forget(self, peer: PeerId) -> None:
        if self.view.lives(peer):
            return
        self._unfail(peer)
        self.forgotten[peer] = self.view.incarnation(peer)
        while len(self.forgotten) > self.limits.members:
            del self.forgotten[next(iter(self.forgotten))]
        self.view.drop(peer)
        self.out.happened("forgotten", peer)

    def _room(self, records: Mapping[PeerId, Record]) -> bool:
        """Say whether there is room for one peer more: who left or failed first makes way."""
        for gone in (self.view.left, self.failed):
            while len(records) >= self.limits.members:
                peer = next((p for p in gone if p in records and not self.view.lives(p)), None)
                if peer is None:
                    break
                self._forget(peer)
        return len(records) < self.limits.members

    def others(self) -> Iterator[PeerId]:
        """Yield the living members apart from ourselves, sorted."""
        return (peer for peer in self.view.ring if peer != self.me)

    def standing_of(self, peer: PeerId) -> Standing | None:
        """Return what a member last said it is doing."""
        if peer == self.me:
            return self.standing
        record = self.view.alive.get(peer)
        if record is None or not isinstance(record.statement, Alive):
            return None
        return record.statement.standing


def _coprime(a: int, b: int) -> bool:
    while b:
        a, b = b, a % b
    return a == 1
