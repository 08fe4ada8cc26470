"""Start reading here: the daemon builds its parts, runs them in one TaskGroup, shuts them down.

founding.py   which run, which directory, who am I
driver.py     the core's loop               foreman.py    the worker's jobs
transport/    links to other peers          discovery.py  whom to dial first
store.py      the log on disk               http.py       the status port
"""

import asyncio
import contextlib
import errno
import logging
import math
import os
import random
import secrets
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

from shoal.gossip import events as ev
from shoal.gossip import protocol
from shoal.gossip.names import Author, Key, PeerId
from shoal.gossip.records import Record, Report, Update
from shoal.gossip.run import Held, Run
from shoal.node import founding, offline, pipe, snapshots, status
from shoal.node.addresses import parse_bare, parse_listen
from shoal.node.discovery import Discovery
from shoal.node.driver import Driver
from shoal.node.errors import ConfigError, PeerError
from shoal.node.foreman import Foreman, Progress
from shoal.node.founding import Options, Place
from shoal.node.home import Known
from shoal.node.http import StatusServer
from shoal.node.identity import peer_text
from shoal.node.initial import Initial
from shoal.node.journal import Journal
from shoal.node.metrics import Counters
from shoal.node.status import EventRow, PeerRow, State, Status, known
from shoal.node.store import DamagedError, Store
from shoal.node.traffic import SocketMeter
from shoal.node.transport.grpc import Transport
from shoal.node.transport.libp2p.finder import Finder
from shoal.node.transport.libp2p.settings import FinderSettings
from shoal.node.transport.listen import as_before
from shoal.node.wire.records import RecordReader, Sealer

__all__ = ["Daemon", "Options", "serve"]

log = logging.getLogger(__name__)

SAMPLE = 1.0
"""Seconds between looks at the sockets and at what else changes slowly."""
REMEMBER = 30.0
"""Seconds between writes of the known peers."""
MEND = 10.0
"""Seconds between tries to write what the disk did not take."""
FAREWELL = 0.5
"""Seconds for the last words to leave."""
PORT = 7464
UNTOLD = Report(loss=math.nan, evaluation=math.nan)
MEANINGS = {
    "joining": "joining: looking for others, and for what they hold",
    "finished": "finished: all turns are done; goes on serving until Ctrl-C or `shoal leave`",
    "observing": "observing: holds, verifies and serves the run; never trains",
    "paused": "paused: serves on; `shoal resume` lets it train",
}
"""States that deserve a word more in the log."""


async def serve(
    options: Options, *, target: Path | None = None, addresses: Sequence[str] = ()
) -> int:
    """Found, join or resume a run and serve it until told to stop; return the exit code.

    Raises ConfigError, one line with the remedy, for what the operator can mend.
    """
    if target is not None:
        place = await founding.start(target, options)
    else:
        place = await founding.join(addresses, options)
    with place.home:
        try:
            daemon = Daemon(place, paused=options.paused)
        except BaseException:
            if place.founder is not None:
                await place.founder.stop()
            raise
        return await daemon.run()


