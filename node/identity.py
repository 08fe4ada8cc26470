"""Who this peer is: one Ed25519 key in a file of its own, and its libp2p peer id as text."""

import os
import stat
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from shoal.gossip.names import PeerId
from shoal.node.errors import ConfigError

ALPHABET = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"
"""base58btc."""
PUBLIC_KEY = bytes.fromhex("08011220")
"""libp2p's PublicKey message up to the key itself: type Ed25519, 32 bytes of data."""
MULTIHASH = bytes.fromhex("0024")
"""The identity multihash of these 36 bytes: what a peer id is for short keys."""
FILE_BYTES = 4096
"""Largest identity file that is read."""


@dataclass(frozen=True, slots=True)
class Identity:
    """An Ed25519 key. Its public half is the peer's name everywhere."""

    key: Ed25519PrivateKey = field(repr=False)
    peer: PeerId

    @staticmethod
    def generate() -> "Identity":
        """Make a new one."""
        return _identity(Ed25519PrivateKey.generate())

    def sign(self, data: bytes) -> bytes:
        """Return the 64 bytes of the Ed25519 signature over `data`."""
        return self.key.sign(data)

    def __str__(self) -> str:
        return peer_text(self.peer)


def verify(peer: PeerId, signature: bytes, data: bytes) -> bool:
    """Tell whether `peer` signed `data`."""
    try:
        Ed25519PublicKey.from_public_bytes(peer).verify(signature, data)
    except (InvalidSignature, ValueError):
        return False
    return True


def load_or_create(path: Path) -> Identity:
    """Return the identity in `path`; make one there when there is no file."""
    with suppress(FileNotFoundError):
        return load(path)
    create(path)
    return load(path)


def load(path: Path) -> Identity:
    """Read an identity file: PEM (PKCS#8) or the 32 raw bytes of the secret key.

    Raises FileNotFoundError when there is none, ConfigError when it must not be used.
    """
    try:
        with path.open("rb") as file:
            _refuse_open_modes(path, os.fstat(file.fileno()))
            data = file.read(FILE_BYTES + 1)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ConfigError(
            f"identity file {path} can't be read ({error.strerror}): make it readable by this user"
        ) from error
    return _parse(path, data)


def create(path: Path) -> None:
    """Write a new identity to `path`, whole or not at all; an existing file is left alone."""
    pem = Ed25519PrivateKey.generate().private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    write_secret(path, pem, what="identity file")


def write_secret(path: Path, data: bytes, *, what: str) -> None:
    """Create `path` with mode 0600, whole or not at all; an existing file is left alone."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.new")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        try:
            os.fchmod(descriptor, 0o600)
            os.write(descriptor, data)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        # A link, unlike a rename, never replaces a file that another process made meanwhile.
        with suppress(FileExistsError):
            os.link(temporary, path)
    except OSError as error:
        raise ConfigError(
            f"{what} {path} can't be written ({error.strerror}): choose a directory that can"
        ) from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def peer_text(peer: PeerId) -> str:
    """Return the libp2p peer id, `12D3KooW…`."""
    return base58(MULTIHASH + PUBLIC_KEY + peer)


def parse_peer(text: str) -> PeerId:
    """Return the peer whose libp2p peer id this is; raises ValueError when it is none."""
    head = MULTIHASH + PUBLIC_KEY
    if len(text) > 64:
        raise ValueError(f"a peer id has 52 characters, this has {len(text)}")
    data = unbase58(text)
    if len(data) != len(head) + 32 or not data.startswith(head):
        raise ValueError(f"{text} is not the peer id of an Ed25519 key (they begin with 12D3KooW)")
    return PeerId(data[len(head) :])


def base58(data: bytes) -> str:
    """Return `data` in base58btc."""
    number, text = int.from_bytes(data, "big"), ""
    while number:
        number, digit = divmod(number, 58)
        text = ALPHABET[digit] + text
    zeros = len(data) - len(data.lstrip(b"\0"))
    return "1" * zeros + text


def unbase58(text: str) -> bytes:
    """Return the bytes of a base58btc text; raises ValueError for another alphabet."""
    number = 0
    for character in text:
        digit = ALPHABET.find(character)
        if digit < 0:
            raise ValueError(f"{character!r} is no base58 character")
        number = number * 58 + digit
    zeros = len(text) - len(text.lstrip("1"))
    return bytes(zeros) + number.to_bytes((number.bit_length() + 7) // 8, "big")


def _identity(key: Ed25519PrivateKey) -> Identity:
    raw = key.public_key().public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)
    return Identity(key, PeerId(raw))


def _refuse_open_modes(path: Path, status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise ConfigError(f"identity file {path} is no regular file: name another with --identity")
    if status.st_mode & 0o077:
        mode = stat.S_IMODE(status.st_mode)
        raise ConfigError(f"identity file {path} is open to others (mode {mode:04o}): chmod 600 it")


def _parse(path: Path, data: bytes) -> Identity:
    if len(data) == 32:
        return _identity(Ed25519PrivateKey.from_private_bytes(data))
    try:
        key = serialization.load_pem_private_key(data, password=None)
    except (ValueError, TypeError) as error:
        raise ConfigError(_wrong_format(path)) from error
    if not isinstance(key, Ed25519PrivateKey):
        raise ConfigError(_wrong_format(path))
    return _identity(key)


def _wrong_format(path: Path) -> str:
    return (
        f"identity file {path} holds no Ed25519 key (PEM without a password, or 32 raw bytes): "
        "restore it from a copy, or move it away and start as a new peer"
    )
