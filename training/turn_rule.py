"""How the updates of one turn become the turn's contribution (design 3.5): contract and registry.

By default each update contributes by itself and the turn is their sum. Another rule looks at all
updates of a turn at once; what it makes of them stands for their sum. It must be a function of the
*set* of updates, in exact integers: then the model is a function of the frontier alone, whatever
the order in which updates came, and a late one reaches back exactly.

Of the updates that a peer publishes in one turn (under other numbers, in other logs) a rule sees
one, that of the smallest (log, number): one vote a peer and turn. That is why nothing depends on
an author's turns never decreasing: who goes back to an old turn finds that it has voted there, or
votes late, which it could have done from a fresh log as well.

Where nobody waits for the others (`pace = "free"`), who comes first in a turn would decide it
until the others come, and who publishes turns far ahead could decide many. So while fewer have
voted than the rule's `quorum`, those that are missing count as votes for zero, and a few who come
first move the model little or not at all: those are fewer than half of it, or than the share that
the rule cuts. More of them, and a quarter of `min_peers` may be enough, decide turns that nobody
else has reached, until the others come; who expects so many asks for more votes. Peers that left
for good are missed for ever: a swarm that has shrunk to half of a quorum stands still.

What no rule can do. Against false identities nothing is gained: whoever is the majority of a
turn's voters decides it, and `admission = "open"` lets anybody have many (Douceur, "The Sybil
attack", 2002). With one voter or two there is no majority to trust. Peers whose data differ
disagree honestly, and a rule that mistrusts what is far from the others mistrusts them as well
(Karimireddy, He & Jaggi, "Byzantine-robust learning on heterogeneous datasets via bucketing",
2022, arXiv 2006.09365): it costs accuracy then, without any liar. Whoever lies a little stays among
the others, in every turn.

Adding a rule is adding one file to `turn_rules/`: a frozen dataclass whose fields are its options,
under `@turn_rule("name")`.
"""

import importlib
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any, ClassVar, Protocol, TypeVar, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray

from shoal.compression.codec import Codec, Combination, Contribution
from shoal.compression.settings import SettingError, build, fill, unknown
from shoal.training import contribution

Said = NDArray[np.int64]
"""What N voters say along K directions."""
MOST_QUORUM = 4096


class TurnRule(Protocol):
    """What a turn's updates add to the model together."""

    alone: ClassVar[bool]
    """An update contributes by itself: the others of its turn need not be kept. Only of `sum`."""
    along: ClassVar[bool]
    """It compares what peers say along the same directions (`common`)."""

    def total(self, updates: Sequence[Contribution]) -> Contribution | None:
        """Return the contribution of a turn with these updates, one a peer; their order is chance.

        None stands for zero.
        """
        ...


@runtime_checkable
class Scaling(Protocol):
    """A rule whose total is the sum of the updates, each scaled by a share that follows from all
    their norms: then only those are looked at again whose share changes."""

    def shares(self, squares: Sequence[int]) -> list[int]:
        """Return the share of each update, 0 to 2^30, in units of 2^-30 (`contribution.scaled`).

        `squares`: the exact squares of their norms.
        """
        ...


C = TypeVar("C", bound=type)
_rules: dict[str, Callable[..., TurnRule]] = {}


def turn_rule(name: str) -> Callable[[C], C]:
    """Register a frozen dataclass as the rule `name`."""

    def register(cls: C) -> C:
        _rules[name] = cls
        return cls

    return register


def names() -> list[str]:
    """Return the names of all rules."""
    _scan()
    return sorted(_rules)


def filled(
    given: str | Mapping[str, Any], *, peers: int = 0, where: str = "exchange.rule"
) -> dict[str, Any]:
    """Return name and all options of what a run file names: a name, or a table with a name.

    For rules along directions a quorum that is not given is the majority of the `peers` that are
    expected to vote. Raises SettingError.
    """
    table: Any = {"name": given} if isinstance(given, str) else given
    options = dict(table) if isinstance(table, Mapping) else {}
    name = options.pop("name", None)
    if not isinstance(name, str):
        raise SettingError(f"{where} = {given!r} names no rule; known: {', '.join(names())}")
    cls = _find(name, where)
    values = fill(cls, options, where=where)
    build(cls, values, where=where)
    if peers and getattr(cls, "along", False) and not values["quorum"]:
        values["quorum"] = peers // 2 + 1
    return {"name": name, **values}


def make(given: str | Mapping[str, Any], *, where: str = "exchange.rule") -> TurnRule:
    """Return the rule that a run file names, or raise SettingError."""
    options = filled(given, where=where)
    return build(_find(options.pop("name"), where), options, where=where)


def common(part: Codec) -> bool:
    """Say whether this codec's payloads of one turn, whoever's, are along the same directions."""
    return getattr(part, "directions", None) == "common"


def exactly(number: float) -> Fraction:
    """Return a number of a run file exactly as it is written in decimal: no rounding decides."""
    return Fraction(str(number))


def check_quorum(quorum: int) -> None:
    """Refuse what is no number of votes."""
    if not 0 <= quorum <= MOST_QUORUM:
        raise ValueError(f"quorum = {quorum}; use 0 (left to the rule) to {MOST_QUORUM} votes")


def column_by_column(
    updates: Sequence[Contribution], quorum: int, rule: Callable[[Said, int], Said]
) -> Contribution | None:
    """Return what a rule makes of the votes, int64[N, K], of which so many are real: int64[K].

    The rest of N, which is `quorum` or more, are zeros. Who says nothing along a direction, having
    published fewer, says zero there, too: so a few who say more than the others cannot decide alone
    where these are silent.
    """
    combinations = [update for update in updates if isinstance(update, Combination)]
    if len(combinations) < len(updates):
        raise TypeError("the updates of this turn are not along directions")
    if not combinations:
        return None
    keys_K, said_NK = contribution.table(combinations, least=quorum)
    found_K = torch.from_numpy(np.ascontiguousarray(rule(said_NK, len(combinations))))
    return contribution.combination(combinations[0], keys_K, found_K)


def _find(name: str, where: str) -> Callable[..., TurnRule]:
    _scan()
    if name not in _rules:
        raise unknown(where, name, _rules)
    return _rules[name]


def _scan() -> None:
    package = importlib.import_module("shoal.training.turn_rules")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{module.name}")
