"""Where a transport listens and says that it does."""

import pytest
from support.transports import LIMITS, LOOPBACK, OPEN, Owner, node, on_a_loop, running, until

from shoal.node.addresses import Listen, parse_bare
from shoal.node.errors import ConfigError
from shoal.node.identity import Identity
from shoal.node.transport.grpc import Transport


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
