"""The gossip core behind the real wire, lied to: it goes on in bounded memory, with all others."""

import random
import tracemalloc
from collections.abc import Callable
from dataclasses import replace

import pytest

from shoal.gossip import events as ev
from shoal.gossip import messages as m
from shoal.gossip import records as r
from shoal.gossip.agreement import MOST_RULES
from shoal.gossip.limits import Limits
from shoal.gossip.names import NO_HASH, Author, Hash, Key, PeerId, RunId, digest
from shoal.gossip.protocol import Protocol
from shoal.gossip.run import Held, Run
from shoal.node.admission import Admission
from shoal.node.identity import Identity
from shoal.node.wire.fields import WireError
from shoal.node.wire.frames import FrameReader, encode
from shoal.node.wire.records import RecordReader, Sealer

RUN = RunId(bytes(range(32)))
ADMISSION = Admission(RUN)
TOP = 2**64 - 1
HERE = ("/ip4/127.0.0.1/tcp/7464",)


class Victim:
    """A core with a key and a reader of its own; the test is its driver, and its disk."""

    def __init__(self, *, alone: bool = True, limits: Limits | None = None) -> None:
        self.identity = Identity.generate()
        self.limits = limits or Limits()
        self.now = 100.0
        self.frames = FrameReader(RecordReader(RUN, ADMISSION.verify), self.limits)
        self.disk: dict[Key, r.Record] = {}
        self.asked: list[ev.StartTurn] = []
        self.pulls: list[ev.Pull] = []
        self.published: list[r.Record] = []
        self.core = Protocol(
            Run(RUN, most_bytes={"dense": 5000}),
            self.identity.peer,
            7,
            9,
            self.seal,
            random.Random(1),
            self.limits,
            Held(recall=self.disk.get),
        )
        self.feed(ev.Start(HERE, ADMISSION.prove(self.identity.peer), alone))
        self.feed(ev.WorkerReady((), (0, 0)))

    def seal(self, statement: r.Statement) -> r.Record:
        record = Sealer(self.identity, RUN).seal(statement)
        self.published.append(record)
        return record

    def feed(self, event: ev.Event) -> None:
        waiting = [event]
        while waiting:
            for effect in self.core.handle(waiting.pop(0), self.now):
                match effect:
                    case ev.Store(record):
                        if isinstance(update := record.statement, r.Update):
                            self.disk[Key(update.author, update.number)] = record
                        waiting.append(ev.Stored(record))
                    case ev.Pull():
                        self.pulls.append(effect)
                    case ev.Apply(frontier):
                        waiting.append(ev.Applied(frontier, (0, 0), ()))
                    case ev.StartTurn():
                        self.asked.append(effect)

    def hear(self, peer: "Member", *messages: m.Message) -> None:
        for message in messages:
            try:
                frame = self.frames.read(encode(message))
            except WireError as error:
                self.feed(ev.Misbehaved(peer.peer, error.reason))
                continue
            for each in frame.messages:
                self.feed(ev.Received(peer.peer, each))

    def push(self, peer: "Member", *records: r.Record) -> None:
        self.hear(peer, m.Push(records))

    def wait(self, seconds: float) -> None:
        end = self.now + seconds
        while self.now < end:
            self.now += 0.5
            self.feed(ev.Tick())

    def meet(self, *members: "Member") -> None:
        for member in members:
            self.feed(ev.LinkUp(member.peer, member.proof))
            self.push(member, *member.hello())

    def count(self, member: "Member", log: int = 1) -> int:
        return self.core.frontier.count(Author(member.peer, log))


class Member:
    """An admitted peer, honest or not."""

    def __init__(self) -> None:
        self.identity = Identity.generate()
        self.peer = self.identity.peer
        self.proof = ADMISSION.prove(self.peer)
        self.seal = Sealer(self.identity, RUN).seal

    def hello(self, n: int = 1) -> tuple[r.Record, ...]:
        alive = r.Alive(self.peer, n, 5, r.Standing.TRAINING)
        return self.seal(r.Contact(self.peer, n, HERE, self.proof)), self.seal(alive)

    def update(self, number: int, log: int = 1, inline: bytes = b"x", turn: int = 1) -> r.Record:
        author = Author(self.peer, log)
        fields = (author, number, turn, "dense", digest(inline), len(inline), inline)
        return self.seal(r.Update(*fields))

    def named(self, number: int, payload: Hash) -> r.Record:
        return self.seal(r.Update(Author(self.peer, 1), number, 1, "dense", payload, 3000))


# ---------------------------------------------------------------- numbers that run out


Lie = Callable[[Victim, Member], r.Record | m.Message]


