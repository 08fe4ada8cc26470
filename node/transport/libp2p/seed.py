"""What follows from a swarm's seed and does not show it: proofs, and names under which to meet."""

import base64
from hashlib import blake2b, sha256


def proof(seed: bytes, teller: bytes, hearer: bytes) -> bytes:
    """Prove to `hearer` that `teller` knows the swarm's seed.

    No nonce: the channel proves both ids, so what one peer saw is of no use to another.
    """
    both = len(teller).to_bytes(1, "big") + teller + hearer
    return blake2b(both, key=seed[:64], digest_size=32, person=b"shoal-contact").digest()


def rendezvous_key(seed: bytes) -> bytes:
    """Return the multihash (sha2-256) that the peers of this swarm provide in the DHT."""
    secret = blake2b(key=seed[:64], digest_size=32, person=b"shoal-meet").digest()
    return b"\x12\x20" + sha256(secret).digest()


def mdns_type(seed: bytes) -> str:
    """Return libp2p's private-network service type for this swarm (at most 15 characters)."""
    tag = blake2b(key=seed[:64], digest_size=7, person=b"shoal-mdns").digest()
    return f"_p2p-{base64.b32encode(tag).decode().lower()[:11]}._udp.local."
