"""What a run file means to the worker: every table and every option checked, every default filled.

`RunSpec.parse` takes the five tables as plain dicts; `filled` returns them with all defaults, which
is what the genesis stores.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeVar

from shoal.compression import codec
from shoal.compression.settings import SettingError, build, fill, unknown
from shoal.training import control, optimizer, presets, schedule, tables, task, turn_rule
from shoal.training.feedback import FeedbackSettings
from shoal.training.walk import WalkSettings, rate_for

T = TypeVar("T")
TABLES = ("run", "task", "local", "exchange", "swarm")
MOST_PLANES = 4


class RunError(ValueError):
    """The run cannot be trained as asked; one line with the remedy."""


@dataclass(frozen=True, slots=True)
class Part:
    """A named part and all its options."""

    name: str
    options: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Plane:
    """One of the kinds of update of a run."""

    update: Part
    """Kind and settings of the codec."""
    author: FeedbackSettings | WalkSettings
    """How it comes about: from a vector with a residual, or from steps along directions."""
    every: int = 1
    """It has every so manyth turn, but for those of the planes before it."""

    @property
    def by_time(self) -> bool:
        """Say whether the steps of a turn may be as many as fit its time."""
        return isinstance(self.author, FeedbackSettings)

    def sized(self, parameters: int, quantum_bits: int, peers: float) -> "Plane":
        """Return the plane with a learning rate for a model of this size, if it has none.

        `peers` publish in a turn, on average.
        """
        if not isinstance(self.author, WalkSettings) or self.author.lr:
            return self
        author = replace(self.author, lr=rate_for(parameters))
        update = _with_steps(self.update, author, quantum_bits, peers, "exchange.update")
        return replace(self, update=update, author=author)

    def filled(self) -> dict[str, Any]:
        """Return it as plain data."""
        return {"kind": self.update.name, **asdict(self.author), **self.update.options}


@dataclass(frozen=True, slots=True)
class RunSpec:
    """A run file, checked and complete."""

    run: tables.Run
    task: Part
    local: tables.Local
    optimizer: Part
    schedule: str
    exchange: tables.Exchange
    planes: tuple[Plane, ...]
    """What is published in which turn; most runs have one."""
    swarm: tables.Swarm

    @classmethod
    def parse(cls, given: Mapping[str, Any], *, allow_task: str | None = None) -> "RunSpec":
        """Return the spec of the five tables, or raise RunError.

        `allow_task` is the one `package.module:Factory` that the local operator allows.
        """
        try:
            return _parse(given, allow_task)
        except SettingError as error:
            raise RunError(str(error)) from error

    def sized(self, parameters: int) -> "RunSpec":
        """Return the spec with what follows from the model's size; raises SettingError."""
        bits, peers = self.exchange.quantum_bits, _publishing(self.exchange, self.swarm.min_peers)
        return replace(self, planes=tuple(p.sized(parameters, bits, peers) for p in self.planes))

    def filled(self) -> dict[str, dict[str, Any]]:
        """Return the five tables as plain data with every default filled in."""
        local = asdict(self.local)
        local["optimizer"] = {
            "name": self.optimizer.name,
            "schedule": self.schedule,
            **self.optimizer.options,
        }
        exchange = asdict(self.exchange)
        planes = [plane.filled() for plane in self.planes]
        if len(planes) > 1:
            for said, plane in zip(planes, self.planes, strict=True):
                said["every"] = plane.every
        exchange["update"] = planes if len(planes) > 1 else planes[0]
        return {
            "run": asdict(self.run),
            "task": {"name": self.task.name, **self.task.options},
            "local": local,
            "exchange": exchange,
            "swarm": asdict(self.swarm),
        }


def _parse(given: Mapping[str, Any], allow_task: str | None) -> RunSpec:
    for name in given:
        if name not in TABLES:
            raise unknown("table", name, TABLES)
    given = presets.expand(given)
    run = _table(tables.Run, given, "run")
    local = _table(tables.Local, given, "local")
    exchange = _table(tables.Exchange, given, "exchange")
    swarm = _table(tables.Swarm, given, "swarm")
    voters = max(1, int(swarm.min_peers * exchange.participation))
    exchange = replace(exchange, rule=turn_rule.filled(exchange.rule, peers=voters))
    inner, curve = _optimizer(local.optimizer, run.turns)
    if reason := control.ledger(exchange.control):
        raise SettingError(
            f"exchange.control = {exchange.control!r} cannot be used with the ledger: {reason}"
        )
    planes = _planes(exchange, swarm.min_peers)
    if exchange.pace == "lockstep" and not local.steps and any(p.by_time for p in planes):
        raise SettingError("exchange.pace = 'lockstep' needs a fixed local.steps")
    _check_rule(exchange.rule, planes)
    return RunSpec(
        run=run,
        task=_task(given.get("task", {}), allow_task),
        local=local,
        optimizer=inner,
        schedule=curve,
        exchange=exchange,
        planes=planes,
        swarm=swarm,
    )


def _check_rule(given: str | dict[str, Any], planes: tuple[Plane, ...]) -> None:
    """Refuse a rule that these kinds of update give nothing to compare."""
    rule = turn_rule.make(given)
    for plane in planes:
        part = codec.make(plane.update.name, plane.update.options, where="exchange.update")
        if rule.along and not turn_rule.common(part):
            raise SettingError(
                f"exchange.rule = {turn_rule.filled(given)['name']!r} compares what peers say "
                f"along the same directions, and updates of kind {plane.update.name!r} as they are "
                "set have none in common: use kind = 'scalar' with directions = 'common', or "
                "rule = 'clip_norm', which serves every kind"
            )


