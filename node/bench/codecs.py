"""What every codec costs and loses: `shoal bench codecs`.

Bits per parameter of real payloads beside the entropy of what they say, the error that stays
behind, speed beside this machine's own speed of copying, and memory beyond the tensors that are
there anyway. On Gaussian and heavy-tailed vectors, and on updates that this command records from
a peer that trains the built-in text run. Exit code 1 if the default sparse form takes more than
0.14 bits a parameter.

The entropy is that of the streams in the payload, each by itself: log2 C(n, k) for k places among
n (per chunk, where a codec has chunks), and the empirical order-0 entropy of all other symbols. A
code that sees several symbols at once comes below it where neighbours resemble each other, and so
do gaps between places where those lie close together.
"""

import argparse
import ctypes
import gc
import json
import math
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shoal.node.bench._report import add_json, grid, machine
from shoal.node.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from shoal.compression.codec import Codec, Shapes
    from shoal.node.plot import Panel
    from shoal.training.ledger import Ledger

Case = tuple[str, dict[str, Any]]
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
PLACES = ("place", "index", "rows")
"""What streams of increasing places are called where codecs unpack their payloads."""
INPUTS = ("gaussian", "heavy", "real")
MOST_BITS = 0.14
"""Per parameter, of the default sparse form (entropy 0.1307)."""
SCALE = 30_000.0
"""Standard deviation of made-up updates, in units of q: what text runs publish."""
REPEATS, LEAST_SECONDS = 3, 0.2
"""Timings are the best of so many, or of more until they took so long together."""
COPIED = 1 << 25
"""Elements in the yardstick: more than caches hold."""
SLAB = 1 << 22
"""Elements at a time where a sum needs float64."""


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


def register(parser: argparse.ArgumentParser) -> None:
    """Add the flags."""
    add_json(parser)
    parser.add_argument(
        "--sizes", default="1M,10M", metavar="N,…", help="parameters (default: 1M,10M)"
    )
    parser.add_argument("--codecs", metavar="NAME,…", help="only these (default: all)")
    parser.add_argument(
        "--inputs", default=",".join(INPUTS), metavar="NAME,…", help=f"of {', '.join(INPUTS)}"
    )
    parser.add_argument("--threads", type=int, default=2, metavar="N", help="(default: 2)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--png", type=Path, metavar="FILE", help="draw error and speed")
    parser.add_argument(
        "--quick", action="store_true", help="1 M parameters, a small model, one repetition"
    )


def run(args: argparse.Namespace) -> int:
    """Measure and show; 1 if the default sparse form is too long."""
    import torch

    from shoal.node import plot

    sizes = [1_000_000] if args.quick else parse_sizes(args.sizes)
    inputs, cases = chosen_inputs(args.inputs), chosen_cases(args.codecs)
    if args.png is not None:
        plot.check()
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(f"--device {args.device}: torch sees no CUDA here; use cpu")
    if args.threads < 1:
        raise ConfigError(f"--threads {args.threads} is not a whole number above zero")
    torch.set_num_threads(args.threads)
    memory = _memory(cases, sizes, args)
    vectors = _vectors(inputs, sizes, quick=args.quick)
    copied = copying(args.device)
    rows = [row for v in vectors for row in _measured(v, cases, memory, copied, args)]
    _show(rows, copied, args)
    return int(bool(too_long(rows)))


def parse_sizes(text: str) -> list[int]:
    """Read "1M,10M" or plain numbers."""
    found = []
    for word in text.split(","):
        factor = {"k": 1_000, "M": 1_000_000, "G": 1_000_000_000}.get(word[-1:], 1)
        try:
            size = int(float(word[:-1] if factor > 1 else word) * factor)
        except ValueError:
            size = 0
        if not 0 < size < 1 << 31:
            raise ConfigError(f"--sizes {text}: {word!r} is no size; say 1M,10M")
        found.append(size)
    return found


