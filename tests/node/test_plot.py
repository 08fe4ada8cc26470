"""Lines and points as PNG and as text."""

import itertools
import re
import sys
from pathlib import Path

import pytest

from shoal.node import plot
from shoal.node.errors import ConfigError
from shoal.node.plot import Line, Panel

PANEL = Panel(
    "bits per parameter",
    "relative error",
    [
        Line("sparse, 1/64", [0.1, 1.0, 10.0], [0.9, 0.09, 0.009]),
        Line("dense", [1.6], [0.2], joined=False),
        Line("none of it", [0.0, float("nan")], [1.0, 1.0]),
    ],
    title="codecs",
    log_x=True,
    log_y=True,
)


def test_text_names_axes_and_lines_and_has_no_escape_codes() -> None:
    shown = plot.text(PANEL, width=60, height=16)
    rows = shown.splitlines()
    assert rows[0] == "relative error"
    assert rows[17:] == ["  a  sparse, 1/64", "  b  dense", "  c  none of it"]
    assert all(len(row) <= 60 for row in rows)
    assert "bits per parameter" in shown
    assert "codecs" in shown
    assert "\x1b" not in shown
    body = "\n".join(re.split("[│┤]", row)[1] for row in rows[3:14])
    assert body.count("b") == 1
    assert body.count("a") > 10
    assert "c" not in body
    assert "\x1b" in plot.text(PANEL, colour=True)


def test_logarithmic_axes_make_a_power_law_straight() -> None:
    """Each decade of x and of y takes equally much space."""
    rows = plot.text(PANEL, width=61, height=21).splitlines()
    inside = [re.split("[│┤]", row)[1] for row in rows[3:19]]
    columns = [row.index("a") for row in inside if "a" in row]
    steps = [b - a for a, b in itertools.pairwise(columns)]
    steps = steps[1:-1]  # the first and the last are cut off by the frame
    assert max(steps) - min(steps) <= 1


def test_nothing_to_draw_is_said() -> None:
    assert plot.text(Panel("x", "y", [Line("empty", [], [])])) == "(nothing to draw)"


def test_a_png_is_written(tmp_path: Path) -> None:
    plot.png(tmp_path / "two.png", [PANEL, PANEL])
    plot.png(tmp_path / "one.png", [PANEL])
    sizes = [
        int.from_bytes((tmp_path / name).read_bytes()[16:20], "big")  # IHDR's width
        for name in ("one.png", "two.png")
    ]
    assert (tmp_path / "two.png").read_bytes().startswith(b"\x89PNG\r\n")
    assert sizes[1] == 2 * sizes[0]
    with pytest.raises(ConfigError, match="name another file"):
        plot.png(tmp_path / "no" / "such.png", [PANEL])


@pytest.mark.parametrize("missing", ["matplotlib", "plotext"])
def test_without_the_libraries_it_says_what_to_install(
    missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ConfigError, match=r"pip install 'shoal\[plot\]'"):
        plot.text(PANEL)
