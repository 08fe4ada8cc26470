"""Fine-tuning a pre-trained model by seeds: `shoal bench finetune --base FOLDER`.

Beside each other, on the same text: MeZO in one place on all of it (the yardstick), FedKSeed by
peers that hold a share each, with as many forward passes in all, and Ferret, whose local steps use
gradients. A forward pass counts 1, a backward pass 2. The loss is the task's on held-out text.
Trained in process, turn by turn, with the product's own trainers and payloads.

Exit code 1 if FedKSeed or Ferret end more than 2 % above the yardstick, if Ferret computed more
than a tenth of what a peer of FedKSeed did, or if a turn took more bytes than its paper says
(1,600 up, 16,384 down; arXiv 2312.06353).
"""

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from shoal.node.bench._lockstep import Lockstep
from shoal.node.bench._report import add_json, grid, machine, one_object, say
from shoal.node.errors import ConfigError

FORWARD, BACKWARD = 1, 2
WITHIN = 1.02
FEWER = 10
MOST_UP, MOST_DOWN = 1_600, 16_384
ROUNDS = 4
"""Turns of Ferret."""


@dataclass(frozen=True, slots=True)
class Row:
    """How one way of tuning ended."""

    name: str
    loss: float
    passes: float
    """Forward equivalents of a peer."""
    all_passes: float
    """Of all peers together."""
    up: float
    """Bytes of payload that a peer publishes in a turn …"""
    down: float
    """… and that it takes in."""


def register(parser: argparse.ArgumentParser) -> None:
    """Add the flags."""
    add_json(parser)
    parser.add_argument(
        "--base",
        required=True,
        metavar="FOLDER",
        help="model in Hugging Face's format to start from",
    )
    parser.add_argument("--data", metavar="PATH", help="text (default: Python's reference topics)")
    parser.add_argument("--peers", type=int, default=4, metavar="N", help="(default: 4)")
    parser.add_argument("--turns", type=int, default=3, metavar="N", help="FedKSeed's (default: 3)")
    parser.add_argument("--steps", type=int, default=200, metavar="N", help="a turn (default: 200)")
    parser.add_argument("--pool", type=int, default=4096, metavar="K", help="seeds (default: 4096)")
    parser.add_argument(
        "--rates",
        default="2e-4,1e-3",
        metavar="X,…",
        help="lr to try for steps without gradients, here and there (default: 2e-4,1e-3)",
    )
    parser.add_argument("--batch", type=int, default=8, metavar="N", help="(default: 8)")
    parser.add_argument("--seed", type=int, default=1, metavar="N", help="(default: 1)")
    parser.add_argument("--threads", type=int, default=2, metavar="N", help="(default: 2)")


def run(args: argparse.Namespace) -> int:
    """Tune in every way and print; 1 if a promise is broken."""
    import torch

    if min(args.peers, args.turns, args.steps, args.pool, args.batch, args.threads) < 1:
        raise ConfigError("--peers, --turns, --steps, --pool, --batch and --threads are above zero")
    try:
        rates = [float(text) for text in args.rates.split(",")]
    except ValueError:
        raise ConfigError(f"--rates {args.rates}: give numbers, as 1e-4,3e-4") from None
    torch.set_num_threads(args.threads)
    with TemporaryDirectory() as folder:
        data = args.data or _topics(Path(folder))
        rows = list(_rows(args, data, rates))
    broken = promises(rows)
    if args.json:
        print(one_object("finetune", rows))
    else:
        print(f"fine-tuning {args.base}, {args.peers} peers, on {machine()}")
        print(table(rows))
    for complaint in broken:
        print(complaint, file=sys.stderr)
    return 1 if broken else 0


