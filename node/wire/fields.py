"""What is common to all that is parsed: the version, names, columns and addresses; `WireError`.

Whatever is wrong with a record, frame or request ends in `WireError`, whose reason is one of
`REASONS`.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise

from google.protobuf.message import DecodeError, Message

from shoal.gossip.names import Author, Hash, PeerId
from shoal.node.addresses import AddressError, parse_bare
from shoal.node.errors import PeerError

VERSION = 1
"""The protocol version that this code speaks."""

REASONS = frozenset(
    {
        "oversize",  # longer than the protocol allows; found before parsing
        "malformed",  # no protobuf, not the one expected, or a field outside what it can mean
        "signature",  # not signed by its author for this run
        "admission",  # the proof of admission is wrong
    }
)

ADDRESSES = 16
"""Most addresses in a contact record or a Hello."""


class WireError(PeerError):
    """These bytes are not what they should be. `reason` is one of `REASONS`."""


def parse(into: Message, data: bytes) -> None:
    """Fill `into` from `data`; raise WireError when that is something else."""
    try:
        into.ParseFromString(data)
    except DecodeError:
        raise WireError(
            "malformed", f"{len(data)} bytes that are no {type(into).__name__}"
        ) from None


def sized(data: bytes, size: int) -> bytes:
    """Return `data`, which must have this size."""
    if len(data) != size:
        raise WireError("malformed", f"{len(data)} bytes where {size} belong")
    return data


def peer(data: bytes) -> PeerId:
    """Return the 32 bytes of a peer."""
    return PeerId(sized(data, 32))


def author(data: bytes) -> Author:
    """Return the author in 40 bytes: a peer, and a log as a big-endian u64."""
    sized(data, 40)
    return Author(PeerId(data[:32]), int.from_bytes(data[32:], "big"))


def author_bytes(named: Author) -> bytes:
    """Return an author's 40 bytes."""
    return named.peer + named.log.to_bytes(8, "big")


def hashes(data: bytes) -> tuple[Hash, ...]:
    """Return the hashes in a column, 32 bytes each."""
    return tuple(Hash(piece) for piece in _pieces(data, 32))


def authors(data: bytes) -> list[Author]:
    """Return the authors in a column, 40 bytes each."""
    return [author(piece) for piece in _pieces(data, 40)]


def _pieces(data: bytes, size: int) -> Iterator[bytes]:
    if len(data) % size:
        raise WireError("malformed", f"{len(data)} bytes are no list of {size}-byte names")
    return (data[i : i + size] for i in range(0, len(data), size))


def addresses(texts: Iterable[str]) -> tuple[str, ...]:
    """Return multiaddrs without /p2p, each of them checked."""
    told = tuple(texts)
    if len(told) > ADDRESSES:
        raise WireError("malformed", f"{len(told)} addresses")
    try:
        for text in told:
            parse_bare(text)
    except AddressError as error:
        raise WireError("malformed", str(error)) from None
    return told


def same_length(*columns: Sequence[object]) -> None:
    """Raise WireError unless all columns have as many rows."""
    if len({len(column) for column in columns}) > 1:
        raise WireError("malformed", "columns of different lengths")


def ascending(values: Sequence[object], what: str) -> None:
    """Raise WireError unless each value is above the one before."""
    if any(a >= b for a, b in pairwise(values)):  # type: ignore[operator]
        raise WireError("malformed", f"{what} out of order")
