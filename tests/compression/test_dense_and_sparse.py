"""What the two codecs choose and cost."""

from typing import Any

import pytest
import torch

from shoal.compression import codec, parallel
from shoal.compression.codec import Decoded, PayloadError


def gaussian(size: int, scale: float = 20_000.0) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(1)) * scale


def bits_per_element(name: str, options: dict[str, Any], x: torch.Tensor) -> float:
    return len(codec.make(name, options).encode(x).payload) * 8 / len(x)


@pytest.mark.parametrize(
    ("name", "options", "most"),
    [
        ("sparse", {}, 0.1365),
        ("dense", {}, 1.6),
        ("dense", {"levels": 2}, 1.04),
        ("dense", {"levels": 2, "block": 0}, 1.0001),
        ("dense", {"bits": 2}, 1.95),
        ("dense", {"bits": 4}, 3.3),
        ("dense", {"bits": 8}, 7.5),
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


X16 = [0.10, -0.90, 0.05, 0.40, -0.02, 0.70, -0.30, 0.01]
X16 += [0.00, -0.60, 0.20, -0.15, 0.08, 0.55, -0.45, 0.03]


def test_signs_of_a_known_vector() -> None:
    """One scale for all, its mean magnitude, and a bit each: 1 is plus, the first lowest."""
    x = torch.tensor(X16) * 100_000
    payload, decoded = codec.make("dense", {"levels": 2, "block": 0}).encode(x)
    mean = round(sum(map(abs, X16)) / 16 * 100_000)
    assert payload == mean.to_bytes(4, "little") + bytes([0, 0xAD, 0xB5])
    assert decoded.values.tolist() == [mean if v >= 0 else -mean for v in X16]


def test_four_levels_lie_at_one_and_three_units() -> None:
    x = gaussian(256)
    decoded = codec.make("dense", {"bits": 2}).encode(x).decoded.values
    unit = int(decoded.abs().min())
    assert abs(unit - 5 / 8 * float(x.abs().mean())) / unit < 1 / 16
    levels = torch.tensor([-3 * unit, -unit, unit, 3 * unit])
    assert torch.equal(levels[(x[:, None] - levels).abs().argmin(1)].int(), decoded)


def test_one_scale_for_all_reaches_the_largest() -> None:
    x = gaussian(5000)
    decoded = codec.make("dense", {"bits": 8, "block": 0}).encode(x).decoded.values
    assert float((x - decoded).abs().max()) <= float(x.abs().max()) / 127 / 2 + 1


@pytest.mark.parametrize("block", [8, 100, 2**20 + 8, -256])
def test_blocks_that_have_no_layout_are_refused(block: int) -> None:
    with pytest.raises(ValueError, match="use a multiple of 8"):
        codec.make("dense", {"block": block})


SETTINGS: list[tuple[str, dict[str, Any]]] = [
    ("dense", {}),
    ("dense", {"levels": 2, "block": 0}),
    ("dense", {"levels": 2, "block": 4096}),
    ("dense", {"bits": 2, "block": 24}),
    ("dense", {"bits": 2, "block": 0}),
    ("dense", {"bits": 4}),
    ("dense", {"bits": 8}),
    ("dense", {"bits": 8, "block": 0, "entropy": "none"}),
    ("sparse", {}),
    ("sparse", {"bits": 3, "density": 0.1}),
    ("sparse", {"bits": 2, "chunk": 1000, "entropy": "none"}),
    ("sparse", {"density": 0.5, "chunk": 64}),
]


def outcome(part: codec.Codec, payload: bytes, size: int) -> tuple[Any, ...]:
    try:
        decoded = part.decode(payload, size)
    except PayloadError:
        return ("refused",)
    places = None if decoded.indices is None else decoded.indices.tolist()
    return decoded.values.tolist(), places


@pytest.mark.parametrize(("name", "options"), SETTINGS, ids=str)
@pytest.mark.parametrize("size", [1, 20_003])
def test_compiled_loops_and_torch_agree(
    name: str, options: dict[str, Any], size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same bytes from awkward vectors, the same values, and the same garbage refused."""
    pytest.importorskip("numba")

    def compiled(yes: bool) -> None:
        for name in ("LARGE", "LOADED"):
            monkeypatch.setattr(parallel, name, 0 if yes else 1 << 60)

    part = codec.make(name, options)
    spike = torch.zeros(size)
    spike[size // 2] = -3e9
    ties = (gaussian(size) / 4000).round()
    vectors = [gaussian(size), gaussian(size, 1e30), gaussian(size, 0.4), ties, spike, -0.0 * ties]
    for x in vectors:
        compiled(False)
        payload, decoded = part.encode(x)
        compiled(True)
        again, same = part.encode(x)
        assert again == payload
        assert torch.equal(same.dense(), decoded.dense())
        assert outcome(part, payload, size) == (
            decoded.values.tolist(),
            None if decoded.indices is None else decoded.indices.tolist(),
        )
    payload = part.encode(vectors[0]).payload
    g = torch.Generator().manual_seed(size)
    for at in torch.randint(8 * len(payload), (12,), generator=g).tolist():
        wrong = bytearray(payload)
        wrong[at // 8] ^= 1 << at % 8
        compiled(True)
        found = outcome(part, bytes(wrong), size)
        compiled(False)
        assert outcome(part, bytes(wrong), size) == found
    for bad in (float("nan"), float("inf")):
        x = gaussian(size)
        x[-1] = bad
        compiled(True)
        with pytest.raises(ValueError, match="NaN or infinite"):
            part.encode(x)


@pytest.mark.parametrize("compiled", [False, True])
def test_the_residual_and_the_squares_are_exact_either_way(
    compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("LARGE", "LOADED"):
        monkeypatch.setattr(parallel, name, 0 if compiled else 1 << 60)
    values = torch.tensor([3, -5, 2**31 - 1, -(2**31), 0] * 500, dtype=torch.int32)
    x = torch.ones(2500)
    codec.subtract(x, Decoded(2500, values), 4.0)
    assert x[:5].tolist() == [0.25, 2.25, -(2.0**29), 2.0**29, 1.0]
    assert codec.sum_of_squares(values) == 500 * (9 + 25 + (2**31 - 1) ** 2 + 2**62)
    sparse = Decoded(2500, values[:2], torch.tensor([1, 2499]))
    x = torch.ones(2500)
    codec.subtract(x, sparse, 4.0)
    assert x[[0, 1, 2499]].tolist() == [1.0, 0.25, 2.25]
