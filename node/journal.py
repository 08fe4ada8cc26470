"""What happened lately, for /events and the log: a bounded list of numbered lines."""

import logging
import time
from collections import deque
from collections.abc import Callable

from shoal.gossip.events import Happened
from shoal.node.identity import peer_text
from shoal.node.status import EventRow

log = logging.getLogger(__name__)


class Journal:
    """The last `most` events. Numbers have no gaps, so a reader sees what it missed."""

    def __init__(self, most: int, wall: Callable[[], float] = time.time) -> None:
        self._rows: deque[EventRow] = deque(maxlen=most)
        self._wall = wall
        self._number = 0

    def note(self, event: Happened) -> None:
        """Remember an event of the core."""
        peer = None if event.peer is None else peer_text(event.peer)
        self.add(event.what, peer, event.details)

    def add(
        self,
        what: str,
        peer: str | None = None,
        details: dict[str, str | int | float] | None = None,
    ) -> None:
        """Remember an event of the daemon itself."""
        self._number += 1
        row = EventRow(
            number=self._number, at=self._wall(), what=what, peer=peer, details=details or {}
        )
        self._rows.append(row)
        log.info(what, extra={"peer": peer, **{f"event_{k}": v for k, v in row.details.items()}})

    def after(self, number: int) -> list[EventRow]:
        """Return the remembered events above `number`."""
        return [row for row in self._rows if row.number > number]
