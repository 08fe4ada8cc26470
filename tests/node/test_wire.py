"""Records and frames as bytes: what is told arrives unchanged, everything else is a WireError."""

from collections.abc import Callable
from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.gossip import messages as m
from shoal.gossip import records as r
from shoal.gossip.limits import Limits
from shoal.gossip.names import NO_HASH, Author, Hash, PeerId, RunId, digest
from shoal.gossip.snapshot import Line
from shoal.node.admission import Admission
from shoal.node.identity import Identity
from shoal.node.wire import fields, frames, records, requests
from shoal.node.wire.fields import REASONS, WireError
from shoal.node.wire.frames import FrameReader
from shoal.node.wire.records import RecordReader, Sealer
from shoal.node.wire.requests import Hello
from shoal.proto.v1 import gossip_pb2 as pb
from shoal.proto.v1 import records_pb2 as rpb

RUN, OTHER = RunId(b"r" * 32), RunId(b"o" * 32)
ME = Identity.generate()
ADMISSION = Admission(RUN)
PROOF = ADMISSION.prove(ME.peer)
SEALER = Sealer(ME, RUN)

u32, u64 = st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1)
stamps = st.integers(0, r.HIGHEST)
hashes = st.binary(min_size=32, max_size=32).map(Hash)
peers = st.binary(min_size=32, max_size=32).map(PeerId)
authors = st.builds(Author, peers, u64)
floats = st.floats(allow_nan=False)
kinds = st.from_regex(r"\A[a-z0-9][a-z0-9._-]{0,63}\Z")


def fresh() -> RecordReader:
    return RecordReader(RUN, ADMISSION.verify)


def reader(limits: Limits | None = None) -> FrameReader:
    return FrameReader(fresh(), limits or Limits())


def inline(log: int, number: int, turn: int, kind: str, data: bytes) -> r.Update:
    return r.Update(Author(ME.peer, log), number, turn, kind, digest(data), len(data), data)


def by_hash(log: int, number: int, turn: int, kind: str, payload: Hash, size: int) -> r.Update:
    return r.Update(Author(ME.peer, log), number, turn, kind, payload, size)


numbers = st.integers(1, 2**32 - 1)
updates = st.builds(by_hash, u64, numbers, u32, kinds, hashes, u64) | st.builds(
    inline, u64, numbers, u32, kinds, st.binary(max_size=1024)
)
reports = st.builds(r.Report, u64, u64, floats, floats, u64, u64)
progress = st.builds(
    r.Progress,
    st.just(ME.peer),
    stamps,
    st.dictionaries(authors, u32, max_size=5).map(lambda d: tuple(sorted(d.items()))),
    hashes,
    st.tuples(u64, u64),
    reports,
)
statements: st.SearchStrategy[r.Statement] = st.one_of(
    updates,
    st.builds(r.Alive, st.just(ME.peer), stamps, u64, st.sampled_from(r.Standing), u64),
    st.builds(r.Suspect, st.just(ME.peer), peers, stamps),
    st.builds(r.Leave, st.just(ME.peer), stamps),
    st.builds(
        r.Contact,
        st.just(ME.peer),
        stamps,
        st.lists(
            st.sampled_from(["/ip4/10.0.0.1/tcp/7464", "/ip6/2001:db8::1/tcp/1", "/dns/a.b/tcp/9"]),
            max_size=16,
        ).map(tuple),
        st.just(PROOF),
    ),
    progress,
)


def proof_of(first: r.Update, turn: int) -> r.Proof:
    one = SEALER.seal(first)
    other = r.Update(first.author, first.number, turn, first.kind, first.payload, 1 + first.size)
    if other.size >= 2**64:
        other = r.Update(first.author, first.number, turn, "x", digest(b"x"), 7)
    two = SEALER.seal(other)
    one, two = sorted((one, two), key=lambda record: record.id)
    return r.Proof(first.author, first.number, one.raw, two.raw)


proofs = st.builds(proof_of, updates, u32)


@given(statements | proofs)
def test_every_statement_arrives_unchanged(statement: r.Statement) -> None:
    record = SEALER.seal(statement)
    heard = fresh().read(record.raw)
    assert heard == record
    assert heard.statement == statement


def test_numbers_that_are_none_arrive_too() -> None:
    record = SEALER.seal(r.Progress(ME.peer, 1, (), NO_HASH, (0, 0), r.Report(loss=float("nan"))))
    heard = fresh().read(record.raw).statement
    assert isinstance(heard, r.Progress)
    assert heard.report.loss != heard.report.loss


