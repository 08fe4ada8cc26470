"""Weights that stream: the same losses to the bit, one upload a unit, never too many at once."""

import copy
import itertools
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  what everybody calls it

from shoal.compression.settings import SettingError
from shoal.training import ledger
from shoal.training.exchange import Arrived
from shoal.training.forwards import Resident
from shoal.training.offload import Offloaded
from shoal.training.parameters import Parameters
from shoal.training.run import RunError, RunSpec
from shoal.training.task import Place, make_model
from shoal.training.tasks.text import Model, Text
from shoal.training.trainer import Setup, Trainer
from shoal.training.units import divide

CPU = torch.device("cpu")
BITS = 24
PLENTY = 1 << 30


@pytest.fixture(autouse=True)
def _nobody_is_left_behind() -> Iterator[None]:
    torch.set_num_threads(1)
    before = threading.active_count()
    yield
    assert threading.active_count() == before


class Sum:
    """The task of making a model's output small."""

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """Return the mean of the squares."""
        out: Tensor = model(batch)
        return out.float().square().mean()


class Pair:
    """The same model twice: all of it there, and streaming."""

    def __init__(self, model: nn.Module, task: Any = None, memory: int = PLENTY) -> None:
        task = task or Sum()
        twin = copy.deepcopy(model)
        whole, parts = Parameters(model), Parameters(twin)
        noise = torch.randn(whole.layout.size, generator=torch.Generator().manual_seed(1))
        self.integers = ledger.from_floats(whole.read() + 0.02 * noise, BITS)
        self.model, self.twin, self.task = model, twin, task
        self.resident = Resident(task, model, whole, BITS)
        self.offloaded = Offloaded(task, twin, parts, BITS, device=CPU, memory=memory)

    def check(self, batch: Any, key: int = 5, epsilon: float = 0.01) -> int:
        """Compare both losses and torch's generator; return how many units were uploaded."""
        before = self.offloaded.uploads
        found, states = [], []
        for forwards in (self.resident, self.offloaded):
            torch.manual_seed(3)
            found.append(forwards.losses(self.integers, key, epsilon, batch))
            states.append(torch.get_rng_state())
        assert found[0] == found[1]
        assert torch.equal(*states)
        self.check_gone()
        return self.offloaded.uploads - before

    def check_lent(self, batch: Any) -> None:
        """Compare what the model says where the ledger is."""
        torch.manual_seed(3)
        with self.resident.at(self.integers) as model:
            expected = self.task.loss(model, batch)
        torch.manual_seed(3)
        with self.offloaded.at(self.integers) as model:
            assert torch.equal(self.task.loss(model, batch), expected)
            assert not torch.is_grad_enabled()
        self.check_gone()

    def check_gone(self) -> None:
        """No parameter has memory of its own, and who looks sees NaN."""
        for p in self.twin.parameters():
            assert p.untyped_storage().nbytes() <= 8
            assert bool(p.isnan().all())


def text(**size: int) -> tuple[nn.Module, Text, Any]:
    task = Text(Place(batch=2), model=Model(**{"layers": 3, "width": 16, "heads": 2, **size}))
    model = make_model(task, "text", 1)
    return model, task, next(task.batches(torch.Generator().manual_seed(2)))


# ---- equal losses


