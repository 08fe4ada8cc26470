"""Make a small LLaMA-style model and train it in a swarm of daemons on this machine.

    python deploy/small_llama.py base                          # two peers, some minutes
    python deploy/small_llama.py base --peers 4 --turns 40
    python deploy/small_llama.py base --no-swarm               # random weights, at once

`base` is then a folder in Hugging Face's format (config.json, tokenizer.json, model.safetensors)
that `AutoModelForCausalLM.from_pretrained` loads, and that `--base base` names to Shoal's task
hf-causal-lm. Nothing is downloaded: the tokenizer (byte-level BPE) and the model learn from this
Python's own standard library, or from --data. What the swarm wrote stays in `base/training`.
Needs the extra hf: pip install 'shoal[hf]'.
"""

import argparse
import subprocess
import sys
from pathlib import Path

import to_hugging_face
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers import logging as transformers_logging

from shoal.compression.settings import SettingError
from shoal.training import data

END = "<|end|>"
SAMPLE = 4 << 20
"""Bytes of text that the tokenizer is made from."""
RUN = """\
[run]
name = "small-llama"
seed = {seed}
turns = {turns}

[task]
name = "hf-causal-lm"
context = {context}

[local]
optimizer = {{ name = "muon", lr = 0.02, adamw_lr = 3e-3, schedule = "wsd" }}
batch = {batch}
steps = {steps}

[exchange]
update = {{ kind = "dense", levels = 3, momentum = 0.2, outer_lr = 0.8 }}

[swarm]
min_peers = {peers}
"""


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="new folder for the model")
    size = parser.add_argument_group("the model")
    size.add_argument("--layers", type=int, default=4)
    size.add_argument("--width", type=int, default=96, help="of the residual stream")
    size.add_argument("--heads", type=int, default=4)
    size.add_argument("--context", type=int, default=128, help="tokens that it reads")
    size.add_argument("--vocabulary", type=int, default=1024, help="tokens; 257: single bytes")
    size.add_argument("--seed", type=int, default=7)
    swarm = parser.add_argument_group("its training")
    swarm.add_argument("--no-swarm", action="store_true", help="leave the weights random")
    swarm.add_argument("--peers", type=int, default=2)
    swarm.add_argument("--turns", type=int, default=20)
    swarm.add_argument("--steps", type=int, default=30, help="local steps of a turn")
    swarm.add_argument("--batch", type=int, default=16)
    swarm.add_argument("--data", help="text to learn from (default: the standard library)")
    swarm.add_argument("--device", help="cpu or cuda (default: cuda if there is one)")
    args = parser.parse_args(argv)
    for name in ("layers", "width", "heads", "context", "peers", "turns", "steps", "batch"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} is at least 1")
    if args.width % (2 * args.heads):
        parser.error(f"--width {args.width} is to be a multiple of twice --heads {args.heads}")
    if args.vocabulary < 257:
        parser.error("--vocabulary is at least 257: every byte, and the end of a text")
    if not 0 <= args.seed < 2**63:
        parser.error("--seed is from 0 to 2^63 - 1")
    if args.out.exists() and not (args.out.is_dir() and not any(args.out.iterdir())):
        parser.error(f"{args.out} is not an empty folder; name a new one, or remove it")
    return args


def make_tokenizer(vocabulary: int, text: str | None) -> PreTrainedTokenizerFast:
    """Return byte-level BPE of `vocabulary` tokens, made from the text that --data names."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    pieces = [content.decode(errors="ignore") for _, content in data.texts(text)]
    share = max(1, sum(map(len, pieces)) // SAMPLE)
    made.train_from_iterator(pieces[::share] if vocabulary > 257 else [], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token=END)


def make_model(args: argparse.Namespace, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Return the model with random weights."""
    torch.manual_seed(args.seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=args.width,
        intermediate_size=args.width * 8 // 3,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        max_position_embeddings=args.context,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlamaForCausalLM(config)


def train(args: argparse.Namespace, start: Path) -> None:
    """Train the model of `start` in a swarm, and write what it becomes to OUT."""
    work = start.parent
    run_file = work / "run.toml"
    run_file.write_text(
        RUN.format(
            **{
                name: getattr(args, name)
                for name in ("seed", "turns", "context", "batch", "steps", "peers")
            }
        )
    )
    swarm = work / "swarm"
    argv = [sys.executable, "-m", "shoal.node.cli", "swarm", str(run_file), "--dir", str(swarm)]
    argv += ["--peers", str(args.peers), "--base", str(start)]
    for name in ("data", "device"):
        if (value := getattr(args, name)) is not None:
            argv += [f"--{name}", value]
    done = subprocess.run(argv, check=False)
    if done.returncode:
        sys.exit(done.returncode)
    to_hugging_face.convert(swarm / "model.safetensors", args.out, base=str(start))


def main() -> None:
    """Make it."""
    args = parse()
    transformers_logging.disable_progress_bar()
    try:
        tokenizer = make_tokenizer(args.vocabulary, args.data)
    except SettingError as error:
        sys.exit(str(error))
    model = make_model(args, tokenizer)
    start = args.out if args.no_swarm else args.out / "training" / "random"
    tokenizer.save_pretrained(start)
    model.save_pretrained(start)
    print(f"{model.num_parameters()} parameters, {len(tokenizer)} tokens: {start}", flush=True)
    if not args.no_swarm:
        train(args, start)
        print(f"the trained model: {args.out}")


if __name__ == "__main__":
    main()
