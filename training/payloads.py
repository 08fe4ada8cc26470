"""Payloads that a turn rule must be able to look at again, in memory or in a file without a name.

The log has them too, but on the daemon's side; here they are what the log keeps, not decoded.
"""

import contextlib
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import IO

from shoal.training.exchange import Arrived

IN_MEMORY = 64 << 20
"""Bytes that are held in memory; what comes later goes into the file, if the disk takes it."""

Key = tuple[bytes, int, int]


class Payloads:
    """Updates with their payloads; the file only grows, and is gone with the process."""

    def __init__(self, directory: Path | None = None) -> None:
        """Keep the file in `directory`, else where the system has temporary files."""
        self._directory = directory
        self._file: IO[bytes] | None = None
        self.clear()

    def __del__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget all."""
        if self._file is not None:
            self._file.close()
            self._file = None
        self._places: dict[Key, tuple[int, Arrived]] = {}
        """Where in the file; −1: with the update."""
        self._held = self._end = 0

    def keep(self, update: Arrived) -> None:
        """Keep an update with its payload."""
        assert update.payload is not None
        size = len(update.payload)
        if self._held + size > IN_MEMORY:
            with contextlib.suppress(OSError):  # a full disk: in memory, then
                self._write(update.payload)
                self._places[update.key] = self._end, replace(update, payload=None)
                self._end += size
                return
        self._places[update.key] = -1, update
        self._held += size

    def recall(self, key: Key) -> Arrived:
        """Return an update that was kept."""
        start, update = self._places[key]
        if start < 0:
            return update
        assert self._file is not None
        self._file.seek(start)
        return replace(update, payload=self._file.read(update.size))

    def _write(self, payload: bytes) -> None:
        if self._file is None:
            self._file = tempfile.TemporaryFile(dir=self._directory)  # noqa: SIM115  see `clear`
        self._file.seek(self._end)
        self._file.write(payload)
        self._file.flush()
