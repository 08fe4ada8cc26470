"""Everything a worker does, behind one class: build the run, take turns, apply, save, export.

No clock of its own (seconds come from the `clock` it is given) and no input or output but the data
and files it is told to use.
"""

import errno
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import safetensors.torch
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from shoal.compression import codec
from shoal.compression.settings import SettingError
from shoal.training import ledger, merkle, optimizer, parameters, schedule, task, turn_rule
from shoal.training.exchange import Arrived, Outcome
from shoal.training.exchanges.ledger import LedgerExchange
from shoal.training.fingerprint import Lanes
from shoal.training.forwards import Forwards, Resident
from shoal.training.method import Method, Tools
from shoal.training.methods.gradient import Gradient
from shoal.training.methods.subspace import Spanning, Subspace
from shoal.training.methods.zeroth_order import ZerothOrder
from shoal.training.offload import Offloaded
from shoal.training.parameters import Parameters
from shoal.training.pool import Pool
from shoal.training.rules import Fragment, Plane, Rules
from shoal.training.run import RunError, RunSpec
from shoal.training.task import Place, Task
from shoal.training.turn import Learner, Plan, Turned, chance
from shoal.training.walk import WalkSettings

NAN = float("nan")
CHECKPOINT = 3
"""Version of the checkpoint file."""
MEMORY = ("residual", "momentum", "drift")
"""What an author keeps between turns (`LedgerExchange.memory`)."""


class CheckpointError(ValueError):
    """A checkpoint file that cannot be used; rebuild from the log instead."""


@dataclass(frozen=True, slots=True)
class Setup:
    """What one peer trains: the run, and what differs by peer."""

    run: RunSpec
    peer: bytes = b""
    data: str | None = None
    base: str | None = None
    shard: tuple[int, int] | None = None
    device: str = "cpu"
    """`cpu`, `cuda`, `cuda:1` … or `auto`: CUDA if there is one."""
    device_memory: int = 0
    """Bytes of weights that may be on the device; the ledger stays on the host. 0: all are."""
    threads: int = 0
    """Of torch, for the whole process; 0: leave them."""
    allow_task: str | None = None
    directory: Path | None = None
    """Where the peer keeps its state; for tasks that cache."""
    run_id: bytes = bytes(32)
    """Where the seeds of shared directions come from; all of a run must have the same."""


@dataclass(frozen=True, slots=True)
class Founding:
    """What the founder writes into the genesis."""

    parameters: int
    layout_hash: bytes
    initial_root: bytes
    """Merkle root of the initial model's integers (`training/merkle.py`)."""
    initial_squares: int
    most_bytes: dict[str, int]
    run: dict[str, dict[str, Any]]
    """The run file with every default filled in."""


