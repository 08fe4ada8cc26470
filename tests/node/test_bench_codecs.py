"""`shoal bench codecs`: what it measures is what there is; and, slowly, all of it."""

import json
import math
import sys

import pytest
import torch

from shoal.compression import codec
from shoal.node import cli
from shoal.node.bench import codecs
from shoal.node.bench._cases import Case, chosen_cases, label
from shoal.node.bench._codec_rows import Row, make_panels, table
from shoal.node.bench._ends import apply, empty_ledger, encode
from shoal.node.bench._entropy import entropy, order_0, places
from shoal.node.bench._memory import extra
from shoal.node.bench._report import grid, markdown
from shoal.node.bench._sizes import parse_sizes
from shoal.node.bench._vectors import Recorded, matrices


def test_the_settings_that_are_measured_can_be_had() -> None:
    cases = chosen_cases(None)
    assert {name for name, _ in cases} == set(codec.names())
    for name, options in cases:
        codec.make(name, options, shapes=matrices(70_000))
    labels = [label(case) for case in cases]
    assert len(set(labels)) == len(labels)
    assert label(("sparse", {"density": 1 / 16, "bits": 2})) == "sparse density 1/16 bits 2"


def test_entropy_of_places_is_that_of_the_choice_and_of_symbols_their_own() -> None:
    size = 1 << 16
    x = torch.randn(size, generator=torch.Generator().manual_seed(1)) * 1000
    part = codec.make("sparse", {})
    payload = part.encode(x).payload
    found = entropy(part, payload, size)
    # 16 chunks of 4096 with 64 places and signs each, and one magnitude of up to 16 bits a chunk.
    chosen = 16 * math.log2(math.comb(4096, 64))
    assert chosen + 16 * 63 < found < chosen + 16 * (64 + 8)
    assert found < 8 * len(payload)


def test_entropy_of_levels_is_order_0() -> None:
    assert order_0(torch.tensor([3, 3, 5, 5])) == pytest.approx(4)
    assert order_0(torch.tensor([0, 0, 0, 1], dtype=torch.uint8)) == pytest.approx(
        3 * math.log2(4 / 3) + 2
    )
    rows = torch.tensor([0, 5, 9])  # of at least ten rows, in a vector of 1000 elements
    assert places(rows, 0, 1000) == pytest.approx(math.log2(math.comb(10, 3)))
    assert places(rows, 0, 11) == pytest.approx(math.log2(math.comb(11, 3)))
    # two of the first eight, one of the last three
    assert places(rows, 8, 11) == pytest.approx(math.log2(math.comb(8, 2) * 3))


@pytest.mark.parametrize("case", chosen_cases(None), ids=label)
def test_encoding_and_applying_are_those_of_author_and_receiver(case: Case) -> None:
    part = codec.make(case[0], case[1], shapes=matrices(5000))
    x = (torch.randn(5000, generator=torch.Generator().manual_seed(2)) * 1000).round()
    residual = x.clone()
    payload = encode(part, residual)
    ledger = empty_ledger(5000, "cpu")
    apply(part, payload, ledger)
    apply(part, payload, ledger)
    tolerance = 0.5 if part.inexact else 0.0
    assert torch.allclose(ledger.model / 2 + residual, x, rtol=0, atol=tolerance)
    assert ledger.fingerprint() == ledger.recompute()
    assert entropy(part, payload, 5000) > 0


def test_recorded_updates_are_what_the_author_encodes() -> None:
    """The peer's payload is the encoding of the vector that is recorded."""
    updates = [torch.arange(6.0), 10 + torch.arange(6.0)]
    recorded = Recorded(updates, ((2, 2), (2,)))
    short, long = recorded.vector(5), recorded.vector(15)
    assert short.x_D.tolist() == [10, 11, 12, 13, 14]
    assert short.shapes == ((2, 2), (1,))
    assert long.x_D.tolist() == [10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 10, 11, 12]
    assert long.shapes == ((2, 2), (2,), (2, 2), (2,), (3,))
    assert "2 of them one after the other, repeated 1.2 times" in long.about


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_that_of_the_act_alone() -> None:
    """Memory that was freed just before, and that malloc keeps, hides nothing of it."""
    held = torch.ones(1 << 22)
    torch.ones(7 << 20)  # freed at once: from now on malloc keeps pieces up to this size …
    pieces = [torch.ones(1 << 20) for _ in range(40)]
    last = torch.ones(100)  # … below one that is in use
    pieces.clear()

    def act() -> None:
        (held + 1).add_(held * 2)  # two more at once

    found = extra(act, "cpu")
    assert found is not None
    assert found / (4 << 22) == pytest.approx(2, abs=0.3)
    assert len(last) == 100


def row(**changed: object) -> Row:
    plain = dict.fromkeys(Row.__dataclass_fields__, 1.0)
    return Row(**{**plain, "codec": "sparse", "input": "real", "size": 10**6, **changed})  # type: ignore[arg-type]


def test_the_promise_is_kept_on_gaussian_and_on_real_updates() -> None:
    good, bad = row(bits=0.1399), row(bits=0.1401)
    others = [row(codec="dense", bits=1.6), row(input="heavy", bits=1.0), row(size=1000)]
    assert codecs.too_long([good, *others]) == []
    assert codecs.too_long([good, bad]) == [bad]
    assert "0.1399" in table([good])
    assert [panel.lines[0].x for panel in make_panels([good])] == [[0.1399]] * 3


@pytest.mark.parametrize(
    ("options", "remedy"),
    [
        (["--sizes", "1M,ten"], "'ten' is no size"),
        (["--codecs", "sparse,spars"], "'spars' is none of"),
        (["--inputs", "imagined"], "gaussian, heavy, real"),
        (["--threads", "0"], "--threads 0"),
        (["--thread", "1"], "did you mean --threads?"),
    ],
)
def test_options_are_checked_before_anything_is_measured(
    options: list[str], remedy: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["bench", "codecs", *options]) == 2
    said = capsys.readouterr()
    assert remedy in said.err
    assert not said.out
    assert parse_sizes("1M,2.5M,300k,7") == [1_000_000, 2_500_000, 300_000, 7]


@pytest.mark.parametrize(
    "name", ["codecs", "finetune", "liars", "onebyte", "overhead", "scalars", "simulator", "tuning"]
)
def test_every_benchmark_explains_itself(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        cli.main(["bench", name, "--help"])
    assert left.value.code == 0
    shown = capsys.readouterr().out
    assert f"shoal bench {name}" in shown
    assert "--json" in shown


def test_tables_are_text() -> None:
    heads, rows = ("what", "n"), [("a", "10"), ("long", "7")]
    assert grid(heads, rows) == "what   n\na     10\nlong   7"
    assert markdown(heads, rows) == "| what | n |\n| --- | ---: |\n| a | 10 |\n| long | 7 |"


@pytest.mark.slow
def test_it_measures_every_codec(capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    try:
        assert cli.main(["bench", "codecs", "--quick", "--json"]) == 0
    finally:
        torch.set_num_threads(threads)
    found = json.loads(capsys.readouterr().out)
    assert set(found) == {"bench", "machine", "copied_per_second", "rows"}
    sparse = {r["input"]: r for r in found["rows"] if r["codec"] == "sparse"}
    assert set(sparse) == {"gaussian", "heavy", "real"}
    assert 0.1307 < sparse["gaussian"]["entropy"] < sparse["gaussian"]["bits"] <= 0.14
    assert sparse["real"]["bits"] <= 0.14
    assert {r["codec"].split()[0] for r in found["rows"]} == set(codec.names())
