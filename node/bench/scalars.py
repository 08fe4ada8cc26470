"""What seeds cost: rebuilding a model from them, and training along them: `shoal bench scalars`.

Replay adds many directions of ±1 to the ledger's integers, as a peer does with the updates of
others. Its speed in parameter·seeds per second stands beside that of the usual way, a `torch.randn`
of the model's size per seed, and beside the float32 that this machine copies per second, each on
one thread or on all, whichever is faster. All take turns within one run. Exit code 1 if 16 seeds or
more on the CPU are less than 8 times as fast as with `torch.randn`.

Training stands beside a bare loop of forward passes of the same model and batches: passes per
second, and memory beyond what such a pass takes. What a step costs on the wire is the payload's
byte, and its share of the signed record that carries a turn's bytes.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from shoal.node.bench._device import add_device, device_name, take_device
from shoal.node.bench._memory import extra
from shoal.node.bench._report import Row, add_json, beside, machine, say, show
from shoal.node.bench._sizes import add_sizes, parse_sizes
from shoal.node.bench._speed import best

if TYPE_CHECKING:
    from torch import Tensor

SEEDS = (1, 16, 256)
MANY = 16
"""Seeds from which replay keeps its promise: fewer are bound by memory …"""
LEAST_RATIO = 8.0
"""… of being so many times as fast as `torch.randn`."""
DRAWN = 2
"""Seeds of `torch.randn` that are timed; each costs the same."""
ROUNDS, REPEATS = 3, 3
"""Each speed is timed in so many rounds, so often or more in each; the best counts."""
UNIT = "parameter·seeds/s"
TRAINED = {"layers": 4, "width": 256, "heads": 4, "context": 128}
"""A model large enough for its passes to be what takes time …"""
QUICK = {"layers": 1, "width": 32, "heads": 1, "context": 32}
"""… and one that is not."""


def register(parser: argparse.ArgumentParser) -> None:
    """Add the flags."""
    add_json(parser)
    add_sizes(parser)
    add_device(parser)
    parser.add_argument("--quick", action="store_true", help="1 M parameters, one round")


def run(args: argparse.Namespace) -> int:
    """Measure and print; 1 if replay of many seeds is not as fast as promised."""
    sizes = [1_000_000] if args.quick else parse_sizes(args.sizes)
    take_device(args)
    rounds = 1 if args.quick else ROUNDS
    replays = [Replay.measure(size, args.device, rounds) for size in sizes]
    threads = f"{args.threads} thread{'s' * (args.threads > 1)}"
    where = f"{machine()}, {threads}" if args.device == "cpu" else device_name()
    rows = [row for r in replays for row in r.rows()]
    rows += training(args.device, rounds, QUICK if args.quick else TRAINED)
    show("scalars", rows, as_json=args.json, where=where)
    slow = too_slow(replays) if args.device == "cpu" else []
    for said in slow:
        print(said, file=sys.stderr)
    return int(bool(slow))


class Replay:
    """Speeds of one size: by number of seeds, of the usual way, and of copying."""

    def __init__(self, size: int, speeds: dict[int, float], randn: float, copied: float) -> None:
        self.size = size
        self.speeds = speeds
        self.randn = randn
        self.copied = copied

    @classmethod
    def measure(cls, size: int, device: str, rounds: int) -> "Replay":
        """Time replay, the usual way and copying in turn."""
        import torch

        say(f"replay of {_label(size)} parameters")
        total_D = torch.zeros(size, dtype=torch.int32, device=device)
        x_D, y_D = torch.zeros(size, device=device), torch.ones(size, device=device)
        usual: list[Callable[[], object]] = [
            lambda: draw(x_D, y_D, DRAWN),
            lambda: y_D.copy_(x_D),
        ]
        replays = [replaying(total_D, seeds) for seeds in SEEDS]
        acts = [*replays, *usual, *map(on_one_thread, usual)]
        *replay, randn, copy, randn_1, copy_1 = in_turn(acts, rounds, device)
        speeds = {n: n * size / seconds for n, seconds in zip(SEEDS, replay, strict=True)}
        return cls(size, speeds, DRAWN * size / min(randn, randn_1), size / min(copy, copy_1))

    def rows(self) -> Iterable[Row]:
        """Return every speed beside both yardsticks."""
        for seeds, speed in self.speeds.items():
            name = f"{_label(self.size)} parameters, {seeds} seed{'s' * (seeds > 1)}"
            yield beside(f"{name}, beside torch.randn", speed, UNIT, self.randn)
            yield beside(f"{name}, beside copied float32", speed, UNIT, self.copied)


def training(device: str, rounds: int, model: Mapping[str, int]) -> Iterable[Row]:
    """Yield what a turn without gradients costs beside bare forward passes."""
    import torch

    from shoal.training.run import RunSpec
    from shoal.training.trainer import Setup, Trainer

    say("training along seeds")
    spec = RunSpec.parse(
        {
            "run": {"name": "scalars", "turns": 1},
            "task": {"name": "text", "model": model},
            "local": {"batch": 8, "evaluate_every": 0},
            "exchange": {"update": {"kind": "scalar", "perturbations": 4}},
        }
    )
    trainer = Trainer(Setup(run=spec, device=device), clock=time.monotonic)
    turned = trainer.turn(1, 1.0)
    steps = len(turned.payload or b"")
    batches = trainer.task.batches(torch.Generator().manual_seed(0))
    drawn = [next(batches) for _ in range(steps)]

    def turn() -> None:
        trainer.discard()
        trainer.turn(1, 1.0)

    def bare() -> None:
        trainer.model.eval()
        with torch.no_grad():
            for batch in drawn:
                for _ in range(2):
                    trainer.task.loss(trainer.model, batch)

    ours, theirs = in_turn([turn, bare], rounds, device)
    label = f"{trainer.parameters / 1e6:.2g} M parameters"
    yield beside(
        f"{label}, forward passes a second beside a bare loop",
        2 * steps / ours,
        "1/s",
        2 * steps / theirs,
    )
    weights = 4 * trainer.parameters
    if (most := extra(turn, device)) is not None and (usual := extra(bare, device)) is not None:
        yield beside(
            f"{label}, memory beyond bare passes, beside the weights", most - usual, "B", weights
        )
    yield beside(f"{label}, payload a step, beside a float32 gradient", 1.0, "B", weights)
    yield Row("a step's share of a signed record of 16", record_bytes(bytes(16)) / 16, "B")


def record_bytes(payload: bytes) -> int:
    """Return the bytes on the wire of the record that carries a payload."""
    from shoal.gossip.names import Author, PeerId, RunId, digest
    from shoal.gossip.records import Update
    from shoal.node.identity import Identity
    from shoal.node.wire.records import Sealer

    who = Identity.generate()
    update = Update(
        Author(PeerId(who.peer), 2**63),
        1000,
        1000,
        "scalar",
        digest(payload),
        len(payload),
        payload,
    )
    return len(Sealer(who, RunId(bytes(32))).seal(update).raw)


def replaying(total_D: "Tensor", seeds: int) -> Callable[[], None]:
    """Return what adds so many directions to the ledger's integers, as updates say."""
    import torch

    from shoal.compression import perturbation, splitmix

    keys_K = splitmix.words(1, seeds)
    coefficients_K = (splitmix.words(2, seeds) >> 40).to(torch.int32)
    return lambda: perturbation.accumulate(total_D, keys_K, coefficients_K)


