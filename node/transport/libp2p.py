"""Finding peers with libp2p: mDNS on the local network and rendezvous by run. Hints, never links.

The only file that knows libp2p and trio. `Finder` runs them in one thread of its own, starts them
again when they fail, and hands what it found to the asyncio loop; without libp2p its `state` says
so and nothing else changes.

What is found is a libp2p address. Two peers then prove to each other, inside libp2p's encrypted
and authenticated channel (noise; plaintext is not offered), that they know the seed of the same
swarm's CA, and only then tell each other where their gRPC listens (`CONTACT`). So neither a
stranger on the local network nor a lying DHT node makes a hint, and strangers learn no gRPC
address from us. A hint still proves nothing about being alive: provider records live for days.

libp2p only finds. Nobody is asked again who has answered, unless links are missing; connections
are closed once nothing is said on them (so none needs pings); and a DHT of nothing but our own run
is left alone. A daemon that has its links thus costs a few bytes a second.
"""

import asyncio
import base64
import hmac
import ipaddress
import json
import logging
import math
import random
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import blake2b, sha256
from importlib import import_module
from typing import Any

from shoal.gossip.names import PeerId
from shoal.node.addresses import machine

log = logging.getLogger(__name__)

CONTACT = "/shoal/contact/1"
"""Asker: 32 bytes proof. Answerer: 32 bytes proof, u32 length, JSON {addresses, contact}."""

MISSING = "off: libp2p is not installed; pip install 'shoal[libp2p]'"

# An Ed25519 peer id is the identity multihash of the key's protobuf (libp2p peer-id specification).
_ED25519 = bytes.fromhex("002408011220")


@dataclass(frozen=True, slots=True)
class Hint:
    """Somebody of this run may be reached here. Whoever dials checks the peer id."""

    peer: PeerId
    addresses: tuple[str, ...]
    """gRPC multiaddrs without the trailing /p2p part."""
    contact: bytes
    """What the peer's daemon passed to `announce`; opaque here."""
    source: str
    """`mdns`, `rendezvous` or `bootstrap`."""
    libp2p: str
    """The libp2p multiaddr that answered, with /p2p: worth remembering for `bootstrap`."""


@dataclass(frozen=True, slots=True)
class FinderLimits:
    """Every bound of the finder. Durations are float seconds."""

    hints: int = 256
    """Hints waiting for the daemon; beyond it the oldest is dropped."""
    candidates: int = 1024
    """Peers found and not yet (or not lately) asked; beyond it the longest unseen is dropped."""
    bootstrap: int = 32
    """libp2p addresses dialled to enter the DHT."""
    addresses: int = 16
    """Addresses of one peer that are tried, and gRPC addresses taken from one answer."""
    address_bytes: int = 256
    contact_bytes: int = 16 << 10
    """Largest contact record told or taken."""
    asking: int = 8
    """Peers asked at the same time."""
    answering: int = 32
    """Peers answered at the same time; more are turned away."""
    ask_timeout: float = 10.0
    """For one address: dialling, proving, answering."""
    retry: float = 3.0
    """First pause after a failed ask, and after entering the DHT failed; doubles up to the next."""
    retry_max: float = 3600.0
    connections: int = 64
    """libp2p connections kept; more are pruned."""
    keep_connections: int = 8
    """After asking, a connection is closed at once when more than this are open."""
    linger: float = 10.0
    """A connection on which nothing was said for so long is closed."""
    longest: float = 120.0
    """No connection is older, whatever is said on it."""
    entries: int = 4
    """Bootstrap addresses in use at the same time: one would do if it never failed."""
    rendezvous: float = 2.0
    """First pause between two rounds of providing and looking up; triples up to the next."""
    rendezvous_max: float = 3600.0
    """Provider records live for 48 h, but the peers that hold them do not."""
    provider_keys: int = 2048
    """Keys of which we hold provider records for others."""
    interfaces: float = 15.0
    """How often the machine's own addresses are looked at; a change restarts mDNS."""
    restart: float = 2.0
    """Pause before libp2p is started again after a failure; doubles up to `restart_max`."""
    restart_max: float = 300.0


