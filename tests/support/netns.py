"""Hosts on one machine that share nothing but a wire: network namespaces joined by veth pairs.

    with network(3) as net:
        server = net[0].start(["python", "-m", "http.server"])
        net[1].run(["ping", "-c1", net[0].address])
        net[0].cut(); net[0].heal()
        net[0].counters()            # bytes that crossed the host's only interface

Every host has its own loopback and one interface `eth0`. `network(n)` joins them by a bridge in a
namespace of its own: one subnet, multicast works (mDNS). `network(n, routed=True)` puts a router
between them: one subnet each, no multicast, as between homes. Nothing reaches the machine's own
network. Leaving the block kills what still runs in the namespaces and deletes them; namespaces of
test processes that died without doing so are deleted by the next one.

Needs root and iproute2: `network` skips the test with the reason otherwise.
"""

import itertools
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

_serial = itertools.count()
_PREFIX = "shoaltest"


def refusal() -> str | None:
    """Say why namespaces cannot be made here, or None when they can."""
    if shutil.which("ip") is None:
        return "no `ip` command: install iproute2"
    if os.geteuid() != 0:
        return "network namespaces need root"
    probe = f"{_PREFIX}-{os.getpid()}-probe"
    try:
        _ip("netns", "add", probe)
        _ip("-n", probe, "link", "add", "v0", "type", "veth", "peer", "name", "v1")
        _ip("-n", probe, "link", "add", "br0", "type", "bridge", "mcast_snooping", "0")
        _ip("-n", probe, "rule", "add", "pref", "10", "to", "10.93.0.1", "blackhole")
        _forward(probe)
    except subprocess.CalledProcessError as error:
        return f"network namespaces are not allowed here: {error.stderr.strip()}"
    finally:
        subprocess.run(["ip", "netns", "del", probe], capture_output=True, check=False)
    return None


class Host:
    """One namespace with an address that the other hosts can reach."""

    def __init__(self, name: str, hub: str, port: str, address: str, *, routed: bool) -> None:
        self.name, self.address = name, address
        self._hub, self._port, self._routed = hub, port, routed
        self.started: list[subprocess.Popen[Any]] = []

    def command(self, command: Sequence[str]) -> list[str]:
        """Return the command line that runs `command` on this host."""
        return ["ip", "netns", "exec", self.name, *command]

    def run(
        self, command: Sequence[str], *, timeout: float = 60.0, **options: Any
    ) -> subprocess.CompletedProcess[str]:
        """Run `command` on this host and wait for it; fails when it fails."""
        return subprocess.run(
            self.command(command),
            timeout=timeout,
            check=True,
            text=True,
            capture_output=True,
            **options,
        )

    def start(self, command: Sequence[str], **options: Any) -> subprocess.Popen[Any]:
        """Start `command` on this host; it is killed at the latest when the network ends."""
        process = subprocess.Popen(self.command(command), **options)
        self.started.append(process)
        return process

    def cut(self) -> None:
        """Lose everything to and from this host. Nobody is told: no carrier lost, no ICMP."""
        if self._routed:
            self._blackholes("add")
        else:
            _ip("-n", self._hub, "link", "set", self._port, "nomaster")

    def heal(self) -> None:
        """Let everything through again."""
        if self._routed:
            self._blackholes("del")
        else:
            _ip("-n", self._hub, "link", "set", self._port, "master", "br0")

    def _blackholes(self, verb: str) -> None:
        for selector in (("iif", self._port), ("to", self.address)):
            _ip("-n", self._hub, "rule", verb, "pref", "10", *selector, "blackhole")

    def counters(self) -> tuple[int, int]:
        """Return (received, sent) bytes of the host's interface, link headers included."""
        shown = self.run(["cat", "/proc/net/dev"]).stdout
        match = re.search(r"eth0:\s*(\d+)(?:\s+\d+){7}\s+(\d+)", shown)
        assert match, shown
        return int(match[1]), int(match[2])

    def packets(self) -> tuple[int, int]:
        """Return (received, sent) packets of the host's interface."""
        shown = self.run(["cat", "/proc/net/dev"]).stdout
        match = re.search(r"eth0:\s*\d+\s+(\d+)(?:\s+\d+){7}\s+(\d+)", shown)
        assert match, shown
        return int(match[1]), int(match[2])


