"""Snapshots of runs whose seeds are from a pool: such a run is K integers, whatever its length.

A joiner asks for them in place of the log (`shoal join --whole-log` does not), keeps them in its
directory, and goes on from there; gossip/snapshot.py tells when it believes them. Any peer gives
them: one that was itself given a snapshot has no log of what is below.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

from shoal.gossip.frontier import Frontier
from shoal.gossip.limits import Limits
from shoal.gossip.names import Author, PeerId, RunId, digest
from shoal.gossip.snapshot import Line, Snapshot
from shoal.node.addresses import Address
from shoal.node.admission import Admission
from shoal.node.errors import ConfigError, PeerError
from shoal.node.files import write_atomically
from shoal.node.identity import Identity, peer_text
from shoal.node.transport.newcomer import fetch_snapshot
from shoal.node.wire import requests

log = logging.getLogger(__name__)

PINNED = 60.0
"""Seconds for which a snapshot is given out before another is made."""
_DIGEST_BYTES = _PEER_BYTES = 32


class SnapshotError(ConfigError):
    """The snapshot in a directory can't be used."""


Sums = tuple[Sequence[tuple[Author, int]], tuple[int, int], bytes]
"""A frontier, the model's fingerprint there, and what the updates below it add up to."""


class Donor:
    """Makes snapshots for joiners, one in a while."""

    def __init__(
        self,
        frontier: Frontier,
        sums: Callable[[], Awaitable[Sums]],
        log_bytes: Callable[[], int],
        steady: Callable[[], bool] = lambda: True,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Prepare; `sums` asks the worker, `log_bytes` tells what a joiner would fetch instead.

        While the model is not `steady`, nothing of it is given to others.
        """
        self._frontier = frontier
        self._sums = sums
        self._log_bytes = log_bytes
        self._steady = steady
        self._clock = clock
        self._lines: list[Line] = []
        self._made = b""
        self._until = float("-inf")
        self._making = asyncio.Lock()

    async def give(self) -> bytes:
        """Return a snapshot as it travels; empty when the log is shorter, or there is none."""
        async with self._making:
            if not self._steady():
                return b""
            # A closing, or a log begun anew, takes back what was given out before.
            if self._clock() >= self._until or self._still() != self._lines:
                await self._make()
            if not self._steady():
                return b""
        whole = not any(log.summed for log in self._frontier.logs.values())
        return b"" if whole and self._log_bytes() <= len(self._made) else self._made

    async def _make(self) -> None:
        self._made, self._lines = b"", []
        try:
            counts, fingerprint, sums = await self._sums()
        except ConfigError as error:  # the worker is not there: the joiner takes the log
            log.info("no snapshot given", extra={"reason": str(error)})
            return
        if not sums:
            self._until = float("inf")  # this run is more than sums
        elif counts and (lines := self._at(counts)):
            self._lines = lines
            self._made = requests.encode_snapshot(lines, fingerprint, sums)
            self._until = self._clock() + PINNED

    def _still(self) -> list[Line]:
        return self._at([(line.author, line.count) for line in self._lines])

    def _at(self, counts: Sequence[tuple[Author, int]]) -> list[Line]:
        lines = []
        for author, count in sorted(counts):
            log = self._frontier.logs.get(author)
            if log is None or not log.summed <= count <= log.count:
                return []  # a closing came in between
            lines.append(Line(author, count, log.hash_at(count), log.turn_at(count)))
        return lines


async def ask(
    addresses: Sequence[Address], admission: Admission, who: Identity, path: Path
) -> Snapshot | None:
    """Keep a snapshot of the first address that answers in the file `path`; None: there is none."""
    limits = Limits()
    for address in addresses:
        if address.peer is None:
            continue
        try:
            data = await fetch_snapshot(address, address.peer, admission, who, limits)
            snapshot, _ = requests.decode_snapshot(data, address.peer)
            if len(snapshot.lines) > limits.logs:
                raise PeerError("oversize", f"a snapshot of {len(snapshot.lines)} authors")
        except PeerError as error:
            log.warning("no snapshot", extra={"peer": peer_text(address.peer), "why": str(error)})
            continue
        if not snapshot.lines:
            return None
        write_atomically(path, _sealed(admission.run, bytes(address.peer) + data))
        return snapshot
    return None


def load(path: Path, run: RunId) -> tuple[Snapshot, bytes] | None:
    """Return what `ask` kept; None when it is not there.

    Raises SnapshotError for what is not this run's or not as it was written; without it the log is
    fetched.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise SnapshotError(f"{path} can't be read: {error.strerror}") from None
    body = data[_DIGEST_BYTES:]
    if data != _sealed(run, body):
        raise SnapshotError(f"{path} is damaged, or of another run")
    snapshot, sums = requests.decode_snapshot(body[_PEER_BYTES:], PeerId(body[:_PEER_BYTES]))
    return snapshot, sums


def begin_with(path: Path, run: RunId) -> tuple[Snapshot, bytes] | None:
    """Return what `ask` kept; what can't be used is put away, and the log is fetched."""
    try:
        return load(path, run)
    except SnapshotError as error:
        log.warning("snapshot not used", extra={"reason": str(error)})
        forget(path)
        return None


def forget(path: Path) -> None:
    """Go on without it, also after a restart."""
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        log.warning("snapshot not removed", extra={"reason": error.strerror})


def _sealed(run: RunId, body: bytes) -> bytes:
    return digest(bytes(run) + body) + body
