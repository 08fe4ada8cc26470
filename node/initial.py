"""The initial model's integers: a file, checked against the genesis before it counts."""

import asyncio
import mmap
from pathlib import Path

from shoal.gossip.names import PeerId
from shoal.node.errors import PeerError
from shoal.node.genesis import Genesis
from shoal.node.transport.grpc import Transport
from shoal.node.transport.handler import Buffer


class Initial:
    """Serves the file when it is there, and fetches it when this machine makes other integers."""

    def __init__(self, path: Path, genesis: Genesis) -> None:
        self.path = path
        self.genesis = genesis
        self._map: mmap.mmap | None = None

    def read(self) -> Buffer | None:
        """Return the integers (mapped, not read), or None while they are not here."""
        if self._map is None:
            try:
                with self.path.open("rb") as file:
                    self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            except (OSError, ValueError):
                return None
        return memoryview(self._map)

    async def fetch(self, transport: Transport, peer: PeerId) -> None:
        """Fetch the file from `peer`; raises PeerError, and then leaves nothing behind."""
        partial = self.path.with_name(self.path.name + ".fetched")
        try:
            with partial.open("wb") as file:
                async for chunk in transport.initial(peer, self.genesis.initial_bytes):
                    file.write(chunk)
            data = await asyncio.to_thread(partial.read_bytes)
            if not await asyncio.to_thread(self.genesis.is_initial, data):
                raise PeerError("hash", "these are not the run's initial integers")
            partial.replace(self.path)
        finally:
            partial.unlink(missing_ok=True)
