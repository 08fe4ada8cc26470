"""What is asked and answered beside gossip: Hello, payloads, the initial model, joining."""

from collections.abc import Sequence
from dataclasses import dataclass

from shoal.gossip.names import Hash, PeerId, RunId
from shoal.gossip.snapshot import Line, Snapshot
from shoal.node.wire import fields
from shoal.node.wire.fields import WireError
from shoal.proto.v1 import gossip_pb2 as pb

HELLO_BYTES = 8 << 10
"""Largest first frame of a link."""


@dataclass(frozen=True, slots=True)
class Hello:
    """What each end of a link says first."""

    versions: tuple[int, ...]
    run: RunId
    admission: bytes
    addresses: tuple[str, ...]
    """Multiaddrs without /p2p, where the sender can be dialled."""
    session: int
    """Random u64 of the process."""


def encode_hello(hello: Hello) -> bytes:
    """Return the frame that opens a link."""
    told = pb.Hello(
        versions=hello.versions,
        run=hello.run,
        admission=hello.admission,
        addresses=hello.addresses,
        session=hello.session,
    )
    return pb.LinkRequest(hello=told).SerializeToString()


def decode_hello(data: bytes) -> Hello:
    """Return what the first frame of a link says. Version, run and proof are not judged here."""
    if len(data) > HELLO_BYTES:
        raise WireError("oversize", f"a Hello of {len(data)} bytes")
    frame = pb.LinkRequest()
    fields.parse(frame, data)
    if not frame.HasField("hello"):
        raise WireError("malformed", "a link that does not begin with a Hello")
    hello = frame.hello
    run = RunId(fields.sized(hello.run, 32))
    addresses = fields.addresses(hello.addresses)
    return Hello(tuple(hello.versions), run, hello.admission, addresses, hello.session)


def encode_pull(payload: Hash, offset: int) -> bytes:
    """Return the request for a payload's bytes from `offset` on."""
    return pb.PullRequest(
        payload=payload, offset=offset, version=fields.VERSION
    ).SerializeToString()


def decode_pull(data: bytes) -> tuple[Hash, int, int]:
    """Return payload, offset and version of a pull."""
    request = pb.PullRequest()
    fields.parse(request, data)
    return Hash(fields.sized(request.payload, 32)), request.offset, request.version


def encode_initial(offset: int) -> bytes:
    """Return the request for the initial model's integers from `offset` on."""
    return pb.InitialRequest(offset=offset, version=fields.VERSION).SerializeToString()


def decode_initial(data: bytes) -> tuple[int, int]:
    """Return offset and version of a request for the initial model."""
    request = pb.InitialRequest()
    fields.parse(request, data)
    return request.offset, request.version


def encode_genesis_request() -> bytes:
    """Return a joiner's request for the genesis."""
    return pb.GenesisRequest(version=fields.VERSION).SerializeToString()


def decode_genesis_request(data: bytes) -> int:
    """Return the version of a joiner."""
    request = pb.GenesisRequest()
    fields.parse(request, data)
    return request.version


def encode_genesis_response(genesis: bytes) -> bytes:
    """Return the answer to a joiner."""
    return pb.GenesisResponse(genesis=genesis).SerializeToString()


def decode_genesis_response(data: bytes) -> bytes:
    """Return the genesis that a peer answered with."""
    response = pb.GenesisResponse()
    fields.parse(response, data)
    return response.genesis


def encode_snapshot_request() -> bytes:
    """Return a joiner's request for a snapshot."""
    return pb.SnapshotRequest(version=fields.VERSION).SerializeToString()


def decode_snapshot_request(data: bytes) -> int:
    """Return the version of a joiner."""
    request = pb.SnapshotRequest()
    fields.parse(request, data)
    return request.version


def encode_snapshot(lines: Sequence[Line], fingerprint: tuple[int, int], sums: bytes) -> bytes:
    """Return a snapshot as it travels; lines are sorted by author."""
    return pb.SnapshotResponse(
        authors=b"".join(fields.author_bytes(line.author) for line in lines),
        counts=[line.count for line in lines],
        hashes=b"".join(line.hash for line in lines),
        turns=[line.turn for line in lines],
        fingerprint_low=fingerprint[0],
        fingerprint_high=fingerprint[1],
        sums=sums,
    ).SerializeToString()


def decode_snapshot(data: bytes, donor: PeerId) -> tuple[Snapshot, bytes]:
    """Return a snapshot and its sums; one without lines says that the log is the better way."""
    told = pb.SnapshotResponse()
    fields.parse(told, data)
    authors, hashes = fields.authors(told.authors), fields.hashes(told.hashes)
    fields.same_length(authors, told.counts, hashes, told.turns)
    fields.ascending(authors, "authors")
    if not all(told.counts) or not all(told.turns):
        raise WireError("malformed", "no updates, or of no turn")
    lines = tuple(map(Line, authors, told.counts, hashes, told.turns))
    return Snapshot(donor, lines, (told.fingerprint_low, told.fingerprint_high)), told.sums
