"""FedZip: keep the largest of every tensor, let a few centroids stand for their values.

Malekijoo et al., "FedZip: A Compression Framework for Communication-Efficient Federated Learning"
(arXiv 2102.01593), sec. 4. Per tensor the max(1, ⌊size · density⌋) elements of largest |x| (the
smaller index among equals) are rounded to integers in units of q and clustered by Lloyd's
algorithm: centroids begin equally spaced from the least to the greatest, an element belongs to the
nearest (the lower of two as near, the first of equal ones), a centroid becomes the rounded mean of
its elements and stays where it is without any; until nothing moves, at most 50 times. All in
integers on sorted values, so that neither threads nor devices matter.

Payload: one byte for the encoding, the centroids of every tensor (int32, ascending), and then

    1  huffman    a symbol for each element of the vector, 0 if dropped, else 1 + its centroid;
                  several to a byte, squeezed
    2  positions  how many elements each centroid has in the vector (u32 each), then their indices,
                  centroid after centroid, in as many bits as size - 1 has (one at least)
    3  gaps       the same indices, that of centroid j plus j · size, as one increasing sequence of
                  Rice-coded gaps (`places.py`)

The first costs at least a bit per symbol, the last two nothing for what is dropped.
"""

from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from shoal.compression import bits, entropy, places, selection, shaped, symbols
from shoal.compression.codec import Decoded, Encoded, PayloadError, Shapes, codec, to_integers

HUFFMAN, POSITIONS, GAPS = 1, 2, 3
FORMS = {
    "auto": (HUFFMAN, POSITIONS, GAPS),
    "huffman": (HUFFMAN,),
    "positions": (POSITIONS,),
    "gaps": (GAPS,),
}
ROUNDS = 50
"""Most iterations of Lloyd's algorithm."""
_FAR = 2**40
"""Beyond every element."""


class Clusters(NamedTuple):
    """What a payload says."""

    form: int
    centroids: Tensor
    """int64: one ascending row per tensor."""
    places: Tensor
    """int64: index of every kept element in the vector, increasing."""
    labels: Tensor
    """uint8: which centroid of its tensor each stands for."""