class Daemon:
    """One peer in one run. `http.Watched` for the status port."""

    def __init__(self, place: Place, *, paused: bool = False) -> None:
        self.place = place
        self.paused = paused
        self.started = time.monotonic()
        limits, run_id = place.limits, place.genesis.run_id
        self._counters = Counters()
        self.journal = Journal(limits.events)
        held = snapshots.begin_with(place.home.snapshot, run_id)
        self._snapshot = None if held is None else held[0]
        self.store = Store.open(
            place.home.log,
            limits,
            run=run_id,
            summed=dict(self._snapshot.counts()) if self._snapshot is not None else None,
        )
        self._leave_unused_log()
        self.records = RecordReader(run_id, place.admission.verify)
        self._published = 0
        self.core = self._make_core()
        self.initial = Initial(place.home.initial, place.genesis)
        self.driver = Driver(
            self.core,
            self.store,
            self.journal,
            self._counters,
            limits,
            genesis=place.genesis.raw,
            initial=self.initial.read,
            snapshot=self._give_snapshot,
        )
        listen = parse_listen(place.config.listen or f":{PORT}")
        listen = as_before(listen, place.home.last_port())
        self.transport = Transport(
            place.identity,
            place.admission,
            self.driver,
            listen=listen,
            limits=limits,
            advertise=[parse_bare(text) for text in place.config.advertise],
        )
        self.supervisor = place.founder or founding.supervise(place.config, place.home)
        self.foreman = self._make_foreman()
        self.donor = snapshots.Donor(
            self.core.frontier, self.foreman.sums, lambda: self.store.size, self.core.steady
        )
        self.driver.links, self.driver.hands = self.transport, self.foreman
        self.discovery = Discovery(
            place.identity.peer,
            self.driver.dial,
            links=self.core.linked,
            wanted=lambda: 0 if self.core.membership.retired else limits.degree_min,
        )
        self.finder = Finder(
            FinderSettings(
                identity=place.identity.key.private_bytes_raw(),
                seed=place.admission.rendezvous(),
                port=place.config.libp2p_port(),
            )
        )
        self.meter = self._make_meter()
        self.http = self._make_http()
        self._stop = asyncio.Event()

    # ---------------------------------------------------------------- parts

    def _make_core(self) -> protocol.Protocol:
        place, run_file = self.place, self.place.genesis.run_file
        exchange = run_file.exchange
        run = Run(
            id=place.genesis.run_id,
            turns=run_file.run.turns,
            min_peers=run_file.swarm.min_peers,
            participation=exchange.participation,
            pace=exchange.pace,
            combined=exchange.combines(),
            topology=run_file.swarm.topology,
            most_bytes=place.genesis.most,
            observe=place.config.observe,
        )
        me = place.identity.peer
        held = Held(
            records=self._stored(me),
            proofs=[self.records.own(raw) for raw in self.store.proofs.values()],
            admissions=self.store.admissions,
            recall=self._recall,
            snapshot=self._snapshot,
        )
        return protocol.Protocol(
            run,
            me,
            self.store.log,
            secrets.randbits(64) or 1,
            Sealer(place.identity, place.genesis.run_id).seal,
            random.Random(secrets.randbits(128)),
            place.limits,
            held,
        )

    def _make_foreman(self) -> Foreman:
        genesis, home = self.place.genesis, self.place.home
        opening = pipe.Open(
            setup=self.place.setup(),
            parameters=genesis.parameters,
            layout=genesis.layout,
            initial_root=genesis.initial_root,
            initial=str(home.initial),
            checkpoint=str(home.checkpoint),
        )
        foreman = Foreman(
            self.supervisor,
            self.store,
            opening,
            feed=self.driver.feed,
            read=self._update,
            initial=self._fetch_initial,
            hold=self.driver.hold,
            report=self._report,
            turned=self._turned,
            limits=self.place.limits,
            snapshot=home.snapshot if self._snapshot is not None else None,
        )
        self._go_on(foreman.now)
        return foreman

    def _leave_unused_log(self) -> None:
        """Publish under a fresh log id where the recorded one has no update here.

        Others may know some: the directory may have been put back to what it was before the first.
        """
        if not self.store.counts().get(Author(self.place.identity.peer, self.store.log)):
            self.store.adopt_log(secrets.randbits(64) or 1)

    def _go_on(self, now: Progress) -> None:
        """Let the totals of an earlier life of this peer go on."""
        now.steps, now.turn = self._last("steps"), self._last("turn")
        now.published_bytes = self._published

    def _make_meter(self) -> SocketMeter:
        return SocketMeter(
            without=lambda: (self.http.port,),
            bytes_in=self._last("bytes_in"),
            bytes_out=self._last("bytes_out"),
        )

    def _last(self, name: str) -> int:
        """Return a total as the last turn of an earlier life left it."""
        value = self.place.home.last_turn().get(name)
        return value if isinstance(value, int) else 0

    def _make_http(self) -> StatusServer:
        listen = parse_listen(self.place.config.status)
        return StatusServer(
            self, token=secrets.token_urlsafe(24), host=listen.host or "127.0.0.1", port=listen.port
        )

    def _stored(self, me: PeerId) -> Iterator[Record]:
        """Yield the log's records, one in memory at a time; count what we published."""
        for stored in self.store.records():
            record = self.records.own(stored.raw)
            update = record.statement
            if isinstance(update, Update) and update.author.peer == me:
                self._published += update.size
            yield record

    def _recall(self, key: Key) -> Record | None:
        try:
            raw = self.store.record(*key)
        except DamagedError as error:
            self.driver.lost(error.key)
            return None
        return None if raw is None else self.records.own(raw)

    def _update(self, raw: bytes) -> Update:
        update = self.records.own(raw).statement
        assert isinstance(update, Update)
        return update

    # ---------------------------------------------------------------- life

    async def run(self) -> int:
        """Serve until stopped; return the exit code."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._stop.set)
        loop.set_exception_handler(self._crash)
        self._crashed: BaseException | None = None
        try:
            await self.transport.start()
            await self.http.start()
            self._introduce()
            async with asyncio.TaskGroup() as tasks:
                running = [
                    tasks.create_task(self.foreman.run(), name="foreman"),
                    tasks.create_task(self.discovery.run(self.finder), name="discovery"),
                    tasks.create_task(self._watch(), name="watch"),
                    tasks.create_task(self._measure(), name="measure"),
                ]
                self._begin()
                await self._stop.wait()
                for task in running:
                    task.cancel()
        finally:
            await self._end()
        if self._crashed is not None:
            raise self._crashed
        if lost := self.store.waiting:
            raise ConfigError(
                f"{lost} updates are not on disk, and only others may still have them: "
                f"{self._disk()} before you start again"
            )
        return 0

    def _introduce(self) -> None:
        """Say where we are, and how to join us."""
        place = self.place
        port = self.transport.port
        place.home.publish_status(self.http.host, self.http.port, self.http.token, listening=port)
        print(f"run {place.genesis.run_file.run.name} {place.genesis.run_id.hex()}")
        print(f"peer {place.identity}")
        print(f"directory {place.home.path}")
        print(f"status http://{self.http.host}:{self.http.port}/status")
        for address in self.join_addresses():
            print(f"join: shoal join {address}")
        sys.stdout.flush()
        for note in self.store.notes:
            self.journal.add("log-repaired", None, {"note": note})

    def _begin(self) -> None:
        """Tell the core that the daemon is up, and start to look for others."""
        place = self.place
        if self.paused:
            self.driver.feed(ev.Pause())
        self.discovery.bootstrap(place.bootstrap)
        remembered = place.home.known_peers()
        recalled = self.discovery.recall(remembered)
        alone = place.founder is not None and not remembered
        addresses = self.transport.addresses
        self.driver.feed(ev.Reported(self._report(self.foreman.now)))
        self.driver.feed(ev.Start(addresses, self.transport.proof, alone))
        self.finder.announce(addresses)
        self.finder.bootstrap([*place.config.libp2p_peer, *recalled])
        self.finder.start()

    async def _end(self) -> None:
        """Say good-bye and shut down in order; what was acknowledged is on disk already."""
        self._remember()
        with contextlib.suppress(Exception):
            self.driver.feed(ev.Depart())
            await asyncio.sleep(FAREWELL)
        self.driver.close()
        self.store.mend(most=None)
        if lost := self.store.waiting:
            log.error("not on disk", extra={"updates": lost, "reason": self.store.degraded})
        await self.supervisor.stop(save=not lost)
        await self.http.stop()
        await self.transport.stop()
        await self.finder.stop()
        self.store.close()

    def _crash(self, loop: asyncio.AbstractEventLoop, context: dict[str, object]) -> None:
        """A bug in a task of ours ends the daemon loudly instead of leaving it half alive."""
        error = context.get("exception")
        log.error("unexpected", extra={"problem": str(context.get("message"))}, exc_info=None)
        if isinstance(error, BaseException) and self._crashed is None:
            self._crashed = error
            self._stop.set()

    async def _watch(self) -> None:
        """Look at what changes slowly."""
        remembered, state, known = time.monotonic(), "", False
        mended = 0.0
        while True:
            await asyncio.sleep(SAMPLE)
            self.meter.sample()
            if not self.store.whole and time.monotonic() - mended >= MEND:
                await self._mend()
                mended = time.monotonic()
            if state != self.core.state:
                state = self.core.state
                log.info(MEANINGS.get(state, state))
            first = not known and bool(self.core.linked())
            if first or time.monotonic() - remembered >= REMEMBER:
                known = bool(self.core.linked())
                remembered = time.monotonic()
                self._remember()

    async def _mend(self) -> None:
        """Write what the disk did not take, a little at a time while it gets on."""
        waiting = self.store.waiting + 1
        while not self.store.whole and self.store.waiting < waiting:
            waiting = self.store.waiting
            self.driver.mend()
            await asyncio.sleep(0)

    async def _measure(self) -> None:
        """Measure the shared model thoroughly whenever the worker has nothing else to do."""
        failed = b""
        while True:
            await asyncio.sleep(SAMPLE)
            at, core = self.core.frontier.hash, self.core
            if at == failed or not core.turns.idle() or core.lag():
                continue
            if self.foreman.now.measured == core.fingerprint:
                continue
            try:
                await self.foreman.evaluate()
            except ConfigError:
                failed = at
            else:  # what others are told is not to stay what it was before the last turn
                self.driver.feed(ev.Reported(self._report(self.foreman.now)))

    def _remember(self) -> None:
        """Write down who was here, for the next start."""
        me = self.place.identity.peer
        members = [m for m in self.core.members() if m.peer != me and m.addresses]
        members.sort(key=lambda m: (not m.linked, m.state != "alive"))
        try:
            known = self.discovery.book.remembered((m.peer, m.addresses) for m in members)
            self.place.home.remember_peers(Known(*each) for each in known)
        except OSError as error:
            log.warning("known peers not written", extra={"error": error.strerror})

    # ---------------------------------------------------------------- the initial model

    async def _fetch_initial(self) -> None:
        """Fetch the initial integers from whoever has them, until they have the right root."""
        while True:
            for peer in self.core.linked():
                try:
                    await self.initial.fetch(self.transport, peer)
                except PeerError as error:
                    self.driver.on_misbehaviour(peer, error.reason)
                    log.warning("initial model not fetched", extra={"reason": str(error)})
                else:
                    return
            await asyncio.sleep(SAMPLE)

    # ---------------------------------------------------------------- joiners

    async def _give_snapshot(self) -> bytes:
        """Serve what joiners may begin with: a run in lockstep begins with whole turns alone."""
        exchange = self.place.genesis.run_file.exchange
        if exchange.pace == "lockstep" or exchange.combines():
            return b""
        return await self.donor.give()

    # ---------------------------------------------------------------- what is told about turns

    def _report(self, now: Progress) -> Report:
        def number(value: float | None) -> float:
            return math.nan if value is None else value

        return Report(
            turn=now.turn,
            steps=now.steps,
            loss=number(now.loss),
            evaluation=number(now.evaluation),
            bytes_out=self.meter.bytes_out,
            bytes_in=self.meter.bytes_in,
        )

    def _turned(self, answer: pipe.Turned, size: int) -> None:
        now = self.foreman.now
        result = "dropped" if answer.dropped is not None else "done"
        self._counters.add("turns", result)
        if answer.skipped:
            self._counters.add("skipped_steps", "not finite", answer.skipped)
        line = {
            "turn": now.turn,
            "steps": now.steps,
            "seconds": round(answer.seconds, 3),
            "loss": answer.loss,
            "evaluation": answer.evaluation,
            "payload_bytes": size,
            "bytes_out": self.meter.bytes_out,
            "bytes_in": self.meter.bytes_in,
            "members": self._members(),
            "dropped": answer.dropped,
        }
        self.place.home.write_turn(line)
        log.info("turn", extra={k: v for k, v in line.items() if v is not None})

    # ---------------------------------------------------------------- http.Watched

    def join_addresses(self) -> list[str]:
        """Return the addresses by which others can join through this peer."""
        peer, run = self.place.identity.peer, self.place.genesis.run_id
        return [str(parse_bare(text).of(peer, run)) for text in self.transport.addresses]

    def status(self) -> Status:
        """Return what `/status` shows."""
        core, now, genesis = self.core, self.foreman.now, self.place.genesis
        state, _, why = core.state.partition(": ")
        rtts = core.membership.rtts
        published = now.published_bytes
        fingerprint = core.fingerprint
        return Status(
            version=version("shoal"),
            peer=str(self.place.identity),
            run=genesis.run_id.hex(),
            name=genesis.run_file.run.name,
            join=tuple(self.join_addresses()),
            state=State(state),
            why=why,
            turn=now.turn,
            turns=genesis.run_file.run.turns,
            steps=now.steps,
            steps_per_second=self._speed() if state == State.TRAINING else None,
            loss=now.loss,
            evaluation=now.evaluation,
            measured=now.measured is not None
            and now.measured == fingerprint
            and not self._unapplied(),
            first_evaluation=now.first_evaluation,
            unit=now.unit,
            parameters=genesis.parameters,
            members=self._members(),
            neighbours=tuple(
                status.Neighbour(id=peer_text(peer), rtt=rtts.get(peer)) for peer in core.linked()
            ),
            bytes_in=dict(self.transport.bytes_in),
            bytes_out=dict(self.transport.bytes_out),
            sockets=status.Sockets(bytes_in=self.meter.bytes_in, bytes_out=self.meter.bytes_out),
            published_bytes=published,
            compression=status.compression_ratio(genesis.parameters, now.steps, published),
            frontier=status.Frontier(
                authors=len(core.frontier.counts()),
                updates=sum(count for _, count in core.frontier.counts()),
                hash=core.frontier.hash.hex(),
            ),
            lag=core.lag() + self._unapplied(),
            fingerprint="".join(f"{lane:016x}" for lane in fingerprint) if fingerprint else "",
            agrees=core.agrees(),
            reproducible=(
                core.reproducible if genesis.run_file.exchange.pace == "lockstep" else None
            ),
            worker=status.Worker(
                pid=self.supervisor.pid,
                restarts=self.supervisor.restarts,
                device=now.device,
                memory=now.memory or None,
            ),
            memory=resident(),
            uptime=time.monotonic() - self.started,
            libp2p=self.finder.state,
            warnings=tuple(self._warnings()),
        )

    def _speed(self) -> float | None:
        now = self.foreman.now
        return now.last_steps / now.seconds if now.seconds else None

    def _members(self) -> int:
        return sum(m.state in ("alive", "suspected") for m in self.core.members())

    def _unapplied(self) -> int:
        # The core's word, not the foreman's: it moves together with the fingerprint.
        applied = self.core.agreement.applied
        return sum(max(0, n - applied.get(a, 0)) for a, n in self.core.frontier.counts())

    def _warnings(self) -> list[str]:
        found = list(self.store.notes)
        if self.foreman.now.out_of_range:
            found.append(f"values out of range: {self.foreman.now.out_of_range}; training diverges")
        if skipped := self.foreman.now.skipped:
            found.append(f"{skipped} local steps skipped: their loss was not finite (worker.log)")
        if self.store.degraded:
            found.append(
                f"the log is kept in memory only: {self._disk()}; {self.store.waiting} updates wait"
            )
        if summed := self.core.out_of_reach():
            found.append(
                f"{summed} updates are nowhere near any more but as a sum: join anew, in another "
                "directory (--dir) and without --whole-log"
            )
        if which := self.core.membership.twin:
            found.append(
                f"another process runs under this key; this is the {which} one: stop one of them, "
                "and join with a directory of its own (--dir), so that each has its own key"
            )
        return found

    def _disk(self) -> str:
        """Return what is wrong with the log's disk, and the remedy."""
        reason, path = self.store.degraded, self.place.home.path.absolute()
        if reason == "log full":
            return f"{reason}; raise log_gigabytes in {path}/node.toml"
        full = any(os.strerror(code) in reason for code in (errno.ENOSPC, errno.EDQUOT))
        return f"{reason}; {'free some space in' if full else 'mend the disk under'} {path}"

    def peers(self) -> list[PeerRow]:
        """Return what `/peers` shows."""
        me = self.place.identity.peer
        rtts = self.core.membership.rtts
        verdicts = self.core.verdicts()
        mine = self._report(self.foreman.now)
        return [_row(member, me, mine, rtts, verdicts) for member in self.core.members()]

    def events(self, after: int) -> list[EventRow]:
        """Return what happened lately."""
        return self.journal.after(after)

    def counters(self) -> Counters:
        """Return the counters, with what the core and the transport have counted by themselves."""
        counters, transport = self._counters, self.transport
        counters.put("gossip", self.core.counters)
        counters.put("refused_updates", self.core.agreement.refused)
        counters.put("turned_away", transport.dropped)
        counters.put("bytes_in", transport.bytes_in)
        counters.put("bytes_out", transport.bytes_out)
        return counters

    async def pause(self) -> None:
        """Stop training after this turn; go on serving."""
        self.driver.feed(ev.Pause())

    async def resume(self) -> None:
        """Train again."""
        self.driver.feed(ev.Resume())

    async def leave(self) -> None:
        """Leave the swarm and end."""
        asyncio.get_running_loop().call_later(0.1, self._stop.set)

    async def export(self, path: Path) -> None:
        """Write the shared model as safetensors, with the run file as metadata."""
        if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
            raise ConfigError(f"{path.parent} is no directory that this daemon can write to")
        await self.foreman.export(path, self._about)

    def _about(self, applied: Mapping[Author, int]) -> Mapping[str, str]:
        """Return what an exported model says about itself, when it holds these updates."""
        return offline.metadata(self.place.genesis, self.core.frontier.hash_at(applied))


def _row(
    member: protocol.Member,
    me: PeerId,
    mine: Report,
    rtts: dict[PeerId, float],
    verdicts: dict[PeerId, bool],
) -> PeerRow:
    report = mine if member.peer == me else member.report or UNTOLD
    return PeerRow(
        id=peer_text(member.peer),
        me=member.peer == me,
        state=member.state,
        standing=member.standing.name.lower() if member.standing is not None else "",
        neighbour=member.linked,
        turn=report.turn,
        steps=report.steps,
        loss=known(report.loss),
        evaluation=known(report.evaluation),
        bytes_in=report.bytes_in or None,  # zeros are stated before the first count
        bytes_out=report.bytes_out or None,
        rtt=rtts.get(member.peer),
        agrees=verdicts.get(member.peer),
        addresses=member.addresses,
    )


def resident() -> int:
    """Return this process' resident bytes; 0 where the system does not tell."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, ValueError, IndexError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")
