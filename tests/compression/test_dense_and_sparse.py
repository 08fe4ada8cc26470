"""What the two codecs choose and cost."""

from typing import Any

import pytest
import torch

from shoal.compression import codec
from shoal.compression.codec import PayloadError


def gaussian(size: int, scale: float = 20_000.0) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(1)) * scale


def bits_per_element(name: str, options: dict[str, Any], x: torch.Tensor) -> float:
    return len(codec.make(name, options).encode(x).payload) * 8 / len(x)


@pytest.mark.parametrize(
    ("name", "options", "most"),
    [
        ("sparse", {}, 0.14),
        ("dense", {}, 1.6),
        ("dense", {"levels": 2}, 1.04),
        ("dense", {"bits": 4}, 3.4),
        ("dense", {"bits": 8}, 7.6),
    ],
)
def test_bits_on_a_million_gaussian_elements(
    name: str, options: dict[str, Any], most: float
) -> None:
    assert bits_per_element(name, options, gaussian(1 << 20)) <= most


def test_sparse_keeps_the_largest_of_each_chunk_and_smaller_indices_of_equals() -> None:
    x = torch.zeros(128)
    x[[3, 5, 70, 90]] = torch.tensor([4.0, -4.0, 4.0, -9.0])
    x[[10, 20, 30]] = 4.0
    part = codec.make("sparse", {"chunk": 64, "density": 1 / 16})
    decoded = part.encode(x * 1000).decoded
    assert decoded.indices is not None
    assert decoded.indices.tolist() == [3, 5, 10, 20, 64, 65, 70, 90]
    assert decoded.values.tolist() == [4000, -4000, 4000, 4000, 3248, 3248, 3248, -3248]


def test_sparse_sends_the_mean_magnitude_of_what_it_keeps() -> None:
    x = gaussian(4096)
    decoded = codec.make("sparse", {}).encode(x).decoded
    kept = x.abs().topk(64)
    assert decoded.indices is not None
    assert sorted(kept.indices.tolist()) == decoded.indices.tolist()
    assert torch.equal(x[decoded.indices].sign(), decoded.values.sign().float())
    magnitude = int(decoded.values.abs().unique().item())
    assert abs(magnitude - float(kept.values.mean())) / magnitude < 1 / 256


def test_more_bits_leave_less_behind() -> None:
    x = gaussian(40_960)
    for name, variants in {
        "sparse": [{"bits": b} for b in (1, 4, 6, 8)],
        "dense": [{"levels": 2}, {"levels": 3}, {"bits": 4}, {"bits": 8}],
    }.items():
        left = []
        for options in variants:
            decoded = codec.make(name, options).encode(x).decoded
            at = decoded.indices if decoded.indices is not None else slice(None)
            left.append(float((x[at] - decoded.values).norm()))
        assert left == sorted(left, reverse=True)


def test_three_levels_are_the_nearest_of_minus_s_zero_s() -> None:
    x = gaussian(256).round()
    decoded = codec.make("dense", {}).encode(x).decoded.values
    s = int(decoded.abs().max())
    assert abs(s - 1.5 * float(x.abs().mean())) / s < 1 / 16
    levels = torch.tensor([-s, 0, s])
    nearest = levels[(x[:, None] - levels).abs().argmin(1)]
    assert torch.equal(nearest.int(), decoded)


@pytest.mark.parametrize("width", [4, 8])
def test_mantissas_are_within_half_a_step(width: int) -> None:
    x = gaussian(2560).round()
    decoded = codec.make("dense", {"bits": width}).encode(x).decoded.values.float()
    for block, values in zip(x.reshape(-1, 256), decoded.reshape(-1, 256), strict=True):
        top = 2 ** (width - 1) - 1
        step = float(block.abs().max()) / top * 1.126 + 1  # the scale has three bits, rounded up
        assert float((block - values).abs().max()) <= step / 2


def test_values_outside_int32_are_refused() -> None:
    part: Any = codec.make("dense", {"bits": 8})
    content = part.unpack(part.encode(gaussian(256)).payload, 256)
    too_large = content._replace(scale_B=torch.tensor([1 << 30]))  # 127 of them pass int32
    with pytest.raises(PayloadError, match="outside int32"):
        part.decode(part.pack(too_large, 256), 256)
    whole: Any = codec.make("dense", {"bits": 8, "block": 0})
    too_large = content._replace(scale_B=torch.tensor([1 << 31]))
    with pytest.raises(PayloadError, match="outside int32"):
        whole.decode(whole.pack(too_large, 256), 256)


def test_a_sparse_index_that_leaves_its_chunk_is_refused() -> None:
    part: Any = codec.make("sparse", {"chunk": 64, "density": 1 / 16})
    kept = part.unpack(part.encode(gaussian(200)).payload, 200)
    index = kept.index_K.clone()
    index[3] = 64  # the last of the first chunk
    with pytest.raises(PayloadError):
        part.decode(part.pack(kept._replace(index_K=index), 200), 200)


def test_units_must_be_in_normal_form() -> None:
    part: Any = codec.make("sparse", {})
    kept = part.unpack(part.encode(gaussian(4096)).payload, 4096)
    low = kept._replace(mantissa_C=kept.mantissa_C >> 1, exponent_C=kept.exponent_C + 1)
    with pytest.raises(PayloadError, match="normal form"):
        part.decode(part.pack(low, 4096), 4096)
