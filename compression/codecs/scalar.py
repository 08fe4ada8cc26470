"""Steps along directions that everyone regenerates: one byte each, and no seed is sent.

    contribution = Σ_s q_s · 2^exponent · z(key_s),   q_s from -127 to 127

(Malladi et al., "Fine-tuning language models with just forward passes", 2023, arXiv 2305.17333;
Zelikman et al., "Just one byte (per gradient)", 2023, arXiv 2306.10015). Keys follow from the run,
the author and the turn (`perturbation.key`), of sample s = 0, 1, …:

    own      key(run, author, turn, s): every peer looks somewhere else
    common   key(run, COMMON, turn, s): all peers look the same way, so that their steps compare
    pool     key(run, COMMON, 0, k_s), one of the run's K seeds (FedKSeed: Qin et al., "Federated
             full-parameter tuning … with communication cost under 18 kilobytes", 2024, arXiv
             2312.06353): whatever the length of the run, its model is K integers

Seeds of a pool are drawn in one of two ways. `uniform`: k_s = below(word s of SplitMix64 keyed by
key(run, author, turn, 0, domain = SAMPLING), K), so that everyone knows them. `pro`: by weights
that the author has (FedKSeed-Pro, sec. 3.4: seeds that moved the loss more are likelier), so that
it must name them. A seed drawn twice counts twice.

Payload: with `pro`, k_s in ⌈log2 K⌉ bits each, LSB-first, padded with zeros to a byte; then q_s as
int8 each, in the order drawn. There may be fewer steps than `perturbations`, but not none. How many
there are follows from the length.
"""

from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from shoal.compression import bits, perturbation, seeded, splitmix
from shoal.compression.codec import (
    INT32_MAX,
    Combination,
    Encoded,
    Origin,
    PayloadError,
    codec,
)

TOP = 127
MOST = 1 << 16
"""Most perturbations, and most seeds of a pool."""


class Said(NamedTuple):
    """What a payload says."""

    directions: Tensor
    """int64[S]: samples of the turn, or seeds of the pool, in the order drawn."""
    mantissas: Tensor
    """int64[S]: q."""


