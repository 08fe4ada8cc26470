"""Fine-tuning models in Hugging Face's format: what counts, what is refused, what LoRA leaves.

Every model is made here, with random weights; nothing is downloaded.
"""

import json
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
import safetensors.torch
import torch
from support import bases
from torch import Tensor, nn

from shoal.compression.settings import SettingError, build, fill
from shoal.training import data, examples, pretrained, task
from shoal.training.examples import Pair, Piece
from shoal.training.exchange import Arrived
from shoal.training.parameters import Parameters, changed_buffers, floating_buffers
from shoal.training.run import RunError, RunSpec
from shoal.training.task import Place
from shoal.training.tasks.hf_causal_lm import HfCausalLm
from shoal.training.trainer import Setup, Trainer

pytestmark = pytest.mark.skipif(
    find_spec("transformers") is None or find_spec("peft") is None,
    reason="the extra hf is not installed: pip install 'shoal[hf]'",
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bases.llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bases.gpt2(tmp_path_factory.mktemp("gpt2"))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    for i in range(8):
        (folder / f"{i}.txt").write_bytes(words(i, 40_000))
    return folder


@pytest.fixture(scope="module")
def sums(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sums") / "sums.jsonl"
    records = ({"prompt": f"{i} + {i} = ", "completion": f"{2 * i}."} for i in range(400))
    path.write_text("\n\n".join(json.dumps(record) for record in records))
    return path


def words(seed: int, size: int) -> bytes:
    rng = np.random.default_rng(seed)
    return bytes(rng.choice(list(b"the quick brown fox\n"), size).astype(np.uint8))


def made(base: Path, place: dict[str, Any] | None = None, **options: Any) -> HfCausalLm:
    """Make the task as a run file does."""
    given = Place(**{"seed": 3, "batch": 4, "base": str(base), **(place or {})})
    filled = fill(HfCausalLm, {"context": 32, **options}, where="task", skip=1)
    return build(HfCausalLm, filled, given, where="task")


def model_of(one: HfCausalLm, seed: int = 3) -> nn.Module:
    return task.make_model(one, "hf-causal-lm", seed)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def nats(logits_TV: Tensor, targets: list[int]) -> list[float]:
    """Return -log p of each target, by numpy in float64."""
    x = logits_TV.detach().numpy().astype(np.float64)
    x = x - x.max(axis=1, keepdims=True)
    chances = np.exp(x) / np.exp(x).sum(axis=1, keepdims=True)
    return [-float(np.log(row[t])) for row, t in zip(chances, targets, strict=True)]


# ---------------------------------------------------------------- what is measured


@pytest.mark.parametrize("kind", ["base", "old"])
def test_loss_is_nats_per_counted_token_whatever_fills_the_rows_up(
    kind: str, request: pytest.FixtureRequest
) -> None:
    one = made(request.getfixturevalue(kind))
    model = model_of(one).eval()
    items = [Pair("12 and 7: ", "nineteen"), Pair("?", "!"), Piece(b"plain text, a little longer")]
    rows = [one._encode(item) for item in items]
    expected: list[float] = []
    for row in rows:
        tokens = row.tokens.tolist()
        logits_TV = model(input_ids=torch.tensor([tokens[:-1]])).logits[0]
        expected += nats(logits_TV, tokens[1:])[row.counted - 1 :]
    loss = float(one.loss(model, examples.collate(rows)).detach())
    assert loss == pytest.approx(sum(expected) / len(expected), rel=1e-5)
    assert len(expected) == (8 + 1) + (1 + 1) + (27 - 1)


def test_only_the_completion_and_the_end_count(base: Path, sums: Path) -> None:
    one = made(base, {"data": str(sums)})
    found = set()
    for _, batch in zip(range(5), one.batches(generator()), strict=False):
        for tokens, targets in zip(batch.tokens_BT, batch.targets_BT, strict=True):
            counted = targets[targets != examples.IGNORED].tolist()
            assert counted[-1] == 256
            answer = one.tokenizer.decode(counted[:-1])
            prompt = one.tokenizer.decode(tokens.tolist()).split("=")[0]
            number = int(prompt.split(" + ")[0])
            assert answer == f"{2 * number}."
            found.add(number)
    assert len(found) > 15


def test_what_is_too_long_loses_the_start_of_its_prompt_and_then_its_end(base: Path) -> None:
    one = made(base, context=16)
    cut = one._encode(Pair("a" * 50 + "b" * 5, "0123456789"))
    assert (
        one.tokenizer.decode(cut.tokens.tolist()) == "ab" * 0 + "a" + "b" * 5 + "0123456789<|end|>"
    )
    assert (len(cut.tokens), cut.counted) == (17, 6)
    longer = one._encode(Pair("question", "x" * 40))
    assert one.tokenizer.decode(longer.tokens.tolist()) == "n" + "x" * 16
    assert longer.counted == 1
    alone = one._encode(Pair("", "y" * 5))
    assert (one.tokenizer.decode(alone.tokens.tolist()), alone.counted) == ("yyyyy<|end|>", 1)


def test_rows_of_text_are_pieces_of_the_own_blocks(base: Path, corpus: Path) -> None:
    one = made(base, {"data": str(corpus), "shard": (1, 3)})
    blocks = data.load(Place(seed=3, data=str(corpus), shard=(1, 3))).train
    same = one.batches(generator(5))
    for _, batch in zip(range(4), one.batches(generator(5)), strict=False):
        assert batch.tokens_BT.shape == (4, 32)
        assert torch.equal(batch.tokens_BT, next(same).tokens_BT)
        for tokens, targets in zip(batch.tokens_BT, batch.targets_BT, strict=True):
            assert torch.equal(tokens[1:], targets[:-1])
            piece = one.tokenizer.decode([*tokens.tolist(), int(targets[-1])]).encode()
            assert any(piece in block for block in blocks)


def test_more_context_takes_larger_blocks(tmp_path: Path, corpus: Path) -> None:
    """Most tokens are longer than a byte: a block of 4 KiB has no row of a thousand."""
    wide = bases.llama(tmp_path / "wide", max_position_embeddings=2048)
    one = made(wide, {"data": str(corpus)}, context=1024)
    train, _ = one._data()
    assert {len(item.content) for item in train._items if isinstance(item, Piece)} <= {
        8192,
        40_000 % 8192,
    }


def test_records_of_text_begin_and_end_as_the_tokenizer_says(tmp_path: Path) -> None:
    from tokenizers.processors import TemplateProcessing

    opened = bases.tokenizer()
    opened.add_special_tokens({"bos_token": "<|start|>"})
    start = opened.bos_token_id
    opened.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|start|> $A", special_tokens=[("<|start|>", start)]
    )
    base = bases.llama(tmp_path / "base", words=opened, vocab_size=258)
    path = tmp_path / "notes.jsonl"
    texts = ["short", "naïve 🦊 " * 700]  # the second has three blocks, cut within characters
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    one = made(base, context=40)
    encoded = [one._encode(item) for _, item in examples.read(str(path), data.BLOCK)]
    assert one.tokenizer.decode(encoded[0].tokens.tolist()) == "<|start|>short<|end|>"
    first, *inner, last = (row.tokens.tolist() for row in encoded[1:])
    assert (first[0], last[-1]) == (start, 256)
    assert not {start, 256} & {*first[1:], *(t for row in inner for t in row), *last[:-1]}
    prompted = one._encode(Pair("a", "b")).tokens.tolist()
    assert prompted == [start, *pretrained.encode(one.tokenizer, "ab"), 256]


def test_any_place_of_the_text_is_as_likely_as_any_other() -> None:
    """Two blocks, one of a tenth of the other: 10 rows of 11 come from the large one."""
    tokens = {
        i: np.arange(i * 1000, i * 1000 + size, dtype=np.int32) for i, size in ((0, 400), (1, 40))
    }
    items = [Piece(bytes(len(tokens[i]))) for i in tokens]
    found = examples.Examples(
        items, lambda item: examples.Encoded(tokens[items.index(item)], 1), length=11
    )
    batch = found.draw(3000, generator())
    starts = batch.tokens_BT[:, 0].numpy()
    assert abs(float((starts < 1000).mean()) - 10 / 11) < 0.02
    counts = np.bincount(starts[starts < 1000], minlength=390)
    assert len(counts) == 390
    expected = (starts < 1000).sum() / 390
    chi_squared = float(((counts - expected) ** 2 / expected).sum())
    assert 280 < chi_squared < 500  # 389 ± 28


def test_no_item_is_left_out() -> None:
    items = [Piece(bytes([i])) for i in range(5)]
    found = examples.Examples(
        items, lambda item: examples.Encoded(np.array([*item.content, 9], np.int32), 1), length=2
    )
    drawn = found.draw(1000, generator()).tokens_BT.flatten().tolist()
    assert all(150 < drawn.count(i) < 250 for i in range(5))


def test_a_spread_looks_at_every_block_first_and_at_every_token_at_last() -> None:
    tokens = [
        np.arange(i * 100, i * 100 + size, dtype=np.int32) for i, size in enumerate((25, 1, 10, 12))
    ]
    items = [Piece(bytes([i]) * len(t)) for i, t in enumerate(tokens)]
    found = examples.Examples(
        items, lambda item: examples.Encoded(tokens[items.index(item)], 1), length=10
    )
    rows = [row.tokens.tolist() for row in found.spread(100)]
    assert [row[0] for row in rows] == [0, 200, 300, 9, 309, 18]
    targets = sorted(t for row in rows for t in row[1:])
    assert targets == sorted(t for block in tokens for t in block[1:].tolist())
    assert [row.tokens[0] for row in found.spread(2)] == [0, 200]


# ---------------------------------------------------------------- whose data it is


def test_records_are_held_out_or_in_exactly_one_shard(base: Path, sums: Path) -> None:
    def contents(found: examples.Examples) -> list[bytes]:
        return sorted(item.content for item in found._items)

    shards = [made(base, {"data": str(sums), "shard": (i, 3)})._data() for i in range(3)]
    held_out = contents(shards[0][1])
    assert all(contents(out) == held_out for _, out in shards)
    train = [c for mine, _ in shards for c in contents(mine)]
    assert len(train) + len(held_out) == len({*train, *held_out}) == 400
    assert 8 <= len(held_out) <= 36
    more = made(base, {"data": str(sums)}, held_out=0.25)._data()[1]
    assert 70 <= len(contents(more)) <= 130


def test_evaluation_is_the_same_every_time_and_without_dropout(old: Path, corpus: Path) -> None:
    one = made(old, {"data": str(corpus)}, evaluation_rows=6)
    model = model_of(one).train()
    noisy = {float(one.loss(model, next(one.batches(generator()))).detach()) for _ in range(3)}
    assert len(noisy) == 3, "this model has dropout"
    quick = one.evaluate(model)
    assert model.training, "as it was"
    with torch.inference_mode():
        again = made(old, {"data": str(corpus), "batch": 1, "shard": (0, 2)}, evaluation_rows=6)
        assert again.evaluate(model.eval()) == pytest.approx(quick, rel=1e-5)
    assert len(one._held_out()) > 6
    assert one.evaluate(model, thorough=True) != quick


def test_loss_needs_no_gradients(base: Path, corpus: Path) -> None:
    """As methods of order zero call it."""
    for rank in (0, 2):
        one = made(base, {"data": str(corpus)}, lora={"rank": rank})
        model = model_of(one).eval()
        batch = next(one.batches(generator()))
        with torch.inference_mode():
            loss = one.loss(model, batch)
        assert not loss.requires_grad
        assert float(loss) == pytest.approx(float(one.loss(model, batch).detach()), rel=1e-6)


# ---------------------------------------------------------------- the model


def test_the_model_is_the_folders_in_float32_with_ties_once(tmp_path: Path, corpus: Path) -> None:
    from transformers import AutoModelForCausalLM

    half = AutoModelForCausalLM.from_pretrained(bases.llama(tmp_path / "whole"))
    half.to(torch.bfloat16).save_pretrained(tmp_path / "half")
    bases.tokenizer().save_pretrained(tmp_path / "half")
    one = made(tmp_path / "half", {"data": str(corpus)})
    model = model_of(one)
    found = Parameters(model)
    assert set(found.layout.dtypes) == {"float32"}
    assert "lm_head.weight" in found.layout.names
    assert "model.embed_tokens.weight" not in found.layout.names
    for name, p in half.named_parameters():
        assert torch.equal(model.get_parameter(name), p.float())
    before = floating_buffers(model)
    one.loss(model.train(), next(one.batches(generator())))
    assert not changed_buffers(model, before)
    assert [b for b in model.buffers() if b.is_floating_point()], "rotary frequencies"


def test_lora_starts_at_the_base_and_learns_two_thin_matrices(base: Path, old: Path) -> None:
    x = torch.arange(60)[None] % 257
    for folder in (base, old):
        whole = model_of(made(folder)).eval()
        one = made(folder, lora={"rank": 2})
        torch.manual_seed(1)
        model = model_of(one).eval()
        with torch.no_grad():
            assert torch.equal(model(input_ids=x).logits, whole(input_ids=x).logits)
        named = {n: p for n, p in model.named_parameters() if p.requires_grad}
        assert named.keys() == {n for n, _ in model.named_parameters() if "lora_" in n}
        assert {min(p.shape) for p in named.values()} == {2}
        assert not any("lm_head" in name for name in named)
        torch.manual_seed(2)
        assert torch.equal(Parameters(model).read(), Parameters(model_of(one)).read())
        assert not torch.equal(Parameters(model).read(), Parameters(model_of(one, 4)).read())


def test_lora_stays_with_its_targets_and_scales_by_alpha(base: Path) -> None:
    one = made(base, lora={"rank": 2, "alpha": 6.0, "targets": ["q_proj", "layers.1.mlp.up_proj"]})
    model = model_of(one).eval()
    named = [n for n, p in model.named_parameters() if p.requires_grad]
    assert len(named) == 2 * (2 + 1)
    plain = model_of(made(base)).eval()
    for name, p in model.named_parameters():
        if "layers.0.self_attn.q_proj.lora_B" in name:
            nn.init.ones_(p)
        if "layers.0.self_attn.q_proj.lora_A" in name:
            a_RD = p.detach().clone()
    query = plain.get_parameter("model.layers.0.self_attn.q_proj.weight")
    with torch.no_grad():
        query += 6.0 / 2 * torch.ones(16, 2) @ a_RD
        x = torch.arange(40)[None]
        found, wanted = model(input_ids=x).logits, plain(input_ids=x).logits
    assert torch.allclose(found, wanted, atol=1e-4)


def test_peers_with_another_base_or_tokenizer_have_another_layout(tmp_path: Path) -> None:
    first, copy = bases.llama(tmp_path / "first"), tmp_path / "copy"
    shutil.copytree(first, copy)
    other = bases.llama(tmp_path / "other", seed=1)
    reversed_ = bases.llama(tmp_path / "reversed", words=bases.tokenizer(reverse=True))

    def layout(folder: Path, rank: int) -> bytes:
        one = made(folder, lora={"rank": rank})
        return Parameters(model_of(one), task.fixed(one)).layout.hash()

    assert layout(first, 2) == layout(copy, 2)
    assert len({layout(folder, 2) for folder in (first, other, reversed_)}) == 3
    # Without LoRA the weights are the ledger's: whoever has others takes the founder's.
    assert layout(first, 0) == layout(other, 0) != layout(reversed_, 0)


@pytest.mark.parametrize(
    "settings",
    [
        {"rms_norm_eps": 1e-5},
        {"rope_parameters": {"rope_theta": 500000.0, "rope_type": "default"}},
        {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "linear", "factor": 2.0}},
        {"num_attention_heads": 4, "head_dim": 4, "num_key_value_heads": 4},
        {"hidden_act": "gelu"},
        {"max_position_embeddings": 32},
    ],
    ids=lambda settings: "-".join(map(str, settings)),
)
def test_the_same_weights_under_another_configuration_are_another_layout(
    settings: dict[str, Any], base: Path, tmp_path: Path
) -> None:
    """They load as well, and compute another function."""
    other = tmp_path / "other"
    shutil.copytree(base, other)
    changed(other, **settings)
    one, two = made(base), made(other)
    models = model_of(one).eval(), model_of(two).eval()
    assert torch.equal(Parameters(models[0]).read(), Parameters(models[1]).read())
    x = torch.arange(32)[None]
    with torch.no_grad():
        here, there = (model(input_ids=x).logits for model in models)
    assert torch.equal(here, there) == ("max_position_embeddings" in settings)
    plain, odd = (
        Parameters(m, task.fixed(t)).layout for m, t in zip(models, (one, two), strict=True)
    )
    assert plain.hash() != odd.hash()
    assert (plain.names, plain.shapes) == (odd.names, odd.shapes)