def draw(x_D: "Tensor", z_D: "Tensor", seeds: int) -> None:
    """Do the same in the usual way: Gaussian directions from torch's own generator."""
    import torch

    generator = torch.Generator(x_D.device)
    for seed in range(seeds):
        torch.randn(len(x_D), generator=generator.manual_seed(seed), out=z_D)
        x_D.add_(z_D, alpha=1e-4)


def on_one_thread(act: Callable[[], object]) -> Callable[[], None]:
    """Return the same act for one thread: torch's threads lose time where others use the cores."""
    import torch

    def alone() -> None:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            act()
        finally:
            torch.set_num_threads(threads)

    return alone


def in_turn(acts: Sequence[Callable[[], object]], rounds: int, device: str) -> list[float]:
    """Return the least seconds of each; a machine that gets slower meanwhile slows all alike."""
    for act in acts:  # compiles what is compiled on first use
        act()
    found = [[best(act, REPEATS, device) for act in acts] for _ in range(rounds)]
    return [min(seconds) for seconds in zip(*found, strict=True)]


def too_slow(replays: Iterable[Replay]) -> list[str]:
    """Return what breaks the promise, in words."""
    return [
        f"replay of {seeds} seeds along {_label(r.size)} parameters is {speed / r.randn:.1f} times "
        f"as fast as torch.randn, less than {LEAST_RATIO:g} times"
        for r in replays
        for seeds, speed in r.speeds.items()
        if seeds >= MANY and speed < LEAST_RATIO * r.randn
    ]


def _label(size: int) -> str:
    return f"{size / 1e6:g} M"
