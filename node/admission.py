"""Who may connect: the swarm's certificate authority, its proofs, and every peer's certificates.

The authority is a P-256 key that every member can derive: from the run id (`open`), or from the run
id and a secret (`secret`). It signs three things: client certificates (accepting ends demand them),
the key of server certificates (dialling ends check it in the probe), and a proof of admission over
each peer's identity, which travels in contact records. gRPC's TLS knows no Ed25519, so each process
makes a P-256 key and binds it to its identity with the extension of the libp2p TLS specification.
"""

import base64
import datetime
import hashlib
import os
import stat
import warnings
from dataclasses import dataclass, field
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import (
    decode_dss_signature,
    encode_dss_signature,
)
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.x509.oid import NameOID, ObjectIdentifier

from shoal.gossip.names import PeerId, RunId
from shoal.node.errors import ConfigError, PeerError
from shoal.node.identity import PUBLIC_KEY, Identity, peer_text, verify, write_secret

PROOF_BYTES = 64
"""An ECDSA signature over P-256, r ‖ s."""
SERVER_NAME = "peer.shoal"
"""The name in every server certificate; the peer id is what counts."""
SECRET_BYTES = 20
SECRET_PREFIX = "shoal-"

IDENTITY_OID = ObjectIdentifier("1.3.6.1.4.1.53594.1.1")
"""libp2p's public key extension."""
ADMISSION_OID = ObjectIdentifier("2.25.335661433361464323934059407936260614145")
"""Ours: a tag of the run and the authority's signature over the certificate's key."""
TAG_BYTES = 16

# SEQUENCE { OCTET STRING public key message, OCTET STRING signature }; all lengths are fixed.
_IDENTITY_HEAD = bytes.fromhex("30680424") + PUBLIC_KEY
_IDENTITY_MIDDLE = bytes.fromhex("0440")
_TLS_DOMAIN = b"libp2p-tls-handshake:"
_PEER_DOMAIN = b"shoal-admission-1"
_SERVER_DOMAIN = b"shoal-server-1"
_ORDER = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551
# Nobody's clock is trusted, so certificates are valid for ever.
_BEGIN = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
_END = datetime.datetime(9999, 12, 31, 23, 59, 59, tzinfo=datetime.UTC)
_SHA256 = ec.ECDSA(hashes.SHA256())


@dataclass(frozen=True, slots=True)
class Credentials:
    """What one process shows in TLS, as PEM: one key, two certificates, one root."""

    key: bytes = field(repr=False)
    server: bytes
    """Self-signed; the dialling end takes it as its only root after the probe."""
    client: bytes
    """Signed by the swarm's authority."""
    root: bytes
    """The authority's own certificate."""


