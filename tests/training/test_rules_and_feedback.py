"""What every peer decides alike, and what an author keeps between turns."""

from dataclasses import replace
from fractions import Fraction

import pytest
import torch

from shoal.compression import codec
from shoal.compression.codec import Encoded
from shoal.training.feedback import Feedback, FeedbackSettings
from shoal.training.rules import Fragment, Plane, RuleError, Rules

SIZE = 2000
BITS = 24
DENSE = codec.make("dense", {"bits": 8})
RULES = Rules(
    planes=(Plane("dense", (Fragment(0, SIZE, DENSE),)),),
    turns=10,
    clip=Fraction(1, 4),
    initial_squares=10**18,
)


def delta(seed: int, scale: float = 1e-3) -> torch.Tensor:
    return torch.randn(SIZE, generator=torch.Generator().manual_seed(seed)) * scale


def payload(scale: float = 1e4) -> bytes:
    return DENSE.encode(delta(0, scale)).payload


def test_a_lawful_update_counts() -> None:
    data = payload()
    decoded = RULES.judge(10, "dense", len(data), data)
    assert torch.equal(decoded.dense(), DENSE.decode(data, SIZE).dense())


@pytest.mark.parametrize(
    ("turn", "kind", "size", "data", "why"),
    [
        (1, "sparse", 10, None, "kind"),
        (0, "dense", 10, None, "turn: 0"),
        (11, "dense", 10, None, "turn: 11"),
        (1, "dense", 10**6, None, "at most"),
        (1, "dense", 10, None, "missing"),
        (1, "dense", 10, b"short", "record says"),
        (1, "dense", 4, b"longer", "record says"),
        (1, "dense", 5, b"\x07aaaa", "form 7"),
    ],
)
def test_what_breaks_a_rule_contributes_nothing(
    turn: int, kind: str, size: int, data: bytes | None, why: str
) -> None:
    with pytest.raises(RuleError, match=why):
        RULES.judge(turn, kind, size, data)


def test_a_run_without_end_takes_any_turn() -> None:
    replace(RULES, turns=0).judge_record(10**9, "dense", 10)


def test_the_clip_is_exact() -> None:
    data = payload()
    squares = codec.sum_of_squares(DENSE.decode(data, SIZE).values)
    exactly = replace(RULES, clip=Fraction(1, 3), initial_squares=3 * squares)
    exactly.judge(1, "dense", len(data), data)
    with pytest.raises(RuleError, match="clip"):
        replace(exactly, initial_squares=3 * squares - 1).judge(1, "dense", len(data), data)


def test_the_largest_payload_is_the_codecs_bound() -> None:
    assert RULES.most_bytes() == {"dense": DENSE.bound(SIZE)}


def feedback(settings: FeedbackSettings, rules: Rules = RULES) -> Feedback:
    return Feedback([settings], rules, quantum_bits=BITS)


def sent(encoded: Encoded) -> torch.Tensor:
    return encoded.decoded.dense().double() * 2.0**-BITS


@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_what_is_sent_and_what_is_kept_is_what_was_learnt(kind: str) -> None:
    """Σ sent / w + residual = Σ η·Δ when nothing decays."""
    rules = replace(RULES, planes=(Plane(kind, (Fragment(0, SIZE, codec.make(kind, {})),)),))
    author = feedback(FeedbackSettings(outer_lr=0.5, decay=1.0), rules)
    total = torch.zeros(SIZE, dtype=torch.float64)
    for turn in range(20):
        total += sent(author.publish(delta(turn), 0.25)) / 0.25
        author.commit()
    learnt = sum(0.5 * delta(turn).double() for turn in range(20))
    assert author.residual is not None
    torch.testing.assert_close(total + author.residual.double(), learnt, atol=1e-7, rtol=0)


def test_the_sum_over_authors_is_the_outer_nesterov_step_of_their_mean() -> None:
    mu, eta, peers = 0.6, 0.7, 4
    authors = [
        feedback(FeedbackSettings(momentum=mu, outer_lr=eta, decay=1.0)) for _ in range(peers)
    ]
    model = torch.zeros(SIZE, dtype=torch.float64)
    oracle, m = model.clone(), model.clone()
    for turn in range(15):
        deltas = [delta(100 * turn + i) for i in range(peers)]
        for author, d in zip(authors, deltas, strict=True):
            model += sent(author.publish(d, 1 / peers))
            author.commit()
        mean = torch.stack(deltas).double().mean(0)
        m = mu * m + mean
        oracle += eta * (mean + mu * m)
    left = sum(a.residual.double() / peers for a in authors if a.residual is not None)
    torch.testing.assert_close(model + left, oracle, atol=1e-7, rtol=1e-5)
    assert float((model - oracle).norm()) < 0.05 * float(oracle.norm())


def test_an_update_beyond_the_numbers_is_given_up_like_any_other() -> None:
    """Weights of 1e33 are finite and so may be their loss; in units of q they are infinite."""
    author = feedback(FeedbackSettings(momentum=0.5))
    author.publish(delta(1), 1.0)
    author.commit()
    assert author.residual is not None
    residual = author.residual.clone()
    with pytest.raises(RuleError, match="not finite"):
        author.publish(delta(2, 1e33), 1.0)
    author.discard()
    assert torch.equal(author.residual, residual)


def test_a_discarded_turn_leaves_no_trace() -> None:
    one = feedback(FeedbackSettings(momentum=0.5, decay=0.9))
    other = feedback(FeedbackSettings(momentum=0.5, decay=0.9))
    for turn in range(6):
        a = one.publish(delta(turn), 0.5)
        one.commit()
        other.publish(delta(1000 + turn), 0.5)
        other.discard()
        b = other.publish(delta(turn), 0.5)
        other.commit()
        assert a.payload == b.payload


def test_old_residual_decays() -> None:
    author = feedback(FeedbackSettings(decay=0.5))
    author.publish(delta(1), 1.0)
    author.commit()
    assert author.residual is not None
    first = author.residual.clone()
    author.publish(torch.zeros(SIZE), 1e-12)  # too small a weight to send anything
    author.commit()
    torch.testing.assert_close(author.residual, first * 0.5, rtol=1e-6, atol=0)


def test_an_update_above_the_clip_is_shrunk_and_the_rest_kept() -> None:
    tight = replace(RULES, initial_squares=10**10)
    author = feedback(FeedbackSettings(decay=1.0), tight)
    encoded = author.publish(delta(1), 1.0)
    squares = codec.sum_of_squares(encoded.decoded.values)
    assert tight.most_squares / 4 < squares <= tight.most_squares
    tight.judge(1, "dense", len(encoded.payload), encoded.payload)
    author.commit()
    assert author.residual is not None
    torch.testing.assert_close(
        sent(encoded) + author.residual.double(), delta(1).double(), atol=1e-8, rtol=0
    )
