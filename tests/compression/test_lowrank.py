"""Low rank: near the best factors there are, and the same integers whatever the order of sums."""

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from shoal.compression import codec, scales, symbols
from shoal.compression.codec import PayloadError
from shoal.compression.codecs import lowrank

SHAPES = ((48, 60), (37,), (10, 3, 3, 30), (5, 6), (300,), (2, 2000))
SIZE = 2880 + 37 + 2700 + 30 + 300 + 4000


def make(shapes: Any = SHAPES, **options: Any) -> Any:
    return codec.make("lowrank", options, shapes=shapes)


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def signal(rows: int, columns: int, rank: int, noise: float, seed: int = 0) -> torch.Tensor:
    left, right = gaussian(rows, rank, seed=seed), gaussian(rank, columns, seed=seed + 1)
    return (left @ right + noise * gaussian(rows, columns, seed=seed + 2)) * 20_000


def left_over(x: torch.Tensor, found: torch.Tensor) -> float:
    return float((x.double() - found).square().sum() / x.double().square().sum())


def best(x_MN: torch.Tensor, rank: int) -> float:
    strength = torch.linalg.svdvals(x_MN.double()).square()
    return float(strength[rank:].sum() / strength.sum())


@pytest.mark.parametrize(("iterations", "error"), [(1, 0.0290886), (2, 0.00656504)])
def test_the_published_matrix(iterations: int, error: float) -> None:
    x = torch.tensor([[1.0, 2, 3], [4, 5, 6]]) * 2**18
    start = torch.tensor([[1.0], [0], [0]], dtype=torch.float64)
    f, left, right = lowrank.factors(x, start, iterations, 32767)
    product = (left.double() @ right.double().T) * 2.0 ** -int(f)
    assert left_over(x, product) == pytest.approx(error, rel=2e-4)
    if iterations == 1:
        unit = left.double()[:, 0] / left.double().norm()
        assert unit.tolist() == pytest.approx([0.24253563, 0.9701425], abs=2e-5)
        scaled = right.double()[:, 0] * 2.0 ** -int(f) * left.double().norm() / 2**18
        assert scaled.tolist() == pytest.approx([4.12310563, 5.33578375, 6.54846188], rel=1e-4)


@pytest.mark.parametrize(("bits", "slack"), [(16, 1.001), (8, 1.005)])
@pytest.mark.parametrize(("rows", "columns"), [(200, 150), (60, 700), (700, 60)])
def test_the_error_is_close_to_the_least_that_any_factors_leave(
    rows: int, columns: int, bits: int, slack: float
) -> None:
    x = signal(rows, columns, 4, 0.5)
    part = make(((rows, columns),), bits=bits, iterations=3)
    payload, decoded = part.encode(x.reshape(-1), key=5)
    error = left_over(x, decoded.values.reshape(rows, columns))
    assert best(x, 4) <= error * (1 + 1e-6)
    assert error <= slack * best(x, 4)
    assert len(payload) <= 4 * (rows + columns) * bits // 8 + 10


def test_more_iterations_come_nearer() -> None:
    x = signal(200, 200, 8, 1.0)
    errors = [
        left_over(
            x.reshape(-1), make(((200, 200),), iterations=n).encode(x.reshape(-1)).decoded.values
        )
        for n in (1, 2, 4)
    ]
    assert errors[0] > errors[1] > errors[2] >= best(x, 4)


def exact(matrix: NDArray[np.int64]) -> NDArray[Any]:
    return matrix.astype(object)


def test_sums_are_exact_at_the_largest_numbers() -> None:
    """Matrices of the largest integers against Python's, where float64 could not be off by one."""
    rng = np.random.default_rng(0)
    x = torch.from_numpy(rng.choice([-(2.0**31), 2.0**31, 2.0**31 - 128], (700, 300))).float()
    matrix = lowrank._Integers(x)
    shift = int(matrix.shift)
    whole = np.rint(x.clamp(-(2.0**31) + 128, 2.0**31 - 128).double().numpy() / 2**shift)
    right = rng.integers(-32767, 32768, (300, 3))
    left = rng.integers(-32767, 32768, (700, 3))
    found = matrix.times(torch.from_numpy(right).double()).numpy()
    assert (exact(found.astype(np.int64)) == exact(whole.astype(np.int64)) @ exact(right)).all()
    found = matrix.transposed_times(torch.from_numpy(left).double()).numpy()
    assert (exact(found.astype(np.int64)) == exact(whole.astype(np.int64)).T @ exact(left)).all()


