"""Transports in processes of their own: frozen, killed, and small."""

import asyncio
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from support.transports import RUN, node, on_a_loop, running, until

from shoal.gossip.limits import Limits
from shoal.node.addresses import Address, parse

CHILD = """
import asyncio, sys
from shoal.gossip.limits import Limits
from shoal.gossip.names import RunId
from shoal.node.addresses import Listen, parse
from shoal.node.admission import Admission
from shoal.node.identity import Identity
from shoal.node.transport.grpc import Transport

class Owner:
    def on_link_up(self, peer, admission): pass
    def on_link_down(self, peer, reason): pass

async def main():
    run = RunId(bytes.fromhex(sys.argv[1]))
    listen = Listen("127.0.0.1", 0)
    child = Transport(Identity.generate(), Admission(run), Owner(), listen=listen, limits=Limits())
    await child.start()
    print(child.addresses[0] + "/p2p/" + str(child.identity), flush=True)
    for text in sys.argv[2:]:
        address = parse(text)
        child.connect(address.peer, [str(address.bare())])
    await asyncio.sleep(600)

asyncio.run(main())
"""


@asynccontextmanager
async def child(*dial: str) -> AsyncIterator[tuple[asyncio.subprocess.Process, Address]]:
    """A peer in a process of its own, which dials the given addresses."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", CHILD, RUN.hex(), *dial, stdout=asyncio.subprocess.PIPE
    )
    try:
        assert process.stdout is not None
        line = await asyncio.wait_for(process.stdout.readline(), 200)
        yield process, parse(line.decode().strip())
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


@pytest.mark.real
def test_frozen_peers_on_idle_links_are_noticed_by_either_end() -> None:
    @on_a_loop
    async def test() -> None:
        a = node(limits=Limits())
        async with running(a):
            own = str(a.address.of(a.peer))
            async with child() as (dialled, address), child(own) as (dialler, _):
                assert address.peer is not None
                a.connect(address.peer, [str(address.bare())])
                await until(lambda: len(a.links()) == 2, seconds=200)
                assert {view.dialled for view in a.links()} == {True, False}
                await asyncio.sleep(1.0)
                for process in (dialled, dialler):
                    process.send_signal(signal.SIGSTOP)
                await until(lambda: len(a.owner.of("down")) == 2, seconds=60)

    test()


@pytest.mark.real
def test_a_killed_peer_is_noticed_at_once() -> None:
    @on_a_loop
    async def test() -> None:
        a = node(limits=Limits())
        async with running(a), child() as (process, address):
            assert address.peer is not None
            a.connect(address.peer, [str(address.bare())])
            await until(lambda: a.links())
            process.kill()
            await until(lambda: a.owner.of("down"))

    test()


@pytest.mark.real
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_identity_wire_and_transport_fit_in_a_small_process() -> None:
    code = (
        "import sys, shoal.node.transport.grpc;"
        "assert not {'torch', 'numpy'} & set(sys.modules);"
        "lines = open('/proc/self/status').read().splitlines();"
        "print(next(line.split()[1] for line in lines if line.startswith('VmHWM')))"
    )

    async def run() -> int:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", code, stdout=asyncio.subprocess.PIPE
        )
        out, _ = await process.communicate()
        return int(out)

    assert asyncio.run(run()) < 90 << 10
