"""Records and frames as bytes, and back. The only place that parses what others sent: trusts none.

A record is 64 bytes of signature and a body (proto/v1/records.proto); a frame is several messages
(proto/v1/gossip.proto). Whatever is wrong with one of them ends in `WireError`, whose reason is one
of `REASONS`. The bounds on records below are part of the protocol, not of anybody's `Limits`: all
peers must decide alike what a record is.
"""

import re
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from google.protobuf.message import DecodeError

from shoal.gossip import messages as m
from shoal.gossip import records as r
from shoal.gossip.limits import Limits
from shoal.gossip.names import NO_HASH, Author, Hash, PeerId, RunId, digest
from shoal.gossip.snapshot import Line, Snapshot
from shoal.node.addresses import AddressError, parse_bare
from shoal.node.admission import PROOF_BYTES
from shoal.node.errors import PeerError
from shoal.node.identity import Identity, verify
from shoal.proto.v1 import gossip_pb2 as pb
from shoal.proto.v1 import records_pb2 as rpb

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

RECORD_BYTES = 256 << 10
"""Largest record: a progress record over some thousand authors."""
INLINE_BYTES = 1024
"""Largest payload inside a record."""
HELLO_BYTES = 8 << 10
"""Largest first frame of a link."""
ADDRESSES = 16
"""Most addresses in a contact record or a Hello."""
SIGNATURE_BYTES = 64
DOMAIN = b"shoal-record-1"
KIND = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")

_U64 = 1 << 64
_NOBODY = bytes(SIGNATURE_BYTES)
"""A proof is true by itself; this stands where its signature would be."""


class WireError(PeerError):
    """These bytes are not what they should be. `reason` is one of `REASONS`."""


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


class Sealer:
    """Make records of one peer in one run."""

    def __init__(self, identity: Identity, run: RunId) -> None:
        self.identity = identity
        self.run = run

    def seal(self, statement: r.Statement) -> r.Record:
        """Return the record of `statement`, signed unless it is a proof."""
        body = _body(statement)
        signed = DOMAIN + self.run + body
        if isinstance(statement, r.Proof):
            return r.Record(digest(signed), _NOBODY + body, statement)
        if _signer(statement) != self.identity.peer:
            raise ValueError(f"a {type(statement).__name__} of another peer can't be signed here")
        return r.Record(digest(signed), self.identity.sign(signed) + body, statement)