def closed(entry: m.Entry) -> m.Entry:
    return m.Entry(entry.author, entry.count, entry.hash if entry.count else NO_HASH, entry.closed)


entries = st.lists(
    st.builds(m.Entry, authors, u32, hashes, u32).map(closed),
    max_size=5,
    unique_by=lambda e: e.author,
).map(tuple)
some_hashes = st.lists(hashes, max_size=5).map(tuple)
rows = st.lists(st.tuples(u32, hashes), max_size=5)
buckets = st.sets(st.integers(0, 255), max_size=9).map(lambda s: tuple(sorted(s)))
messages: st.SearchStrategy[m.Message] = st.one_of(
    st.lists(statements.map(SEALER.seal), max_size=3).map(lambda s: m.Push(tuple(s))),
    st.builds(m.Announce, some_hashes),
    st.builds(m.Graft, some_hashes),
    st.just(m.Prune()),
    st.builds(m.Digest, entries, st.booleans(), hashes, u64, st.booleans()),
    st.just(m.AskDigest()),
    st.tuples(authors, numbers, numbers).map(lambda t: m.Want(t[0], min(t[1:]), max(t[1:]))),
    st.builds(m.AskHashes, authors, st.lists(u32, max_size=5).map(tuple)),
    st.tuples(authors, rows).map(
        lambda t: m.Hashes(t[0], tuple(c for c, _ in t[1]), tuple(h for _, h in t[1]))
    ),
    st.lists(st.just(0) | u64, max_size=256).map(lambda b: m.ViewDigest(tuple(b))),
    st.builds(m.ViewIds, buckets, some_hashes),
    st.builds(m.AskAdmission, st.lists(peers, max_size=5).map(tuple)),
    st.just(m.Vouch(ME.peer, PROOF)),
    st.builds(m.Ping, u64, st.none() | u64),
    st.builds(m.Ack, u64),
    st.builds(m.PingRequest, u64, peers),
    st.builds(m.Nack, u64),
)


@given(st.lists(messages, max_size=4))
def test_every_message_arrives_unchanged_in_frames_of_any_length(told: list[m.Message]) -> None:
    frame = reader().read(b"".join(frames.encode(message) for message in told))
    assert list(frame.messages) == told
    assert len(frame.sizes) == len(told)


@given(st.lists(statements.map(SEALER.seal), max_size=6), st.integers(200, 3000))
def test_a_large_push_is_split_and_loses_nothing(records: list[r.Record], most: int) -> None:
    parts = list(frames.split(m.Push(tuple(records)), most))
    told = [record for part in parts if isinstance(part, m.Push) for record in part.records]
    assert told == records
    for part in parts:
        assert isinstance(part, m.Push)
        assert len(part.records) <= 1 or len(frames.encode(part)) <= most


RECORDS = {
    "update": SEALER.seal(by_hash(7, 1, 2, "dense", digest(b"p"), 15_000)),
    "inline": SEALER.seal(inline(7, 1, 2, "dense", b"abc")),
    "alive": SEALER.seal(r.Alive(ME.peer, 3, 4, r.Standing.TRAINING)),
    "suspect": SEALER.seal(r.Suspect(ME.peer, PeerId(b"p" * 32), 3)),
    "leave": SEALER.seal(r.Leave(ME.peer, 3)),
    "contact": SEALER.seal(r.Contact(ME.peer, 1, ("/ip4/10.0.0.1/tcp/7464",), PROOF)),
    "progress": SEALER.seal(
        r.Progress(ME.peer, 1, ((Author(ME.peer, 7), 3),), NO_HASH, (1, 2), r.Report(1, 2, 3.0))
    ),
    "proof": SEALER.seal(proof_of(by_hash(7, 1, 2, "dense", digest(b"p"), 15_000), 9)),
}


@pytest.mark.parametrize("name", RECORDS)
def test_every_change_of_one_byte_is_noticed(name: str) -> None:
    raw, parse = RECORDS[name].raw, fresh()
    assert parse.read(raw) == RECORDS[name]
    for place in range(len(raw)):
        for flip in (0x01, 0x80, 0xFF):
            changed = bytearray(raw)
            changed[place] ^= flip
            with pytest.raises(WireError) as caught:
                parse.read(bytes(changed))
            assert caught.value.reason in REASONS


