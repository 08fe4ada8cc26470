"""What is trained: the `Task` protocol, and how a task is found by the name in the run file.

A task is made by a factory, `factory(place, **options)`: `place` says what differs by peer, the
options are the keys of `[task]` in the run file (so give them types and defaults; a dataclass as a
type is a nested table). Where the name comes from decides what it may be:

* a built-in task (`text`, `digits`), one file in `tasks/` under `@task("name")`;
* an installed entry point of the group `shoal.tasks`;
* `package.module:Factory`, only when the local operator allowed exactly that (`--allow-task`): a
  fetched run file is a stranger's input and never names an import.
"""

import importlib
import importlib.metadata
import pkgutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor, nn

from shoal.compression.settings import SettingError, build, parameters, unknown

GROUP = "shoal.tasks"
REQUIRED = ("model", "batches", "loss")


@dataclass(frozen=True, slots=True)
class Place:
    """Where a task runs: what differs by peer, and the run's seed."""

    seed: int = 0
    """The run's: held-out data and shards follow from it."""
    peer: bytes = b""
    batch: int = 16
    """Examples per step."""
    data: str | None = None
    """The operator's `--data`."""
    base: str | None = None
    """The operator's `--base`: the folder of a model to start from, or hf://org/name."""
    shard: tuple[int, int] | None = None
    """The operator's `--shard i/N`."""
    min_peers: int = 1


@runtime_checkable
class Task(Protocol):
    """What can be trained. Data is read when it is first needed, not when the task is made.

    Optional members: `evaluate(model, *, thorough) -> float`, the measure on held-out data (called
    before every few turns, so be quick unless `thorough`);
    `unit: str`, what the measure is in, for people;
    `matrices(model) -> Iterable[str]`, the parameters that Muon takes; `fixed() -> bytes`, what
    must be equal on all peers beside options and parameters (a tokenizer's digest), asked after
    `model()`; `sample(model, prompt, length, generator) -> str`.
    """

    def model(self) -> nn.Module:
        """Return the model as it starts. Global torch randomness is seeded from the run's seed."""
        ...

    def batches(self, generator: torch.Generator) -> Iterator[Any]:
        """Yield batches of this peer's share for ever; all chance comes from `generator`."""
        ...

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """Return the loss of a batch as a scalar; move the batch to the model's device."""
        ...


Factory = Callable[..., Any]
F = TypeVar("F", bound=Callable[..., object])
_tasks: dict[str, Factory] = {}


def task(name: str) -> Callable[[F], F]:
    """Register a factory as the built-in task `name`."""

    def register(factory: F) -> F:
        _tasks[name] = factory
        return factory

    return register


def names() -> list[str]:
    """Return the names of the built-in tasks and of those that are installed."""
    _scan()
    return sorted({*_tasks, *(point.name for point in _installed())})


def find(name: str, *, allow_task: str | None = None) -> Factory:
    """Return the factory of task `name`, or raise SettingError with the remedy."""
    _scan()
    if name in _tasks:
        return _tasks[name]
    if ":" in name:
        if name != allow_task:
            raise SettingError(
                f"the run file names code, task {name!r}; if you trust it, say --allow-task {name}"
            )
        return _import(name)
    for point in _installed():
        if point.name == name:
            return _import(point.value)
    raise unknown("task", name, names())


def make(name: str, options: dict[str, Any], place: Place, *, allow_task: str | None) -> Task:
    """Return the task, or raise SettingError that says what is missing."""
    factory = find(name, allow_task=allow_task)
    if not parameters(factory):
        raise SettingError(f"task {name!r}: the factory must take a Place as its first argument")
    made = build(factory, options, place, where="task")
    missing = [member for member in REQUIRED if not callable(getattr(made, member, None))]
    if missing:
        raise SettingError(
            f"task {name!r} made a {type(made).__name__} without {', '.join(missing)}(); "
            f"a task needs {', '.join(REQUIRED)} (shoal.training.task.Task)"
        )
    assert isinstance(made, Task)
    return made


def make_model(made: Task, name: str, seed: int) -> nn.Module:
    """Return the task's model, its chance taken from `seed` alone, on the CPU."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = made.model()
    if not isinstance(model, nn.Module):
        raise SettingError(f"task {name!r}: model() returned {type(model).__name__}, not nn.Module")
    return model


def fixed(made: Task) -> bytes:
    """Return what the task says must be equal on all peers; empty if it says nothing."""
    stated: Callable[[], bytes] = getattr(made, "fixed", bytes)
    return stated()


def _import(path: str) -> Factory:
    module, _, attribute = path.partition(":")
    try:
        found: Any = importlib.import_module(module)
        for part in attribute.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError, ValueError) as error:
        raise SettingError(
            f"cannot import task {path!r}: {error}; install it where the daemon runs "
            "or set PYTHONPATH"
        ) from error
    if not callable(found):
        raise SettingError(f"task {path!r} is a {type(found).__name__}, not something to call")
    factory: Factory = found
    return factory


def _installed() -> list[importlib.metadata.EntryPoint]:
    return sorted(importlib.metadata.entry_points(group=GROUP), key=lambda point: point.name)


def _scan() -> None:
    package = importlib.import_module("shoal.training.tasks")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{module.name}")
