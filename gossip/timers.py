"""When something is due: named deadlines on a heap. No clock: the caller says what time it is."""

from collections.abc import Iterator
from heapq import heappop, heappush

Name = tuple[str, bytes]
"""What is due, and for whom (a peer id, a hash, or nothing)."""


class Timers:
    """At most one deadline per name; setting it again moves it."""

    __slots__ = ("_at", "_heap", "_seq")

    def __init__(self) -> None:
        self._at: dict[Name, float] = {}
        self._heap: list[tuple[float, int, Name]] = []
        self._seq = 0

    def set(self, what: str, at: float, whom: bytes = b"") -> None:
        """Let `what` be due at `at`."""
        name = (what, whom)
        self._at[name] = at
        self._seq += 1
        heappush(self._heap, (at, self._seq, name))

    def hurry(self, what: str, at: float, whom: bytes = b"") -> None:
        """Let `what` be due at `at` or earlier."""
        if self._at.get((what, whom), float("inf")) > at:
            self.set(what, at, whom)

    def cancel(self, what: str, whom: bytes = b"") -> None:
        """Forget a deadline, if there is one."""
        self._at.pop((what, whom), None)

    def pending(self, what: str, whom: bytes = b"") -> bool:
        """Say whether a deadline with this name is set."""
        return (what, whom) in self._at

    def due(self, now: float) -> Iterator[Name]:
        """Take out and yield what is due, in the order of the deadlines."""
        while self._drop_stale() and self._heap[0][0] <= now:
            name = heappop(self._heap)[2]
            del self._at[name]
            yield name

    def next(self) -> float | None:
        """Return the earliest deadline."""
        return self._heap[0][0] if self._drop_stale() else None

    def _drop_stale(self) -> bool:
        heap, at = self._heap, self._at
        while heap and at.get(heap[0][2]) != heap[0][0]:
            heappop(heap)
        return bool(heap)
