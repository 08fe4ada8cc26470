"""Options of parts: fill in defaults, check types, name the nearest known key. No torch.

A *part* is a dataclass or any callable; its parameters are its options. `fill` turns what a run
file says into a complete plain dict (what the genesis stores), `build` turns that into the part.
"""

import dataclasses
import difflib
import inspect
import math
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

T = TypeVar("T")


class SettingError(ValueError):
    """What the operator asked for cannot be had; the message says what to change."""


def unknown(what: str, word: str, known: Iterable[str]) -> SettingError:
    """Return the error for an unknown name, with the nearest known one."""
    names = sorted(known)
    near = difflib.get_close_matches(word, names, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(names) or 'none'}"
    return SettingError(f"unknown {what} {word!r}; {hint}")


def parameters(part: Callable[..., object], skip: int = 0) -> list[inspect.Parameter]:
    """Return the named parameters of `part` after its first `skip`."""
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    found = list(inspect.signature(part).parameters.values())[skip:]
    return [p for p in found if p.kind not in variadic]


def fill(
    part: Callable[..., object], given: Mapping[str, Any], *, where: str, skip: int = 0
) -> dict[str, Any]:
    """Return every option of `part` as plain data: what is given, else its default.

    `skip` parameters at the front are not options (what the caller passes itself).
    """
    options = {p.name: p for p in parameters(part, skip)}
    free = any(
        p.kind is inspect.Parameter.VAR_KEYWORD for p in inspect.signature(part).parameters.values()
    )
    for name in given:
        if name not in options and not free:
            raise unknown(f"setting of {where}:", name, options)
    hints = _hints(part)
    filled = {name: value for name, value in given.items() if name not in options}
    for name, option in options.items():
        here = f"{where}.{name}"
        if name in given:
            filled[name] = _plain(given[name], hints.get(name, Any), here)
        elif option.default is not inspect.Parameter.empty:
            filled[name] = _plain_default(option.default)
        else:
            raise SettingError(f"{here} is missing; set it in the run file")
    return filled


def build(part: Callable[..., T], filled: Mapping[str, Any], *before: object, where: str) -> T:
    """Return the part made from filled options; its own complaints become `SettingError`."""
    hints = _hints(part)
    arguments = {name: _made(value, hints.get(name, Any), where) for name, value in filled.items()}
    try:
        return part(*before, **arguments)
    except SettingError:
        raise
    except ValueError as error:
        raise SettingError(f"{where}: {error}") from error


def _hints(part: Callable[..., object]) -> dict[str, Any]:
    plain_class = inspect.isclass(part) and not dataclasses.is_dataclass(part)
    try:
        return typing.get_type_hints(part.__init__ if plain_class else part)
    except (NameError, TypeError):  # a stranger's annotations need not resolve
        return {}


def _plain(value: Any, hint: Any, where: str) -> Any:
    """Check `value` against `hint` and return it as plain data."""
    if (_is_part(hint) or typing.get_origin(hint) is dict) and not isinstance(value, Mapping):
        raise SettingError(f"{where} must be a table, got {value!r}")
    if _is_part(hint):
        filled = fill(hint, value, where=where)
        build(hint, filled, where=where)
        return filled
    alternatives = typing.get_args(hint) if _is_union(hint) else (hint,)
    if any(_fits(value, kind) for kind in alternatives):
        if float in alternatives and type(value) is int:
            try:
                return float(value)
            except OverflowError:
                raise SettingError(f"{where} is too large; use a smaller number") from None
        if isinstance(value, float) and not math.isfinite(value):
            raise SettingError(f"{where} = {value!r}; use a finite number")
        return value
    wanted = " or ".join(getattr(a, "__name__", str(a)) for a in alternatives)
    raise SettingError(f"{where} must be {wanted}, got {value!r}")


def _plain_default(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    return value


def _made(value: Any, hint: Any, where: str) -> Any:
    return build(hint, value, where=where) if _is_part(hint) else value


def _is_part(hint: Any) -> bool:
    return isinstance(hint, type) and dataclasses.is_dataclass(hint)


def _is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (typing.Union, types.UnionType)


def _fits(value: object, kind: Any) -> bool:
    if kind is Any or not isinstance(kind, type):
        return True
    if isinstance(value, bool):
        return kind in (bool, object)
    if kind is float:
        return isinstance(value, int | float)
    return isinstance(value, kind)
