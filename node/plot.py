"""Lines and points as a PNG (matplotlib) and as text for a terminal (plotext): `shoal[plot]`.

Both libraries are imported when something is drawn, so that everything else does without them.
"""

import importlib
import itertools
import math
import os
import string
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shoal.node.errors import ConfigError

MARKERS = string.ascii_lowercase + string.ascii_uppercase + string.digits
"""One sign for each line, so that a plot needs no colours to be read."""


@dataclass(frozen=True, slots=True)
class Line:
    """Named points, joined in their order unless `joined` is false."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    joined: bool = True


@dataclass(frozen=True, slots=True)
class Panel:
    """Lines over the same two axes."""

    x: str
    """What the horizontal axis shows, with its unit."""
    y: str
    lines: Sequence[Line]
    title: str = ""
    log_x: bool = False
    """On a logarithmic axis values that are not above zero are left out."""
    log_y: bool = False


def png(path: Path, panels: Sequence[Panel]) -> None:
    """Write the panels beside each other; lines of one name have one colour in all of them.

    Raises ConfigError without matplotlib, or when `path` cannot be written.
    """
    check()
    matplotlib = importlib.import_module("matplotlib")
    figure_class = importlib.import_module("matplotlib.figure").Figure
    canvas = importlib.import_module("matplotlib.backends.backend_agg").FigureCanvasAgg
    names = list(dict.fromkeys(line.name for panel in panels for line in panel.lines))
    colours = matplotlib.colormaps["tab20" if len(names) > 10 else "tab10"].colors
    styles = dict(zip(names, itertools.cycle(colours), strict=False))
    shapes = dict(zip(names, itertools.cycle("osD^vPX*"), strict=False))
    figure: Any = figure_class(figsize=(6.5 * len(panels), 5.0), layout="constrained")
    canvas(figure)
    for place, panel in enumerate(panels, start=1):
        axes = figure.add_subplot(1, len(panels), place)
        for line in panel.lines:
            x, y = _drawable(panel, line)
            style = {"color": styles[line.name], "label": line.name, "marker": shapes[line.name]}
            axes.plot(x, y, linestyle="-" if line.joined else "none", markersize=5, **style)
            if not line.joined:
                for point in zip(x, y, strict=True):
                    axes.annotate(
                        line.name, point, (4, 4), textcoords="offset points", fontsize="x-small"
                    )
        axes.set(xlabel=panel.x, ylabel=panel.y, title=panel.title)
        axes.set_xscale("log" if panel.log_x else "linear")
        axes.set_yscale("log" if panel.log_y else "linear")
        axes.grid(alpha=0.3)
        joined = any(line.joined for line in panel.lines)  # single points have their names beside
        if place == len(panels) and len(names) > 1 and joined:
            axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5))
    try:
        figure.savefig(path, dpi=120, format="png")
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}; name another file") from error


def text(panel: Panel, *, width: int = 80, height: int = 22, colour: bool = False) -> str:
    """Return the panel as lines of characters, each line with a letter; the letters are below.

    Without `colour` there are no escape codes. Raises ConfigError without plotext.
    """
    check()
    plotext = importlib.import_module("plotext")
    drawn = [(line, *_drawable(panel, line)) for line in panel.lines]
    if not any(x for _, x, _ in drawn):
        return "(nothing to draw)"
    figure = plotext.figure
    figure.clear()
    figure.theme("default" if colour else "colorless")
    figure.plot_size(width, height)
    figure.title(panel.title)
    figure.label(panel.x, "x")
    figure.ruler("x").scale("log" if panel.log_x else "linear")
    figure.ruler("y").scale("log" if panel.log_y else "linear")
    for letter, (line, x, y) in zip(itertools.cycle(MARKERS), drawn, strict=False):
        if x:
            signal = figure.signal(x, y, marker=letter)
            figure.draw(signal.lines() if line.joined and len(x) > 1 else signal)
    lines = [row.rstrip() for row in figure.build().string(colorless=not colour).splitlines()]
    names = zip(itertools.cycle(MARKERS), (line.name for line in panel.lines), strict=False)
    return "\n".join([panel.y, *lines, *(f"  {letter}  {name}" for letter, name in names)])


def columns() -> int:
    """Return how wide a plot may be where this process prints to."""
    try:
        return max(60, min(120, os.get_terminal_size().columns))
    except OSError:
        return 80


def check() -> None:
    """Raise ConfigError if the libraries are not there: best before the work that is drawn."""
    for name in ("matplotlib", "plotext"):
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise ConfigError(f"{name} is needed to draw: pip install 'shoal[plot]'") from error


def _drawable(panel: Panel, line: Line) -> tuple[list[float], list[float]]:
    """Return the points that the panel's axes can show."""
    points = [
        (float(x), float(y))
        for x, y in zip(line.x, line.y, strict=True)
        if math.isfinite(x)
        and math.isfinite(y)
        and (x > 0 or not panel.log_x)
        and (y > 0 or not panel.log_y)
    ]
    return [x for x, _ in points], [y for _, y in points]