@pytest.mark.parametrize("name", RECORDS)
def test_a_record_cut_off_or_drawn_out_is_noticed(name: str) -> None:
    raw, parse = RECORDS[name].raw, fresh()
    for changed in (*(raw[:end] for end in range(len(raw))), raw + b"\0", raw + raw):
        with pytest.raises(WireError):
            parse.read(changed)


@pytest.mark.parametrize("name", RECORDS)
def test_a_record_signed_for_another_run_is_nobodys(name: str) -> None:
    with pytest.raises(WireError) as caught:
        RecordReader(OTHER, ADMISSION.verify).read(RECORDS[name].raw)
    assert caught.value.reason == "signature"


def reason_of(decode: Callable[[bytes], object], data: bytes) -> str:
    try:
        decode(data)
    except WireError as error:
        return error.reason
    return "good"


@settings(max_examples=500)
@given(st.binary(max_size=300))
def test_random_bytes_raise_wire_errors_only(data: bytes) -> None:
    parse = fresh()
    decoders: list[Callable[[bytes], object]] = [
        parse.read,
        reader().read,
        requests.decode_hello,
        requests.decode_pull,
        requests.decode_initial,
        requests.decode_genesis_request,
        requests.decode_genesis_response,
        requests.decode_snapshot_request,
        lambda data: requests.decode_snapshot(data, ME.peer),
        lambda body: parse.read(bytes(64) + body),
    ]
    for decode in decoders:
        assert reason_of(decode, data) in REASONS | {"good"}


@settings(max_examples=500)
@given(st.lists(messages, min_size=1, max_size=3), st.data())
def test_damaged_frames_raise_wire_errors_only(told: list[m.Message], data: st.DataObject) -> None:
    frame = bytearray(b"".join(frames.encode(message) for message in told))
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(frame) - 1))
        frame[place] = data.draw(st.integers(0, 255))
    assert reason_of(reader().read, bytes(frame)) in REASONS | {"good"}


def signed(body: rpb.Body) -> bytes:
    """Sign a body that Sealer would never make."""
    data = body.SerializeToString()
    return ME.sign(records.DOMAIN + RUN + data) + data


def update(**fields: object) -> rpb.Update:
    good: dict[str, object] = {
        "log": 7,
        "number": 1,
        "kind": "dense",
        "payload": bytes(32),
        "size": 9,
    }
    return rpb.Update(**{**good, **fields})  # type: ignore[arg-type]


BODIES = {
    "nothing": rpb.Body(),
    "number zero": rpb.Body(update=update(number=0)),
    "no kind": rpb.Body(update=update(kind="")),
    "odd kind": rpb.Body(update=update(kind="a\nb")),
    "long kind": rpb.Body(update=update(kind="a" * 65)),
    "short hash": rpb.Body(update=update(payload=b"p")),
    "no hash": rpb.Body(update=update(payload=b"")),
    "two payloads": rpb.Body(update=update(inline=b"p")),
    "long inline": rpb.Body(update=update(payload=b"", size=0, inline=bytes(1025))),
    "no standing": rpb.Body(alive=rpb.Alive(incarnation=1)),
    "odd standing": rpb.Body(alive=rpb.Alive(standing=99)),  # type: ignore[arg-type]
    "suspect nobody": rpb.Body(suspect=rpb.Suspect(incarnation=1)),
    "no frontier hash": rpb.Body(progress=rpb.Progress(sequence=1)),
    "authors cut off": rpb.Body(progress=rpb.Progress(frontier_hash=bytes(32), authors=bytes(39))),
    "counts missing": rpb.Body(progress=rpb.Progress(frontier_hash=bytes(32), authors=bytes(40))),
    "authors twice": rpb.Body(
        progress=rpb.Progress(frontier_hash=bytes(32), authors=bytes(80), counts=[1, 1])
    ),
    "no address": rpb.Body(contact=rpb.Contact(addresses=["nowhere"], admission=PROOF)),
    "peer in address": rpb.Body(
        contact=rpb.Contact(addresses=[f"/ip4/10.0.0.1/tcp/7/p2p/{ME}"], admission=PROOF)
    ),
    "many addresses": rpb.Body(
        contact=rpb.Contact(addresses=["/ip4/10.0.0.1/tcp/7"] * 17, admission=PROOF)
    ),
    "long address": rpb.Body(
        contact=rpb.Contact(addresses=["/dns/" + "a" * 300 + "/tcp/7"], admission=PROOF)
    ),
}


