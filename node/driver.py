"""The loop between the pure core and the world: next event → `Protocol.handle` → each effect.

Everything here runs on one asyncio loop and `feed` never waits, so the core is never entered twice.
What peers did wrong ends here: as a count, a score or an event, never as an exception further up.
"""

import asyncio
import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from typing import Any, Protocol

from shoal.gossip import events as ev
from shoal.gossip import protocol
from shoal.gossip.limits import Limits
from shoal.gossip.messages import Message
from shoal.gossip.names import Hash, Key, PeerId
from shoal.gossip.records import Contact, Update
from shoal.node.discovery import Outcome
from shoal.node.fetcher import Fetcher
from shoal.node.identity import peer_text
from shoal.node.journal import Journal
from shoal.node.metrics import Counters
from shoal.node.store import DamagedError, Store, StoreFailed
from shoal.node.transport.handler import Buffer

log = logging.getLogger(__name__)


class Links(Protocol):
    """What the driver needs of a transport."""

    def connect(self, peer: PeerId, addresses: Sequence[str]) -> None:
        """Open a link."""

    def disconnect(self, peer: PeerId, reason: str, ban: float = 0.0) -> None:
        """Close it."""

    def know(self, peer: PeerId, addresses: Sequence[str]) -> None:
        """Remember where a peer can be reached."""

    def send(self, peer: PeerId, message: Message) -> None:
        """Say something, best effort."""

    def pull(self, peer: PeerId, payload: Hash, size: int, offset: int) -> AsyncIterator[bytes]:
        """Yield a payload's bytes."""


class Hands(Protocol):
    """What the driver needs of the foreman."""

    def give(self, request: ev.StartTurn | ev.Apply | ev.Subtract | ev.Rebuild) -> None:
        """Let the worker do what the core asks."""

    def commit(self, update: Update) -> None:
        """The pending update got its number."""

    def discard(self) -> None:
        """The pending update is not published."""

    def forget_snapshot(self) -> None:
        """The model begins at the initial one from now on."""


