"""FedZip's pruning, clustering and three encodings, against a plain implementation."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.vectors import X16

from shoal.compression import codec
from shoal.compression.codec import PayloadError
from shoal.compression.codecs import kmeans

ENCODINGS = pytest.mark.parametrize("encoding", ["huffman", "positions", "gaps"])
SHAPES = ((40, 30), (7,), (1,), (5, 4, 3, 2), (900,))
SIZE = 1200 + 7 + 1 + 120 + 900


def make(shapes: Any = None, **options: Any) -> Any:
    return codec.make("kmeans", options, shapes=shapes)


def gaussian(size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)) * 20_000


def plain(values: list[int], count: int) -> tuple[list[int], list[int]]:
    """Return centroids and labels by Lloyd's algorithm, element by element in Python integers."""
    low, high = min(values), max(values)
    centroids = [low + (high - low) * j // max(count - 1, 1) for j in range(count)]

    def assign() -> list[int]:
        return [min(range(count), key=lambda j: (abs(v - centroids[j]), j)) for v in values]

    for _ in range(50):
        labels, before = assign(), centroids
        groups = [[v for v, j in zip(values, labels, strict=True) if j == i] for i in range(count)]
        centroids = sorted(
            (2 * sum(g) + len(g)) // (2 * len(g)) if g else c
            for g, c in zip(groups, before, strict=True)
        )
        if centroids == before:
            break
    return centroids, assign()


def test_the_published_vector() -> None:
    x = torch.tensor(X16) * 2**20
    part = make(density=0.5)
    payload, decoded = part.encode(x)
    found = part.unpack(payload, 16)
    assert found.places.tolist() == [1, 3, 5, 6, 9, 10, 13, 14]
    assert found.labels.tolist() == [0, 2, 2, 1, 0, 2, 2, 1]
    assert (found.centroids / 2**20).reshape(-1).tolist() == pytest.approx(
        [-0.75, -0.375, 0.4625], abs=1e-6
    )
    left = (x.double() - decoded.dense()).square().sum() / x.double().square().sum()
    assert float(left) == pytest.approx(0.09445, abs=1e-5)


@settings(max_examples=200, deadline=None)
@given(
    values=st.one_of(
        st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=40),
        st.lists(st.integers(-3, 3), min_size=1, max_size=40),
    ),
    count=st.integers(1, 9),
)
def test_clustering_agrees_with_lloyds_algorithm_element_by_element(
    values: list[int], count: int
) -> None:
    vector = torch.tensor(values)
    centroids, bounds = kmeans.lloyd(vector, count)
    labels = torch.searchsorted(bounds, vector)
    assert (centroids.tolist(), labels.tolist()) == plain(values, count)


@ENCODINGS
@pytest.mark.parametrize("shapes", [None, SHAPES])
@pytest.mark.parametrize("centroids", [2, 3, 8, 20])
def test_every_encoding_says_the_same(encoding: str, shapes: Any, centroids: int) -> None:
    x = gaussian(SIZE)
    part = make(shapes, encoding=encoding, centroids=centroids, density=0.1)
    payload, decoded = part.encode(x)
    again = part.decode(payload, SIZE)
    usual = make(shapes, centroids=centroids, density=0.1).encode(x)
    for other in (again, usual.decoded):
        assert torch.equal(decoded.values, other.values)
        assert torch.equal(decoded.indices, other.indices)
    assert len(usual.payload) <= len(payload) <= part.bound(SIZE)
    assert part.pack(part.unpack(payload, SIZE), SIZE) == payload


def test_each_tensor_keeps_its_largest_and_has_its_centroids() -> None:
    x = gaussian(SIZE)
    x[:1200] *= 100
    decoded = make(SHAPES, density=0.1).encode(x).decoded
    start = 0
    for shape in SHAPES:
        length = int(np.prod(shape))
        part, keep = x[start : start + length], max(1, length // 10)
        mine = (decoded.indices >= start) & (decoded.indices < start + length)
        kept = part.abs().topk(keep).indices.sort().values
        assert torch.equal(decoded.indices[mine] - start, kept)
        centroids, labels = plain(part[kept].round().long().tolist(), 3)
        assert decoded.values[mine].tolist() == [centroids[j] for j in labels]
        start += length


@pytest.mark.parametrize(("density", "most"), [(0.05, 0.375), (0.01, 0.1)])
def test_bits_an_element_on_gaussian_input(density: float, most: float) -> None:
    x = gaussian(1 << 20)
    assert len(make(density=density).encode(x).payload) * 8 / len(x) < most


def test_auto_takes_symbols_where_much_is_kept() -> None:
    x = gaussian(20_000)
    assert make(density=0.5).encode(x).payload[0] == kmeans.HUFFMAN
    assert make(density=0.01).encode(x).payload[0] == kmeans.GAPS


def small(encoding: str) -> tuple[Any, kmeans.Clusters]:
    part = make(((8,), (4,)), density=0.25, centroids=2, encoding=encoding)
    x = torch.tensor([0.0, 9, 0, 0, -7, 0, 0, 0, 0, 5, 0, 0])
    return part, part.unpack(part.encode(x).payload, 12)


@ENCODINGS
def test_what_no_encoder_says_is_refused(encoding: str) -> None:
    part, found = small(encoding)
    assert found.centroids.tolist() == [[-7, 9], [5, 5]]
    assert (found.places.tolist(), found.labels.tolist()) == ([1, 4, 9], [1, 0, 0])

    def refused(match: str, **changes: Any) -> None:
        with pytest.raises(PayloadError, match=match):
            part.unpack(part.pack(found._replace(**changes), 12), 12)

    refused("not in order", centroids=torch.tensor([[9, -7], [5, 5]]))
    refused("first of equal", labels=torch.tensor([1, 0, 1], dtype=torch.uint8))
    refused("more or fewer", places=torch.tensor([1, 8, 9]))
    assert part.unpack(part.pack(found, 12), 12).places.tolist() == [1, 4, 9]
    with pytest.raises(PayloadError):
        part.decode(bytes([4]) + part.pack(found, 12)[1:], 12)


@pytest.mark.parametrize("encoding", ["positions", "gaps"])
def test_an_element_with_two_centroids_is_refused(encoding: str) -> None:
    part, found = small(encoding)
    twice = found._replace(places=torch.tensor([1, 1, 9]))
    with pytest.raises(PayloadError, match="two centroids"):
        part.unpack(part.pack(twice, 12), 12)


def test_a_longer_encoding_than_need_be_is_refused() -> None:
    part = make(density=0.01)
    x = gaussian(5000)
    payload = make(density=0.01, encoding="positions").encode(x).payload
    with pytest.raises(PayloadError, match="another encoding is shorter"):
        part.decode(payload, 5000)


def test_shapes_that_do_not_make_the_vector_are_refused() -> None:
    with pytest.raises(ValueError, match="not made of tensors"):
        make(SHAPES).encode(gaussian(100))


@pytest.mark.parametrize(
    ("options", "hint"),
    [
        ({"density": 0.0}, "density"),
        ({"centroids": 256}, "use 2 to 255"),
        ({"encoding": "zip"}, "use one of auto, huffman, positions, gaps"),
    ],
)
def test_settings_are_checked(options: dict[str, Any], hint: str) -> None:
    with pytest.raises(ValueError, match=hint):
        make(**options)
