"""What codecs take of memory, measured in a process whose allocator gives all back at once.

`python -m shoal.node.bench._footprint` is that process: a question on stdin, a line for each case.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence

from shoal.node.bench._cases import Case, label
from shoal.node.bench._ends import apply, empty_ledger, encode
from shoal.node.bench._memory import extra
from shoal.node.bench._report import say
from shoal.node.bench._vectors import SCALE, matrices

Footprints = dict[tuple[str, int], tuple[float | None, float | None]]
"""By codec and size: the most extra memory of encoding and of decoding, in tensors."""


def footprints(cases: Sequence[Case], sizes: Sequence[int], args: argparse.Namespace) -> Footprints:
    """Ask such a process; what it did not come to is missing."""
    say("measuring memory in a process of its own")
    question = {"cases": cases, "sizes": sizes, "threads": args.threads, "device": args.device}
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    done = subprocess.run(
        [sys.executable, "-m", "shoal.node.bench._footprint"],
        input=json.dumps(question),
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    found: Footprints = {}
    for line in done.stdout.splitlines():
        name, size, encoding, decoding = json.loads(line)
        found[name, size] = encoding, decoding
    if done.returncode:  # such as out of memory: the rest can still be measured
        said = done.stderr.strip().splitlines() or ["it said nothing"]
        say(f"memory was not measured to the end: {said[-1]}")
    return found


def main() -> None:
    """Be that process."""
    import torch

    from shoal.compression import codec

    question = json.load(sys.stdin)
    device = question["device"]
    torch.set_num_threads(question["threads"])
    for size in question["sizes"]:
        x_D = torch.randn(size, generator=torch.Generator().manual_seed(size)).mul_(SCALE)
        x_D, ledger = x_D.to(device), empty_ledger(size, device)
        left_D = x_D.clone()
        for name, options in question["cases"]:
            part = codec.make(name, options, shapes=matrices(size))
            # The first time compiles and loads: that memory is no tensor's.
            payload = encode(part, left_D.copy_(x_D))
            apply(part, payload, ledger)
            left_D.copy_(x_D)
            encoding = extra(lambda: encode(part, left_D), device)  # noqa: B023  run at once
            decoding = extra(lambda: apply(part, payload, ledger), device)  # noqa: B023
            tensors = [None if e is None else e / (4 * size) for e in (encoding, decoding)]
            print(json.dumps([label((name, options)), size, *tensors]), flush=True)


if __name__ == "__main__":
    main()
