"""Whom to dial when there are too few links: bootstrap, remembered and found peers, with back-off.

`Book` decides (no I/O, the clock is an argument); `Discovery` is the asyncio loop around it. Links
themselves are the transport's, members the core's: discovery only helps a daemon that has fewer
links than it wants – at its start, after a split, when everybody it knew is gone.
"""

import asyncio
import logging
import random
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from enum import Enum, IntEnum
from typing import Protocol

from shoal.gossip.names import PeerId
from shoal.node.addresses import Address, AddressError, parse_bare
from shoal.node.identity import peer_text
from shoal.node.transport.libp2p.hint import Hint

log = logging.getLogger(__name__)


class Source(IntEnum):
    """Where a peer is known from; the most trusted first."""

    BOOTSTRAP = 0
    REMEMBERED = 1
    FOUND = 2


class Outcome(Enum):
    """How dialling went."""

    LINKED = "linked"
    UNREACHABLE = "unreachable"
    REFUSED = "refused"
    """It answered and is not for us: another run, another secret, another peer id, a ban."""


@dataclass(frozen=True, slots=True)
class DiscoveryLimits:
    """Every bound of discovery. Durations are float seconds."""

    peers: int = 512
    """Peers in the book; beyond it the least promising is forgotten, never a bootstrap peer."""
    addresses: int = 16
    """Addresses kept per peer, newest first."""
    dials: int = 4
    """Dials at the same time."""
    dial_timeout: float = 15.0
    """For one peer, all of its addresses together."""
    retry: float = 2.0
    """First pause after a dial that failed; doubles up to `retry_max`."""
    retry_max: float = 300.0
    refused: float = 1800.0
    """Pause after a refusal: run, secret and identity of the other end hardly ever change."""
    relink: float = 5.0
    """A link that was just lost is left to the core for so long."""
    remembered: int = 64
    """Peers written to disk: those linked last."""
    interval: float = 1.0
    """How often the number of links is looked at."""
    hurry: float = 30.0
    """First pause before the finder is asked to look again at once; doubles up to `hurry_max`."""
    hurry_max: float = 1800.0


@dataclass(frozen=True, slots=True)
class Suggestion:
    """Dial `peer` at these addresses, in this order."""

    peer: PeerId
    addresses: tuple[str, ...]
    """gRPC multiaddrs without the trailing /p2p part."""
    source: Source


@dataclass(slots=True)
class _Known:
    addresses: tuple[str, ...]
    source: Source
    libp2p: str = ""
    failures: int = 0
    due: float = 0.0
    dialling: bool = False
    refused: bool = False
    linked: float = float("-inf")
    """When a link to it was last open; never: minus infinity."""


@dataclass(slots=True)
class Book:
    """Who may be dialled, and when. Remembers outcomes; bounded; has no clock of its own."""

    own: PeerId
    limits: DiscoveryLimits
    rng: random.Random
    _known: dict[PeerId, _Known] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self._known)

    def add(
        self,
        peer: PeerId,
        addresses: Iterable[str],
        source: Source,
        *,
        now: float,
        libp2p: str = "",
    ) -> None:
        """Take in where `peer` may be; malformed addresses are dropped, new ones tried at once."""
        good = [a for a in dict.fromkeys(addresses) if _is_address(a)]
        if peer == self.own or not good:
            return
        known = self._known.get(peer)
        if known is None:
            known = self._known[peer] = _Known((), source, due=now)
        if set(good) - set(known.addresses) and not known.dialling:
            known.due, known.failures = min(known.due, now), 0
        known.addresses = tuple(dict.fromkeys([*good, *known.addresses]))[: self.limits.addresses]
        known.source = min(known.source, source)
        known.libp2p = libp2p or known.libp2p
        self._forget_beyond_bound(keep=peer)

    def seen(self, peer: PeerId, now: float) -> None:
        """Note that `peer` is there right now: worth a dial, unless it refuses us."""
        known = self._known.get(peer)
        if known is not None and not known.refused:
            known.due, known.failures = min(known.due, now), 0

    def due(self, links: Iterable[PeerId], wanted: int, now: float) -> list[Suggestion]:
        """Return whom to dial now; the caller answers each with `settle`. Empty with enough links.

        Suggests as many as are missing: every outstanding dial counts as a link to come.
        """
        linked = set(links)
        for peer in linked & self._known.keys():
            self._known[peer].linked = now
        dialling = sum(k.dialling for p, k in self._known.items() if p not in linked)
        room = min(wanted - len(linked) - dialling, self.limits.dials - dialling)
        ready = [
            (k.failures, k.source, k.due, peer)
            for peer, k in self._known.items()
            if peer not in linked
            and not k.dialling
            and k.due <= now
            and now - k.linked >= self.limits.relink
        ]
        chosen = [peer for *_, peer in sorted(ready)[: max(0, room)]]
        for peer in chosen:
            self._known[peer].dialling = True
        return [Suggestion(p, self._known[p].addresses, self._known[p].source) for p in chosen]

    def settle(self, peer: PeerId, outcome: Outcome, now: float) -> None:
        """Note how dialling `peer` went, and when it may be tried next."""
        known = self._known.get(peer)
        if known is None:
            return
        known.dialling = False
        known.refused = outcome is Outcome.REFUSED
        match outcome:
            case Outcome.LINKED:
                known.failures, known.due, known.linked = 0, now, now
            case Outcome.REFUSED:
                known.failures += 1
                known.due = now + self.limits.refused
            case Outcome.UNREACHABLE:
                pause = self.limits.retry * 2 ** min(known.failures, 20)
                known.failures += 1
                known.due = now + min(pause, self.limits.retry_max) * self.rng.uniform(0.75, 1.25)

    def remembered(
        self, members: Iterable[tuple[PeerId, tuple[str, ...]]] = ()
    ) -> list[tuple[PeerId, tuple[str, ...]]]:
        """Return whom to remember on disk: (peer, addresses).

        `members` first, by their contact records; then who else was linked, the last first; then
        whom an earlier life remembered. The libp2p address that once answered is among the
        addresses; it is the one with /p2p.
        """
        chosen = dict(members)
        ever = [
            (k.linked, p)
            for p, k in self._known.items()
            if k.linked != float("-inf") or k.source is Source.REMEMBERED
        ]
        for _, peer in sorted(ever, reverse=True):
            chosen.setdefault(peer, self._known[peer].addresses)
        first = list(chosen.items())[: self.limits.remembered]
        return [(p, self._with_libp2p(p, addresses)) for p, addresses in first]

    def _with_libp2p(self, peer: PeerId, addresses: tuple[str, ...]) -> tuple[str, ...]:
        known, bound = self._known.get(peer), self.limits.addresses
        if known is None or not known.libp2p:
            return addresses[:bound]
        return (*addresses[: bound - 1], known.libp2p)

    def _forget_beyond_bound(self, keep: PeerId) -> None:
        if len(self._known) <= self.limits.peers:
            return
        least = max(
            (
                (k.linked == float("-inf"), k.failures, k.source, p)
                for p, k in self._known.items()
                if p != keep and not k.dialling and k.source is not Source.BOOTSTRAP
            ),
            default=(True, 0, Source.FOUND, keep),
        )
        del self._known[least[-1]]


