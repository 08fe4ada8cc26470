"""The model of a directory whose daemon does not run: summed anew from its log, then written."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from shoal.gossip.limits import Limits
from shoal.gossip.names import Author
from shoal.gossip.records import Proof, Update
from shoal.node.config import NodeConfig
from shoal.node.errors import ConfigError
from shoal.node.genesis import Genesis
from shoal.node.home import Home
from shoal.node.identity import peer_text
from shoal.node.store import Store
from shoal.node.wire import Wire

if TYPE_CHECKING:
    from shoal.training.exchange import Arrived
    from shoal.training.trainer import Trainer

BATCH = 64
"""Updates given to the ledger at once: bounds the payloads held in memory."""


def metadata(genesis: Genesis, fingerprint: tuple[int, int], updates: int) -> dict[str, str]:
    """Return what an exported file says about itself, beside its tensors."""
    return {
        "shoal.run": genesis.run_id.hex(),
        "shoal.run_file": genesis.tables.decode(),
        "shoal.fingerprint": fingerprint_text(fingerprint),
        "shoal.updates": str(updates),
    }


def fingerprint_text(fingerprint: tuple[int, int]) -> str:
    """Return a fingerprint as people compare it: 32 hex digits."""
    return "".join(f"{lane:016x}" for lane in fingerprint)


def export(directory: Path, target: Path) -> str:
    """Write the model that the directory's log means; return its fingerprint."""
    if not (directory / "genesis").exists():
        raise ConfigError(f"{directory} holds no run; name the directory that `shoal start` made")
    with Home(directory) as home:
        genesis = home.genesis(Limits())
        assert genesis is not None
        trainer = _trainer(home, genesis)
        store = Store.open(home.log, Limits(), run=genesis.run_id, readonly=True)
        updates = _apply(trainer, genesis, store)
        mark = trainer.recompute()
        trainer.export(target, metadata(genesis, mark, updates))
        return fingerprint_text(mark)


def _trainer(home: Home, genesis: Genesis) -> "Trainer":
    from shoal.training.run import RunError, RunSpec
    from shoal.training.trainer import Setup, Trainer

    allowed = NodeConfig.load(home.node_toml).allow_task or None
    initial = home.initial.read_bytes() if home.initial.exists() else None
    try:
        spec = RunSpec.parse(json.loads(genesis.tables), allow_task=allowed)
        trainer = Trainer(Setup(run=spec, allow_task=allowed), initial=initial, clock=_no_clock)
    except RunError as error:
        raise ConfigError(str(error)) from error
    if not genesis.is_initial(trainer.initial_bytes()):
        raise ConfigError(
            f"this machine makes another initial model than the run's and {home.initial} is not "
            "there; start the daemon, which fetches it"
        )
    return trainer


def _no_clock() -> float:
    return 0.0


def _apply(trainer: "Trainer", genesis: Genesis, store: Store) -> int:
    batch: list[Arrived] = []
    updates = 0
    for arrived in _updates(genesis, store):
        batch.append(arrived)
        updates += 1
        if len(batch) == BATCH:
            trainer.apply(batch)
            batch.clear()
    trainer.apply(batch)
    return updates


def _updates(genesis: Genesis, store: Store) -> "Iterator[Arrived]":
    """Yield what counts: of each author without a hole, and below where a proof closed its log."""
    from shoal.training.exchange import Arrived

    wire = Wire(genesis.run_id, lambda peer, admission: True, Limits())
    closed = _closings(wire, store)
    for author, count in sorted(store.counts().items()):
        for number in range(1, min(count + 1, closed.get(author, count + 1))):
            found = store.get(author, number)
            assert found is not None, (peer_text(author.peer), number)
            raw, payload = found
            update = wire.record(raw).statement
            assert isinstance(update, Update)
            data = update.inline if payload is None else payload
            key = (author.peer, author.log, number)
            yield Arrived(key, update.turn, update.kind, data, update.size)


def _closings(wire: Wire, store: Store) -> dict[Author, int]:
    closed: dict[Author, int] = {}
    for raw in store.proofs.values():
        proof = wire.record(raw).statement
        assert isinstance(proof, Proof)
        closed[proof.author] = min(proof.number, closed.get(proof.author, proof.number))
    return closed
