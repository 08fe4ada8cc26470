"""Fine-tuning of a causal language model in Hugging Face's format, whole or by LoRA.

The model lies on each operator's machine (`--base`); with LoRA it is frozen and not in the ledger,
so the layout's hash sees to it that all peers have the same one; and the same tokenizer and
configuration in any case. Shapes: B rows, T positions, V tokens.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  what everybody calls it

from shoal.compression.settings import SettingError
from shoal.training import data, examples, pretrained
from shoal.training.examples import Batch, Encoded, Examples, Item, Piece
from shoal.training.task import Place, task

DENSE = 512
"""Tokens of context for which a block of text is 4 KiB; more context, larger blocks."""
THOROUGH = 8
"""A thorough evaluation looks at so many times the rows of a quick one."""


@dataclass(frozen=True, slots=True)
class Lora:
    """W + alpha / rank · B A in place of W: W is frozen, the thin B and A are learnt."""

    rank: int = 0
    """0: no LoRA; all parameters are learnt."""
    alpha: float = 16.0
    targets: tuple[str, ...] = ()
    """Endings of the names of modules, such as "q_proj"; none: every linear layer but the head."""

    def __post_init__(self) -> None:
        """Refuse what cannot be."""
        if self.rank < 0 or not self.alpha > 0:
            raise ValueError("lora.rank must be at least 0 (off), and lora.alpha above 0")
        listed = isinstance(self.targets, list | tuple)
        if not listed or not all(isinstance(t, str) and t for t in self.targets):
            raise ValueError('lora.targets must be a list of names, such as ["q_proj", "v_proj"]')


@task("hf-causal-lm")
class HfCausalLm:
    """Predict the next token; loss and measure are nats per token that counts."""

    unit = "nats per token"

    def __init__(
        self,
        place: Place,
        *,
        context: int = 256,
        lora: Lora = Lora(),
        held_out: float = 1 / data.HELD_OUT,
        evaluation_rows: int = 64,
    ) -> None:
        """Take the options of [task].

        `context`: tokens that are read at once; `held_out`: the share of blocks and records that
        nobody trains on; `evaluation_rows`: how many of their rows a turn's evaluation looks at.
        """
        if context < 1 or evaluation_rows < 1:
            raise ValueError("context and evaluation_rows must be at least 1")
        if not 0.001 <= held_out <= 0.5:
            raise ValueError(f"held_out = {held_out}; use a share from 0.001 to 0.5")
        self._place = place
        self._context = context
        self._lora = lora
        self._one_in = round(1 / held_out)
        self._rows = evaluation_rows
        self._source = pretrained.source(place.base)
        self._loaded: tuple[Examples, Examples] | None = None
        self._looked: list[Encoded] = []

    @cached_property
    def tokenizer(self) -> Any:
        """Return the tokenizer of the base."""
        return pretrained.load_tokenizer(self._source)

    @cached_property
    def config(self) -> Any:
        """Return the configuration of the base."""
        return pretrained.load_config(self._source)

    def model(self) -> nn.Module:
        """Return the base, in float32, and its LoRA if there is one."""
        seed = int(torch.randint(2**62, ()))  # now: loading may draw as many numbers as it likes
        model = pretrained.load_model(
            self._source, self.config, context=self._context, tokens=len(self.tokenizer)
        )
        if self._lora.rank:
            model = pretrained.add_lora(
                model,
                rank=self._lora.rank,
                alpha=self._lora.alpha,
                targets=self._lora.targets,
                seed=seed,
            )
        made: nn.Module = model
        return made

    def fixed(self) -> bytes:
        """Return what tells tokenizers and configurations apart: all peers must have the same."""
        return pretrained.digest(self.tokenizer) + pretrained.function(self.config)

    def batches(self, generator: torch.Generator) -> Iterator[Batch]:
        """Draw rows of the own share: any place of a text, and any prompt, is as likely."""
        train, _ = self._data()
        while True:
            yield train.draw(self._place.batch, generator)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return nats per counted token."""
        nats, count = self._nats(model, batch)
        return nats / max(1, count)

    @torch.no_grad()
    def evaluate(self, model: nn.Module, *, thorough: bool = False) -> float:
        """Return nats per counted token on a fixed set of held-out rows, without dropout."""
        rows = self._held_out()[: self._rows * (THOROUGH if thorough else 1)]
        was_training = model.training
        model.eval()
        nats, count = 0.0, 0
        for i in range(0, len(rows), self._place.batch):
            more, counted = self._nats(model, examples.collate(rows[i : i + self._place.batch]))
            nats, count = nats + float(more), count + counted
        model.train(was_training)
        return nats / count

    @torch.no_grad()
    def sample(self, model: nn.Module, prompt: str, length: int, generator: torch.Generator) -> str:
        """Return up to `length` more tokens after `prompt`, as text."""
        device = next(model.parameters()).device
        start = pretrained.opening(self.tokenizer) + pretrained.encode(self.tokenizer, prompt)
        tokens = start or pretrained.encode(self.tokenizer, "\n")
        begun, ends = len(tokens), pretrained.closing(self.tokenizer)
        while len(tokens) < begun + length and tokens[-1:] != ends:
            x_1T = torch.tensor([tokens[-self._context :]], device=device)
            chances_V = model(input_ids=x_1T, use_cache=False).logits[0, -1].float().softmax(0)
            tokens.append(int(torch.multinomial(chances_V.cpu(), 1, generator=generator)))
        text: str = self.tokenizer.decode(tokens[begun:], skip_special_tokens=True)
        return text

    def save(self, model: Any, folder: Path) -> None:
        """Write the model and its tokenizer in Hugging Face's format, what LoRA learnt merged in.

        With LoRA, `model` is changed.
        """
        whole = model.merge_and_unload() if self._lora.rank else model
        whole.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

    def _nats(self, model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
        """Return the sum over counted tokens, and how many they are."""
        device = next(model.parameters()).device
        targets_BT = batch.targets_BT.to(device)
        # What fills rows up stands on their right, where causal attention never looks from.
        logits_BTV = model(input_ids=batch.tokens_BT.to(device), use_cache=False).logits
        nats = F.cross_entropy(
            logits_BTV.flatten(0, 1).float(),
            targets_BT.flatten(),
            ignore_index=examples.IGNORED,
            reduction="sum",
        )
        return nats, int((batch.targets_BT != examples.IGNORED).sum())

    def _data(self) -> tuple[Examples, Examples]:
        """Return what this peer trains on and what nobody does."""
        if self._loaded is None:
            size = data.BLOCK * -(-self._context // DENSE)
            items = examples.read(self._place.data, size)
            train, held_out = data.divide(items, self._place, one_in=self._one_in)
            if not held_out:
                raise SettingError(
                    f"no text is held out of {len(train)} blocks and records (1 in {self._one_in} "
                    "is); give it more --data, or raise task.held_out"
                )
            length = self._context + 1
            self._loaded = (
                Examples(train, self._encode, length),
                Examples(held_out, self._encode, length),
            )
        return self._loaded

    def _held_out(self) -> list[Encoded]:
        if not self._looked:
            _, held_out = self._data()
            self._looked = held_out.spread(self._rows * THOROUGH)
            if not self._looked:
                raise SettingError("the text held out has no two tokens; give it more --data")
        return self._looked

    def _encode(self, item: Item) -> Encoded:
        words = self.tokenizer
        opening, closing = pretrained.opening(words), pretrained.closing(words)
        if isinstance(item, Piece):
            # A block may begin and end within a character.
            inner = pretrained.encode(words, item.content.decode(errors="ignore"))
            whole = [*(opening if item.opens else ()), *inner, *(closing if item.closes else ())]
            return Encoded(np.array(whole, np.int32), 1)
        after = [*pretrained.encode(words, item.completion), *closing]
        before = [*opening, *pretrained.encode(words, item.prompt)]
        # What is too long loses the start of its prompt, and the end of a completion that is too
        # long by itself.
        after = after[: self._context]
        before = before[-(self._context + 1 - len(after)) :]
        return Encoded(np.array([*before, *after], np.int32), max(1, len(before)))
