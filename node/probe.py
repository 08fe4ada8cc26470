"""What `shoal doctor` finds out in processes of its own, where torch and libp2p may crash or hang.

`python -m shoal.node.probe WHAT JSON` prints one JSON object on its last line. `ask` is the
parent's side: it always returns a dict, with the key `error` when something went wrong.
"""

import json
import subprocess
import sys
from collections.abc import Callable
from math import lcm
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from shoal.training.tables import Local
    from shoal.training.trainer import Trainer
    from shoal.training.turn import Turned

STEPS = 2
"""Steps of a trial turn."""
CYCLE = 1000
"""Turns looked at for how kinds of update take turns."""
TURNS = 6
"""Trial turns of a kind; the fastest counts: the first pays for what torch sets up, others for
neighbours."""
BUDGET = 10.0
"""Seconds for all trial turns of a kind after the second."""
LONGEST = {"torch": 120.0, "libp2p": 120.0, "run": 300.0}
"""Seconds after which a probe is given up."""
STARTING = 90.0
"""Seconds that libp2p may take to start: what it imports takes long on a busy machine."""


def ask(what: str, **given: object) -> dict[str, Any]:
    """Run a probe in a child process and return what it says."""
    argv = [sys.executable, "-m", "shoal.node.probe", what, json.dumps(given)]
    longest = LONGEST[what]
    try:
        done = subprocess.run(
            argv, capture_output=True, text=True, check=False, timeout=longest, errors="replace"
        )
    except subprocess.TimeoutExpired:
        return {"error": f"no answer within {longest:.0f} s"}
    except OSError as error:
        return {"error": f"can't start a process: {error.strerror}"}
    try:
        answer = json.loads(done.stdout.splitlines()[-1])
        if isinstance(answer, dict):
            return answer
    except (ValueError, IndexError):
        pass
    said = done.stderr.strip().splitlines() or [f"it ended with code {done.returncode}"]
    return {"error": said[-1][:300]}


# ---------------------------------------------------------------- the child's side


def torch_here(device: str) -> dict[str, Any]:
    """Say which torch this is, which devices it has, and whether the one asked for works."""
    import torch

    found = {
        "version": torch.__version__,
        "threads": torch.get_num_threads(),
        "cuda": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "cuda_build": torch.version.cuda,
        "muon": hasattr(torch.optim, "Muon"),
    }
    if device in {"", "auto"}:
        device = "cuda" if found["cuda"] else "cpu"
    try:
        sum_of_ones = torch.ones(64, 64, device=device).matmul(torch.ones(64, 64, device=device))
        works = float(sum_of_ones[0, 0]) == 64.0
        return {**found, "device": device, "works": works}
    except (RuntimeError, AssertionError) as error:  # a driver too old, no such device, no memory
        text = str(error).strip() or "?"
        return {**found, "device": device, "works": False, "why": text.splitlines()[0]}


def libp2p_here() -> dict[str, Any]:
    """Start libp2p on any port, without mDNS, and say how that went."""
    import asyncio
    import secrets
    import time

    from shoal.node.transport.libp2p.finder import Finder
    from shoal.node.transport.libp2p.settings import FinderSettings

    async def start() -> str:
        # A swarm of our own that nobody else is in.
        finder = Finder(
            FinderSettings(
                identity=secrets.token_bytes(32), seed=secrets.token_bytes(32), mdns=False
            )
        )
        finder.start()
        until = time.monotonic() + STARTING
        while finder.state == "starting" and time.monotonic() < until:
            await asyncio.sleep(0.05)
        said = finder.state
        await finder.stop()
        return said

    return {"state": asyncio.run(start())}


