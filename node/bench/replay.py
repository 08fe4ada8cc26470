"""One log, replayed in many ways, gives one fingerprint: `shoal bench replay`.

Peers publish for 1000 turns: a byte a step, along seeds of a pool, and along directions that all
have in common, of which a turn rule makes one vote. Slopes are random, everything else is the
product's own: draws, payloads, rules, ledger. Then fresh peers take in the log in order and
shuffled, one update at a time and in batches, and with a third of it taken out and put back; on one
thread and on several, and with `--device cuda` there. Exit code 1 if any of their models is another
than that of the peers who made the log turn by turn, or not what its own fingerprint says.
"""

import argparse
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from shoal.node import flags
from shoal.node.bench._device import check_device, device_name
from shoal.node.bench._report import add_json, asked, grid, machine, one_object, say
from shoal.node.errors import ConfigError

if TYPE_CHECKING:
    from shoal.node.bench._lockstep import Lockstep
    from shoal.training.exchange import Arrived
    from shoal.training.trainer import Trainer

LR = 0.01
"""Steps are as of slopes of 1, on the mean square: far from `clip`, and from nothing."""
BATCH = 64
"""Most updates of a batch; how many each has is drawn."""
OUT = 3
"""One in so many updates is taken out and put back."""
WIDTH = 75
"""Parameters of the digits' model for each of its hidden units; ten more are for all."""

