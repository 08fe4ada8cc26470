"""Byte-level language model over any folder or file of text: a small decoder-only transformer.

Shapes: B batch, T positions, D width, H heads, E = D / H, V = 256 bytes.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  what everybody calls it

from shoal.compression.settings import SettingError
from shoal.training import data
from shoal.training.task import Place, task

VOCABULARY = 256
THOROUGH = 2048
"""Windows of held-out text in a thorough evaluation."""


@dataclass(frozen=True, slots=True)
class Model:
    """The size of the transformer."""

    layers: int = 2
    width: int = 64
    heads: int = 4
    context: int = 128
    """Bytes that it sees."""

    def __post_init__(self) -> None:
        """Refuse sizes that do not fit together."""
        if min(self.layers, self.width, self.heads, self.context) < 1:
            raise ValueError("layers, width, heads and context must be at least 1")
        if self.width % (2 * self.heads):
            raise ValueError(f"width = {self.width} must be a multiple of 2 x heads = {self.heads}")
        if self.context > data.BLOCK // 2:
            raise ValueError(f"context = {self.context}; use at most {data.BLOCK // 2}")


@task("text")
class Text:
    """Predict the next byte; loss and measure are bits per byte."""

    unit = "bits per byte"

    def __init__(
        self, place: Place, *, model: Model = Model(), evaluation_windows: int = 128
    ) -> None:
        """`evaluation_windows`: windows of held-out text that a turn's evaluation looks at."""
        self._place = place
        self._size = model
        self._windows = evaluation_windows
        self._loaded: tuple[_Corpus, _Corpus] | None = None

    def model(self) -> nn.Module:
        """Return the transformer."""
        return Transformer(self._size)

    def matrices(self, model: nn.Module) -> list[str]:
        """Return the matrices of the blocks."""
        named = model.named_parameters()
        return [name for name, p in named if p.ndim == 2 and name.startswith("blocks.")]

    def batches(self, generator: torch.Generator) -> Iterator[Tensor]:
        """Draw windows of the own share, any start as likely as any other."""
        train, _ = self._data()
        while True:
            drawn_B = torch.randint(train.windows, (self._place.batch,), generator=generator)
            yield train.take(drawn_B.numpy())

    def loss(self, model: nn.Module, batch: Tensor) -> Tensor:
        """Return bits per byte of windows of context + 1 bytes."""
        x_BT = batch.to(next(model.parameters()).device).long()
        logits_BTV = model(x_BT[:, :-1])
        nats = F.cross_entropy(logits_BTV.flatten(0, 1), x_BT[:, 1:].flatten())
        return nats / math.log(2)

    @torch.no_grad()
    def evaluate(self, model: nn.Module, *, thorough: bool = False) -> float:
        """Return bits per byte on a fixed set of held-out windows."""
        _, held_out = self._data()
        windows = held_out.spread(THOROUGH if thorough else self._windows)
        parts = [windows[i : i + 64] for i in range(0, len(windows), 64)]
        bits = [float(self.loss(model, held_out.take(part))) * len(part) for part in parts]
        return sum(bits) / len(windows)

    @torch.no_grad()
    def sample(self, model: nn.Module, prompt: str, length: int, generator: torch.Generator) -> str:
        """Return `length` more bytes of text after `prompt`."""
        device = next(model.parameters()).device
        text = list(prompt.encode() or b"\n")
        for _ in range(length):
            x_1T = torch.tensor([text[-self._size.context :]], device=device)
            chances_V = model(x_1T)[0, -1].float().softmax(0).cpu()
            text.append(int(torch.multinomial(chances_V, 1, generator=generator)))
        return bytes(text).decode(errors="replace")

    def _data(self) -> tuple["_Corpus", "_Corpus"]:
        """Return what this peer trains on and what nobody does."""
        if self._loaded is None:
            blocks = data.load(self._place)
            length = self._size.context + 1
            self._loaded = _Corpus(blocks.train, length), _Corpus(blocks.held_out, length)
            if not self._loaded[0].windows:
                raise SettingError(
                    f"this peer's text has no piece of {length} bytes; give it more --data"
                )
            if not self._loaded[1].windows:
                raise SettingError(
                    f"no text is held out (1 block of 4 KiB in {data.HELD_OUT} is, by its hash); "
                    f"give it {data.ENOUGH >> 10} KiB of --data or more"
                )
        return self._loaded


