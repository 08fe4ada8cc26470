"""What a peer tells others of its swarm: where its gRPC listens, and a few bytes of its daemon."""

import base64
import json
import re

from shoal.node.transport.libp2p.settings import FinderLimits


def pack(addresses: tuple[str, ...], contact: bytes, limits: FinderLimits) -> bytes:
    """Return the JSON that peers of this swarm are answered with."""
    if len(contact) > limits.contact_bytes:
        raise ValueError(f"a contact of {len(contact)} bytes exceeds {limits.contact_bytes}")
    told = [a for a in addresses if len(a) <= limits.address_bytes][: limits.addresses]
    return json.dumps({"addresses": told, "contact": base64.b64encode(contact).decode()}).encode()


def unpack(data: bytes, limits: FinderLimits) -> tuple[tuple[str, ...], bytes] | None:
    """Parse an answer; None when it is not one. The peer is of our swarm, but may be broken."""
    try:
        match json.loads(data):
            case {"addresses": list(told), "contact": str(packed)}:
                contact = base64.b64decode(packed, validate=True)
            case _:
                return None
    except (ValueError, RecursionError):
        return None
    if not told or len(told) > limits.addresses or len(contact) > limits.contact_bytes:
        return None
    for address in told:
        if not isinstance(address, str) or len(address) > limits.address_bytes:
            return None
        if not re.fullmatch(r"/[\x21-\x7e]+", address):
            return None
    return tuple(told), contact
