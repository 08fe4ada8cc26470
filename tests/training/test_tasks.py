"""Data: what is held out, which share is whose; the two built-in tasks."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support import bases

from shoal.compression.settings import SettingError, fill
from shoal.training import data, task
from shoal.training.task import Place, Task
from shoal.training.tasks.digits import Digits
from shoal.training.tasks.text import Model, Text


def words(seed: int, size: int = 60_000) -> bytes:
    g = torch.Generator().manual_seed(seed)
    return bytes(torch.randint(97, 123, (size,), generator=g, dtype=torch.uint8).tolist())


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    for i in range(12):
        (tmp_path / f"{i}.txt").write_bytes(words(i))
    (tmp_path / "image.bin").write_bytes(b"\0" * 5000)
    (tmp_path / ".hidden").write_bytes(words(99))
    return tmp_path


def test_every_block_is_held_out_or_in_exactly_one_shard(corpus: Path) -> None:
    whole = data.load(Place(seed=3, data=str(corpus)))
    shards = [data.load(Place(seed=3, data=str(corpus), shard=(i, 3))) for i in range(3)]
    assert sorted(b for s in shards for b in s.train) == sorted(whole.train)
    assert all(s.held_out == whole.held_out for s in shards)
    assert not set(whole.train) & set(whole.held_out)
    expected = sorted(
        words(i)[start : start + 4096] for i in range(12) for start in range(0, 60_000, 4096)
    )
    assert sorted(whole.train + whole.held_out) == expected
    assert 0.01 < len(whole.held_out) / len(expected) < 0.12


def test_the_held_out_blocks_follow_from_content_and_seed_alone(
    corpus: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    other = tmp_path_factory.mktemp("other") / "one.txt"
    other.write_bytes(words(3)[: 4096 * 14] + words(77))
    mine = data.load(Place(seed=3, data=str(corpus)))
    theirs = data.load(Place(seed=3, data=str(other)))
    assert not set(mine.held_out) & set(theirs.train)
    assert not set(theirs.held_out) & set(mine.train)
    again = data.load(Place(seed=4, data=str(corpus)))
    assert again.held_out != mine.held_out


def test_own_data_is_trained_on_whole_but_the_built_in_corpus_is_divided(corpus: Path) -> None:
    whole = data.load(Place(data=str(corpus), peer=b"a" * 32, min_peers=4))
    assert len(whole.train) > 150
    every = data.load(Place())
    shares = [data.load(Place(peer=bytes([i]) * 32, min_peers=4)) for i in range(2)]
    for share in shares:
        assert 0.22 < len(share.train) / len(every.train) < 0.28
    common = set(shares[0].train) & set(shares[1].train)
    assert 0.15 < len(common) / len(set(shares[0].train)) < 0.35


def test_too_little_text_is_answered_with_how_much_is_enough(tmp_path: Path) -> None:
    few = next(words(i, 8192) for i in range(99) if not held_out(words(i, 8192)))
    (tmp_path / "a.txt").write_bytes(few)
    short = Text(Place(data=str(tmp_path)))
    with pytest.raises(SettingError, match=r"no text is held out .* give it 400 KiB of --data"):
        short.evaluate(short.model(), thorough=False)
    assert data.ENOUGH == 400 << 10
    assert held_out(words(0, data.ENOUGH))


def held_out(text: bytes) -> bool:
    return any(data.is_held_out(block, 0, data.HELD_OUT) for block in data.cut(text))


def test_missing_or_empty_data_is_answered(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="does not exist"):
        data.load(Place(data=str(tmp_path / "nothing")))
    with pytest.raises(SettingError, match="holds no text"):
        data.load(Place(data=str(tmp_path)))
    (tmp_path / "a.txt").write_text("short")
    owners = [i for i in range(2) if data.is_mine(b"short", Place(shard=(i, 2)))]
    assert len(owners) == 1
    with pytest.raises(SettingError, match="shard"):
        data.load(Place(data=str(tmp_path), shard=(1 - owners[0], 2)))
    with pytest.raises(SettingError, match="piece of 129 bytes"):
        next(Text(Place(data=str(tmp_path))).batches(torch.Generator()))


def small_text(corpus: Path, **options: Any) -> Text:
    return Text(Place(data=str(corpus), batch=4), model=Model(1, 16, 2, 32), **options)


def test_text_batches_are_pieces_of_the_own_blocks(corpus: Path) -> None:
    made = small_text(corpus)
    blocks = data.load(Place(data=str(corpus))).train
    batches = made.batches(torch.Generator().manual_seed(0))
    for _ in range(5):
        batch = next(batches)
        assert batch.shape == (4, 33)
        for row in batch:
            piece = bytes(row.tolist())
            assert any(piece in block for block in blocks)


def test_text_loss_is_bits_per_byte_and_sees_no_future(corpus: Path) -> None:
    made = small_text(corpus)
    torch.manual_seed(0)
    model = made.model()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.5)
    x = torch.randint(0, 256, (1, 20), generator=torch.Generator().manual_seed(0))
    changed = x.clone()
    changed[0, 12:] = 7
    assert torch.allclose(model(x)[0, :12], model(changed)[0, :12], atol=1e-5)
    assert not torch.allclose(model(x)[0, 12:], model(changed)[0, 12:], atol=1e-2)
    for p in model.parameters():
        torch.nn.init.zeros_(p)
    assert made.evaluate(model) == pytest.approx(8.0)


def test_text_learns_and_samples(corpus: Path) -> None:
    made = small_text(corpus)
    torch.manual_seed(0)
    model = made.model()
    before = made.evaluate(model)
    inner = torch.optim.Adam(model.parameters(), lr=1e-2)
    batches = made.batches(torch.Generator().manual_seed(0))
    for _ in range(60):
        inner.zero_grad()
        made.loss(model, next(batches)).backward()  # type: ignore[no-untyped-call]
        inner.step()
    after = made.evaluate(model)
    assert after < 5.2 < before  # 26 letters at random: 4.7 bits
    text = made.sample(model, "abc", 40, torch.Generator().manual_seed(1))
    assert len(text) >= 40
    assert text == made.sample(model, "abc", 40, torch.Generator().manual_seed(1))
    assert sum(c.islower() for c in text) > 30


def test_the_built_in_text_model_has_the_size_the_readme_says() -> None:
    made = Text(Place())
    model = made.model()
    assert 110_000 < sum(p.numel() for p in model.parameters()) < 130_000
    assert len(made.matrices(model)) == 12


def labels(made: Digits) -> torch.Tensor:
    return made._data()[1]


@pytest.mark.parametrize("alpha", [0.0, 0.3])
def test_digit_shards_cover_every_training_image_once(alpha: float) -> None:
    shards = [Digits(Place(seed=1, shard=(i, 4)), alpha=alpha)._data() for i in range(4)]
    rows = torch.cat([s[0] for s in shards])
    held_out = shards[0][2]
    assert len(rows) + len(held_out) == 1797
    assert all(torch.equal(s[2], held_out) for s in shards)
    assert len(torch.unique(torch.cat([rows, held_out]), dim=0)) == 1797


def test_dirichlet_shards_have_skewed_labels() -> None:
    def skew(alpha: float) -> float:
        parts = [Digits(Place(seed=1, shard=(i, 4)), alpha=alpha) for i in range(4)]
        shares = torch.stack([labels(p).bincount(minlength=10) / len(labels(p)) for p in parts])
        return float((shares - 0.1).abs().mean())

    assert skew(0.1) > 3 * skew(0.0)


def test_without_a_shard_the_peer_id_decides() -> None:
    found = {labels(Digits(Place(peer=bytes([i]) * 32, min_peers=4))).shape for i in range(12)}
    assert len(found) == 4


@pytest.mark.parametrize("name", task.names())
def test_built_in_tasks_keep_the_protocol(name: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {}
    if name == "hf-causal-lm":
        pytest.importorskip("peft", reason="the extra hf is not installed")
        bases.llama(tmp_path)
        options = {"context": 32, "lora": {"rank": 1}}  # without LoRA nothing is left to chance
    options = fill(task.find(name), options, where="task", skip=1)
    made = task.make(name, options, Place(base=str(tmp_path)), allow_task=None)
    assert isinstance(made, Task)
    state = torch.random.get_rng_state()
    first = task.make_model(made, name, 5).state_dict()
    second = task.make_model(made, name, 5).state_dict()
    other = task.make_model(made, name, 6).state_dict()
    assert all(torch.equal(first[k], second[k]) for k in first)
    assert any(not torch.equal(first[k], other[k]) for k in first)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_digits_does_not_pretend_to_use_the_data_it_is_given() -> None:
    digits = Digits(Place(seed=1, data="my/images"))
    with pytest.raises(SettingError, match="leave out my/images"):
        next(digits.batches(torch.Generator()))
