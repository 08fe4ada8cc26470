"""libp2p as the daemon holds it: a thread of its own, in which one life follows another."""

import asyncio
import logging
import random
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING

from shoal.gossip.names import PeerId
from shoal.node.transport.libp2p import ids
from shoal.node.transport.libp2p.cause import innermost
from shoal.node.transport.libp2p.contact import pack
from shoal.node.transport.libp2p.hint import Hint
from shoal.node.transport.libp2p.settings import FinderSettings
from shoal.node.transport.libp2p.shared import Shared

if TYPE_CHECKING:
    from shoal.node.transport.libp2p.life import Life

log = logging.getLogger(__name__)

MISSING = "off: libp2p is not installed; pip install 'shoal[libp2p]'"


class Finder:
    """libp2p in a thread of its own. All methods are called on the asyncio loop's thread."""

    def __init__(self, settings: FinderSettings) -> None:
        if len(settings.seed) < 16:
            raise ValueError("the seed that scopes a swarm must have at least 16 bytes")
        self.settings = settings
        self.hints: asyncio.Queue[Hint] = asyncio.Queue(settings.limits.hints)
        self._shared = Shared()
        self._thread: threading.Thread | None = None
        self._life: Life | None = None
        # Counts hints between the thread and the loop, so that a loop that hangs costs no memory.
        self._room = threading.BoundedSemaphore(settings.limits.hints)

    @property
    def state(self) -> str:
        """Return "off", "off: …", "starting", "running" or "failed: …": one line for `/status`."""
        return self._shared.state

    @property
    def addresses(self) -> tuple[str, ...]:
        """Return own libp2p multiaddrs with /p2p while running: others may bootstrap from them."""
        return self._shared.addresses

    @property
    def counts(self) -> dict[str, int]:
        """Return found, connected and routing: sizes for `/status`."""
        return self._shared.counts

    def start(self) -> None:
        """Start the thread; returns at once. Must be called with a running asyncio loop."""
        if self._thread is not None:
            raise RuntimeError("a Finder starts once")
        if self.settings.port is None:
            self._shared.state = "off"
            return
        loop = asyncio.get_running_loop()
        self._shared.state = "starting"
        self._thread = threading.Thread(
            target=self._supervise, args=(loop,), name="libp2p", daemon=True
        )
        self._thread.start()

    async def stop(self, timeout: float = 5.0) -> None:
        """Leave the DHT and the local network; give up waiting after `timeout`."""
        self._shared.stopping.set()
        self._tell(lambda life: life.wake())
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join, timeout)
        self._shared.state, self._shared.addresses = "off: stopped", ()

    def announce(self, addresses: Sequence[str], contact: bytes = b"") -> None:
        """Tell peers of this swarm from now on that our gRPC listens at `addresses`."""
        self._shared.answer = pack(tuple(addresses), contact, self.settings.limits)

    def bootstrap(self, addresses: Sequence[str]) -> None:
        """Enter the DHT through these libp2p multiaddrs (with /p2p); replaces earlier ones."""
        self._shared.bootstrap = tuple(addresses)[: self.settings.limits.bootstrap]
        self._tell(lambda life: life.look())

    def hurry(self, linked: Iterable[PeerId] = ()) -> None:
        """Look again now: the daemon has fewer links than it wants. `linked` need not be asked."""
        names = frozenset(ids.to_bytes(peer) for peer in linked)
        self._tell(lambda life: life.hurry(names))

    def _tell(self, what: "Callable[[Life], None]") -> None:
        if (life := self._life) is not None:
            what(life)

    # ------------------------------------------------------------ the thread

    def _supervise(self, loop: asyncio.AbstractEventLoop) -> None:
        shared, limits = self._shared, self.settings.limits
        pause = limits.restart
        while not shared.stopping.is_set():
            began = time.monotonic()
            try:
                self._run(loop)
                return
            except ImportError as error:
                # Also a shared library that is missing: nothing that trying again would mend.
                gone = isinstance(error, ModuleNotFoundError)
                shared.state = MISSING if gone else f"off: libp2p cannot be imported: {error}"
                log.warning("libp2p is off", extra={"reason": shared.state})
                return
            except Exception as error:  # libp2p is a guest: whatever it raises ends only itself
                if time.monotonic() - began > limits.restart_max:
                    pause = limits.restart
                reason = innermost(error)
                shared.state = f"failed: {reason}; starting again in {pause:.0f} s"
                log.warning("libp2p failed", extra={"reason": reason, "pause": pause})
            finally:
                self._life, shared.addresses, shared.counts = None, (), {}
            shared.stopping.wait(pause * random.uniform(0.8, 1.2))
            pause = min(2 * pause, limits.restart_max)

    def _run(self, loop: asyncio.AbstractEventLoop) -> None:
        # Here and not above: it need not be installed, and takes a second and memory if it is.
        lives = import_module("shoal.node.transport.libp2p.life")
        # Its own warnings are about strangers' broken connections; ours say what matters.
        logging.getLogger("libp2p").setLevel(logging.CRITICAL)

        async def live() -> None:
            life = lives.Life(self.settings, self._shared, partial(self._hand_over, loop))
            self._life = life
            await life.run()

        import_module("trio").run(live)

    def _hand_over(self, loop: asyncio.AbstractEventLoop, hint: Hint) -> None:
        if not self._room.acquire(blocking=False):
            return
        try:
            loop.call_soon_threadsafe(self._deliver, hint)
        except RuntimeError:  # the loop is closed: the daemon is going down
            self._room.release()

    def _deliver(self, hint: Hint) -> None:
        self._room.release()
        if self.hints.full():
            self.hints.get_nowait()
        self.hints.put_nowait(hint)