@pytest.mark.parametrize("name", BODIES)
def test_a_signed_body_that_means_nothing_is_malformed(name: str) -> None:
    body = BODIES[name]
    body.author = ME.peer
    with pytest.raises(WireError) as caught:
        fresh().read(signed(body))
    assert caught.value.reason == "malformed"


@pytest.mark.parametrize("author", [b"", b"short", bytes(32), b"x" * 33])
def test_a_body_of_another_author_is_refused(author: bytes) -> None:
    with pytest.raises(WireError):
        fresh().read(signed(rpb.Body(author=author, leave=rpb.Leave(incarnation=1))))


@pytest.mark.parametrize("admission", [b"", bytes(64), PROOF[:-1], PROOF + b"x", bytes(1000)])
def test_a_wrong_proof_of_admission_is_refused(admission: bytes) -> None:
    contact = rpb.Contact(addresses=["/ip4/10.0.0.1/tcp/7"], admission=admission)
    with pytest.raises(WireError) as caught:
        fresh().read(signed(rpb.Body(author=ME.peer, contact=contact)))
    assert caught.value.reason == "admission"
    with pytest.raises(WireError) as caught:
        reader().read(frames.encode(m.Vouch(ME.peer, admission)))
    assert caught.value.reason == "admission"


def test_a_size_that_breaks_a_run_s_rules_is_still_a_record() -> None:
    """Rules decide what a genuine update counts, never whether it is one (design 3.3)."""
    record = SEALER.seal(by_hash(1, 1, 1, "no-such-kind", digest(b""), 2**64 - 1))
    assert fresh().read(record.raw) == record


def sealed(statement: r.Proof) -> bytes:
    return SEALER.seal(statement).raw


def false_proofs() -> dict[str, bytes]:
    one = SEALER.seal(by_hash(7, 1, 2, "dense", digest(b"p"), 15_000))
    two = SEALER.seal(by_hash(7, 1, 3, "dense", digest(b"p"), 15_000))
    one, two = sorted((one, two), key=lambda record: record.id)
    author = Author(ME.peer, 7)
    proof = partial(r.Proof, author, 1)
    later = SEALER.seal(by_hash(7, 2, 2, "dense", digest(b"p"), 15_000))
    log = SEALER.seal(by_hash(8, 1, 2, "dense", digest(b"p"), 15_000))
    alive = RECORDS["alive"]
    good = sealed(proof(one.raw, two.raw))
    body = rpb.Body.FromString(good[64:])
    body.author = ME.peer
    return {
        "one record twice": sealed(proof(one.raw, one.raw)),
        "larger id first": sealed(proof(two.raw, one.raw)),
        "two numbers": sealed(proof(*sorted((one.raw, later.raw)))),
        "two logs": sealed(proof(*sorted((one.raw, log.raw)))),
        "no updates": sealed(proof(alive.raw, alive.raw)),
        "no records": sealed(proof(b"x", b"y")),
        "a proof in a proof": sealed(proof(good, good)),
        "with a signature": ME.sign(records.DOMAIN + RUN + good[64:]) + good[64:],
        "with an author": bytes(64) + body.SerializeToString(),
        "with an unknown field": good + b"\xf8\x07\x01",
        "too long": sealed(proof(bytes(2000), bytes(2000))),
    }


@pytest.mark.parametrize("name", false_proofs())
def test_a_proof_that_proves_nothing_is_refused(name: str) -> None:
    with pytest.raises(WireError):
        fresh().read(false_proofs()[name])


def test_a_proof_of_updates_in_another_run_is_refused() -> None:
    elsewhere = Sealer(ME, OTHER)
    pair = [elsewhere.seal(by_hash(7, 1, turn, "dense", digest(b"p"), 9)) for turn in (1, 2)]
    pair.sort(key=lambda record: record.id)
    with pytest.raises(WireError):
        fresh().read(sealed(r.Proof(Author(ME.peer, 7), 1, pair[0].raw, pair[1].raw)))


def test_oversized_things_are_refused_before_they_are_parsed() -> None:
    limits = Limits(message_bytes=100)
    for parse in (
        lambda: reader(limits).read(bytes(101)),
        lambda: fresh().read(bytes(records.RECORD_BYTES + 1)),
        lambda: requests.decode_hello(bytes(requests.HELLO_BYTES + 1)),
    ):
        with pytest.raises(WireError) as caught:
            parse()
        assert caught.value.reason == "oversize"


