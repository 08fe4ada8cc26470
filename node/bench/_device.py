"""The device and the threads that a benchmark computes with."""

import argparse

from shoal.node.errors import ConfigError


def add_device(parser: argparse.ArgumentParser) -> None:
    """Add the flags of threads and device."""
    parser.add_argument("--threads", type=int, default=2, metavar="N", help="(default: 2)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")


def take_device(args: argparse.Namespace) -> None:
    """Check both flags, and let torch use so many threads."""
    import torch

    check_device(args.device)
    if args.threads < 1:
        raise ConfigError(f"--threads {args.threads} is not a whole number above zero")
    torch.set_num_threads(args.threads)


def check_device(device: str) -> None:
    """Refuse what torch cannot compute on here; raises ConfigError."""
    import torch

    if device != "cpu" and not device.startswith("cuda"):
        raise ConfigError(f"--device {device}: use cpu or cuda")
    if device != "cpu" and not torch.cuda.is_available():
        raise ConfigError(f"--device {device}: torch sees no CUDA here; use cpu")


def device_name() -> str:
    """Return what CUDA calls its device."""
    import torch

    return str(torch.cuda.get_device_name())


def wait(device: str) -> None:
    """Wait until the device has done all that it was told."""
    if device.startswith("cuda"):
        import torch

        torch.cuda.synchronize()
