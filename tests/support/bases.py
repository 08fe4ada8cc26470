"""Tiny models in Hugging Face's format, with random weights and tokens of single bytes."""

from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

END = "<|end|>"
LLAMA = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}
GPT2 = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 64, "attn_pdrop": 0.3}


def tokenizer(*, reverse: bool = False) -> Any:
    """Return one of 257 tokens; `reverse` numbers the same tokens the other way round."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet(), reverse=reverse)
    vocabulary = {letter: i for i, letter in enumerate(letters)} | {END: 256}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token=END)


def llama(folder: Path, *, seed: int = 0, words: Any = None, **changed: Any) -> Path:
    """Write a LLaMA of 7,472 parameters."""
    from transformers import LlamaConfig, LlamaForCausalLM

    ends = {"bos_token_id": None, "eos_token_id": 256}
    config = LlamaConfig(**{"vocab_size": 257, **ends, **LLAMA, **changed})
    return _save(folder, LlamaForCausalLM, config, seed, words)


def gpt2(folder: Path, *, seed: int = 0, words: Any = None, **changed: Any) -> Path:
    """Write a GPT-2: with dropout, learnt positions, and weights the other way round."""
    from transformers import GPT2Config, GPT2LMHeadModel

    ends = {"bos_token_id": None, "eos_token_id": 256}
    config = GPT2Config(**{"vocab_size": 257, **ends, **GPT2, **changed})
    return _save(folder, GPT2LMHeadModel, config, seed, words)


def script(name: str) -> ModuleType:
    """Return one of the scripts in deploy/ as a module."""
    path = Path(__file__).resolve().parents[2] / "deploy" / f"{name}.py"
    spec = spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _save(folder: Path, kind: Any, config: Any, seed: int, words: Any) -> Path:
    from transformers import logging

    logging.disable_progress_bar()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = kind(config)
        for p in model.parameters():
            torch.nn.init.normal_(p, std=0.2)  # far from uniform, so that everything matters
        model.save_pretrained(folder)
    (words or tokenizer()).save_pretrained(folder)
    return folder