class Wire:
    """Parse and check what members of one run sent.

    `admitted` tells whether a proof admits a peer to the run. Records that were checked are
    remembered, within bounds, so that their duplicates cost nothing.
    """

    def __init__(
        self,
        run: RunId,
        admitted: Callable[[PeerId, bytes], bool],
        limits: Limits,
        *,
        cache_bytes: int = 4 << 20,
    ) -> None:
        self.run = run
        self.admitted = admitted
        self.limits = limits
        self._cache = _Cache(cache_bytes)

    @property
    def cached_bytes(self) -> int:
        """What the remembered records weigh."""
        return self._cache.size

    def record(self, raw: bytes) -> r.Record:
        """Return the record in `raw`, with everything checked that it says about itself."""
        known = self._cache.get(raw)
        if known is None:
            known = self._check(raw)
            self._cache.put(known)
        return known

    def own(self, raw: bytes) -> r.Record:
        """Return a record from this peer's own log: it was checked before it was stored."""
        return self._check(raw, trusted=True)

    def frame(self, data: bytes) -> Frame:
        """Return what a frame of Link or Deliver says (the first one of a link: `hello`)."""
        if len(data) > self.limits.message_bytes:
            raise WireError("oversize", f"frame of {len(data)} bytes")
        parsed = pb.DeliverRequest()
        _parse(parsed, data)
        if len(parsed.messages) > self.limits.frame_messages:
            raise WireError("oversize", f"{len(parsed.messages)} messages in one frame")
        messages = tuple(self._message(each) for each in parsed.messages)
        sizes = tuple(each.ByteSize() for each in parsed.messages)
        return Frame(messages, sizes, parsed.version)

    def _check(self, raw: bytes, *, trusted: bool = False) -> r.Record:
        if len(raw) > RECORD_BYTES:
            raise WireError("oversize", f"record of {len(raw)} bytes")
        if len(raw) <= SIGNATURE_BYTES:
            raise WireError("malformed", "record without a body")
        signature, body = raw[:SIGNATURE_BYTES], raw[SIGNATURE_BYTES:]
        parsed = rpb.Body()
        _parse(parsed, body)
        signed = DOMAIN + self.run + body
        if parsed.WhichOneof("statement") == "proof":
            statement: r.Statement = self._proof(parsed, signature, body)
        else:
            # The signature first: what is not signed is nobody's statement.
            author = PeerId(_sized(parsed.author, 32))
            if not trusted and not verify(author, signature, signed):
                raise WireError("signature", "not signed by its author for this run")
            statement = self._statement(author, parsed)
        return r.Record(digest(signed), raw, statement)

    def _statement(self, author: PeerId, body: rpb.Body) -> r.Statement:
        match body.WhichOneof("statement"):
            case "update":
                return _update(author, body.update)
            case "alive":
                return _alive(author, body.alive)
            case "suspect":
                suspect = body.suspect
                return r.Suspect(author, _peer(suspect.peer), _stamp(suspect.incarnation))
            case "leave":
                return r.Leave(author, _stamp(body.leave.incarnation))
            case "contact":
                return self._contact(author, body.contact)
            case "progress":
                return _progress(author, body.progress)
        raise WireError("malformed", "a record of no known kind")

    def _contact(self, author: PeerId, contact: rpb.Contact) -> r.Contact:
        addresses = _addresses(contact.addresses)
        self._admit(author, contact.admission)
        return r.Contact(author, _stamp(contact.sequence), addresses, contact.admission)

    def _proof(self, parsed: rpb.Body, signature: bytes, body: bytes) -> r.Proof:
        first, second = parsed.proof.first, parsed.proof.second
        if len(first) + len(second) > 2 * (INLINE_BYTES + 512):
            raise WireError("oversize", "a proof holds two updates")
        one, two = self.record(first), self.record(second)
        match one.statement, two.statement:
            case (r.Update() as a, r.Update() as b) if (a.author, a.number) == (b.author, b.number):
                proof = r.Proof(a.author, a.number, first, second)
            case _:
                raise WireError("malformed", "not two updates of one author under one number")
        # Nobody signs a proof, so it must have one form only.
        if one.id >= two.id or signature != _NOBODY or body != _body(proof):
            raise WireError("malformed", "not in its one form")
        return proof

    def _admit(self, peer: PeerId, admission: bytes) -> None:
        if len(admission) != PROOF_BYTES or not self.admitted(peer, admission):
            raise WireError("admission", "the proof of admission is wrong")

    def _message(self, message: pb.Message) -> m.Message:
        match message.WhichOneof("message"):
            case "push":
                return m.Push(tuple(self.record(raw) for raw in message.push.records))
            case "announce":
                return m.Announce(_hashes(message.announce.ids))
            case "graft":
                return m.Graft(_hashes(message.graft.ids))
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
                return m.AskHashes(_author(asked.author), tuple(asked.counts))
            case "hashes":
                return _running_hashes(message.hashes)
            case "view_digest":
                return _view_digest(message.view_digest)
            case "view_ids":
                return _view_ids(message.view_ids)
            case "ask_admission":
                return m.AskAdmission(
                    tuple(PeerId(p) for p in _hashes(message.ask_admission.peers))
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
                return m.PingRequest(request.nonce, _peer(request.target))
            case "nack":
                return m.Nack(message.nack.nonce)
        raise WireError("malformed", "a message of no known kind")

    def _vouch(self, vouch: pb.Vouch) -> m.Vouch:
        peer = _peer(vouch.peer)
        self._admit(peer, vouch.admission)
        return m.Vouch(peer, vouch.admission)


# ---------------------------------------------------------------- values to bytes


def encode(message: m.Message) -> bytes:
    """Return a frame of one message. Frames are joined by concatenating them."""
    return pb.DeliverRequest(messages=[_to_message(message)]).SerializeToString()


def split(message: m.Message, most: int) -> Iterator[m.Message]:
    """Yield `message`, a Push in parts when it would not fit into a frame of `most` bytes."""
    if not isinstance(message, m.Push):
        yield message
        return
    most -= 64  # the frame around the records
    part: list[r.Record] = []
    size = 0
    for record in message.records:
        if part and size + len(record.raw) + 16 > most:
            yield m.Push(tuple(part))
            part, size = [], 0
        part.append(record)
        size += len(record.raw) + 16
    yield m.Push(tuple(part))


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
    _parse(frame, data)
    if not frame.HasField("hello"):
        raise WireError("malformed", "a link that does not begin with a Hello")
    hello = frame.hello
    run = RunId(_sized(hello.run, 32))
    addresses = _addresses(hello.addresses)
    return Hello(tuple(hello.versions), run, hello.admission, addresses, hello.session)


def stamp() -> bytes:
    """Return the frame part that tells the protocol version where there is no Hello."""
    return pb.DeliverRequest(version=VERSION).SerializeToString()


def encode_pull(payload: Hash, offset: int) -> bytes:
    """Return the request for a payload's bytes from `offset` on."""
    return pb.PullRequest(payload=payload, offset=offset, version=VERSION).SerializeToString()


def decode_pull(data: bytes) -> tuple[Hash, int, int]:
    """Return payload, offset and version of a pull."""
    request = pb.PullRequest()
    _parse(request, data)
    return Hash(_sized(request.payload, 32)), request.offset, request.version


def encode_initial(offset: int) -> bytes:
    """Return the request for the initial model's integers from `offset` on."""
    return pb.InitialRequest(offset=offset, version=VERSION).SerializeToString()


def decode_initial(data: bytes) -> tuple[int, int]:
    """Return offset and version of a request for the initial model."""
    request = pb.InitialRequest()
    _parse(request, data)
    return request.offset, request.version


def encode_genesis_request() -> bytes:
    """Return a joiner's request for the genesis."""
    return pb.GenesisRequest(version=VERSION).SerializeToString()


def decode_genesis_request(data: bytes) -> int:
    """Return the version of a joiner."""
    request = pb.GenesisRequest()
    _parse(request, data)
    return request.version


def encode_genesis_response(genesis: bytes) -> bytes:
    """Return the answer to a joiner."""
    return pb.GenesisResponse(genesis=genesis).SerializeToString()


def decode_genesis_response(data: bytes) -> bytes:
    """Return the genesis that a peer answered with."""
    response = pb.GenesisResponse()
    _parse(response, data)
    return response.genesis


def encode_snapshot_request() -> bytes:
    """Return a joiner's request for a snapshot."""
    return pb.SnapshotRequest(version=VERSION).SerializeToString()


def decode_snapshot_request(data: bytes) -> int:
    """Return the version of a joiner."""
    request = pb.SnapshotRequest()
    _parse(request, data)
    return request.version


def encode_snapshot(lines: Sequence[Line], fingerprint: tuple[int, int], sums: bytes) -> bytes:
    """Return a snapshot as it travels; lines are sorted by author."""
    return pb.SnapshotResponse(
        authors=b"".join(_from_author(line.author) for line in lines),
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
    _parse(told, data)
    authors, hashes = _authors(told.authors), _hashes(told.hashes)
    _same_length(authors, told.counts, hashes, told.turns)
    _ascending(authors, "authors")
    if not all(told.counts) or not all(told.turns):
        raise WireError("malformed", "no updates, or of no turn")
    lines = tuple(map(Line, authors, told.counts, hashes, told.turns))
    return Snapshot(donor, lines, (told.fingerprint_low, told.fingerprint_high)), told.sums


def _signer(statement: r.Statement) -> PeerId:
    match statement:
        case r.Update(author=author) | r.Proof(author=author):
            return author.peer
        case r.Suspect(accuser=accuser):
            return accuser
        case _:
            return statement.peer


def _body(statement: r.Statement) -> bytes:
    match statement:
        case r.Update():
            body = rpb.Body(author=statement.author.peer, update=_to_update(statement))
        case r.Alive():
            body = rpb.Body(author=statement.peer, alive=_to_alive(statement))
        case r.Suspect(accuser, peer, incarnation):
            body = rpb.Body(author=accuser, suspect=rpb.Suspect(peer=peer, incarnation=incarnation))
        case r.Leave(peer, incarnation):
            body = rpb.Body(author=peer, leave=rpb.Leave(incarnation=incarnation))
        case r.Contact(peer, sequence, addresses, admission):
            contact = rpb.Contact(sequence=sequence, addresses=addresses, admission=admission)
            body = rpb.Body(author=peer, contact=contact)
        case r.Progress():
            body = rpb.Body(author=statement.peer, progress=_to_progress(statement))
        case r.Proof(_, _, first, second):
            body = rpb.Body(proof=rpb.Proof(first=first, second=second))
    return body.SerializeToString(deterministic=True)


def _to_update(update: r.Update) -> rpb.Update:
    told = rpb.Update(
        log=update.author.log, number=update.number, turn=update.turn, kind=update.kind
    )
    if update.inline is None:
        told.payload, told.size = update.payload, update.size
        return told
    if (digest(update.inline), len(update.inline)) != (update.payload, update.size):
        raise ValueError("the inline payload is not the one that the update names")
    told.inline = update.inline
    return told


def _to_alive(alive: r.Alive) -> rpb.Alive:
    return rpb.Alive(
        incarnation=alive.incarnation,
        boot=alive.boot,
        standing=rpb.Standing.ValueType(alive.standing.value),
        against=alive.against,
    )


def _to_progress(progress: r.Progress) -> rpb.Progress:
    report = progress.report
    return rpb.Progress(
        sequence=progress.sequence,
        authors=b"".join(_from_author(author) for author, _ in progress.frontier),
        counts=[count for _, count in progress.frontier],
        frontier_hash=progress.frontier_hash,
        fingerprint_low=progress.fingerprint[0],
        fingerprint_high=progress.fingerprint[1],
        report=rpb.Report(
            turn=report.turn,
            steps=report.steps,
            loss=report.loss,
            evaluation=report.evaluation,
            bytes_out=report.bytes_out,
            bytes_in=report.bytes_in,
        ),
    )


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
            return pb.Message(want=pb.Want(author=_from_author(author), first=first, last=last))
        case m.AskHashes(author, counts):
            asked = pb.AskHashes(author=_from_author(author), counts=counts)
            return pb.Message(ask_hashes=asked)
        case m.Hashes(author, counts, hashes):
            told = pb.Hashes(author=_from_author(author), counts=counts, hashes=b"".join(hashes))
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
        authors=b"".join(_from_author(entry.author) for entry in message.entries),
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


def _from_author(author: Author) -> bytes:
    return author.peer + author.log.to_bytes(8, "big")


# ---------------------------------------------------------------- bytes to values


def _parse(
    into: rpb.Body
    | pb.LinkRequest
    | pb.DeliverRequest
    | pb.PullRequest
    | pb.InitialRequest
    | pb.SnapshotRequest
    | pb.SnapshotResponse
    | pb.GenesisRequest
    | pb.GenesisResponse,
    data: bytes,
) -> None:
    try:
        into.ParseFromString(data)
    except DecodeError:
        raise WireError(
            "malformed", f"{len(data)} bytes that are no {type(into).__name__}"
        ) from None


def _sized(data: bytes, size: int) -> bytes:
    if len(data) != size:
        raise WireError("malformed", f"{len(data)} bytes where {size} belong")
    return data


def _stamp(number: int) -> int:
    """Check an incarnation or sequence number: its owner must be able to count on."""
    if number > r.HIGHEST:
        raise WireError("malformed", "a number that nobody can outbid")
    return number


def _peer(data: bytes) -> PeerId:
    return PeerId(_sized(data, 32))


def _author(data: bytes) -> Author:
    _sized(data, 40)
    return Author(PeerId(data[:32]), int.from_bytes(data[32:], "big"))


def _pieces(data: bytes, size: int) -> Iterator[bytes]:
    if len(data) % size:
        raise WireError("malformed", f"{len(data)} bytes are no list of {size}-byte names")
    return (data[i : i + size] for i in range(0, len(data), size))


def _hashes(data: bytes) -> tuple[Hash, ...]:
    return tuple(Hash(piece) for piece in _pieces(data, 32))


def _authors(data: bytes) -> list[Author]:
    return [_author(piece) for piece in _pieces(data, 40)]


def _same_length(*columns: Sequence[object]) -> None:
    if len({len(column) for column in columns}) > 1:
        raise WireError("malformed", "columns of different lengths")


def _ascending(values: Sequence[object], what: str) -> None:
    if any(a >= b for a, b in pairwise(values)):  # type: ignore[operator]
        raise WireError("malformed", f"{what} out of order")


def _update(peer: PeerId, update: rpb.Update) -> r.Update:
    author = Author(peer, update.log)
    if not update.number or not KIND.fullmatch(update.kind):
        raise WireError("malformed", "an update without a number or with an odd kind")
    head = (author, update.number, update.turn, update.kind)
    if not update.HasField("inline"):
        return r.Update(*head, Hash(_sized(update.payload, 32)), update.size)
    if len(update.inline) > INLINE_BYTES or update.payload or update.size:
        raise WireError("malformed", "an inline payload that is too long or named besides")
    return r.Update(*head, digest(update.inline), len(update.inline), update.inline)


def _alive(peer: PeerId, alive: rpb.Alive) -> r.Alive:
    try:
        standing = r.Standing(alive.standing)
    except ValueError:
        raise WireError("malformed", "an unknown standing") from None
    return r.Alive(peer, _stamp(alive.incarnation), alive.boot, standing, alive.against)


def _addresses(texts: Iterable[str]) -> tuple[str, ...]:
    addresses = tuple(texts)
    if len(addresses) > ADDRESSES:
        raise WireError("malformed", f"{len(addresses)} addresses")
    try:
        for text in addresses:
            parse_bare(text)
    except AddressError as error:
        raise WireError("malformed", str(error)) from None
    return addresses


def _progress(peer: PeerId, progress: rpb.Progress) -> r.Progress:
    authors = _authors(progress.authors)
    _same_length(authors, progress.counts)
    _ascending(authors, "authors")
    told = progress.report
    return r.Progress(
        peer=peer,
        sequence=_stamp(progress.sequence),
        frontier=tuple(zip(authors, progress.counts, strict=True)),
        frontier_hash=Hash(_sized(progress.frontier_hash, 32)),
        fingerprint=(progress.fingerprint_low, progress.fingerprint_high),
        report=r.Report(
            turn=told.turn,
            steps=told.steps,
            loss=told.loss,
            evaluation=told.evaluation,
            bytes_out=told.bytes_out,
            bytes_in=told.bytes_in,
        ),
    )


def _digest(told: pb.Digest) -> m.Digest:
    authors, hashes = _authors(told.authors), _hashes(told.hashes)
    closed = list(told.closed) or [0] * len(authors)
    summed = list(told.summed) or [0] * len(authors)
    _same_length(authors, told.counts, hashes, closed, summed)
    if len(set(authors)) != len(authors):
        raise WireError("malformed", "an author twice in one digest")
    entries = tuple(map(m.Entry, authors, told.counts, hashes, closed, summed))
    if any(entry.summed > entry.count for entry in entries):
        raise WireError("malformed", "a sum of more updates than are held")
    if any(entry.count == 0 and entry.hash != NO_HASH for entry in entries):
        raise WireError("malformed", "a running hash of nothing")
    frontier_hash = Hash(_sized(told.frontier_hash, 32))
    return m.Digest(entries, told.full, frontier_hash, told.view_hash, told.reply)


def _want(want: pb.Want) -> m.Want:
    if not 1 <= want.first <= want.last:
        raise WireError("malformed", f"updates {want.first} to {want.last}")
    return m.Want(_author(want.author), want.first, want.last)


def _running_hashes(told: pb.Hashes) -> m.Hashes:
    counts, hashes = tuple(told.counts), _hashes(told.hashes)
    _same_length(counts, hashes)
    return m.Hashes(_author(told.author), counts, hashes)


def _view_digest(told: pb.ViewDigest) -> m.ViewDigest:
    _same_length(told.buckets, told.hashes)
    _ascending(told.buckets, "buckets")
    if told.size > 256 or any(bucket >= told.size for bucket in told.buckets):
        raise WireError("malformed", "more buckets than there are bytes")
    if not all(told.hashes):
        raise WireError("malformed", "an empty bucket among the others")
    held = dict(zip(told.buckets, told.hashes, strict=True))
    return m.ViewDigest(tuple(held.get(bucket, 0) for bucket in range(told.size)))


def _view_ids(told: pb.ViewIds) -> m.ViewIds:
    _ascending(told.buckets, "buckets")
    return m.ViewIds(tuple(told.buckets), _hashes(told.ids))


class _Cache:
    """Records that were checked, by their bytes; the ones used least recently are forgotten."""

    def __init__(self, most: int) -> None:
        self._most = most
        self.size = 0
        self._records: OrderedDict[bytes, r.Record] = OrderedDict()

    def get(self, raw: bytes) -> r.Record | None:
        record = self._records.get(raw)
        if record is not None:
            self._records.move_to_end(raw)
        return record

    def put(self, record: r.Record) -> None:
        if record.raw not in self._records:
            self._records[record.raw] = record
            self.size += _weight(record)
        while self.size > self._most:
            _, old = self._records.popitem(last=False)
            self.size -= _weight(old)


def _weight(record: r.Record) -> int:
    # The parsed statement weighs about as much again, and some objects; measured for progress.
    logs = len(record.statement.frontier) if isinstance(record.statement, r.Progress) else 0
    return 2 * len(record.raw) + 512 + 256 * logs
