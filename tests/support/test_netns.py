"""The network of namespaces itself: joined, cut, healed, and gone without a trace."""

import os
import subprocess
import sys

import pytest
from support.netns import Host, network

pytestmark = pytest.mark.real

SERVE = """
import socket, sys
with socket.create_server(("", 7000)) as listener:
    print("up", flush=True)
    while True:
        listener.accept()[0].close()
"""
DIAL = "import socket, sys; socket.create_connection((sys.argv[1], 7000), %d).close()"


def serve(host: Host) -> None:
    process = host.start([sys.executable, "-c", SERVE], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"


def reaches(host: Host, address: str, seconds: int = 30) -> bool:
    command = host.command([sys.executable, "-c", DIAL % seconds, address])
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


@pytest.mark.parametrize("routed", [False, True], ids=["bridge", "router"])
def test_hosts_reach_each_other_over_the_wire_only(routed: bool) -> None:
    with network(3, routed=routed) as net:
        serve(net[0])
        assert reaches(net[1], net[0].address)
        assert reaches(net[2], net[0].address)
        assert not reaches(net[1], "127.0.0.1")
        received, sent = net[1].counters()
        assert received > 0
        assert sent > 0


@pytest.mark.parametrize("routed", [False, True], ids=["bridge", "router"])
def test_a_cut_host_is_alone_until_healed(routed: bool) -> None:
    with network(3, routed=routed) as net:
        serve(net[0])
        serve(net[1])
        assert reaches(net[0], net[1].address)
        net[0].cut()
        assert not reaches(net[1], net[0].address, 1)
        assert not reaches(net[0], net[1].address, 1)
        net[0].heal()
        assert reaches(net[1], net[0].address)
        assert reaches(net[2], net[0].address)


def test_nothing_is_left_behind() -> None:
    with network(2) as net:
        serve(net[0])
        names = [host.name for host in net]
        [process] = net[0].started
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True)
    assert not [name for name in names if name in listed.stdout]
    assert process.returncode is not None
    with pytest.raises(ProcessLookupError):
        os.kill(process.pid, 0)
