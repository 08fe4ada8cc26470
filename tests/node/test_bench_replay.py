"""`shoal bench replay`: whatever the order, the batches and the threads, a log is one model."""

import itertools
import json
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch

from shoal.node import cli
from shoal.node.bench import replay
from shoal.node.bench.replay import Move
from shoal.training.contribution import combination
from shoal.training.ledger import Ledger

SMALL = ["--turns", "16", "--peers", "3", "--parameters", "9000", "--perturbations", "2"]
WAYS = 5


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """Leave torch as many threads as it had."""
    before = torch.get_num_threads()
    yield
    assert torch.get_num_threads() == before


def rows(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    found = json.loads(capsys.readouterr().out)
    assert found["bench"] == "replay"
    listed: list[dict[str, Any]] = found["rows"]
    return listed


def test_every_replay_of_both_logs_gives_their_fingerprint(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main(["bench", "replay", *SMALL, "--json"]) == 0
    found = rows(capsys)
    assert len(found) == 2 * (1 + 2 * WAYS)
    assert all(row["equal"] for row in found)
    assert {row["where"] for row in found} == {"cpu", "1 thread", "2 threads"}
    prints = {
        row["run"]: {r["fingerprint"] for r in found if r["run"] == row["run"]} for row in found
    }
    assert set(prints) == {"pool", "common, median"}
    assert all(len(some) == 1 for some in prints.values())
    assert prints["pool"] != prints["common, median"]
    (first,) = prints["pool"]
    assert len(first) == 32


def moves(way: Sequence[Move], count: int) -> Counter[int]:
    """Return how often each update is in at the end; none is ever in twice, or out twice."""
    held = Counter[int]()
    for sign, places in way:
        assert 1 <= len(places) <= replay.BATCH
        for place in places:
            held[place] += sign
            assert held[place] in (0, 1)
    return held


@pytest.mark.parametrize("count", [1, 5, 1000])
def test_every_way_takes_in_every_update_once(count: int) -> None:
    ways = replay.ways(count, random.Random(1))
    assert len(ways) == WAYS
    for name, way in ways.items():
        held = moves(way, count)
        assert held == Counter(range(count)), name
        order = list(itertools.chain.from_iterable(places for sign, places in way if sign > 0))
        if "in order" in name:
            assert order == sorted(order)
        elif count > 5:
            assert order != sorted(order)
        assert ("one by one" in name) == all(len(places) == 1 for _, places in way) or count < 6
        assert any(sign < 0 for sign, _ in way) == ("out" in name and count > 2)


def test_a_ledger_that_minds_the_order_is_found_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What an update adds depends on what is there."""
    add_many = Ledger.add_many

    def more_or_less(self: Ledger, updates: Any, sign: int = 1) -> Any:
        more = self.fingerprint()[0] % 3
        changed = [combination(u, u.keys, u.coefficients + more) for u in updates]
        return add_many(self, changed, sign)

    monkeypatch.setattr(Ledger, "add_many", more_or_less)
    assert cli.main(["bench", "replay", *SMALL, "--threads", "1"]) == 1
    lines = capsys.readouterr().out.splitlines()
    wrong = [line for line in lines if "NOT EQUAL" in line]
    assert len(wrong) == WAYS
    assert all(line.startswith("pool") for line in wrong)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")
def test_cuda_gives_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "replay", *SMALL, "--device", "cuda", "--json"]) == 0
    assert sum(row["where"] == "cuda" for row in rows(capsys)) == 2 * WAYS


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--device", "tpu"], "use cpu or cuda"),
        (["--turns", "0"], "above zero"),
        (["--seed", "-1"], "use 0 or more"),
        (["--rule", "medium"], "did you mean 'median'"),
    ],
)
def test_what_cannot_be_asked_is_one_line(
    flags: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["bench", "replay", *SMALL, *flags]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert said in error