def promises(rows: Sequence[Row]) -> list[str]:
    """Return what is not as promised: rows are the start, the yardstick, FedKSeed, Ferret."""
    _, yardstick, pool, ferret = rows
    broken = [
        f"{row.name} ends at {row.loss:.4f}, more than 2 % above {yardstick.loss:.4f}"
        for row in (pool, ferret)
        if not row.loss <= WITHIN * yardstick.loss
    ]
    if ferret.passes * FEWER > pool.passes:
        broken.append(f"ferret computes {ferret.passes:.0f} passes a peer, {pool.passes:.0f} / 10")
    if pool.up > MOST_UP or pool.down > MOST_DOWN:
        broken.append(f"fedkseed sends {pool.up:.0f} bytes and takes in {pool.down:.0f} a turn")
    return broken


def table(rows: Sequence[Row]) -> str:
    """Return the rows as text."""
    heads = ("", "held-out loss", "passes a peer", "passes in all", "bytes up", "bytes down")
    cells = [
        [
            row.name,
            f"{row.loss:.4f}",
            *(f"{x:,.0f}" for x in (row.passes, row.all_passes, row.up, row.down)),
        ]
        for row in rows
    ]
    return grid(heads, cells)


def _rows(args: argparse.Namespace, data: str, rates: Sequence[float]) -> list[Row]:
    peers, steps, turns = args.peers, args.steps, args.turns
    forwards = 2 * FORWARD * steps * turns
    pool = {"kind": "scalar", "directions": "pool", "pool": args.pool, "perturbations": steps}
    rows = []
    central = []
    federated = []
    for rate in rates:
        # One peer, one step a turn: nothing but the int8 lies between this and MeZO.
        one = {"kind": "scalar", "directions": "own", "perturbations": steps, "lr": rate}
        loss, start, _ = _tune(args, data, 1, peers * turns, one)
        central.append(loss)
        loss, start, sent = _tune(args, data, peers, turns, {**pool, "lr": rate})
        federated.append((loss, sent))
    rows.append(Row("the base", start, 0, 0, 0, 0))
    rows.append(Row("MeZO in one place", min(central), peers * forwards, peers * forwards, 0, 0))
    loss, sent = min(federated)
    up = sent / peers / turns
    rows.append(Row("fedkseed", loss, forwards, peers * forwards, up, (peers - 1) * up))
    local = max(1, math.floor(forwards / FEWER / (FORWARD + BACKWARD) / ROUNDS))
    ferret = {"kind": "projection", "coefficients": 1024, "outer_lr": 50.0, "decay": 0.0}
    loss, _, sent = _tune(args, data, peers, ROUNDS, ferret, local)
    passes = (FORWARD + BACKWARD) * local * ROUNDS
    up = sent / peers / ROUNDS
    rows.append(Row("ferret", loss, passes, peers * passes, up, (peers - 1) * up))
    return rows


def _tune(
    args: argparse.Namespace,
    data: str,
    peers: int,
    turns: int,
    update: dict[str, Any],
    steps: int = 0,
) -> tuple[float, float, int]:
    """Return the loss afterwards and before, and the bytes of all payloads."""
    run = {
        "run": {"name": "finetune", "seed": args.seed, "turns": turns},
        "task": {"name": "hf-causal-lm", "context": 128},
        "local": {
            "batch": args.batch,
            "steps": steps,
            "evaluate_every": 0,
            "optimizer": {"name": "adamw", "lr": 1e-3},
        },
        "exchange": {"update": update, "quantum_bits": 28},
        "swarm": {"min_peers": peers},
    }
    swarm = Lockstep(run, peers, data=data, base=args.base)
    before = swarm.trainers[0].evaluate()
    for _ in range(turns):
        swarm.take()
    after = swarm.trainers[0].evaluate()
    name = f"{update['kind']} by {peers} at {update.get('lr', 0):g}"
    say(f"{name}: {before:.4f} to {after:.4f}")
    return after, before, swarm.payload


def _topics(folder: Path) -> str:
    """Write the reference topics of this Python, which are prose, as text; return where."""
    from pydoc_data import topics

    text = "\n\n".join(topics.topics[name] for name in sorted(topics.topics))
    path = folder / "topics.txt"
    path.write_text(text, "utf-8")
    return str(path)