@dataclass(frozen=True, slots=True)
class FinderSettings:
    """Who we are, in which swarm, and what may be used to find others."""

    identity: bytes = field(repr=False)
    """The raw 32-byte Ed25519 private key."""
    seed: bytes = field(repr=False)
    """The seed of the swarm CA's key (design 6): scopes mDNS, the rendezvous key and the proofs."""
    port: int | None = 0
    """libp2p's own TCP port; 0 takes any free one; None: no libp2p at all."""
    mdns: bool = True
    rendezvous: bool = True
    advertise: tuple[str, ...] = ()
    """libp2p multiaddrs told to others; default: every non-loopback address of the machine."""
    limits: FinderLimits = FinderLimits()


class Candidates:
    """Peers that were found and when to ask them. No I/O; bounded; the clock is an argument."""

    def __init__(self, limits: FinderLimits, rng: random.Random) -> None:
        self._limits, self._rng = limits, rng
        self._known: OrderedDict[bytes, _Candidate] = OrderedDict()

    def __len__(self) -> int:
        return len(self._known)

    def found(
        self,
        peer: bytes,
        addresses: Iterable[str],
        source: str,
        now: float,
        *,
        anew: bool = False,
    ) -> None:
        """Take in that `peer` was seen; new addresses, or another life, make it due at once."""
        told = tuple(dict.fromkeys(addresses))[: self._limits.addresses]
        old = self._known.pop(peer, None)
        if not told:
            told = old.addresses if old else ()
        if old is None or set(told) - set(old.addresses):
            old = _Candidate(told, source, due=now)
        old.addresses = told
        if anew:
            old.due = min(old.due, now)
        self._known[peer] = old
        while len(self._known) > self._limits.candidates:
            self._known.popitem(last=False)

    def due(self, now: float) -> list[tuple[bytes, tuple[str, ...], str]]:
        """Return at most `limits.asking` peers to ask now, those waiting longest first."""
        ready = [(c.due, peer) for peer, c in self._known.items() if c.due <= now and not c.asked]
        chosen = sorted(ready)[: self._limits.asking]
        for _, peer in chosen:
            self._known[peer].asked = True
        return [(p, self._known[p].addresses, self._known[p].source) for _, p in chosen]

    def settle(self, peer: bytes, answered: bool, now: float) -> None:
        """Note how asking `peer` went: when to ask next."""
        if (candidate := self._known.get(peer)) is None:
            return
        candidate.asked, candidate.answered = False, answered
        if answered:
            candidate.failures, candidate.due = 0, math.inf
        else:
            pause = self._limits.retry * 2 ** min(candidate.failures, 20)
            candidate.failures += 1
            candidate.due = now + min(pause, self._limits.retry_max) * self._rng.uniform(0.75, 1.0)

    def answered(self, peer: bytes) -> bool:
        """Tell whether `peer` is of our run: it proved so when it was asked last."""
        candidate = self._known.get(peer)
        return candidate is not None and candidate.answered

    def hurry(self, linked: Collection[bytes], now: float) -> None:
        """Make everybody due but `linked`: the daemon has too few links."""
        for peer, candidate in self._known.items():
            if peer not in linked:
                candidate.due = min(candidate.due, now)


@dataclass(slots=True)
class _Candidate:
    addresses: tuple[str, ...]
    source: str
    due: float
    failures: int = 0
    asked: bool = False
    answered: bool = False