def test_the_text_model_with_its_tied_embedding() -> None:
    """The embedding is used outside of its forward as well: noticed once, it stays."""
    model, task, batch = text()
    pair = Pair(model, task)
    assert pair.check(batch) == 3 + 2
    for key in range(3):
        assert pair.check(batch, key) == 3 + 1
    assert [unit.name for unit in pair.offloaded._units if unit.stays] == ["embedding"]
    with pair.resident.at(pair.integers) as one, pair.offloaded.at(pair.integers) as other:
        assert task.evaluate(one) == task.evaluate(other)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_models_of_transformers(kind: str) -> None:
    transformers = pytest.importorskip("transformers")
    tied = {"vocab_size": 50, "tie_word_embeddings": True}
    torch.manual_seed(0)
    if kind == "llama":
        config = transformers.LlamaConfig(
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=3,
            num_attention_heads=2,
            num_key_value_heads=1,
            **tied,
        )
        model = transformers.LlamaForCausalLM(config)
    else:
        config = transformers.GPT2Config(n_embd=16, n_layer=3, n_head=2, n_positions=32, **tied)
        model = transformers.GPT2LMHeadModel(config)

    class Next:
        def loss(self, model: Any, batch: Tensor) -> Tensor:
            logits = model(input_ids=batch, use_cache=False).logits
            return F.cross_entropy(logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten())

    pair = Pair(model, Next())
    batch = torch.randint(50, (2, 9), generator=torch.Generator().manual_seed(1))
    pair.check(batch)
    streaming = [unit for unit in pair.offloaded._units if not unit.stays]
    assert pair.check(batch) == len(streaming) >= 4
    assert not any("wte" in unit.name or "embed_tokens" in unit.name for unit in streaming)
    pair.check_lent(batch)


class Odd(nn.Module):
    """Everything that makes it hard to say when a weight is needed."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))
        shared = nn.Linear(4, 4)
        self.blocks = nn.ModuleList(
            [nn.Sequential(nn.Linear(4, 4), nn.Tanh(), shared), nn.Linear(4, 4), shared]
        )
        self.blocks.append(self.blocks[1])
        self.norm = nn.LayerNorm(4)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.coarse = nn.Linear(4, 4).to(torch.bfloat16)
        self.extra = nn.ParameterList([torch.ones(4), torch.zeros(())])
        self.register_buffer("shift", torch.full((4,), 0.1))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x) * self.scale + self.shift + 0.01 * torch.rand(())
        x = self.coarse(self.norm(x).to(torch.bfloat16)).float()
        x = self.frozen(x) @ self.norm.weight.diag() + self.extra[0]
        assert self.coarse.weight.shape == (4, 4)
        assert self.coarse.weight.dtype == torch.bfloat16
        return torch.cat([x, self.frozen.weight]) + self.extra[1]


def test_shared_frozen_nested_and_half_precise() -> None:
    torch.manual_seed(0)
    pair = Pair(Odd())
    for key in range(3):
        pair.check(torch.ones(3, 4), key)
        pair.check_lent(torch.ones(3, 4))
    named = dict(pair.twin.named_parameters())
    kept = pair.offloaded.value(named["frozen.weight"])
    assert torch.equal(kept, dict(pair.model.named_parameters())["frozen.weight"])
    assert pair.offloaded.value(pair.twin.shift) is pair.twin.shift


class Named(nn.Module):
    """A model that hands weights on by name, of a block that is not called."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(3, 3) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        first, second, third = self.blocks
        x = F.linear(first(x), weight=second.weight, bias=second.bias)
        return torch.cat(tensors=[third(x), second.weight])


def test_a_weight_that_is_handed_on_by_name_is_noticed() -> None:
    Pair(Named()).check(torch.ones(2, 3))


