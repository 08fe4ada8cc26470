"""How fast an author may publish. What is dropped here, repair brings later."""

from shoal.gossip.arrivals import Arrivals
from shoal.gossip.frontier import Frontier
from shoal.gossip.limits import Limits
from shoal.gossip.names import Author, PeerId
from shoal.gossip.records import Update
from shoal.gossip.score import Rates


class Throttle:
    """Delay updates beyond so many a minute, and a further log beyond one in `log_interval`."""

    def __init__(self, limits: Limits, frontier: Frontier, arrivals: Arrivals) -> None:
        self.limits, self.frontier, self.arrivals = limits, frontier, arrivals
        per_minute = limits.updates_per_minute
        self._updates = Rates(per_minute / 60, per_minute, limits.members)
        self._new_logs: dict[PeerId, float] = {}

    def delays(self, update: Update, sender: PeerId, now: float, *, asked: bool) -> str:
        """Return what an update is too fast as, or "" if it may come in now."""
        peer, limits = update.author.peer, self.limits
        if sender == peer and self._one_more_log(update.author):
            if now - self._new_logs.get(peer, float("-inf")) < limits.log_interval:
                return "log-delayed"
            self._new_logs.pop(peer, None)
            self._new_logs[peer] = now
            if len(self._new_logs) > limits.members:
                del self._new_logs[next(iter(self._new_logs))]
        if asked or self._updates.take(peer, 1, now):
            return ""
        return "update-delayed"

    def _one_more_log(self, author: Author) -> bool:
        """Say whether `author` would be a further log of a peer that has one."""
        logs, waiting = self.frontier.logs, self.arrivals.waiting
        if author in logs or author in waiting:
            return False
        return any(a.peer == author.peer for known in (logs, waiting) for a in known)