def test_what_a_configuration_says_of_itself_or_leaves_out_makes_no_other_layout(
    base: Path, old: Path, tmp_path: Path
) -> None:
    for folder, left_out in ((base, "attention_bias"), (old, "scale_attn_weights")):
        said = task.fixed(made(folder))
        other = tmp_path / folder.name
        shutil.copytree(folder, other)
        changed(
            other,
            transformers_version="5.0.1",
            _name_or_path="/elsewhere",
            dtype="bfloat16",
            architectures=["Else"],
            use_cache=False,
            initializer_range=0.5,
        )
        config = json.loads((other / "config.json").read_text())
        del config[left_out], config["tie_word_embeddings"]
        if folder is base:
            config["rope_parameters"]["rope_theta"] = 10000
            del config["num_key_value_heads"], config["head_dim"], config["rms_norm_eps"]
            config["tie_word_embeddings"] = True  # a LLaMA's are not, if it says nothing
        (other / "config.json").write_text(json.dumps(config))
        one = made(other)
        assert task.fixed(one) == said
        model_of(one)
        assert task.fixed(one) == said
        model_of(made(folder, lora={"rank": 1}))
    assert task.fixed(made(base)) != task.fixed(made(old))


def test_the_digest_tells_tokenizers_apart_by_words_and_by_ways(tmp_path: Path) -> None:
    from tokenizers import pre_tokenizers

    plain = bases.tokenizer()
    plain.save_pretrained(tmp_path)
    again = pretrained.load_tokenizer(pretrained.Source(str(tmp_path)))
    assert pretrained.digest(again) == pretrained.digest(plain)
    more, other = bases.tokenizer(), bases.tokenizer()
    more.add_tokens(["<|never|>"])
    other.add_tokens(["<|ever|>"])
    ways = bases.tokenizer()
    ways.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    assert len({pretrained.digest(one) for one in (plain, more, other, ways)}) == 4


