"""Start reading here: the gossip core. Events in, effects out; no clock, no socket, no tensor.

`Protocol.handle(event, now)` is all there is to drive. Behind it, one noun each:

    membership.py      who is there                  dissemination.py   records along links
    frontier.py        which updates are in          repair.py          what is missing, from whom
    arrivals.py        payloads, storing             neighbours.py      which links should be open
    turns.py           what the worker does next     agreement.py       are our models the same?
    pacing.py          may the next turn start?      score.py           who misbehaves?
    admissions.py      how were they let in?         equivocation.py    who contradicts itself?
    throttle.py        who publishes too fast?       snapshot.py        what a joiner may begin with

A record comes in through `_take`, whoever sent it and by whatever message; an update is held once
it is `Stored`, and only then passed on.
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from shoal.gossip import pacing, topology
from shoal.gossip.admissions import Admissions
from shoal.gossip.agreement import STRIKES, Agreement, Fingerprint
from shoal.gossip.arrivals import Arrivals
from shoal.gossip.dissemination import Dissemination
from shoal.gossip.equivocation import Equivocation
from shoal.gossip.events import (
    Applied,
    Depart,
    Disconnect,
    DropSnapshot,
    Effect,
    Event,
    LinkDown,
    LinkUp,
    Lost,
    Misbehaved,
    Moved,
    Pause,
    Pulled,
    PullFailed,
    Rebuilt,
    Received,
    Reported,
    Resume,
    Start,
    Stored,
    StoreFailed,
    StoreMended,
    Tick,
    TurnDone,
    Wake,
    WorkerDown,
    WorkerReady,
)
from shoal.gossip.frontier import Frontier, Rows, Taken
from shoal.gossip.limits import Limits
from shoal.gossip.membership import Membership
from shoal.gossip.messages import (
    Ack,
    Announce,
    AskAdmission,
    Graft,
    Message,
    Nack,
    Ping,
    PingRequest,
    Prune,
    Push,
    Vouch,
)
from shoal.gossip.names import Author, Hash, Key, PeerId
from shoal.gossip.neighbours import TWIN, Neighbours
from shoal.gossip.outbox import Outbox
from shoal.gossip.records import (
    HIGHEST,
    Alive,
    Contact,
    Leave,
    Progress,
    Proof,
    Record,
    Report,
    Standing,
    Statement,
    Suspect,
    Update,
)
from shoal.gossip.repair import Repair
from shoal.gossip.run import Held, Run
from shoal.gossip.score import Rates, Scores
from shoal.gossip.snapshot import Footing
from shoal.gossip.throttle import Throttle
from shoal.gossip.timers import Timers
from shoal.gossip.turns import Turns
from shoal.gossip.view import View

CATCH_UP_PATIENCE = 20
"""A joiner that others have answered waits so many `join_patience` for what they hold."""
MOST_TURN = 1 << 31
"""A joiner does not believe in larger turns: its own numbering must not run out."""
REBUILD_INTERVAL = 600.0
"""Seconds between rebuilds that others' statements make us do: no liar shall keep us at it."""
STATEMENTS = (2.0, 20.0)
"""Statements of progress heard of one peer: in a second, and at once."""
HEARING = 1.5
"""Statements of progress (as many of each peer) before a snapshot that some speak against goes."""
UNKNOWN_LOGS = 512
"""Logs in such a statement beyond twice those that we know of: what is longer cannot be used."""
COMPARERS = 64
"""So many members compare one statement of fingerprint, on average."""


@dataclass(frozen=True, slots=True)
class Member:
    """One line of a status table."""

    peer: PeerId
    state: str
    """alive, suspected, failed or left."""
    standing: Standing | None
    report: Report | None
    """What it said last about itself."""
    addresses: tuple[str, ...]
    linked: bool
    updates: int
    """How many of its updates we hold."""