def test_what_is_just_as_large_as_allowed_arrives() -> None:
    author = Author(ME.peer, 7)
    said: list[r.Statement] = [
        inline(7, 2**32 - 1, 2**32 - 1, "a" * 64, bytes(records.INLINE_BYTES)),
        r.Leave(ME.peer, r.HIGHEST),
        r.Contact(ME.peer, 1, ("/ip4/10.0.0.1/tcp/7",) * fields.ADDRESSES, PROOF),
    ]
    for statement in said:
        assert fresh().read(SEALER.seal(statement).raw).statement == statement
    told: list[m.Message] = [
        m.Want(author, 1, 1),
        m.ViewDigest((1,) * 256),
        m.Digest((m.Entry(author, 3, Hash(b"h" * 32), 0, 3),), False, NO_HASH, 0, False),
    ]
    frame = b"".join(map(frames.encode, told))
    limits = Limits(message_bytes=len(frame), frame_messages=len(told))
    assert list(reader(limits).read(frame).messages) == told


def test_lengths_are_refused_from_one_beyond_the_bound_on() -> None:
    frame = 2 * frames.encode(m.Ping(1))
    for limits in (Limits(message_bytes=len(frame) - 1), Limits(frame_messages=1)):
        with pytest.raises(WireError) as caught:
            reader(limits).read(frame)
        assert caught.value.reason == "oversize"
    with pytest.raises(WireError) as caught:
        fresh().read(bytes(records.RECORD_BYTES))
    assert caught.value.reason != "oversize", "it is no record for another reason"
    bare = len(requests.encode_hello(Hello((1,), RUN, bytes(200), (), 5))) - 200
    room = requests.HELLO_BYTES - bare
    for most, over in ((room, False), (room + 1, True)):
        # A length from 128 to 16383 takes two bytes, that of the frame around it as well.
        data = requests.encode_hello(Hello((1,), RUN, bytes(most), (), 5))
        assert (len(data) > requests.HELLO_BYTES) == over
        assert reason_of(requests.decode_hello, data) == ("oversize" if over else "good")


@pytest.mark.parametrize(("count", "turn"), [(0, 1), (1, 0)])
def test_a_snapshot_stands_for_updates_and_for_turns(count: int, turn: int) -> None:
    line = Line(Author(ME.peer, 7), count, Hash(b"h" * 32), turn)
    data = requests.encode_snapshot([line], (1, 2), b"")
    assert reason_of(lambda told: requests.decode_snapshot(told, ME.peer), data) == "malformed"


FRAMES = {
    "nothing": pb.Message(),
    "ids cut off": pb.Message(announce=pb.Announce(ids=bytes(33))),
    "want nothing": pb.Message(want=pb.Want(author=bytes(40), first=0, last=0)),
    "want from zero": pb.Message(want=pb.Want(author=bytes(40), first=0, last=1)),
    "want backwards": pb.Message(want=pb.Want(author=bytes(40), first=2, last=1)),
    "want of nobody": pb.Message(want=pb.Want(first=1, last=2)),
    "columns differ": pb.Message(hashes=pb.Hashes(author=bytes(40), counts=[1], hashes=bytes(64))),
    "author twice": pb.Message(
        digest=pb.Digest(
            authors=bytes(80), counts=[1, 1], hashes=bytes(64), frontier_hash=bytes(32)
        )
    ),
    "closed cut off": pb.Message(
        digest=pb.Digest(
            authors=bytes(40), counts=[1], hashes=bytes(32), closed=[1, 2], frontier_hash=bytes(32)
        )
    ),
    "hash of nothing": pb.Message(
        digest=pb.Digest(authors=bytes(40), counts=[0], hashes=b"h" * 32, frontier_hash=bytes(32))
    ),
    "sum of more": pb.Message(
        digest=pb.Digest(
            authors=bytes(40), counts=[1], hashes=bytes(32), summed=[2], frontier_hash=bytes(32)
        )
    ),
    "too many buckets": pb.Message(view_digest=pb.ViewDigest(size=2**32 - 1)),
    "a bucket too many": pb.Message(view_digest=pb.ViewDigest(size=257)),
    "bucket outside": pb.Message(view_digest=pb.ViewDigest(size=1, buckets=b"\1", hashes=[1])),
    "empty bucket": pb.Message(view_digest=pb.ViewDigest(size=1, buckets=b"\0", hashes=[0])),
    "buckets out of order": pb.Message(view_ids=pb.ViewIds(buckets=b"\2\1")),
    "ping nobody": pb.Message(ping_request=pb.PingRequest(nonce=1)),
    "bad record": pb.Message(push=pb.Push(records=[b"x" * 100])),
}


