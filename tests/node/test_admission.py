"""Who is admitted: the swarm's authority, secrets, and what certificates prove."""

import datetime
import os
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.gossip.names import RunId
from shoal.node.admission import (
    Admission,
    admit,
    create_secret,
    load_secret,
    new_secret,
    parse_secret,
    peer_of,
)
from shoal.node.errors import ConfigError, PeerError
from shoal.node.identity import Identity, peer_text

RUN, OTHER = RunId(b"r" * 32), RunId(b"o" * 32)
SECRET = b"s" * 20


def der(pem: bytes) -> bytes:
    return x509.load_pem_x509_certificate(pem).public_bytes(serialization.Encoding.DER)


def test_every_member_derives_the_same_authority() -> None:
    peer = Identity.generate().peer
    assert Admission(RUN).verify(peer, Admission(RUN).prove(peer))
    assert Admission(RUN, SECRET).verify(peer, Admission(RUN, SECRET).prove(peer))
    assert Admission(RUN).rendezvous() == Admission(RUN).rendezvous()


@pytest.mark.parametrize(
    "stranger", [Admission(OTHER), Admission(RUN, SECRET), Admission(OTHER, SECRET)]
)
def test_a_proof_is_of_one_run_one_secret_and_one_peer(stranger: Admission) -> None:
    one, two = Identity.generate().peer, Identity.generate().peer
    here = Admission(RUN)
    assert not here.verify(one, stranger.prove(one))
    assert not here.verify(two, here.prove(one))
    assert here.rendezvous() != stranger.rendezvous()


@given(st.binary(max_size=80))
def test_random_bytes_admit_nobody(proof: bytes) -> None:
    assert not Admission(RUN).verify(Identity.generate().peer, proof)


def test_certificates_prove_their_peer() -> None:
    identity = Identity.generate()
    credentials = Admission(RUN).credentials(identity)
    assert peer_of(credentials.client) == identity.peer
    assert peer_of(credentials.server) == identity.peer
    Admission(RUN).check_server(der(credentials.server), identity.peer)


def test_certificates_are_valid_whatever_the_clock_says() -> None:
    credentials = Admission(RUN).credentials(Identity.generate())
    for pem in (credentials.client, credentials.server, credentials.root):
        certificate = x509.load_pem_x509_certificate(pem)
        assert certificate.not_valid_before_utc.year == 1970
        assert certificate.not_valid_after_utc > datetime.datetime(
            9999, 12, 31, tzinfo=datetime.UTC
        )


def test_another_peer_is_refused_showing_both_ids() -> None:
    here, wanted = Identity.generate(), Identity.generate()
    certificate = der(Admission(RUN).credentials(here).server)
    with pytest.raises(PeerError) as caught:
        Admission(RUN).check_server(certificate, wanted.peer)
    assert peer_text(here.peer) in str(caught.value)
    assert peer_text(wanted.peer) in str(caught.value)
    assert caught.value.reason == "wrong peer"


@pytest.mark.parametrize(
    ("theirs", "ours", "reason", "said"),
    [
        (Admission(OTHER), Admission(RUN), "another run", "another run"),
        (Admission(RUN, SECRET), Admission(RUN), "not admitted", "--secret-file"),
        (Admission(RUN, SECRET), Admission(RUN, b"x" * 20), "not admitted", "--secret-file"),
        (Admission(RUN), Admission(RUN, SECRET), "not admitted", "--secret-file"),
    ],
)
def test_a_server_of_another_swarm_is_refused(
    theirs: Admission, ours: Admission, reason: str, said: str
) -> None:
    identity = Identity.generate()
    with pytest.raises(PeerError, match=said) as caught:
        ours.check_server(der(theirs.credentials(identity).server), identity.peer)
    assert caught.value.reason == reason


def test_a_client_certificate_is_no_server_certificate() -> None:
    identity = Identity.generate()
    certificate = der(Admission(RUN).credentials(identity).client)
    with pytest.raises(PeerError):
        Admission(RUN).check_server(certificate, identity.peer)


def test_extensions_copied_to_another_key_prove_nothing() -> None:
    victim = x509.load_pem_x509_certificate(Admission(RUN).credentials(Identity.generate()).server)
    thief = x509.load_pem_x509_certificate(Admission(RUN).credentials(Identity.generate()).server)
    victims = victim.public_bytes(serialization.Encoding.DER)
    thieves = thief.public_bytes(serialization.Encoding.DER)
    forged = thieves
    for extension in (0, 1):
        mine = list(thief.extensions)[1 + extension].value
        theirs = list(victim.extensions)[1 + extension].value
        assert isinstance(mine, x509.UnrecognizedExtension)
        assert isinstance(theirs, x509.UnrecognizedExtension)
        forged = forged.replace(mine.value, theirs.value)
    assert forged not in {victims, thieves}
    with pytest.raises(PeerError, match="copied"):
        Admission(RUN).check_server(forged, peer_of(victims))


@settings(max_examples=1000)
@given(st.data())
def test_a_changed_certificate_is_refused_or_proves_the_same_peer(data: st.DataObject) -> None:
    certificate = bytearray(CERTIFICATE)
    place = data.draw(st.integers(0, len(certificate) - 1))
    certificate[place] ^= data.draw(st.integers(1, 255))
    try:
        Admission(RUN).check_server(bytes(certificate), IDENTITY.peer)
    except PeerError:
        return
    assert peer_of(bytes(certificate)) == IDENTITY.peer


def test_a_certificate_that_the_library_only_warns_of_is_refused() -> None:
    negative_serial = bytearray(CERTIFICATE)
    assert negative_serial[13:15] == b"\x02\x14"  # an integer of 20 bytes follows
    negative_serial[15] ^= 0x80
    with pytest.raises(PeerError, match="can't be read"):
        Admission(RUN).check_server(bytes(negative_serial), IDENTITY.peer)


@given(st.binary(max_size=200))
def test_random_bytes_are_no_certificate(data: bytes) -> None:
    with pytest.raises(PeerError):
        peer_of(data)


IDENTITY = Identity.generate()
CERTIFICATE = der(Admission(RUN).credentials(IDENTITY).server)


def test_a_secret_is_made_once_and_for_its_owner_only(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    secret = create_secret(path)
    assert len(secret) * 8 >= 128
    assert path.stat().st_mode & 0o777 == 0o600
    assert create_secret(path) == load_secret(path) == secret
    path.chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        load_secret(path)


@pytest.mark.parametrize(
    "text", ["", "correct horse battery staple", "shoal-", "shoal-" + "a" * 40, "é", "a" * 10_000]
)
def test_passphrases_are_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "secret"
    path.touch(0o600)
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_secret(path)
    assert "passphrase" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_secret_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--secret-file"):
        load_secret(tmp_path / "none")


def test_a_mistyped_secret_is_refused() -> None:
    text = new_secret()
    for place in range(len("shoal-"), len(text)):
        wrong = "b" if text[place] == "a" else "a"
        with pytest.raises(ConfigError):
            parse_secret(text[:place] + wrong + text[place + 1 :])


@pytest.mark.parametrize(
    ("mode", "secret", "said"),
    [
        ("invite", None, "does not exist yet"),
        ("closed", None, "unknown"),
        ("secret", None, "--secret-file"),
        ("open", SECRET, "leave out"),
    ],
)
def test_modes_that_do_not_fit_are_refused(mode: str, secret: bytes | None, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        admit(mode, RUN, secret)


def test_modes_that_fit() -> None:
    assert admit("open", RUN, None).mode == "open"
    assert admit("secret", RUN, os.urandom(20)).mode == "secret"
