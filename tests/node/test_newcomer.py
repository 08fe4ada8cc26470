"""What a joiner asks: the genesis and a snapshot, and what is wrong with its address."""

from dataclasses import replace

import pytest
from support.transports import GENESIS, LIMITS, RUN, node, on_a_loop, running

from shoal.gossip.names import RunId
from shoal.node.admission import Admission
from shoal.node.errors import PeerError
from shoal.node.identity import Identity, peer_text
from shoal.node.transport.newcomer import fetch_genesis, fetch_snapshot


@on_a_loop
async def test_a_joiner_gets_the_genesis_and_its_run_id_is_checked() -> None:
    b = node()
    async with running(b):
        assert await fetch_genesis(b.address, limits=LIMITS) == GENESIS
        b.owner.genesis = lambda: b"another"  # type: ignore[method-assign]
        with pytest.raises(PeerError) as caught:
            await fetch_genesis(b.address, limits=LIMITS)
        assert caught.value.reason == "hash"
        b.owner.genesis = lambda: bytes(2 << 20)  # type: ignore[method-assign]
        with pytest.raises(PeerError):
            await fetch_genesis(b.address, limits=LIMITS)


@on_a_loop
async def test_a_joiner_gets_a_snapshot_if_it_is_admitted() -> None:
    secret = b"s" * 20
    b, who = node(Admission(RUN, secret)), Identity.generate()
    b.owner.sums = b"sums" * 1000
    async with running(b):
        for key, said in ((secret, None), (b"t" * 20, "not admitted")):
            admission = Admission(RUN, key)
            asked = fetch_snapshot(b.address, b.peer, admission, who, LIMITS)
            if said is None:
                assert await asked == b"sums" * 1000
            else:
                with pytest.raises(PeerError) as caught:
                    await asked
                assert caught.value.reason == said


@on_a_loop
async def test_a_joiner_is_told_what_is_wrong_with_its_address() -> None:
    secret = b"s" * 20
    b = node(Admission(RUN, secret))
    wrong = Identity.generate().peer
    async with running(b):
        assert await fetch_genesis(b.address, secret=secret, limits=LIMITS) == GENESIS
        for address, given, said in (
            (b.address, None, "--secret-file"),
            (b.address, b"t" * 20, "--secret-file"),
            (b.address.of(b.peer, RunId(bytes(32))), secret, "another run"),
            (b.address.of(wrong, RUN), secret, peer_text(b.peer)),
            (b.address.of(wrong, RUN), secret, peer_text(wrong)),
            (replace(b.address, peer=None), secret, f"/p2p/{peer_text(b.peer)}"),
            (b.address.bare(), secret, "names no run"),
            (replace(b.address, port=1), secret, "can't be reached"),
        ):
            with pytest.raises(PeerError) as caught:
                await fetch_genesis(address, secret=given, limits=LIMITS)
            assert said in str(caught.value)
            assert "\n" not in str(caught.value)
