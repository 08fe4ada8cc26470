"""What is wrong with this machine, one finding each, with the remedy. Used by `shoal doctor`.

A *problem* keeps a daemon from working as asked; a *warning* costs something; *ok* says what is
there. Torch and libp2p are looked at in other processes (probe.py), so nothing stays in memory.
"""

import errno
import json
import os
import platform
import shutil
import socket
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from shoal.gossip.limits import Limits
from shoal.node import addresses, client, genesis, identity, probe, shipped
from shoal.node.config import NodeConfig, RunFile, parse_size
from shoal.node.errors import ConfigError
from shoal.node.home import Home

OK, WARNING, PROBLEM = "ok", "warning", "problem"
OPEN_FILES = 1024
"""Sockets of 64 links, libp2p, calls and files of the log, with room to spare."""
OPEN_FILES_LEAST = 256
DISK_LEAST = 1 << 30
DECODING = 0.1
"""Share of the worker's time that applying others' updates may take (design 3.3)."""
QUORUM = 3
"""Votes of which a single one is no half."""
RECORD_BYTES = 512
"""A record with its frame, TLS and TCP headers: about so much beside each payload."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report."""

    name: str
    state: str
    text: str
    remedy: str = ""


@dataclass(frozen=True, slots=True)
class Estimate:
    """What the run costs each peer of a swarm of `peers`, from one trial turn on this machine."""

    peers: int
    parameters: int
    kind: str
    payload: int
    """Bytes of one update; where kinds of update take turns, the mean."""
    turn_seconds: float
    steps: int
    received_per_second: float
    """Bytes a second in, and about as many out: every peer gets every update once."""
    decoding: float
    """Share of the turn that applying the others' updates takes."""
    all_reduce: float
    """How many times fewer bytes than all-reduce of float32 gradients at every step."""


@dataclass(frozen=True, slots=True)
class Subject:
    """What is examined: a machine, and on it a directory or run file, if any."""

    directory: Path
    run: dict[str, Any] | None = None
    """The five tables."""
    config: NodeConfig = field(default_factory=NodeConfig)
    peers: int = 0
    """Size of the swarm to estimate for; 0: the run's `min_peers`, at least 2."""


def subject(target: Path | None, given: dict[str, object], peers: int) -> Subject:
    """Return what `target` – a run file, a directory or nothing – names."""
    if target is None:
        return Subject(Path.cwd(), config=NodeConfig().merged(given), peers=peers)
    if str(target) in shipped.names() and not target.exists():
        name = str(target)
        run_file = RunFile.parse(shipped.read(name), where=name)
    elif target.is_dir():
        directory = target if (target / "node.toml").exists() else client.find(target)
        config = NodeConfig.load(directory / "node.toml").merged(given)
        held = directory / "genesis"
        tables = genesis.load(held, Limits()).run_file.tables() if held.exists() else None
        return Subject(directory, tables, config, peers)
    else:
        run_file = RunFile.load(target)
    return Subject(Path.cwd(), run_file.tables(), NodeConfig().merged(given), peers)


def examine(about: Subject) -> tuple[list[Finding], Estimate | None]:
    """Look at everything; never raises for what it finds."""
    findings: list[Finding] = []
    for check in CHECKS:
        try:
            findings += check(about)
        except ConfigError as error:
            findings.append(Finding(check.__name__.strip("_"), PROBLEM, str(error)))
    estimate = None
    if about.run is not None:
        more, estimate = _run(about)
        findings += more
    return findings, estimate


# ---------------------------------------------------------------- the machine


def _python(about: Subject) -> Iterator[Finding]:
    text = f"{platform.python_version()}, {platform.system()} {platform.machine()}"
    old = sys.version_info < (3, 11)
    remedy = "install Python 3.11 or newer and make a new environment" if old else ""
    yield Finding("python", PROBLEM if old else OK, text, remedy)


def _torch(about: Subject) -> Iterator[Finding]:
    device = about.config.device
    found = probe.ask("torch", device=device)
    if "error" in found:
        yield Finding(
            "torch",
            PROBLEM,
            f"can't be imported: {found['error']}",
            "install it again: pip install --force-reinstall torch",
        )
        return
    text = f"{found['version']}, {found['threads']} threads"
    if not found["muon"]:
        yield Finding("torch", PROBLEM, f"{text}: too old", "pip install 'torch>=2.9'")
        return
    yield Finding("torch", OK, text)
    if not found["works"]:
        yield Finding(
            "device",
            PROBLEM,
            f"{found['device']} does not work: {found.get('why', 'wrong result')}",
            "use --device cpu, or a torch build and driver that fit each other",
        )
        return
    names = ", ".join(found["cuda"])
    yield Finding("device", OK, f"{found['device']} works" + (f" ({names})" if names else ""))
    if not found["cuda"] and Path("/proc/driver/nvidia/version").exists():
        why = "a build without CUDA" if not found["cuda_build"] else "the driver may be too old"
        yield Finding(
            "device",
            WARNING,
            f"there is an NVIDIA driver but torch sees no GPU: {why}",
            "install a torch build for your CUDA version, or update the driver",
        )