class Protocol:
    """One peer's gossip core."""

    def __init__(
        self,
        run: Run,
        me: PeerId,
        log: int,
        boot: int,
        seal: Callable[[Statement], Record],
        rng: random.Random,
        limits: Limits,
        held: Held,
    ) -> None:
        self.run, self.me, self.rng = run, me, rng
        self.limits = limits = replace(limits, members=min(limits.members, limits.ledger_members))
        self._seal, self._held = seal, held
        self._now = 0.0
        self._wake: float | None = None
        self.timers, self.out = Timers(), Outbox(limits.push_records)
        self.frontier = Frontier(unordered=limits.unordered, logs=limits.logs)
        self.rows, self.scores = Rows(), Scores(limits)
        self.view = held.view.copy() if held.view is not None else View()
        self.membership = Membership(
            me, boot, limits, rng, self.timers, self.out, self._publish, self.view
        )
        self.dissemination = Dissemination(limits, rng, self.timers, self.out)
        self.arrivals = Arrivals(run, limits, self.timers, self.out, self.frontier)
        self.neighbours = Neighbours(
            me, limits, self.timers, self.out, self.membership, topology.make(run.topology)
        )
        self.repair = Repair(
            limits,
            rng,
            self.timers,
            self.out,
            self.frontier,
            self.rows,
            self.view,
            self.membership,
            self.arrivals,
            self.dissemination,
            held.recall,
            self._dispute,
        )
        self.footing = Footing(held.snapshot)
        self.agreement = Agreement(self.frontier, run.combined)
        self.turns = Turns(
            run,
            me,
            log,
            rng,
            self.timers,
            self.out,
            self.frontier,
            self.arrivals,
            self.agreement,
            pacing.make(run.pace, self.frontier, limits, run.min_peers, run.participation),
            pacing.Weight(run.min_peers, limits.weight_turns),
            seal,
            self.training,
            self._awaited,
            self._may_publish,
        )
        self.admissions = Admissions(me, held.admissions, limits, self.out, self.view)
        self.equivocation = Equivocation(
            me,
            limits,
            self.timers,
            self.out,
            self.frontier,
            self.view,
            self.arrivals,
            self.dissemination,
            self.neighbours,
            seal,
            held.recall,
            lambda: self._drop_snapshot("an update in it does not count"),
        )
        self.throttle = Throttle(limits, self.frontier, self.arrivals)
        self.paused = self.joined = self.diverged = False
        self._statements = Rates(*STATEMENTS, limits.members)
        per_second = limits.questions_per_second
        self._questions = Rates(per_second, 20 * per_second, limits.members)
        self._rebuilt = float("-inf")
        self._sequence = 0
        self._said: dict[PeerId, Record] = {}
        """The last statement of progress of each peer, as it signed it."""
        self._stated: int = -1
        self._started = 0.0
        self._load(held)

    def _load(self, held: Held) -> None:
        if held.snapshot is not None:
            self.frontier.start(held.snapshot.lines)
        for record in held.proofs:
            if isinstance(proof := record.statement, Proof):
                self.equivocation.note(record, proof)
        for record in held.records:
            if isinstance(update := record.statement, Update):
                self.frontier.add(update, record.id)
        own = self.frontier.logs.get(self.turns.author)
        if own is not None and own.above:
            self.turns.renew_log("a hole in our own log")

    # ------------------------------------------------------------ the one entry

    def handle(self, event: Event, now: float) -> list[Effect]:
        """Let `event` happen at `now`; return what is to be done, in order."""
        self._now = self.dissemination.now = now
        self._handle(event, now)
        self._join(now)
        self.turns.dispatch(self._may_train, now)
        self.arrivals.pump()
        self._state_soon(now)
        self._set_wake(now)
        return self.out.drain()

    def _handle(self, event: Event, now: float) -> None:
        match event:
            case Tick():
                for what, whom in self.timers.due(now):
                    self._on_time(what, whom, now)
                self.membership.stand(self._standing())
            case Received(peer, message):
                self._on_message(peer, message, now)
            case LinkUp(peer, admission):
                self._on_link_up(peer, admission, now)
            case LinkDown(peer):
                self._on_link_down(peer, now)
            case Pulled(payload):
                self.arrivals.pulled(payload)
            case PullFailed(peer, payload, reason):
                self._on_pull_failed(peer, payload, reason, now)
            case Stored(record):
                self._on_stored(record)
            case StoreFailed(record, reason):
                self._on_store_failed(record, reason)
            case StoreMended():
                self.arrivals.full, self.turns.unwritable = False, ""
            case Lost(key):
                self._on_lost(key)
            case Misbehaved(peer, reason):
                self._blame(peer, reason, now)
            case _:
                self._handle_own(event, now)

    def _handle_own(self, event: Event, now: float) -> None:
        """Events of our own worker and operator."""
        match event:
            case WorkerReady():
                self.turns.worker_ready(event)
                self._compare_with_snapshot(event)
            case WorkerDown(reason):
                self.turns.worker_down(reason)
                self.out.happened("worker-down", self.me, reason=reason)
            case TurnDone():
                self.turns.turn_done(event)
            case Applied():
                self.turns.applied(event)
                self._check()
            case Rebuilt():
                self.turns.on_rebuilt(event)
                self._check()
            case Reported(report):
                self.turns.report = report
            case Start(addresses, admission, alone):
                self._start(addresses, admission, alone, now)
            case Pause():
                self.paused = True
            case Resume():
                self.paused = False
            case Depart():
                self.membership.leave()
                self.out.happened("leaving", self.me)
            case Moved(addresses):
                if self.membership.contact is not None:
                    self.membership.contact = (addresses, self.membership.contact[1])
                    self.membership.say_contact()
            case _:
                pass
        self.membership.stand(self._standing())

    def _set_wake(self, now: float) -> None:
        at = self.timers.next()
        # An earlier wake that is still to come ticks in vain and asks again: cheaper than many.
        if at is not None and (self._wake is None or self._wake <= now or at < self._wake):
            self._wake = at
            self.out.add(Wake(at))

    # ------------------------------------------------------------ start and joining

    def _start(self, addresses: tuple[str, ...], admission: bytes, alone: bool, now: float) -> None:
        self._started = now
        self.admissions.peers[self.me] = admission
        self.membership.standing = self._standing()
        self.membership.start(addresses, admission, now)
        rng, limits = self.rng, self.limits
        self.timers.set("repair", now + rng.random() * limits.repair_interval)
        self.timers.set("topology", now + rng.random() * limits.topology_interval)
        self.timers.set("progress", now + self._progress_interval() * (0.5 + rng.random()))
        if self.footing.snapshot is not None:
            self.timers.set("footing", now + limits.repair_interval)
        if alone:
            self._begin_alone()
        else:
            self.timers.set("patience", now + limits.join_patience)

    def _join(self, now: float) -> None:
        """Begin to train once we hold what the first peer that told us held."""
        if not self.joined and self.repair.caught_up() and self._firm():
            self._begin()

    def _begin_alone(self) -> None:
        if self.frontier.count(self.turns.author):
            # Nobody could tell us whether our disk is older than what we once published.
            self.turns.renew_log("nobody to ask")
        self._begin()

    def _firm(self) -> bool:
        """Say whether to build on the snapshot that we began with; who has published did so."""
        published = self.frontier.count(self.turns.author) > 0
        return published or self.footing.firm(set(self._established()))

    def steady(self) -> bool:
        """Say whether our model is one to tell others of, as far as we know."""
        return self._firm() and not self.turns.rebuilding()

    def _established(self) -> Iterator[PeerId]:
        """Yield the others whose models do not themselves stand on a word not yet confirmed."""
        standing = self.membership.standing_of
        return (p for p in self.membership.others() if standing(p) is not Standing.JOINING)

    def _begin(self) -> None:
        self.joined = True
        self.timers.cancel("patience")
        latest = pacing.latest_turns(self.frontier, signed=True)
        # Of what turns a snapshot's updates are is the donor's word alone: nothing confirms it.
        told = pacing.latest_turns(self.frontier)
        own = latest.pop(self.me, 0)
        stated, newcomers = [], 0
        for peer in self.membership.others():
            said = self.agreement.statements.get(peer)
            last = said.report.turn if said else told.get(peer, 0)
            if turn := max(latest.get(peer, 0), last):
                stated.append(min(turn, self.run.turns or MOST_TURN))
            elif self.membership.standing_of(peer) in (Standing.JOINING, Standing.TRAINING):
                newcomers += 1
        # All who found a run begin together; later on newcomers say nothing about its turn.
        if max(stated, default=0) <= self.limits.weight_turns:
            stated += [0] * newcomers
        self.turns.next = max(own + 1, pacing.first_turn(self.run.pace, stated), self.turns.next)
        self.membership.stand(self._standing())

    def _lose_patience(self, now: float) -> None:
        enough = now >= self._started + CATCH_UP_PATIENCE * self.limits.join_patience
        # Who can't have what all others build on would only pull them back to the beginning.
        if self.repair.out_of_reach() or (self.repair.rounds and not enough):
            self.timers.set("patience", now + self.limits.join_patience)
            return
        self.out.happened("alone", self.me)
        self._begin_alone()

    # ------------------------------------------------------------ time

    def _on_time(self, what: str, whom: bytes, now: float) -> None:
        if self.membership.on_time(what, PeerId(whom), now):
            if what == "forget" or what == "retry":
                self._forget_details()
        elif not (
            self.repair.on_time(what, now)
            or self.dissemination.on_time(what, whom)
            or self.neighbours.on_time(what, now)
        ):
            match what:
                case "progress":
                    self._state_progress(now)
                case "patience":
                    self._lose_patience(now)
                case "pull":
                    self._find_sources(Hash(whom), now)
                case "refuse":
                    self.neighbours.refuse(PeerId(whom))
                case "footing":
                    self._review_footing(now)
                case "shun":
                    self.out.add(Disconnect(PeerId(whom), "equivocation", self.limits.ban))
                case _:
                    pass  # "turn": `dispatch` looks anyway

    def _forget_details(self) -> None:
        gone = [p for p in self.agreement.statements if p in self.membership.forgotten]
        self.agreement.forget(gone)
        for peer in gone:
            self.rows.forget(peer)
            self._said.pop(peer, None)

    # ------------------------------------------------------------ links

    def _on_link_up(self, peer: PeerId, admission: bytes, now: float) -> None:
        if self.scores.banned(peer, now):
            self.out.add(Disconnect(peer, "banned", self.limits.ban))
            return
        if self.membership.retired:
            self.out.add(Disconnect(peer, TWIN))
            return
        if self._too_many(peer):
            why = f"a ledger run has at most {self.limits.members} members; larger ones use mixing"
            self.out.add(Disconnect(peer, why))
            return
        self._admit(peer, admission, now)
        if not self.neighbours.up(peer, now):
            return
        if peer in self.equivocation.accused:
            self.equivocation.shun(peer, now)
            return
        self.dissemination.link_up(peer)
        self.repair.link_up(peer)
        if not self.view.lives(peer):
            for record in self.view.of(self.me):
                self.out.push(peer, record)
        self.membership.heard_from(peer, now)

    def _too_many(self, peer: PeerId) -> bool:
        return peer not in self.view.alive and len(self.view.alive) >= self.limits.members

    def _on_link_down(self, peer: PeerId, now: float) -> None:
        self.dissemination.link_down(peer)
        self.repair.link_down(peer)
        if self.neighbours.down(peer, now):
            self.membership.hurry(peer, now)

    def _blame(self, peer: PeerId, reason: str, now: float) -> None:
        self.out.count(f"misbehaved:{reason}")
        if self.scores.blame(peer, reason, now):
            self.out.happened("banned", peer, reason=reason)
            self.out.add(Disconnect(peer, f"banned: {reason}", self.limits.ban))

    # ------------------------------------------------------------ messages

    def _on_message(self, peer: PeerId, message: Message, now: float) -> None:
        if peer == self.me or peer in self.equivocation.accused or self.scores.banned(peer, now):
            return
        self.membership.heard_from(peer, now)
        match message:
            case Push():
                self._on_push(peer, message, now)
            case Ping() | Ack() | PingRequest() | Nack():
                self.membership.on_message(peer, message, now)
            case Announce(ids):
                self._on_announce(peer, ids)
            case Graft(ids):
                self.dissemination.on_graft(peer)
                if self._questions.take(peer, min(len(ids), self.limits.push_records), now):
                    self.repair.on_graft(peer, ids)
                else:
                    self.out.count("question-delayed")
            case Prune():
                self.dissemination.on_prune(peer)
            case AskAdmission(peers):
                self.admissions.vouch(peer, peers)
            case Vouch(subject, admission):
                if subject in self.admissions.strangers:
                    self._admit(subject, admission, now)
            case _:
                if self._questions.take(peer, self.repair.cost(message), now):
                    self.repair.on_message(peer, message, now)
                else:
                    self.out.count("question-delayed")

    def _on_push(self, peer: PeerId, push: Push, now: float) -> None:
        asked = self.repair.answering(peer, now)
        size = sum(len(r.raw) for r in push.records)
        if not asked and not self.scores.admit(peer, len(push.records), size, now):
            self._blame(peer, "flood", now)
            return
        news = [self._take(record, peer, now, asked=asked) for record in push.records]
        if not asked:  # an answer says nothing about the tree
            self.dissemination.judge(peer, sum(news), len(news) - sum(news))
        elif any(news):
            self.repair.go_on(peer, push.records, now)

    def _on_announce(self, peer: PeerId, ids: tuple[Hash, ...]) -> None:
        self.dissemination.on_announce(peer, ids[: self.limits.recent])
        for record in ids:
            if heard := self.arrivals.heard_from.get(record):
                heard.add(peer)

    # ------------------------------------------------------------ admissions

    def _admit(self, peer: PeerId, admission: bytes, now: float) -> None:
        for sender, record in self.admissions.admit(peer, admission):
            self._take(record, sender, now, asked=True)

    # ------------------------------------------------------------ records

    def _take(self, record: Record, sender: PeerId, now: float, *, asked: bool) -> bool:
        """Take in a record; say whether it was news."""
        statement = record.statement
        if self.dissemination.seen(record.id) and not self._forgot(statement):
            if isinstance(statement, Update):
                self.arrivals.also(sender, record.id, statement)
            if not asked:
                self.out.count("duplicate")
            return False
        subject = _subject(statement)
        if isinstance(statement, Contact):
            if subject in self.admissions.strangers:
                self._admit(subject, statement.admission, now)
        elif not self.admissions.known(subject):
            self.admissions.hold(subject, sender, record, now)
            return True
        match statement:
            case Update():
                return self._take_update(record, statement, sender, now, asked=asked)
            case Proof():
                return self.equivocation.take(record, statement, sender, now)
            case Progress():
                return self._take_progress(record, statement, sender, now)
            case _:
                return self._take_membership(record, sender, now)

    def _forgot(self, statement: Statement) -> bool:
        """Say whether a record was seen and is held no more, its peer having been forgotten."""
        match statement:
            case Alive(peer=peer):
                return not (peer == self.me or peer in self.view.alive or peer in self.view.left)
            case Contact(peer=peer):
                return not (peer == self.me or peer in self.view.contacts)
        return False

    def _take_membership(self, record: Record, sender: PeerId, now: float) -> bool:
        news = self.membership.take(record, now)
        self.dissemination.see(record.id)
        if news:
            self.dissemination.forward(record, sender, set())
        elif _subject(record.statement) == sender and (newer := self.membership.newer(record)):
            self.out.push(sender, newer)
        return news

    def _take_progress(
        self, record: Record, progress: Progress, sender: PeerId, now: float
    ) -> bool:
        self.dissemination.see(record.id)
        if progress.peer == self.me:
            self._sequence = max(self._sequence, progress.sequence)
            return False
        most = UNKNOWN_LOGS + 2 * len(self.frontier.logs)
        if len(progress.frontier) > most or progress.peer not in self.view.alive:
            self.out.count("progress-ahead")
            return False
        if not self._statements.take(progress.peer, 1, now):
            self.out.count("progress-delayed")
            return False
        # In a large swarm each statement is compared by some, not by all: the cost is members².
        compare = self.rng.random() * len(self.view.ring) < COMPARERS
        if not self.agreement.heard(progress, compare=compare):
            if sender == progress.peer and (newer := self._said.get(sender)) is not None:
                self.out.push(sender, newer)  # it has been restarted, and counts from 1 again
            return False
        self._said[progress.peer] = record
        self.dissemination.forward(record, sender, set())
        self._check()
        return True

    def _take_update(
        self, record: Record, update: Update, sender: PeerId, now: float, *, asked: bool
    ) -> bool:
        if self.turns.rolled_back(update):
            self.turns.renew_log("our disk is older than what we published")
        taken, other = self.arrivals.look(record, update)
        if taken is Taken.NEW:
            if delay := self.throttle.delays(update, sender, now, asked=asked):
                self.out.count(delay)
                return True
            taken = self.arrivals.take(record, update, sender, own=False)
        match taken:
            case Taken.CONFLICT:
                self.equivocation.accuse(record, update, other, now)
            case Taken.REFUSED:
                self.out.count("update-refused")
            case _:
                self.dissemination.see(record.id)
        return taken in (Taken.NEW, Taken.CONFLICT)

    def _on_stored(self, record: Record) -> None:
        update = record.statement
        if not isinstance(update, Update):
            return
        heard = self.arrivals.heard_from.get(record.id, set())
        held = self.arrivals.stored(record, update)
        self.turns.stored(record)
        if not held:
            return
        peer = update.author.peer
        self.turns.weight.hear(peer, self.turns.next)
        self.admissions.keep(peer)
        holders = heard | self.repair.holders(update.author, update.number)
        self.dissemination.see(record.id)
        self.dissemination.forward(record, None, holders)
        if peer == self.me:
            self.out.happened("published", self.me, turn=update.turn, bytes=update.size)

    def _on_store_failed(self, record: Record, reason: str) -> None:
        update = record.statement
        if not isinstance(update, Update):
            return
        self.out.count("store-failed")
        if reason == "log full":
            self.arrivals.full = True
        if self.turns.owns(record):
            self.arrivals.forget(update)
            self.turns.store_failed(reason)
        elif self.arrivals.store_failed(record, update, reason):
            self.dissemination.forget(record.id)  # to be taken in again once there is room

    def _on_lost(self, key: Key) -> None:
        """The log lacks an update that was in: let repair bring it, under no new number."""
        author, number = key
        count = self.frontier.lose(author, number)
        self.dissemination.forget_all()
        self._recall_all(author, number + 1, count)
        # An author that equivocates may bring another record: then the model must hold that one.
        self.turns.rebuild |= self.agreement.applied.get(author, 0) >= number
        self.out.happened("update-lost", author.peer, number=number)
        if author == self.turns.author:
            self.turns.renew_log("a damaged update of our own")

    def _recall_all(self, author: Author, first: int, last: int) -> None:
        """Take in again what the log has of these numbers, as far as there is room above a hole."""
        for number in range(first, last + 1):
            record = self._held.recall(Key(author, number))
            if record is None or not isinstance(update := record.statement, Update):
                continue
            if self.frontier.add(update, record.id) is Taken.REFUSED:
                return

    def _on_pull_failed(self, peer: PeerId, payload: Hash, reason: str, now: float) -> None:
        if reason in ("timeout", "not found"):
            # Only who has a payload passes its update on.
            self._blame(peer, reason, now)
        if self.arrivals.failed(peer, payload):
            self.timers.set("pull", now + 2 * self.limits.graft_timeout, payload)

    def _find_sources(self, payload: Hash, now: float) -> None:
        """All known sources of a payload failed: try whoever has stated to hold it."""
        fetch = self.arrivals.fetches.get(payload)
        if fetch is None:
            return
        if lost := self.arrivals.give_up(payload):
            for record in lost:
                self.dissemination.forget(record)
            return
        author, number = fetch.keys[0]
        for peer in sorted(self.repair.holders(author, number)):
            self.arrivals.holds(peer, author, number)
        self.timers.set("pull", now + 2 * self.limits.graft_timeout, payload)

    # ------------------------------------------------------------ our own statements

    def _publish(self, statement: Statement) -> None:
        record = self._seal(statement)
        self.dissemination.see(record.id)
        match statement:
            case Alive() | Contact() | Leave():
                self.view.put(record)
            case Suspect():
                self.membership.take(record, self._now)
            case _:
                pass
        self.dissemination.forward(record, None, set())

    def _progress_interval(self) -> float:
        # Everybody hears everybody: the swarm's statements stay at ten a second at most.
        return max(self.limits.progress_interval, len(self.view.ring) / 10)

    def _state_progress(self, now: float) -> None:
        self.timers.set("progress", now + self._progress_interval() * (0.9 + self.rng.random() / 5))
        if not self.steady():
            return  # others would take us for a liar, when it is our donor that is one
        told = self.agreement.tell(self._over())
        if told is None or (at := self.frontier.hash_at(dict(told[0]))) is None:
            return
        counts, fingerprint = told
        self._sequence = min(self._sequence + 1, HIGHEST)
        self._stated = self.frontier.version
        self._publish(
            Progress(
                self.me,
                self._sequence,
                counts,
                at,
                fingerprint,
                self.turns.report,
            )
        )

    def _over(self) -> int:
        """Return the last turn that all who train have published."""
        latest = pacing.latest_turns(self.frontier)
        return min((latest.get(peer, 0) for peer in self.training()), default=0)

    def _state_soon(self, now: float) -> None:
        """When all is applied and nothing is trained, others need not wait for our word."""
        if self._stated != self.frontier.version and self.turns.idle():
            wait = max(2.0, len(self.view.ring) / 20)
            self.timers.hurry("progress", now + wait * (0.5 + self.rng.random()))

    def _check(self) -> None:
        """Compare fingerprints; who disagrees after a rebuild of our own means: diverged."""
        if self.turns.rebuilding():
            return  # this model is as good as gone
        wrong, agreement = self.agreement.check(self.rows), self.agreement
        if self.footing.snapshot is not None:
            heard = {p: agreement.verdicts.get(p) for p in self._established()}
            self.footing.heard({p: same for p, same in heard.items() if same is not None})
            self._look_at_footing()
        for peer in wrong:
            self.out.count("disagreement")
            if not self.turns.rebuilt and self._now - self._rebuilt >= REBUILD_INTERVAL:
                self.turns.rebuild, self._rebuilt = True, self._now
                continue
            agreement.strikes[peer] = agreement.strikes.get(peer, 0) + 1
            if agreement.strikes[peer] >= STRIKES and not self.diverged:
                self.diverged = True
                self.out.happened("diverged", peer)
        if not self.agrees():
            return
        self.turns.rebuilt = False  # should we differ again, rebuild again
        if self.diverged:
            self.diverged = False
            self.out.happened("agreed", self.me)

    # ------------------------------------------------------------ the snapshot we began with

    def _compare_with_snapshot(self, event: WorkerReady) -> None:
        """Let the donor be held to the fingerprint that it stated."""
        snapshot, held = self.footing.snapshot, dict(event.frontier)
        if snapshot is None:
            return
        if any(held.get(line.author, 0) < line.count for line in snapshot.lines):
            self._drop_snapshot("the worker can't use it")
        elif event.frontier == snapshot.counts() and event.fingerprint != snapshot.fingerprint:
            self._drop_snapshot("it has another fingerprint than its donor says")

    def _dispute(self, peer: PeerId) -> None:
        self.footing.dispute(peer)
        self._look_at_footing()

    def _look_at_footing(self) -> None:
        """Let others speak, too, before the first word against the snapshot counts."""
        if self.footing.snapshot is None:
            return
        self.footing.present(set(self._established()))
        if (since := self.footing.doubted(self._now)) is None:
            return
        end = since + self._progress_interval() * HEARING
        if self._now >= end:
            self._drop_snapshot("others hold another model")
        else:
            self.timers.hurry("footing", end)

    def _review_footing(self, now: float) -> None:
        """Look who lacks, for long, what the snapshot stands for."""
        if (snapshot := self.footing.snapshot) is None:
            return
        self.timers.set("footing", now + self.limits.repair_interval)
        standing, lines = self.membership.standing_of, snapshot.lines
        # The disk of who is degraded may be full.
        able = (p for p in self._established() if standing(p) is not Standing.DEGRADED)
        self.footing.lacking([p for p in able if self.repair.lacks(p, lines)], now)
        said = ((p, self.agreement.statements.get(p)) for p in self.footing.contested())
        counts = ((p, dict(each.frontier)) for p, each in said if each is not None)
        less = [p for p, n in counts if any(n.get(each.author, 0) < each.count for each in lines)]
        self.footing.take_back(less)
        self._look_at_footing()

    def _drop_snapshot(self, why: str) -> None:
        """Stand on the log alone: what of it is above the snapshot stays, the rest is fetched."""
        snapshot = self.footing.snapshot
        if snapshot is None:
            return
        self.out.happened("snapshot-dropped", snapshot.donor, why=why)
        self.footing.lose()
        self.out.add(DropSnapshot())
        # What came of its updates was known and not kept: now it is wanted.
        self.dissemination.forget_all()
        for author, summed, last in self.frontier.forget_summed():
            self._recall_all(author, summed + 1, last)
        self.repair.begin_again()
        self.turns.rebuild, self.joined, self.turns.next = True, False, 0
        self._started = self._now
        self.timers.set("patience", self._now + self.limits.join_patience)

    # ------------------------------------------------------------ what we may do

    def _may_publish(self) -> bool:
        return not (
            self.run.observe
            or self.membership.leaving
            or self.membership.retired
            or self.equivocation.exposed()
            or self.arrivals.full
        )

    def _may_train(self) -> bool:
        unwritable = self.turns.unwritable == "log full"
        return self.joined and not self.paused and not unwritable and self._may_publish()

    def training(self) -> list[PeerId]:
        """Return the members that train now, ourselves included if we do, sorted."""
        return self._standing_as(Standing.TRAINING)

    def _awaited(self) -> list[PeerId]:
        # Who says that it has finished says it sooner than its last updates come.
        return self._standing_as(Standing.TRAINING, Standing.FINISHED)

    def _standing_as(self, *standings: Standing) -> list[PeerId]:
        standing, accused = self.membership.standing_of, self.equivocation.accused
        return [p for p in self.view.ring if standing(p) in standings and p not in accused]

    def _standing(self) -> Standing:
        if self.run.observe:
            return Standing.OBSERVING
        if not self._may_publish():
            return Standing.DEGRADED
        if self.paused:
            return Standing.PAUSED
        if not self.joined:
            return Standing.JOINING
        return Standing.FINISHED if self.turns.finished() else Standing.TRAINING

    # ------------------------------------------------------------ questions for /status

    @property
    def log(self) -> int:
        """The log id under which our next update will be numbered."""
        return self.turns.log

    @property
    def state(self) -> str:
        """What this peer does, in a word or a word with a reason."""
        if self.membership.leaving:
            return "leaving"
        if self.diverged:
            return "diverged: models differ at equal frontiers"
        if why := self._degraded():
            return f"degraded: {why}"
        return self._standing().name.lower()

    def _degraded(self) -> str:
        if self.membership.retired:
            return TWIN
        if self.equivocation.exposed():
            return "two updates under one number: this key is in use elsewhere"
        if self.arrivals.full or self.turns.unwritable == "log full":
            return "log full"
        if self.turns.unwritable:
            return "disk"
        return self.turns.down and f"worker: {self.turns.down}"

    @property
    def counters(self) -> dict[str, int]:
        """How often what happened, by reason."""
        return self.out.counters

    @property
    def fingerprint(self) -> Fingerprint | None:
        """Of the worker's model; None while there is none."""
        return self.agreement.fingerprint

    @property
    def turn(self) -> int:
        """The turn that runs or comes next."""
        return self.turns.next

    @property
    def reproducible(self) -> bool:
        """Whether this run could be repeated bit by bit: lockstep without absentees."""
        return self.turns.pace.reproducible

    def agrees(self) -> bool | None:
        """Whether the models of all that live, and were compared, equal ours; None: of nobody."""
        known = self.verdicts().values()
        return all(known) if known else None

    def verdicts(self) -> dict[PeerId, bool]:
        """Return of whom among the living we know whether its model equals ours."""
        lives = self.view.lives
        return {peer: same for peer, same in self.agreement.verdicts.items() if lives(peer)}

    def lag(self) -> int:
        """How many updates others hold and we do not."""
        return self.repair.lag()

    def out_of_reach(self) -> int:
        """How many updates we lack and nobody near has any more but as a sum."""
        return self.repair.out_of_reach()

    def settled(self) -> int:
        """How many updates every member has stated to hold."""
        others = [*self.membership.others(), *self.membership.failed]
        return sum(count for _, count in self.rows.settled(self.frontier, others))

    def linked(self) -> list[PeerId]:
        """Return the peers with an open link, sorted."""
        return sorted(self.neighbours.links)

    def members(self) -> list[Member]:
        """Return everybody known, ourselves included, sorted by id."""
        updates: dict[PeerId, int] = {}
        for author, count in self.frontier.counts():
            updates[author.peer] = updates.get(author.peer, 0) + count
        return [self._member(peer, updates.get(peer, 0)) for peer in self.view.peers()]

    def _member(self, peer: PeerId, updates: int) -> Member:
        said = self.agreement.statements.get(peer)
        contact = self.view.contacts.get(peer)
        where = contact.statement if contact is not None else None
        return Member(
            peer,
            self._state_of(peer),
            self.membership.standing_of(peer),
            self.turns.report if peer == self.me else said.report if said else None,
            where.addresses if isinstance(where, Contact) else (),
            peer in self.neighbours.links,
            updates,
        )

    def _state_of(self, peer: PeerId) -> str:
        if peer in self.view.left:
            return "left"
        if peer in self.membership.failed:
            return "failed"
        return "suspected" if peer in self.membership.suspicions else "alive"


def _subject(statement: Statement) -> PeerId:
    """Return whose admission makes a statement worth hearing."""
    match statement:
        case Update(author=author) | Proof(author=author):
            return author.peer
        case Suspect(accuser=accuser):
            return accuser
        case _:
            return statement.peer