class Mixed(nn.Module):
    """A block with frozen weights of odd lengths and several precisions."""

    def __init__(self) -> None:
        super().__init__()
        self.learnt = nn.Parameter(torch.ones(5))
        self.narrow = nn.Parameter(torch.ones(3, dtype=torch.bfloat16), requires_grad=False)
        self.frozen = nn.Parameter(torch.arange(5.0), requires_grad=False)
        self.wide = nn.Parameter(torch.ones(1, dtype=torch.float64), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.learnt + self.narrow.sum() * self.frozen + self.wide.float()


def test_frozen_weights_of_any_precision_lie_where_they_can_be_read() -> None:
    Pair(nn.Sequential(Mixed(), Mixed())).check(torch.ones(5))


class Recalls(nn.Module):
    """A model that calls others in an order of its own, perhaps another on each side."""

    def __init__(self, program: list[tuple[str, int]]) -> None:
        super().__init__()
        inner = nn.Linear(3, 3)
        pairs = [nn.Sequential(nn.Linear(3, 3), nn.Tanh()) for _ in range(2)]
        self.blocks = nn.ModuleList(
            [*pairs, Calls(inner), nn.Sequential(*pairs[:1], nn.Identity())]
        )
        self.inner = inner
        self.around = nn.Linear(3, 3, bias=False)
        self.own = nn.Parameter(torch.ones(3))
        self.program = program

    def forward(self, x: Tensor) -> Tensor:
        parts = [*self.blocks, self.inner, self.around]
        for what, number in self.program:
            part: Any = parts[number % len(parts)]
            weights = list(part.parameters())
            if what == "call":
                x = part(x)
            elif what == "weight" and weights:
                x = x + weights[0].sum() * self.own
            elif what == "maybe" and float(x.sum() * 1e4) % 2 < 1:  # differs between the sides
                x = part(x)
            elif what == "deep":
                for module in part.children():
                    x = module(x)
            elif what == "caught":
                x = self.caught(part, x)
        return x.tanh()

    def caught(self, part: nn.Module, x: Tensor) -> Tensor:
        try:
            return part(x.tanh()[..., :2])  # type: ignore[no-any-return]
        except RuntimeError:
            return x * 2


class Calls(nn.Module):
    """Calls a module that it does not own."""

    def __init__(self, other: nn.Module) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(3))
        self.others = [other]

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.others[0](x @ self.weight)
        return y


steps = st.tuples(
    st.sampled_from(["call", "call", "weight", "maybe", "deep", "caught"]), st.integers(0, 9)
)


@settings(max_examples=30, deadline=None)
@given(st.lists(steps, max_size=8), st.integers(0, 9))
def test_any_order_of_calls_gives_the_same_losses(program: list[tuple[str, int]], key: int) -> None:
    torch.manual_seed(key)
    pair = Pair(Recalls(program))
    batch = torch.randn(2, 3)
    for epsilon in (0.3, 1e-3):
        pair.check(batch, key, epsilon)
        pair.check_lent(batch)


def test_the_ledger_may_change_between_two_passes() -> None:
    """What is still on the device is of the ledger as it was."""
    pair = Pair(nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3)))
    for key in range(3):
        assert pair.check(torch.ones(2, 3), key) == 2
        pair.check_lent(torch.ones(2, 3))
        pair.integers += 1 << 18


def test_a_module_may_call_itself() -> None:
    class Again(nn.Linear):
        def forward(self, x: Tensor, deeper: bool = True) -> Tensor:
            if deeper:
                x = self(x, False)
            return super().forward(x)

    pair = Pair(nn.Sequential(*(Again(3, 3) for _ in range(3))))
    assert [pair.check(torch.ones(2, 3)) for _ in range(2)] == [3, 3]


def test_what_is_needed_in_two_places_stays_from_the_start() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.head = nn.Embedding(9, 4), nn.Linear(4, 9)
            self.head.weight = self.embedding.weight
            self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
            self.few = nn.ModuleList([nn.Linear(2, 2)])
            self.own = nn.Parameter(torch.zeros(3))

        def forward(self, x: Tensor) -> Tensor:
            x = self.embedding(x)
            for block in self.blocks:
                x = block(x)
            y: Tensor = self.head(x)
            return y

    units = divide(model := Tied(), Parameters(model))
    names = {id(p): name for name, p in model.named_parameters()}
    found = {unit.name: [names[id(p)] for p in unit.tensors()] for unit in units}
    assert found == {
        "what is shared": ["embedding.weight", "own"],
        "head": ["head.bias"],
        "blocks.0": ["blocks.0.bias", "blocks.0.weight"],
        "blocks.1": ["blocks.1.bias", "blocks.1.weight"],
        "few.0": ["few.0.bias", "few.0.weight"],
    }
    pair = Pair(model)
    pair.check(torch.arange(4))
    assert pair.check(torch.arange(4)) == 2 + 1
    assert divide(nn.Linear(2, 2), Parameters(nn.Linear(2, 2)))[0].name == ""