def _disk(about: Subject) -> Iterator[Finding]:
    place = about.directory
    while not place.exists():
        place = place.parent
    if not os.access(place, os.W_OK | os.X_OK):
        yield Finding(
            "disk", PROBLEM, f"{place} can't be written", "choose another directory with --dir"
        )
        return
    free, wanted = shutil.disk_usage(place).free, about.config.preset().log_bytes
    text = f"{_size(free)} free in {place}"
    if free < DISK_LEAST:
        yield Finding("disk", PROBLEM, text, "make room, or keep the run elsewhere with --dir")
    elif free < wanted:
        yield Finding(
            "disk",
            WARNING,
            f"{text}; the log may grow to {_size(wanted)}",
            f"make room, or set log_gigabytes = {max(1, free // 2 >> 30)} in node.toml",
        )
    else:
        yield Finding("disk", OK, text)


def _memory(about: Subject) -> Iterator[Finding]:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        available = next(int(x.split()[1]) * 1024 for x in lines if x.startswith("MemAvailable"))
    except (OSError, StopIteration, ValueError):
        return  # not Linux
    text = f"{_size(available)} available, {os.cpu_count()} cores"
    if available < DISK_LEAST:
        yield Finding("memory", WARNING, text, "stop other programs: torch alone needs about 1 GiB")
    else:
        yield Finding("memory", OK, text)


def _files(about: Subject) -> Iterator[Finding]:
    try:
        import resource
    except ImportError:
        return  # Windows has no such limit
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    text = f"{soft} files may be open"
    if soft in (resource.RLIM_INFINITY, -1) or soft >= OPEN_FILES:
        yield Finding("files", OK, text)
        return
    room = hard in (resource.RLIM_INFINITY, -1) or hard >= OPEN_FILES
    remedy = f"ulimit -n {OPEN_FILES}" if room else "raise nofile in /etc/security/limits.conf"
    yield Finding("files", PROBLEM if soft < OPEN_FILES_LEAST else WARNING, text, remedy)


# ---------------------------------------------------------------- the network


def _port(about: Subject) -> Iterator[Finding]:
    host, port = addresses.parse_listen(about.config.listen or f":{addresses.PORT}")
    if port == 0:
        yield Finding("port", OK, "any free one")
        return
    where = addresses.socket_text(host or "0.0.0.0", port)
    refusal = _bind(host, port)
    if refusal is None:
        yield Finding("port", OK, f"{where} is free")
    elif _own_daemon(about.directory):
        yield Finding("port", OK, f"{where} is held by this run's daemon")
    elif refusal == errno.EADDRINUSE:
        yield Finding(
            "port",
            PROBLEM,
            f"{where} is in use",
            f"stop what listens there, or choose another: --listen :{port + 1}",
        )
    elif refusal == errno.EACCES:
        yield Finding("port", PROBLEM, f"{where} needs root", "choose one above 1023: --listen")
    else:
        yield Finding(
            "port",
            PROBLEM,
            f"{where}: {os.strerror(refusal)}",
            "use an address of this machine, or leave --listen away for all",
        )


