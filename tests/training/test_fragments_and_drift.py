"""What is sent when: fragments in turn, turns that publish nothing, updates of slow peers."""

import itertools
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch

from shoal.compression import codec
from shoal.compression.settings import SettingError
from shoal.training import presets
from shoal.training.exchange import Arrived
from shoal.training.exchanges.ledger import LedgerExchange
from shoal.training.feedback import FeedbackSettings
from shoal.training.rules import Fragment, Plane, Rules
from shoal.training.run import RunError, RunSpec
from shoal.training.staleness import Staleness
from shoal.training.trainer import Setup, Trainer

SIZE, BITS = 900, 24
RUN: dict[str, Any] = {
    "run": {"name": "digits", "seed": 1, "turns": 40},
    "task": {"name": "digits", "width": 24},
    "local": {"optimizer": {"name": "sgd", "lr": 0.1, "momentum": 0.9}, "batch": 32, "steps": 5},
    "exchange": {"update": {"kind": "dense", "bits": 8}},
    "swarm": {"min_peers": 4},
}


def exchange(fragments: int, **feedback: float) -> LedgerExchange:
    ends = [SIZE * i // fragments for i in range(fragments + 1)]
    part = codec.make("dense", {"bits": 4})
    rules = Rules(
        planes=(
            Plane("dense", tuple(Fragment(a, b - a, part) for a, b in itertools.pairwise(ends))),
        ),
        turns=0,
        clip=Fraction(10**9),
        initial_squares=10**12,
    )
    initial = torch.ones(SIZE, dtype=torch.int32)
    return LedgerExchange(initial, rules, [FeedbackSettings(**feedback)], quantum_bits=BITS)


def delta(seed: int) -> torch.Tensor:
    return torch.randn(SIZE, generator=torch.Generator().manual_seed(seed)) * 1e-3


def turn(one: LedgerExchange, number: int, payload: bytes) -> torch.Tensor:
    """Take the update into the ledger; return by how much it moved the model."""
    before = one.ledger.model.clone()
    one.commit(1, number)
    update = Arrived((b"p" * 32, 1, number), number, "dense", payload, len(payload))
    (outcome,) = one.apply([update])
    assert outcome.refused is None
    return (one.ledger.model.double() - before.double()) * 2.0**-BITS


@pytest.mark.parametrize("fragments", [1, 2, 5])
def test_nothing_that_was_learnt_is_lost(fragments: int) -> None:
    """Σ sent / w + residual + drift = Σ Δ, whatever was published when."""
    one, weight = exchange(fragments, decay=1.0), 0.25
    sent = torch.zeros(SIZE, dtype=torch.float64)
    learnt = sent.clone()
    for number in range(1, 17):
        learnt += delta(number).double()
        if number % 3 == 0:
            one.carry(delta(number))
            continue
        payload = one.publish(delta(number), weight, turn=number, key=number)
        sent += turn(one, number, payload) / weight
        left = one.feedback.residual
        assert left is not None
        total = sent + left.double() + (0 if one.drift is None else one.drift.double())
        torch.testing.assert_close(total, learnt, atol=1e-7, rtol=0)


def test_an_update_moves_its_fragment_alone() -> None:
    one = exchange(3)
    for number in range(1, 7):
        moved = turn(one, number, one.publish(delta(number), 1.0, turn=number, key=0))
        part = one.rules.fragment(number)
        assert part.start == SIZE // 3 * ((number - 1) % 3)
        touched = moved.nonzero().reshape(-1)
        assert part.start <= int(touched.min())
        assert int(touched.max()) < part.start + part.size
        # Local steps go on from what was learnt of the other fragments.
        assert one.drift is not None
        assert not bool(one.drift[part.range].any())
        torch.testing.assert_close(one.start(), one.model() + one.drift, atol=0, rtol=0)


def test_a_discarded_turn_leaves_the_drift_as_it_was() -> None:
    one, other = exchange(3, momentum=0.5), exchange(3, momentum=0.5)
    for number in range(1, 10):
        a = one.publish(delta(number), 1.0, turn=number, key=0)
        other.publish(delta(number + 100), 1.0, turn=number, key=0)
        other.discard()
        b = other.publish(delta(number), 1.0, turn=number, key=0)
        assert a == b
        turn(one, number, a)
        turn(other, number, b)
        assert torch.equal(one.start(), other.start())


def test_fragments_lie_side_by_side_and_bound_the_payload() -> None:
    whole, parts = trainer(RUN), trainer(RUN, fragments=3)
    rules = parts.exchange.rules
    assert rules.size == parts.parameters
    assert len(rules.planes[0].fragments) == 3
    edges = [(part.start, part.start + part.size) for part in rules.planes[0].fragments]
    assert edges[0][0] == 0
    assert edges[-1][1] == parts.parameters
    assert all(a[1] == b[0] for a, b in itertools.pairwise(edges))
    assert rules.most_bytes()["dense"] < whole.exchange.rules.most_bytes()["dense"]
    sizes = [len(parts.turn(t, 4).payload or b"") for t in (1, 2, 3)]
    assert max(sizes) <= rules.most_bytes()["dense"]


def test_a_payload_of_another_fragment_counts_nothing() -> None:
    one = trainer(RUN, fragments=3)
    turned = one.turn(1, 4)
    assert turned.payload is not None
    sizes = [part.size for part in one.exchange.rules.planes[0].fragments]
    assert sizes[0] != sizes[1]
    wrong = Arrived((b"q" * 32, 1, 1), 2, turned.kind, turned.payload, len(turned.payload))
    (outcome,) = one.apply([wrong])
    assert outcome.refused is not None
    assert outcome.delta == (0, 0)


def trainer(run: Mapping[str, Any], index: int = 0, **exchange: Any) -> Trainer:
    ticks = itertools.count()
    tables = {**run, "exchange": {**run["exchange"], **exchange}}
    setup = Setup(run=RunSpec.parse(tables), peer=bytes([index]) * 32, shard=(index, 4), threads=1)
    return Trainer(setup, clock=lambda: float(next(ticks)))


@pytest.mark.parametrize(
    "options",
    [{"fragments": 4}, {"participation": 0.5}, {"fragments": 2, "participation": 0.5}],
    ids=["fragments", "participation", "both"],
)
def test_four_peers_learn_and_end_bit_identical(options: dict[str, Any]) -> None:
    peers = [trainer(RUN, i, **options) for i in range(4)]
    for number in range(1, 41):
        updates = []
        for i, one in enumerate(peers):
            publish = options.get("participation", 1) == 1 or (number + i) % 2 == 0
            turned = one.turn(number, 4, publish=publish)
            assert turned.dropped is None
            assert (turned.payload is not None) is publish
            if turned.payload is not None:
                one.commit(7, number)
                key = (bytes([i]) * 32, 7, number)
                updates.append(
                    Arrived(key, number, turned.kind, turned.payload, len(turned.payload))
                )
        for one in peers:
            assert all(outcome.refused is None for outcome in one.apply(updates))
    assert len({one.fingerprint() for one in peers}) == 1
    assert all(one.recompute() == one.fingerprint() for one in peers)
    assert peers[0].evaluate() > 0.9


def test_a_checkpoint_keeps_the_drift(tmp_path: Path) -> None:
    one = trainer(RUN, fragments=3)
    turned = one.turn(1, 4)
    assert turned.payload is not None
    one.commit(7, 1)
    one.turn(2, 4, publish=False)
    one.save(tmp_path / "c", "here")
    again, lost = trainer(RUN, fragments=3), trainer(RUN, fragments=3)
    assert again.load(tmp_path / "c", (7, 1)).kept
    assert not lost.load(tmp_path / "c", (7, 2)).kept
    assert torch.equal(again.exchange.start(), one.exchange.start())
    assert lost.exchange.drift is None
    assert again.turn(3, 4).payload == one.turn(3, 4).payload


def test_what_was_learnt_before_the_first_update_outlives_a_restart(tmp_path: Path) -> None:
    """A peer that was never drawn has published nothing, but it has learnt."""
    one, again, lost = (trainer(RUN) for _ in range(3))
    one.turn(1, 4, publish=False)
    one.save(tmp_path / "c", "here")
    assert again.load(tmp_path / "c", None).kept
    assert not lost.load(tmp_path / "c", (7, 1)).kept
    assert torch.equal(again.exchange.start(), one.exchange.start())
    assert lost.exchange.drift is None
    assert again.turn(2, 4).payload == one.turn(2, 4).payload


def test_the_curves_of_staleness() -> None:
    assert Staleness().factor(100) == 1
    curve = Staleness("polynomial", a=0.5)
    assert [curve.factor(lag) for lag in (-1, 0, 3, 8)] == [1, 1, 0.5, pytest.approx(1 / 3)]
    curve = Staleness("hinge", a=10, b=4)
    assert [curve.factor(lag) for lag in (0, 4, 5)] == [1, 1, pytest.approx(1 / 11)]


def test_a_late_author_steps_less_far() -> None:
    def squares(lag: float) -> float:
        one = trainer(RUN, staleness={"curve": "polynomial", "a": 1.0})
        before = one.exchange.model()
        turned = one.turn(1, 1, lag=lag)
        assert turned.payload is not None
        one.apply([Arrived((b"p" * 32, 1, 1), 1, "dense", turned.payload, len(turned.payload))])
        return float((one.exchange.model() - before).norm())

    assert squares(3.0) == pytest.approx(squares(0.0) / 4, rel=0.02)


@pytest.mark.parametrize("name", presets.LEDGER)
def test_every_ledger_preset_is_a_run_that_learns_a_little(name: str) -> None:
    one = trainer(presets.apply(RUN, name))
    for number in range(1, 5):
        turned = one.turn(number, 1)
        assert turned.payload is not None
        one.commit(7, number)
        update = Arrived(
            (b"p" * 32, 7, number), number, turned.kind, turned.payload, len(turned.payload)
        )
        (outcome,) = one.apply([update])
        assert outcome.refused is None
        assert outcome.delta != (0, 0)
    assert one.recompute() == one.fingerprint()


@pytest.mark.parametrize("name", sorted(set(presets.names()) - set(presets.LEDGER)))
def test_presets_that_share_state_are_refused_with_the_reason(name: str) -> None:
    with pytest.raises(RunError, match=r"cannot be used with the ledger: .{20}"):
        RunSpec.parse(presets.apply(RUN, name))


def test_a_preset_gives_way_to_what_the_run_file_says() -> None:
    given = {"preset": "sparseloco", "update": {"bits": 1}}
    spec = RunSpec.parse({**RUN, "exchange": given})
    assert spec.planes[0].update.options["bits"] == 1
    assert spec.planes[0].update.options["density"] == 1 / 64
    assert spec.exchange.preset == ""
    assert RunSpec.parse(spec.filled()).filled() == spec.filled()
    with pytest.raises(SettingError, match="leave one of them out"):
        presets.expand({**RUN, "exchange": {"preset": "sparseloco", "update": {"kind": "dense"}}})
    other = {"preset": "one-bit-adam"}
    with pytest.raises(RunError, match=r"local\.optimizer\.name"):
        RunSpec.parse({**RUN, "exchange": other})
