"""The model of a directory whose daemon does not run: summed anew from its log, then written."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from shoal.gossip.frontier import entries_hash
from shoal.gossip.limits import Limits
from shoal.gossip.messages import Entry
from shoal.gossip.names import NO_HASH, Author, Hash, RunId, running
from shoal.gossip.records import Proof, Update
from shoal.gossip.snapshot import Snapshot
from shoal.node import snapshots
from shoal.node.config import NodeConfig
from shoal.node.errors import ConfigError
from shoal.node.genesis import Genesis, another_model
from shoal.node.home import Home
from shoal.node.store import Store
from shoal.node.wire.records import RecordReader

if TYPE_CHECKING:
    from shoal.training.trainer import Trainer

BATCH = 64
"""Updates given to the ledger at once: bounds the payloads held in memory."""


def metadata(genesis: Genesis, frontier: Hash | None) -> dict[str, str]:
    """Return what an exported file says about itself, beside its tensors.

    `frontier` stands for the updates that the model holds; None, where that has no name.
    """
    about = {"run": genesis.tables.decode(), "run_id": genesis.run_id.hex()}
    return about if frontier is None else about | {"frontier": frontier.hex()}


def export(directory: Path, target: Path) -> None:
    """Write the model that the directory's log means."""
    read_genesis(Home(directory, readonly=True))  # or the lock would make the directory
    with Home(directory) as home:
        genesis = read_genesis(home)
        trainer = make_trainer(home, genesis)
        snapshot, summed = begin(home, genesis.run_id, trainer), {}
        if snapshot is not None:
            summed = {line.author: line for line in snapshot.lines}
        counts = {author: line.count for author, line in summed.items()}
        store = Store.open(home.log, Limits(), run=genesis.run_id, readonly=True, summed=counts)
        records = RecordReader(genesis.run_id, lambda peer, admission: True)
        entries = []
        for author, count, closed in _authors(records, store):
            entry = Entry(author, count, NO_HASH, closed)
            if (line := summed.get(author)) is not None:
                if closed and closed <= line.count:
                    raise ConfigError(
                        f"{home.snapshot} holds an update that no longer counts: start the daemon, "
                        "which then fetches the log"
                    )
                entry = replace(entry, hash=line.hash, summed=line.count)
            entries.append(_apply(trainer, records, store, entry))
        trainer.export(target, metadata(genesis, entries_hash(entries)))


def read_genesis(home: Home) -> Genesis:
    """Return the run that a directory holds; ConfigError when it holds none."""
    genesis = home.genesis(Limits())
    if genesis is None:
        raise ConfigError(f"{home.path} holds no run; name the directory that `shoal start` made")
    return genesis


def make_trainer(
    home: Home,
    genesis: Genesis,
    *,
    device: str = "cpu",
    threads: int = 0,
    data: str = "",
    base: str = "",
    allow_task: str = "",
) -> "Trainer":
    """Build the run at its initial model, from the seed or from the integers kept in `home`.

    Without `base` and `allow_task` those of its node.toml count. Raises ConfigError when the run
    can't be built here, or is another model's than its genesis says.
    """
    from shoal.training.run import RunError, RunSpec
    from shoal.training.trainer import Setup, Trainer

    local = NodeConfig.load(home.node_toml)
    allowed = allow_task or local.allow_task or None
    initial = home.initial.read_bytes() if home.initial.exists() else None
    if initial is not None and not genesis.is_initial(initial):
        initial = None  # damaged: the daemon, too, makes it anew from the seed
    try:
        spec = RunSpec.parse(json.loads(genesis.tables), allow_task=allowed)
        setup = Setup(
            run=spec,
            run_id=genesis.run_id,
            device=device,
            threads=threads,
            data=data or None,
            base=base or local.base or None,
            allow_task=allowed,
        )
        trainer = Trainer(setup, initial=initial, clock=_no_clock)
    except RunError as error:
        raise ConfigError(str(error)) from error
    if (trainer.parameters, trainer.layout) != (genesis.parameters, genesis.layout):
        raise ConfigError(another_model(trainer.parameters, genesis.parameters))
    if not genesis.is_initial(trainer.initial_bytes()):
        raise ConfigError(
            f"this machine makes another initial model than the run's and {home.initial} is not "
            "there, or damaged; start the daemon, which fetches it"
        )
    return trainer


def begin(home: Home, run: RunId, trainer: "Trainer") -> Snapshot | None:
    """Set the model to the snapshot that the directory's peer began with, and return that.

    None, and the initial model, when there is none. Raises ConfigError when it is damaged, or not
    what its donor said.
    """
    try:
        held = snapshots.load(home.snapshot, run)
    except snapshots.SnapshotError as error:
        raise ConfigError(f"{error}; start the daemon, which then fetches the log") from None
    if held is None:
        return None
    snapshot, sums = held
    try:
        trainer.begin(sums)
    except ValueError as error:
        raise ConfigError(f"{home.snapshot} can't be used: {error}") from error
    if trainer.fingerprint() != snapshot.fingerprint:
        raise ConfigError(
            f"{home.snapshot} can't be used: its model has another fingerprint than it says; start "
            "the daemon, which then fetches the log"
        )
    return snapshot


def _no_clock() -> float:
    return 0.0


def _authors(records: RecordReader, store: Store) -> Iterator[tuple[Author, int, int]]:
    """Yield of each author how many updates count, and the number at which a proof closed it."""
    closed: dict[Author, int] = {}
    for raw in store.proofs.values():
        proof = records.own(raw).statement
        assert isinstance(proof, Proof)
        closed[proof.author] = min(proof.number, closed.get(proof.author, proof.number))
    counts = store.counts()
    for author in sorted({*counts, *closed}):
        count, end = counts.get(author, 0), closed.get(author, 0)
        yield author, min(count, end - 1) if end else count, end


def _apply(trainer: "Trainer", records: RecordReader, store: Store, entry: Entry) -> Entry:
    """Add one author's updates to the model; return its line of the frontier, hash and all.

    `entry` holds the running hash after those that a snapshot stands for.
    """
    from shoal.training.exchange import Arrived

    mark = entry.hash
    batch: list[Arrived] = []
    for number in range(entry.summed + 1, entry.count + 1):
        found = store.get(entry.author, number)
        assert found is not None, entry
        raw, payload = found
        record = records.own(raw)
        update = record.statement
        assert isinstance(update, Update)
        data = update.inline if payload is None else payload
        key = (*entry.author, number)
        batch.append(Arrived(key, update.turn, update.kind, data, update.size))
        mark = running(mark, record.id)
        if len(batch) == BATCH or number == entry.count:
            trainer.apply(batch)
            batch.clear()
    return replace(entry, hash=mark)