class Driver:
    """Performs what the core asks for, and tells it what came of it.

    Implements the transport's `Handler`. The daemon sets `links` and `hands` before anything is
    fed, since the three know each other.
    """

    links: Links
    hands: Hands

    def __init__(
        self,
        core: protocol.Protocol,
        store: Store,
        journal: Journal,
        counters: Counters,
        limits: Limits,
        *,
        genesis: bytes,
        initial: Callable[[], Buffer | None],
        snapshot: Callable[[], Awaitable[bytes]],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.core = core
        self.store = store
        self.journal = journal
        self.counters = counters
        self.clock = clock
        self.fetcher = Fetcher(self._pull, self._fetched, limits)
        self._genesis = genesis
        self._initial = initial
        self._snapshot = snapshot
        self._tasks: set[asyncio.Task[None]] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._dialling: dict[PeerId, asyncio.Future[Outcome]] = {}
        self._known: dict[PeerId, tuple[str, ...]] = {}
        self._most_known = limits.members
        self._own: tuple[Hash, bytes] | None = None
        """The payload of our own update until it is stored or given up."""
        self._closed = False

    # ---------------------------------------------------------------- events in

    def feed(self, event: ev.Event, asker: PeerId | None = None) -> list[Message]:
        """Let the core handle `event` and what follows from it; return answers to `asker`."""
        waiting = deque([event])
        answers: list[Message] = []
        while waiting and not self._closed:
            for effect in self.core.handle(waiting.popleft(), self.clock()):
                if isinstance(effect, ev.Send) and effect.peer == asker:
                    answers.append(effect.message)
                else:
                    self._perform(effect, waiting)
        return answers

    def hold(self, payload: Hash, data: bytes) -> None:
        """Keep the payload of an own update until the store takes it."""
        self._own = payload, data

    def lost(self, key: Key) -> None:
        """Let the core know that the log can't give this update any more, once it has time."""
        asyncio.get_running_loop().call_soon(self.feed, ev.Lost(key))

    def mend(self) -> None:
        """Try to write what the disk did not take; let the core know when it has all of it."""
        if self.store.mend():
            self.journal.add("log-mended")
            self.feed(ev.StoreMended())

    async def dial(self, peer: PeerId, addresses: tuple[str, ...]) -> Outcome:
        """Open a link for discovery; return how it went."""
        asked = self._dialling.get(peer)
        if asked is None:
            asked = self._dialling[peer] = asyncio.get_running_loop().create_future()
        self.links.connect(peer, addresses)
        if peer in self.core.linked():
            self._settle(peer, Outcome.LINKED)
        return await asyncio.shield(asked)

    def close(self) -> None:
        """Perform nothing any more."""
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
        for task in self._tasks:
            task.cancel()

    # ---------------------------------------------------------------- effects out

    def _perform(self, effect: ev.Effect, waiting: deque[ev.Event]) -> None:
        match effect:
            case ev.Send(peer, message):
                self._know(peer)
                self.links.send(peer, message)
            case ev.Connect(peer, addresses):
                self.links.connect(peer, addresses)
            case ev.Disconnect(peer, reason, ban):
                self.links.disconnect(peer, reason, ban)
            case ev.Pull():
                self._know(effect.peer)
                self._spawn(self._fetch(effect))
            case ev.Store():
                waiting.append(self._store(effect))
            case ev.KeepAdmission(peer, admission):
                self._keep(peer, admission)
            case ev.StartTurn() | ev.Apply() | ev.Subtract() | ev.Rebuild():
                self.hands.give(effect)
            case ev.Discard():
                self._discard()
            case ev.DropSnapshot():
                self.store.forget_snapshot()
                self.hands.forget_snapshot()
            case ev.Wake(at):
                self._wake(at)
            case ev.Happened():
                self._happened(effect)

    def _store(self, effect: ev.Store) -> ev.Event:
        record, statement = effect.record, effect.record.statement
        payload = None
        if isinstance(statement, Update) and statement.inline is None:
            payload = self._payload(statement.payload, own=effect.own)
        try:
            self.store.append(record, payload, own=effect.own)
        except StoreFailed as error:
            self._store_failed(error)
            return ev.StoreFailed(record, error.reason)
        if isinstance(statement, Update):
            self.counters.add("updates", "own" if effect.own else "others")
            if effect.own:
                self._own = None
                self.hands.commit(statement)
        return ev.Stored(record)

    def _payload(self, payload: Hash, *, own: bool) -> bytes | None:
        """Return the bytes to store; they stay here, since storing may fail and be tried again."""
        if not own:
            return self.fetcher.arrived.get(payload)
        return self._own[1] if self._own is not None and self._own[0] == payload else None

    def _store_failed(self, error: StoreFailed) -> None:
        log.warning("not stored", extra={"reason": error.reason})
        if error.reason != "log full" and not self.store.degraded:
            self.store.degrade(error.reason)

    def _keep(self, peer: PeerId, admission: bytes) -> None:
        try:
            self.store.keep_admission(peer, admission)
        except StoreFailed as error:
            log.warning("admission not stored", extra={"reason": error.reason})

    def _discard(self) -> None:
        self._own = None
        self.hands.discard()

    def _happened(self, event: ev.Happened) -> None:
        self.counters.add("events", event.what)
        if event.what == "new-log":
            self.store.adopt_log(self.core.log)
        self.journal.note(event)

    def _know(self, peer: PeerId) -> None:
        """Tell the transport where a member can be reached without a link."""
        contact = self.core.view.contacts.get(peer)
        if contact is None or not isinstance(contact.statement, Contact):
            return
        addresses = contact.statement.addresses
        if addresses and self._known.get(peer) != addresses:
            if len(self._known) >= self._most_known:
                self._known.clear()  # members come and go; saying it again is harmless
            self._known[peer] = addresses
            self.links.know(peer, addresses)

    # ---------------------------------------------------------------- time and payloads

    def _wake(self, at: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        delay = max(0.0, at - self.clock())
        self._timer = asyncio.get_running_loop().call_later(delay, self._tick)

    def _tick(self) -> None:
        self._timer = None
        self.feed(ev.Tick())

    def _pull(self, peer: PeerId, payload: Hash, size: int, offset: int) -> AsyncIterator[bytes]:
        return self.links.pull(peer, payload, size, offset)

    def _fetched(self, event: ev.Pulled | ev.PullFailed | ev.Misbehaved) -> None:
        """Let the core store what has arrived, for all who wait for it; then nobody does."""
        self.feed(event)
        if isinstance(event, ev.Pulled):
            self.fetcher.take(event.payload)

    async def _fetch(self, pull: ev.Pull) -> None:
        self.counters.add("pulls", await self.fetcher.fetch(pull))

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            raise error  # ours: the loop's exception handler ends the daemon

    # ---------------------------------------------------------------- the transport's Handler

    def on_link_up(self, peer: PeerId, admission: bytes) -> None:
        """A link is open."""
        self._settle(peer, Outcome.LINKED)
        self.feed(ev.LinkUp(peer, admission))

    def on_link_down(self, peer: PeerId, reason: str) -> None:
        """A link is gone, or could not be opened."""
        refused = reason.startswith("refused") or "admission" in reason
        if peer in self._dialling:
            self.journal.add("unreachable", peer_text(peer), {"reason": reason})
        self._settle(peer, Outcome.REFUSED if refused else Outcome.UNREACHABLE)
        self.feed(ev.LinkDown(peer, reason))

    def on_message(self, peer: PeerId, message: Message) -> Sequence[Message]:
        """Somebody said something; return what to answer at once."""
        return self.feed(ev.Received(peer, message), asker=peer)

    def on_misbehaviour(self, peer: PeerId, reason: str) -> None:
        """Something of this peer was dropped."""
        self.counters.add("dropped", reason)
        self.feed(ev.Misbehaved(peer, reason))

    def payload(self, payload: Hash) -> Buffer | None:
        """Serve a payload from the log."""
        try:
            return self.store.payload(payload)
        except DamagedError as error:
            self.lost(error.key)
            return None

    def genesis(self) -> bytes:
        """Serve the genesis."""
        return self._genesis

    async def snapshot(self) -> bytes:
        """Serve what joiners may begin with in place of the log."""
        return await self._snapshot()

    async def initial(self) -> Buffer | None:
        """Serve the initial model's integers."""
        return self._initial()

    def _settle(self, peer: PeerId, outcome: Outcome) -> None:
        asked = self._dialling.pop(peer, None)
        if asked is not None and not asked.done():
            asked.set_result(outcome)
