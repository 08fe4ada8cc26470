"""A valley to walk in, ½‖x‖², and what a method of training needs besides."""

import itertools
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn

from shoal.compression import codec
from shoal.training import ledger
from shoal.training.exchanges.ledger import LedgerExchange
from shoal.training.forwards import Resident
from shoal.training.method import Tools
from shoal.training.methods.zeroth_order import ZerothOrder
from shoal.training.parameters import Parameters
from shoal.training.rules import Fragment, Plane, Rules
from shoal.training.walk import WalkSettings

BITS = 24
RUN = b"the run id, of which 16 count..."
PEER = b"p" * 32


class Point(nn.Module):
    """Parameters that are nothing but numbers."""

    def __init__(self, *parts: Sequence[float] | Tensor) -> None:
        super().__init__()
        self.parts = nn.ParameterList([torch.as_tensor(part).float().clone() for part in parts])


class Valley:
    """loss = ½‖x‖² in float64, plus what the test adds; each batch is its number."""

    def __init__(self, *, noise: bool = False) -> None:
        self.noise = noise
        self.batches_drawn = 0
        self.losses = 0

    def model(self) -> nn.Module:
        """Return a point that is not where the valley is lowest."""
        return Point([1.0, 2.0, 3.0])

    def batches(self, generator: torch.Generator) -> Iterator[int]:
        """Yield numbers."""
        for number in itertools.count():
            self.batches_drawn += 1
            yield number

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """Return the height."""
        self.losses += 1
        height = sum(((p.double() ** 2).sum() for p in model.parameters()), torch.zeros(())) / 2
        return height + torch.rand(()) if self.noise else height


class Rig:
    """One author's method, exchange and codec."""

    def __init__(
        self,
        task: Any,
        model: nn.Module,
        *,
        settings: WalkSettings | None = None,
        turns: int = 0,
        rate: Any = lambda progress: 1.0,
        buffers: str = "refuse",
        bits: int = BITS,
        **options: Any,
    ) -> None:
        settings = settings or WalkSettings(lr=0.01)
        self.task, self.model = task, model
        self.parameters = Parameters(model)
        size = self.parameters.layout.size
        self.part = codec.make("scalar", {"exponent": 8, **options})
        initial_D = ledger.from_floats(self.parameters.read(), bits)
        plane = Plane("scalar", (Fragment(0, size, self.part),))
        rules = Rules(
            (plane,), turns=turns, clip=Fraction(10**30), initial_squares=1 << 80, run=RUN
        )
        self.exchange = LedgerExchange(initial_D, rules, [settings], quantum_bits=bits, peer=PEER)
        ticks = itertools.count()
        tools = Tools(
            task=task,
            model=model,
            parameters=self.parameters,
            rate=rate,
            turns=turns,
            clock=lambda: float(next(ticks)),
            buffers=buffers,
        )
        self.forwards = Resident(task, model, self.parameters, bits)
        self.method = ZerothOrder(tools, self.forwards, settings)

    def learn(self, *, turn: int = 1, steps: int = 10**9, seed: int = 0) -> Any:
        """Take a turn."""
        bound = self.exchange.rules.codec(turn, PEER)
        return self.method.learn(self.exchange, bound, turn=turn, steps=steps, seed=seed)

    def signs(self, turn: int, direction: int) -> Any:
        """Return z of a direction, by the oracle."""
        from support import seeds

        bound: Any = self.exchange.rules.codec(turn, PEER)
        return seeds.signs(bound.key(direction), self.parameters.layout.size)
