"""Bugs of ours in a transport are heard; what a caller's going away raises is none."""

import asyncio
from collections.abc import Sequence

import grpc
import grpc.aio
import pytest
from support.transports import Owner, link, linked, node, on_a_loop, running, until

from shoal.gossip import messages as m
from shoal.gossip.names import PeerId
from shoal.node.transport.server import loud


@on_a_loop
async def test_a_caller_that_goes_away_while_it_is_refused_is_no_bug_of_ours() -> None:
    # What gRPC raises then must not reach the loop's exception handler, which ends the daemon.
    with pytest.raises(grpc.aio.InternalError), loud():
        raise grpc.aio.InternalError("the call is gone")


def test_our_own_bug_reaches_the_loop_s_exception_handler_at_either_end() -> None:
    class Broken(Owner):
        def on_message(self, peer: PeerId, message: m.Message) -> Sequence[m.Message]:
            raise ZeroDivisionError

    @on_a_loop
    async def test() -> None:
        a, b = node(), node()
        b.local.handler = Broken()
        failures: list[object] = []
        loop = asyncio.get_running_loop()
        before = loop.get_exception_handler()
        loop.set_exception_handler(lambda _, context: failures.append(context["exception"]))
        async with running(a, b):
            a.know(b.peer, b.addresses)
            a.send(b.peer, m.Ping(1))
            await until(lambda: len(failures) == 1)
            await link(a, b)
            a.send(b.peer, m.Ping(1))
            await until(lambda: len(failures) == 2)
            await until(lambda: not a.links())
            b.connect(a.peer, a.addresses)
            await linked(a, b)
            a.send(b.peer, m.Ping(1))
            await until(lambda: len(failures) == 3)
        assert all(isinstance(each, ZeroDivisionError) for each in failures)
        loop.set_exception_handler(before)

    test()
