"""Signed records as bytes, and back: 64 bytes of signature and a body (proto/v1/records.proto).

The bounds below are part of the protocol, not of anybody's `Limits`: all peers must decide alike
what a record is.
"""

import re
from collections import OrderedDict
from collections.abc import Callable

from shoal.gossip import records as r
from shoal.gossip.names import Author, Hash, PeerId, RunId, digest
from shoal.node.admission import PROOF_BYTES
from shoal.node.identity import Identity, verify
from shoal.node.wire import fields
from shoal.node.wire.fields import WireError
from shoal.proto.v1 import records_pb2 as rpb

RECORD_BYTES = 256 << 10
"""Largest record: a progress record over some thousand authors."""
INLINE_BYTES = 1024
"""Largest payload inside a record."""
SIGNATURE_BYTES = 64
DOMAIN = b"shoal-record-1"
KIND = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")

_NOBODY = bytes(SIGNATURE_BYTES)
"""A proof is true by itself; this stands where its signature would be."""


class Sealer:
    """Make records of one peer in one run."""

    def __init__(self, identity: Identity, run: RunId) -> None:
        self.identity = identity
        self.run = run

    def seal(self, statement: r.Statement) -> r.Record:
        """Return the record of `statement`, signed unless it is a proof."""
        body = encode_body(statement)
        signed = DOMAIN + self.run + body
        if isinstance(statement, r.Proof):
            return r.Record(digest(signed), _NOBODY + body, statement)
        if _signer(statement) != self.identity.peer:
            raise ValueError(f"a {type(statement).__name__} of another peer can't be signed here")
        return r.Record(digest(signed), self.identity.sign(signed) + body, statement)


class RecordReader:
    """Parse and check the records of one run.

    `admitted` tells whether a proof admits a peer to the run. Records that were checked are
    remembered, within bounds, so that their duplicates cost nothing.
    """

    def __init__(
        self,
        run: RunId,
        admitted: Callable[[PeerId, bytes], bool],
        *,
        cache_bytes: int = 4 << 20,
    ) -> None:
        self.run = run
        self.admitted = admitted
        self._cache = _Cache(cache_bytes)

    @property
    def cached_bytes(self) -> int:
        """What the remembered records weigh."""
        return self._cache.size

    def read(self, raw: bytes) -> r.Record:
        """Return the record in `raw`, with everything checked that it says about itself."""
        known = self._cache.get(raw)
        if known is None:
            known = self._check(raw)
            self._cache.put(known)
        return known

    def own(self, raw: bytes) -> r.Record:
        """Return a record from this peer's own log: it was checked before it was stored."""
        return self._check(raw, trusted=True)

    def _check(self, raw: bytes, *, trusted: bool = False) -> r.Record:
        if len(raw) > RECORD_BYTES:
            raise WireError("oversize", f"record of {len(raw)} bytes")
        if len(raw) <= SIGNATURE_BYTES:
            raise WireError("malformed", "record without a body")
        signature, body = raw[:SIGNATURE_BYTES], raw[SIGNATURE_BYTES:]
        parsed = rpb.Body()
        fields.parse(parsed, body)
        signed = DOMAIN + self.run + body
        if parsed.WhichOneof("statement") == "proof":
            statement: r.Statement = self._proof(parsed, signature, body)
        else:
            # The signature first: what is not signed is nobody's statement.
            author = PeerId(fields.sized(parsed.author, 32))
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
                return r.Suspect(author, fields.peer(suspect.peer), _stamp(suspect.incarnation))
            case "leave":
                return r.Leave(author, _stamp(body.leave.incarnation))
            case "contact":
                return self._contact(author, body.contact)
            case "progress":
                return _progress(author, body.progress)
        raise WireError("malformed", "a record of no known kind")

    def _contact(self, author: PeerId, contact: rpb.Contact) -> r.Contact:
        addresses = fields.addresses(contact.addresses)
        self.admit(author, contact.admission)
        return r.Contact(author, _stamp(contact.sequence), addresses, contact.admission)

    def _proof(self, parsed: rpb.Body, signature: bytes, body: bytes) -> r.Proof:
        first, second = parsed.proof.first, parsed.proof.second
        if len(first) + len(second) > 2 * (INLINE_BYTES + 512):
            raise WireError("oversize", "a proof holds two updates")
        one, two = self.read(first), self.read(second)
        match one.statement, two.statement:
            case (r.Update() as a, r.Update() as b) if (a.author, a.number) == (b.author, b.number):
                proof = r.Proof(a.author, a.number, first, second)
            case _:
                raise WireError("malformed", "not two updates of one author under one number")
        # Nobody signs a proof, so it must have one form only.
        if one.id >= two.id or signature != _NOBODY or body != encode_body(proof):
            raise WireError("malformed", "not in its one form")
        return proof

    def admit(self, peer: PeerId, admission: bytes) -> None:
        """Raise WireError unless this proof admits `peer`."""
        if len(admission) != PROOF_BYTES or not self.admitted(peer, admission):
            raise WireError("admission", "the proof of admission is wrong")


# ---------------------------------------------------------------- statements to bytes


def _signer(statement: r.Statement) -> PeerId:
    match statement:
        case r.Update(author=author) | r.Proof(author=author):
            return author.peer
        case r.Suspect(accuser=accuser):
            return accuser
        case _:
            return statement.peer


def encode_body(statement: r.Statement) -> bytes:
    """Return what is signed, after the domain and the run."""
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
        authors=b"".join(fields.author_bytes(author) for author, _ in progress.frontier),
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


# ---------------------------------------------------------------- bytes to statements


def _update(peer: PeerId, update: rpb.Update) -> r.Update:
    author = Author(peer, update.log)
    if not update.number or not KIND.fullmatch(update.kind):
        raise WireError("malformed", "an update without a number or with an odd kind")
    head = (author, update.number, update.turn, update.kind)
    if not update.HasField("inline"):
        return r.Update(*head, Hash(fields.sized(update.payload, 32)), update.size)
    if len(update.inline) > INLINE_BYTES or update.payload or update.size:
        raise WireError("malformed", "an inline payload that is too long or named besides")
    return r.Update(*head, digest(update.inline), len(update.inline), update.inline)


def _alive(peer: PeerId, alive: rpb.Alive) -> r.Alive:
    try:
        standing = r.Standing(alive.standing)
    except ValueError:
        raise WireError("malformed", "an unknown standing") from None
    return r.Alive(peer, _stamp(alive.incarnation), alive.boot, standing, alive.against)


def _progress(peer: PeerId, progress: rpb.Progress) -> r.Progress:
    authors = fields.authors(progress.authors)
    fields.same_length(authors, progress.counts)
    fields.ascending(authors, "authors")
    told = progress.report
    return r.Progress(
        peer=peer,
        sequence=_stamp(progress.sequence),
        frontier=tuple(zip(authors, progress.counts, strict=True)),
        frontier_hash=Hash(fields.sized(progress.frontier_hash, 32)),
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


def _stamp(number: int) -> int:
    """Check an incarnation or sequence number: its owner must be able to count on."""
    if number > r.HIGHEST:
        raise WireError("malformed", "a number that nobody can outbid")
    return number


# ---------------------------------------------------------------- what was checked


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