class Finder:
    """libp2p in a thread of its own. All methods are called on the asyncio loop's thread.

    `state` is "off", "off: …", "starting", "running" or "failed: …" – one line for `/status`.
    """

    def __init__(self, settings: FinderSettings) -> None:
        if len(settings.seed) < 16:
            raise ValueError("the seed that scopes a swarm must have at least 16 bytes")
        self.settings = settings
        self.hints: asyncio.Queue[Hint] = asyncio.Queue(settings.limits.hints)
        self.state = "off: not started"
        self.addresses: tuple[str, ...] = ()
        """Own libp2p multiaddrs with /p2p while running: others may bootstrap from them."""
        self.counts: dict[str, int] = {}
        """found, connected, routing: sizes for `/status`."""
        self._shared = threading.Lock()
        self._answer: bytes | None = None
        self._bootstrap: tuple[str, ...] = ()
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        self._host: _Host | None = None
        # Counts hints between the thread and the loop, so that a loop that hangs costs no memory.
        self._room = threading.BoundedSemaphore(settings.limits.hints)

    def start(self) -> None:
        """Start the thread; returns at once. Must be called with a running asyncio loop."""
        if self._thread is not None:
            raise RuntimeError("a Finder starts once")
        if self.settings.port is None:
            self.state = "off"
            return
        loop = asyncio.get_running_loop()
        self.state = "starting"
        self._thread = threading.Thread(
            target=self._supervise, args=(loop,), name="libp2p", daemon=True
        )
        self._thread.start()

    async def stop(self, timeout: float = 5.0) -> None:
        """Leave the DHT and the local network; give up waiting after `timeout`."""
        self._stopping.set()
        self._nudge()
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join, timeout)
        self.state, self.addresses = "off: stopped", ()

    def announce(self, addresses: Sequence[str], contact: bytes = b"") -> None:
        """Tell peers of this swarm from now on that our gRPC listens at `addresses`."""
        answer = _pack(tuple(addresses), contact, self.settings.limits)
        with self._shared:
            self._answer = answer
        self._nudge()

    def bootstrap(self, addresses: Sequence[str]) -> None:
        """Enter the DHT through these libp2p multiaddrs (with /p2p); replaces earlier ones."""
        with self._shared:
            self._bootstrap = tuple(addresses)[: self.settings.limits.bootstrap]
        self._nudge(_Host.look)

    def hurry(self, linked: Iterable[PeerId] = ()) -> None:
        """Look again now: the daemon has fewer links than it wants. `linked` need not be asked."""
        names = frozenset(_ED25519 + peer for peer in linked)
        self._nudge(lambda host: host.hurry(names))

    # ------------------------------------------------------------ the thread

    def _nudge(self, then: "Callable[[_Host], None]" = lambda host: None) -> None:
        """Let the thread look at what changed, after it has done `then`."""
        if (host := self._host) is not None:
            host.nudge(then)

    def _supervise(self, loop: asyncio.AbstractEventLoop) -> None:
        limits = self.settings.limits
        pause = limits.restart
        while not self._stopping.is_set():
            began = time.monotonic()
            try:
                self._run(loop)
                return
            except ImportError as error:
                # Also a shared library that is missing: nothing that trying again would mend.
                gone = isinstance(error, ModuleNotFoundError)
                self.state = MISSING if gone else f"off: libp2p cannot be imported: {error}"
                log.warning("libp2p is off", extra={"reason": self.state})
                return
            except Exception as error:  # libp2p is a guest: whatever it raises ends only itself
                if time.monotonic() - began > limits.restart_max:
                    pause = limits.restart
                reason = _innermost(error)
                self.state = f"failed: {reason}; starting again in {pause:.0f} s"
                log.warning("libp2p failed", extra={"reason": reason, "pause": pause})
            finally:
                self._host, self.addresses, self.counts = None, (), {}
            self._stopping.wait(pause * random.uniform(0.8, 1.2))
            pause = min(2 * pause, limits.restart_max)

    def _run(self, loop: asyncio.AbstractEventLoop) -> None:
        for module in ("trio", "zeroconf", "libp2p"):
            import_module(module)
        # Its own warnings are about strangers' broken connections; ours say what matters.
        logging.getLogger("libp2p").setLevel(logging.CRITICAL)
        self._host = _Host(self, lambda hint: self._hand_over(loop, hint))
        import_module("trio").run(self._host.main)

    def _hand_over(self, loop: asyncio.AbstractEventLoop, hint: Hint) -> None:
        if not self._room.acquire(blocking=False):
            return
        try:
            loop.call_soon_threadsafe(self._deliver, hint)
        except RuntimeError:  # the loop is closed: the daemon is going down
            self._room.release()

    def _deliver(self, hint: Hint) -> None:
        self._room.release()
        if self.hints.full():
            self.hints.get_nowait()
        self.hints.put_nowait(hint)