@codec("scalar")
@dataclass(frozen=True, slots=True)
class Scalar:
    """Send how far to go along directions that all know: a byte each, whatever the model's size."""

    directed: ClassVar[bool] = True

    directions: str = "own"
    """'own': every peer's are its own; 'common': all peers' are the same; 'pool': of K seeds."""
    perturbations: int = 16
    """The most directions that an update goes along: one byte each, and a pass over the model."""
    pool: int = 4096
    """K, where directions come from a pool."""
    sampling: str = "uniform"
    """How seeds are drawn from the pool: 'uniform', or 'pro': likelier the more they moved the
    loss, and ⌈log2 K⌉ bits more for each."""
    exponent: int = 0
    """A step of one is 2^exponent quanta."""
    origin: Origin = field(default=Origin(), init=False, repr=False)

    def __post_init__(self) -> None:
        """Refuse what has no layout, or could leave int32."""
        if self.directions not in ("own", "common", "pool"):
            raise ValueError(f"directions = {self.directions!r}; use 'own', 'common' or 'pool'")
        for name in ("perturbations", "pool"):
            if not 1 <= getattr(self, name) <= MOST:
                raise ValueError(f"{name} = {getattr(self, name)}; use 1 to {MOST}")
        if self.sampling not in ("uniform", "pro"):
            raise ValueError(f"sampling = {self.sampling!r}; use 'uniform' or 'pro'")
        if self.sampling == "pro" and self.directions != "pool":
            raise ValueError("sampling = 'pro' draws from a pool; set directions = 'pool'")
        if not 0 <= self.exponent <= 31 or self._largest * self.perturbations > INT32_MAX:
            raise ValueError(
                f"exponent = {self.exponent}: {self.perturbations} steps of up to {TOP} times 2 to "
                "that power are to stay below 2^31, and it is not to be negative; lower one of them"
            )

    @property
    def inexact(self) -> str:
        """Return that nothing speaks against the ledger."""
        return ""

    def at(self, origin: Origin) -> "Scalar":
        """Return the codec for payloads of this origin."""
        return seeded.with_origin(self, origin)

    def draw(self, count: int, weights: Tensor | None = None, *, key: int = 0) -> Tensor:
        """Return int64[count] directions; `weights` and `key` count with sampling 'pro' alone.

        Raise ValueError for a count that no payload has, or weights that say no chances.
        """
        if not 1 <= count <= self.perturbations:
            raise ValueError(f"{count} directions where a payload has 1 to {self.perturbations}")
        if self.directions != "pool":
            return torch.arange(count, dtype=torch.int64)
        if self.sampling == "uniform":
            origin = self.origin
            sampling = perturbation.key(
                origin.run, origin.author, origin.turn, 0, domain=perturbation.SAMPLING
            )
            return splitmix.below(splitmix.words(sampling, count), self.pool)
        words = splitmix.words(_keys(key)[0], count)
        if weights is None:
            return splitmix.below(words, self.pool)
        return _weighted(words, weights, self.pool)

    def key(self, direction: int) -> int:
        """Return the key of a direction, or raise ValueError if there is no such direction."""
        most = self.pool if self.directions == "pool" else self.perturbations
        if not 0 <= direction < most:
            raise ValueError(f"direction {direction} is none of {most}")
        return int(self._keys(torch.tensor([direction]))[0]) & (2**64 - 1)

    def say(self, size: int, directions: Tensor, steps: Tensor, *, key: int) -> Encoded:
        """Return the payload of float64 `steps` in units of q along the first so many drawn.

        Chance comes from `key`; steps out of range are cut, and not finite ones count zero. Raise
        ValueError for directions that were not drawn.
        """
        if directions.shape != steps.shape or not 1 <= len(steps) <= self.perturbations:
            raise ValueError(
                f"{len(steps)} steps along {len(directions)} directions; a payload has 1 to "
                f"{self.perturbations}"
            )
        directions, steps = directions.cpu(), steps.detach().to("cpu", torch.float64)
        if self._named:
            known = int(directions.min()) >= 0 and int(directions.max()) < self.pool
        else:
            known = torch.equal(directions, self.draw(len(steps)))
        if not known:
            raise ValueError("these are not the directions of this update")
        ratio_S = steps.nan_to_num(0.0, 0.0, 0.0) * 2.0**-self.exponent
        said = Said(directions, _by_chance(ratio_S.clamp(-TOP, TOP), _keys(key)[1]))
        return Encoded(self.pack(said, size), self._combination(said, size))

    def encode(self, x_D: Tensor, *, key: int = 0) -> Encoded:
        """Say what of a vector lies along the directions drawn; a contraction on average.

        Of multiples of Σ ⟨x, z⟩ z over P directions that over d + P - 1 leaves the least expected
        square, 1 - P/(d + P - 1) of that of x. A seed drawn often shares its step among them.
        """
        directions = self.draw(self.perturbations, key=key)
        distinct, place = _distinct(directions)
        along = perturbation.along(x_D, self._keys(distinct)) / (len(x_D) + len(distinct) - 1)
        steps = (along / place.bincount())[place]
        return self.say(len(x_D), directions, steps, key=key)

    def decode(self, payload: bytes, size: int, device: torch.device | str = "cpu") -> Combination:
        """Return the directions and how far to go along each; nothing as large as the model."""
        return self._combination(self.unpack(payload, size), size)

    def bound(self, size: int) -> int:
        """Return the bytes of as many steps as there may be."""
        return self._bytes(self.perturbations)

    def pack(self, said: Said, size: int) -> bytes:
        """Return the payload of directions and steps."""
        named = bits.pack(said.directions, self._width) if self._named else b""
        return bits.join([named, said.mantissas.to(torch.int8).view(torch.uint8)])

    def unpack(self, payload: bytes, size: int, device: torch.device | str = "cpu") -> Said:
        """Return directions and steps; inverse of `pack`, refuses everything else."""
        # S steps take 8·S + width·S bits and up to 7 of padding, fewer than one more step.
        count = 8 * len(payload) // (8 + self._width)
        if not 1 <= count <= self.perturbations or self._bytes(count) != len(payload):
            raise PayloadError(f"{len(payload)} bytes are not 1 to {self.perturbations} steps")
        reader = bits.Reader(payload)
        if self._width:
            named = reader.take(bits.packed_bytes(count, self._width))
            directions = bits.unpack(named, count, self._width)
            if int(directions.max()) >= self.pool:
                raise PayloadError(f"seed {int(directions.max())} of a pool of {self.pool}")
        elif self._named:
            directions = torch.zeros(count, dtype=torch.int64)
        else:
            directions = self.draw(count)
        mantissas = reader.rest().view(torch.int8).to(torch.int64)
        if int(mantissas.min()) < -TOP:
            raise PayloadError("a step is -128")
        return Said(directions, mantissas)

    def _combination(self, said: Said, size: int) -> Combination:
        """Return the sum. Steps of zero stay in it: a peer that found no slope says so.

        A turn rule that compares peers must know that from a peer that said nothing.
        """
        coefficients = said.mantissas << self.exponent
        if self.directions != "pool":
            return Combination(size, self._keys(said.directions), coefficients)
        distinct, place = _distinct(said.directions)
        merged = torch.zeros_like(distinct).index_add_(0, place, coefficients)
        return Combination(size, self._keys(distinct), merged, directions=distinct)

    def _keys(self, directions: Tensor) -> Tensor:
        origin = self.origin
        if self.directions == "pool":
            return seeded.pool(origin.run, self.pool)[directions]
        author = origin.author if self.directions == "own" else perturbation.COMMON
        keys = (perturbation.key(origin.run, author, origin.turn, s) for s in directions.tolist())
        return torch.tensor([splitmix.signed(key) for key in keys], dtype=torch.int64)

    @property
    def _largest(self) -> int:
        return TOP << self.exponent

    @property
    def _named(self) -> bool:
        """Say whether payloads name their directions."""
        return self.sampling == "pro"

    @property
    def _width(self) -> int:
        """Return the bits of a name."""
        return (self.pool - 1).bit_length() if self._named else 0

    def _bytes(self, count: int) -> int:
        return bits.packed_bytes(count, self._width) + count


