"""A model as one vector: order, ties, what is left out, fragments, and the Merkle tree over it."""

import math
from hashlib import blake2b

import pytest
import torch
from torch import nn

from shoal.compression.settings import SettingError
from shoal.training import merkle, parameters
from shoal.training.parameters import Layout, Parameters


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.zebra = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5)
        self.head.weight = self.zebra.weight
        self.frozen = nn.Linear(2, 2)
        self.frozen.requires_grad_(False)


def test_names_are_sorted_ties_stand_once_and_frozen_parameters_not_at_all() -> None:
    model = Tied()
    found = Parameters(model)
    assert found.layout.names == ("head.bias", "head.weight")
    assert found.layout.size == 5 + 15
    x = torch.arange(20.0)
    found.write(x)
    assert torch.equal(model.zebra.weight.detach().reshape(-1), x[5:])
    assert torch.equal(found.read(), x)
    assert torch.equal(found.split(x)["head.weight"], x[5:].reshape(5, 3))


def test_the_layout_hash_tells_names_shapes_and_types_apart() -> None:
    hashes = {
        Layout(("a",), ((2, 3),), ("float32",)).hash(),
        Layout(("a",), ((3, 2),), ("float32",)).hash(),
        Layout(("b",), ((2, 3),), ("float32",)).hash(),
        Layout(("a",), ((2, 3),), ("bfloat16",)).hash(),
    }
    assert len(hashes) == 4


def tied() -> Tied:
    torch.manual_seed(3)
    return Tied()


def test_the_layout_hash_tells_other_frozen_parameters_apart() -> None:
    """They are in no ledger, so only the hash shows that a peer holds another base model."""
    mine = Parameters(tied()).layout
    assert mine.hash() == Parameters(tied()).layout.hash()
    trained = tied()
    nn.init.zeros_(trained.head.weight)  # is in the ledger
    assert Parameters(trained).layout.hash() == mine.hash()
    changed = tied()
    changed.frozen.bias.data[1] += 2.0**-20
    renamed = tied()
    renamed.cold, renamed.frozen = renamed.frozen, nn.Identity()  # type: ignore[assignment]
    reshaped = tied()
    reshaped.frozen.bias.data = reshaped.frozen.bias.data[None]
    others = [Parameters(model).layout.hash() for model in (changed, renamed, reshaped)]
    assert len({mine.hash(), *others}) == 4
    fixed = {Parameters(tied(), fixed).layout.hash() for fixed in (b"", b"a", b"b")}
    assert mine.hash() in fixed
    assert len(fixed) == 3


def test_a_layout_without_frozen_parameters_has_the_hash_it_always_had() -> None:
    layout = Parameters(nn.Linear(2, 3)).layout
    text = b'[["bias",[3],"float32"],["weight",[3,2],"float32"]]'
    assert layout.hash() == blake2b(text, digest_size=32).digest()


def test_fragments_are_whole_parameters_that_cover_everything_once() -> None:
    layout = Layout(tuple("abcdef"), tuple((n,) for n in (10, 1, 30, 4, 5, 50)), ("float32",) * 6)
    for count in range(1, 9):
        parts = layout.fragments(count)
        assert 1 <= len(parts) <= count
        assert [i for part in parts for i in part] == list(range(100))
        edges = {0, 10, 11, 41, 45, 50, 100}
        assert {part.start for part in parts} <= edges
    assert layout.fragments(2) == [range(50), range(50, 100)]


def test_no_fragment_is_empty_whatever_the_shapes() -> None:
    """Nobody could say anything of an empty fragment, and its turns would be lost."""
    shapes = [((0,), (), (0, 3), (0,), (0,)), ((1,), (0,), (0,), (0,)), ((0,), (0,), (0,), (2,))]
    for sizes in shapes:
        layout = Layout(tuple("abcde"[: len(sizes)]), sizes, ("float32",) * len(sizes))
        for count in range(1, 7):
            parts = layout.fragments(count)
            assert all(len(part) for part in parts)
            assert [i for part in parts for i in part] == list(range(layout.size))
            for part in parts:
                shapes_in = layout.shapes_in(part)
                assert sum(math.prod(shape) for shape in shapes_in) == len(part)


def test_a_model_without_trainable_parameters_is_refused() -> None:
    with pytest.raises(SettingError, match="no trainable parameters"):
        Parameters(nn.ReLU())


def test_buffers_that_change_are_found() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    before = parameters.floating_buffers(model)
    assert not parameters.changed_buffers(model, before)
    model(torch.randn(8, 2, generator=torch.Generator().manual_seed(0)))
    assert parameters.changed_buffers(model, before) == ["1.running_mean", "1.running_var"]


def test_buffers_that_the_model_does_not_save_are_no_part_of_it() -> None:
    """Rotary embeddings keep frequencies in such buffers, and some change them as they go."""

    class Rotary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("frequencies", torch.ones(4), persistent=False)

    model = nn.Sequential(Rotary())
    before = parameters.floating_buffers(model)
    model[0].frequencies += 1
    assert not parameters.changed_buffers(model, before)
    parameters.restore_buffers(model, before)


@pytest.mark.parametrize("size", [0, 1, 100, 101, 299, 300, 301, 999, 1600])
def test_every_chunk_proves_its_place(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merkle, "CHUNK", 100)
    data = bytes(i % 251 for i in range(size))
    level = merkle.leaves(data)
    top = merkle.root_of(data)
    pieces = merkle.chunks(data)
    assert b"".join(pieces) == data
    for i, piece in enumerate(pieces):
        sisters = merkle.proof(level, i)
        assert merkle.verify(piece, i, len(pieces), sisters, top)
        assert not merkle.verify(piece + b"x", i, len(pieces), sisters, top)
        assert not merkle.verify(piece, i, len(pieces), [*sisters, bytes(32)], top)
        assert not merkle.verify(piece, len(pieces), len(pieces), sisters, top)
        if sisters:
            assert not merkle.verify(piece, i, len(pieces), sisters[:-1], top)
            assert not merkle.verify(piece, i ^ 1, len(pieces), sisters, top)


def test_the_root_of_three_leaves_is_its_definition() -> None:
    from hashlib import blake2b

    def h(data: bytes) -> bytes:
        return blake2b(data, digest_size=32).digest()

    parts = [b"a" * merkle.CHUNK, b"b" * merkle.CHUNK, b"c"]
    a, b, c = (h(b"\0" + part) for part in parts)
    assert merkle.root_of(b"".join(parts)) == h(b"\1" + h(b"\1" + a + b) + c)
