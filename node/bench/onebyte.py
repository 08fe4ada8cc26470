"""A classifier from random weights to 94 % by kilobytes: `shoal bench onebyte`.

Eight peers learn scikit-learn's digits without gradients: every peer measures slopes along its own
directions and publishes one byte a slope; nothing else is exchanged. Trained in process, turn by
turn, with the product's own trainers and payloads; records, which carry a payload, are not counted.
Exit code 1 if any seed ends below 94 % or needs more than 16 kB in all.
"""

import argparse
import sys
import time
from typing import Any

from shoal.node.bench._lockstep import Lockstep
from shoal.node.bench._report import add_json, grid, machine, one_object
from shoal.node.errors import ConfigError

LEAST_ACCURACY = 0.94
MOST_BYTES = 16_000


def register(parser: argparse.ArgumentParser) -> None:
    """Add the flags."""
    add_json(parser)
    parser.add_argument("--seeds", default="1,2,3", metavar="N,…", help="(default: 1,2,3)")
    parser.add_argument("--peers", type=int, default=8, metavar="N", help="(default: 8)")
    parser.add_argument("--turns", type=int, default=500, metavar="N", help="(default: 500)")
    parser.add_argument(
        "--perturbations", type=int, default=4, metavar="N", help="slopes a turn (default: 4)"
    )
    parser.add_argument("--lr", type=float, default=0.03, help="(default: 0.03)")
    parser.add_argument("--alpha", type=float, default=0.0, help="Dirichlet label skew; 0: none")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="(default: 1)")


def run(args: argparse.Namespace) -> int:
    """Train and print; 1 if a promise is broken."""
    import torch

    try:
        seeds = [int(text) for text in args.seeds.split(",")]
    except ValueError:
        raise ConfigError(f"--seeds {args.seeds}: give whole numbers, as 1,2,3") from None
    if min(args.peers, args.turns, args.perturbations, args.threads) < 1:
        raise ConfigError("--peers, --turns, --perturbations and --threads are above zero")
    torch.set_num_threads(args.threads)
    rows = [measure(args, seed) for seed in seeds]
    if args.json:
        print(one_object("onebyte", rows))
    else:
        print(f"digits by one byte a slope, {args.peers} peers, on {machine()}")
        heads = ("seed", "before", "after", "payload bytes", "seconds")
        print(
            grid(
                heads,
                [
                    [
                        str(row["seed"]),
                        f"{row['before']:.1%}",
                        f"{row['after']:.1%}",
                        str(row["bytes"]),
                        f"{row['seconds']:.0f}",
                    ]
                    for row in rows
                ],
            )
        )
    bad = [row for row in rows if row["after"] < LEAST_ACCURACY or row["bytes"] > MOST_BYTES]
    for row in bad:
        print(
            f"seed {row['seed']}: {row['after']:.1%} with {row['bytes']} bytes; "
            f"promised: {LEAST_ACCURACY:.0%} with {MOST_BYTES}",
            file=sys.stderr,
        )
    return 1 if bad else 0


def tables(args: argparse.Namespace, seed: int) -> dict[str, Any]:
    """Return the run file."""
    return {
        "run": {"name": "onebyte", "seed": seed, "turns": args.turns},
        "task": {"name": "digits", "alpha": args.alpha},
        "local": {
            "batch": 180,
            "evaluate_every": 0,
            "optimizer": {"name": "sgd", "schedule": "wsd"},
        },
        "exchange": {
            "update": {
                "kind": "scalar",
                "directions": "own",
                "perturbations": args.perturbations,
                "walk": False,
                "lr": args.lr,
            }
        },
        "swarm": {"min_peers": args.peers},
    }


def measure(args: argparse.Namespace, seed: int) -> dict[str, float]:
    """Train one seed."""
    began = time.monotonic()
    peers = Lockstep(tables(args, seed), args.peers, run_id=bytes([seed % 256]) * 32)
    before = peers.trainers[0].evaluate()
    for _ in range(args.turns):
        peers.take()
    return {
        "seed": seed,
        "before": before,
        "after": peers.trainers[0].evaluate(),
        "bytes": peers.payload,
        "seconds": time.monotonic() - began,
    }
