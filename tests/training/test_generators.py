"""Torch's own generators: what a seed gives, and that they are as before afterwards."""

import pytest
import torch

from shoal.training.generators import seeded

CPU = torch.device("cpu")
SEEDS = [0, 1, 2**31, 2**63 - 1]


def drawn(device: torch.device) -> list[torch.Tensor]:
    """Draw in every way that keeps something for the next: an odd number of normal ones."""
    made = [torch.randn(3, device=device), torch.rand(1000, device=device)]
    made.append(torch.nn.functional.dropout(torch.ones(99, device=device), 0.3))
    return [*made, torch.randperm(50, device=device), torch.randn(1), torch.randint(9, (7,))]


def check(device: torch.device) -> None:
    for seed in SEEDS:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            usual = drawn(device)
        before = torch.get_rng_state()
        with seeded(seed, device):
            found = drawn(device)
        assert all(map(torch.equal, found, usual))
        assert torch.equal(torch.get_rng_state(), before)


def fails() -> None:
    with seeded(3, CPU):
        torch.rand(1)
        raise KeyError


def test_a_seed_gives_what_torchs_own_gives_and_nothing_stays_behind() -> None:
    torch.randn(1)
    check(CPU)
    before = torch.get_rng_state()
    with pytest.raises(KeyError):
        fails()
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")
def test_a_device_is_seeded_as_well() -> None:
    device = torch.device("cuda")
    torch.randn(3, device=device)
    before = torch.cuda.get_rng_state(device)
    with seeded(5, device):
        torch.randn(3, device=device)
    assert torch.equal(torch.cuda.get_rng_state(device), before)
    check(device)
