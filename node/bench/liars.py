"""What lying peers do to a run of scalars, under each turn rule: `shoal bench liars`.

Peers train the digits in lockstep, in one process, with the product's own turns, payloads, rules
and ledger: two bytes a turn each, along directions that all have in common. Some of them lie as
well as they can: they see what the honest say, and say ∓127 against the sign of its median, in
every turn. Each rule is shown without liars (all are honest then) and with them, as a mean over
seeds. Exit code 1 if with at most a quarter of liars on evenly dealt data the median loses more
than 3 points of accuracy by them in a run of 3000 turns or more.

With `--alpha` the labels differ from peer to peer (Dirichlet; .5 is mild, .1 harsh). Then honest
slopes differ, and rules that leave out what is far from the others cost points without any liar.
"""

import argparse
import multiprocessing
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any

from shoal.node import flags
from shoal.node.bench._report import add_json, asked, grid, machine, one_object, say
from shoal.node.errors import ConfigError

if TYPE_CHECKING:
    from shoal.node.bench._lockstep import Lockstep

RULES = "sum,median,trimmed_mean,clip"
LOSS, TURNS, SHARE = 0.03, 3000, 4
"""The median loses at most so much, in a run of so many turns, with one liar in so many peers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One rule, without liars and with them."""

    rule: str
    without: float
    """Accuracy on held-out images at the end."""
    with_liars: float
    bytes: int
    """Payload of all peers together, in one run."""


def register(parser: argparse.ArgumentParser) -> None:
    """Add the flags."""
    add_json(parser)
    parser.add_argument("--turns", type=flags.positive, default=TURNS, metavar="N")
    parser.add_argument("--peers", type=flags.positive, default=8, metavar="N")
    parser.add_argument("--liars", type=int, default=2, metavar="N", help="of the peers")
    parser.add_argument(
        "--alpha", type=float, default=0.0, metavar="A", help="Dirichlet; 0 deals evenly (default)"
    )
    parser.add_argument("--rules", default=RULES, metavar="NAME,…", help=f"(default: {RULES})")
    parser.add_argument(
        "--perturbations", type=flags.positive, default=2, metavar="N", help="a turn (default: 2)"
    )
    parser.add_argument("--lr", type=flags.positive_float, default=0.012, help="(default: .012)")
    parser.add_argument("--seed", type=int, default=1, metavar="N", help="the first (default: 1)")
    parser.add_argument(
        "--seeds", type=flags.positive, default=1, metavar="N", help="how many (default: 1)"
    )
    parser.add_argument(
        "--jobs", type=flags.positive, default=1, metavar="N", help="runs at a time (default: 1)"
    )


def run(args: argparse.Namespace) -> int:
    """Train and show."""
    if not 0 <= args.liars < args.peers:
        raise ConfigError(f"--liars {args.liars}: give 0 to {args.peers - 1} of {args.peers} peers")
    if not 0 <= args.alpha < 1e9 or not 0 <= args.seed < 1 << 62:
        raise ConfigError("--alpha and --seed can't be negative, nor enormous")
    rows = measure(args)
    show(rows, args)
    return int(bool(broken(rows, args)))


def measure(args: argparse.Namespace) -> list[Row]:
    """Return a row for each rule."""
    rules = args.rules.split(",")
    tasks = [
        (rule, liars, replaced(args, seed))
        for rule in rules
        for liars in sorted({0, args.liars})
        for seed in range(args.seed, args.seed + args.seeds)
    ]
    if args.jobs == 1:
        found = [train(*task) for task in tasks]
    else:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(args.jobs, context) as pool:
            found = list(pool.map(train, *zip(*tasks, strict=True)))
    accuracy: dict[tuple[str, int], list[float]] = {}
    for (rule, liars, _), one in zip(tasks, found, strict=True):
        accuracy.setdefault((rule, liars), []).append(one[0])
    return [
        Row(
            rule=rule,
            without=fmean(accuracy[rule, 0]),
            with_liars=fmean(accuracy[rule, args.liars]),
            bytes=found[0][1],
        )
        for rule in rules
    ]


