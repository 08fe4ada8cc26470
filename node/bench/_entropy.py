"""The bits that what a payload says needs at least: the entropy of its streams, each by itself.

That is log2 C(n, k) for k places among n (per chunk, where a codec has chunks), and the empirical
order-0 entropy of all other symbols. A code that sees several symbols at once comes below it where
neighbours resemble each other, and so do gaps between places where those lie close together.
"""

import math
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from shoal.compression.codec import Codec

PLACES = ("place", "index", "rows")
"""What streams of increasing places are called where codecs unpack their payloads."""
SLAB = 1 << 22
"""Bytes at a time that are counted as integers, which take more room."""


def entropy(part: "Codec", payload: bytes, size: int) -> float:
    """Return the bits of all streams of a payload."""
    content = getattr(part, "unpack")(payload, size)  # noqa: B009  what contract tests use too
    chunk = getattr(part, "chunk", 0)
    return sum(
        places(stream, chunk, size) if name.startswith(PLACES) else order_0(stream)
        for name, stream in _streams("", content)
    )


def _streams(name: str, content: Any) -> "Iterator[tuple[str, Tensor]]":
    """Yield field and tensor of all that a payload says; single numbers cost next to nothing."""
    import torch

    if isinstance(content, torch.Tensor):
        yield name, content.reshape(-1)
    elif isinstance(content, list):
        yield name, torch.tensor(content)
    elif isinstance(content, tuple):
        fields = getattr(content, "_fields", [name] * len(content))
        for each, item in zip(fields, content, strict=True):
            yield from _streams(each, item)


def places(place_K: "Tensor", chunk: int, size: int) -> float:
    """Return log2 of the number of ways to place so many: in every chunk, or in the whole."""
    if not len(place_K):
        return 0.0
    last = int(place_K.max())
    if not chunk:
        # Of the vector's elements; or of other units, such as rows: then as many as are used.
        return _log2_choose(size if 2 * last > size else last + 1, len(place_K))
    counts = (place_K // chunk).bincount(minlength=-(-size // chunk)).tolist()
    lengths = [min(chunk, size - start) for start in range(0, size, chunk)]
    kinds = Counter(zip(lengths, counts, strict=True))
    return sum(times * _log2_choose(*kind) for kind, times in kinds.items())


def _log2_choose(n: int, k: int) -> float:
    return (math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)) / math.log(2)


def order_0(symbols: "Tensor") -> float:
    """Return the empirical entropy of all symbols together, in bits."""
    import torch

    if symbols.dtype == torch.uint8:
        slabs = (symbols[start : start + SLAB] for start in range(0, len(symbols), SLAB))
        counts = torch.stack([slab.int().bincount(minlength=256) for slab in slabs]).sum(0)
    else:
        counts = torch.unique(symbols, return_counts=True)[1]
    counts = counts[counts > 0].double()
    return float((counts * (counts.sum() / counts).log2()).sum())
