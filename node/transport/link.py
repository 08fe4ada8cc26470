"""One gossip link: the stream it runs on, and what waits to be sent. No gRPC, no decisions."""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from shoal.gossip import messages as m
from shoal.gossip.names import PeerId
from shoal.node.wire import frames

FRAME_BYTES = 256 << 10
"""Waiting messages are joined into frames of about this size."""

FRAME_MESSAGES = 512
"""At most so many: receivers bound them (`Limits.frame_messages`)."""

URGENT = (m.Ping, m.Ack, m.PingRequest, m.Nack)
"""Probes overtake what waits: a full queue must not look like a dead peer."""


@dataclass(eq=False, slots=True)
class Stream:
    """An open bidirectional stream after both Hellos."""

    peer: PeerId
    dialled: bool
    """By this end."""
    session: int
    """Of the peer's process."""
    admission: bytes
    host: str
    """The peer's IP address."""
    read: Callable[[], Awaitable[bytes | None]]
    """Returns a frame; None at the end; raises PeerError when the stream broke."""
    write: Callable[[bytes], Awaitable[None]]
    close: Callable[[str], None]


@dataclass(slots=True)
class Outbox:
    """Messages that wait to be sent, as frames of one message each; at most `most` bytes."""

    most: int
    size: int = 0
    _urgent: deque[tuple[str, bytes]] = field(default_factory=deque)
    _waiting: deque[tuple[str, bytes]] = field(default_factory=deque)

    def put(self, message: m.Message, *, frame: int) -> bool:
        """Take a message; False when it does not fit and was dropped."""
        queue = self._urgent if isinstance(message, URGENT) else self._waiting
        for part in frames.split(message, frame):
            data = frames.encode(part)
            if len(data) > frame or self.size + len(data) > self.most:
                return False
            queue.append((frames.kind_of(part), data))
            self.size += len(data)
        return True

    def take(self, most: int = FRAME_BYTES) -> list[tuple[str, bytes]]:
        """Return the next messages, of about `most` bytes; empty when nothing waits."""
        taken: list[tuple[str, bytes]] = []
        size = 0
        while (queue := self._urgent or self._waiting) and (
            not taken or (size + len(queue[0][1]) <= most and len(taken) < FRAME_MESSAGES)
        ):
            taken.append(queue.popleft())
            size += len(taken[-1][1])
        self.size -= size
        return taken


@dataclass(eq=False, slots=True)
class Link:
    """What the owner sees as the link to `peer`; the stream below it may be exchanged."""

    peer: PeerId
    stream: Stream
    outbox: Outbox
    since: float
    dropped: int = 0
    """Messages that did not fit into the outbox."""
    down: bool = False
    _filled: asyncio.Event = field(default_factory=asyncio.Event)

    def put(self, message: m.Message, *, frame: int) -> None:
        """Queue a message, or drop it."""
        if not self.outbox.put(message, frame=frame):
            self.dropped += 1
        self._filled.set()

    def wake(self) -> None:
        """Let `take` return although nothing waits: the link is down."""
        self._filled.set()

    async def take(self) -> list[tuple[str, bytes]]:
        """Wait for messages and return a frame's worth; none when the link went down."""
        while not (taken := self.outbox.take()) and not self.down:
            self._filled.clear()
            await self._filled.wait()
        return taken