@pytest.mark.parametrize("side", [3, 4000, 1 << 18, lowrank.LONGEST])
def test_no_partial_sum_can_leave_the_integers_of_float64(side: int) -> None:
    matrix = lowrank._Integers(torch.full((1, 1), 2.0**31).expand(side, 1))
    largest = round(float(matrix._rows(slice(0, 1)).max()))
    assert largest * lowrank.FINE * side < 2**53
    assert largest > 2**13
    assert lowrank.FINE**2 * side <= 2**53


def test_decoding_agrees_with_python_integers() -> None:
    part = make(rank=3)
    x = torch.cat([gaussian(2880), gaussian(SIZE - 2880, seed=3)]) * 30_000
    payload, decoded = part.encode(x, key=9)
    found = part.unpack(payload, SIZE)
    at = start = column = 0
    other = found.others.to(torch.int64) - 127
    other = (other * scales.of(found.scales).repeat_interleave(256)[: len(other)]).tolist()
    for rows, columns, factored in ((48, 60, 1), (37, 1, 0), (10, 270, 1), (5, 6, 0), (300, 1, 0)):
        values = decoded.values[start : start + rows * columns]
        start += rows * columns
        if not factored:
            assert values.tolist() == other[: rows * columns]
            other = other[rows * columns :]
            continue
        both = exact(found.mantissas[at : at + 3 * (rows + columns)].reshape(-1, 3).numpy())
        f = [int(e) - 16 for e in found.exponents[column : column + 3]]
        high = max(f)
        total = sum(
            both[:rows, i : i + 1] * both[rows:, i : i + 1].T * 2 ** (high - f[i]) for i in range(3)
        )
        wanted = [round(int(v) / 2**high) for v in total.reshape(-1)]  # ties to even
        assert values.tolist() == wanted
        at, column = at + 3 * (rows + columns), column + 3


def test_threads_and_the_size_of_pieces_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    x = signal(600, 300, 3, 1.0).reshape(-1)
    part = make(((600, 300),), entropy="none")
    before, found = torch.get_num_threads(), set()
    try:
        for threads, piece in ((1, 1 << 16), (2, 1 << 16), (1, 50), (2, 777), (2, 1 << 30)):
            torch.set_num_threads(threads)
            monkeypatch.setattr(symbols, "PIECE", piece)
            payload, decoded = part.encode(x, key=4)
            again = part.decode(payload, len(x))
            assert torch.equal(again.values, decoded.values)
            found.add((payload, tuple(again.values[:1000].tolist())))
    finally:
        torch.set_num_threads(before)
    assert len(found) == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")
def test_cuda_gives_the_same_bytes_and_integers() -> None:
    x = torch.cat([signal(900, 400, 3, 1.0).reshape(-1), gaussian(500) * 1000])
    part = make(((900, 400), (500,)))
    payload, decoded = part.encode(x, key=4)
    assert part.encode(x.cuda(), key=4).payload == payload
    again = part.decode(payload, len(x), "cuda").values
    assert torch.equal(again.cpu(), decoded.values)


def test_columns_are_orthogonal_even_where_they_were_almost_one() -> None:
    base = (gaussian(500, 1) * 2**30).round().double()
    nearly = base + (gaussian(500, 4, seed=1) * 2**12).round().double()
    found = lowrank.orthogonal(torch.cat((base, nearly), 1), 32767)
    unit = found / found.norm(dim=0)
    assert float((unit.T @ unit - torch.eye(5)).abs().max()) < 2e-5
    assert found.abs().amax(0).tolist() == [32767.0] * 5


def test_matrices_of_less_rank_than_asked_are_sent_whole() -> None:
    x = torch.outer((gaussian(80) * 100).round(), (gaussian(90, seed=2) * 100).round())
    decoded = make(((80, 90),)).encode(x.reshape(-1)).decoded.values.reshape(80, 90)
    assert float((x - decoded).abs().max()) <= 2
    zeros = make(((80, 90),)).encode(torch.zeros(7200))
    assert not zeros.decoded.values.any()


def test_what_has_no_gain_is_sent_one_by_one() -> None:
    part = make(rank=4)
    assert [tile.rank for tile in part._tiles(SIZE)] == [4, 0, 4, 0, 0, 0]
    assert [tile.rank for tile in make(rank=1)._tiles(SIZE)] == [1, 0, 1, 1, 0, 0]
    vector = make(((5, 6),)).encode(torch.arange(30.0) * 100)
    assert vector.payload == make(None).encode(torch.arange(30.0) * 100).payload
    assert float((vector.decoded.values - torch.arange(30) * 100).abs().max()) <= 16