@contextmanager
def network(hosts: int, *, routed: bool = False) -> Iterator[list[Host]]:
    """Make `hosts` joined hosts; skip the test where that is not possible."""
    if (reason := refusal()) is not None:
        pytest.skip(reason)
    _sweep()
    stem = f"{_PREFIX}-{os.getpid()}-{next(_serial)}"
    made: list[Host] = []
    try:
        hub = f"{stem}-hub"
        _ip("netns", "add", hub)
        _ip("-n", hub, "link", "set", "lo", "up")
        if routed:
            _forward(hub)
        else:
            # A bridge that snoops multicast needs a querier to let mDNS through for long.
            _ip("-n", hub, "link", "add", "br0", "type", "bridge", "mcast_snooping", "0")
            _ip("-n", hub, "link", "set", "br0", "up")
        for i in range(1, hosts + 1):
            made.append(_plug_in(stem, hub, i, routed))
        yield made
    finally:
        for host in made:
            for process in host.started:
                if process.poll() is None:
                    process.kill()
        _delete([h.name for h in made] + [f"{stem}-hub"])
        for host in made:
            for process in host.started:
                process.wait()
                for stream in (process.stdin, process.stdout, process.stderr):
                    if stream is not None:
                        stream.close()


def _plug_in(stem: str, hub: str, i: int, routed: bool) -> Host:
    name, port = f"{stem}-h{i}", f"p{i}"
    subnet = f"10.93.{i if routed else 0}"
    address = f"{subnet}.2" if routed else f"{subnet}.{i}"
    _ip("netns", "add", name)
    _ip("link", "add", "eth0", "netns", name, "type", "veth", "peer", "name", port, "netns", hub)
    _ip("-n", name, "link", "set", "lo", "up")
    _ip("-n", name, "addr", "add", f"{address}/24", "dev", "eth0")
    _ip("-n", name, "link", "set", "eth0", "up")
    if routed:
        _ip("-n", hub, "addr", "add", f"{subnet}.1/24", "dev", port)
        _ip("-n", hub, "link", "set", port, "up")
        _ip("-n", name, "route", "add", "default", "via", f"{subnet}.1")
    else:
        _ip("-n", hub, "link", "set", port, "master", "br0", "up")
        # Linux sends no multicast without a route for it.
        _ip("-n", name, "route", "add", "default", "dev", "eth0")
    return Host(name, hub, port, address, routed=routed)


def _forward(hub: str) -> None:
    """Let a namespace pass on what is for others."""
    _ip("netns", "exec", hub, "sh", "-c", "echo 1 > /proc/sys/net/ipv4/ip_forward")


def _ip(*arguments: str) -> str:
    return subprocess.run(
        ["ip", *arguments], check=True, capture_output=True, text=True, timeout=30
    ).stdout


def _delete(names: list[str]) -> None:
    """Kill what runs in these namespaces (only our tests' processes can), then delete them."""
    for name in names:
        for _ in range(20):
            found = subprocess.run(
                ["ip", "netns", "pids", name], capture_output=True, text=True, check=False
            ).stdout.split()
            if not found:
                break
            for pid in found:
                try:
                    os.kill(int(pid), signal.SIGKILL)
                except ProcessLookupError:
                    continue
            time.sleep(0.05)
        subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def _sweep() -> None:
    """Delete what test processes that were killed have left."""
    left = []
    for line in _ip("netns", "list").splitlines():
        match = re.match(rf"({_PREFIX}-(\d+)-\S+)", line)
        if match and not Path(f"/proc/{match[2]}").exists():
            left.append(match[1])
    _delete(left)
