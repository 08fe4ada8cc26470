"""Peers that were found and when to ask them. No I/O."""

import math
import random
from collections import OrderedDict
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from shoal.node.transport.libp2p.settings import FinderLimits


class Candidates:
    """Peers that were found and when to ask them. No I/O; bounded; the clock is an argument."""

    def __init__(self, limits: FinderLimits, rng: random.Random) -> None:
        self._limits, self._rng = limits, rng
        self._known: OrderedDict[bytes, _Candidate] = OrderedDict()

    def __len__(self) -> int:
        return len(self._known)

    def found(
        self,
        peer: bytes,
        addresses: Iterable[str],
        source: str,
        now: float,
        *,
        anew: bool = False,
    ) -> None:
        """Take in that `peer` was seen; new addresses, or another life, make it due at once."""
        told = tuple(dict.fromkeys(addresses))[: self._limits.addresses]
        old = self._known.pop(peer, None)
        if not told:
            told = old.addresses if old else ()
        if old is None or set(told) - set(old.addresses):
            old = _Candidate(told, source, due=now)
        old.addresses = told
        if anew:
            old.due = min(old.due, now)
        self._known[peer] = old
        while len(self._known) > self._limits.candidates:
            self._known.popitem(last=False)

    def due(self, now: float) -> list[tuple[bytes, tuple[str, ...], str]]:
        """Return at most `limits.asking` peers to ask now, those waiting longest first."""
        ready = [(c.due, peer) for peer, c in self._known.items() if c.due <= now and not c.asked]
        chosen = sorted(ready)[: self._limits.asking]
        for _, peer in chosen:
            self._known[peer].asked = True
        return [(p, self._known[p].addresses, self._known[p].source) for _, p in chosen]

    def settle(self, peer: bytes, answered: bool, now: float) -> None:
        """Note how asking `peer` went: when to ask next."""
        if (candidate := self._known.get(peer)) is None:
            return
        candidate.asked, candidate.answered = False, answered
        if answered:
            candidate.failures, candidate.due = 0, math.inf
        else:
            pause = self._limits.retry * 2 ** min(candidate.failures, 20)
            candidate.failures += 1
            candidate.due = now + min(pause, self._limits.retry_max) * self._rng.uniform(0.75, 1.0)

    def answered(self, peer: bytes) -> bool:
        """Tell whether `peer` is of our run: it proved so when it was asked last."""
        candidate = self._known.get(peer)
        return candidate is not None and candidate.answered

    def hurry(self, linked: Collection[bytes], now: float) -> None:
        """Make everybody due but `linked`: the daemon has too few links."""
        for peer, candidate in self._known.items():
            if peer not in linked:
                candidate.due = min(candidate.due, now)


@dataclass(slots=True)
class _Candidate:
    addresses: tuple[str, ...]
    source: str
    due: float
    failures: int = 0
    asked: bool = False
    answered: bool = False
