"""The run files that Shoal ships, by name. Standard library only: help texts list them."""

import tomllib
from importlib import resources
from importlib.resources.abc import Traversable
from typing import Any

_SUFFIX = ".toml"


def names() -> list[str]:
    """Return the names of the run files, sorted."""
    found = (item.name for item in _folder().iterdir())
    return sorted(name.removesuffix(_SUFFIX) for name in found if name.endswith(_SUFFIX))


def read(name: str) -> dict[str, Any]:
    """Return the tables of the run file of this name."""
    return tomllib.loads((_folder() / f"{name}{_SUFFIX}").read_text("utf-8"))


def _folder() -> Traversable:
    return resources.files("shoal.training") / "runs"
