"""A causal language model and its tokenizer in Hugging Face's format, loaded as data only.

Weights come from safetensors and never from pickle, code in the folder is never run, and nothing
is fetched unless the operator wrote `hf://org/name`. transformers and peft are an extra: they are
imported when a model is loaded, and not before.
"""

import contextlib
import functools
import json
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn

from shoal.compression.settings import SettingError, unknown

REMOTE = "hf://"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
PROBE = (
    "The quick brown fox, naïve façade; Größe 3.14159e-10 (2026-02-30)!\n\n\tdef f(x): return x**2"
    "\r\n  Быстрая лиса 敏捷的狐狸 すばやい 여우 ثعلب 🦊👩‍👩‍👧 <s></s><|endoftext|> 0123456789   "
)
"""What a tokenizer makes of this is part of what it is."""
VOLATILE = {
    *("transformers_version", "dtype", "torch_dtype", "architectures", "auto_map", "use_cache"),
    *("initializer_range", "id2label", "label2id", "problem_type", "return_dict"),
    *("output_attentions", "output_hidden_states"),
}
"""What a configuration says that has no part in what a model computes here."""


@dataclass(frozen=True, slots=True)
class Source:
    """Where a model is."""

    name: str
    """A folder, or org/name."""
    revision: str | None = None
    """Branch, tag or commit of a repository; None: its main branch."""
    local: bool = True

    @property
    def options(self) -> dict[str, Any]:
        """Return what every `from_pretrained` is told."""
        found: dict[str, Any] = {"trust_remote_code": False, "local_files_only": self.local}
        return found if self.revision is None else {**found, "revision": self.revision}

    def __str__(self) -> str:
        at = "" if self.revision is None else f"@{self.revision}"
        return self.name if self.local else f"{REMOTE}{self.name}{at}"


def source(base: str | None) -> Source:
    """Return what `--base` names, or raise SettingError with the remedy."""
    if not base:
        raise SettingError(
            "this run starts from a model that every peer has: say where yours is with "
            "--base FOLDER (config.json, *.safetensors and tokenizer.json, as save_pretrained "
            "writes them), or --base hf://ORG/NAME to download it"
        )
    if base.startswith(REMOTE):
        name, _, revision = base.removeprefix(REMOTE).partition("@")
        if name.count("/") != 1 or not all(name.split("/")):
            raise SettingError(f"--base {base}: write hf://ORG/NAME, or hf://ORG/NAME@REVISION")
        return Source(name, revision or None, local=False)
    _check_folder(Path(base))
    return Source(base)


def load_tokenizer(place: Source) -> Any:
    """Return the tokenizer, or raise SettingError."""
    library = _transformers()
    return _load(
        lambda: library.AutoTokenizer.from_pretrained(place.name, **place.options),
        place,
        "tokenizer",
    )


def load_config(place: Source) -> Any:
    """Return what config.json says, its defaults filled in; or raise SettingError."""
    library = _transformers()
    return _load(
        lambda: library.AutoConfig.from_pretrained(place.name, **place.options), place, "model"
    )


def load_model(place: Source, config: Any, *, context: int, tokens: int) -> Any:
    """Return the model in float32 on the CPU, made to read `context` tokens; or raise SettingError.

    `tokens` is how many the tokenizer knows.
    """
    library = _transformers()
    if getattr(config, "quantization_config", None) is not None:
        raise SettingError(
            f"--base {place} holds quantised weights, which cannot be trained; "
            "use the model that they were made from"
        )
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and context > limit:
        raise SettingError(
            f"task.context = {context} is more than the {limit} tokens that the model of "
            f"--base {place} reads; lower it in the run file"
        )
    model, report = _load(
        lambda: library.AutoModelForCausalLM.from_pretrained(
            place.name,
            **place.options,
            config=config,
            use_safetensors=True,
            dtype=torch.float32,
            output_loading_info=True,
        ),
        place,
        "model",
    )
    if missing := sorted(report["missing_keys"]):
        raise SettingError(
            f"--base {place} lacks {len(missing)} weights of its model, {missing[0]} for one; "
            "copy the whole folder"
        )
    if odd := [name for name, p in model.named_parameters() if not bool(p.isfinite().all())]:
        raise SettingError(
            f"--base {place} holds weights that are infinite or no numbers, in {odd[0]} for one; "
            "get another copy"
        )
    known = model.get_input_embeddings().num_embeddings
    if tokens > known:
        raise SettingError(
            f"--base {place} has a tokenizer of {tokens} tokens and a model of {known}; "
            "they do not belong together"
        )
    return model


def add_lora(model: Any, *, rank: int, alpha: float, targets: Iterable[str], seed: int) -> Any:
    """Return the model frozen, with two thin matrices beside each target: A by chance, B zero.

    `targets` are endings of module names; none means every linear layer but the head.
    """
    try:
        import peft
    except ImportError as error:
        raise _not_installed(error) from error
    chosen = list(targets)
    inside = [name for name, module in model.named_modules() if _is_matrix(module)]
    for target in chosen:
        if not any(name == target or name.endswith(f".{target}") for name in inside):
            known = {name.rsplit(".", 1)[-1] for name in inside}
            raise unknown("module in task.lora.targets:", target, known)
    settings = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=alpha,
        lora_dropout=0.0,
        target_modules=chosen or "all-linear",
    )
    # From this seed and nothing that happened before, so that all peers draw the same A.
    with torch.random.fork_rng(devices=[]), _quiet():
        torch.manual_seed(seed)
        try:
            return peft.get_peft_model(model, settings)
        except (ValueError, TypeError) as error:
            raise SettingError(f"task.lora does not fit this model: {_line(error)}") from error