def run_file(**changed: Any) -> dict[str, Any]:
    return {
        "run": {"name": "tune", "seed": 1, "turns": 6},
        "task": {"name": "hf-causal-lm", "context": 32, **changed},
        "local": {"optimizer": {"name": "adamw", "lr": 1e-2}, "batch": 8, "steps": 8},
        "exchange": {"update": {"kind": "dense"}},
    }


def trainer(tables: dict[str, Any], **setup: Any) -> Trainer:
    return Trainer(Setup(run=RunSpec.parse(tables), threads=1, **setup), clock=lambda: 0.0)


@pytest.mark.parametrize("rank", [0, 4])
def test_it_learns_and_what_is_exported_is_a_model_for_transformers(
    rank: int, base: Path, sums: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tables = run_file(lora={"rank": rank})
    one = trainer(tables, peer=b"p" * 32, base=str(base), data=str(sums))
    assert one.founding().run["task"]["lora"]["rank"] == rank
    before = one.evaluate()
    for turn in range(1, 7):
        turned = one.turn(turn, 1.0)
        assert turned.payload is not None
        one.commit(1, turn)
        size = len(turned.payload)
        one.apply([Arrived((b"p" * 32, 1, turn), turn, turned.kind, turned.payload, size)])
    after = one.evaluate()
    assert after < before - 0.3
    one.export(tmp_path / "model.safetensors", {"run": json.dumps(tables)})
    bases.script("to_hugging_face").convert(
        tmp_path / "model.safetensors", tmp_path / "tuned", base=str(base)
    )
    tuned = AutoModelForCausalLM.from_pretrained(tmp_path / "tuned")
    assert not any("lora" in name for name in tuned.state_dict())
    x = torch.arange(50)[None]
    with torch.no_grad():
        wanted = one.model.eval()(input_ids=x).logits
        assert torch.allclose(tuned(input_ids=x).logits, wanted, atol=1e-4)
    assert len(AutoTokenizer.from_pretrained(tmp_path / "tuned")) == 257


def text_file(folder: Path) -> Path:
    path = folder / "file"
    path.write_text("")
    return path


def full_folder(folder: Path) -> Path:
    (folder / "full").mkdir()
    return text_file(folder / "full").parent


@pytest.mark.parametrize(
    ("run", "said"),
    [
        (None, "was not written by `shoal export`"),
        ("[1", "does not say of which run it is"),
        ("[1]", "does not say of which run it is"),
        ('{"run": {"name": "x"}, "task": {"name": "text"}}', "is of task text"),
        (
            '{"run": {"name": "x"}, "task": {"name": "hf-causal-lm", "context": 32}}',
            "is of another model",
        ),
    ],
)
def test_a_file_that_is_no_export_is_refused(
    run: str | None, said: str, base: Path, tmp_path: Path
) -> None:
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file({"x": torch.zeros(1)}, path, {} if run is None else {"run": run})
    with pytest.raises((SettingError, RunError), match=said):
        bases.script("to_hugging_face").convert(path, tmp_path / "out", base=str(base))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("make", [text_file, full_folder])
def test_scripts_write_nothing_over_what_is_there(
    make: Callable[[Path], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = str(make(tmp_path))
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "deploy"))
    monkeypatch.setattr(sys, "argv", ["to_hugging_face", "no.safetensors", out, "--base", "no"])
    with pytest.raises(SystemExit, match=f"{out} is not an empty folder"):
        bases.script("to_hugging_face").main()
    with pytest.raises(SystemExit):
        bases.script("small_llama").parse([out])
    assert f"{out} is not an empty folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ("--layers 0", "--layers is at least 1"),
        ("--width 96 --heads 5", "multiple of twice --heads 5"),
        ("--width 12 --heads 4", "multiple of twice --heads 4"),
        ("--vocabulary 256", "--vocabulary is at least 257"),
        ("--seed -1", "--seed is from 0"),
    ],
)
def test_a_model_that_cannot_be_is_not_made(
    argv: str,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "deploy"))
    with pytest.raises(SystemExit):
        bases.script("small_llama").parse([str(tmp_path / "new"), *argv.split()])
    assert said in capsys.readouterr().err