def _bind(host: str, port: int) -> int | None:
    """Return why the port can't be listened on."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe_socket:
        # As servers do: what merely lingers after a connection does not count.
        probe_socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe_socket.bind((host, port))
            probe_socket.listen(1)
        except OSError as error:
            return error.errno or errno.EADDRNOTAVAIL
    return None


def _own_daemon(directory: Path) -> bool:
    try:
        return client.connect_if_running(directory) is not None
    except ConfigError:
        return False


def _addresses(about: Subject) -> Iterator[Finding]:
    host, port = addresses.parse_listen(about.config.listen or f":{addresses.PORT}")
    if about.config.advertise:
        for text in about.config.advertise:
            addresses.parse(text)
        yield Finding("addresses", OK, f"others are told {', '.join(about.config.advertise)}")
        return
    mine = [a.host for a in addresses.own(host, port or addresses.PORT)]
    text = ", ".join(mine)
    if all(ip.startswith("127.") or ip == "::1" for ip in mine):
        yield Finding(
            "addresses",
            WARNING,
            f"only loopback ({text}): nobody on another machine can reach this one",
            "join a network, or say how to be reached: --advertise /dns4/…/tcp/…",
        )
    else:
        yield Finding("addresses", OK, text)


def _libp2p(about: Subject) -> Iterator[Finding]:
    state = (found := probe.ask("libp2p")).get("state") or f"failed: {found.get('error')}"
    if state == "running":
        yield Finding(
            "libp2p", OK, "installed and starts: peers find each other on a local network"
        )
        return
    what, _, remedy = state.partition("; ")
    yield Finding(
        "libp2p",
        WARNING,
        what,
        (remedy if "pip" in remedy else "pip install --force-reinstall 'shoal[libp2p]'")
        + " (without it peers are found by address only; it needs a C compiler and GMP headers)",
    )


# ---------------------------------------------------------------- the directory and the run


def _identity(about: Subject) -> Iterator[Finding]:
    named = about.config.identity
    path = Path(named) if named else about.directory / "identity.key"
    if not path.exists():
        if named:
            yield Finding("identity", PROBLEM, f"{path} does not exist", "name a file that does")
        return
    yield Finding("identity", OK, f"{identity.load(path)} in {path}")


def _directory(about: Subject) -> Iterator[Finding]:
    held = about.directory / "genesis"
    if not held.exists():
        return
    run = genesis.load(held, Limits())
    text = f"{about.directory} holds run {run.run_file.run.name} ({run.run_id.hex()[:12]})"
    if _own_daemon(about.directory):
        yield Finding("directory", OK, f"{text}; its daemon answers")
        return
    with Home(about.directory):  # raises when a daemon holds it that does not answer
        yield Finding("directory", OK, f"{text}; no daemon runs")


def _run(about: Subject) -> tuple[list[Finding], Estimate | None]:
    assert about.run is not None
    config = about.config
    peers = about.peers or max(2, int(about.run["swarm"].get("min_peers", 1)))
    found = probe.ask(
        "run",
        tables=about.run,
        members=peers,
        data=config.data,
        base=config.base,
        device=config.device,
        device_memory=parse_size(config.device_memory),
        allow_task=config.allow_task,
    )
    if "error" in found:
        return [Finding("run", PROBLEM, found["error"])], None
    estimate = estimated(found, peers)
    findings = [Finding("run", OK, describe(estimate))]
    if peers > Limits().ledger_members:
        findings.append(
            Finding(
                "run",
                PROBLEM,
                f"a ledger run has at most {Limits().ledger_members} members, not {peers}",
                "use several smaller runs (mode = 'mixing' will be for more)",
            )
        )
    if 0 < (quorum := found.get("quorum", 0)) < QUORUM:
        findings.append(
            Finding(
                "run",
                WARNING,
                f"the turn rule's quorum is {quorum}: a single peer can move the model in turns "
                "that the others have not reached",
                "set swarm.min_peers to as many peers as there will be, or exchange.rule.quorum to "
                f"{QUORUM} or more",
            )
        )
    if estimate.decoding > DECODING:
        findings.append(
            Finding(
                "run",
                WARNING,
                f"applying the others' updates takes {estimate.decoding:.0%} of each turn",
                "use longer turns (local.steps) or sparse updates",
            )
        )
    return findings, estimate


def estimated(found: dict[str, Any], peers: int) -> Estimate:
    """Work out a swarm of `peers` from what a trial turn measured."""
    step, steps = max(found["step_seconds"], 1e-6), found["steps"]
    others = peers - 1
    publishing = others * found["participation"]
    applying = publishing * found["apply_seconds"]
    turn = steps * step + found["encode_seconds"] + applying
    gradients = 2 * others / peers * 4 * found["parameters"] * steps
    per_turn = publishing * (found["payload"] + RECORD_BYTES)
    return Estimate(
        peers=peers,
        parameters=found["parameters"],
        kind=found["kind"],
        payload=found["payload"],
        turn_seconds=turn,
        steps=steps,
        received_per_second=per_turn / turn,
        decoding=applying / turn,
        all_reduce=gradients / per_turn,
    )


def describe(estimate: Estimate) -> str:
    """Return an estimate in one line."""
    rate = estimate.received_per_second
    mean = " on average" if " or " in estimate.kind else ""
    return (
        f"{estimate.parameters:,} parameters, {estimate.peers} peers: a {estimate.kind} update of "
        f"{_size(estimate.payload)}{mean} every {estimate.turn_seconds:.1f} s "
        f"({estimate.steps} steps); each peer receives and sends about {_size(rate)}/s "
        f"({8e-6 * rate:.2f} Mbit/s), "
        f"{estimate.all_reduce:.0f} times below gradient all-reduce; applying takes "
        f"{estimate.decoding:.1%} of the time"
    )


def to_json(findings: list[Finding], estimate: Estimate | None) -> str:
    """Return the report as one JSON object."""
    return json.dumps(
        {
            "ok": not any(f.state == PROBLEM for f in findings),
            "findings": [asdict(f) for f in findings],
            "estimate": None if estimate is None else asdict(estimate),
        }
    )


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


CHECKS: tuple[Callable[[Subject], Iterator[Finding]], ...] = (
    _python,
    _torch,
    _memory,
    _disk,
    _files,
    _port,
    _addresses,
    _libp2p,
    _identity,
    _directory,
)
