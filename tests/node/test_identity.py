"""One key per peer: its file, and its name as libp2p spells it."""

import os
import stat
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given
from hypothesis import strategies as st

from shoal.node.errors import ConfigError
from shoal.node.identity import (
    Identity,
    base58,
    create,
    load,
    load_or_create,
    parse_peer,
    peer_text,
    unbase58,
    verify,
)


def test_the_identity_file_is_made_once_and_for_its_owner_only(tmp_path: Path) -> None:
    path = tmp_path / "identity.key"
    first = load_or_create(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert load_or_create(path).peer == first.peer
    create(path)
    assert load(path).peer == first.peer
    assert list(tmp_path.iterdir()) == [path]


def test_a_raw_key_is_read_too(tmp_path: Path) -> None:
    path, identity = tmp_path / "raw", Identity.generate()
    path.touch(0o600)
    encoding, form = serialization.Encoding.Raw, serialization.PrivateFormat.Raw
    path.write_bytes(identity.key.private_bytes(encoding, form, serialization.NoEncryption()))
    assert load(path).peer == identity.peer


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o666])
def test_a_key_that_others_can_read_is_refused_with_the_remedy(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "identity.key"
    create(path)
    path.chmod(mode)
    with pytest.raises(ConfigError, match="chmod 600") as caught:
        load_or_create(path)
    assert "\n" not in str(caught.value)


def other_key() -> bytes:
    return ec.generate_private_key(ec.SECP256R1()).private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


@pytest.mark.parametrize("data", [b"", b"hello", b"\0" * 33, other_key(), b"-----BEGIN"])
def test_a_file_that_is_no_ed25519_key_is_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "identity.key"
    path.touch(0o600)
    path.write_bytes(data)
    with pytest.raises(ConfigError, match="no Ed25519 key"):
        load(path)


def test_a_directory_is_no_identity_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="can't be read"):
        load_or_create(tmp_path)


def test_an_unwritable_place_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="can't be written"):
        load_or_create(tmp_path / "missing" / "identity.key")


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_an_unreadable_file_is_told(tmp_path: Path) -> None:
    path = tmp_path / "identity.key"
    create(path)
    path.chmod(0)
    with pytest.raises(ConfigError, match="can't be read"):
        load(path)


@given(st.binary(max_size=60))
def test_base58_keeps_every_byte(data: bytes) -> None:
    assert unbase58(base58(data)) == data


def test_base58_of_a_known_text() -> None:
    assert base58(b"Hello World!") == "2NEpo7TZRRrLZSi2U"
    assert base58(bytes.fromhex("0000287fb4cd")) == "11233QC4"


def test_a_peer_id_is_spelled_as_libp2p_spells_it() -> None:
    ed25519 = pytest.importorskip("libp2p.crypto.ed25519")
    ids = pytest.importorskip("libp2p.peer.id")
    for _ in range(20):
        peer = Identity.generate().peer
        theirs = ids.ID.from_pubkey(ed25519.Ed25519PublicKey.from_bytes(peer))
        assert peer_text(peer) == theirs.to_base58()


def test_a_peer_id_is_read_back() -> None:
    identity = Identity.generate()
    assert str(identity).startswith("12D3KooW")
    assert parse_peer(str(identity)) == identity.peer


@pytest.mark.parametrize(
    "text",
    ["", "12D3KooW", "QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N", "0OIl", "1" * 1000, "é"],
)
def test_other_texts_are_no_peer_ids(text: str) -> None:
    with pytest.raises(ValueError):
        parse_peer(text)


def test_a_signature_is_of_one_peer_and_one_text() -> None:
    one, two = Identity.generate(), Identity.generate()
    signature = one.sign(b"text")
    assert verify(one.peer, signature, b"text")
    assert not verify(two.peer, signature, b"text")
    assert not verify(one.peer, signature, b"texx")
    assert not verify(one.peer, signature[:-1], b"text")


def test_the_secret_key_is_not_in_the_repr() -> None:
    assert "key" not in repr(Identity.generate())