def test_a_module_may_run_its_parts_in_threads_of_its_own() -> None:
    class Threads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(nn.Linear(3, 3) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            found = [x]

            def work() -> None:
                with torch.no_grad():
                    found.append(self.blocks[1](found[0]))

            x = self.blocks[0](x)
            thread = threading.Thread(target=work)
            thread.start()
            thread.join()
            result: Tensor = self.blocks[2](found[-1])
            return result

    Pair(Threads()).check(torch.ones(2, 3))


def test_blocks_are_those_of_the_largest_list() -> None:
    model = nn.Module()
    model.few = nn.ModuleList(nn.Sequential(nn.Linear(2, 2)) for _ in range(3))
    model.many = nn.ModuleList(nn.Sequential(nn.Linear(5, 5)) for _ in range(2))
    names = [unit.name for unit in divide(model, Parameters(model))]
    assert names == ["few.0.0", "few.1.0", "few.2.0", "many.0", "many.1"]


# ---- how much comes, and when


def test_each_unit_comes_once_a_step_and_one_ahead() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.Linear(4, 2, bias=False))
    pair = Pair(model)
    log: list[str] = []
    for name, module in pair.twin.named_children():
        module.register_forward_pre_hook(
            lambda *_, name=name: log.append(f"{name}{'+-'[pair.offloaded._pass.side()]}")  # type: ignore[union-attr, misc]
        )
    assert [pair.check(torch.ones(1, 4), key) for key in range(3)] == [3, 3, 3]
    # Each side goes on where the other is to go next: one change of sides a unit.
    assert log[:8] == ["0+", "0-", "1-", "2-", "1+", "2+", "3+", "3-"]


def sizes(model: nn.Module) -> tuple[int, int]:
    """Return the bytes of the largest unit that moves, and of what stays on both sides."""
    units = divide(model, Parameters(model))
    moving = max(unit.size for unit in units if not unit.stays)
    return moving, sum(2 * unit.float_size + unit.fixed_size for unit in units if unit.stays)


def test_the_limit_is_two_units_on_their_way_one_at_work_and_what_stays() -> None:
    class Blocks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.own = nn.Parameter(torch.ones(64))
            self.blocks = nn.ModuleList(nn.Linear(64, 64, bias=False) for _ in range(8))

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = block(x)
            return x * self.own

    moving, staying = sizes(Blocks())
    assert (moving, staying) == (64 * 64 * 4, 2 * 64 * 4)
    needed = 3 * moving + staying
    pair = Pair(Blocks(), memory=needed)
    pair.check(torch.ones(1, 64))
    assert pair.offloaded.peak == needed
    with pytest.raises(SettingError, match=f"take {needed} bytes, not {needed - 1}"):
        Pair(Blocks(), memory=needed - 1)


def test_a_weight_that_has_to_stay_needs_room_too() -> None:
    model, task, batch = text(width=64, heads=4)
    moving, staying = sizes(model)
    pair = Pair(model, task, memory=3 * moving + staying)
    with pytest.raises(
        SettingError, match=r"\(embedding does: it is used outside of its forward\)"
    ):
        pair.offloaded.losses(pair.integers, 0, 0.01, batch)
    pair.check_gone()


