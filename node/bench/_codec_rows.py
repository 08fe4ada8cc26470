"""What was measured of codecs: rows, their table and their pictures."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from shoal.node.bench._report import grid
from shoal.node.bench._vectors import INPUTS

if TYPE_CHECKING:
    from shoal.node.plot import Panel


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One codec on one vector."""

    codec: str
    input: str
    size: int
    bits: float
    """Per parameter, of the payload."""
    entropy: float
    """Bits per parameter of what the payload says."""
    error: float
    """|x - decoded|² / |x|²."""
    encode: float
    """Parameters per second, from the vector to payload and residual …"""
    encode_of_copy: float
    """… over the float32 per second that are copied here."""
    decode: float
    """From the payload to the sum in the ledger's integers and its fingerprint."""
    decode_of_copy: float
    encode_memory: float | None
    """Most memory in use meanwhile beyond vector and residual, which are one, in tensors of the
    vector's size; the payload is among it."""
    decode_memory: float | None


HEADS = (
    "codec",
    "input",
    "size",
    "bits",
    "entropy",
    "over",
    "error",
    "encode M/s",
    "of copy",
    "decode M/s",
    "of copy",
    "memory: encode",
    "decode",
)


def table(rows: Sequence[Row]) -> str:
    """Return the rows as text; bits are per parameter, memory counts tensors."""
    return grid(
        HEADS,
        [
            (
                row.codec,
                row.input,
                f"{row.size / 1e6:g}M",
                f"{row.bits:.4f}",
                f"{row.entropy:.4f}",
                f"{100 * (row.bits / row.entropy - 1):+.1f} %" if row.entropy else "–",
                f"{row.error:.3g}",
                f"{row.encode / 1e6:.0f}",
                f"{row.encode_of_copy:.3f}",
                f"{row.decode / 1e6:.0f}",
                f"{row.decode_of_copy:.3f}",
                "–" if row.encode_memory is None else f"{row.encode_memory:.2f} ×",
                "–" if row.decode_memory is None else f"{row.decode_memory:.2f} ×",
            )
            for row in rows
        ],
    )


def make_panels(rows: Sequence[Row]) -> "list[Panel]":
    """Return error and speed against bits, at the largest size, for the most real input."""
    from shoal.node.plot import Line, Panel

    size = max(row.size for row in rows)
    names = {row.input for row in rows}
    name = next(name for name in reversed(INPUTS) if name in names)
    shown = [row for row in rows if row.size == size and row.input == name]
    title = f"{name}, {size / 1e6:g} M parameters"

    def points(of: Callable[[Row], float]) -> list[Line]:
        return [Line(row.codec, [row.bits], [of(row)], joined=False) for row in shown]

    axis = "bits per parameter"
    return [
        Panel(axis, "|x - decoded|² / |x|²", points(lambda r: r.error), title, True, True),
        Panel(axis, "encode, parameters/s", points(lambda r: r.encode), title, True, True),
        Panel(axis, "decode and add, parameters/s", points(lambda r: r.decode), title, True, True),
    ]
