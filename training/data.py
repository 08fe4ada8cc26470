"""Text as blocks of 4 KiB: which are held out, and which are this peer's (design 7).

Both follow from the hash of a block's content, so that every peer holds out the same blocks
whatever else it has, and shards cover everything once.
"""

import os
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import TypeVar

from shoal.compression.settings import SettingError
from shoal.training.task import Place

T = TypeVar("T")
BLOCK = 4096
HELD_OUT = 20
"""One block in so many is held out: 5 %."""
ENOUGH = 5 * HELD_OUT * BLOCK
"""Of so many bytes some are held out, but once in 170 times."""
MOST = 4 << 30
"""Most bytes of text that one peer reads."""
_SKIPPED = {"__pycache__", "site-packages", "dist-packages", "test", "tests", "idle_test"}


@dataclass(frozen=True, slots=True)
class Blocks:
    """This peer's share of a corpus, and what nobody trains on."""

    train: list[bytes]
    held_out: list[bytes]
    """Sorted by hash, so that the first few are a fair sample and the same everywhere."""


def load(place: Place) -> Blocks:
    """Return the blocks of `place.data`, or of this Python's own library when it is None."""
    blocks = ((block, block) for _, content in texts(place.data) for block in cut(content))
    return Blocks(*divide(blocks, place))


def texts(data: str | None) -> Iterator[tuple[Path, bytes]]:
    """Yield the files of text that `--data` names, and what is in them."""
    total = 0
    for path in files(data):
        content = _read(path)
        if b"\0" in content[:BLOCK]:
            continue  # not text
        total += len(content)
        if total > MOST:
            raise SettingError(f"--data {data} holds more than 4 GiB; give each peer a part")
        yield path, content
    if not total:
        raise SettingError(f"--data {data} holds no text")


def cut(content: bytes, size: int = BLOCK) -> Iterator[bytes]:
    """Yield the blocks of one text, from its start."""
    return (content[start : start + size] for start in range(0, len(content), size))


def divide(
    items: Iterable[tuple[bytes, T]], place: Place, *, one_in: int = HELD_OUT
) -> tuple[list[T], list[T]]:
    """Return this peer's share of `items`, each with its content, and those that are held out.

    One item in `one_in` is held out: sorted by hash, the same content once.
    """
    train: list[T] = []
    held_out: dict[int, T] = {}
    for content, item in items:
        if is_held_out(content, place.seed, one_in):
            held_out[_hash(content, b"held-out", place.seed)] = item
        elif is_mine(content, place):
            train.append(item)
    if not train:
        raise SettingError(
            f"this peer's shard of {place.data or 'the built-in corpus'} is empty; "
            "give it more --data or a smaller --shard i/N"
        )
    return train, [held_out[key] for key in sorted(held_out)]


def is_held_out(block: bytes, seed: int, one_in: int = HELD_OUT) -> bool:
    """Say whether nobody trains on this block."""
    return _hash(block, b"held-out", seed) % one_in == 0


def is_mine(block: bytes, place: Place) -> bool:
    """Say whether the peer at `place` trains on this block."""
    if place.shard is not None:
        index, count = place.shard
        return _hash(block, b"shard", place.seed) % count == index
    if place.data is not None or place.min_peers == 1:
        return True
    return _hash(block + place.peer, b"peer", place.seed) < 2**64 // place.min_peers


def _hash(content: bytes, purpose: bytes, seed: int) -> int:
    key = seed.to_bytes(8, "little")
    found = blake2b(content, digest_size=8, key=key, person=b"shoal-" + purpose)
    return int.from_bytes(found.digest(), "little")


def files(data: str | None) -> Iterator[Path]:
    """Yield what `--data` names, or the modules of this Python's own library, in order."""
    if data is None:
        yield from sorted(_walk(Path(sysconfig.get_paths()["stdlib"]), ".py"))
        return
    path = Path(data)
    if path.is_file():
        yield path
    elif path.is_dir():
        yield from sorted(_walk(path, ""))
    else:
        raise SettingError(f"--data {data} does not exist; name a file or a folder of text")


def _walk(folder: Path, suffix: str) -> Iterator[Path]:
    for where, folders, files in os.walk(folder):
        skipped = _SKIPPED if suffix else set[str]()
        folders[:] = [f for f in folders if f not in skipped and not f.startswith(".")]
        yield from (Path(where, f) for f in files if f.endswith(suffix) and f[0] != ".")


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise SettingError(f"cannot read {path}: {error.strerror}") from error
