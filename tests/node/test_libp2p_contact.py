"""What peers of one swarm prove and tell each other, and under which names they meet."""

import base64
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.finders import LIMITS, OTHER, SEED, identity

from shoal.node.transport.libp2p import ids
from shoal.node.transport.libp2p.contact import pack, unpack
from shoal.node.transport.libp2p.seed import mdns_type, proof, rendezvous_key


def test_an_answer_survives_packing() -> None:
    told = ("/ip4/203.0.113.5/tcp/7464", "/dns4/example.org/tcp/1")
    packed = pack(told, b"\0\xff", LIMITS)
    assert unpack(packed, LIMITS) == (told, b"\0\xff")
    assert len(packed) < LIMITS.contact_bytes


def test_a_contact_beyond_the_bound_is_our_bug() -> None:
    with pytest.raises(ValueError, match="exceeds"):
        pack((), bytes(LIMITS.contact_bytes + 1), LIMITS)


@given(
    st.one_of(
        st.binary(max_size=200),
        st.recursive(
            st.none() | st.integers() | st.text(max_size=5) | st.floats(),
            lambda inner: (
                st.lists(inner, max_size=4)
                | st.dictionaries(st.sampled_from(["addresses", "contact", "x"]), inner, max_size=3)
            ),
        ).map(lambda value: json.dumps(value).encode()),
    )
)
def test_bytes_of_others_make_an_answer_or_nothing(data: bytes) -> None:
    answer = unpack(data, LIMITS)
    assert answer is None or all(a.startswith("/") for a in answer[0])


@pytest.mark.parametrize(
    "answer",
    [
        {"addresses": [], "contact": ""},
        {"addresses": ["/x"] * 17, "contact": ""},
        {"addresses": ["/" + "x" * 256], "contact": ""},
        {"addresses": ["/a b"], "contact": ""},
        {"addresses": ["no slash"], "contact": ""},
        {"addresses": ["/x"], "contact": "not base64!"},
        {"addresses": ["/x"], "contact": base64.b64encode(bytes(16385)).decode()},
        {"addresses": [7], "contact": ""},
        {"addresses": ["/x"]},
    ],
)
def test_an_answer_out_of_bounds_is_none(answer: object) -> None:
    assert unpack(json.dumps(answer).encode(), LIMITS) is None


def test_deeply_nested_answers_are_none() -> None:
    assert unpack(b"[" * 30_000, LIMITS) is None


def test_a_proof_holds_for_one_swarm_one_teller_and_one_hearer() -> None:
    told = {proof(s, a, b) for s in (SEED, OTHER) for a in (b"a", b"ab") for b in (b"b", b"bb")}
    assert len(told) == 8
    assert proof(SEED, b"a", b"bc") != proof(SEED, b"ab", b"c")


def test_names_in_the_world_depend_on_the_seed_and_do_not_show_it() -> None:
    assert mdns_type(SEED) != mdns_type(OTHER)
    name = mdns_type(SEED).split(".")[0].removeprefix("_")
    assert len(name) <= 15  # RFC 6335
    assert rendezvous_key(SEED) != rendezvous_key(OTHER)
    assert rendezvous_key(SEED)[:2] == b"\x12\x20"  # a sha2-256 multihash: any DHT node takes it
    assert SEED not in rendezvous_key(SEED)


def test_names_of_other_keys_are_of_nobody_in_a_run() -> None:
    assert ids.to_peer(ids.to_bytes(identity(1))) == identity(1)
    assert ids.to_peer(identity(1)) is None
    assert ids.to_peer(b"\x12\x20" + bytes(32)) is None  # an RSA key's
