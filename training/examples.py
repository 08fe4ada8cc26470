"""Text and JSONL as rows of tokens to predict.

Text is cut into blocks (`training/data.py`); a row is a window of one. A line of JSONL is
`{"text": …}`, cut in the same way, or `{"prompt": …, "completion": …}`, which is one row of which
only the completion counts. Tokens are made when a block is first drawn.

Shapes: B rows, T positions.
"""

import json
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shoal.compression.settings import SettingError
from shoal.training import data

KEPT = 4096
"""Blocks whose tokens are kept in memory."""
IGNORED = -100
"""The target of a position that does not count."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A block of text."""

    content: bytes
    opens: bool = False
    """It is the start of a record."""
    closes: bool = False

    @property
    def weight(self) -> int:
        """Return how often it is drawn: any place in the text is as likely as any other."""
        return len(self.content)


@dataclass(frozen=True, slots=True)
class Pair:
    """A prompt, and what is to follow it."""

    prompt: str
    completion: str

    @property
    def content(self) -> bytes:
        """Return what hold-out and shards follow from."""
        return f"{self.prompt}\0{self.completion}".encode()

    @property
    def weight(self) -> int:
        """Return how often it is drawn: any pair is as likely as any other, and as a block."""
        return data.BLOCK


Item = Piece | Pair


class Encoded(NamedTuple):
    """The tokens of an item."""

    tokens: NDArray[np.int32]
    counted: int
    """The first token whose prediction counts."""


class Batch(NamedTuple):
    """Rows of tokens, filled up on the right, and what is to be predicted at each position."""

    tokens_BT: Tensor
    targets_BT: Tensor
    """`IGNORED` where nothing counts."""


def read(place: str | None, size: int) -> Iterator[tuple[bytes, Item]]:
    """Yield what `--data` holds in blocks of `size` bytes, each with its content."""
    empty = True
    for path, content in data.texts(place):
        records = _records(path, content) if path.suffix.lower() == ".jsonl" else [content]
        for record in records:
            for item in [record] if isinstance(record, Pair) else _pieces(path, record, size):
                empty = False
                yield item.content, item
    if empty:
        raise SettingError(f"--data {place} holds no text")


def _pieces(path: Path, content: bytes, size: int) -> Iterator[Piece]:
    record = path.suffix.lower() == ".jsonl"
    blocks = list(data.cut(content, size))
    for number, block in enumerate(blocks):
        yield Piece(block, record and number == 0, record and number == len(blocks) - 1)


def _records(path: Path, content: bytes) -> Iterator[Pair | bytes]:
    for number, line in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise SettingError(f"{where} is not JSON ({error}); mend it or take it out") from None
        if not isinstance(record, dict):
            raise SettingError(f'{where} is not an object; write {{"text": …}} on each line')
        if "text" in record:
            yield _text(record, "text", where).encode()
        elif "prompt" in record and "completion" in record:
            pair = Pair(_text(record, "prompt", where), _text(record, "completion", where))
            if not pair.completion:
                raise SettingError(f"{where} has an empty completion; take it out")
            yield pair
        else:
            has = ", ".join(map(str, record)) or "nothing"
            raise SettingError(f"{where} needs a text, or a prompt and a completion; it has {has}")


def _text(record: dict[str, object], key: str, where: str) -> str:
    value = record[key]
    if not isinstance(value, str):
        raise SettingError(f"{where}: {key} is not a text; put it in quotes")
    # JSON can spell half a surrogate pair, which is no character.
    return value.encode(errors="replace").decode()


class Examples:
    """Items as rows of at most `length` tokens."""

    def __init__(
        self, items: Sequence[Item], encode: Callable[[Item], Encoded], length: int
    ) -> None:
        self._items = items
        self._encode = encode
        self._length = length
        self._ends = np.cumsum([item.weight for item in items], dtype=np.int64)
        self._kept: OrderedDict[int, Encoded] = OrderedDict()

    def draw(self, count: int, generator: torch.Generator) -> Batch:
        """Return `count` rows; all chance comes from `generator`."""
        drawn = torch.randint(int(self._ends[-1]), (count,), generator=generator).numpy()
        found = [self._tokens(int(i)) for i in np.searchsorted(self._ends, drawn, side="right")]
        rows = []
        for encoded in found:
            starts = max(1, len(encoded.tokens) - self._length + 1)
            start = int(torch.randint(starts, (1,), generator=generator))
            rows.append(self._row(encoded, start))
        return collate(rows)

    def spread(self, count: int) -> list[Encoded]:
        """Return at most `count` rows that count: of each item its first, then its second, …"""
        rows: list[Encoded] = []
        left: Sequence[int] = range(len(self._items))
        start = 0
        while left and len(rows) < count:
            more = []
            for i in left:
                encoded = self._tokens(i)
                row = self._row(encoded, start)
                if len(row.tokens) > row.counted:
                    rows.append(row)
                if len(rows) == count:
                    break
                if len(encoded.tokens) > start + self._length:
                    more.append(i)
            left, start = more, start + self._length - 1
        return rows

    def _row(self, encoded: Encoded, start: int) -> Encoded:
        return Encoded(
            encoded.tokens[start : start + self._length], max(1, encoded.counted - start)
        )

    def _tokens(self, index: int) -> Encoded:
        if index in self._kept:
            self._kept.move_to_end(index)
            return self._kept[index]
        self._kept[index] = found = self._encode(self._items[index])
        if len(self._kept) > KEPT:
            self._kept.popitem(last=False)
        return found


def collate(rows: Sequence[Encoded]) -> Batch:
    """Return rows of different lengths as one batch: each token is to predict the next."""
    width = max(2, *(len(row.tokens) for row in rows)) - 1
    tokens_BT = torch.zeros(len(rows), width, dtype=torch.int64)
    targets_BT = torch.full((len(rows), width), IGNORED, dtype=torch.int64)
    for i, row in enumerate(rows):
        x = torch.from_numpy(row.tokens.astype(np.int64))
        tokens_BT[i, : len(x) - 1] = x[:-1]
        targets_BT[i, row.counted - 1 : len(x) - 1] = x[row.counted :]
    return Batch(tokens_BT, targets_BT)
