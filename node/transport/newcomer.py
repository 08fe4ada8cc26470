"""What a joiner asks before it has a daemon: one question each, over a channel of its own."""

import grpc

from shoal.gossip.limits import Limits
from shoal.gossip.names import PeerId, digest
from shoal.node.addresses import Address
from shoal.node.admission import Admission
from shoal.node.errors import PeerError
from shoal.node.identity import Identity, peer_text
from shoal.node.transport import dial
from shoal.node.transport.channels import SLACK
from shoal.node.transport.rpc import SERVICE, Unary, told
from shoal.node.wire import requests


async def fetch_genesis(
    address: Address,
    *,
    secret: bytes | None = None,
    identity: Identity | None = None,
    limits: Limits | None = None,
) -> bytes:
    """Return the genesis that a join address names, checked against its run id.

    Raises PeerError, whose text says what is wrong with address, peer, run or secret.
    """
    limits, identity = limits or Limits(), identity or Identity.generate()
    if address.run is None:
        raise PeerError("another run", f"{address} names no run: a join address ends in /run/…")
    if address.peer is None:
        there = peer_text(await dial.who_answers(address, timeout=limits.dial_timeout))
        raise PeerError(
            "wrong peer",
            f"{address} names no peer, {there} answers there: if that is the right one, put "
            f"/p2p/{there} before /run",
        )
    admission, request = Admission(address.run, secret), requests.encode_genesis_request()
    most, timeout = limits.genesis_bytes, limits.call_timeout
    answer = await _ask(
        address, address.peer, "Genesis", request, admission, identity, limits, most, timeout
    )
    genesis = requests.decode_genesis_response(answer)
    if len(genesis) > limits.genesis_bytes:
        raise PeerError("oversize", f"a genesis of {len(genesis)} bytes")
    if bytes(digest(genesis)) != bytes(address.run):
        raise PeerError("hash", "the genesis that it sent is not this run's: ask another member")
    return genesis


async def fetch_snapshot(
    address: Address, peer: PeerId, admission: Admission, identity: Identity, limits: Limits
) -> bytes:
    """Return what `peer` gives to joiners in place of the log, unchecked; raises PeerError."""
    request, most = requests.encode_snapshot_request(), limits.message_bytes
    timeout = limits.snapshot_timeout
    return await _ask(
        address, peer, "Snapshot", request, admission, identity, limits, most, timeout
    )


async def _ask(
    address: Address,
    peer: PeerId,
    method: str,
    request: bytes,
    admission: Admission,
    identity: Identity,
    limits: Limits,
    most: int,
    timeout: float,
) -> bytes:
    found = await dial.find(admission, peer, [address], timeout=limits.dial_timeout)
    async with dial.channel(found, admission.credentials(identity), most + SLACK) as channel:
        call: Unary = channel.unary_unary(f"/{SERVICE}/{method}")
        try:
            return await call(request, timeout=timeout)
        except grpc.aio.AioRpcError as error:
            raise told(error) from None