def test_the_key_changes_the_start_and_little_else() -> None:
    x = signal(100, 100, 4, 0.2).reshape(-1)
    part = make(((100, 100),), iterations=4)
    first, second = part.encode(x, key=1), part.encode(x, key=2)
    assert first.payload != second.payload
    assert left_over(first.decoded.values.float(), second.decoded.values) < 1e-4


def test_nothing_is_lost_for_ever() -> None:
    left = gaussian(SIZE).mul(1000).round()
    part, before = make(entropy="none"), float(left.norm())
    for turn in range(50):
        left = left - part.encode(left, key=turn).decoded.values
    assert float(left.norm()) < 0.01 * before


@pytest.mark.parametrize("scale", [0.2, 1.0, 1e4, 1e9, 1e30])
@pytest.mark.parametrize("bits", [8, 16])
def test_every_scale_is_within_its_bound_and_shrinks(scale: float, bits: int) -> None:
    x, part = gaussian(SIZE) * scale, make(bits=bits)
    payload, decoded = part.encode(x)
    assert len(payload) <= part.bound(SIZE)
    assert torch.equal(part.decode(payload, SIZE).values, decoded.values)
    assert int(decoded.values.to(torch.int64).abs().max()) < 2**31
    limited = x.clamp(-(2.0**31), 2.0**31).double()
    assert float((limited - decoded.values).norm()) <= float(limited.norm())


@cache
def sent(bits: int) -> tuple[Any, bytes]:
    part = make(((20, 24), (9,)), rank=2, bits=bits)
    return part, part.encode(gaussian(489) * 5000).payload


@settings(max_examples=200, deadline=None)
@given(flips=st.lists(st.integers(0, 2**20), min_size=1, max_size=3), bits=st.sampled_from([8, 16]))
def test_flipped_bits_are_refused_or_are_another_canonical_payload(
    flips: list[int], bits: int
) -> None:
    part, honest = sent(bits)
    payload = bytearray(honest)
    for flip in flips:
        payload[flip // 8 % len(payload)] ^= 1 << flip % 8
    try:
        read = part.unpack(bytes(payload), 489)
    except PayloadError:
        return
    assert part.pack(read, 489) == bytes(payload)
    assert int(part.decode(bytes(payload), 489).values.to(torch.int64).abs().max()) < 2**31


@settings(max_examples=200, deadline=None)
@given(data=st.binary(max_size=300))
def test_garbage_decodes_or_raises_payload_error(data: bytes) -> None:
    part = make(((20, 24), (9,)), rank=2, bits=8)
    try:
        assert part.decode(data, 489).size == 489
    except PayloadError:
        return


def small() -> tuple[Any, lowrank.Factors]:
    part = make(((20, 24), (9,)), rank=2, entropy="none")
    return part, part.unpack(part.encode(gaussian(489) * 5000).payload, 489)


def test_what_no_encoder_says_is_refused() -> None:
    part, found = small()

    def refused(match: str, **changes: Any) -> None:
        with pytest.raises(PayloadError, match=match):
            part.unpack(part.pack(found._replace(**changes), 489), 489)

    halved = found.mantissas.clone()
    halved[:40] //= 2
    refused("normal form", mantissas=halved)
    refused("normal form", mantissas=found.mantissas * 0 + 1)
    refused("outside its range", mantissas=torch.full_like(found.mantissas, -32768))
    dead = found.mantissas.reshape(-1, 2).clone()
    dead[:, 1] = 0
    refused("outside its range", mantissas=dead.reshape(-1))
    refused("outside its range", exponents=found.exponents + 100)
    refused("too far apart", exponents=torch.tensor([0, 30], dtype=torch.uint8))
    refused("outside int32", scales=found.scales * 0 + 231)
    refused("alphabet", others=found.others * 0 + 255)
    refused("scale zero", scales=found.scales * 0)
    assert part.unpack(part.pack(found, 489), 489).others.tolist() == found.others.tolist()


@pytest.mark.parametrize(
    ("options", "hint"),
    [({"rank": 65}, "use 1 to 64"), ({"bits": 4}, "use 8 or 16"), ({"iterations": 0}, "1 to 16")],
)
def test_settings_are_checked(options: dict[str, Any], hint: str) -> None:
    with pytest.raises(ValueError, match=hint):
        make(**options)