def digest(tokenizer: Any) -> bytes:
    """Return 32 bytes that tell tokenizers apart: their vocabulary, and what they make of `PROBE`.

    Not their files, which differ by the version of the library that wrote them.
    """
    words = sorted(tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0]))
    found = blake2b(digest_size=32)
    for word, number in words:
        found.update(f"{number} {word}\0".encode(errors="replace"))
    found.update(repr(encode(tokenizer, PROBE)).encode())
    return found.digest()


def function(config: Any) -> bytes:
    """Return 32 bytes that tell apart what models of the same weights compute.

    Of a configuration's values, those that are not its class's defaults: so what a later version of
    the library adds, and what a file leaves out, makes no difference where it changes nothing.
    """
    try:
        usual = type(config)().to_dict()
    except Exception:  # one of transformers' classes wants more than nothing
        usual = {}
    said = {"model_type": config.model_type, **_unusual(config.to_dict(), usual)}
    text = json.dumps(said, sort_keys=True, separators=(",", ":"), default=str)
    return blake2b(text.encode(), digest_size=32).digest()


def encode(tokenizer: Any, text: str) -> list[int]:
    """Return the tokens of a piece of text, nothing put before or after it."""
    found: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return found


def opening(tokenizer: Any) -> list[int]:
    """Return what this tokenizer puts before every text: often nothing."""
    first: list[int] = tokenizer("")["input_ids"][:1]
    return first if first == [tokenizer.bos_token_id] else []


def closing(tokenizer: Any) -> list[int]:
    """Return the token that ends a text, if there is one."""
    return [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]


# ---------------------------------------------------------------- helpers


def _check_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise SettingError(
            f"--base {folder} is no folder; name one that save_pretrained wrote, "
            "or write hf://ORG/NAME to download one"
        )
    held = sorted(path.name for path in folder.iterdir())
    if "adapter_config.json" in held:  # else its config could send the library to the network
        raise SettingError(
            f"--base {folder} holds an adapter, not a whole model; "
            "merge it first (peft's merge_and_unload) and save that"
        )
    if "config.json" not in held:
        raise SettingError(f"--base {folder} holds no config.json, so it is not a model's folder")
    if any(name.endswith(".safetensors") for name in held):
        return
    pickles = [name for name in held if name.endswith(PICKLES)]
    if pickles:
        raise SettingError(
            f"--base {folder} holds its weights as pickle ({pickles[0]}), which can run any code; "
            "get a copy with *.safetensors, or make one where you trust this one "
            "(model.save_pretrained(folder))"
        )
    raise SettingError(f"--base {folder} holds no weights: *.safetensors is missing")


def _unusual(said: Mapping[Any, Any], usual: Mapping[Any, Any]) -> dict[str, Any]:
    """Return what differs, None where something is missing, without what is volatile."""
    found = {}
    for key in {*said, *usual}:
        if key in VOLATILE or str(key).startswith("_"):
            continue
        ours, theirs = said.get(key), usual.get(key)
        if isinstance(ours, Mapping):
            ours = _unusual(ours, theirs if isinstance(theirs, Mapping) else {})
            if ours or not isinstance(theirs, Mapping):
                found[str(key)] = ours
        elif ours != theirs:
            found[str(key)] = _number(ours)
    return found


def _number(value: Any) -> Any:
    """Return what is equal in the same form: 10000.0 as 10000."""
    if isinstance(value, list | tuple):
        return [_number(one) for one in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


@functools.cache
def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise _not_installed(error) from error
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


def _not_installed(error: ImportError) -> SettingError:
    return SettingError(f"task 'hf-causal-lm' needs more ({error}): pip install 'shoal[hf]'")


def _load(what: Any, place: Source, noun: str) -> Any:
    """Call it, and say in one line why it fails: these libraries raise nearly everything."""
    try:
        with _offline() if place.local else contextlib.nullcontext(), _unpickled(), _quiet():
            return what()
    except _PickleError as error:
        raise SettingError(
            f"--base {place} has weights in pickle ({error}), which can run any code; "
            "get a copy with all of them in *.safetensors"
        ) from None
    except Exception as error:
        if "trust_remote_code" in str(error):
            raise SettingError(
                f"--base {place} needs code of its own to be run, which Shoal never does; "
                "use a model that transformers knows"
            ) from error
        raise SettingError(f"--base {place} gives no {noun}: {_line(error)}") from error


@contextlib.contextmanager
def _offline() -> Iterator[None]:
    """Let no setting in a local folder send the libraries to the network."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


class _PickleError(RuntimeError):
    """Something was about to be unpickled; the message names the file."""


@contextlib.contextmanager
def _unpickled() -> Iterator[None]:
    """Let nothing be read as pickle: an index of safetensors may name files that are."""

    def refuse(file: Any, *args: Any, **options: Any) -> NoReturn:
        raise _PickleError(Path(str(file)).name)

    library: Any = torch
    before = library.load
    library.load = refuse
    try:
        yield
    finally:
        library.load = before


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the libraries' warnings about each other to themselves."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _is_matrix(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, nn.Parameter) and weight.ndim >= 2


def _line(error: Exception) -> str:
    said = str(error).strip().splitlines() or [type(error).__name__]
    return said[0].strip()[:300]