def test_a_sample_is_text_and_comes_from_the_generator(base: Path) -> None:
    one = made(base)
    model = model_of(one).eval()
    text = one.sample(model, "once", 20, generator(1))
    assert isinstance(text, str)
    assert (
        text
        == one.sample(model, "once", 20, generator(1))
        != one.sample(model, "once", 20, generator(2))
    )
    assert one.sample(model, "", 3, generator())


# ---------------------------------------------------------------- what is refused


def changed(folder: Path, **settings: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


def pickled(folder: Path) -> None:
    whole = safetensors.torch.load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(whole, folder / "pytorch_model.bin")


def pickled_beside_others(folder: Path) -> None:
    pickled(folder)
    safetensors.torch.save_file({"x": torch.zeros(1)}, folder / "other.safetensors")


def pickled_by_index(folder: Path) -> None:
    pickled_beside_others(folder)
    whole = torch.load(folder / "pytorch_model.bin")
    index = {"metadata": {}, "weight_map": dict.fromkeys(whole, "pytorch_model.bin")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def not_finite(folder: Path) -> None:
    whole = safetensors.torch.load_file(folder / "model.safetensors")
    whole["model.norm.weight"][3] = float("nan")
    safetensors.torch.save_file(whole, folder / "model.safetensors", {"format": "pt"})


def cut_off(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:9000])


def with_code(folder: Path) -> None:
    changed(folder, model_type="own", auto_map={"AutoConfig": "own.Own"})
    (folder / "own.py").write_text("raise SystemExit('this ran')\n")


FOLDERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no folder": (shutil.rmtree, "is no folder"),
    "no config": (lambda f: (f / "config.json").unlink(), "holds no config.json"),
    "no tokenizer": (lambda f: [p.unlink() for p in f.glob("token*")], "gives no tokenizer"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), r"\*\.safetensors is missing"),
    "pickle": (pickled, r"as pickle \(pytorch_model.bin\).*get a copy with \*\.safetensors"),
    "pickle beside others": (pickled_beside_others, "gives no model: .*model.safetensors"),
    "pickle by index": (pickled_by_index, r"weights in pickle \(pytorch_model.bin\)"),
    "not finite": (not_finite, "infinite or no numbers, in model.norm.weight"),
    "cut off": (cut_off, "gives no model: .*not fully covered"),
    "another shape": (lambda f: changed(f, hidden_size=32), "gives no model"),
    "a layer missing": (
        lambda f: changed(f, num_hidden_layers=3),
        "lacks 9 weights of its model, model.layers.2",
    ),
    "no head": (lambda f: changed(f, tie_word_embeddings=False), "lacks 1 weights"),
    "code of its own": (with_code, "code of its own to be run, which Shoal never does"),
    "unknown": (lambda f: changed(f, model_type="nothing"), "gives no model: .*`nothing`"),
    "no decoder": (lambda f: changed(f, model_type="t5"), "gives no model"),
    "not JSON": (lambda f: (f / "config.json").write_text("{"), "gives no model: .*JSON"),
    "an adapter": (lambda f: (f / "adapter_config.json").write_text("{}"), "merge it first"),
    "quantised": (
        lambda f: changed(f, quantization_config={"quant_method": "gptq", "bits": 4}),
        "quantised weights",
    ),
    "more tokens": (
        lambda f: bases.llama(f, vocab_size=200),
        "tokenizer of 257 tokens and a model of 200",
    ),
    "context": (
        lambda f: changed(f, max_position_embeddings=31),
        r"task\.context = 32 is more than the 31 tokens",
    ),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_a_folder_that_is_no_model_is_refused_in_one_line(
    case: str, base: Path, tmp_path: Path
) -> None:
    spoil, said = FOLDERS[case]
    folder = tmp_path / "base"
    shutil.copytree(base, folder)
    spoil(folder)
    with pytest.raises(SettingError, match=said) as caught:
        model_of(made(folder))
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)
    assert len(str(caught.value)) < 500