def test_frozen_weights_travel_as_they_are() -> None:
    """LoRA: the base is frozen, and by far the largest."""

    class Lora(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base = nn.Linear(32, 32, bias=False, dtype=torch.bfloat16).requires_grad_(False)
            self.a, self.b = (nn.Linear(*io, bias=False) for io in ((32, 2), (2, 32)))

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.base(x.to(torch.bfloat16)).float() + self.b(self.a(x))
            return y

    torch.manual_seed(0)
    model = nn.ModuleDict({"blocks": nn.ModuleList(Lora() for _ in range(3))})
    model.forward = lambda x: nn.Sequential(*model["blocks"])(x)  # type: ignore[index, method-assign]
    units = divide(model, Parameters(model))
    assert [unit.size for unit in units] == [32 * 32 * 2 + 2 * 64 * 4] * 3

    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(Lora() for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = block(x)
            return x

    pair = Pair(Chain(), memory=3 * (32 * 32 * 2 + 2 * 64 * 4))
    assert [pair.check(torch.ones(1, 32), key) for key in range(2)] == [3, 3]


# ---- errors


class Breaks(nn.Module):
    """A block that fails at the given call."""

    calls = itertools.count()

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        if next(Breaks.calls) == Breaks.at:  # type: ignore[attr-defined]
            raise Breaks.error  # type: ignore[attr-defined]
        y: Tensor = self.linear(x)
        return y


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 9),
    st.sampled_from([KeyError("labels"), RuntimeError("CUDA out of memory"), KeyboardInterrupt()]),
    st.booleans(),
)
def test_an_error_on_either_side_comes_out_and_the_next_step_is_right(
    at: int, error: BaseException, swallow: bool
) -> None:
    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(Breaks() for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                try:
                    x = block(x)
                except BaseException as caught:
                    if not swallow or caught is error:
                        raise
            return x

    pair = Pair(Chain())
    Breaks.calls, Breaks.at, Breaks.error = itertools.count(), at, error  # type: ignore[attr-defined]
    batch = torch.ones(2, 3)
    if at < 8:
        with pytest.raises(type(error)) as raised:
            pair.offloaded.losses(pair.integers, 1, 0.01, batch)
        assert raised.value is error
    else:
        pair.offloaded.losses(pair.integers, 1, 0.01, batch)
    pair.check_gone()
    Breaks.at = -1  # type: ignore[attr-defined]
    pair.check(batch)
    assert pair.check(batch) == 4


def test_a_loss_that_is_no_number_is_refused() -> None:
    class Vector:
        def loss(self, model: nn.Module, batch: Any) -> Tensor:
            out: Tensor = model(batch)
            return out

    pair = Pair(nn.Linear(3, 3), Vector())
    with pytest.raises(TypeError, match="not a scalar"):
        pair.offloaded.losses(pair.integers, 1, 0.01, torch.ones(2, 3))


# ---- in a run

RUN: dict[str, Any] = {
    "run": {"name": "text", "seed": 1, "turns": 4},
    "task": {"name": "text", "model": {"layers": 3, "width": 16, "heads": 2, "context": 32}},
    "local": {"batch": 4},
    "exchange": {"update": {"kind": "scalar", "perturbations": 3}},
}


def trainer(memory: int, **exchange: Any) -> Trainer:
    ticks = itertools.count()
    run = {**RUN, "exchange": {**RUN["exchange"], **exchange}}
    setup = Setup(run=RunSpec.parse(run), threads=1, device_memory=memory, run_id=b"r" * 32)
    return Trainer(setup, clock=lambda: float(next(ticks)))


def test_a_run_is_the_same_with_little_memory(tmp_path: Path) -> None:
    one, other = trainer(0), trainer(90_000)
    assert one.founding() == other.founding()
    for turn in (1, 2, 3):
        found = [each.turn(turn, 1) for each in (one, other)]
        assert found[0] == found[1]
        assert found[0].payload is not None
        key = (bytes(32), 7, turn)
        update = Arrived(key, turn, "scalar", found[0].payload, len(found[0].payload))
        for each in (one, other):
            each.commit(7, turn)
            each.apply([update])
        if turn == 2:
            other.save(tmp_path / "state")
            other = trainer(90_000)
            other.load(tmp_path / "state", own=(7, 2))
    assert one.fingerprint() == other.fingerprint() == other.recompute()
    assert one.evaluate() == other.evaluate()
    assert isinstance(other._forwards, Offloaded)
    assert other._forwards.peak <= 90_000 < 4 * other.parameters * 2
    for name, each in (("one", one), ("other", other)):
        each.export(tmp_path / name)
    saved = [safetensors.torch.load_file(tmp_path / name) for name in ("one", "other")]
    assert saved[0].keys() == saved[1].keys()
    assert all(torch.equal(saved[0][name], saved[1][name]) for name in saved[0])
    assert one.measure(saved[0]) == other.measure(saved[0]) == one.evaluate()
    assert trainer(0).evaluate() != one.evaluate()


TASK = """
import torch


class Half:
    def __init__(self, place): pass
    def model(self):
        layers = torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 1)
        model = torch.nn.Sequential(*layers)
        model[2].requires_grad_(False)
        return model
    def batches(self, generator):
        while True:
            yield torch.randn(5, 3, generator=generator)
    def loss(self, model, batch): return model(batch).square().mean()
"""


def test_what_is_frozen_is_exported_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "half_frozen_for_offload"
    (tmp_path / f"{name}.py").write_text(TASK)
    monkeypatch.syspath_prepend(str(tmp_path))
    run = {**RUN, "task": {"name": f"{name}:Half"}}
    spec = RunSpec.parse(run, allow_task=f"{name}:Half")
    saved = []
    for memory in (0, 10**6):
        setup = Setup(run=spec, allow_task=f"{name}:Half", device_memory=memory)
        one = Trainer(setup, clock=lambda: 0.0)
        one.turn(1, 1)
        one.export(tmp_path / "out")
        saved.append(safetensors.torch.load_file(tmp_path / "out"))
    assert saved[0].keys() == saved[1].keys() >= {"2.weight", "1.running_mean"}
    assert all(torch.equal(saved[0][name], saved[1][name]) for name in saved[0])


def test_a_device_that_is_too_small_and_a_kind_with_gradients_are_refused() -> None:
    with pytest.raises(RunError, match="--device-memory: two of this model's blocks"):
        trainer(1000)
    with pytest.raises(RunError, match="kind = 'dense' needs gradients"):
        trainer(10**9, update=[{"kind": "dense", "every": 2}, {"kind": "scalar"}])
    one = trainer(2 * 3 * 12 * 16 * 16 * 4)  # blocks alone: the embedding has to stay too
    with pytest.raises(RunError, match="embedding does"):
        one.founding()


def test_the_initial_integers_may_be_read_from_their_file(tmp_path: Path) -> None:
    one = trainer(0)
    before = one.initial_bytes()
    (tmp_path / "initial").write_bytes(before)
    one.keep_initial(tmp_path / "initial")
    assert one.initial_bytes() == before
    assert one._initial.base is not None
    one.exchange.restore(one.initial_bytes())
    assert one.fingerprint() == trainer(0).fingerprint()


@pytest.mark.gpu
def test_on_cuda_losses_are_the_same_and_memory_is_bounded() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA here")
    device = torch.device("cuda")
    model, task, batch = text(layers=12, width=512, heads=8, context=64)
    twin = copy.deepcopy(model)
    integers = ledger.from_floats(Parameters(model).read(), BITS)
    moving, staying = sizes(twin)
    embedding = 2 * 256 * 512 * 4
    memory = 3 * moving + staying + embedding
    parts = Parameters(twin)
    offloaded = Offloaded(task, twin, parts, BITS, device=device, memory=memory)
    model.to(device)
    resident = Resident(task, model, Parameters(model), BITS)
    there = integers.to(device)
    for key in range(4):
        found = offloaded.losses(integers, key, 1e-2, batch)
        assert found == pytest.approx(resident.losses(there, key, 1e-2, batch), rel=1e-5)
    assert offloaded.peak <= memory
    with resident.at(there) as whole, offloaded.at(integers) as lent:
        assert float(task.loss(lent, batch)) == pytest.approx(float(task.loss(whole, batch)))
    del model, resident, there, whole
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    offloaded.losses(integers, 9, 1e-2, batch)
    activations = 64 << 20
    assert torch.cuda.max_memory_allocated() - before <= memory + activations
    assert 12 * moving > memory + activations
