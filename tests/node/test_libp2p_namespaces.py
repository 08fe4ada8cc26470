"""Finders in processes and namespaces of their own, which meet by mDNS."""

import json
import subprocess
import sys
from typing import Any

import pytest
from support.finders import identity, needs_libp2p
from support.netns import Host, network

PEER = """
import asyncio, json, os, resource, sys, time
import grpc
from shoal.node.transport.libp2p.finder import Finder
from shoal.node.transport.libp2p.settings import FinderSettings

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize() / 1e6

async def main(n, seed):
    finder = Finder(FinderSettings(identity=bytes([n]) * 32, seed=seed.encode() * 32))
    began = time.monotonic()
    finder.start()
    finder.announce(["/ip4/203.0.113.%d/tcp/7464" % n], b"contact")
    async def tell():
        while True:
            hint = await finder.hints.get()
            at = round(time.monotonic() - began, 2)
            line = {"peer": hint.peer.hex(), "source": hint.source, "at": at, "libp2p": hint.libp2p}
            print(json.dumps(line), flush=True)
    task = asyncio.create_task(tell())
    await asyncio.to_thread(sys.stdin.read)
    task.cancel()
    used = time.process_time()
    print(json.dumps({"resident": resident(), "cpu": used, "state": finder.state,
                      "torch": "torch" in sys.modules}), flush=True)
    await finder.stop()

asyncio.run(main(int(sys.argv[1]), sys.argv[2]))
"""


def start(host: Host, n: int, seed: str = "s") -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", PEER, str(n), seed]
    pipe = subprocess.PIPE
    return host.start(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True)


def told(process: "subprocess.Popen[str]", peers: set[int]) -> list[dict[str, Any]]:
    """Read hints until all of `peers` were found; the test's own time-out bounds the wait."""
    assert process.stdout is not None
    hints: list[dict[str, Any]] = []
    while not {identity(n).hex() for n in peers} <= {hint["peer"] for hint in hints}:
        line = process.stdout.readline()
        assert line, process.communicate()[1]
        hints.append(json.loads(line))
    return hints


def rest(process: "subprocess.Popen[str]") -> list[dict[str, Any]]:
    """End a peer; return the hints not read yet and its last line."""
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    return [json.loads(line) for line in out.splitlines()]


@needs_libp2p
@pytest.mark.real
def test_mdns_finds_peers_of_the_run_across_namespaces_and_no_others() -> None:
    with network(3) as net:
        alone = start(net[2], 3, seed="o")
        peers = {1: start(net[0], 1), 2: start(net[1], 2), 4: start(net[0], 4)}
        hints = {n: told(process, peers.keys() - {n}) for n, process in peers.items()}
        ends = {n: hints[n] + rest(process) for n, process in peers.items()}
        stranger = rest(alone)
    for n, (*found, last) in ends.items():
        assert {hint["peer"] for hint in found} == {identity(m).hex() for m in ends if m != n}
        assert "mdns" in {hint["source"] for hint in found}
        assert last["state"] == "running"
        assert not last["torch"]
        assert last["resident"] < 200  # MB beside grpc, design 12
    assert len(stranger) == 1


@needs_libp2p
@pytest.mark.real
def test_a_peer_that_comes_back_elsewhere_is_found_again() -> None:
    with network(2) as net:
        stays, killed = start(net[0], 1), start(net[1], 2)
        [first] = told(stays, {2})
        killed.kill()
        killed.communicate()
        start(net[1], 2)
        [again] = told(stays, {2})
    assert again["peer"] == first["peer"] == identity(2).hex()
    assert again["libp2p"] != first["libp2p"]