class Finds(Protocol):
    """A source of hints: `Finder` of transport/libp2p/finder.py, or a test's."""

    hints: "asyncio.Queue[Hint]"

    def hurry(self, linked: Iterable[PeerId]) -> None:
        """Look again now; `linked` are found already."""


Dial = Callable[[PeerId, tuple[str, ...]], Awaitable[Outcome]]


class Discovery:
    """Dials suggestions while there are fewer links than wanted. One owner: the daemon's loop."""

    def __init__(
        self,
        own: PeerId,
        dial: Dial,
        *,
        links: Callable[[], Iterable[PeerId]],
        wanted: Callable[[], int],
        limits: DiscoveryLimits | None = None,
        rng: random.Random | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.limits = limits or DiscoveryLimits()
        self.book = Book(own, self.limits, rng or random.Random())
        self._dial, self._links, self._wanted, self._clock = dial, links, wanted, clock

    def bootstrap(self, addresses: Iterable[Address]) -> None:
        """Start from these; each names its peer (config refuses others)."""
        for address in addresses:
            if address.peer is not None:
                told = [str(address.bare())]
                self.book.add(address.peer, told, Source.BOOTSTRAP, now=self._clock())

    def recall(self, remembered: Iterable[tuple[PeerId, tuple[str, ...]]]) -> list[str]:
        """Take in what `Book.remembered` returned; returns libp2p addresses to bootstrap from."""
        found = []
        for peer, addresses in list(remembered)[: self.limits.remembered]:
            libp2p = [a for a in addresses if a.endswith(f"/p2p/{peer_text(peer)}")][:1]
            now, known = self._clock(), "".join(libp2p)
            self.book.add(peer, addresses, Source.REMEMBERED, now=now, libp2p=known)
            found += libp2p
        return found

    async def run(self, finder: Finds | None = None) -> None:
        """Dial until cancelled. `finder`'s hints are taken in as they come."""
        async with asyncio.TaskGroup() as tasks:
            if finder is not None:
                tasks.create_task(self._listen(finder))
            asked, pause, before = self._clock(), self.limits.hurry, 0
            while True:
                now, links = self._clock(), list(self._links())
                if len(links) < before:
                    pause = self.limits.hurry  # in a small swarm links may be missing for ever
                before = len(links)
                for suggestion in self.book.due(links, self._wanted(), now):
                    tasks.create_task(self._try(suggestion))
                if finder is not None and len(links) < self._wanted() and now - asked >= pause:
                    asked, pause = now, min(2 * pause, self.limits.hurry_max)
                    finder.hurry(links)
                await asyncio.sleep(self.limits.interval)

    async def _listen(self, finder: Finds) -> None:
        while True:
            hint = await finder.hints.get()
            self.book.add(
                hint.peer, hint.addresses, Source.FOUND, now=self._clock(), libp2p=hint.libp2p
            )
            self.book.seen(hint.peer, self._clock())

    async def _try(self, suggestion: Suggestion) -> None:
        outcome = Outcome.UNREACHABLE
        try:
            async with asyncio.timeout(self.limits.dial_timeout):
                outcome = await self._dial(suggestion.peer, suggestion.addresses)
        except TimeoutError:
            log.info("no link in time", extra={"peer": peer_text(suggestion.peer)})
        finally:
            self.book.settle(suggestion.peer, outcome, self._clock())
        if outcome is not Outcome.UNREACHABLE:  # that, and why, the driver has said
            log.info(
                "dialled",
                extra={
                    "peer": peer_text(suggestion.peer),
                    "source": suggestion.source.name.lower(),
                    "outcome": outcome.value,
                },
            )


def _is_address(text: str) -> bool:
    try:
        parse_bare(text)
    except AddressError:
        return False
    return True
