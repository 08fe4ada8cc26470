"""1-bit Adam: Adam at first; then the variance is frozen and only the momentum moves.

    warm-up:  m ← β₁·m + (1 - β₁)·g;   v ← β₂·v + (1 - β₂)·g²;   x ← x - γ·m̂/(√v̂ + ε)
    after:    m ← β₁·m + (1 - β₁)·g;   x ← x - γ·m̂/(√v_T + ε),   v_T = v̂ at the end of the warm-up

Source: Tang et al., "1-bit Adam: communication efficient large-scale training with Adam's
convergence speed", ICML 2021, arXiv 2102.02888. There the workers exchange the momentum, compressed
to signs with one scale, with error feedback. Here the author's turn says the same thing: with v
frozen the turn's Δ = -Σ γ·m̂/(√v_T + ε) is linear in the momenta, so that the ledger's update
(`kind = "dense", levels = 2, block = 0`, decay 1, after the warm-up) is the compressed,
preconditioned momentum, and the author's residual its error feedback. What differs: m and v_T are
each author's own, since an optimizer's state never leaves its peer, and momenta are averaged as
steps. Both momenta are corrected for their start at zero.

State, by parameter: m and v of its shape; step, and what the stability test compares, as numbers.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from shoal.training.optimizer import check_positive, optimizer

STABLE = 0.96
"""‖v‖₁ now over ‖v‖₁ then, from which on the variance counts as settled (the paper's value)."""


@optimizer("one-bit-adam")
@dataclass(frozen=True, slots=True)
class OneBitAdam:
    """Adam with a variance that is frozen after the warm-up."""

    lr: float = 3e-3
    beta1: float = 0.9
    beta2: float = 0.99
    eps: float = 1e-8
    warmup: int = 200
    """Steps of Adam before the variance may be frozen; the paper warms up for 15-25 % of a run."""
    settle: bool = False
    """Freeze only once ‖v‖₁ is at least 0.96 times what it was 1/(1 - beta2) steps before and at
    most its inverse times that."""

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        check_positive(self, "lr", "eps", "warmup")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}; use one in [0, 1)")

    def build(
        self, parameters: Mapping[str, torch.nn.Parameter], matrices: frozenset[str]
    ) -> list[torch.optim.Optimizer]:
        """Put everything under it."""
        return [FrozenAdam(parameters.values(), self)]


class FrozenAdam(torch.optim.Optimizer):
    """Adam whose second moment is frozen for all parameters at the same step."""

    def __init__(self, parameters: Iterable[torch.nn.Parameter], options: OneBitAdam) -> None:
        super().__init__(parameters, {"lr": options.lr})
        self._options = options
        self._apart = max(1, round(1 / (1 - options.beta2)))
        """Steps between the norms that are compared."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Take one step; freeze the variance after it when the warm-up is over."""
        if closure is not None:
            raise ValueError("1-bit Adam takes no closure")
        memories = []
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._move(p, float(group["lr"]))
                    memories.append(self.state[p])
        if memories and not memories[0]["frozen"]:
            self._end_of_warmup(memories)

    def _move(self, p: torch.nn.Parameter, lr: float) -> None:
        options, memory = self._options, self.state[p]
        if not memory:
            zeros = torch.zeros_like(p, memory_format=torch.preserve_format)
            memory.update(m=zeros, v=zeros.clone(), step=0, frozen=0, norm=0.0)
        assert p.grad is not None
        memory["step"] += 1
        step = memory["step"]
        memory["m"].lerp_(p.grad, 1 - options.beta1)
        variance = memory["v"]
        if not memory["frozen"]:
            variance.mul_(options.beta2).addcmul_(p.grad, p.grad, value=1 - options.beta2)
            variance = variance / (1 - options.beta2**step)
        correction = 1 - options.beta1**step
        p.addcdiv_(memory["m"], variance.sqrt().add_(options.eps), value=-lr / correction)

    def _end_of_warmup(self, memories: list[dict[str, Any]]) -> None:
        """Freeze the variance if it is time; the corrected one is what stays."""
        options = self._options
        step = max(int(memory["step"]) for memory in memories)
        ready = step >= options.warmup
        if options.settle and step % self._apart == 0:
            norms = [float(m["v"].sum()) / (1 - options.beta2 ** int(m["step"])) for m in memories]
            now, before = sum(norms), sum(float(memory["norm"]) for memory in memories)
            for memory, norm in zip(memories, norms, strict=True):
                memory["norm"] = norm
            # At the first look `before` is zero, and nothing is stable yet.
            ready = ready and now >= STABLE * before and before >= STABLE * now
        elif options.settle:
            ready = False
        if ready:
            for memory in memories:
                memory["v"] /= 1 - options.beta2 ** int(memory["step"])
                memory["frozen"] = 1