@pytest.mark.parametrize("top", [TOP, r.HIGHEST], ids=["u64", "highest"])
@pytest.mark.parametrize(
    "lie",
    [
        lambda v, p, n: p.seal(r.Suspect(p.peer, v.identity.peer, n)),
        lambda v, p, n: m.Ping(1, n),
        # Signed with the victim's own key, by whoever copied it.
        lambda v, p, n: v.seal(r.Alive(v.identity.peer, n, 77, r.Standing.TRAINING)),
        lambda v, p, n: v.seal(r.Leave(v.identity.peer, n)),
        lambda v, p, n: v.seal(r.Contact(v.identity.peer, n, (), ADMISSION.prove(v.identity.peer))),
        lambda v, p, n: v.seal(r.Progress(v.identity.peer, n, (), NO_HASH, (0, 0), r.Report())),
    ],
    ids=["suspect", "ping", "alive", "leave", "contact", "progress"],
)
def test_no_number_makes_a_peer_unable_to_speak(
    lie: Callable[[Victim, Member, int], object], top: int
) -> None:
    victim, liar = Victim(), Member()
    victim.meet(liar)
    told = lie(victim, liar, top)
    if isinstance(told, r.Record):
        victim.push(liar, told)
    else:
        victim.hear(liar, told)  # type: ignore[arg-type]
    victim.wait(30)
    said = len(victim.published)
    victim.feed(ev.Pause())
    assert len(victim.published) > said, "it still says what it does"


def test_nobody_is_suspected_at_an_incarnation_that_it_cannot_refute() -> None:
    victim, liar, honest = Victim(), Member(), Member()
    victim.meet(liar, honest)
    victim.push(liar, liar.seal(r.Suspect(liar.peer, honest.peer, r.HIGHEST)))
    assert honest.peer not in victim.core.membership.suspicions
    victim.push(liar, liar.seal(r.Suspect(liar.peer, honest.peer, 1)))
    assert honest.peer in victim.core.membership.suspicions
    victim.push(honest, *honest.hello(2))
    assert honest.peer not in victim.core.membership.suspicions


def test_a_joiner_does_not_believe_in_the_last_turn() -> None:
    victim, liar = Victim(alone=False), Member()
    victim.meet(liar)
    report = r.Report(turn=TOP)
    victim.push(liar, liar.seal(r.Progress(liar.peer, 5, (), NO_HASH, (0, 0), report)))
    victim.push(liar, liar.update(1, turn=2**32 - 1))
    victim.wait(60)
    turn = victim.asked[-1]
    victim.feed(ev.Applied(turn.frontier, (0, 0), ()))
    done = ev.TurnDone(turn.turn, "dense", digest(b"a"), 1, b"a", r.Report(turn=turn.turn))
    victim.feed(done)
    assert victim.core.frontier.count(Author(victim.identity.peer, victim.core.log)) == 1


# ---------------------------------------------------------------- room that is taken from others


def test_payloads_that_nobody_delivers_do_not_keep_out_others() -> None:
    victim, honest = Victim(), Member()
    liars = [Member() for _ in range(8)]
    victim.meet(honest, *liars)
    for number in range(1, 600):
        victim.now += 0.1
        for liar in liars:
            victim.push(liar, liar.named(number, digest(liar.peer + bytes([number % 256]))))
        while victim.pulls:
            pull = victim.pulls.pop()
            victim.feed(ev.PullFailed(pull.peer, pull.payload, "not found"))
    assert victim.core.counters["misbehaved:not found"] >= 8
    assert all(victim.core.scores.banned(liar.peer, victim.now) for liar in liars)
    victim.push(honest, honest.update(1), honest.update(2))
    assert victim.count(honest) == 2


def test_an_update_given_up_is_taken_from_who_has_it() -> None:
    victim, liar, honest = Victim(), Member(), Member()
    victim.meet(liar, honest)
    payload = digest(b"real")
    record = honest.named(1, payload)
    victim.push(liar, record)
    for _ in range(60):
        victim.wait(1)
        while victim.pulls:
            pull = victim.pulls.pop()
            victim.feed(ev.PullFailed(pull.peer, pull.payload, "truncated"))
    assert victim.core.counters["given-up"] == 1
    victim.push(honest, record)
    victim.wait(1)
    assert [(p.peer, p.payload) for p in victim.pulls] == [(honest.peer, payload)]
    victim.feed(ev.Pulled(payload))
    assert victim.count(honest) == 1


def test_holes_of_one_author_leave_room_for_those_of_others() -> None:
    victim, honest = Victim(limits=replace(Limits(), updates_per_minute=1e6)), Member()
    liars = [Member() for _ in range(8)]
    victim.meet(honest, *liars)
    for number in range(5, 600):
        victim.now += 0.1
        for liar in liars:
            victim.push(liar, liar.update(number))
    victim.push(honest, honest.update(2))
    victim.push(honest, honest.update(1))
    assert victim.count(honest) == 2


def test_strangers_of_a_liar_do_not_keep_out_those_of_others() -> None:
    victim, liar, honest, newcomer = Victim(), Member(), Member(), Member()
    victim.meet(liar, honest)
    for _ in range(1100):
        victim.now += 0.1
        victim.push(liar, Member().update(1))
    victim.push(honest, newcomer.update(1))
    victim.hear(honest, m.Vouch(newcomer.peer, newcomer.proof))
    assert victim.count(newcomer) == 1
    assert victim.core.counters["stranger-dropped"] > 900


