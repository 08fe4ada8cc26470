"""Turn a model that `shoal export` wrote into a folder in Hugging Face's format.

    shoal export model.safetensors
    python deploy/to_hugging_face.py model.safetensors tuned --base base

`--base` is the model that the run started from (task hf-causal-lm). What LoRA learnt is merged
into its weights, so that `AutoModelForCausalLM.from_pretrained("tuned")` needs no peft.
"""

import argparse
import json
import sys
from pathlib import Path

import safetensors.torch

from shoal.compression.settings import SettingError
from shoal.training import task
from shoal.training.run import RunError, RunSpec
from shoal.training.task import Place
from shoal.training.tasks.hf_causal_lm import HfCausalLm

NAME = "hf-causal-lm"


def convert(exported: Path, out: Path, *, base: str) -> None:
    """Write the folder `out`; raises SettingError or RunError for what the operator can mend."""
    with safetensors.safe_open(exported, framework="pt") as file:
        about = file.metadata() or {}
    if "run" not in about:
        raise SettingError(f"{exported} was not written by `shoal export`")
    try:
        spec = RunSpec.parse(json.loads(about["run"]))
    except (ValueError, TypeError, AttributeError) as error:
        raise SettingError(f"{exported} does not say of which run it is: {error}") from error
    if spec.task.name != NAME:
        raise SettingError(f"{exported} is of task {spec.task.name}; only {NAME} has such models")
    place = Place(seed=spec.run.seed, base=base)
    made = task.make(NAME, spec.task.options, place, allow_task=None)
    assert isinstance(made, HfCausalLm)
    model = task.make_model(made, NAME, spec.run.seed)
    tensors = safetensors.torch.load_file(exported)
    named = dict(model.named_parameters(remove_duplicate=False))
    # Of tied parameters the file holds one.
    given = {id(named[name]) for name in tensors.keys() & named.keys()}
    if any(id(p) not in given for p in named.values()):
        raise SettingError(f"{exported} is of another model than --base {base}")
    try:
        model.load_state_dict(tensors, strict=False)
    except RuntimeError as error:  # other shapes
        raise SettingError(f"{exported} is of another model than --base {base}") from error
    made.save(model, out)


def main() -> None:
    """Read the command line and convert."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, metavar="MODEL.safetensors")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write")
    parser.add_argument("--base", required=True, metavar="DIR|hf://ORG/NAME")
    args = parser.parse_args()
    if args.out.exists() and not (args.out.is_dir() and not any(args.out.iterdir())):
        sys.exit(f"{parser.prog}: {args.out} is not an empty folder; name a new one")
    try:
        convert(args.model, args.out, base=args.base)
    except (SettingError, RunError, OSError, safetensors.SafetensorError) as error:
        sys.exit(f"{parser.prog}: {error}")
    print(args.out)


if __name__ == "__main__":
    main()
