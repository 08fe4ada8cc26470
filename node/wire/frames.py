"""Frames as bytes, and back: several gossip messages at once (proto/v1/gossip.proto)."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from shoal.gossip import messages as m
from shoal.gossip.limits import Limits
from shoal.gossip.names import NO_HASH, Hash, PeerId
from shoal.gossip.records import Record
from shoal.node.wire import fields
from shoal.node.wire.fields import WireError
from shoal.node.wire.records import RecordReader
from shoal.proto.v1 import gossip_pb2 as pb


@dataclass(frozen=True, slots=True)
class Frame:
    """What came at once; `sizes` are the messages' bytes."""

    messages: tuple[m.Message, ...]
    sizes: tuple[int, ...]
    version: int
    """Of the sender, on frames without a link."""


def kind_of(message: m.Message) -> str:
    """Return under which name a message's bytes are counted."""
    match message:
        case m.Push():
            return "records"
        case m.Ping() | m.Ack() | m.PingRequest() | m.Nack():
            return "probes"
        case m.Announce() | m.Graft() | m.Prune():
            return "announcements"
        case m.AskAdmission() | m.Vouch():
            return "admission"
    return "digests"


class FrameReader:
    """Parse and check the frames of Link and Deliver."""

    def __init__(self, records: RecordReader, limits: Limits) -> None:
        self.records = records
        self.limits = limits

    def read(self, data: bytes) -> Frame:
        """Return what a frame of Link or Deliver says (the first one of a link: `decode_hello`)."""
        if len(data) > self.limits.message_bytes:
            raise WireError("oversize", f"frame of {len(data)} bytes")
        parsed = pb.DeliverRequest()
        fields.parse(parsed, data)
        if len(parsed.messages) > self.limits.frame_messages:
            raise WireError("oversize", f"{len(parsed.messages)} messages in one frame")
        messages = tuple(self._message(each) for each in parsed.messages)
        sizes = tuple(each.ByteSize() for each in parsed.messages)
        return Frame(messages, sizes, parsed.version)

    def _message(self, message: pb.Message) -> m.Message:
        match message.WhichOneof("message"):
            case "push":
                return m.Push(tuple(self.records.read(raw) for raw in message.push.records))
            case "announce":
                return m.Announce(fields.hashes(message.announce.ids))
            case "graft":
                return m.Graft(fields.hashes(message.graft.ids))
            case "prune":
                return m.Prune()
            case "digest":
                return _digest(message.digest)
            case "ask_digest":
                return m.AskDigest()
            case "want":
                return _want(message.want)
            case "ask_hashes":
                asked = message.ask_hashes
                return m.AskHashes(fields.author(asked.author), tuple(asked.counts))
            case "hashes":
                return _running_hashes(message.hashes)
            case "view_digest":
                return _view_digest(message.view_digest)
            case "view_ids":
                return _view_ids(message.view_ids)
            case "ask_admission":
                return m.AskAdmission(
                    tuple(PeerId(p) for p in fields.hashes(message.ask_admission.peers))
                )
            case "vouch":
                return self._vouch(message.vouch)
            case "ping":
                ping = message.ping
                suspected = ping.suspected if ping.HasField("suspected") else None
                return m.Ping(ping.nonce, suspected)
            case "ack":
                return m.Ack(message.ack.nonce)
            case "ping_request":
                request = message.ping_request
                return m.PingRequest(request.nonce, fields.peer(request.target))
            case "nack":
                return m.Nack(message.nack.nonce)
        raise WireError("malformed", "a message of no known kind")

    def _vouch(self, vouch: pb.Vouch) -> m.Vouch:
        peer = fields.peer(vouch.peer)
        self.records.admit(peer, vouch.admission)
        return m.Vouch(peer, vouch.admission)


# ---------------------------------------------------------------- messages to bytes


def encode(message: m.Message) -> bytes:
    """Return a frame of one message. Frames are joined by concatenating them."""
    return pb.DeliverRequest(messages=[_to_message(message)]).SerializeToString()


def split(message: m.Message, most: int) -> Iterator[m.Message]:
    """Yield `message`, a Push in parts when it would not fit into a frame of `most` bytes."""
    if not isinstance(message, m.Push):
        yield message
        return
    most -= 64  # the frame around the records
    part: list[Record] = []
    size = 0
    for record in message.records:
        if part and size + len(record.raw) + 16 > most:
            yield m.Push(tuple(part))
            part, size = [], 0
        part.append(record)
        size += len(record.raw) + 16
    yield m.Push(tuple(part))


def stamp() -> bytes:
    """Return the frame part that tells the protocol version where there is no Hello."""
    return pb.DeliverRequest(version=fields.VERSION).SerializeToString()