def test_members_that_left_make_room_for_newcomers() -> None:
    victim, liar = Victim(limits=replace(Limits(), members=30)), Member()
    victim.meet(liar)
    for _ in range(100):
        victim.now += 0.1
        fake = Member()
        victim.push(liar, *fake.hello(), fake.seal(r.Leave(fake.peer, 2)))
    newcomer = Member()
    victim.push(liar, *newcomer.hello())
    view = victim.core.view
    assert newcomer.peer in view.contacts
    assert newcomer.peer in view.alive
    assert max(map(len, (view.alive, view.left, view.contacts))) <= 30


def test_a_liar_cannot_make_us_lag_behind_what_nobody_has() -> None:
    victim, liar = Victim(), Member()
    victim.meet(liar)
    for i in range(20):
        logs = [Author(liar.peer, 2000 * i + j) for j in range(2000)]
        entries = tuple(m.Entry(log, 2**32 - 1, digest(b"?"), 0) for log in logs)
        victim.hear(liar, m.Digest(entries, False, digest(b"!"), 0, True))
    assert len(victim.core.repair.links[liar.peer].heard) <= victim.limits.logs
    victim.feed(ev.LinkDown(liar.peer, "gone"))
    assert victim.core.lag() == 0


# ---------------------------------------------------------------- memory


@pytest.mark.slow
def test_lies_of_every_kind_take_bounded_memory() -> None:
    victim, liar = Victim(limits=replace(Limits(), members=64, logs=256)), Member()
    victim.meet(liar)
    logs = sorted(Author(PeerId(digest(b"%d" % i)), i) for i in range(200))

    def lie(round_: int) -> None:
        victim.now += 1
        fake = Member()
        one, two = sorted((fake.update(1), fake.update(1, inline=b"y")), key=lambda x: x.id)
        counts = tuple((log, round_) for log in logs)
        progress = r.Progress(liar.peer, round_, counts, NO_HASH, (0, 0), r.Report())
        victim.push(
            liar,
            *fake.hello(),
            fake.update(2, log=round_),
            fake.seal(r.Suspect(fake.peer, liar.peer, 1)),
            liar.seal(r.Proof(Author(fake.peer, 1), 1, one.raw, two.raw)),
            liar.seal(progress),
            Member().update(1),
        )
        victim.hear(liar, m.Vouch(fake.peer, fake.proof))
        entries = tuple(m.Entry(a, 5, digest(b"%d" % round_), 0) for a in logs[:100])
        victim.hear(liar, m.Digest(entries, False, digest(b"z"), 0, True))
        victim.hear(liar, m.Announce(tuple(digest(b"%d %d" % (round_, i)) for i in range(20))))

    for round_ in range(1, 400):
        lie(round_)
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        for round_ in range(400, 800):
            lie(round_)
        grown = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    # What was there before was not traced, and is replaced by what is: some of it counts here.
    assert grown < 24 << 20
    core = victim.core
    assert len(core.admissions.peers) <= len(core.admissions.kept) + 2 * victim.limits.members
    assert len(core.frontier.logs) <= victim.limits.logs
    assert len(core.view.proofs) <= victim.limits.logs
    assert core.admissions.strangers.held <= victim.limits.held_records


def test_a_frame_of_many_small_messages_is_refused() -> None:
    frames = FrameReader(RecordReader(RUN, ADMISSION.verify), Limits())
    with pytest.raises(WireError, match="messages in one frame"):
        frames.read(encode(m.Ping(1)) * 2000)


def test_refusals_are_counted_by_rule_not_by_what_the_author_wrote() -> None:
    victim, liar = Victim(), Member()
    victim.meet(liar)
    for number in range(1, 200):
        key = Key(Author(liar.peer, 1), number)
        victim.feed(ev.Applied(((key.author, number),), (0, 0), (), ((key, f"turn: {number}"),)))
        victim.feed(ev.Applied(((key.author, number),), (0, 0), (), ((key, f"odd {number}"),)))
    refused = victim.core.agreement.refused
    assert refused["turn"] == 199
    assert len(refused) <= MOST_RULES + 1


def test_questions_cost_what_their_answers_do() -> None:
    victim, liar = Victim(), Member()
    victim.meet(liar)
    for _ in range(300):
        victim.push(liar, *Member().hello())
        victim.now += 0.1
    for _ in range(5000):
        victim.hear(liar, m.ViewIds((), ()))
    assert victim.core.counters["question-delayed"] > 4000
    victim.wait(60)
    before = victim.core.counters["question-delayed"]
    victim.hear(liar, m.ViewIds((), ()))
    assert victim.core.counters["question-delayed"] == before, "later it may ask again"


def test_many_logs_of_one_author_are_delayed_even_in_one_message() -> None:
    victim, liar = Victim(), Member()
    victim.meet(liar)
    victim.push(liar, *(liar.update(1, log=log) for log in range(50)))
    logs = [author for author in victim.core.frontier.logs if author.peer == liar.peer]
    assert len(logs) == 2, "its own, and one more in an hour"
    assert victim.core.counters["log-delayed"] == 48
