"""The fingerprint of directions, and of what goes along them."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import seeds

from shoal.compression.codec import Combination
from shoal.training import fingerprint
from shoal.training.fingerprint import Fingerprint


def combination(keys: list[int], coefficients: list[int], size: int) -> Combination:
    bits = torch.from_numpy(np.array(keys, np.uint64).view(np.int64))
    return Combination(size, bits, torch.tensor(coefficients, dtype=torch.int64))


@settings(max_examples=100, deadline=None)
@given(
    pairs=st.lists(
        st.tuples(st.integers(0, 2**64 - 1), st.integers(-(2**20), 2**20)),
        max_size=9,
        unique_by=lambda pair: pair[0],
    ),
    size=st.integers(1, 300) | st.sampled_from([4095, 4096, 5000]),
    start=st.integers(0, 1000),
)
def test_a_combination_has_the_sum_of_its_directions_fingerprints(
    pairs: list[tuple[int, int]], size: int, start: int
) -> None:
    keys, coefficients = [k for k, _ in pairs], [a for _, a in pairs]
    summed = (0, 0)
    for a, lanes in zip(coefficients, fingerprint.of_signs(keys, size, start), strict=True):
        scaled = a * lanes[0] & fingerprint.MASK, a * lanes[1] & fingerprint.MASK
        summed = fingerprint.add(summed, scaled)
    written = combination(keys, coefficients, size).dense()
    assert summed == Fingerprint(start + size).of(written, start)


@pytest.mark.parametrize("threads", [1, 2])
def test_a_long_direction_has_the_fingerprint_of_its_signs(threads: int) -> None:
    size, keys = fingerprint.CHUNK + 12_345, [5, 2**64 - 1]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = fingerprint.of_signs(keys, size, 7)
    finally:
        torch.set_num_threads(before)
    for key, lanes in zip(keys, found, strict=True):
        z = torch.from_numpy(seeds.signs(key, size)).to(torch.int32)
        assert Fingerprint(size + 7).of(z, 7) == lanes