@codec("kmeans")
@dataclass(frozen=True, slots=True)
class KMeans:
    """Send the largest few of every tensor as one of a few values that fit the tensor best."""

    sparsifies: ClassVar[bool] = True

    density: float = 0.05
    """Fraction of the elements of a tensor that are kept; at least one is."""
    centroids: int = 3
    """Values a tensor; more cost bits per kept element and fit better."""
    encoding: str = "auto"
    """'huffman', 'positions', 'gaps' (see above), or 'auto': the shortest, the first of equals."""
    entropy: str = "auto"
    """How the symbols of 'huffman' are squeezed; 'auto': plain bytes where those are shorter."""
    shapes: Shapes | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        """Refuse what has no layout."""
        if not 0 < self.density <= 1:
            raise ValueError(f"density = {self.density}; use one in (0, 1]")
        if not 2 <= self.centroids <= 255:  # the mean of both signs alone would say nothing
            raise ValueError(f"centroids = {self.centroids}; use 2 to 255")
        if self.encoding not in FORMS:
            raise ValueError(f"encoding = {self.encoding!r}; use one of {', '.join(FORMS)}")
        entropy.check(self.entropy)

    @property
    def inexact(self) -> str:
        """Why these settings may not be used in the ledger; empty: they may."""
        return entropy.library(self.entropy)

    def shaped(self, shapes: Shapes) -> "KMeans":
        """Return the codec for vectors of these tensors."""
        return shaped.with_shapes(self, shapes)

    def encode(self, x_D: Tensor, *, key: int = 0) -> Encoded:
        """Keep the largest of every tensor and cluster their values."""
        size, x_D, start = len(x_D), x_D.contiguous(), 0
        centroids, place, label = [], [], []
        for length, keep in self._tensors(size):
            x_T = x_D[start : start + length]
            place_K = selection.top(x_T, keep)
            value_K = to_integers(x_T[place_K])
            centroid_C, bound_C = lloyd(value_K, self.centroids)
            centroids.append(centroid_C)
            place.append(place_K + start)
            label.append(torch.searchsorted(bound_C, value_K).to(torch.uint8))
            start += length
        found = Clusters(0, torch.stack(centroids), torch.cat(place), torch.cat(label))
        payload, form = self._shortest(found, size)
        return Encoded(payload, self._decoded(found._replace(form=form), size))

    def decode(self, payload: bytes, size: int, device: torch.device | str = "cpu") -> Decoded:
        """Return the kept elements, each its centroid; the rest is not touched."""
        return self._decoded(self.unpack(payload, size, device), size)

    def bound(self, size: int) -> int:
        """Return the most bytes that a payload of `size` elements can have."""
        tensors, kept = len(self._tensors(size)), self._kept(size)
        most = {
            HUFFMAN: symbols.squeezed_bound(size, self.centroids + 1, self.entropy),
            POSITIONS: 4 * self.centroids + bits.packed_bytes(kept, _width(size)),
            GAPS: places.most_bytes(kept, kept, self.centroids * size),
        }
        return 1 + 4 * self.centroids * tensors + min(most[form] for form in FORMS[self.encoding])

    def pack(self, clusters: Clusters, size: int) -> bytes:
        """Return the payload of these clusters in the form that they name."""
        head = clusters.centroids.to(torch.int32).cpu().numpy().astype("<i4").tobytes()
        form, place_K = clusters.form, clusters.places
        label_K = clusters.labels.to(torch.int64)
        if form == HUFFMAN:
            symbol_D = torch.zeros(size, dtype=torch.uint8, device=place_K.device)
            symbol_D[place_K] = clusters.labels + 1
            body = symbols.squeezed(symbol_D, self.centroids + 1, self.entropy)
        else:
            order_K = torch.argsort(label_K, stable=True)
            if form == POSITIONS:
                counts = torch.bincount(label_K, minlength=self.centroids)
                body = [symbols.to_u32(counts), bits.pack(place_K[order_K], _width(size))]
            else:
                body = [places.write((label_K * size + place_K)[order_K], self.centroids * size)]
        return bits.join([bytes([form]), head, *body])

    def unpack(self, payload: bytes, size: int, device: torch.device | str = "cpu") -> Clusters:
        """Return the clusters; inverse of `pack`, refuses everything else."""
        reader = bits.Reader(payload, device)
        form = reader.number(1)
        if form not in FORMS[self.encoding]:
            raise PayloadError(f"form {form}, where encoding = {self.encoding!r}")
        tensors = self._tensors(size)
        centroid_TC = _from_i32(reader.take(4 * self.centroids * len(tensors)))
        centroid_TC = centroid_TC.reshape(-1, self.centroids)
        if form == HUFFMAN:
            symbol_D = symbols.expanded(reader, size, self.centroids + 1, self.entropy)
            place_K = symbol_D.nonzero().reshape(-1)
            label_K = symbol_D[place_K] - 1
        else:
            place_K, label_K = self._lists(reader, form, size)
        reader.end()
        found = Clusters(form, centroid_TC, place_K, label_K)
        self._check(found, tensors)
        # A library's lengths are not the same in every version; then its choices are taken as made.
        strict = self.encoding == "auto" and not self.inexact
        if strict and self._shortest(found, size)[0] != payload:
            raise PayloadError("another encoding is shorter")
        return found

    def _lists(self, reader: bits.Reader, form: int, size: int) -> tuple[Tensor, Tensor]:
        """Return places, increasing, and labels from a list of places per centroid."""
        kept = self._kept(size)
        if form == POSITIONS:
            counts = symbols.from_u32(reader.take(4 * self.centroids))
            if int(counts.sum()) != kept:
                raise PayloadError(f"{int(counts.sum())} elements are kept, expected {kept}")
            place_K = bits.unpack(
                reader.take(bits.packed_bytes(kept, _width(size))), kept, _width(size)
            )
            label_K = torch.repeat_interleave(counts)
            if bool(((label_K * size + place_K).diff() <= 0).any()):
                raise PayloadError("the indices of a centroid do not increase")
        else:
            both_K = places.read(reader, kept, self.centroids * size)
            label_K, place_K = both_K // size, both_K % size
        order_K = torch.argsort(place_K)
        return place_K[order_K], label_K[order_K].to(torch.uint8)

    def _check(self, clusters: Clusters, tensors: list[tuple[int, int]]) -> None:
        """Refuse wrong counts, indices twice or outside, and labels that no encoder chooses."""
        centroid_TC, place_K = clusters.centroids, clusters.places
        if bool((centroid_TC.diff(dim=1) < 0).any()):
            raise PayloadError("centroids are not in order")
        lengths, keeps = zip(*tensors, strict=True) if tensors else ((), ())
        end_T = torch.tensor(lengths, device=place_K.device).cumsum(0)
        kept_T = torch.tensor(keeps, device=place_K.device).cumsum(0)
        if len(place_K) != int(kept_T[-1]) or bool(
            (torch.searchsorted(place_K, end_T) != kept_T).any()
        ):
            raise PayloadError("a tensor keeps more or fewer elements than it should")
        if bool((place_K.diff() <= 0).any()):
            raise PayloadError("an element has two centroids")
        same_TC = torch.nn.functional.pad(centroid_TC.diff(dim=1) == 0, (1, 0))
        tensor_K = torch.repeat_interleave(kept_T.diff(prepend=kept_T.new_zeros(1)))
        if bool(same_TC[tensor_K, clusters.labels.to(torch.int64)].any()):
            raise PayloadError("an element has not the first of equal centroids")

    def _shortest(self, clusters: Clusters, size: int) -> tuple[bytes, int]:
        """Return the payload and the form that this codec's setting makes of these clusters."""
        forms = FORMS[self.encoding]
        made = [self.pack(clusters._replace(form=form), size) for form in forms]
        return min(zip(made, forms, strict=True), key=lambda pair: len(pair[0]))

    def _decoded(self, clusters: Clusters, size: int) -> Decoded:
        keeps = torch.tensor([keep for _, keep in self._tensors(size)])
        tensor_K = torch.repeat_interleave(keeps.to(clusters.places.device))
        value_K = clusters.centroids[tensor_K, clusters.labels.to(torch.int64)]
        return Decoded(size, value_K.to(torch.int32), clusters.places)

    def _tensors(self, size: int) -> list[tuple[int, int]]:
        """Return the length of every tensor and how many of its elements are kept."""
        lengths = (torch.Size(shape).numel() for shape in shaped.tensors(self.shapes, size))
        return [(length, max(1, int(length * self.density))) for length in lengths]

    def _kept(self, size: int) -> int:
        return sum(keep for _, keep in self._tensors(size))