def _keys(key: int) -> tuple[int, int]:
    """Return what directions are drawn with, and what steps are rounded with."""
    drawing, rounding = splitmix.words(key, 2).tolist()
    return drawing, rounding


def _distinct(directions: Tensor) -> tuple[Tensor, Tensor]:
    """Return the distinct directions, increasing, and which of them each is."""
    distinct, place = np.unique(directions.numpy(), return_inverse=True)
    return torch.from_numpy(distinct), torch.from_numpy(place.reshape(-1))


def _by_chance(ratio_S: Tensor, key: int) -> Tensor:
    """Return integers (int64) next to each float64, whose mean over keys it is."""
    floor_S = ratio_S.floor()
    # 53 bits of each word: as fine as float64 is between 0 and 1.
    chance_S = splitmix.shift(splitmix.words(key, len(ratio_S)), 11).to(torch.float64)
    up_S = chance_S < (ratio_S - floor_S) * 2.0**53
    return floor_S.to(torch.int64) + up_S


def _weighted(words: Tensor, weights: Tensor, count: int) -> Tensor:
    """Return indices, each as likely as its weight: the inverse of the cumulated weights."""
    weight_K = weights.detach().to("cpu", torch.float64).numpy()
    if weight_K.shape != (count,) or not np.isfinite(weight_K).all() or weight_K.min() < 0:
        raise ValueError(f"weights are {count} finite numbers from 0 up, one for each seed")
    if not weight_K.max() > 0:
        raise ValueError("all weights are zero: no seed can be drawn")
    sums_K = np.cumsum(weight_K / weight_K.max())  # one after the other: no order to choose
    at_S = splitmix.shift(words, 11).numpy() * 2.0**-53 * sums_K[-1]  # below the last sum
    # A weight of zero has no room, not even at its beginning.
    return torch.from_numpy(np.searchsorted(sums_K, at_S, side="right")).to(torch.int64)