def test_nothing_is_fetched_for_a_folder(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even where its settings name something on the network."""

    def refuse(*args: object, **named: object) -> NoReturn:
        raise AssertionError(f"a connection to {args}")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    folder = tmp_path / "base"
    shutil.copytree(base, folder)
    assert Parameters(model_of(made(folder, lora={"rank": 1}))).layout.size
    changed(folder, attn_implementation="kernels-community/anything", _name_or_path="an/other")
    try:
        model_of(made(folder))
    except SettingError as error:
        assert "gives no model" in str(error)  # noqa: PT017  either is fine


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ("hf://org/name", pretrained.Source("org/name", None, local=False)),
        ("hf://org/name@main", pretrained.Source("org/name", "main", local=False)),
    ],
)
def test_only_hf_names_the_network(given: str, found: pretrained.Source) -> None:
    assert pretrained.source(given) == found
    assert str(found) == given
    assert not found.options["local_files_only"]
    assert found.options["trust_remote_code"] is False


@pytest.mark.parametrize("wrong", ["hf://name", "hf://", "hf://a/b/c", "hf:///b", "org/name"])
def test_what_names_no_model_is_refused(wrong: str) -> None:
    with pytest.raises(SettingError, match=r"hf://ORG/NAME"):
        pretrained.source(wrong)


def test_without_a_base_it_says_what_to_type() -> None:
    with pytest.raises(RunError, match=r"--base FOLDER.*--base hf://ORG/NAME"):
        trainer(run_file())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"context": 0}, "context"),
        ({"held_out": 0.0}, "held_out = 0.0; use a share"),
        ({"held_out": 0.9}, "held_out"),
        ({"lora": {"rank": -1}}, "lora.rank"),
        ({"lora": {"rank": 2, "alpha": 0}}, "lora.alpha"),
        ({"lora": {"rank": 2, "targets": "q_proj"}}, "must be a list of names"),
        ({"lora": {"rank": 2, "targets": [""]}}, "must be a list of names"),
        ({"lora": {"rank": 2, "targets": ["query_proj"]}}, "did you mean 'q_proj'"),
        ({"lora": {"rank": 2, "target": []}}, "did you mean 'targets'"),
    ],
)
def test_options_that_cannot_be_are_refused(options: dict[str, Any], said: str, base: Path) -> None:
    with pytest.raises(SettingError, match=said):
        model_of(made(base, **options))


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", '{"text": "fine"}\n{"text": "cut', r"a\.jsonl, line 2 is not JSON"),
        ("a.jsonl", '{"text": "\xff"}', "line 1 is not JSON"),
        ("a.jsonl", "[1, 2]", "line 1 is not an object"),
        ("a.jsonl", '\n{"body": "x", "id": 3}', "line 2 needs a text, .*it has body, id"),
        ("a.jsonl", '{"prompt": "x"}', "needs a text, or a prompt and a completion"),
        ("a.jsonl", '{"prompt": "x", "completion": 3}', "completion is not a text"),
        ("a.jsonl", '{"prompt": "x", "completion": ""}', "empty completion"),
        ("a.jsonl", '\n \n{"text": ""}\n', "holds no text"),
        ("a.jsonl", "[" * 100_000, "line 1 is not JSON"),
        ("a.txt", "", "holds no text"),
        ("a.txt", "shorter than a block", "give it more --data"),
        ("a.jsonl", '{"text": "one record"}', "give it more --data"),
    ],
)
def test_data_that_is_none_is_refused_in_one_line(
    name: str, content: str, said: str, base: Path, tmp_path: Path
) -> None:
    path = tmp_path / name
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(SettingError, match=said) as caught:
        next(made(base, {"data": str(path)}).batches(generator()))
    assert "\n" not in str(caught.value)


def test_odd_text_is_still_text(base: Path, tmp_path: Path) -> None:
    """A byte order mark, half a surrogate pair, both kinds of line ends, a block without tokens."""
    path = tmp_path / "odd.jsonl"
    lines = ['{"text": "\\ud83e alone"}', '{"prompt": "\\udc00", "completion": "é"}']
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join([*lines] * 40).encode())
    (tmp_path / "broken.txt").write_bytes(b"\x80" * 9000)
    one = made(base, {"data": str(tmp_path), "batch": 64}, held_out=0.5)
    model = model_of(one)
    assert torch.isfinite(one.loss(model, next(one.batches(generator()))))


@pytest.mark.parametrize("library", ["transformers", "peft"])
def test_without_the_extra_it_says_what_to_install(
    library: str, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = made(base, lora={"rank": 1})
    monkeypatch.setitem(sys.modules, library, None)  # as if it were not there
    pretrained._transformers.cache_clear()
    with pytest.raises(SettingError, match=rf"{library}.*pip install 'shoal\[hf\]'"):
        model_of(one)
    pretrained._transformers.cache_clear()


def test_the_libraries_are_imported_when_the_task_is_used_and_not_before() -> None:
    code = (
        "import sys; from shoal.training import task; from shoal.training.run import RunSpec;"
        "assert 'hf-causal-lm' in task.names();"
        "RunSpec.parse({'run': {'name': 'x'}, 'task': {'name': 'hf-causal-lm'}});"
        "print({'transformers', 'peft', 'tokenizers', 'huggingface_hub'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "set()"), done.stderr