def run_here(
    tables: dict[str, Any],
    members: int,
    data: str,
    device: str,
    allow_task: str,
    base: str = "",
    device_memory: int = 0,
) -> dict[str, Any]:
    """Build the run, take short turns of each kind, and apply their updates: what a turn costs.

    Where the kinds take turns, numbers are means over turns, and seconds of a step over steps.
    """
    import dataclasses
    import time

    from shoal.compression.settings import SettingError
    from shoal.training.method import TrainingError
    from shoal.training.run import RunError, RunSpec
    from shoal.training.trainer import Setup, Trainer

    try:
        spec = RunSpec.parse(tables, allow_task=allow_task or None)
        short = dataclasses.replace(spec.local, steps=STEPS, evaluate_every=0)
        setup = Setup(
            run=dataclasses.replace(spec, local=short),
            data=data or None,
            base=base or None,
            device=device or "auto",
            device_memory=device_memory,
            allow_task=allow_task or None,
        )
        trainer = Trainer(setup, clock=time.monotonic)
        founding = trainer.founding()
        costs = [
            (share, _cost(trainer, turns, members, spec.local, time.monotonic))
            for share, turns in _turns_by_plane(trainer)
        ]
    except (SettingError, RunError, TrainingError) as error:
        return {"error": str(error)}
    rule = trainer.exchange.ledger.rule
    steps = sum(share * cost.steps for share, cost in costs)
    return {
        "quorum": getattr(rule, "quorum", 0) if rule.along else 0,
        "parameters": founding.parameters,
        "kind": " or ".join(dict.fromkeys(cost.kind for _, cost in costs)),
        "payload": round(sum(share * cost.payload for share, cost in costs)),
        "most": max(founding.most_bytes.values()),
        "step_seconds": sum(share * cost.steps * cost.step for share, cost in costs) / steps,
        "encode_seconds": sum(share * cost.encode for share, cost in costs),
        "apply_seconds": sum(share * cost.apply for share, cost in costs),
        "steps": round(steps),
        "participation": spec.exchange.participation,
    }


class _Cost(NamedTuple):
    """What turns of one kind cost. Seconds and bytes."""

    kind: str
    payload: float
    """Mean of the trial turns'."""
    steps: int
    """Of a whole turn."""
    step: float
    encode: float
    apply: float


def _turns_by_plane(trainer: "Trainer") -> list[tuple[float, list[int]]]:
    """Return of each kind of update its share of the turns, and the first of them."""
    rules = trainer.exchange.rules
    # Longer cycles are cut off: what has one turn in so many costs next to nothing.
    cycle = min(CYCLE, lcm(*(plane.every for plane in rules.planes)))
    found: dict[int, list[int]] = {}
    for turn in range(1, cycle * TURNS + 1):
        found.setdefault(rules.plane(turn), []).append(turn)
    return [(len(t) / (cycle * TURNS), t[:TURNS]) for _, t in sorted(found.items())]


def _cost(
    trainer: "Trainer",
    turns: list[int],
    members: int,
    local: "Local",
    clock: Callable[[], float],
) -> _Cost:
    """Take these turns, and apply the last update; raises RunError if that one was dropped."""
    from shoal.compression.codec import Directed
    from shoal.training.exchange import Arrived
    from shoal.training.run import RunError

    trials = _try_turns(trainer, turns, members, clock)
    turned = trials[-1][0]
    if turned.payload is None:
        raise RunError(f"the update of a trial turn was dropped: {turned.dropped}")
    applying = []
    for number in range(1, 4):
        update = Arrived(
            (bytes(32), turns[0], number),
            turns[0],
            turned.kind,
            turned.payload,
            len(turned.payload),
        )
        began = clock()
        trainer.apply([update])
        applying.append(clock() - began)
    step = min(trial.seconds / max(1, trial.steps) for trial, _ in trials)
    codec = trainer.exchange.rules.fragment(turns[0]).codec
    steps = turned.steps if isinstance(codec, Directed) else local.steps
    if not steps:
        fitting = round(local.turn_seconds / max(step, 1e-6))
        steps = max(local.min_steps, min(local.max_steps, fitting))
    sizes = [len(trial.payload) for trial, _ in trials if trial.payload is not None]
    return _Cost(
        kind=turned.kind,
        payload=sum(sizes) / len(sizes),
        steps=steps,
        step=step,
        encode=min(rest for _, rest in trials),
        apply=min(applying),
    )


def _try_turns(
    trainer: "Trainer", turns: list[int], members: int, clock: Callable[[], float]
) -> "list[tuple[Turned, float]]":
    """Return trial turns, each with the seconds that it spent on anything but its steps."""
    trials: list[tuple[Turned, float]] = []
    began = clock()
    for turn in turns:
        if len(trials) >= 2 and clock() - began > BUDGET:
            break
        at = clock()
        turned = trainer.turn(turn, members)
        trials.append((turned, max(0.0, clock() - at - turned.seconds)))
        trainer.discard()
    return trials


def _main() -> None:
    what, given = sys.argv[1], json.loads(sys.argv[2])
    probes: dict[str, Callable[..., dict[str, Any]]] = {
        "torch": torch_here,
        "libp2p": libp2p_here,
        "run": run_here,
    }
    print(json.dumps(probes[what](**given)))


if __name__ == "__main__":
    _main()