def _table(kind: Callable[..., T], given: Mapping[str, Any], where: str) -> T:
    table = given.get(where, {})
    if not isinstance(table, Mapping):
        raise SettingError(f"[{where}] must be a table, got {table!r}")
    return build(kind, fill(kind, table, where=where), where=where)


def _task(given: Any, allow_task: str | None) -> Part:
    if not isinstance(given, Mapping) or not isinstance(given.get("name"), str):
        raise SettingError(f"task.name is missing; known tasks: {', '.join(task.names())}")
    options = {key: value for key, value in given.items() if key != "name"}
    name = given["name"]
    factory = task.find(name, allow_task=allow_task)
    filled = fill(factory, options, where="task", skip=1)
    for key, value in filled.items():
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError):
            raise SettingError(f"task.{key} = {value!r} cannot stand in a run file") from None
    return Part(name, filled)


def _optimizer(given: Mapping[str, Any], turns: int) -> tuple[Part, str]:
    options = {k: v for k, v in given.items() if k not in ("name", "schedule")}
    name, curve = given.get("name", "adamw"), given.get("schedule", "constant")
    if not isinstance(curve, str) or curve not in schedule.SCHEDULES:
        raise unknown("local.optimizer.schedule", str(curve), schedule.SCHEDULES)
    if curve != "constant" and not turns:
        raise SettingError(f"schedule = {curve!r} needs an end: set run.turns, or use 'constant'")
    return Part(name, optimizer.filled(str(name), options)), curve


def _planes(exchange: tables.Exchange, peers: int) -> tuple[Plane, ...]:
    """Return what is published in which turn."""
    given = exchange.update
    if not isinstance(given, list):
        return (_plane(given, exchange, peers, "exchange.update", last=True),)
    if not 1 <= len(given) <= MOST_PLANES:
        raise SettingError(f"exchange.update lists {len(given)} kinds; list 1 to {MOST_PLANES}")
    where = [f"exchange.update[{i}]" for i in range(len(given))]
    return tuple(
        _plane(one, exchange, peers, name, last=one is given[-1])
        for one, name in zip(given, where, strict=True)
    )


def _plane(given: Any, exchange: tables.Exchange, peers: int, where: str, *, last: bool) -> Plane:
    if not isinstance(given, Mapping):
        raise SettingError(f"{where} must be a table, or a list of tables, got {given!r}")
    every = given.get("every", 1)
    if type(every) is not int or not 1 <= every < 2**31 or (every == 1) != last:
        raise SettingError(
            f"{where}.every = {every!r}; the last kind of update has every turn that the others "
            "leave (no `every`), the others every second, third … (`every` = 2, 3 …)"
        )
    name = str(given.get("kind", "sparse"))
    directed = name in codec.names() and codec.directed(name)
    mine = (WalkSettings if directed else FeedbackSettings).__dataclass_fields__
    settings = {k: v for k, v in given.items() if k not in ("kind", "every") and k not in mine}
    own = {k: v for k, v in given.items() if k in mine}
    try:
        options = codec.filled(name, settings, where=where)
    except SettingError:
        if name in codec.names():
            for key in settings:
                known = {*codec.settings_of(name), *mine, "kind", "every"}
                if key not in known:
                    raise unknown(f"setting of {where}:", key, known) from None
        raise
    if reason := codec.make(name, options, where=where).inexact:
        raise SettingError(f"kind = {name!r} cannot be used with the ledger: {reason}")
    if not directed:
        own = {"decay": _decay(codec.make(name, options, where=where)), **own}
    made: FeedbackSettings | WalkSettings
    if directed:
        made = build(WalkSettings, fill(WalkSettings, own, where=where), where=where)
    else:
        made = build(FeedbackSettings, fill(FeedbackSettings, own, where=where), where=where)
    if isinstance(made, WalkSettings):
        if exchange.fragments > 1:
            raise SettingError(
                f"kind = {name!r} steps along directions of the whole model: leave fragments out"
            )
        if made.lr and "exponent" not in given:
            drawn = _publishing(exchange, peers)
            part = _with_steps(Part(name, options), made, exchange.quantum_bits, drawn, where)
            options = part.options
        if not made.lr and "exponent" in given:
            raise SettingError(f"{where}.exponent belongs to a rate: give lr as well")
    return Plane(Part(name, options), made, every)


def _publishing(exchange: tables.Exchange, peers: int) -> float:
    """Return how many of so many peers publish in a turn, on average; at least one."""
    return max(1.0, peers * exchange.participation)


def _with_steps(
    update: Part, author: WalkSettings, quantum_bits: int, peers: float, where: str
) -> Part:
    """Return the update with the exponent that its author's rate asks for."""
    options = {**update.options, "exponent": author.exponent(quantum_bits, peers)}
    try:
        return Part(update.name, codec.filled(update.name, options, where=where))
    except SettingError:
        raise SettingError(
            f"{where}: lr = {author.lr:g} and reach = {author.reach:g} make steps too long for "
            f"perturbations = {options['perturbations']} of them to fit the ledger; lower one of "
            "the three (without lr, it follows from the model's size)"
        ) from None


def _decay(part: codec.Codec) -> float:
    """Return how much of the residual lives on by default.

    A codec that sends everything coarsely loses little, and all of it is sent later; what a sparse
    one leaves behind grows stale (SparseLoCo's β); unbiased noise must not be fed back at all.
    """
    if getattr(part, "unbiased", False):
        return 0.0
    return 0.95 if getattr(part, "sparsifies", False) else 1.0
