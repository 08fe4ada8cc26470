"""Coverage-guided fuzzing of what decodes a stranger's bytes, with atheris.

    python tests/fuzz/decoders.py CODEC [-max_total_time=60 …]      fuzz one codec's decoder
    python tests/fuzz/decoders.py wire [-max_total_time=60 …]       fuzz the parser of messages
    python tests/fuzz/decoders.py --names                           what there is to fuzz
    python tests/fuzz/decoders.py --corpus                          make the first inputs anew

`make fuzz SECONDS=60` gives each so long. The first byte of an input chooses the codec's settings,
the second the size of the vector; the rest is the payload. `corpus/NAME/` holds valid payloads to
start from; what is found on the way stays in `.found/NAME/`, crashes among it.
"""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

HERE = Path(__file__).parent
SIZES = (1, 7, 64, 255, 256, 257, 1000, 4095, 4096, 5000)
WIRE = "wire"


def names() -> list[str]:
    """Return everything that can be fuzzed."""
    from shoal.compression import codec

    return [*codec.names(), WIRE]


def variants(name: str) -> list[dict[str, Any]]:
    """Return the settings under which a codec is fuzzed."""
    from support.codecs import VARIANTS

    return [options for kind, options in VARIANTS if kind == name]


def check(part: Any, payload: bytes, size: int) -> None:
    """Decode: either PayloadError and nothing else, or a vector that keeps every promise.

    Once by the torch code, once by the compiled loops: both must say the same.
    """
    decoded, again = (outcome(part, payload, size, compiled=c) for c in (False, True))
    assert (decoded is None) == (again is None), "torch and compiled loops disagree"
    if decoded is None or again is None:
        return
    assert decoded.values.equal(again.values)
    assert len(payload) <= part.bound(size)
    assert decoded.size == size
    values = decoded.values
    if decoded.indices is None:
        assert len(values) == size
    else:
        assert len(values) == len(decoded.indices) <= size
        if len(values):
            assert int(decoded.indices[0]) >= 0
            assert int(decoded.indices[-1]) < size
            assert bool((decoded.indices.diff() > 0).all())
    if not part.inexact:
        assert str(values.dtype) == "torch.int32"
    assert part.pack(part.unpack(payload, size), size) == payload, "two forms of one content"


def outcome(part: Any, payload: bytes, size: int, *, compiled: bool) -> Any:
    """Return what the payload decodes to, or None if it is refused."""
    from shoal.compression import parallel
    from shoal.compression.codec import PayloadError, written

    parallel.LARGE = parallel.LOADED = 1 if compiled else 1 << 62
    try:
        return written(part.decode(payload, size))
    except PayloadError:
        return None


def codec_target(name: str) -> Any:
    """Return the function that takes an input."""

    def target(data: bytes) -> None:
        if len(data) >= 2:
            size = SIZES[data[1] % len(SIZES)]
            found = parts[size]
            check(found[data[0] % len(found)], data[2:], size)

    parts = {size: makes(name, size) for size in SIZES}
    return target


def makes(name: str, size: int) -> list[Any]:
    """Return the codec under all settings, for one tensor and (1000 elements) for several."""
    from shoal.compression import codec

    shapes = ((10, 50), (3,), (7, 71)) if size == 1000 else ((size,),)
    return [codec.make(name, options, shapes=shapes) for options in variants(name)]


def wire_target() -> Any:
    """Return the function that parses an input as a message of another peer."""
    from shoal.gossip.limits import Limits
    from shoal.gossip.names import RunId
    from shoal.node.wire.fields import WireError
    from shoal.node.wire.frames import FrameReader
    from shoal.node.wire.records import RecordReader

    records = RecordReader(RunId(bytes(32)), lambda peer, proof: True)
    frames = FrameReader(records, Limits())

    def target(data: bytes) -> None:
        for parse in (frames.read, records.read):
            try:
                parse(data)
            except WireError:
                continue

    return target


def corpus() -> None:
    """Write valid payloads of every codec under every setting."""
    import torch

    from shoal.compression import codec

    for name in codec.names():
        folder = HERE / "corpus" / name
        folder.mkdir(parents=True, exist_ok=True)
        for j, size in ((2, 64), (5, 257), (6, 1000)):
            for i, part in enumerate(makes(name, size)):
                generator = torch.Generator().manual_seed(j)
                x = torch.randn(size, generator=generator) * 20_000
                payload = part.encode(x, key=j).payload
                (folder / f"valid-{i}-{size}").write_bytes(bytes([i, j]) + payload)


def main(argv: list[str]) -> None:
    """Fuzz one of them until the time is up or something breaks."""
    if argv[1:] == ["--names"]:
        print("\n".join(names()))
        return
    if argv[1:] == ["--corpus"]:
        corpus()
        return
    import atheris
    import torch

    torch.set_num_threads(1)
    name = argv[1]
    with atheris.instrument_imports(include=["shoal.compression", "shoal.node.wire"]):
        target = wire_target() if name == WIRE else codec_target(name)
    found, known = HERE / ".found" / name, HERE / "corpus" / name
    found.mkdir(parents=True, exist_ok=True)
    flags = [*argv[2:], "-max_len=4096", "-timeout=20", f"-artifact_prefix={found}/"]
    folders = [str(found), *([str(known)] if known.exists() else [])]
    atheris.Setup([argv[0], *flags, *folders], target)
    atheris.Fuzz()


if __name__ == "__main__":
    main(sys.argv)