def lloyd(value_K: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return `count` ascending centroids of int64 values, and up to where each but the last goes.

    The values are sorted once; then an iteration needs the sums between `count` places alone.
    """
    sorted_K = value_K.sort().values
    sum_K = torch.nn.functional.pad(sorted_K.cumsum(0), (1, 0))
    least, greatest = int(sorted_K[0]), int(sorted_K[-1])
    steps = max(count - 1, 1)
    spaced = [least + (greatest - least) * j // steps for j in range(count)]
    centroid_C = torch.tensor(spaced, device=value_K.device)
    for _ in range(ROUNDS):
        cut_C = torch.searchsorted(sorted_K, _bounds(centroid_C), right=True)
        cut_C = torch.nn.functional.pad(cut_C, (1, 0))
        cut_C = torch.cat((cut_C, cut_C.new_tensor([len(value_K)])))
        many_C, total_C = cut_C.diff(), sum_K[cut_C].diff()
        mean_C = (2 * total_C + many_C) // (2 * many_C).clamp(min=1)
        moved_C = torch.where(many_C > 0, mean_C, centroid_C).sort().values
        if torch.equal(moved_C, centroid_C):
            break
        centroid_C = moved_C
    return centroid_C, _bounds(centroid_C)


def _bounds(centroid_C: Tensor) -> Tensor:
    """Return the largest value that belongs to each centroid but the last.

    Of equal centroids the first has everything up to the middle between them and the next other.
    """
    middle_C = (centroid_C[:-1] + centroid_C[1:]) >> 1
    other_C = torch.where(centroid_C.diff() > 0, middle_C, _FAR)
    return other_C.flip(0).cummin(0).values.flip(0) if len(other_C) else other_C


def _width(size: int) -> int:
    return max(size - 1, 1).bit_length()


def _from_i32(data: Tensor) -> Tensor:
    values = symbols.from_u32(data)
    return values - ((values >> 31) << 32)
