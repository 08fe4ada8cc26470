"""Updates to encode: made up, or recorded from a peer that trains the built-in text run."""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from shoal.node.bench._report import say
from shoal.node.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from shoal.compression.codec import Shapes

INPUTS = ("gaussian", "heavy", "real")
SCALE = 30_000.0
"""Standard deviation of made-up updates, in units of q: what text runs publish."""


def chosen_inputs(text: str) -> list[str]:
    """Read the names of inputs."""
    found = text.split(",")
    if wrong := set(found) - set(INPUTS):
        raise ConfigError(f"--inputs: {min(wrong)!r} is none of {', '.join(INPUTS)}")
    return found


@dataclass(frozen=True, slots=True)
class Vector:
    """An update to encode, in units of q."""

    input: str
    x_D: "Tensor"
    shapes: "Shapes"
    about: str = ""
    """How it came about, where the name does not say."""


def vectors(inputs: Sequence[str], sizes: Sequence[int], *, quick: bool) -> Iterator[Vector]:
    """Yield one of every input in every size."""
    recorded = Recorded.make(quick=quick) if "real" in inputs else None
    for size in sizes:
        for name in inputs:
            if recorded is not None and name == "real":
                yield recorded.vector(size)
            else:
                yield made_up(name, size)


def made_up(name: str, size: int) -> Vector:
    """Return a vector of chance: Gaussian, or with heavy tails."""
    import torch

    generator = torch.Generator().manual_seed(size)
    x_D = torch.randn(size, generator=generator)
    if name == "heavy":  # Student's t with 3 degrees of freedom, of variance 1
        squares_D = torch.zeros(size)
        for _ in range(3):
            squares_D += torch.randn(size, generator=generator).square_()
        x_D /= squares_D.sqrt_()  # t = z / √(χ²/3), and its variance is 3
    return Vector(name, x_D.mul_(SCALE), matrices(size))


def matrices(size: int) -> "Shapes":
    """Return shapes for a vector without a model: square matrices, then what is left."""
    side = 1024 if size >= 1 << 23 else 256 if size >= 1 << 19 else 64
    whole, rest = divmod(size, side * side)
    return ((side, side),) * whole + (((rest,),) if rest else ())


@dataclass(frozen=True, slots=True)
class Recorded:
    """Updates of a peer of the text run: residual times weight, in units of q."""

    updates: "list[Tensor]"
    shapes: "Shapes"

    @classmethod
    def make(cls, *, quick: bool) -> "Recorded":
        """Train as one of four peers, a few turns, and keep what each of them would encode."""
        from shoal.compression import codec
        from shoal.node.swarm import adapt, read_run
        from shoal.training.exchange import Arrived
        from shoal.training.parameters import Parameters
        from shoal.training.run import RunSpec
        from shoal.training.trainer import Setup, Trainer

        turns, steps = (2, 4) if quick else (4, 8)
        say(f"recording {turns} updates of a text run")
        tables = adapt(read_run("text"), peers=4, turns=40)
        tables["task"]["model"] = {"layers": 6 if quick else 4, "width": 128 if quick else 256}
        tables["local"] |= {"steps": steps, "evaluate_every": 0}
        tables["exchange"] = {"update": {"kind": "sparse"}}
        spec = RunSpec.parse(tables)
        trainer = Trainer(Setup(run=spec, shard=(0, 4)), clock=time.monotonic)
        part = codec.make(spec.planes[0].update.name, spec.planes[0].update.options)
        updates = []
        for turn in range(1, turns + 1):
            turned = trainer.turn(turn, 4.0)
            if turned.payload is None:
                raise ConfigError(f"the text run did not train: {turned.dropped}")
            trainer.commit(1, turn)
            key, size = (b"recorded", 1, turn), len(turned.payload)
            trainer.apply([Arrived(key, turn, turned.kind, turned.payload, size)])
            residual_D = trainer.exchange.feedback.residual
            assert residual_D is not None
            sent = part.decode(turned.payload, trainer.parameters).dense()
            scale = 2.0**spec.exchange.quantum_bits / 4
            updates.append(residual_D * scale + sent)
        return cls(updates, Parameters(trainer.model).layout.shapes)

    def vector(self, size: int) -> Vector:
        """Return `size` elements: the last update, then those before it, then all again."""
        import torch

        each = len(self.updates[0])
        latest = self.updates[::-1]
        needed = -(-size // each)
        x_D = torch.cat([latest[i % len(latest)] for i in range(needed)])[:size]
        about = f"real: updates of a text model of {each:,} parameters"
        if needed > 1:
            about += f", {min(needed, len(latest))} of them one after the other"
        if needed > len(latest):
            about += f", repeated {size / each / len(latest):.1f} times"
        return Vector("real", x_D.contiguous(), _cut(self.shapes * needed, size), about)


def _cut(shapes: "Shapes", size: int) -> "Shapes":
    """Return the first shapes that make up `size`, the last one cut."""
    found: list[tuple[int, ...]] = []
    for shape in shapes:
        count = math.prod(shape)
        if count > size:
            break
        found.append(shape)
        size -= count
    return (*found, (size,)) if size else tuple(found)
