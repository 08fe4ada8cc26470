"""Where a transport listens and says that it does."""

import socket

import pytest
from support.transports import LIMITS, LOOPBACK, OPEN, Owner, node, on_a_loop, running, until

from shoal.node.addresses import Listen, parse_bare
from shoal.node.errors import ConfigError
from shoal.node.identity import Identity
from shoal.node.transport.grpc import Transport
from shoal.node.transport.listen import as_before


@on_a_loop
async def test_a_port_in_use_is_one_clear_line() -> None:
    a = node()
    async with running(a):
        for listen in (Listen("127.0.0.1", a.port), Listen("", a.port)):
            second = node(listen=listen)
            with pytest.raises(ConfigError, match=r"in use.*--listen") as caught:
                await second.start()
            assert "\n" not in str(caught.value)
            await second.stop()


@on_a_loop
async def test_an_address_of_another_machine_can_not_be_listened_on() -> None:
    a = node(listen=Listen("203.0.113.5", 0))
    with pytest.raises(ConfigError, match="no address of this machine"):
        await a.start()
    await a.stop()


@on_a_loop
async def test_all_interfaces_are_the_default() -> None:
    a, b = node(listen=Listen("", 0)), node()
    async with running(a, b):
        assert a.port
        b.connect(a.peer, [f"/ip4/127.0.0.1/tcp/{a.port}"])
        await until(lambda: b.links())
        assert a.links()[0].host == "127.0.0.1"


@on_a_loop
async def test_advertised_addresses_replace_the_machine_s_own() -> None:
    told = parse_bare("/dns4/shoal.example.org/tcp/7464")
    a = Transport(
        Identity.generate(), OPEN, Owner(), listen=LOOPBACK, limits=LIMITS, advertise=[told]
    )
    assert a.addresses == (str(told),)


def test_any_port_is_that_of_the_last_start_while_it_is_free() -> None:
    any_port, fixed = Listen("127.0.0.1", 0), Listen("127.0.0.1", 7464)
    with socket.socket() as taken, socket.socket() as held:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert as_before(any_port, taken.getsockname()[1]) == any_port
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind(("127.0.0.1", 0))  # it does not listen: others who reuse addresses may
        free = held.getsockname()[1]
        assert as_before(any_port, free) == Listen("127.0.0.1", free)
    assert as_before(any_port, 0) == any_port
    assert as_before(fixed, 7465) == fixed
