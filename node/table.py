"""How numbers look to people, and two tables: the swarm as one peer sees it, and N daemons."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from shoal.node.status import PeerRow, Status, headline

if TYPE_CHECKING:
    from rich.console import Group, RenderableType
    from rich.table import Table

BAR = 12
"""Width of a progress bar, characters."""


# ---------------------------------------------------------------- numbers


def size(count: float) -> str:
    """Return bytes as people say them: "999 B", "1.5 kB", "21 MB"."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 9.95 else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def seconds(value: float | None) -> str:
    """Return a duration: "350 ms", "12 s", "3:05 min", "2:07 h"; "–" when unknown."""
    if value is None:
        return "–"
    if value < 0.9995:
        return f"{1000 * value:.0f} ms"
    if value < 60:
        return f"{value:.0f} s"
    minutes, rest = divmod(round(value), 60)
    if minutes < 60:
        return f"{minutes}:{rest:02} min"
    return f"{minutes // 60}:{minutes % 60:02} h"


def number(value: float | None, digits: int = 3) -> str:
    """Return a measure with fixed digits; "–" when unknown."""
    return "–" if value is None else f"{value:.{digits}f}"


def times(value: float | None) -> str:
    """Return a ratio: "212 ×", "3.1 ×"; "–" when unknown."""
    if value is None:
        return "–"
    return f"{value:.0f} ×" if value >= 10 else f"{value:.1f} ×"


def brief(peer: str) -> str:
    """Return the end of a peer id: its beginning is the same for all."""
    return peer[-6:]


def turns(turn: int, of: int) -> str:
    """Return "12/40", or "12" when the run has no end."""
    return f"{turn}/{of}" if of else str(turn)


def bar(turn: int, of: int, width: int = BAR) -> str:
    """Return a progress bar; empty when the run has no end."""
    if not of:
        return ""
    full = round(width * min(turn, of) / of)
    return "━" * full + "─" * (width - full)


def verdict(agrees: bool | None) -> str:
    """Return what is known about agreement in one word."""
    return {True: "agrees", False: "DIFFERS", None: "–"}[agrees]


# ---------------------------------------------------------------- the swarm seen by one peer


def overview(status: Status, peers: Sequence[PeerRow]) -> "list[RenderableType]":
    """Return what `shoal status` shows, from top to bottom."""
    from rich.text import Text

    parts: list[RenderableType] = [Text.assemble(*_heading(status))]
    parts += [
        Text(f"join: shoal join {address}", style="cyan", overflow="fold")
        for address in status.join
    ]
    parts.append(_peers(status, peers))
    parts += [Text(line) for line in facts(status)]
    parts += [Text(f"warning: {warning}", style="yellow") for warning in status.warnings]
    return parts


def _heading(status: Status) -> list[tuple[str, str]]:
    style = {"diverged": "bold red", "degraded": "bold yellow"}.get(status.state, "bold green")
    turn = turns(status.turn, status.turns)
    return [
        (status.name, "bold"),
        (f"  {headline(status)}", style),
        (f"  turn {turn}  {bar(status.turn, status.turns)}", ""),
    ]


def facts(status: Status) -> list[str]:
    """Return the lines under the table."""
    worker = status.worker
    memory = "" if worker.memory is None else f", {size(worker.memory)}"
    running = f"pid {worker.pid} on {worker.device or '?'}{memory}" if worker.pid else "not running"
    restarts = f", restarted {worker.restarts} ×" if worker.restarts else ""
    return [
        f"model: {number(status.evaluation)} {status.unit} held out, {status.parameters:,} "
        f"parameters, fingerprint {status.fingerprint or '–'}, swarm {verdict(status.agrees)}",
        f"ledger: {status.frontier.updates} updates of {status.frontier.authors} authors, "
        f"lag {status.lag}",
        f"bytes: {size(status.sockets.bytes_out)} out, {size(status.sockets.bytes_in)} in; "
        f"updates {times(status.compression)} smaller than float32 gradients at every step",
        f"worker: {running}{restarts}; "
        f"{number(status.steps_per_second, 2)} steps/s, {status.steps} steps",
        f"daemon: {size(status.memory)}, up {seconds(status.uptime)}, libp2p {status.libp2p}, "
        f"version {status.version}",
    ]


def _peers(status: Status, peers: Sequence[PeerRow]) -> "Table":
    table = _table("peer", "state", "turn", "loss", status.unit or "held out", "sent", "rtt", "")
    for row in peers:
        table.add_row(
            brief(row.id) + (" *" if row.me else ""),
            row.standing if row.state == "alive" and row.standing else row.state,
            turns(row.turn, status.turns),
            number(row.loss),
            number(row.evaluation),
            "–" if row.bytes_out is None else size(row.bytes_out),
            "" if row.me else seconds(row.rtt),
            verdict(row.agrees),
            style=_style(row.state),
        )
    return table


def _style(state: str) -> str:
    return {"alive": "", "suspected": "yellow", "failed": "red", "left": "dim"}.get(state, "")


# ---------------------------------------------------------------- N daemons of one machine


def daemons(rows: Sequence[Status | None], unit: str, footer: Sequence[str]) -> "Group":
    """Return what `shoal swarm` shows while it runs; None stands for a daemon that is silent."""
    from rich.console import Group
    from rich.text import Text

    heads = ("peer", "state", "turn", "", "loss", unit or "held out", "steps/s", "sent", "model")
    table = _table(*heads)
    marks = same({status.fingerprint for status in rows if status is not None})
    for place, status in enumerate(rows, start=1):
        if status is None:
            table.add_row(str(place), "silent", style="red")
            continue
        table.add_row(
            str(place),
            headline(status),
            turns(status.turn, status.turns),
            bar(status.turn, status.turns),
            number(status.loss),
            number(status.evaluation),
            number(status.steps_per_second, 1),
            size(status.sockets.bytes_out),
            f"{status.fingerprint[:8]}{marks}",
        )
    return Group(table, *(Text(line, overflow="fold") for line in footer))


def same(fingerprints: set[str]) -> str:
    """Return a mark when all fingerprints are one."""
    return " =" if len(fingerprints) == 1 and "" not in fingerprints else ""


def line(rows: Sequence[Status | None], unit: str, elapsed: float) -> str:
    """Return the same in one plain line, for logs and pipes."""
    seen = [status for status in rows if status is not None]
    if not seen:
        return f"{seconds(elapsed):>8}  nobody answers yet"
    first, last = min(s.turn for s in seen), max(s.turn for s in seen)
    turn = turns(last, seen[0].turns) if first == last else f"{first}-{turns(last, seen[0].turns)}"
    losses = [s.loss for s in seen if s.loss is not None]
    measured = [s.evaluation for s in seen if s.evaluation is not None]
    return (
        f"{seconds(elapsed):>8}  {len(seen)} peers  turn {turn}"
        f"  loss {number(_mean(losses))}  {unit or 'held out'} {number(_mean(measured))}"
        f"  sent {size(sum(s.sockets.bytes_out for s in seen))} in all  {_models(seen)}"
    )


def _models(seen: Sequence[Status]) -> str:
    fingerprints = {status.fingerprint for status in seen}
    if same(fingerprints):
        return "one model"
    models = len(fingerprints - {""})
    return f"{models} models in flight" if models > 1 else "not all have a model"


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _table(*heads: str) -> "Table":
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for place, head in enumerate(heads):
        table.add_column(head, justify="left" if place < 2 or not head else "right", no_wrap=True)
    return table
