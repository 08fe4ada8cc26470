"""Finders for tests: who they are, in which swarm, and what is waited for."""

import asyncio
import importlib.util
from collections.abc import Callable
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from shoal.gossip.names import PeerId
from shoal.node.transport.libp2p.settings import FinderLimits, FinderSettings

LIMITS = FinderLimits()
SEED, OTHER = b"s" * 32, b"o" * 32

needs_libp2p = pytest.mark.skipif(
    importlib.util.find_spec("libp2p") is None,
    reason="libp2p is not installed: pip install 'shoal[libp2p]'",
)
guest = pytest.mark.filterwarnings("ignore")  # libp2p's own warnings are not ours to mend


def settings(n: int, seed: bytes = SEED, **more: Any) -> FinderSettings:
    return FinderSettings(identity=bytes([n]) * 32, seed=seed, **more)


def identity(n: int) -> PeerId:
    key = Ed25519PrivateKey.from_private_bytes(bytes([n]) * 32)
    return PeerId(key.public_key().public_bytes_raw())


async def until(done: Callable[[], Any], timeout: float = 200.0) -> None:
    async with asyncio.timeout(timeout):
        while not done():
            await asyncio.sleep(0.02)