class _Corpus:
    """Blocks in one array, and every window of `length` bytes that lies within a block."""

    def __init__(self, blocks: list[bytes], length: int) -> None:
        blocks = [block for block in blocks if len(block) >= length]
        self._text: NDArray[np.uint8] = np.frombuffer(b"".join(blocks), np.uint8)
        sizes = np.array([len(block) for block in blocks], np.int64)
        self._ends = np.cumsum(sizes - length + 1)  # in windows
        self._shift = np.arange(len(blocks)) * (length - 1)
        self._length = length
        self._blocks = len(blocks)
        self.windows = int(self._ends[-1]) if blocks else 0

    def take(self, windows: NDArray[np.int64]) -> Tensor:
        """Return these windows, one a row."""
        starts = windows + self._shift[np.searchsorted(self._ends, windows, side="right")]
        return torch.from_numpy(self._text[starts[:, None] + np.arange(self._length)])

    def spread(self, count: int) -> NDArray[np.int64]:
        """Return `count` windows (or as many as there are) at equal distances."""
        count = min(count, self.windows)
        return np.arange(count, dtype=np.int64) * self.windows // count


class Transformer(nn.Module):
    """Pre-norm blocks with rotary positions; squared ReLU; zero-initialised ends of branches."""

    def __init__(self, size: Model) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, size.width)
        self.blocks = nn.ModuleList(Block(size) for _ in range(size.layers))
        self.norm = nn.RMSNorm(size.width)
        nn.init.normal_(self.embedding.weight, std=size.width**-0.5)

    def forward(self, x_BT: Tensor) -> Tensor:
        """Return logits_BTV."""
        x_BTD = self.embedding(x_BT) * self.embedding.embedding_dim**0.5
        for block in self.blocks:
            x_BTD = block(x_BTD)
        logits: Tensor = F.linear(self.norm(x_BTD), self.embedding.weight)
        return logits


class Block(nn.Module):
    """Attention, then a perceptron."""

    def __init__(self, size: Model) -> None:
        super().__init__()
        width = size.width
        self.heads = size.heads
        self.norm1, self.norm2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.query, self.key, self.value, self.out = (
            nn.Linear(width, width, bias=False) for _ in range(4)
        )
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.down.weight)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Return x_BTD after both branches."""
        x_BTD = x_BTD + self._attend(self.norm1(x_BTD))
        hidden = F.relu(self.up(self.norm2(x_BTD))).square()
        after: Tensor = x_BTD + self.down(hidden)
        return after

    def _attend(self, x_BTD: Tensor) -> Tensor:
        B, T, D = x_BTD.shape
        q, k, v = (
            layer(x_BTD).view(B, T, self.heads, D // self.heads).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        mixed = F.scaled_dot_product_attention(rotate(q), rotate(k), v, is_causal=True)
        attended: Tensor = self.out(mixed.transpose(1, 2).reshape(B, T, D))
        return attended


def rotate(x_BHTE: Tensor) -> Tensor:
    """Turn pairs of elements by angles that grow with the position (RoPE)."""
    T, E = x_BHTE.shape[-2:]
    device = x_BHTE.device
    speed = 10000.0 ** (-torch.arange(0, E, 2, device=device) / E)
    angle_TE = torch.arange(T, device=device)[:, None] * speed
    cos, sin = angle_TE.cos(), angle_TE.sin()
    first, second = x_BHTE.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, first * sin + second * cos), dim=-1)
