"""How a daemon comes to its run: it founds one, joins one, or resumes what a directory holds."""

import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec

from shoal.gossip.limits import Limits
from shoal.node import admission, genesis, home, identity, pipe, snapshots
from shoal.node.addresses import PORT, Address, parse_bare, parse_join, parse_listen
from shoal.node.admission import Admission
from shoal.node.config import NodeConfig, RunFile, parse_shard, parse_size, to_toml
from shoal.node.errors import ConfigError, PeerError
from shoal.node.genesis import Genesis
from shoal.node.home import Home
from shoal.node.identity import Identity
from shoal.node.supervisor import Supervisor, WorkerDied, command, environment
from shoal.node.transport.listen import check_listen
from shoal.node.transport.newcomer import fetch_genesis

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What the command line said."""

    directory: Path | None = None
    local: Mapping[str, object]
    """Flags that override node.toml; None and () are what was not given."""
    new: bool = False
    """Move the old directory aside and found another run."""
    paused: bool = False
    """Wait with training until told to resume."""
    whole_log: bool = False
    """Join with the whole log, where a snapshot would do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A peer's place in a run: everything that is settled before the daemon starts."""

    home: Home
    config: NodeConfig
    genesis: Genesis
    identity: Identity
    admission: Admission
    bootstrap: tuple[Address, ...] = ()
    founder: Supervisor | None = None
    """The worker that founded the run just now; without one others may know of the run already."""

    @property
    def limits(self) -> Limits:
        """Return the daemon's bounds."""
        return self.config.preset()

    def setup(self) -> pipe.Setup:
        """Return what the worker trains here."""
        made = setup(self.genesis.run_file, self.config, self.identity, self.home)
        return msgspec.structs.replace(made, run_id=self.genesis.run_id)


def setup(run_file: RunFile, config: NodeConfig, who: Identity, where: Home) -> pipe.Setup:
    """Return what a worker needs to build a run that has no id yet."""
    return pipe.Setup(
        run=run_file.tables(),
        peer=who.peer,
        data=config.data,
        base=config.base,
        shard=parse_shard(config.shard) if config.shard else None,
        device=config.device,
        device_memory=parse_size(config.device_memory),
        threads=config.threads,
        allow_task=config.allow_task,
        directory=str(where.path),
    )


def supervise(config: NodeConfig, where: Home) -> Supervisor:
    """Return the supervisor of this peer's worker."""
    return Supervisor(command(), env=environment(config.threads), log=where.path / "worker.log")


async def start(target: Path, options: Options) -> Place:
    """Found the run of a file, or resume what a directory holds."""
    if target.is_dir():
        if options.new:
            raise ConfigError("--new founds a run from its file: shoal start RUN.toml --new")
        if options.directory is not None and options.directory.resolve() != target.resolve():
            raise ConfigError(f"{target} is resumed where it is: leave --dir out")
        if not (target / "genesis").exists():
            raise _holds_no_run(target)
        return resume(Home(target), options)
    if not target.exists():
        raise ConfigError(f"{target} does not exist; give a run file, or a directory of a run")
    run_file = RunFile.load(target)
    directory = options.directory or Path(run_file.run.name)
    if options.new and (aside := home.move_aside(directory)) is not None:
        print(f"{directory} is now {aside}", file=sys.stderr)
    place = Home(directory)
    held = place.genesis(Limits())
    if held is not None:
        place.refuse_another_file(held, run_file, target)
        print(f"{directory} holds this run: going on (--new founds another)", file=sys.stderr)
        return resume(place, options)
    return await _found(run_file, place, options)


async def join(addresses: Sequence[str], options: Options) -> Place:
    """Fetch a run by its address and take a place in it; more addresses are tried as well."""
    targets = tuple(parse_join(text) for text in addresses)
    run = targets[0].run
    if any(target.run != run for target in targets):
        raise ConfigError("these addresses are of different runs; a daemon takes part in one")
    if options.directory is not None:
        place = Home(options.directory)
        held = place.genesis(Limits())
        if held is not None:
            if run is not None:
                place.refuse_another(held, run)
            return replace(resume(place, options), bootstrap=targets)
    else:
        place = None
    config = NodeConfig().merged(options.local)
    fetched = await _fetch(targets, config, place)
    genesis.check_task(fetched.run_file, config.allow_task)
    print(_shown(fetched.run_file), file=sys.stderr)
    if place is None:
        place = home.for_joiner(Path.cwd(), fetched.run_file, fetched.run_id, config)
        if place.genesis(Limits()) is not None:
            return replace(resume(place, options), bootstrap=targets)
    who = place.identity(config)
    _check_flags(config)
    admitted = _admission(fetched, config)
    snapshots.forget(place.snapshot)  # of an attempt that was cut short
    if not options.whole_log:
        told = [target for target in targets if target.peer is not None]
        if await snapshots.ask(told, admitted, who, place.snapshot) is not None:
            print("began with a snapshot of the run (--whole-log takes the log)", file=sys.stderr)
        elif _pooled(fetched.run_file):
            print("no snapshot was given, so far: taking the log", file=sys.stderr)
    place.keep(fetched)
    config.save(place.node_toml)
    return Place(
        home=place,
        config=config,
        genesis=fetched,
        identity=who,
        admission=admitted,
        bootstrap=targets,
    )