def chosen_inputs(text: str) -> list[str]:
    """Read the names of inputs."""
    found = text.split(",")
    if wrong := set(found) - set(INPUTS):
        raise ConfigError(f"--inputs: {min(wrong)!r} is none of {', '.join(INPUTS)}")
    return found


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


def too_long(rows: Iterable[Row]) -> list[Row]:
    """Return the rows in which the default sparse form breaks its promise."""
    promised = [row for row in rows if row.codec == "sparse" and row.input != "heavy"]
    return [row for row in promised if row.size >= 1_000_000 and row.bits > MOST_BITS]


# ---------------------------------------------------------------- vectors


@dataclass(frozen=True, slots=True)
class Vector:
    """An update to encode, in units of q."""

    input: str
    x_D: "Tensor"
    shapes: "Shapes"
    about: str = ""
    """How it came about, where the name does not say."""


def _vectors(inputs: Sequence[str], sizes: Sequence[int], *, quick: bool) -> Iterator[Vector]:
    import torch

    recorded = Recorded.make(quick=quick) if "real" in inputs else None
    for size in sizes:
        for name in inputs:
            generator = torch.Generator().manual_seed(size)
            x_D = torch.randn(0 if name == "real" else size, generator=generator)
            if name == "heavy":  # Student's t with 3 degrees of freedom, of variance 1
                squares_D = torch.zeros(size)
                for _ in range(3):
                    squares_D += torch.randn(size, generator=generator).square_()
                x_D /= squares_D.sqrt_()  # t = z / √(χ²/3), and its variance is 3
            if name == "real":
                assert recorded is not None
                yield recorded.vector(size)
            else:
                yield Vector(name, x_D.mul_(SCALE), _matrices(size))


def _matrices(size: int) -> "Shapes":
    """Return shapes for a vector without a model: square matrices, then what is left."""
    side = 1024 if size >= 1 << 23 else 256 if size >= 1 << 19 else 64
    whole, rest = divmod(size, side * side)
    return ((side, side),) * whole + (((rest,),) if rest else ())


