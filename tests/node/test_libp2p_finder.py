"""A finder's thread and its lives, without libp2p."""

import asyncio
import subprocess
import sys
import threading
from dataclasses import replace
from types import ModuleType

import pytest
from support.finders import LIMITS, identity, settings, until

from shoal.gossip.names import PeerId
from shoal.node.transport.libp2p import finder as finders
from shoal.node.transport.libp2p.finder import MISSING, Finder
from shoal.node.transport.libp2p.hint import Hint
from shoal.node.transport.libp2p.settings import FinderSettings


def test_a_seed_too_short_to_hide_a_swarm_is_refused() -> None:
    with pytest.raises(ValueError, match="16 bytes"):
        Finder(FinderSettings(identity=bytes(32), seed=b"short"))


@pytest.mark.real
def test_the_daemon_imports_nothing_of_libp2p() -> None:
    code = (
        "import sys, shoal.node.daemon;"
        "assert not {'libp2p', 'multiaddr', 'trio', 'zeroconf'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_without_libp2p_the_state_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> ModuleType:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    async def main() -> None:
        finder = Finder(settings(1))
        assert finder.state.startswith("off")
        finder.start()
        finder.announce(["/ip4/203.0.113.5/tcp/7464"])
        finder.bootstrap(["/ip4/203.0.113.6/tcp/1/p2p/x"])
        finder.hurry()
        await until(lambda: finder.state == MISSING)
        assert finder._thread is not None
        finder._thread.join(5)
        assert not finder._thread.is_alive()
        await finder.stop()

    monkeypatch.setattr(finders, "import_module", absent)
    asyncio.run(main())


def test_switched_off_it_does_nothing() -> None:
    async def main() -> None:
        finder = Finder(settings(1, port=None))
        finder.announce(["/ip4/203.0.113.5/tcp/7464"])
        finder.bootstrap(["/ip4/203.0.113.6/tcp/1/p2p/x"])
        finder.start()
        finder.hurry([identity(2)])
        assert finder.state == "off"
        assert finder._thread is None
        await finder.stop()

    asyncio.run(main())


def test_a_broken_shared_library_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> ModuleType:
        raise ImportError("libgmp.so.10: cannot open shared object file")

    async def main() -> None:
        finder = Finder(settings(1))
        finder.start()
        await until(lambda: "libgmp" in finder.state)
        assert finder.state.startswith("off: libp2p cannot be imported")
        await finder.stop()

    monkeypatch.setattr(finders, "import_module", broken)
    asyncio.run(main())


def test_a_failure_ends_only_that_life_and_pauses_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    lives = 0

    def fail(self: Finder, loop: asyncio.AbstractEventLoop) -> None:
        nonlocal lives
        lives += 1
        raise ExceptionGroup("nursery", [OSError("no route\nto anywhere")])

    class Noting(threading.Event):
        """Knows how long it was to be waited for."""

        def __init__(self) -> None:
            super().__init__()
            self.pauses: list[float] = []

        def wait(self, timeout: float | None = None) -> bool:
            assert timeout is not None
            self.pauses.append(timeout)
            return super().wait(timeout)

    async def main() -> None:
        quick = replace(LIMITS, restart=0.05, restart_max=0.2)
        finder = Finder(settings(1, limits=quick))
        finder._shared.stopping = noting = Noting()
        finder.start()
        await until(lambda: len(noting.pauses) >= 5)
        assert finder.state.startswith("failed: OSError: no route to anywhere; starting again")
        assert noting.pauses[3] > 2 * noting.pauses[0]
        assert max(noting.pauses) <= 1.2 * quick.restart_max
        await finder.stop(60)
        assert finder.state == "off: stopped"
        ended = lives
        await asyncio.sleep(0.3)
        assert lives == ended

    monkeypatch.setattr(Finder, "_run", fail)
    asyncio.run(main())


def test_hints_beyond_the_bound_push_out_the_oldest() -> None:
    def hint(n: int) -> Hint:
        return Hint(PeerId(bytes([n]) * 32), ("/x",), b"", "mdns", "")

    async def main() -> None:
        finder = Finder(settings(1, limits=replace(LIMITS, hints=4)))
        loop = asyncio.get_running_loop()

        def flood() -> None:
            for n in range(100):
                finder._hand_over(loop, hint(n))

        # The loop hangs meanwhile: only as many as the bound wait for it.
        thread = threading.Thread(target=flood)
        thread.start()
        thread.join()
        await asyncio.sleep(0)
        assert [finder.hints.get_nowait() for _ in range(finder.hints.qsize())] == [
            hint(n) for n in range(4)
        ]
        for n in range(10):
            finder._hand_over(loop, hint(n))
            await asyncio.sleep(0)
        assert [finder.hints.get_nowait() for _ in range(4)] == [hint(n) for n in range(6, 10)]

    asyncio.run(main())


def test_a_hint_for_a_loop_that_has_ended_is_dropped() -> None:
    finder = Finder(settings(1))
    loop = asyncio.new_event_loop()
    loop.close()
    for _ in range(2 * LIMITS.hints):
        finder._hand_over(loop, Hint(PeerId(bytes(32)), ("/x",), b"", "mdns", ""))