def _to_message(message: m.Message) -> pb.Message:
    match message:
        case m.Push(records):
            return pb.Message(push=pb.Push(records=[record.raw for record in records]))
        case m.Announce(ids):
            return pb.Message(announce=pb.Announce(ids=b"".join(ids)))
        case m.Graft(ids):
            return pb.Message(graft=pb.Graft(ids=b"".join(ids)))
        case m.Prune():
            return pb.Message(prune=pb.Prune())
        case m.Digest():
            return pb.Message(digest=_to_digest(message))
        case m.AskDigest():
            return pb.Message(ask_digest=pb.AskDigest())
        case m.Want(author, first, last):
            return pb.Message(
                want=pb.Want(author=fields.author_bytes(author), first=first, last=last)
            )
        case m.AskHashes(author, counts):
            asked = pb.AskHashes(author=fields.author_bytes(author), counts=counts)
            return pb.Message(ask_hashes=asked)
        case m.Hashes(author, counts, hashes):
            told = pb.Hashes(
                author=fields.author_bytes(author), counts=counts, hashes=b"".join(hashes)
            )
            return pb.Message(hashes=told)
        case m.ViewDigest(buckets):
            return pb.Message(view_digest=_to_view_digest(buckets))
        case m.ViewIds(buckets, ids):
            return pb.Message(view_ids=pb.ViewIds(buckets=bytes(buckets), ids=b"".join(ids)))
        case m.AskAdmission(peers):
            return pb.Message(ask_admission=pb.AskAdmission(peers=b"".join(peers)))
        case m.Vouch(peer, admission):
            return pb.Message(vouch=pb.Vouch(peer=peer, admission=admission))
        case m.Ping(nonce, suspected):
            return pb.Message(ping=pb.Ping(nonce=nonce, suspected=suspected))
        case m.Ack(nonce):
            return pb.Message(ack=pb.Ack(nonce=nonce))
        case m.PingRequest(nonce, target):
            return pb.Message(ping_request=pb.PingRequest(nonce=nonce, target=target))
        case m.Nack(nonce):
            return pb.Message(nack=pb.Nack(nonce=nonce))


def _to_digest(message: m.Digest) -> pb.Digest:
    closed = [entry.closed for entry in message.entries]
    summed = [entry.summed for entry in message.entries]
    return pb.Digest(
        authors=b"".join(fields.author_bytes(entry.author) for entry in message.entries),
        counts=[entry.count for entry in message.entries],
        hashes=b"".join(entry.hash for entry in message.entries),
        closed=closed if any(closed) else [],
        summed=summed if any(summed) else [],
        full=message.full,
        frontier_hash=message.frontier_hash,
        view_hash=message.view_hash,
        reply=message.reply,
    )


def _to_view_digest(buckets: Sequence[int]) -> pb.ViewDigest:
    held = [bucket for bucket, value in enumerate(buckets) if value]
    hashes = [buckets[bucket] for bucket in held]
    return pb.ViewDigest(size=len(buckets), buckets=bytes(held), hashes=hashes)


# ---------------------------------------------------------------- bytes to messages


def _digest(told: pb.Digest) -> m.Digest:
    authors, hashes = fields.authors(told.authors), fields.hashes(told.hashes)
    closed = list(told.closed) or [0] * len(authors)
    summed = list(told.summed) or [0] * len(authors)
    fields.same_length(authors, told.counts, hashes, closed, summed)
    if len(set(authors)) != len(authors):
        raise WireError("malformed", "an author twice in one digest")
    entries = tuple(map(m.Entry, authors, told.counts, hashes, closed, summed))
    if any(entry.summed > entry.count for entry in entries):
        raise WireError("malformed", "a sum of more updates than are held")
    if any(entry.count == 0 and entry.hash != NO_HASH for entry in entries):
        raise WireError("malformed", "a running hash of nothing")
    frontier_hash = Hash(fields.sized(told.frontier_hash, 32))
    return m.Digest(entries, told.full, frontier_hash, told.view_hash, told.reply)


def _want(want: pb.Want) -> m.Want:
    if not 1 <= want.first <= want.last:
        raise WireError("malformed", f"updates {want.first} to {want.last}")
    return m.Want(fields.author(want.author), want.first, want.last)


def _running_hashes(told: pb.Hashes) -> m.Hashes:
    counts, hashes = tuple(told.counts), fields.hashes(told.hashes)
    fields.same_length(counts, hashes)
    return m.Hashes(fields.author(told.author), counts, hashes)


def _view_digest(told: pb.ViewDigest) -> m.ViewDigest:
    fields.same_length(told.buckets, told.hashes)
    fields.ascending(told.buckets, "buckets")
    if told.size > 256 or any(bucket >= told.size for bucket in told.buckets):
        raise WireError("malformed", "more buckets than there are bytes")
    if not all(told.hashes):
        raise WireError("malformed", "an empty bucket among the others")
    held = dict(zip(told.buckets, told.hashes, strict=True))
    return m.ViewDigest(tuple(held.get(bucket, 0) for bucket in range(told.size)))


def _view_ids(told: pb.ViewIds) -> m.ViewIds:
    fields.ascending(told.buckets, "buckets")
    return m.ViewIds(tuple(told.buckets), fields.hashes(told.ids))
