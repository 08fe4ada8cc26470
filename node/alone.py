"""One peer alone: the same task, shard, optimizer, schedule and steps, and nobody to learn from.

The yardstick of `shoal swarm --baseline`. It trains in a process of its own, so that the command
never imports torch; that process also measures the swarm's exported model on the same held-out
data, so that both numbers are made by the same code.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from shoal.node.errors import ConfigError


def compare(
    run_file: Path,
    *,
    peers: int,
    steps: int,
    turns: int,
    threads: int,
    extra: tuple[str, ...],
    model: Path | None,
) -> tuple[float, float | None]:
    """Return the held-out measures of one peer alone and of the exported model.

    Its `steps` are those of so many turns of the swarm; 0: of all that the run has.
    """
    argv = [sys.executable, "-m", "shoal.node.alone", str(run_file), f"0/{peers}", str(steps)]
    argv += ["--turns", str(turns), "--threads", str(threads)]
    argv += ["--model", str(model)] if model else []
    done = subprocess.run([*argv, *extra], capture_output=True, text=True, check=False)
    if done.returncode:
        said = done.stderr.strip().splitlines() or ["it said nothing"]
        raise ConfigError(f"training one peer alone failed: {said[-1]}")
    answer = json.loads(done.stdout.splitlines()[-1])
    return answer["alone"], answer["together"]


# ---------------------------------------------------------------- the child's side: with torch


def _main() -> None:
    import argparse
    import time

    from shoal.node.config import parse_shard, parse_size, read_toml
    from shoal.training.run import RunSpec
    from shoal.training.trainer import Setup, Trainer

    parser = argparse.ArgumentParser()
    parser.add_argument("run_file", type=Path)
    parser.add_argument("shard", type=parse_shard)
    parser.add_argument("steps", type=int)
    parser.add_argument("--turns", type=int, default=0)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--data")
    parser.add_argument("--base")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--device-memory", default="")
    parser.add_argument("--allow-task")
    args = parser.parse_args()
    setup = Setup(
        run=RunSpec.parse(read_toml(args.run_file), allow_task=args.allow_task),
        data=args.data,
        base=args.base,
        shard=args.shard,
        device=args.device,
        device_memory=parse_size(args.device_memory),
        threads=args.threads,
        allow_task=args.allow_task,
    )
    trainer = Trainer(setup, clock=time.monotonic)
    alone = trainer.alone(args.steps, args.turns)
    together = None if args.model is None else _measure(trainer, args.model)
    print(json.dumps({"alone": alone, "together": together}))


def _measure(trainer: Any, model: Path) -> float:
    import safetensors.torch

    measured: float = trainer.measure(safetensors.torch.load_file(model))
    return measured


if __name__ == "__main__":
    _main()
