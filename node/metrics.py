"""What is counted: named counters with one label each. (Bytes on the sockets: traffic.py.)"""

from collections.abc import Iterator, Mapping

FAMILIES = {
    "dropped": ("reason", "What others sent and we did not take, by reason."),
    "turned_away": ("reason", "Frames, transfers and links that were refused, by reason."),
    "gossip": ("what", "What the gossip core did not take, delayed or noticed, by reason."),
    "refused_updates": ("reason", "Genuine updates that count zero, by the rule they break."),
    "bytes_in": ("kind", "Bytes received before TLS, by kind."),
    "bytes_out": ("kind", "Bytes sent before TLS, by kind."),
    "pulls": ("result", "Payloads pulled, by how it ended."),
    "updates": ("whose", "Updates taken into the ledger: own and others'."),
    "turns": ("result", "Own turns, by how they ended."),
    "skipped_steps": ("reason", "Own local steps that taught nothing, by reason."),
    "events": ("what", "Events, by kind."),
    "worker_restarts": ("reason", "How often the worker had to be started again."),
    "http": ("status", "Requests to the status port, by status code."),
}
"""name -> (label, help): the counters that exist. Prometheus sees `shoal_<name>_total`."""

LABELS = 64
"""Different labels per counter; further ones are counted together as "other"."""


class Counters:
    """Counters that only grow. Names are fixed above: a wrong one is our bug and raises."""

    def __init__(self) -> None:
        self._values: dict[str, dict[str, int]] = {name: {} for name in FAMILIES}

    def add(self, name: str, label: str, amount: int = 1) -> None:
        """Count `amount` more under `label`."""
        values = self._values[name]
        if label not in values and len(values) >= LABELS:
            label = "other"
        values[label] = values.get(label, 0) + amount

    def put(self, name: str, values: Mapping[str, int]) -> None:
        """State a counter that somebody else counts."""
        self._values[name] = dict(list(values.items())[:LABELS])

    def of(self, name: str) -> dict[str, int]:
        """Return a copy of one counter, by label."""
        return dict(self._values[name])

    def total(self, name: str) -> int:
        """Return one counter, summed over its labels."""
        return sum(self._values[name].values())

    def render(self) -> Iterator[str]:
        """Yield the lines of all counters in Prometheus' text format."""
        for name, (label, help_text) in FAMILIES.items():
            samples = {_label(label, value): n for value, n in self._values[name].items()}
            yield from render_family(f"shoal_{name}_total", "counter", help_text, samples)


def render_family(
    name: str, kind: str, help_text: str, samples: Mapping[str, float]
) -> Iterator[str]:
    """Yield one metric family in Prometheus' text format; keys of `samples` are label sets."""
    yield f"# HELP {name} {help_text}"
    yield f"# TYPE {name} {kind}"
    for labels, value in sorted(samples.items()):
        yield f"{name}{labels} {value:g}" if value != int(value) else f"{name}{labels} {int(value)}"


def _label(name: str, value: str) -> str:
    escaped = value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
    return f'{{{name}="{escaped}"}}'