@pytest.mark.parametrize("name", FRAMES)
def test_one_bad_message_drops_its_frame(name: str) -> None:
    bad = pb.DeliverRequest(messages=[FRAMES[name]]).SerializeToString()
    good = frames.encode(m.Ping(1))
    for frame in (bad, good + bad, bad + good):
        with pytest.raises(WireError):
            reader().read(frame)


def test_a_duplicate_costs_no_signature_check() -> None:
    asked: list[PeerId] = []

    def admitted(peer: PeerId, proof: bytes) -> bool:
        asked.append(peer)
        return ADMISSION.verify(peer, proof)

    parse = RecordReader(RUN, admitted)
    first = parse.read(RECORDS["contact"].raw)
    assert parse.read(bytes(bytearray(RECORDS["contact"].raw))) is first
    assert asked == [ME.peer]


def test_the_memory_of_checked_records_is_bounded() -> None:
    parse = RecordReader(RUN, ADMISSION.verify, cache_bytes=20_000)
    for number in range(1, 200):
        parse.read(SEALER.seal(by_hash(1, number, 1, "dense", digest(b""), 1)).raw)
    assert parse.cached_bytes <= 20_000


def test_what_swarms_say_most_often_is_small() -> None:
    assert len(frames.encode(m.Ping(2**63))) <= 16
    assert len(frames.encode(m.Ack(2**63))) <= 16
    assert len(RECORDS["update"].raw) <= 160
    entry = m.Entry(Author(ME.peer, 2**63), 1000, NO_HASH)
    assert len(frames.encode(m.Digest((entry,), False, NO_HASH, 2**63, True))) <= 130
    view = [0] * 256
    view[3], view[77] = 2**63, 2**62
    assert len(frames.encode(m.ViewDigest(tuple(view)))) <= 32


def test_nobody_signs_for_another() -> None:
    with pytest.raises(ValueError):
        SEALER.seal(r.Leave(PeerId(b"p" * 32), 1))
    with pytest.raises(ValueError):
        SEALER.seal(r.Update(Author(ME.peer, 1), 1, 1, "dense", digest(b"a"), 1, b"b"))


@given(
    st.lists(u32, max_size=9).map(tuple),
    st.lists(st.just("/ip4/10.0.0.1/tcp/7464"), max_size=16).map(tuple),
    u64,
)
def test_hello_arrives_unchanged(
    versions: tuple[int, ...], addresses: tuple[str, ...], session: int
) -> None:
    hello = Hello(versions, RUN, PROOF, addresses, session)
    assert requests.decode_hello(requests.encode_hello(hello)) == hello


@given(hashes, u64)
def test_requests_arrive_unchanged(payload: Hash, offset: int) -> None:
    assert requests.decode_pull(requests.encode_pull(payload, offset)) == (
        payload,
        offset,
        fields.VERSION,
    )
    assert requests.decode_initial(requests.encode_initial(offset)) == (offset, fields.VERSION)
    assert requests.decode_genesis_request(requests.encode_genesis_request()) == fields.VERSION


def test_the_signed_bytes_are_those_of_the_design() -> None:
    """The format may not change within version 1: bytes that a record had when it was settled."""
    fixed = Identity.generate()
    record = Sealer(fixed, RUN).seal(r.Leave(fixed.peer, 5))
    body = b"\x0a\x20" + fixed.peer + b"\x2a\x02\x08\x05"
    assert record.raw[64:] == body
    assert record.id == digest(b"shoal-record-1" + RUN + body)


@pytest.mark.parametrize(
    "statement",
    [
        r.Alive(ME.peer, r.HIGHEST + 1, 1, r.Standing.TRAINING),
        r.Suspect(ME.peer, PeerId(bytes(32)), r.HIGHEST + 1),
        r.Leave(ME.peer, r.HIGHEST + 1),
        r.Contact(ME.peer, r.HIGHEST + 1, (), PROOF),
        r.Progress(ME.peer, r.HIGHEST + 1, (), NO_HASH, (0, 0), r.Report()),
    ],
)
def test_a_number_that_nobody_can_outbid_is_refused(statement: r.Statement) -> None:
    with pytest.raises(WireError, match="nobody can outbid"):
        fresh().read(SEALER.seal(statement).raw)
