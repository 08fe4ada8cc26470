"""Two calls that take turns in two threads: one waits wherever the other runs.

For two passes through one model that share what is loaded. Whatever either raises comes out of
`run`, and no thread is left when it returns.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from queue import SimpleQueue
from typing import TypeVar

T = TypeVar("T")

_role: ContextVar[int | None] = ContextVar("role", default=None)


class StoppedError(BaseException):
    """The other call failed. No `Exception`: code between must not take it for one of its own."""


class Relay:
    """Who of two runs."""

    def __init__(self) -> None:
        self._batons: tuple[SimpleQueue[None], SimpleQueue[None]] = SimpleQueue(), SimpleQueue()
        self._live = [True, True]
        self._failed = False
        self.running = 0

    def run(self, first: Callable[[], T], second: Callable[[], T]) -> tuple[T, T]:
        """Return what both return; `first` begins, in the thread of the caller."""
        with ThreadPoolExecutor(1, thread_name_prefix="shoal-relay") as pool:
            other = pool.submit(self._second, second)
            try:
                mine = self._part(0, first)
            except StoppedError:
                other.result()  # raises what stopped this one
                raise
            return mine, other.result()

    def role(self) -> int | None:
        """Return which of the two the calling thread is; None: neither, but started by one."""
        return _role.get()

    def alive(self, role: int) -> bool:
        """Say whether this call has not ended."""
        return self._live[role]

    def hand_over(self, role: int) -> None:
        """Let the other run until it hands over or ends; raises StoppedError if it failed."""
        other = 1 - role
        if self._live[other]:
            self.running = other
            self._batons[other].put(None)
            self._batons[role].get()
        if self._failed:
            raise StoppedError

    def _second(self, call: Callable[[], T]) -> T:
        self._batons[1].get()
        if self._failed:
            raise StoppedError
        return self._part(1, call)

    def _part(self, role: int, call: Callable[[], T]) -> T:
        token = _role.set(role)
        try:
            return call()
        except BaseException:
            self._failed = True
            raise
        finally:
            _role.reset(token)
            self._live[role] = False
            self.running = 1 - role
            self._batons[1 - role].put(None)