def replaced(args: argparse.Namespace, seed: int) -> argparse.Namespace:
    """Return what another seed's run needs to know."""
    names = ("turns", "peers", "alpha", "perturbations", "lr")
    return argparse.Namespace(seed=seed, **{name: getattr(args, name) for name in names})


def train(rule: str, liars: int, args: argparse.Namespace) -> tuple[float, int]:
    """Return the accuracy at the end of a run, and its payload in bytes."""
    import torch

    from shoal.node.bench._lockstep import Lockstep

    say(f"{rule}, {liars} of {args.peers} lie, seed {args.seed}")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # so small a model gains nothing from more
    try:
        run_id = args.seed.to_bytes(32, "big")[::-1]
        lockstep = Lockstep(tables(rule, args), args.peers, run_id=run_id)
        for _ in range(args.turns):
            take(lockstep, liars)
        return lockstep.trainers[0].evaluate(), lockstep.payload
    finally:
        torch.set_num_threads(threads)


def tables(rule: str, args: argparse.Namespace) -> dict[str, Any]:
    """Return the run."""
    update = {
        "kind": "scalar",
        "directions": "common",
        "perturbations": args.perturbations,
        "lr": args.lr,
        "walk": False,
    }
    return {
        "run": {"name": "liars", "seed": args.seed, "turns": args.turns},
        "task": {"name": "digits", "alpha": args.alpha},
        "local": {
            "batch": 128,
            "steps": args.perturbations,
            "evaluate_every": 0,
            "optimizer": {"name": "sgd", "schedule": "wsd"},
        },
        "exchange": {"rule": rule, "update": update},
        "swarm": {"min_peers": args.peers},
    }


def take(lockstep: "Lockstep", liars: int) -> None:
    """Take a turn, in which the last peers lie."""
    lockstep.turn += 1
    peers = lockstep.trainers
    honest: list[bytes | None] = []
    for trainer in peers[: len(peers) - liars]:
        honest.append(trainer.turn(lockstep.turn, len(peers)).payload)
        trainer.commit(0, lockstep.turn)
    said = [payload for payload in honest if payload is not None]
    lies = [lie(lockstep, said) if said else None] * liars
    lockstep.share([*honest, *lies])


def lie(lockstep: "Lockstep", said: Sequence[bytes]) -> bytes:
    """Return the largest payload against what honest peers say in this turn."""
    import torch

    from shoal.compression.codecs.scalar import TOP, Said, Scalar

    exchange = lockstep.trainers[-1].exchange
    codec = exchange.rules.codec(lockstep.turn, exchange.peer)
    assert isinstance(codec, Scalar)
    size = exchange.rules.size
    rows = [codec.unpack(payload, size) for payload in said]
    middle_S = torch.stack([row.mantissas for row in rows]).double().quantile(0.5, dim=0)
    against_S = torch.where(middle_S > 0, -TOP, TOP)
    return codec.pack(Said(rows[0].directions, against_S), size)


def broken(rows: Sequence[Row], args: argparse.Namespace) -> list[Row]:
    """Return the rows that break the promise."""
    if args.alpha or args.turns < TURNS or args.liars * SHARE > args.peers:
        return []
    return [row for row in rows if row.rule == "median" and row.with_liars < row.without - LOSS]


def show(rows: Sequence[Row], args: argparse.Namespace) -> None:
    """Print one object, or a table."""
    if args.json:
        print(one_object("liars", rows, asked=asked(args)))
        return
    heads = ["turn rule", "no liars", f"{args.liars} of {args.peers} lie", "lost", "payload"]
    cells = [
        [
            row.rule,
            f"{row.without:.3f}",
            f"{row.with_liars:.3f}",
            f"{row.without - row.with_liars:.3f}",
            f"{row.bytes} bytes",
        ]
        for row in rows
    ]
    data = f"labels by Dirichlet({args.alpha:g})" if args.alpha else "evenly dealt data"
    seeds = f"{args.seeds} seeds, " if args.seeds > 1 else ""
    print(f"accuracy on held-out digits after {args.turns} turns, {seeds}{data}, on {machine()}")
    print(grid(heads, cells))
