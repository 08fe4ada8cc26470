"""Triton's kernels: interpreted on the CPU, compiled for GPUs that are not here, and distrusted."""

import importlib.util
import os
import subprocess
import sys
import types
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from shoal.compression import perturbation

NAME = "shoal.compression.kernels_triton"
INTERPRETED = """
import random
import numpy as np, torch
from shoal.compression import kernels_triton as kernels, perturbation

assert perturbation._agrees(kernels, torch.device("cpu"))
chance = random.Random(1)
for case in range(25):
    size = chance.choice([1, 5, 63, 64, 65, 4095, 4096, 4097, chance.randrange(1, 20_000)])
    start = chance.choice([0, 1, 63, 64, 2**40 + 7, chance.randrange(10**9)])
    numbers = torch.Generator().manual_seed(case)
    K = chance.choice([1, 2, 3, 9])
    keys = torch.randint(-(2**63), 2**63 - 1, (K,), generator=numbers)
    a = torch.randint(-(2**31), 2**31, (K,), generator=numbers)
    x = torch.randint(-(2**31), 2**31, (size,), generator=numbers).to(torch.int32)
    ours, theirs = x.clone(), x.clone()
    perturbation.accumulate(ours, keys, a, start=start)
    kernels.accumulate(theirs, start, keys, -2 * a, int(a.sum().to(torch.int32)))
    assert torch.equal(ours, theirs), (case, size, start)
    along = perturbation.project(x, keys, start=start)
    assert torch.equal(along, kernels.project(x, start, keys)), (case, size, start)
    ours = torch.randn(size, generator=numbers)
    theirs = ours.clone()
    perturbation.perturb(ours, int(keys[0]) % 2**64, -0.1, start=start)
    kernels.perturb(theirs, start, keys[:1], int(np.float32(-0.1).view(np.int32)))
    assert torch.equal(ours, theirs), (case, size, start)
print("equal")
"""
COMPILED = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from shoal.compression import kernels_triton as kernels

LENGTHS = {"count": "i64", "first": "i64", "skip": "i32", "keys_k": "i32", "words": "constexpr"}
SIGNATURES = {
    "_accumulate": {"total": "*i32", "keys": "*i64", "change": "*i64", "base": "i32"},
    "_project": {"x": "*i32", "keys": "*i64", "found": "*i64"},
    "_perturb": {"x": "*fp32", "keys": "*i64", "step": "i32"},
}
for capability in (75, 80, 86, 90, 100):
    for name, own in SIGNATURES.items():
        kernel = getattr(kernels, name)
        every = {**LENGTHS, **own}
        source = ASTSource(
            fn=kernel,
            signature={argument: every[argument] for argument in kernel.arg_names},
            constexprs={"words": kernels.WORDS},
        )
        made = triton.compile(source, target=GPUTarget("cuda", capability, 32))
        assert made.asm["cubin"], (capability, name)
print("compiled")
"""


def run(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="needs triton, 1 GB: it comes with torch for CUDA, or by pip install triton",
)


@needs_triton
def test_interpreted_they_give_what_the_loops_give() -> None:
    assert run(INTERPRETED, TRITON_INTERPRET="1") == "equal\n"


@needs_triton
def test_they_compile_for_gpus_of_all_ages() -> None:
    assert run(COMPILED, TRITON_INTERPRET="0") == "compiled\n"


# ---------------------------------------------------------------- whether to trust them


class Kernels(types.ModuleType):
    """What torch computes, unless it is to be wrong."""

    def __init__(self, wrong: str = "", error: Exception | None = None) -> None:
        super().__init__(NAME)
        self.wrong, self.error = wrong, error

    def accumulate(self, total_D: Tensor, start: int, keys: Tensor, twice: Tensor, _: int) -> None:
        if self.error is not None:
            raise self.error
        a_K = (twice // -2).numpy() ^ (self.wrong == "accumulate")
        perturbation._accumulate(total_D, keys.numpy().view(np.uint64), a_K, start)

    def project(self, x_D: Tensor, start: int, keys: Tensor) -> Tensor:
        found_K = perturbation._project(x_D, keys.numpy().view(np.uint64), start)
        return found_K + (self.wrong == "project")

    def perturb(self, x_D: Tensor, start: int, keys: Tensor, bits: int) -> None:
        start += self.wrong == "perturb"
        perturbation._perturb(x_D, keys.numpy().view(np.uint64), bits, start)


@pytest.fixture
def found() -> Iterator[Any]:
    """Let there be such kernels, and look whether they are taken."""

    def look(kernels: types.ModuleType | None) -> Any:
        perturbation._triton.cache_clear()
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(sys.modules, NAME, kernels)  # None: it can't be imported
            return perturbation._triton(torch.device("cpu"))

    yield look
    perturbation._triton.cache_clear()


def test_kernels_that_agree_are_taken(found: Any) -> None:
    right = Kernels()
    assert found(right) is right


def test_without_triton_nothing_is_said(found: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert found(None) is None


@pytest.mark.parametrize("wrong", ["accumulate", "project", "perturb"])
def test_kernels_that_differ_are_left_and_that_is_said(wrong: str, found: Any) -> None:
    with pytest.warns(UserWarning, match="slower ones serve: they differ from torch"):
        assert found(Kernels(wrong)) is None


def test_kernels_that_do_not_compile_are_left_and_that_is_said(found: Any) -> None:
    with pytest.warns(UserWarning, match="RuntimeError: no C compiler"):
        assert found(Kernels(error=RuntimeError("no C compiler"))) is None
