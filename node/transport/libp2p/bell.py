"""Waking what rests on trio, from any thread."""

from collections.abc import Callable
from contextlib import suppress

import trio


class Bell:
    """Made on trio; whoever rests on it wakes when it rings."""

    def __init__(self) -> None:
        self._token = trio.lowlevel.current_trio_token()
        self._rung = trio.Event()

    def ring(self, first: Callable[[], None] = lambda: None) -> None:
        """Do `first` on trio's thread, then wake who rests; nothing once trio has ended."""

        def wake() -> None:
            first()
            self._rung.set()
            self._rung = trio.Event()

        with suppress(trio.RunFinishedError):
            self._token.run_sync_soon(wake)

    async def rest(self, seconds: float) -> None:
        """Sleep, but no longer than until the next ring."""
        rung = self._rung
        with trio.move_on_after(seconds):
            await rung.wait()