@dataclass(frozen=True, slots=True)
class Recorded:
    """Updates of a peer of the text run: residual times weight, in units of q."""

    updates: "list[Tensor]"
    shapes: "Shapes"

    @classmethod
    def make(cls, *, quick: bool) -> "Recorded":
        """Train as one of four peers, a few turns, and keep what each of them would encode."""
        from shoal.compression import codec
        from shoal.node.swarm import adapt, read_run
        from shoal.training.exchange import Arrived
        from shoal.training.parameters import Parameters
        from shoal.training.run import RunSpec
        from shoal.training.trainer import Setup, Trainer

        turns, steps = (2, 4) if quick else (4, 8)
        print(f"recording {turns} updates of a text run", file=sys.stderr, flush=True)
        tables = adapt(read_run("text"), peers=4, turns=40)
        tables["task"]["model"] = {"layers": 6 if quick else 4, "width": 128 if quick else 256}
        tables["local"] |= {"steps": steps, "evaluate_every": 0}
        tables["exchange"] = {"update": {"kind": "sparse"}}
        spec = RunSpec.parse(tables)
        trainer = Trainer(Setup(run=spec, shard=(0, 4)), clock=time.monotonic)
        part = codec.make(spec.planes[0].update.name, spec.planes[0].update.options)
        updates = []
        for turn in range(1, turns + 1):
            turned = trainer.turn(turn, 4.0)
            if turned.payload is None:
                raise ConfigError(f"the text run did not train: {turned.dropped}")
            trainer.commit(1, turn)
            key, size = (b"recorded", 1, turn), len(turned.payload)
            trainer.apply([Arrived(key, turn, turned.kind, turned.payload, size)])
            residual_D = trainer.exchange.feedback.residual
            assert residual_D is not None
            sent = part.decode(turned.payload, trainer.parameters).dense()
            scale = 2.0**spec.exchange.quantum_bits / 4
            updates.append(residual_D * scale + sent)
        return cls(updates, Parameters(trainer.model).layout.shapes)

    def vector(self, size: int) -> Vector:
        """Return `size` elements: the last update, then those before it, then all again."""
        import torch

        each = len(self.updates[0])
        latest = self.updates[::-1]
        needed = -(-size // each)
        x_D = torch.cat([latest[i % len(latest)] for i in range(needed)])[:size]
        about = f"real: updates of a text model of {each:,} parameters"
        if needed > 1:
            about += f", {min(needed, len(latest))} of them one after the other"
        if needed > len(latest):
            about += f", repeated {size / each / len(latest):.1f} times"
        return Vector("real", x_D.contiguous(), _cut(self.shapes * needed, size), about)


def _cut(shapes: "Shapes", size: int) -> "Shapes":
    """Return the first shapes that make up `size`, the last one cut."""
    found: list[tuple[int, ...]] = []
    for shape in shapes:
        count = math.prod(shape)
        if count > size:
            break
        found.append(shape)
        size -= count
    return (*found, (size,)) if size else tuple(found)


# ---------------------------------------------------------------- one codec on one vector


def _measured(
    vector: Vector,
    cases: Sequence[Case],
    memory: "Memory",
    copied: float,
    args: argparse.Namespace,
) -> Iterator[Row]:
    from shoal.compression import codec

    if vector.about:
        print(vector.about, file=sys.stderr, flush=True)
    size = len(vector.x_D)
    x_D = vector.x_D.to(args.device)
    ledger = empty_ledger(size, args.device)
    for name, options in cases:
        part = codec.make(name, options, shapes=vector.shapes)
        print(f"{label((name, options))} on {vector.input} {size:,}", file=sys.stderr, flush=True)
        repeats = 1 if args.quick else REPEATS
        left_D = x_D.clone()
        payload = encode(part, left_D)  # also: compiles what is compiled on first use
        error = _squares(left_D) / _squares(x_D)
        encoding = best(
            lambda: encode(part, left_D),  # noqa: B023  run at once
            repeats,
            args.device,
            before=lambda: left_D.copy_(x_D),  # noqa: B023
        )
        apply(part, payload, ledger)
        decoding = best(lambda: apply(part, payload, ledger), repeats, args.device)  # noqa: B023
        extra = memory.get((label((name, options)), size), (None, None))
        yield Row(
            codec=label((name, options)),
            input=vector.input,
            size=size,
            bits=8 * len(payload) / size,
            entropy=entropy(part, payload, size) / size,
            error=error,
            encode=size / encoding,
            encode_of_copy=size / encoding / copied,
            decode=size / decoding,
            decode_of_copy=size / decoding / copied,
            encode_memory=extra[0],
            decode_memory=extra[1],
        )


def encode(part: "Codec", x_D: "Tensor") -> bytes:
    """Return the payload and leave in `x_D` what stays behind, as an author does."""
    from shoal.compression import codec

    payload, decoded = part.encode(x_D, key=1)
    codec.subtract(x_D, decoded, 1.0)
    return payload


def apply(part: "Codec", payload: bytes, ledger: "Ledger") -> None:
    """Add what a payload says to a ledger, as a receiver does, fingerprint and all."""
    import torch

    from shoal.compression.codec import written

    decoded = written(part.decode(payload, ledger.size, ledger.model.device), ledger.model.device)
    if decoded.values.dtype != torch.int32:  # a codec for mixing alone
        decoded = replace(decoded, values=decoded.values.round().to(torch.int32))
    ledger.add((b"", 0, 1), 1, decoded)


def best(
    act: Callable[[], object],
    repeats: int,
    device: str,
    *,
    before: Callable[[], object] = lambda: None,
) -> float:
    """Return the seconds of the quickest of several, each after an untimed `before`."""
    least, total, count = math.inf, 0.0, 0
    while count < repeats or (repeats > 1 and total < LEAST_SECONDS):
        before()
        _wait(device)
        begun = time.perf_counter()
        act()
        _wait(device)
        seconds = time.perf_counter() - begun
        least, total, count = min(least, seconds), total + seconds, count + 1
    return least


def copying(device: str) -> float:
    """Return how many float32 are copied per second, from memory to memory."""
    import torch

    x_D, y_D = torch.ones(COPIED, device=device), torch.ones(COPIED, device=device)
    return COPIED / best(lambda: y_D.copy_(x_D), 5, device)


def empty_ledger(size: int, device: str) -> "Ledger":
    """Return a ledger of zeros in which every update counts by itself."""
    import torch

    from shoal.training.ledger import Ledger
    from shoal.training.turn_rules.sum import Sum

    zeros_D = torch.zeros(size, dtype=torch.int32, device=device)
    return Ledger(zeros_D, Sum())


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        import torch

        torch.cuda.synchronize()


def _squares(x_D: "Tensor") -> float:
    return sum(
        float(x_D[start : start + SLAB].double().square().sum())
        for start in range(0, len(x_D), SLAB)
    )


# ---------------------------------------------------------------- entropy


def entropy(part: "Codec", payload: bytes, size: int) -> float:
    """Return the bits that the streams of a payload need at least, each by itself."""
    content = getattr(part, "unpack")(payload, size)  # noqa: B009  what contract tests use too
    chunk = getattr(part, "chunk", 0)
    return sum(
        _places(stream, chunk, size) if name.startswith(PLACES) else _order_0(stream)
        for name, stream in _streams("", content)
    )


def _streams(name: str, content: Any) -> "Iterator[tuple[str, Tensor]]":
    """Yield field and tensor of all that a payload says; single numbers cost next to nothing."""
    import torch

    if isinstance(content, torch.Tensor):
        yield name, content.reshape(-1)
    elif isinstance(content, list):
        yield name, torch.tensor(content)
    elif isinstance(content, tuple):
        fields = getattr(content, "_fields", [name] * len(content))
        for each, item in zip(fields, content, strict=True):
            yield from _streams(each, item)


def _places(place_K: "Tensor", chunk: int, size: int) -> float:
    """Return log2 of the number of ways to place so many: in every chunk, or in the whole."""
    if not len(place_K):
        return 0.0
    last = int(place_K.max())
    if not chunk:
        # Of the vector's elements; or of other units, such as rows: then as many as are used.
        return _log2_choose(size if 2 * last > size else last + 1, len(place_K))
    counts = (place_K // chunk).bincount(minlength=-(-size // chunk)).tolist()
    lengths = [min(chunk, size - start) for start in range(0, size, chunk)]
    kinds = Counter(zip(lengths, counts, strict=True))
    return sum(times * _log2_choose(*kind) for kind, times in kinds.items())


def _log2_choose(n: int, k: int) -> float:
    return (math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)) / math.log(2)


def _order_0(symbols: "Tensor") -> float:
    """Return the empirical entropy of all symbols together, in bits."""
    import torch

    if symbols.dtype == torch.uint8:
        slabs = (symbols[start : start + SLAB] for start in range(0, len(symbols), SLAB))
        counts = torch.stack([slab.int().bincount(minlength=256) for slab in slabs]).sum(0)
    else:
        counts = torch.unique(symbols, return_counts=True)[1]
    counts = counts[counts > 0].double()
    return float((counts * (counts.sum() / counts).log2()).sum())


# ---------------------------------------------------------------- memory


Memory = dict[tuple[str, int], tuple[float | None, float | None]]
"""By codec and size: the most extra memory of encoding and of decoding, in tensors."""


def _memory(cases: Sequence[Case], sizes: Sequence[int], args: argparse.Namespace) -> Memory:
    """Measure in a process whose allocator gives everything back at once."""
    print("measuring memory in a process of its own", file=sys.stderr, flush=True)
    question = {"cases": cases, "sizes": sizes, "threads": args.threads, "device": args.device}
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    done = subprocess.run(
        [sys.executable, "-m", "shoal.node.bench.codecs"],
        input=json.dumps(question),
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    found: Memory = {}
    for line in done.stdout.splitlines():
        name, size, encoding, decoding = json.loads(line)
        found[name, size] = encoding, decoding
    if done.returncode:  # such as out of memory: the rest can still be measured
        said = done.stderr.strip().splitlines() or ["it said nothing"]
        print(f"memory was not measured to the end: {said[-1]}", file=sys.stderr)
    return found


def _main() -> None:
    """The child's side."""
    import torch

    from shoal.compression import codec

    question = json.load(sys.stdin)
    device = question["device"]
    torch.set_num_threads(question["threads"])
    for size in question["sizes"]:
        x_D = torch.randn(size, generator=torch.Generator().manual_seed(size)).mul_(SCALE)
        x_D, ledger = x_D.to(device), empty_ledger(size, device)
        left_D = x_D.clone()
        for name, options in question["cases"]:
            part = codec.make(name, options, shapes=_matrices(size))
            # The first time compiles and loads: that memory is no tensor's.
            payload = encode(part, left_D.copy_(x_D))
            apply(part, payload, ledger)
            left_D.copy_(x_D)
            encoding = extra(lambda: encode(part, left_D), device)  # noqa: B023  run at once
            decoding = extra(lambda: apply(part, payload, ledger), device)  # noqa: B023
            tensors = [None if e is None else e / (4 * size) for e in (encoding, decoding)]
            print(json.dumps([label((name, options)), size, *tensors]), flush=True)


def extra(act: Callable[[], object], device: str) -> float | None:
    """Return the most bytes in use during `act` beyond those before it; None: no way to tell."""
    if device.startswith("cuda"):
        import torch

        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        act()
        return float(torch.cuda.max_memory_allocated() - before)
    gc.collect()
    # Freed memory that malloc keeps would serve `act` without ever being seen as memory of its.
    if (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is None:
        return None
    trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
    except OSError:
        return None
    before = _resident("VmRSS")
    act()
    return float(max(0, _resident("VmHWM") - before))


def _resident(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(x.split()[1]) * 1024 for x in lines if x.startswith(name))


# ---------------------------------------------------------------- what is shown


def _show(rows: Sequence[Row], copied: float, args: argparse.Namespace) -> None:
    from shoal.node import plot

    where = f"{machine()}, {args.threads} threads" if args.device == "cpu" else device_name()
    panels = make_panels(rows)
    if args.png is not None:
        plot.png(args.png, panels)
    if args.json:
        found = {"bench": "codecs", "machine": where, "copied_per_second": copied}
        print(json.dumps({**found, "rows": [asdict(row) for row in rows]}))
    else:
        print(f"codecs on {where}")
        print(f"copying float32: {copied / 1e6:,.0f} M/s, {8 * copied / 1e9:.1f} GB/s moved")
        print()
        print(table(rows))
        _draw(panels)
    for row in too_long(rows):
        print(
            f"sparse takes {row.bits:.4f} bits a parameter on {row.input} updates, "
            f"more than {MOST_BITS}",
            file=sys.stderr,
        )


def device_name() -> str:
    """Return what CUDA calls its device."""
    import torch

    return str(torch.cuda.get_device_name())


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


def _draw(panels: "Sequence[Panel]") -> None:
    from shoal.node import plot

    try:
        for panel in panels[:2]:
            shown = plot.text(panel, width=plot.columns(), colour=sys.stdout.isatty())
            print("", shown, sep="\n")
    except ConfigError as error:  # the table is there; only its picture is not
        print(f"no plot: {error}", file=sys.stderr)


if __name__ == "__main__":
    _main()
