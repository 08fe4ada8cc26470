"""The five tables of a run file as dataclasses: every key, its default and what it means. No torch.

Options of parts (`task.*`, `local.optimizer.*`, `exchange.update.*`) are not listed here; each part
knows its own (`training/run.py` checks them).
"""

import re
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

from shoal.training.staleness import Staleness

LARGE_EXPONENT = re.compile(r"[eE][-+]?[\d_]{4}")
"""Of a number that takes for ever to write out."""
NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")


@dataclass(frozen=True, slots=True)
class Run:
    """`[run]`: what the run is called and how long it goes."""

    name: str
    """Also the directory's name: small letters, digits, `.`, `_`, `-`."""
    seed: int = 0
    """Decides initial model, held-out data and shards."""
    turns: int = 0
    """Each peer stops publishing after so many turns; 0: for ever."""
    buffers: str = "refuse"
    """`refuse` models whose floating-point buffers change in training, or keep them `local`."""

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        if not NAME.fullmatch(self.name):
            raise ValueError(f"name = {self.name!r} must match {NAME.pattern}")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed = {self.seed}; use one from 0 to 2^63 - 1")
        if not 0 <= self.turns < 2**32:
            raise ValueError(f"turns = {self.turns}; use 0 (for ever) to 2^32 - 1")
        _one_of("buffers", self.buffers, "refuse", "local")


@dataclass(frozen=True, slots=True)
class Local:
    """`[local]`: how a peer trains between two updates."""

    optimizer: dict[str, Any] = field(default_factory=lambda: {"name": "adamw"})
    batch: int = 16
    """Examples per step."""
    steps: int = 0
    """Steps per turn; 0: as many as fit in `turn_seconds`."""
    turn_seconds: float = 2.0
    """How long a turn shall take when `steps` is 0."""
    min_steps: int = 1
    max_steps: int = 1_000_000
    """Bounds on the steps of a turn when `steps` is 0; the upper one is for those who want one."""
    evaluate_every: int = 1
    """Measure the shared model on held-out data before every so manyth turn; 0: never."""

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        if self.batch < 1:
            raise ValueError(f"batch = {self.batch}; use at least 1")
        if self.steps < 0 or self.evaluate_every < 0:
            raise ValueError("steps and evaluate_every cannot be negative")
        if not 0 < self.turn_seconds <= 86400:
            raise ValueError(f"turn_seconds = {self.turn_seconds}; use more than 0, at most a day")
        if not 1 <= self.min_steps <= self.max_steps:
            raise ValueError(
                f"min_steps = {self.min_steps}, max_steps = {self.max_steps}; use 1 <= min <= max"
            )


@dataclass(frozen=True, slots=True)
class Exchange:
    """`[exchange]`: what peers tell each other and which rules every update must keep."""

    mode: str = "ledger"
    update: dict[str, Any] | list[Any] = field(default_factory=lambda: {"kind": "sparse"})
    """Kind and settings; or a list of them, each but the last with `every`: see the README."""
    pace: str = "free"
    """`free`: nobody waits; `lockstep`: turn t waits for everybody's turn t - 1."""
    preset: str = ""
    """A published recipe (`training/presets.py`) whose keys hold where the file says nothing."""
    control: str = "ef14"
    """What becomes of what rounding drops. `ef14`: it stays with the author (error feedback)."""
    participation: float = 1.0
    """Fraction of the peers that publish in a turn; what the others learn goes into their next."""
    fragments: int = 1
    """The model is published in so many parts, one a turn: peak traffic falls by their number."""
    quantum_bits: int = 24
    """The ledger's unit is 2^-quantum_bits: 24 for |weight| < 128, 28 for |weight| < 8."""
    clip: int | float | str = 1
    """An update counts if Σ of its squares is at most so many times the initial model's; a number
    or a fraction such as "1/4"."""
    staleness: Staleness = Staleness()
    """How much an update of a peer counts that is slower than the others."""
    rule: str | dict[str, Any] = "sum"
    """What the updates of one turn add up to: a name (`training/turn_rules/`), or a table with the
    rule's options."""

    def __post_init__(self) -> None:
        """Refuse values out of range, and what does not exist yet."""
        if self.mode == "mixing":
            raise ValueError("mode = 'mixing' is not built yet; use mode = 'ledger'")
        _one_of("mode", self.mode, "ledger", "mixing")
        _one_of("pace", self.pace, "free", "lockstep")
        if not 1 <= self.fragments <= 1024:
            raise ValueError(f"fragments = {self.fragments}; use 1 to 1024")
        if not 0 < self.participation <= 1:
            raise ValueError(f"participation = {self.participation}; use one in (0, 1]")
        if not 8 <= self.quantum_bits <= 30:
            raise ValueError(f"quantum_bits = {self.quantum_bits}; use 8 to 30")
        if self.clip_ratio() <= 0:
            raise ValueError(f"clip = {self.clip!r} must be above 0")

    def combines(self) -> bool:
        """Say whether what an update adds depends on the others of its turn."""
        rule = self.rule if isinstance(self.rule, str) else self.rule.get("name")
        return rule != "sum"

    def clip_ratio(self) -> Fraction:
        """Return `clip` exactly, as it is written in decimal."""
        text = str(self.clip)
        if LARGE_EXPONENT.search(text):  # the run file may be a stranger's
            raise ValueError(f"clip = {text!r}; use an exponent of at most three digits")
        try:
            return Fraction(text)
        except (ValueError, ZeroDivisionError):
            message = f"clip = {self.clip!r} is neither a number nor a fraction such as '1/4'"
            raise ValueError(message) from None


@dataclass(frozen=True, slots=True)
class Swarm:
    """`[swarm]`: who may take part and who talks to whom."""

    admission: str = "open"
    """`open`: whoever has the join address; `secret`: who has the secret file as well."""
    topology: str = "exponential"
    min_peers: int = 1
    """The size the run expects: with fewer, each steps and shards as if so many were there."""

    def __post_init__(self) -> None:
        """Refuse values out of range, and what does not exist yet."""
        if self.admission == "invite":
            raise ValueError("admission = 'invite' is not built yet; use 'open' or 'secret'")
        _one_of("admission", self.admission, "open", "secret", "invite")
        _one_of("topology", self.topology, "ring", "exponential", "complete")
        if not 1 <= self.min_peers <= 512:
            raise ValueError(f"min_peers = {self.min_peers}; use 1 to 512")


def _one_of(key: str, value: str, *known: str) -> None:
    if value not in known:
        raise ValueError(f"{key} = {value!r} is unknown; use one of {', '.join(known)}")