@dataclass(frozen=True, slots=True)
class Stated:
    """What a checkpoint says that the shared model was."""

    frontier: Any
    """Whatever was given to `save`."""
    fingerprint: Lanes
    ledger: Tensor
    """The model's integers; the fingerprint is theirs."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """What a checkpoint held besides tensors."""

    frontier: Any
    """Whatever was given to `save`."""
    kept: bool
    """Residual and momentum belong to the update named, and live on; else they start at zero."""
    began: str = ""
    """Where the model began, as it was given to `save`."""


class Trainer:
    """One peer's part in the training of a run."""

    def __init__(
        self, setup: Setup, *, initial: bytes | None = None, clock: Callable[[], float]
    ) -> None:
        """Build task and model; `initial` replaces the model made from the run's seed."""
        if setup.threads:
            torch.set_num_threads(setup.threads)
        self._setup = setup
        self._spec = setup.run
        self._seconds_per_step = [0.0] * len(setup.run.planes)
        try:
            self._build(initial, clock)
        except SettingError as error:
            raise RunError(str(error)) from error

    def _build(self, initial: bytes | None, clock: Callable[[], float]) -> None:
        spec, device = self._spec, _device(self._setup.device)
        self._task = self._make_task()
        self._model = task.make_model(self._task, spec.task.name, spec.run.seed)
        self._parameters = Parameters(self._model, task.fixed(self._task))
        home = torch.device("cpu") if self._setup.device_memory else device
        if home == device:
            self._model.to(device)
            self._parameters = Parameters(self._model, task.fixed(self._task))
        spec = self._spec = spec.sized(self.parameters)
        integers_D = self._first_integers(initial)
        self._initial: NDArray[np.int32] = integers_D.numpy()
        self._initial_squares = codec.sum_of_squares(integers_D)
        self.exchange = self._exchange(integers_D.to(home))
        self._tools = Tools(
            task=self._task,
            model=self._model,
            parameters=self._parameters,
            rate=schedule.SCHEDULES[spec.schedule],
            turns=spec.run.turns,
            clock=clock,
            buffers=spec.run.buffers,
        )
        self._forwards = self._make_forwards(device)
        self._learner = Learner()
        self._lag, self._took_time = 0.0, True
        """How far behind the last turn was that took time; whether the last one did."""
        self._inners: dict[str, optimizer.Inner] = {}
        """By their place in the checkpoint."""
        self._methods = [self._method(plane) for plane in range(len(spec.planes))]

    # ---- what the run is

    @property
    def layout(self) -> bytes:
        """Return the layout hash: peers of one run have the same."""
        return self._parameters.layout.hash()

    @property
    def parameters(self) -> int:
        """Return the number of trainable parameters."""
        return self._parameters.layout.size

    @property
    def unit(self) -> str:
        """Return what the task measures in, such as "bits per byte"; empty if it does not say."""
        return str(getattr(self._task, "unit", ""))

    @property
    def model(self) -> nn.Module:
        """Return the model; between turns its values are those that the last turn left, if any."""
        return self._model

    @property
    def device(self) -> torch.device:
        """Return where the model computes."""
        return self._parameters.device

    @property
    def task(self) -> Task:
        """Return the task."""
        return self._task

    def founding(self) -> Founding:
        """Return what the genesis needs, after trying one step: no run is founded in vain."""
        self._try_one_step()
        data = self.initial_bytes()
        return Founding(
            parameters=self.parameters,
            layout_hash=self.layout,
            initial_root=merkle.root_of(data),
            initial_squares=self._initial_squares,
            most_bytes=self.exchange.rules.most_bytes(),
            run=self._spec.filled(),
        )

    def initial_bytes(self) -> bytes:
        """Return the initial model's integers: int32, little-endian."""
        return self._initial.astype("<i4").tobytes()

    def keep_initial(self, path: Path) -> None:
        """Let the initial integers be read from this file, which has them, not kept in memory."""
        self._initial = np.memmap(path, "<i4", "r")

    # ---- the ledger

    def apply(self, updates: Sequence[Arrived]) -> list[Outcome]:
        """Add updates to the ledger; never raises for what others sent."""
        return self.exchange.apply(updates)

    def subtract(self, updates: Sequence[Arrived]) -> list[Outcome]:
        """Take updates out of the ledger; the deltas are what that changes."""
        return self.exchange.subtract(updates)

    def begin(self, sums: bytes) -> None:
        """Set the shared model to the initial one and what a whole run added along its seeds.

        Raises ValueError for sums that are not this run's, and changes nothing.
        """
        self.exchange.rebuild(self.initial_bytes(), sums)

    def fingerprint(self) -> Lanes:
        """Return the running fingerprint."""
        return self.exchange.fingerprint()

    def recompute(self) -> Lanes:
        """Return the fingerprint of the tensor as it is."""
        return self.exchange.recompute()

    @property
    def out_of_range(self) -> int:
        """Return how many values have left half the range of int32: above 0 is an alarm."""
        return self.exchange.ledger.out_of_range

    # ---- training

    def turn(self, turn: int, members: float, *, lag: float = 0.0, publish: bool = True) -> Turned:
        """Train for one turn (from 1) from the shared model; the update stays pending.

        `members` is N_w of design 3.2: the update is weighted by staleness(lag) / members, where
        `lag` says how many turns the others make beyond one while this peer makes one. Without
        `publish` (the peer is not drawn) what was learnt goes into its next update, so that w has
        no participation in it; steps along directions cannot, and are not taken: those of the peers
        that are drawn weigh more instead. Raises TrainingError when the turn shows that training
        cannot go on.
        """
        spec = self._spec
        weight = spec.exchange.staleness.factor(self._behind(lag)) / members
        plan = self._plan(turn, weight, publish=publish)
        if not plan.method.carries:
            plan = replace(plan, weight=min(1.0, weight / spec.exchange.participation))
        try:
            turned = self._learner.turn(
                self.exchange, plan, self._measure_quickly if self.measures(turn) else lambda: NAN
            )
        except SettingError as error:  # data is read when first needed
            raise RunError(str(error)) from error
        self._took_time = turned.steps > 0
        if turned.steps:
            plane = self.exchange.rules.plane(turn)
            self._seconds_per_step[plane] = turned.seconds / turned.steps
        return turned

    def measures(self, turn: int) -> bool:
        """Say whether the shared model is measured before this turn."""
        every = self._spec.local.evaluate_every
        return bool(every) and (turn - 1) % every == 0

    def commit(self, log: int, number: int) -> None:
        """Let the pending update be published: residual and momentum belong to this number."""
        self.exchange.commit(log, number)

    def discard(self) -> None:
        """Let the pending update be lost: residual and momentum are as before the turn."""
        self.exchange.discard()

    def evaluate(self) -> float:
        """Return the task's measure of the shared model on more held-out data than a turn uses."""
        try:
            return self._measure(self.exchange.integers(), thorough=True)
        except SettingError as error:
            raise RunError(str(error)) from error

    def measure(self, tensors: Mapping[str, Tensor]) -> float:
        """Return the task's measure of an exported model; the ledger stays as it is."""
        buffers = {name: tensors[name] for name, _ in _buffers(self._model) if name in tensors}
        self._model.load_state_dict(buffers, strict=False)
        floats = [tensors[name].reshape(-1) for name in self._parameters.layout.names]
        # Exact: they are integers times q, rounded to float32.
        whole = [codec.to_integers(x * 2.0**self.exchange.quantum_bits) for x in floats]
        integers_D = torch.cat(whole).to(self.exchange.integers().device, torch.int32)
        return self._measure(integers_D, thorough=True)

    def alone(self, steps: int, turns: int = 0) -> float:
        """Train on without anybody, `steps` steps in all; return the measure: the yardstick.

        Same shard, inner optimizer, schedule and order of data as in the first `turns` turns (0:
        all) of the swarm, no update between. The ledger stays as it is.
        """
        turns = turns or self._spec.run.turns or 1
        private = self._exchange(self.exchange.ledger.model)
        for turn in range(1, turns + 1):
            share = steps * turn // turns - steps * (turn - 1) // turns
            if share:
                plan = replace(self._plan(turn, 1.0), steps=share)
                lesson = plan.method.learn(
                    private, plan.codec, turn=turn, steps=share, seed=plan.seed
                )
                private.keep(lesson.brought, plan.codec)
        floats_D = None if private.drift is None else private.start()
        return self._measure(private.integers(), thorough=True, instead=floats_D)

    # ---- files

    def save(self, path: Path, frontier: Any = None, began: str = "") -> None:
        """Write ledger, residual, momentum, inner optimizer, `frontier` (any JSON), and `began`."""
        named = {"ledger": self.exchange.ledger.model}
        numbers = {}
        for place, inner in self._inners.items():
            tensors, numbers[place] = inner.tensors()
            named.update({f"{place}/{name}": value for name, value in tensors.items()})
        named.update(self.exchange.memory())
        named.update(self.exchange.pool.tensors())
        state = {
            "version": CHECKPOINT,
            "layout": self.layout.hex(),
            "run": self._setup.run_id.hex(),
            "fingerprint": self.fingerprint(),
            "owner": self.exchange.owner,
            "frontier": frontier,
            "began": began,
            "numbers": numbers,
            "seconds_per_step": self._seconds_per_step,
        }
        _write(path, named, {"shoal": json.dumps(state)})

    def stated(self, path: Path) -> Stated:
        """Return what a checkpoint says of the shared model, and take nothing of it.

        Raises CheckpointError when the file is damaged or of another model or run.
        """
        tensors, state = _read(path)
        self._check(path, tensors, state)
        first, second = state["fingerprint"]
        return Stated(state["frontier"], (first, second), tensors["ledger"])

    def load(self, path: Path, own: tuple[int, int] | None = None) -> Loaded:
        """Read a checkpoint. `own` is log and number of the last own update in the log; None: none.

        Residual, momentum and drift live on only if they belong to it. Under a turn rule the shared
        model starts from the initial one, at an empty frontier: a late update must find those of
        its turn one by one, so all are to be applied again. Raises CheckpointError, and then
        changes nothing, when the file is damaged or of another model or run.
        """
        tensors, state = _read(path)
        self._check(path, tensors, state)
        for place, inner in self._inners.items():
            mine = {
                name.removeprefix(f"{place}/"): value
                for name, value in tensors.items()
                if name.startswith(f"{place}/")
            }
            inner.load(mine, state["numbers"].get(place, {}))
        if exact := self.exchange.ledger.rule.alone:
            self.exchange.restore(tensors["ledger"].numpy().astype("<i4").tobytes())
            self.exchange.pool.load(tensors)
        else:
            self.exchange.restore(self.initial_bytes())
        owner = tuple(state["owner"]) if state["owner"] else None
        kept = owner == own
        memory = {name: tensors[name] for name in MEMORY if kept and name in tensors}
        self.exchange.take_back(owner if kept else None, memory)
        self._seconds_per_step = list(map(float, state["seconds_per_step"]))
        began = str(state.get("began", ""))
        return Loaded(state["frontier"] if exact else [], kept, began)

    def export(self, path: Path, metadata: dict[str, str] | None = None) -> None:
        """Write the shared model as safetensors: float parameters and buffers under their names."""
        shared = self._parameters.split(self.exchange.model().cpu())
        ours = {id(p) for p in self._parameters.named.values()}
        rest = {
            name: self._forwards.value(value).detach().cpu()
            for name, value in (*self._model.named_parameters(), *_buffers(self._model))
            if id(value) not in ours
        }
        _write(path, {**rest, **shared}, metadata or {})

    # ---- helpers

    def _check(self, path: Path, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Raise CheckpointError unless the file is whole and of this model and run."""
        if state.get("version") != CHECKPOINT or state.get("layout") != self.layout.hex():
            raise CheckpointError(f"{path} is of another model or version")
        if state.get("run", run := self._setup.run_id.hex()) != run:
            raise CheckpointError(f"{path} is of another run")
        types = {"ledger": torch.int32, **dict.fromkeys(MEMORY, torch.float32)}
        for name in types.keys() & tensors.keys():
            if tensors[name].shape != (self.parameters,) or tensors[name].dtype != types[name]:
                raise CheckpointError(f"{path} is of another model: {name} has another form")
        needed = {"fingerprint", "owner", "frontier", "numbers", "seconds_per_step"}
        if "ledger" not in tensors or not needed <= state.keys():
            raise CheckpointError(f"{path} is incomplete")
        try:
            Pool(self.exchange.pool.size).load(tensors)
        except ValueError as error:
            raise CheckpointError(f"{path}: {error}") from error
        if list(self.exchange.ledger.lanes_of(tensors["ledger"])) != state["fingerprint"]:
            raise CheckpointError(f"{path} is damaged: its fingerprint does not match its model")

    def _make_task(self) -> Task:
        spec, setup = self._spec, self._setup
        if setup.shard is not None and not 0 <= setup.shard[0] < setup.shard[1]:
            raise SettingError(f"shard {setup.shard[0]}/{setup.shard[1]}: i runs from 0 to N - 1")
        place = Place(
            seed=spec.run.seed,
            peer=setup.peer,
            batch=spec.local.batch,
            data=setup.data,
            base=setup.base,
            shard=setup.shard,
            min_peers=spec.swarm.min_peers,
        )
        return task.make(spec.task.name, spec.task.options, place, allow_task=setup.allow_task)

    def _first_integers(self, given: bytes | None) -> Tensor:
        bits = self._spec.exchange.quantum_bits
        try:
            if given is not None:
                integers_D = ledger.from_bytes(given, self.parameters)
            else:
                integers_D = torch.cat(
                    [
                        ledger.from_floats(p.detach().reshape(-1).float().cpu(), bits)
                        for p in self._parameters.named.values()
                    ]
                )
        except ValueError as error:
            raise SettingError(str(error)) from error
        if not bool(integers_D.any()):
            raise SettingError(
                "the initial model is all zeros, and exchange.clip is a multiple of its size; "
                "let it start from small random values"
            )
        return integers_D

    def _make_forwards(self, device: torch.device) -> Forwards:
        bits, memory = self._spec.exchange.quantum_bits, self._setup.device_memory
        if not memory:
            return Resident(self._task, self._model, self._parameters, bits)
        for plane in self._spec.planes:
            if not isinstance(plane.author, WalkSettings):
                raise SettingError(
                    f"--device-memory is for runs that train by forward passes alone; kind = "
                    f"{plane.update.name!r} needs gradients, and so the whole model on the device"
                )
        return Offloaded(
            self._task, self._model, self._parameters, bits, device=device, memory=memory
        )

    def _exchange(self, integers_D: Tensor) -> LedgerExchange:
        spec, layout = self._spec, self._parameters.layout
        planes = tuple(
            Plane(
                plane.update.name,
                tuple(
                    Fragment(
                        part.start,
                        len(part),
                        codec.make(
                            plane.update.name, plane.update.options, shapes=layout.shapes_in(part)
                        ),
                    )
                    for part in layout.fragments(spec.exchange.fragments)
                ),
                plane.every,
            )
            for plane in spec.planes
        )
        rules = Rules(
            planes=planes,
            turns=spec.run.turns,
            clip=spec.exchange.clip_ratio(),
            initial_squares=self._initial_squares,
            run=self._setup.run_id,
        )
        return LedgerExchange(
            integers_D,
            rules,
            [plane.author for plane in spec.planes],
            quantum_bits=spec.exchange.quantum_bits,
            turn_rule=turn_rule.make(spec.exchange.rule),
            peer=self._setup.peer or bytes(32),
            directory=self._setup.directory,
        )

    def _method(self, plane: int) -> Method:
        """Return how the turns of this plane are learnt."""
        author = self._spec.planes[plane].author
        if isinstance(author, WalkSettings):
            return ZerothOrder(self._tools, self._forwards, author)
        fragments = self.exchange.rules.planes[plane].fragments
        if isinstance(part := fragments[0].codec, Spanning):
            if len(fragments) > 1:
                raise SettingError("a subspace is one of the whole model: leave fragments out")
            return self._subspace(f"plane{plane}", part.dimensions(self.parameters))
        if "inner" not in self._inners:
            self._inners["inner"] = self._inner()
        return Gradient(self._tools, self._inners["inner"])

    def _subspace(self, place: str, dimensions: int) -> Method:
        u_D = nn.Parameter(torch.zeros(dimensions, device=self.exchange.integers().device))
        part = optimizer.make(self._spec.optimizer.name, self._spec.optimizer.options)
        self._inners[place] = optimizer.Inner(part.build({"u": u_D}, frozenset()))
        return Subspace(self._tools, self._inners[place], u_D)

    def _plan(self, turn: int, weight: float, *, publish: bool = True) -> Plan:
        rules = self.exchange.rules
        plane = rules.plane(turn)
        return Plan(
            turn=turn,
            kind=rules.planes[plane].kind,
            method=self._methods[plane],
            codec=rules.codec(turn, self.exchange.peer),
            steps=self._steps(plane),
            weight=weight,
            seed=chance(self._spec.run.seed, self._setup.peer, turn),
            publish=publish,
        )

    def _behind(self, lag: float) -> float:
        """Return the lag that counts: while a turn was skipped, nobody could make others."""
        if self._took_time:
            self._lag = lag
            if not any(method.carries for method in self._methods):
                # The others as well skip the turns that they are not drawn for.
                self._lag = (1 + lag) * self._spec.exchange.participation - 1
        return self._lag

    def _inner(self) -> optimizer.Inner:
        named = self._parameters.named
        chosen = getattr(self._task, "matrices", optimizer.inner_matrices)(self._model)
        part = optimizer.make(self._spec.optimizer.name, self._spec.optimizer.options)
        return optimizer.Inner(part.build(named, frozenset(chosen)))

    def _steps(self, plane: int) -> int:
        """Return how many steps a turn takes: a fixed number, or as many as fit its time.

        Of steps along directions there are as many as an update may say.
        """
        local, part = self._spec.local, self.exchange.rules.planes[plane].fragments[0].codec
        if isinstance(part, codec.Directed):
            return part.perturbations
        if local.steps:
            return local.steps
        fitting = local.min_steps
        if seconds := self._seconds_per_step[plane]:
            fitting = max(fitting, min(local.max_steps, round(local.turn_seconds / seconds)))
        return fitting

    def _measure_quickly(self) -> float:
        return self._measure(self.exchange.integers(), thorough=False)

    def _measure(
        self, integers_D: Tensor, *, thorough: bool, instead: Tensor | None = None
    ) -> float:
        """Return the task's measure of a model, or of floats `instead` of its integers."""
        evaluate = getattr(self._task, "evaluate", None)
        if evaluate is None:
            return NAN
        with self._forwards.at(integers_D) as model:
            if instead is not None:
                self._parameters.write(instead)
            return float(evaluate(model, thorough=thorough))

    def _try_one_step(self) -> None:
        """Find what would fail in the first step: data, loss, gradients, changing buffers."""
        name = self._spec.task.name
        before = parameters.floating_buffers(self._model)
        try:
            with torch.random.fork_rng():
                batch = next(self._task.batches(torch.Generator().manual_seed(0)))
                self._try_loss(batch)
        except SettingError as error:
            raise RunError(str(error)) from error
        except RunError:
            raise
        except StopIteration:
            raise RunError(f"task {name!r}: batches() yields nothing") from None
        except Exception as error:  # a task is anybody's code
            raise RunError(
                f"task {name!r} fails in its first step: {type(error).__name__}: {error}"
            ) from error
        changed = parameters.changed_buffers(self._model, before)
        parameters.restore_buffers(self._model, before)
        if changed and self._spec.run.buffers == "refuse":
            raise RunError(parameters.buffers_refused(changed))

    def _try_loss(self, batch: Any) -> None:
        """Ask for the loss as each kind of update will."""
        walks = [p.author for p in self._spec.planes if isinstance(p.author, WalkSettings)]
        if walks:
            self._forwards.losses(self.exchange.integers(), 0, walks[0].epsilon, batch)
        if len(walks) == len(self._spec.planes):
            return
        self._parameters.write_integers(self.exchange.integers(), self.exchange.quantum_bits)
        self._model.train()
        loss = self._task.loss(self._model, batch)
        if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
            raise RunError(
                f"task {self._spec.task.name!r}: loss() must return a scalar tensor with a gradient"
            )


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise SettingError(f"device {name!r} is unknown; use cpu, cuda or auto") from None
    if device.type not in ("cpu", "cuda"):
        raise SettingError(f"device {name!r} cannot hold 64-bit integers; use cpu, cuda or auto")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SettingError(f"device {name!r}: no CUDA here; use --device cpu")
    return device


def _buffers(model: nn.Module) -> list[tuple[str, Tensor]]:
    kept = set(model.state_dict())
    return [(name, buffer) for name, buffer in model.named_buffers() if name in kept]


def _write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a file that is whole or not there; raises OSError."""
    plain = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    partial = path.with_name(path.name + ".partial")
    try:
        safetensors.torch.save_file(plain, partial, metadata)
    except safetensors.SafetensorError as error:  # a full disk, for one
        raise OSError(errno.EIO, str(error)) from error
    with open(partial, "r+b") as file:
        _put_in_order(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def _put_in_order(file: BinaryIO) -> None:
    """Sort a safetensors header, whose order varies: equal models make equal files."""
    size = int.from_bytes(file.read(8), "little")
    header = json.loads(file.read(size))
    if "__metadata__" in header:
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(dict(sorted(header.items())), separators=(",", ":"), ensure_ascii=False)
    if len(data := text.encode()) <= size:  # what pads the header is space
        file.seek(8)
        file.write(data.ljust(size))


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            state = json.loads((file.metadata() or {})["shoal"])
            return {name: file.get_tensor(name) for name in file.keys()}, state  # noqa: SIM118
    except (OSError, KeyError, ValueError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error
