"""Codecs on float64 vectors for tests of error control: exact, so that formulas hold exactly."""

import struct
from dataclasses import dataclass

import torch
from torch import Tensor

from shoal.compression import codec as codecs
from shoal.compression import splitmix
from shoal.compression.codec import Decoded, Encoded, PayloadError
from shoal.training.control import Control, Scaled, Seat, make


@dataclass(frozen=True)
class Top:
    """The k largest, as they are; k = 0: all of them. Ties go to the smaller index."""

    k: int = 1
    inexact: str = "floats"

    def encode(self, x_D: Tensor, *, key: int = 0) -> Encoded:
        k = self.k or len(x_D)
        index_K = torch.sort(-x_D.abs(), stable=True).indices[:k].sort().values
        values_K = x_D[index_K]
        payload = index_K.numpy().tobytes() + values_K.numpy().tobytes()
        return Encoded(payload, Decoded(len(x_D), values_K, index_K))

    def decode(self, payload: bytes, size: int, device: torch.device | str = "cpu") -> Decoded:
        k = self.k or size
        if len(payload) != 16 * k:
            raise PayloadError("wrong length")
        parts = bytearray(payload)
        index_K = torch.frombuffer(parts, dtype=torch.int64, count=k)
        if bool((index_K < 0).any()) or bool((index_K >= size).any()):
            raise PayloadError("index")
        return Decoded(size, torch.frombuffer(parts, dtype=torch.float64, offset=8 * k), index_K)

    def bound(self, size: int) -> int:
        return 16 * (self.k or size)


@dataclass(frozen=True)
class One:
    """One element drawn by the key, times size: unbiased."""

    unbiased: bool = True
    inexact: str = "floats"

    def encode(self, x_D: Tensor, *, key: int = 0) -> Encoded:
        index = int(splitmix.below(splitmix.words(key, 1), len(x_D)))
        payload = struct.pack("<qd", index, float(x_D[index]) * len(x_D))
        return Encoded(payload, self.decode(payload, len(x_D)))

    def decode(self, payload: bytes, size: int, device: torch.device | str = "cpu") -> Decoded:
        if len(payload) != 16:
            raise PayloadError("wrong length")
        index, value = struct.unpack("<qd", payload)
        if not 0 <= index < size:
            raise PayloadError("index")
        return Decoded(size, torch.tensor([value], dtype=torch.float64), torch.tensor([index]))

    def bound(self, size: int) -> int:
        return 16


@dataclass(frozen=True)
class Whole(Top):
    """Everything as it is: contractive and unbiased at once."""

    k: int = 0
    unbiased: bool = True


SETTINGS: dict[str, dict[str, object]] = {"ef14": {"step": 0.1}}


def exact(name: str, author: int = 0, *, size: int = 2, codec: object = None, **settings: object):  # type: ignore[no-untyped-def]
    """Return a control in float64."""
    law = One() if name == "scallion" or settings.get("memory") is False else Top()
    seat = Seat(name_of(author), codec or law, size, torch.float64)  # type: ignore[arg-type]
    return make(name, settings, seat)


def scaled(kind: str, settings: dict[str, object]) -> Scaled:
    """Return a codec of the package on float32 vectors."""
    return Scaled(codecs.make(kind, settings))


def name_of(author: int) -> bytes:
    """Return an author's name."""
    return b"author %02d" % author


def play_round(controls: list[Control], vectors: list[Tensor], x_D: Tensor, key: int) -> Tensor:
    """Publish, hand round, close; all must agree. Return the direction."""
    frames = []
    for i, (one, vector) in enumerate(zip(controls, vectors, strict=True)):
        frames.append((name_of(i), one.count + 1, one.publish(vector, key=key * 1000 + i)))
        one.commit(one.count + 1)
    directions = []
    for one in controls:
        for author, number, payload in frames:
            one.receive(author, number, payload)
        directions.append(one.close(x_D))
    assert all(torch.equal(directions[0], other) for other in directions)
    assert len({one.checksum() for one in controls}) == 1
    return directions[0]