class Admission:
    """The swarm's certificate authority, as every member derives it."""

    def __init__(self, run: RunId, secret: bytes | None = None) -> None:
        self.run = run
        self.secret = secret
        mode = b"open" if secret is None else b"secret"
        self._seed = _derive(run + (secret or b""), b"shoal-swarm-1 " + mode, 32)
        number = int.from_bytes(_derive(self._seed, b"shoal-authority-1", 48), "big")
        self._key = ec.derive_private_key(number % (_ORDER - 1) + 1, ec.SECP256R1())
        self._public = self._key.public_key()

    @property
    def mode(self) -> str:
        """`open` or `secret`."""
        return "open" if self.secret is None else "secret"

    def rendezvous(self) -> bytes:
        """Return the 32 bytes under which members find each other; strangers can't compute it."""
        return _derive(self._seed, b"shoal-rendezvous-1", 32)

    def prove(self, peer: PeerId) -> bytes:
        """Return the proof that `peer` was admitted."""
        return self._sign(_PEER_DOMAIN + self.run + peer)

    def verify(self, peer: PeerId, proof: bytes) -> bool:
        """Tell whether `proof` admits `peer` to this run."""
        return self._verify(proof, _PEER_DOMAIN + self.run + peer)

    def credentials(self, identity: Identity) -> Credentials:
        """Make a fresh TLS key and its two certificates."""
        key = ec.generate_private_key(ec.SECP256R1())
        spki = _spki(key.public_key())
        proof = self._sign(self._server_claim(identity.peer, spki))
        admission = x509.UnrecognizedExtension(ADMISSION_OID, self._tag(spki) + proof)
        leaf = _leaf(identity, key)
        server = leaf.issuer_name(_name("peer")).add_extension(admission, False)
        client = leaf.issuer_name(_name("swarm"))
        return Credentials(
            key=key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            ),
            server=_pem(server.sign(key, hashes.SHA256())),
            client=_pem(client.sign(self._key, hashes.SHA256())),
            root=_pem(self._root()),
        )

    def check_server(self, certificate: bytes, expected: PeerId) -> None:
        """Check a server certificate (DER): `expected` shows it, and is a member of this run.

        Raises PeerError whose text tells the operator what is there instead.
        """
        parsed = _load(certificate)
        peer = _peer_of(parsed)
        if peer != expected:
            raise PeerError(
                "wrong peer",
                f"the address names {peer_text(expected)}, but {peer_text(peer)} answers there",
            )
        spki = _spki_of(parsed)
        tag, proof = _admission_of(parsed)
        if tag != self._tag(spki):
            raise PeerError("another run", f"{peer_text(peer)} is in another run")
        if not self._verify(proof, self._server_claim(peer, spki)):
            raise PeerError("not admitted", f"{peer_text(peer)} {self._mismatch()}")

    def _mismatch(self) -> str:
        if self.secret is None:
            return "is in a run that needs a secret: ask its members, pass it with --secret-file"
        return "does not hold the secret in --secret-file: one of the two is not this run's"

    def _tag(self, spki: bytes) -> bytes:
        # Says which run this is to those who know its id, nothing to those who don't.
        return hashlib.blake2b(spki, digest_size=TAG_BYTES, key=self.run).digest()

    def _server_claim(self, peer: PeerId, spki: bytes) -> bytes:
        return _SERVER_DOMAIN + self.run + peer + spki

    def _sign(self, data: bytes) -> bytes:
        r, s = decode_dss_signature(self._key.sign(data, _SHA256))
        return r.to_bytes(32, "big") + s.to_bytes(32, "big")

    def _verify(self, proof: bytes, data: bytes) -> bool:
        if len(proof) != PROOF_BYTES:
            return False
        r, s = int.from_bytes(proof[:32], "big"), int.from_bytes(proof[32:], "big")
        try:
            self._public.verify(encode_dss_signature(r, s), data, _SHA256)
        except InvalidSignature:
            return False
        return True

    def _root(self) -> x509.Certificate:
        return (
            x509.CertificateBuilder()
            .subject_name(_name("swarm"))
            .issuer_name(_name("swarm"))
            .public_key(self._public)
            .serial_number(1)
            .not_valid_before(_BEGIN)
            .not_valid_after(_END)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), True)
            .sign(self._key, hashes.SHA256())
        )


def admit(mode: str, run: RunId, secret: bytes | None) -> Admission:
    """Return the authority of a run whose file says `admission = mode`; raises ConfigError."""
    if mode == "invite":
        raise ConfigError('admission = "invite" does not exist yet: use "open" or "secret"')
    if mode not in {"open", "secret"}:
        raise ConfigError(f'admission = "{mode}" is unknown: use "open" or "secret"')
    if mode == "secret" and secret is None:
        raise ConfigError("this run needs its secret: pass the file with --secret-file")
    if mode == "open" and secret is not None:
        raise ConfigError("this run is open to everybody: leave out --secret-file")
    return Admission(run, secret)


def peer_of(certificate: bytes) -> PeerId:
    """Return the peer that a certificate (PEM or DER) proves to be; raises PeerError."""
    return _peer_of(_load(certificate))


def new_secret() -> str:
    """Make a swarm secret: 160 random bits and a checksum, as text."""
    return _secret_text(os.urandom(SECRET_BYTES))


def parse_secret(text: str) -> bytes:
    """Return the bytes of a secret that Shoal made; raises ConfigError for anything else."""
    body = text.strip().removeprefix(SECRET_PREFIX).upper()
    try:
        data = base64.b32decode(body)
    except ValueError:
        data = b""
    if len(data) != SECRET_BYTES + 5 or _secret_text(data[:SECRET_BYTES]) != text.strip():
        raise ConfigError(
            "this is no secret that Shoal made, or it is mistyped (passphrases are refused, they "
            "can be guessed): the run's founder has it in its directory"
        )
    return data[:SECRET_BYTES]


