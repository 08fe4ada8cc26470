"""When compiled loops serve, and ranges over threads."""

import sys
from collections.abc import Iterator

import pytest
import torch

from shoal.compression import parallel

MODULE = "shoal.compression.kernels"


@pytest.fixture(params=[1, 2, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("count", [0, 1, 2, 3, 7, 1000])
def test_ranges_cover_everything_once_and_in_order(threads: int, count: int) -> None:
    found = parallel.ranges(lambda start, end, step: list(range(start, end, step)), count, 1)
    assert [i for part in found for i in part] == list(range(count))
    assert len(found) == max(min(threads, count), 1)


def test_what_a_range_raises_is_raised(threads: int) -> None:
    def fail(start: int, end: int) -> None:
        raise ValueError(f"{start} to {end}")

    with pytest.raises(ValueError, match="0 to"):
        parallel.ranges(fail, 10)


def test_small_vectors_do_not_load_the_loops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, MODULE, raising=False)
    assert parallel.kernels(parallel.LARGE - 1, torch.zeros(1)) is None
    assert MODULE not in sys.modules


def test_without_numba_torch_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, MODULE, None)  # importing it fails, as without numba
    parallel._compiled.cache_clear()
    try:
        assert parallel.kernels(1 << 40, torch.zeros(1)) is None
    finally:
        parallel._compiled.cache_clear()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64, torch.float32])
@pytest.mark.parametrize("count", [0, 1, 3_000_000])
def test_empty_vectors_have_their_type_and_length(dtype: torch.dtype, count: int) -> None:
    vector = parallel.empty(count, dtype)
    assert vector.dtype == dtype
    assert vector.shape == (count,)
    vector.fill_(3)
    assert int(vector.sum()) == 3 * count


@pytest.mark.parametrize("count", [0, 1, 3_000_000])
def test_zeros_are_zeros_of_their_own(count: int) -> None:
    one, other = (parallel.zeros(count, torch.int32) for _ in range(2))
    assert (one.dtype, one.shape, int(one.sum())) == (torch.int32, (count,), 0)
    one.fill_(3)
    assert int(other.sum()) == 0
