"""What the worker is asked to do next, and how its updates get their numbers.

One request at a time (the hand-shake is in events.py). A rebuild comes first, then closings (which
a rebuild leaves out by itself), then the next turn; a peer that does not train only applies what
arrives.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass

from shoal.gossip.agreement import Agreement
from shoal.gossip.arrivals import Arrivals
from shoal.gossip.events import (
    Applied,
    Apply,
    Discard,
    Rebuild,
    Rebuilt,
    StartTurn,
    Subtract,
    TurnDone,
    WorkerReady,
)
from shoal.gossip.frontier import Frontier
from shoal.gossip.names import Author, PeerId
from shoal.gossip.outbox import Outbox
from shoal.gossip.pacing import Pace, Weight, drawn
from shoal.gossip.records import Record, Report, Statement, Update
from shoal.gossip.run import Run
from shoal.gossip.timers import Timers

MOST_STORE_TRIES = 3
NAN = float("nan")
APPLY_INTERVAL = 0.25
"""Seconds between two `Apply` to an idle worker."""


@dataclass(slots=True)
class Turns:
    """The worker's schedule and our own log."""

    run: Run
    me: PeerId
    log: int
    rng: random.Random
    timers: Timers
    out: Outbox
    frontier: Frontier
    arrivals: Arrivals
    agreement: Agreement
    pace: Pace
    weight: Weight
    seal: Callable[[Statement], Record]
    training: Callable[[], list[PeerId]]
    """The members that train, ourselves included."""
    awaited: Callable[[], list[PeerId]]
    """The members that train or have finished: the updates of their turns come, or have come."""
    may_publish: Callable[[], bool]
    next: int = 0
    """The turn to start next; 0: we have not joined."""
    ready: bool = False
    """The worker is up."""
    down: str = ""
    """Why it is not."""
    report: Report = Report(loss=NAN, evaluation=NAN)
    unwritable: str = ""
    """Why own updates cannot be stored."""
    rebuild: bool = False
    """A rebuild is wanted."""
    rebuilt: bool = False
    """There was one since we last agreed with everybody."""
    _request: StartTurn | Apply | Subtract | Rebuild | None = None
    _asked: int = -1
    """Version of the frontier that the worker was last asked to apply."""
    _storing: Record | None = None
    _done: TurnDone | None = None
    _tries: int = 0
    _not_before: float = 0.0
    _lag: float = 0.0
    """How many turns the others made during our last one, beyond that one."""
    _held: int = 0
    """Updates in the frontier when the turn began."""
    _others: int = 0
    """Members that trained then, ourselves not among them."""

    # ------------------------------------------------------------ requests

    @property
    def author(self) -> Author:
        """Under what name our next update will be numbered."""
        return Author(self.me, self.log)

    def idle(self) -> bool:
        """Say whether the worker waits for us and holds all that we do."""
        return self.ready and self._request is None and self._asked == self.frontier.version

    def rebuilding(self) -> bool:
        """Say whether the model is about to be made anew."""
        return self.rebuild or isinstance(self._request, Rebuild)

    def finished(self) -> bool:
        """Say whether all turns of the run are done."""
        return 0 < self.run.turns < self.next

    def dispatch(self, may_train: Callable[[], bool], now: float) -> None:
        """Ask the worker for the next thing, if it is free."""
        if not self.ready or self._request is not None or self._storing is not None:
            return
        if self.rebuild:
            self.rebuild = False
            self._ask(Rebuild())
        elif self.frontier.closings and self._subtract():
            return
        elif not self.finished() and may_train():
            self._start_turn(now)
        elif self._asked != self.frontier.version:
            self._apply(now)

    def _apply(self, now: float) -> None:
        """Let an idle worker take in what arrived, a few times a second at most."""
        if now < self._not_before:
            self.timers.hurry("turn", self._not_before)
            return
        self._not_before = now + APPLY_INTERVAL
        self._asked = self.frontier.version
        self._ask(Apply(self.frontier.counts()))

    def _ask(self, request: StartTurn | Apply | Subtract | Rebuild) -> None:
        self._request = request
        self.out.add(request)

    def _subtract(self) -> bool:
        for author, count in sorted(self.agreement.applied.items()):
            closed = self.frontier.closed(author)
            if closed and count >= closed:
                self._ask(Subtract(author, closed, count))
                return True
        return False

    def _start_turn(self, now: float) -> None:
        turn, members = self.next, self.training()
        if not self.pace.ready(turn, self.awaited(), now):
            if (wake := self.pace.wake()) is not None:
                self.timers.set("turn", wake)
            return
        weight = self.weight.at(turn, len(members))
        publish = drawn(turn, self.me, self.run.participation)
        counts = self.pace.begin(turn, self.agreement.applied)
        # In lockstep a turn leaves out later ones: what they brought is still to be asked for.
        self._asked = self.frontier.version if counts == self.frontier.counts() else -1
        self._held, self._others = self.frontier.total(), len(members) - 1
        self._ask(StartTurn(turn, weight, counts, publish, self._lag))

    # ------------------------------------------------------------ answers

    def worker_ready(self, event: WorkerReady) -> None:
        """The worker is up with this model."""
        self.ready, self.down, self._request, self._asked = True, "", None, -1
        self.agreement.start(event.frontier, event.fingerprint)
        # It may hold more than the log: a log rolled back behind a checkpoint.
        self.rebuild |= any(
            n > self.frontier.count(a) and not self.frontier.closed(a) for a, n in event.frontier
        )

    def worker_down(self, reason: str) -> None:
        """The worker is gone and with it what it was asked."""
        self.ready, self.down, self._request, self._asked = False, reason, None, -1
        self.agreement.stop()

    def applied(self, event: Applied) -> None:
        """The model moved."""
        if isinstance(self._request, Apply | Subtract):
            self._request = None
        if not self.agreement.step(event):
            self.out.happened("fingerprint-drift", self.me)
            self.rebuild = True

    def on_rebuilt(self, event: Rebuilt) -> None:
        """The model was made anew from the log."""
        if isinstance(self._request, Rebuild):
            self._request = None
        self.rebuilt, self._asked = True, -1
        self.agreement.start(event.applied.frontier, event.applied.fingerprint)

    def turn_done(self, event: TurnDone) -> None:
        """A turn is over: number its update and store it."""
        if not isinstance(self._request, StartTurn) or event.turn != self._request.turn:
            return
        publish = self._request.publish
        self._request, self.report = None, event.report
        expected = self._others * self.run.participation
        arrived = self.frontier.total() - self._held
        self._lag = max(0.0, arrived / expected - 1) if expected else 0.0
        self.next = max(self.next, event.turn + 1)
        if event.payload is None:
            if publish:
                self.out.count("turn-dropped")
        elif publish and self.may_publish():
            self._done, self._tries = event, 0
            self._store()
        else:
            self.out.add(Discard())

    # ------------------------------------------------------------ our own log

    def _store(self) -> None:
        done = self._done
        if done is None or done.payload is None:
            return
        update = Update(
            self.author,
            self.frontier.count(self.author) + 1,
            done.turn,
            done.kind,
            done.payload,
            done.size,
            done.inline,
        )
        self._storing = self.seal(update)
        self.arrivals.take(self._storing, update, None, own=True)

    def stored(self, record: Record) -> None:
        """Our update is on disk under its number."""
        if self._storing is not None and record.id == self._storing.id:
            self._storing = self._done = None

    def owns(self, record: Record) -> bool:
        """Say whether this is the update that we are storing."""
        return self._storing is not None and record.id == self._storing.id

    def store_failed(self, reason: str) -> None:
        """Our update is not on disk: number it anew, or give it up."""
        self._storing = None
        self._tries += 1
        self.unwritable = reason
        if reason != "log full" and self._tries < MOST_STORE_TRIES:
            # Nobody may ever know what the disk kept of this number: never use it again.
            self.renew_log(reason)
            self._store()
        else:
            self._done = None
            self.out.add(Discard())

    def renew_log(self, why: str) -> None:
        """Number our updates under a fresh log id from now on."""
        self.log = self.rng.getrandbits(64)
        self.out.happened("new-log", self.me, why=why)

    def rolled_back(self, update: Update) -> bool:
        """Say whether this update of ours is one that our own log has lost."""
        if update.author != self.author:
            return False
        return update.number > self.frontier.count(self.author) + (self._storing is not None)
