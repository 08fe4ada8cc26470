"""The machine's own addresses, as far as others can use them."""

import ipaddress

from shoal.node.addresses import machine


def own_addresses() -> tuple[str, ...]:
    """Return the machine's IPv4 addresses, loopback only when there is nothing else."""
    found = [ip for ip in machine() if "." in ip]
    outside = sorted(ip for ip in found if not ipaddress.ip_address(ip).is_loopback)
    return tuple(outside) or ("127.0.0.1",)