Move = tuple[int, list[int]]
"""Take in (1) or out (-1) the updates with these places in the log, at once."""
Lanes = tuple[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One replay, or how the log was made."""

    run: str
    way: str
    where: str
    seconds: float
    fingerprint: str
    equal: bool
    """It is that of the peers who made the log, and the tensor's own."""


def register(parser: argparse.ArgumentParser) -> None:
    """Add the flags."""
    add_json(parser)
    parser.add_argument("--turns", type=flags.positive, default=1000, metavar="N")
    parser.add_argument("--peers", type=flags.positive, default=4, metavar="N")
    parser.add_argument(
        "--perturbations", type=flags.positive, default=4, metavar="N", help="a turn (default: 4)"
    )
    parser.add_argument(
        "--parameters",
        type=flags.positive,
        default=300_000,
        metavar="N",
        help="about so many (default: 300,000)",
    )
    parser.add_argument(
        "--rule", default="median", metavar="NAME", help="of common directions (default: median)"
    )
    parser.add_argument(
        "--threads", type=flags.positive, default=2, metavar="N", help="beside one (default: 2)"
    )
    parser.add_argument("--device", default="cpu", help="cpu, or cuda as well")
    parser.add_argument("--seed", type=int, default=1, metavar="N")


def run(args: argparse.Namespace) -> int:
    """Make the logs, replay and compare."""
    import torch

    check_device(args.device)
    if not 0 <= args.seed < 1 << 62:
        raise ConfigError(f"--seed {args.seed}: use 0 or more")
    threads = torch.get_num_threads()
    try:
        rows = [row for name in ("pool", "common") for row in measure(name, args)]
    finally:
        torch.set_num_threads(threads)
    show(rows, args)
    return int(not all(row.equal for row in rows))


def measure(name: str, args: argparse.Namespace) -> Iterator[Row]:
    """Yield a row for the making of a log and for each replay of it."""
    import torch

    torch.set_num_threads(args.threads)
    began = time.perf_counter()
    label = name if name == "pool" else f"{name}, {args.rule}"
    lockstep, log = make(name, args)
    maker = lockstep.trainers[0]
    wanted = maker.fingerprint()
    yield _row(label, "as it was made, turn by turn", "cpu", began, maker, wanted)
    places = [("cpu", threads) for threads in sorted({1, args.threads})]
    if args.device != "cpu":
        places.append((args.device, args.threads))
    for way, moves in ways(len(log), random.Random(args.seed)).items():
        for device, threads in places:
            where = device if device != "cpu" else f"{threads} thread{'s' * (threads > 1)}"
            say(f"{label}: {way}, {where}")
            torch.set_num_threads(threads)
            fresh = again(name, args, maker.initial_bytes(), device)
            began = time.perf_counter()
            replay(fresh, log, moves)
            yield _row(label, way, where, began, fresh, wanted)


def make(name: str, args: argparse.Namespace) -> "tuple[Lockstep, list[Arrived]]":
    """Return peers that have published and taken in every turn, and all that they published."""
    import torch

    from shoal.node.bench._lockstep import Lockstep
    from shoal.training.exchange import Arrived
    from shoal.training.lesson import Steps

    say(f"{name}: {args.turns} turns of {args.peers} peers")
    lockstep = Lockstep(tables(name, args), args.peers, run_id=run_id(args))
    generator = torch.Generator().manual_seed(args.seed)
    log = []
    for turn in range(1, args.turns + 1):
        lockstep.turn = turn
        payloads: list[bytes | None] = []
        for peer in lockstep.trainers:
            exchange, key = peer.exchange, int(torch.randint(2**62, (), generator=generator))
            codec: Any = exchange.rules.codec(turn, exchange.peer)
            directions = codec.draw(args.perturbations, exchange.chances(codec), key=key)
            slopes = torch.randn(len(directions), generator=generator, dtype=torch.float64)
            steps = Steps(directions, -LR * slopes)
            payload = exchange.publish_steps(steps, 1 / args.peers, turn=turn, key=key)
            peer.commit(0, turn)
            payloads.append(payload)
            log.append(Arrived((exchange.peer, 0, turn), turn, "scalar", payload, len(payload)))
        lockstep.share(payloads)
    return lockstep, log


def ways(count: int, rng: random.Random) -> dict[str, list[Move]]:
    """Return every way to take in a log of so many updates."""
    in_order = list(range(count))
    shuffled, out = rng.sample(in_order, count), rng.sample(in_order, count // OUT)
    return {
        "in order, one by one": [(1, [place]) for place in in_order],
        "in order, in batches": [(1, some) for some in batches(in_order, rng)],
        "shuffled, one by one": [(1, [place]) for place in shuffled],
        "shuffled, in batches": [(1, some) for some in batches(shuffled, rng)],
        "a third out and in again": [
            *((1, some) for some in batches(shuffled, rng)),
            *((-1, some) for some in batches(out, rng)),
            *((1, some) for some in batches(rng.sample(out, len(out)), rng)),
        ],
    }


def batches(places: Sequence[int], rng: random.Random) -> Iterator[list[int]]:
    """Yield them in their order, some at a time."""
    at = 0
    while at < len(places):
        size = rng.randint(1, BATCH)
        yield list(places[at : at + size])
        at += size


def replay(fresh: "Trainer", log: "Sequence[Arrived]", moves: Sequence[Move]) -> None:
    """Take updates in and out; all of them count."""
    for sign, places in moves:
        change = fresh.apply if sign > 0 else fresh.subtract
        for outcome in change([log[place] for place in places]):
            if outcome.refused is not None:
                raise AssertionError(outcome.refused)


def again(name: str, args: argparse.Namespace, initial: bytes, device: str) -> "Trainer":
    """Return a peer that holds no update yet."""
    from shoal.training.run import RunSpec
    from shoal.training.trainer import Setup, Trainer

    spec = RunSpec.parse(tables(name, args))
    setup = Setup(run=spec, peer=bytes(32), run_id=run_id(args), device=device)
    return Trainer(setup, initial=initial, clock=lambda: 0.0)


def run_id(args: argparse.Namespace) -> bytes:
    """Return where this log's seeds come from."""
    found: bytes = args.seed.to_bytes(32, "big")[::-1]
    return found


def tables(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Return the run file of a log."""
    width = max(1, (args.parameters - 10) // WIDTH)
    update = {
        "kind": "scalar",
        "directions": name,
        "perturbations": args.perturbations,
        "lr": LR,
    }
    return {
        "run": {"name": "replay", "seed": args.seed, "turns": args.turns},
        "task": {"name": "digits", "width": width},
        "exchange": {"rule": "sum" if name == "pool" else args.rule, "update": update},
        "swarm": {"min_peers": args.peers},
    }


def show(rows: Sequence[Row], args: argparse.Namespace) -> None:
    """Print one object, or a table."""
    if args.json:
        print(one_object("replay", rows, asked=asked(args)))
        return
    where = machine() if args.device == "cpu" else f"{machine()}, and {device_name()}"
    log = f"{args.turns} turns of {args.peers} peers, {args.parameters} parameters"
    print(f"logs of {log}, replayed on {where}")
    cells = [
        [
            row.run,
            row.way,
            row.where,
            f"{row.seconds:.1f} s",
            row.fingerprint,
            "equal" if row.equal else "NOT EQUAL",
        ]
        for row in rows
    ]
    print(grid(("run", "replay", "on", "took", "fingerprint", ""), cells))


def _row(run: str, way: str, where: str, began: float, holder: "Trainer", wanted: Lanes) -> Row:
    found = holder.fingerprint()
    tensor = holder.recompute()
    return Row(
        run=run,
        way=way,
        where=where,
        seconds=time.perf_counter() - began,
        fingerprint="".join(f"{lane:016x}" for lane in found),
        equal=found == wanted == tensor,
    )
