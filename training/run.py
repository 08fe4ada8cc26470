"""What a run file means to the worker: every table and every option checked, every default filled.

`RunSpec.parse` takes the five tables as plain dicts; `filled` returns them with all defaults, which
is what the genesis stores.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

from shoal.compression import codec
from shoal.compression.settings import SettingError, build, fill, unknown
from shoal.training import control, optimizer, presets, rules, schedule, tables, task
from shoal.training.feedback import FeedbackSettings

T = TypeVar("T")
TABLES = ("run", "task", "local", "exchange", "swarm")


class RunError(ValueError):
    """The run cannot be trained as asked; one line with the remedy."""


@dataclass(frozen=True, slots=True)
class Part:
    """A named part and all its options."""

    name: str
    options: dict[str, Any]


@dataclass(frozen=True, slots=True)
class RunSpec:
    """A run file, checked and complete."""

    run: tables.Run
    task: Part
    local: tables.Local
    optimizer: Part
    schedule: str
    exchange: tables.Exchange
    update: Part
    """Kind and settings of the codec."""
    feedback: FeedbackSettings
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

    def filled(self) -> dict[str, dict[str, Any]]:
        """Return the five tables as plain data with every default filled in."""
        local = asdict(self.local)
        local["optimizer"] = {
            "name": self.optimizer.name,
            "schedule": self.schedule,
            **self.optimizer.options,
        }
        exchange = asdict(self.exchange)
        exchange["update"] = {
            "kind": self.update.name,
            **asdict(self.feedback),
            **self.update.options,
        }
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
    if exchange.pace == "lockstep" and not local.steps:
        raise SettingError("exchange.pace = 'lockstep' needs a fixed local.steps")
    if exchange.rule not in rules.TURN_RULES:
        raise unknown("exchange.rule", exchange.rule, rules.TURN_RULES)
    inner, curve = _optimizer(local.optimizer, run.turns)
    if reason := control.ledger(exchange.control):
        raise SettingError(
            f"exchange.control = {exchange.control!r} cannot be used with the ledger: {reason}"
        )
    update, feedback = _update(exchange.update)
    return RunSpec(
        run=run,
        task=_task(given.get("task", {}), allow_task),
        local=local,
        optimizer=inner,
        schedule=curve,
        exchange=exchange,
        update=update,
        feedback=feedback,
        swarm=swarm,
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


def _update(given: Mapping[str, Any]) -> tuple[Part, FeedbackSettings]:
    where = "exchange.update"
    mine = FeedbackSettings.__dataclass_fields__
    name = str(given.get("kind", "sparse"))
    settings = {k: v for k, v in given.items() if k != "kind" and k not in mine}
    try:
        options = codec.filled(name, settings, where=where)
    except SettingError:
        if name in codec.names():
            for key in settings:
                known = {*codec.settings_of(name), *mine, "kind"}
                if key not in known:
                    raise unknown(f"setting of {where}:", key, known) from None
        raise
    if reason := codec.make(name, options, where=where).inexact:
        raise SettingError(f"kind = {name!r} cannot be used with the ledger: {reason}")
    given = {"decay": _decay(codec.make(name, options, where=where)), **given}
    own = fill(FeedbackSettings, {k: v for k, v in given.items() if k in mine}, where=where)
    return Part(name, options), build(FeedbackSettings, own, where=where)


def _decay(part: codec.Codec) -> float:
    """Return how much of the residual lives on by default.

    A codec that sends everything coarsely loses little, and all of it is sent later; what a sparse
    one leaves behind grows stale (SparseLoCo's β); unbiased noise must not be fed back at all.
    """
    if getattr(part, "unbiased", False):
        return 0.0
    return 0.95 if getattr(part, "sparsifies", False) else 1.0