def load_secret(path: Path) -> bytes:
    """Read a secret file; raises ConfigError when it is missing, open to others or no secret."""
    try:
        mode = stat.S_IMODE(path.stat().st_mode)
        text = path.read_text("ascii")
    except OSError as error:
        raise ConfigError(
            f"secret file {path} can't be read ({error.strerror}): check --secret-file"
        ) from error
    except UnicodeDecodeError:
        text = ""
    if mode & 0o077:
        raise ConfigError(f"secret file {path} is open to others (mode {mode:04o}): chmod 600 it")
    try:
        return parse_secret(text)
    except ConfigError as error:
        raise ConfigError(f"secret file {path}: {error}") from None


def create_secret(path: Path) -> bytes:
    """Make a secret in a new file with mode 0600; an existing file is read instead."""
    write_secret(path, new_secret().encode() + b"\n", what="secret file")
    return load_secret(path)


def _secret_text(data: bytes) -> str:
    check = hashlib.blake2b(data, digest_size=5, person=b"shoal-secret-1").digest()
    return SECRET_PREFIX + base64.b32encode(data + check).decode().lower()


def _derive(data: bytes, info: bytes, length: int) -> bytes:
    return HKDF(hashes.SHA256(), length, b"shoal", info).derive(data)


def _spki_of(certificate: x509.Certificate) -> bytes:
    try:
        key = certificate.public_key()
    except (ValueError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise PeerError("certificate", "whoever answers there is no Shoal daemon")
    return _spki(key)


def _spki(key: ec.EllipticCurvePublicKey) -> bytes:
    encoding, form = serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    return key.public_bytes(encoding, form)


def _leaf(identity: Identity, key: ec.EllipticCurvePrivateKey) -> x509.CertificateBuilder:
    spki = _spki(key.public_key())
    signature = identity.sign(_TLS_DOMAIN + spki)
    extension = _IDENTITY_HEAD + identity.peer + _IDENTITY_MIDDLE + signature
    return (
        x509.CertificateBuilder()
        .subject_name(_name("peer"))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(_BEGIN)
        .not_valid_after(_END)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(SERVER_NAME)]), False)
        .add_extension(x509.UnrecognizedExtension(IDENTITY_OID, extension), False)
    )


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def _load(certificate: bytes) -> x509.Certificate:
    pem = certificate.startswith(b"-----")
    load = x509.load_pem_x509_certificate if pem else x509.load_der_x509_certificate
    try:
        with warnings.catch_warnings():
            # What the library only warns of, such as a negative serial number, is not of Shoal's
            # making; nor shall a stranger write into our log.
            warnings.simplefilter("error")
            return load(certificate)
    except (ValueError, x509.InvalidVersion, Warning):
        raise PeerError("certificate", "the certificate there can't be read") from None


def _extension(certificate: x509.Certificate, oid: ObjectIdentifier) -> bytes:
    try:
        value = certificate.extensions.get_extension_for_oid(oid).value
    except (x509.ExtensionNotFound, x509.DuplicateExtension, ValueError):
        value = None
    if not isinstance(value, x509.UnrecognizedExtension):
        raise PeerError("certificate", "whoever answers there is no Shoal daemon")
    return value.value


def _peer_of(certificate: x509.Certificate) -> PeerId:
    data = _extension(certificate, IDENTITY_OID)
    start = len(_IDENTITY_HEAD)
    peer, middle, signature = data[start : start + 32], data[start + 32 : -64], data[-64:]
    if len(data) != 106 or data[:start] != _IDENTITY_HEAD or middle != _IDENTITY_MIDDLE:
        raise PeerError("certificate", "the certificate there holds no Ed25519 identity")
    claim = _TLS_DOMAIN + _spki_of(certificate)
    if not verify(PeerId(peer), signature, claim):
        raise PeerError("certificate", "the identity there is not proved: a copied certificate")
    return PeerId(peer)


def _admission_of(certificate: x509.Certificate) -> tuple[bytes, bytes]:
    data = _extension(certificate, ADMISSION_OID)
    return data[:TAG_BYTES], data[TAG_BYTES:]