class _Host:
    """One life of the libp2p host; everything here runs on trio in the finder's thread."""

    def __init__(self, finder: Finder, hand_over: Callable[[Hint], None]) -> None:
        self.finder, self.settings = finder, finder.settings
        self.limits = finder.settings.limits
        self.hand_over = hand_over
        self.look_now = False
        self.candidates = Candidates(self.limits, random.Random())
        self.answering = 0
        self.token: Any = None
        self.wake: Any = None

    def nudge(self, then: "Callable[[_Host], None]") -> None:
        """Do `then` and look at what the asyncio side changed. Called from its thread."""
        trio = import_module("trio")

        def woken() -> None:
            then(self)
            self.wake.set()
            self.wake = trio.Event()

        if self.token is not None:
            with _ignored(trio.RunFinishedError):
                self.token.run_sync_soon(woken)

    def look(self) -> None:
        """Begin the next round in the DHT now."""
        self.look_now = True

    def hurry(self, linked: Collection[bytes]) -> None:
        """Ask everybody again but `linked`, and look for more."""
        self.candidates.hurry(linked, import_module("trio").current_time())
        self.look()

    async def main(self) -> None:
        import trio
        from multiaddr import Multiaddr

        self.wake = trio.Event()
        self.token = trio.lowlevel.current_trio_token()
        self.host, self.dht = self._build()
        self.me = bytes(self.host.get_id().to_bytes())
        listen = [Multiaddr(f"/ip4/0.0.0.0/tcp/{self.settings.port}")]
        async with self.host.run(listen_addrs=listen):
            if not self.host.get_transport_addrs():
                raise OSError(f"libp2p cannot listen on TCP port {self.settings.port}")
            # It would dial everybody it ever heard of until half of `connections` are open.
            await self.host.get_network().auto_connector.stop()
            # The DHT itself is not run: its hourly and ten-minute rounds would ask everybody it
            # knows. What little they do for us, `_meet` and `_keep_house` do.
            async with trio.open_nursery() as nursery:
                self.host.set_stream_handler(CONTACT, self._on_contact)
                nursery.start_soon(self.host.get_peerstore().start_cleanup_task, 300)
                nursery.start_soon(self._keep_house)
                nursery.start_soon(self._ask_all, nursery)
                nursery.start_soon(self._meet)
                if self.settings.mdns:
                    nursery.start_soon(self._see_neighbours)
                self.finder.state = "running"
                own = [str(address) for address in self.host.get_addrs()]
                log.info("libp2p listens", extra={"addresses": " ".join(own[:4])})
                while not self.finder._stopping.is_set():
                    await self._rest(5.0)
                with trio.move_on_after(1):  # libp2p itself would leave these to the collector
                    for peer in self.host.get_connected_peers():
                        await self.host.get_network().close_peer(peer)
                nursery.cancel_scope.cancel()

    def _build(self) -> tuple[Any, Any]:
        """Make the host and its DHT. Each argument is there because its default is not for us."""
        from libp2p import create_yamux_muxer_option, new_host
        from libp2p.crypto.ed25519 import create_new_key_pair
        from libp2p.crypto.x25519 import create_new_key_pair as new_noise_key
        from libp2p.kad_dht.kad_dht import DHTMode, KadDHT
        from libp2p.network.config import ConnectionConfig
        from libp2p.records.validator import NamespacedValidator
        from libp2p.security.noise.transport import PROTOCOL_ID as NOISE
        from libp2p.security.noise.transport import Transport

        key = create_new_key_pair(self.settings.identity)
        host: Any = new_host(
            key_pair=key,
            # The default also accepts plaintext.
            sec_opt={NOISE: Transport(key, noise_privkey=new_noise_key().private_key)},
            muxer_opt=create_yamux_muxer_option(),
            addrs_factory=self._advertised,
            # What strangers claim to see of us would be told on to others.
            disable_identify_address_discovery=True,
            connection_config=ConnectionConfig(
                max_connections=2 * self.limits.connections,
                min_connections=0,
                low_watermark=0,
                high_watermark=self.limits.connections,
                max_connections_per_peer=2,
                dial_timeout=self.limits.ask_timeout / 2,
                # A ping costs a kilobyte each way; `_close_idle` lets no connection grow old.
                enable_health_monitoring=False,
            ),
        )
        host.get_network().retry_config.max_retries = 0  # `Candidates` decides about trying again
        dht = KadDHT(
            host,
            DHTMode.SERVER,
            # No namespace is valid: we use provider records, and nobody stores values with us.
            validator=NamespacedValidator({}, strict_validation=True),
            validator_changed=True,
            strict_validation=True,
        )
        return host, dht

    def _advertised(self, listening: Sequence[Any]) -> list[Any]:
        """Replace the wildcard by the machine's own addresses, private ones included."""
        from multiaddr import Multiaddr

        if self.settings.advertise:
            return [Multiaddr(a.split("/p2p/")[0]) for a in self.settings.advertise]
        ports = {str(a.value_for_protocol("tcp")) for a in listening}
        return [Multiaddr(f"/ip4/{ip}/tcp/{p}") for ip in own_addresses() for p in sorted(ports)]

    async def _rest(self, seconds: float) -> None:
        """Sleep, but no longer than until the asyncio side wants something."""
        import trio

        wake = self.wake
        with trio.move_on_after(seconds):
            await wake.wait()

    async def _keep_house(self) -> None:
        """Keep bounds that libp2p does not keep, and the numbers on `/status`."""
        ages: dict[Any, tuple[float, float]] = {}
        while True:
            self.dht.provider_store.cleanup_expired()
            providers = self.dht.provider_store.providers
            for key in list(providers)[: max(0, len(providers) - self.limits.provider_keys)]:
                del providers[key]
            await self._close_idle(ages)
            self.finder.addresses = tuple(str(a) for a in self.host.get_addrs())
            self.finder.counts = {
                "found": len(self.candidates),
                "connected": len(self.host.get_connected_peers()),
                "routing": self.dht.get_routing_table_size(),
            }
            await self._rest(2.0)

    async def _close_idle(self, ages: dict[Any, tuple[float, float]]) -> None:
        """Close connections on which nothing is said. `ages`: opened, and last seen in use."""
        import trio

        network, now = self.host.get_network(), trio.current_time()
        connected = self.host.get_connected_peers()
        for gone in ages.keys() - set(connected):
            del ages[gone]
        for peer in connected:
            opened, used = ages.get(peer, (now, now))
            if any(connection.get_streams() for connection in network.get_connections(peer)):
                used = now
            ages[peer] = opened, used
            if now - used >= self.limits.linger or now - opened >= self.limits.longest:
                with trio.move_on_after(1), _ignored(Exception):
                    await network.close_peer(peer)

    # ------------------------------------------------------------ asking and answering

    async def _ask_all(self, nursery: Any) -> None:
        import trio

        busy = trio.CapacityLimiter(self.limits.asking)

        async def ask(peer: bytes, addresses: tuple[str, ...], source: str) -> None:
            async with busy:
                hint = None
                for address in addresses:
                    with trio.move_on_after(self.limits.ask_timeout):
                        hint = await self._ask(peer, address, source)
                    if hint is not None:
                        self.hand_over(hint)
                        break
                    await self._give_up(peer)
                self.candidates.settle(peer, hint is not None, trio.current_time())

        while True:
            if busy.available_tokens:
                for found in self.candidates.due(trio.current_time()):
                    nursery.start_soon(ask, *found)
            await trio.sleep(0.25)

    async def _ask(self, peer: bytes, address: str, source: str) -> Hint | None:
        """Dial one address, prove ourselves, and read where the peer's gRPC listens."""
        from libp2p.io.utils import read_exactly
        from libp2p.peer.id import ID

        network, other = self.host.get_network(), ID(peer)
        try:
            if not await self._connect(other, address):
                return None
            stream = await self.host.new_stream(other, [CONTACT])
            try:
                await stream.write(proof(self.settings.seed, self.me, peer))
                theirs = bytes(await read_exactly(stream, 32))
                if not hmac.compare_digest(theirs, proof(self.settings.seed, peer, self.me)):
                    return None
                size = int.from_bytes(await read_exactly(stream, 4), "big")
                if size > 2 * self.limits.contact_bytes:
                    return None
                told = _unpack(bytes(await read_exactly(stream, size)), self.limits)
            finally:
                await stream.close()
            if len(self.host.get_connected_peers()) > self.limits.keep_connections:
                await network.close_peer(other)
        except Exception as error:  # strangers' bytes and libp2p's many error classes
            log.debug("asking failed", extra={"address": address, "reason": _innermost(error)})
            return None
        if told is None:
            return None
        with_id = f"{address}/p2p/{other}"
        return Hint(_key(peer), told[0], told[1], source, with_id)

    async def _give_up(self, peer: bytes) -> None:
        """Close what may be a connection to nobody, so that the next ask dials anew."""
        import trio
        from libp2p.peer.id import ID

        with trio.move_on_after(1), _ignored(Exception):
            await self.host.get_network().close_peer(ID(peer))

    async def _connect(self, other: Any, address: str) -> bool:
        """Dial exactly this address: the swarm itself would try only the first of a peer."""
        from multiaddr import Multiaddr

        network = self.host.get_network()
        if other not in self.host.get_connected_peers():
            network.unblock_peer(other)  # one failure would forbid every address for a minute
            self.host.get_peerstore().add_addrs(other, [Multiaddr(address)], 7200)
            await network.dial_addr(Multiaddr(address), other)
        return other in self.host.get_connected_peers()

    async def _on_contact(self, stream: Any) -> None:
        """Answer a peer that proves to be of our swarm; close on everybody else."""
        import trio
        from libp2p.io.utils import read_exactly

        peer = bytes(stream.muxed_conn.peer_id.to_bytes())
        with self.finder._shared:
            answer = self.finder._answer
        if answer is None or self.answering >= self.limits.answering:
            await stream.reset()
            return
        self.answering += 1
        try:
            with trio.fail_after(self.limits.ask_timeout):
                theirs = bytes(await read_exactly(stream, 32))
                if not hmac.compare_digest(theirs, proof(self.settings.seed, peer, self.me)):
                    await stream.reset()
                    return
                mine = proof(self.settings.seed, self.me, peer)
                await stream.write(mine + len(answer).to_bytes(4, "big") + answer)
                await stream.close()
        except Exception as error:  # as in `_ask`
            log.debug("answering failed", extra={"reason": _innermost(error)})
            await stream.reset()
        finally:
            self.answering -= 1

    # ------------------------------------------------------------ the DHT

    async def _meet(self) -> None:
        """Enter the DHT; say there that we provide the run's key, and look who else does.

        Rounds are frequent at first, when everybody starts, then rare; `look` asks for one now.
        """
        import trio

        failed, pause = 0, self.limits.rendezvous
        while True:
            self.look_now = False
            await self._enter_dht()
            if useful := bool(self._strangers()):
                rest, pause = pause, min(3 * pause, self.limits.rendezvous_max)
                failed = 0
            else:
                rest = min(self.limits.retry * 2**failed, self.limits.retry_max)
                failed = min(failed + 1, 20)
            if useful and self.settings.rendezvous:
                with trio.move_on_after(60):
                    await self._one_round(rendezvous_key(self.settings.seed))
            until = trio.current_time() + rest * random.uniform(0.75, 1.0)
            while trio.current_time() < until and not self.look_now:
                if not useful and self._strangers():
                    break  # somebody else entered through us
                await self._rest(min(1.0, max(0.0, until - trio.current_time())))

    async def _one_round(self, key: bytes) -> None:
        try:
            await self.dht.provider_store.provide(key)
            await self._look_up(key)
        except Exception as error:  # as in `_ask`
            log.debug("rendezvous failed", extra={"reason": _innermost(error)})

    def _strangers(self) -> list[Any]:
        """Return the DHT's nodes that are not of our run: those of it need no DHT to be found."""
        routes = self.dht.routing_table.get_peer_ids()
        return [peer for peer in routes if not self.candidates.answered(bytes(peer.to_bytes()))]

    async def _enter_dht(self) -> None:
        """Connect to some bootstrap addresses; they may be of our run or of any other."""
        import trio
        from libp2p.peer.id import ID

        with self.finder._shared:
            wanted = self.finder._bootstrap
        entries = 0
        for address in wanted:
            if entries >= self.limits.entries:
                return
            where, _, name = address.rpartition("/p2p/")
            try:
                other = ID.from_string(name)
                peer = bytes(other.to_bytes())
                if other == self.host.get_id() or self.candidates.answered(peer):
                    continue
                for ip in await _resolved(where):
                    with trio.move_on_after(self.limits.ask_timeout):
                        if await self._connect(other, ip):
                            await self.dht.add_peer(other)
                            self.candidates.found(peer, [ip], "bootstrap", trio.current_time())
                            entries += 1
                            break
            except Exception as error:  # as in `_ask`
                reason = _innermost(error)
                log.debug("bootstrap failed", extra={"address": address, "reason": reason})

    async def _look_up(self, key: bytes) -> None:
        import trio

        store = self.dht.provider_store
        # find_providers asks nobody when it holds a record itself – and it always holds our own.
        held = store.providers.pop(key, {})
        try:
            found = await store.find_providers(key, self.limits.candidates)
        finally:
            store.providers[key] = {**store.providers.get(key, {}), **held}
        for info in [*found, *(record.provider_info for record in held.values())]:
            peer = bytes(info.peer_id.to_bytes())
            if peer != self.me and _is_ed25519(peer):
                addresses = [str(a).split("/p2p/")[0] for a in info.addrs]
                self.candidates.found(peer, addresses, "rendezvous", trio.current_time())

    # ------------------------------------------------------------ mDNS

    async def _see_neighbours(self) -> None:
        """Announce us on the local network and take in who else does, by the libp2p mDNS form."""
        import trio

        while True:
            own = own_addresses()
            try:
                await self._neighbours_on(own)
            except OSError as error:  # no multicast here (a container, a VPN): look again later
                log.warning("mDNS is off for a minute", extra={"reason": _innermost(error)})
                await trio.sleep(60)

    async def _neighbours_on(self, own: tuple[str, ...]) -> None:
        import trio
        from zeroconf import IPVersion, ServiceBrowser, ServiceInfo, ServiceStateChange, Zeroconf

        kind = mdns_type(self.settings.seed)
        # A new name for every life: after a restart nobody is answered from a cache.
        name = f"{random.getrandbits(128):032x}"
        port = int(self.host.get_transport_addrs()[0].value_for_protocol("tcp"))
        addresses = [str(a) for a in self.host.get_addrs()][: self.limits.addresses]
        info = ServiceInfo(
            kind,
            f"{name}.{kind}",
            port=port,
            properties={f"dnsaddr{i or ''}": a for i, a in enumerate(addresses)},
            server=f"{name}.local.",
            addresses=[ipaddress.ip_address(ip).packed for ip in own],
        )
        seen, names = trio.open_memory_channel[tuple[str, bool]](self.limits.candidates)

        def changed(*, name: str, state_change: object, **_: object) -> None:
            if state_change is ServiceStateChange.Removed:
                return
            # Renewed records are an update, another life is an addition.
            anew = state_change is ServiceStateChange.Added
            with _ignored(trio.RunFinishedError):  # on zeroconf's thread
                self.token.run_sync_soon(offer, name, anew)

        def offer(name: str, anew: bool) -> None:
            with _ignored(trio.WouldBlock):
                seen.send_nowait((name, anew))

        network = await _in_thread(
            lambda: Zeroconf(interfaces=list(own), ip_version=IPVersion.V4Only)
        )
        try:
            ServiceBrowser(network, kind, handlers=[changed])
            await _in_thread(lambda: network.register_service(info))
            looked = trio.current_time()
            while True:
                with trio.move_on_after(self.limits.interfaces):
                    name, anew = await names.receive()
                    if name != info.name:
                        await self._take_in(network, kind, name, anew)
                if trio.current_time() - looked > self.limits.interfaces:
                    looked = trio.current_time()
                    if own_addresses() != own:
                        return
        finally:
            with trio.CancelScope(shield=True), trio.move_on_after(2):
                await _in_thread(network.close)

    async def _take_in(self, network: Any, kind: str, name: str, anew: bool) -> None:
        import trio

        info = await _in_thread(lambda: network.get_service_info(kind, name, timeout=2000))
        if info is None:
            return
        by_peer: dict[bytes, list[str]] = {}
        for label, value in info.properties.items():
            if label.startswith(b"dnsaddr") and value and len(value) <= self.limits.address_bytes:
                where, _, peer = value.decode("ascii", "replace").rpartition("/p2p/")
                if (key := _peer_bytes(peer)) is not None and where.isprintable():
                    by_peer.setdefault(key, []).append(where)
        for peer_id, addresses in list(by_peer.items())[:1]:
            if peer_id != self.me:
                now = trio.current_time()
                self.candidates.found(peer_id, addresses, "mdns", now, anew=anew)


