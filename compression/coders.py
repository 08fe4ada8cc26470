"""Entropy coders of libraries, for mixing and for comparison; never in the ledger.

Another version of a library may decode a stream differently or refuse it, and two peers of a ledger
would part there (design 3.3). The forms continue those of `entropy.py`:

    2  range code of constriction: the largest byte value that occurs, at least 1 (1 byte), counts
       of 0 … that value scaled so that the largest is 65535 (u16 each, none that occurs becomes 0),
       then the words of `stream.queue.RangeEncoder` (u32 each) under the categorical model with
       these counts as float32 weights; no bytes at all for no bytes
    3  one zstd frame, level 9, content size recorded, no checksum, no dictionary

The libraries are the extra `shoal[coders]` and are loaded when they are first used.
"""

import importlib
from types import ModuleType
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from shoal.compression.codec import PayloadError
from shoal.compression.settings import SettingError

RANGE, ZSTD = 2, 3
LEVEL = 9
WINDOW = 1 << 27
"""Largest memory of the past, in bytes, that a zstd frame may ask the decoder to keep."""
_TOP = 65535


def encode(form: int, data: bytes) -> bytes:
    """Return `data` in form 2 or 3; raise SettingError where its library is not installed."""
    if form == RANGE:
        return _range_encode(np.frombuffer(data, np.uint8))
    if form == ZSTD:
        return cast(bytes, _library("zstandard").ZstdCompressor(level=LEVEL).compress(data))
    raise ValueError(f"form {form} is not one of a library; use {RANGE} or {ZSTD}")


def decode(form: int, stream: bytes, count: int) -> bytes:
    """Return the `count` bytes that `stream` holds, all of it; raise PayloadError otherwise."""
    if form == RANGE:
        return _range_decode(stream, count)
    if form == ZSTD:
        return _zstd_decode(stream, count)
    raise PayloadError(f"form {form} of squeezed bytes is not one of a library")


def _library(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise SettingError(
            f"this entropy coder needs {name}; install shoal[coders], or use entropy = 'auto'"
        ) from error


def _model(weights_S: NDArray[np.uint16]) -> Any:
    models = _library("constriction").stream.model
    return models.Categorical(weights_S.astype(np.float32), perfect=False)


def _range_encode(data_N: NDArray[np.uint8]) -> bytes:
    if not len(data_N):
        return b""
    counts = np.bincount(data_N, minlength=2).astype(np.int64)
    scaled = np.where(counts > 0, np.maximum(counts * _TOP // counts.max(), 1), 0)
    weights_S = scaled.astype("<u2")
    encoder = _library("constriction").stream.queue.RangeEncoder()
    encoder.encode(data_N.astype(np.int32), _model(weights_S))
    words = encoder.get_compressed().astype("<u4")
    return bytes([len(weights_S) - 1]) + weights_S.tobytes() + cast(bytes, words.tobytes())


def _range_decode(stream: bytes, count: int) -> bytes:
    if not count:
        if stream:
            raise PayloadError("a range code of nothing has bytes")
        return b""
    start = 1 + 2 * (stream[0] + 1) if stream else 1
    if len(stream) < start or (len(stream) - start) % 4:
        raise PayloadError("range code is cut off")
    weights_S = np.frombuffer(stream, "<u2", offset=1, count=stream[0] + 1)
    if len(weights_S) < 2 or weights_S.max() != _TOP:
        raise PayloadError("range code has no such table of counts")
    words = np.frombuffer(stream, "<u4", offset=start).astype(np.uint32)
    decoder = _library("constriction").stream.queue.RangeDecoder(words)
    try:
        found = decoder.decode(_model(weights_S), count)
    except Exception as error:  # the library's own kinds: AssertionError, ValueError
        raise PayloadError(f"range code does not decode: {error}") from error
    data_N = np.asarray(found).astype(np.uint8)
    # The library does not say whether words are left over, nor where the stream should have ended.
    if _range_encode(data_N) != stream:
        raise PayloadError("range code is not that of what it decodes to")
    return data_N.tobytes()


def _zstd_decode(stream: bytes, count: int) -> bytes:
    zstd = _library("zstandard")
    try:
        frame = zstd.get_frame_parameters(stream)
        if frame.content_size != count:
            raise PayloadError(f"zstd frame of {frame.content_size} bytes, expected {count}")
        if frame.window_size > max(WINDOW, count) or frame.dict_id or frame.has_checksum:
            raise PayloadError("zstd frame with a dictionary, a checksum or too large a window")
        # In one piece: the library then writes to a buffer of `count` bytes and nowhere else.
        data = zstd.ZstdDecompressor().decompress(stream, count, allow_extra_data=False)
    except zstd.ZstdError as error:
        raise PayloadError(f"zstd frame does not decode: {error}") from error
    return cast(bytes, data)
