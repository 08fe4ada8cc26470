"""Codecs and settings that are worth seeing side by side."""

from typing import Any

from shoal.node.errors import ConfigError

Case = tuple[str, dict[str, Any]]
"""A codec and its settings."""
CASES: list[Case] = [
    ("sparse", {}),
    ("sparse", {"bits": 2}),
    ("sparse", {"density": 1 / 16}),
    ("sparse", {"density": 1 / 4, "bits": 8}),
    ("dense", {}),
    ("dense", {"levels": 2}),
    ("dense", {"bits": 4}),
    ("dense", {"bits": 8}),
    ("topk", {}),
    ("topk", {"select": "threshold"}),
    ("topk", {"density": 0.05}),
    ("kmeans", {}),
    ("kmeans", {"density": 0.01}),
    ("fp4", {"format": "e3m0"}),
    ("fp4", {"format": "e2m1"}),
]
"""Settings worth seeing; codecs that are not here are measured with their defaults."""


def chosen_cases(text: str | None) -> list[Case]:
    """Return the cases of these codecs, or of all."""
    from shoal.compression import codec

    known = codec.names()
    wanted = known if text is None else text.split(",")
    if wrong := set(wanted) - set(known):
        raise ConfigError(f"--codecs: {min(wrong)!r} is none of {', '.join(known)}")
    listed = {name for name, _ in CASES}
    every = [*CASES, *((name, {}) for name in known if name not in listed)]
    return [(name, options) for name, options in every if name in wanted]


def label(case: Case) -> str:
    """Return a codec and its settings in a few words."""
    name, options = case
    return " ".join([name, *(f"{key} {_brief(value)}" for key, value in options.items())])


def _brief(value: object) -> str:
    if isinstance(value, float) and 0 < value < 1 and (1 / value).is_integer():
        return f"1/{1 / value:.0f}"
    return str(value)