def _shown(run_file: RunFile) -> str:
    """Return the run as TOML for who joins it, without what is empty or does not count."""
    tables = run_file.tables()
    local = tables.get("local", {})
    idle = {"turn_seconds", "min_steps", "max_steps"} if local.get("steps") else {"steps"}
    tables["local"] = {key: value for key, value in local.items() if key not in idle}
    return to_toml({n: {k: v for k, v in t.items() if v != ""} for n, t in tables.items()})


def _pooled(run_file: RunFile) -> bool:
    """Say whether the run's seeds are from a pool, so that it may be given as a snapshot."""
    update = run_file.tables()["exchange"]["update"]
    planes = update if isinstance(update, list) else [update]
    return bool(planes) and all(
        isinstance(plane, dict) and plane.get("directions") == "pool" for plane in planes
    )


def resume(place: Home, options: Options) -> Place:
    """Take up what a directory holds, with the settings of node.toml and the command line."""
    held = place.genesis(Limits())
    if held is None:
        raise _holds_no_run(place.path)
    config = NodeConfig.load(place.node_toml).merged(options.local)
    genesis.check_task(held.run_file, config.allow_task)
    _check_flags(config)
    config.save(place.node_toml)
    return Place(
        home=place,
        config=config,
        genesis=held,
        identity=place.identity(config),
        admission=_admission(held, config),
    )


def _holds_no_run(path: Path) -> ConfigError:
    return ConfigError(f"{path} holds no run: found one with `shoal start RUN.toml`, or join one")


# ---------------------------------------------------------------- founding


async def _found(run_file: RunFile, place: Home, options: Options) -> Place:
    """Let a worker build the run and try one step; write its genesis."""
    config = NodeConfig.load(place.node_toml).merged(options.local)
    if run_file.task.is_import and not config.allow_task:
        # The founder's own file is the founder's own word.
        config = replace(config, allow_task=run_file.task.name)
    genesis.check_task(run_file, config.allow_task)
    config = _secret_for(run_file, config, place)
    who = place.identity(config)
    _check_flags(config)
    worker = supervise(config, place)
    try:
        await worker.start()
        founded = await worker.ask(pipe.Found(setup(run_file, config, who, place)), pipe.Founded)
        made = genesis.found(
            founded.run,
            parameters=founded.parameters,
            layout=founded.layout,
            initial_root=founded.initial_root,
            initial_squares=int(founded.initial_squares, 16),
            most=founded.most,
            founder=who.peer,
        )
        admitted = _admission(made, config)
        config.save(place.node_toml)
        place.keep(made, founded_from=run_file)
    except WorkerDied as death:
        raise ConfigError(
            f"the run can't be founded: {death.reason}; see {place.path / 'worker.log'}"
        ) from None
    except BaseException:
        await worker.stop()
        raise
    return Place(
        home=place,
        config=config,
        genesis=made,
        identity=who,
        admission=admitted,
        founder=worker,
    )


def _check_flags(config: NodeConfig) -> None:
    """Say now what is wrong with them: founding a large model takes a while."""
    check_listen(parse_listen(config.listen or f":{PORT}"))
    for text in config.advertise:
        parse_bare(text)
    if config.secret_file:
        admission.load_secret(Path(config.secret_file))


def _secret_for(run_file: RunFile, config: NodeConfig, place: Home) -> NodeConfig:
    """Make the secret of a new run whose founder brings none."""
    if run_file.swarm.admission != "secret" or config.secret_file:
        return config
    path = place.path.absolute() / "secret"
    if not path.exists():
        admission.create_secret(path)
    print(
        f"the swarm's secret is in {path}: hand it to members, who pass it with --secret-file",
        file=sys.stderr,
    )
    return replace(config, secret_file=str(path))


# ---------------------------------------------------------------- joining


async def _fetch(targets: Sequence[Address], config: NodeConfig, place: Home | None) -> Genesis:
    """Return the genesis from the first address that gives it."""
    secret = admission.load_secret(Path(config.secret_file)) if config.secret_file else None
    if place is not None:
        who = place.identity(config)
    elif config.identity:
        who = identity.load(Path(config.identity))
    else:
        who = Identity.generate()
    refusals, unreachable = [], False
    for target in targets:
        try:
            raw = await fetch_genesis(target, secret=secret, identity=who)
            return genesis.decode(raw, Limits(), where=str(target), run=target.run)
        except PeerError as error:
            refusals.append(f"cannot join by {target}: {error}")
            unreachable |= error.reason in ("unreachable", "no TLS 1.3", "timeout")
    remedy = "is the address right, and does that daemon run? Any member's join address will do"
    raise ConfigError("; ".join(refusals) + (f" ({remedy})" if unreachable else ""))


def _admission(run: Genesis, config: NodeConfig) -> Admission:
    secret = admission.load_secret(Path(config.secret_file)) if config.secret_file else None
    return admission.admit(run.run_file.swarm.admission, run.run_id, secret)