# ---------------------------------------------------------------- values, no libp2p needed


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


def own_addresses() -> tuple[str, ...]:
    """Return the machine's IPv4 addresses, loopback only when there is nothing else."""
    found = [ip for ip in machine() if "." in ip]
    outside = sorted(ip for ip in found if not ipaddress.ip_address(ip).is_loopback)
    return tuple(outside) or ("127.0.0.1",)


def _pack(addresses: tuple[str, ...], contact: bytes, limits: FinderLimits) -> bytes:
    if len(contact) > limits.contact_bytes:
        raise ValueError(f"a contact of {len(contact)} bytes exceeds {limits.contact_bytes}")
    told = [a for a in addresses if len(a) <= limits.address_bytes][: limits.addresses]
    return json.dumps({"addresses": told, "contact": base64.b64encode(contact).decode()}).encode()


def _unpack(data: bytes, limits: FinderLimits) -> tuple[tuple[str, ...], bytes] | None:
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


def _is_ed25519(peer: bytes) -> bool:
    return len(peer) == 38 and peer.startswith(_ED25519)


def _key(peer: bytes) -> PeerId:
    return PeerId(peer[len(_ED25519) :])


def _peer_bytes(name: str) -> bytes | None:
    """Return a textual peer id's bytes when it is an Ed25519 one."""
    from libp2p.peer.id import ID

    try:
        peer = bytes(ID.from_string(name).to_bytes())
    except ValueError:
        return None
    return peer if _is_ed25519(peer) else None


async def _resolved(address: str) -> list[str]:
    """Turn /dns4/name/tcp/port into the /ip4 addresses behind the name."""
    import trio

    parts = address.split("/")
    if len(parts) < 5 or not parts[1].startswith("dns"):
        return [address]
    family = {"dns4": trio.socket.AF_INET, "dns6": trio.socket.AF_INET6}.get(parts[1], 0)
    with trio.move_on_after(5):
        found = await trio.socket.getaddrinfo(parts[2], None, family, trio.socket.SOCK_STREAM)
        ips = [ipaddress.ip_address(entry[4][0]) for entry in found][:4]
        return [f"/ip{ip.version}/{ip}/{'/'.join(parts[3:])}" for ip in ips]
    return []


async def _in_thread(work: Callable[[], Any]) -> Any:
    """Run what blocks; on cancellation let it finish alone."""
    return await import_module("trio").to_thread.run_sync(work, abandon_on_cancel=True)


@contextmanager
def _ignored(kind: type[Exception]) -> Iterator[None]:
    try:
        yield
    except kind:
        return


def _innermost(error: BaseException) -> str:
    """Return the first real cause inside trio's exception groups, on one line."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
