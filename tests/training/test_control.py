"""Error control as state machines: published trajectories, identities, numbers, repair, joining."""

import math
import random
from collections.abc import Iterator
from typing import Any

import pytest
import safetensors.torch
import torch
from support.controls import One, Top, Whole, exact, name_of, play_round, scaled
from torch import Tensor

from shoal.compression.codec import Decoded, Encoded, PayloadError
from shoal.compression.settings import SettingError
from shoal.training import control
from shoal.training.control import Control, ControlError, Remedy, Seat, Taken
from shoal.training.controls.econtrol import papers_eta
from shoal.training.controls.ef21 import largest_step, xi
from shoal.training.frames import CHECKED, KEPT_FRAMES

SIZE = 64
SETTINGS: dict[str, dict[str, Any]] = {
    "ef14": {"step": 0.5},
    "ef21": {"momentum": 0.5},
    "masha": {"step": 0.05, "keep": 0.6},
}
SHARING = [name for name in control.names() if name != "ef14"]
STREAMS = ["econtrol", "ef21", "ef21-w"]
ROUNDS = [name for name in control.names() if name not in STREAMS]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Vectors are tiny: threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def vector(seed: int, size: int = SIZE) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def seated(name: str, author: int = 0, **settings: Any) -> Control:
    """Return a control on float32 with the codecs of the package."""
    if name == "scallion":
        codec = scaled("dense", {"bits": 8})
        object.__setattr__(codec, "codec", Unbiased(codec.codec))
    else:
        codec = scaled("sparse", {"density": 1 / 8, "chunk": 64})
    seat = Seat(name_of(author), codec, SIZE, seed=5)
    return control.make(name, {**SETTINGS.get(name, {}), **settings}, seat)


class Unbiased:
    """Eight bits are near enough to unbiased here; what is tested is not the mean."""

    unbiased = True
    inexact = ""

    def __init__(self, codec: Any) -> None:
        self.encode, self.decode, self.bound = codec.encode, codec.decode, codec.bound


def publish(one: Control, vector_D: Tensor, key: int = 0) -> bytes:
    payload = one.publish(vector_D, key=key)
    one.commit(one.count + 1)
    return payload


# ---------------------------------------------------------------- trajectories that are known

G = torch.tensor([1.0, 0.6], dtype=torch.float64)
TRACES: list[tuple[str, dict[str, Any], list[tuple[float, float]], list[tuple[float, float]]]] = [
    ("ef14", {"step": 1.0}, [(1, 0), (0, 1.2), (2, 0), (0, 1.2)], [(0, 0.6), (1, 0)] * 2),
    ("ef21", {}, [(1, 0), (0, 0.6), (0, 0), (0, 0)], [(1, 0), (1, 0.6), (1, 0.6), (1, 0.6)]),
    (
        "econtrol",
        {"eta": 0.5},
        [(1, 0), (0, 0.9), (0, -0.15), (0, -0.075)],
        [(0, 0.6), (0, 0.3), (0, 0.15), (0, 0.075)],
    ),
    ("econtrol", {"eta": 1.0}, [(1, 0), (0, 1.2), (0, -0.6), (0, 0)], [(0, 0.6)] + [(0, 0)] * 3),
]


@pytest.mark.parametrize(("name", "settings", "sent", "memory"), TRACES)
def test_the_trace_of_a_constant_gradient(
    name: str,
    settings: dict[str, Any],
    sent: list[tuple[float, float]],
    memory: list[tuple[float, float]],
) -> None:
    """Top-1 of (1, 0.6): what each method sends, and what it holds after it."""
    one = exact(name, **settings)
    for step, expected in zip(sent, memory, strict=True):
        said = Top().decode(publish(one, G)[1:], 2).dense()
        one.close(G)
        held = one.own() if name == "ef21" else one.error
        close = {"rtol": 0.0, "atol": 1e-15}
        torch.testing.assert_close(said, torch.tensor(step, dtype=torch.float64), **close)
        torch.testing.assert_close(held, torch.tensor(expected, dtype=torch.float64), **close)


def test_the_estimates_of_econtrol_on_that_gradient() -> None:
    one = exact("econtrol", eta=0.5)
    for expected in ((1, 0), (1, 0.9), (1, 0.75), (1, 0.675)):
        publish(one, G)
        estimate = torch.tensor(expected, dtype=torch.float64)
        torch.testing.assert_close(one.close(G), estimate, rtol=0, atol=1e-15)


def scaffold(name: str, rounds: int, **settings: Any) -> list[tuple[float, float, list[float]]]:
    """Play f₁ = ½(x - 1)², f₂ = 1.5(x + 1)², K = 2, η_l = 0.1, η_g = 1; return x, c and c_i."""
    controls = [exact(name, i, size=1, codec=Whole(), **settings) for i in range(2)]
    x, path = torch.zeros(1, dtype=torch.float64), []
    for t in range(rounds):
        vectors = []
        for i, one in enumerate(controls):
            y = x.clone()
            for _ in range(2):
                y = y - 0.1 * ((y - 1 if i == 0 else 3 * (y + 1)) + one.correction())
            vectors.append((x - y) / 0.2)
        x = x - 0.2 * play_round(controls, vectors, x, t)
        path.append((x.item(), controls[0].average.item(), [c.own().item() for c in controls]))
    return path


def test_scallion_without_compression_takes_the_published_path() -> None:
    (x, c, each), *_, last = scaffold("scallion", 400, alpha=1.0)
    assert (x, c) == pytest.approx((-0.16, 0.8), abs=1e-12)
    assert each == pytest.approx([-0.95, 2.55], abs=1e-12)
    assert last[0] == pytest.approx(-0.5, abs=1e-12)
    path = scaffold("scallion", 400, alpha=0.5)
    assert [p[0] for p in path[:3]] == pytest.approx([-0.08, -0.190375, -0.298868], abs=5e-7)
    assert path[0][1] == pytest.approx(0.4, abs=1e-12)
    assert path[0][2] == pytest.approx([-0.475, 1.275], abs=1e-12)
    assert path[-1][0] == pytest.approx(-0.5, abs=1e-12)
    assert path[-1][2] == pytest.approx([-1.5, 1.5], abs=1e-9)


def test_scafcom_without_compression_finds_the_optimum_that_averaging_misses() -> None:
    controls = [exact("scafcom", i, size=1, codec=Top(1), momentum=0.3) for i in range(2)]
    x = torch.zeros(1, dtype=torch.float64)
    for t in range(400):
        vectors = []
        for i, one in enumerate(controls):
            y = x.clone()
            for _ in range(2):
                y = y - 0.1 * ((y - 1 if i == 0 else 3 * (y + 1)) + one.correction())
            vectors.append((x - y) / 0.2)
        x = x - 0.2 * play_round(controls, vectors, x, t)
    assert x.item() == pytest.approx(-0.5, abs=1e-9)
    y = torch.zeros(1, dtype=torch.float64)  # plain averaging of the same local steps
    for _ in range(400):
        ends = [y, y]
        for _ in range(2):
            ends = [ends[0] - 0.1 * (ends[0] - 1), ends[1] - 0.3 * (ends[1] + 1)]
        y = (ends[0] + ends[1]) / 2
    assert abs(y.item() + 0.5) > 0.01


@pytest.mark.parametrize(("memory", "step"), [(False, 0.1), (True, 0.2)], ids=["masha1", "masha2"])
def test_masha_solves_a_game_to_machine_precision(memory: bool, step: float) -> None:
    """Two nodes, a bilinear game + 0.2 I in four dimensions."""
    chance = torch.Generator().manual_seed(3)
    games, offsets = [], torch.randn(2, 4, generator=chance, dtype=torch.float64)
    for _ in range(2):
        a = torch.linalg.qr(torch.randn(2, 2, generator=chance, dtype=torch.float64)).Q
        game = 0.2 * torch.eye(4, dtype=torch.float64)
        game[:2, 2:], game[2:, :2] = a, -a.T
        games.append(game)
    best = torch.linalg.solve(games[0] + games[1], offsets.sum(0))
    codec = Top(1) if memory else One()
    options = {"memory": memory, "step": step, "keep": 0.75}
    controls = [exact("masha", i, size=4, codec=codec, **options) for i in range(2)]
    z = torch.zeros(4, dtype=torch.float64)
    for t in range(2500 if memory else 4000):
        at = controls[0].point(z)
        fields = [m @ at - b for m, b in zip(games, offsets, strict=True)]
        z = z - step * play_round(controls, fields, z, t)
    assert float((z - best).norm()) < 1e-13


# ---------------------------------------------------------------- identities


def test_what_ef14_sent_and_holds_is_what_it_was_given() -> None:
    one = exact("ef14", size=SIZE, step=0.3)
    given, sent = torch.zeros(SIZE, dtype=torch.float64), torch.zeros(SIZE, dtype=torch.float64)
    for t in range(200):
        g = vector(t).double()
        given += 0.3 * g
        sent += Top().decode(publish(one, g)[1 + 8 * (one.count % CHECKED == 0) :], SIZE).dense()
        one.close(g)
    torch.testing.assert_close(sent + one.error, given, rtol=0, atol=1e-12)


def test_the_estimates_and_the_memory_of_econtrol_add_up_to_the_gradients() -> None:
    one = exact("econtrol", size=SIZE, eta=0.05)
    given, used = torch.zeros(SIZE, dtype=torch.float64), torch.zeros(SIZE, dtype=torch.float64)
    for t in range(200):
        g = vector(t).double()
        given += g
        publish(one, g)
        used += one.close(g)
    torch.testing.assert_close(used + one.error, given, rtol=0, atol=1e-11)


def test_estimates_of_ef21_converge_geometrically() -> None:
    one = exact("ef21", size=SIZE, codec=Top(4))
    g = vector(1).double()
    first, delta = float(g.square().sum()), 4 / SIZE
    for t in range(1, 60):
        publish(one, g)
        left = float((g - one.close(g)).square().sum())
        assert left <= (1 - delta) ** t * first * (1 + 1e-12)


def test_ef21_w_is_ef21_when_the_codec_is_homogeneous() -> None:
    """With L = 1 and 7 the scales are 1/4 and 7/4: dividing by them rounds, no more."""
    plain = [exact("ef21", i, size=SIZE, codec=Top(3)) for i in range(2)]
    weighted = [
        exact("ef21-w", i, size=SIZE, codec=Top(3), smoothness=L) for i, L in ((0, 1.0), (1, 7.0))
    ]
    for t in range(50):
        gradients = [vector(2 * t + i).double() for i in range(2)]
        a = play_round(plain, gradients, gradients[0], t)
        b = play_round(weighted, gradients, gradients[0], t)
        torch.testing.assert_close(a, b, rtol=0, atol=1e-13)
    assert weighted[0].scales[name_of(1)] == 7 / 4


class Grid:
    """Round to multiples of 1/4: contractive enough on large vectors, not homogeneous."""

    inexact = "floats"

    def encode(self, x_D: Tensor, *, key: int = 0) -> Encoded:
        values = (4 * x_D).round() / 4
        return Encoded(values.numpy().tobytes(), Decoded(len(x_D), values))

    def decode(self, payload: bytes, size: int, device: Any = "cpu") -> Decoded:
        return Decoded(size, torch.frombuffer(bytearray(payload), dtype=torch.float64).clone())

    def bound(self, size: int) -> int:
        return 8 * size


def test_ef21_w_weighs_on_a_fixed_grid() -> None:
    """The rough author's frames are divided by 7/4, so its errors are 7 times the smooth one's."""
    errors = []
    weighted = [
        exact("ef21-w", i, size=SIZE, codec=Grid(), smoothness=L) for i, L in ((0, 1.0), (1, 7.0))
    ]
    gradients = [vector(i).double() for i in range(2)]
    for t in range(3):
        play_round(weighted, gradients, gradients[0], t)
    for i, one in enumerate(weighted):
        scale = one.scales[name_of(i)]
        errors.append(float((scale * one.own() - gradients[i]).abs().max()) / scale)
    assert all(0.05 < error <= 0.125 for error in errors)


@pytest.mark.parametrize(
    ("delta", "expected"),
    [(0.01, 198.5), (0.0156, 126.7), (0.1, 18.49), (0.25, 6.464), (1.0, 0.0)],
)
def test_the_table_of_xi(delta: float, expected: float) -> None:
    assert xi(delta) == pytest.approx(expected, rel=5e-4, abs=1e-12)


def test_the_later_analysis_allows_larger_steps() -> None:
    each = (1.0, 1.0, 1.0, 100.0)
    old, new = (largest_step(0.0, each, 0.01, new=n) for n in (False, True))
    assert new / old == pytest.approx(50.01 / 25.75, rel=1e-3)
    assert largest_step(2.0, each, 1.0, new=True) == 0.5


def test_the_dose_of_the_theory() -> None:
    root = math.sqrt(0.9)
    assert papers_eta(0.1) == pytest.approx(0.1 / (3 * root * (1 + root)))
    assert papers_eta(1.0) == 1.0


# ---------------------------------------------------------------- what all of them promise


@pytest.mark.parametrize("name", control.names())
def test_replicas_are_bit_identical_whatever_the_codec_drops(name: str) -> None:
    controls = [seated(name, i) for i in range(4)]
    x = vector(99)
    for t in range(2 * CHECKED + 3):  # checksums travel twice
        point = controls[0].point(x)
        vectors = [point - vector(i) + 0.1 * vector(100 * t + i) for i in range(4)]
        x = x - 0.05 * play_round(controls, vectors, x, t)
    assert bool(torch.isfinite(x).all())


@pytest.mark.parametrize("name", control.names())
def test_a_discarded_frame_leaves_no_trace(name: str) -> None:
    one, other = seated(name), seated(name)
    for t in range(5):
        other.publish(vector(1000 + t), key=t)
        other.discard()
        assert publish(one, vector(t), t) == publish(other, vector(t), t)
        assert torch.equal(one.close(vector(7)), other.close(vector(7)))
    assert one.checksum() == other.checksum()


@pytest.mark.parametrize("name", control.names())
@pytest.mark.parametrize("mid_round", [False, True])
def test_a_checkpoint_goes_on_as_if_nothing_had_been(
    name: str, mid_round: bool, tmp_path: Any
) -> None:
    """Through a real safetensors file, between rounds and within one."""
    pair = [seated(name, i) for i in range(2)]
    x = vector(50)
    for t in range(6):
        play_round(pair, [vector(2 * t + i) for i in range(2)], x, t)
    if mid_round:
        publish(pair[0], vector(60))
        number = pair[1].count + 1
        pair[0].receive(name_of(1), number, publish(pair[1], vector(61)))
    tensors, numbers = pair[0].state()
    safetensors.torch.save_file(tensors, tmp_path / "state.safetensors")
    fresh = seated(name, 0)
    fresh.restore((safetensors.torch.load_file(tmp_path / "state.safetensors"), numbers))
    assert fresh.count == pair[0].count
    if mid_round:
        assert torch.equal(fresh.close(x), pair[0].close(x))
    assert fresh.checksum() == pair[0].checksum()
    for t in range(3):
        assert publish(fresh, vector(70 + t)) == publish(pair[0], vector(70 + t))
        assert torch.equal(fresh.close(x), pair[0].close(x))


@pytest.mark.parametrize("name", control.names())
def test_frames_are_taken_once_and_in_order(name: str) -> None:
    author, peer = seated(name, 0), seated(name, 1)
    frames = []
    for t in range(3):
        frames.append(publish(author, vector(t)))
        author.close(vector(9))
    who = name_of(0)
    assert peer.receive(who, 2, frames[1]) is Taken.EARLY
    assert peer.receive(who, 1, frames[0]) is Taken.APPLIED
    assert peer.receive(who, 1, frames[0]) is Taken.KNOWN
    peer.close(vector(9))
    assert peer.receive(who, 3, frames[2]) is Taken.EARLY
    for number in (2, 3):
        assert peer.receive(who, number, frames[number - 1]) is Taken.APPLIED
        peer.close(vector(9))
    assert peer.checksum() == author.checksum()


@pytest.mark.parametrize("name", ROUNDS)
def test_an_author_has_one_frame_in_a_round(name: str) -> None:
    author, peer = seated(name, 0), seated(name, 1)
    first = publish(author, vector(1))
    author.close(vector(9))
    second = publish(author, vector(2))
    assert peer.receive(name_of(0), 1, first) is Taken.APPLIED
    assert peer.receive(name_of(0), 2, second) is Taken.EARLY


@pytest.mark.parametrize("name", control.names())
@pytest.mark.parametrize(
    "payload", [b"", b"\x07", b"\x00", b"\x00\x80", b"\x01abc", b"\x02\x00\x00", bytes(400)]
)
def test_what_is_no_frame_says_nothing_to_anyone(name: str, payload: bytes) -> None:
    author, peer = seated(name, 0), seated(name, 1)
    before = peer.state()[0]
    assert peer.receive(name_of(0), 1, payload) is Taken.REFUSED
    assert author.receive(name_of(0), 1, payload) is Taken.REFUSED
    after = peer.state()[0]
    held = {name: t for name, t in after.items() if bool(t.float().abs().sum())}
    assert all(torch.equal(t, before[name]) for name, t in held.items() if name in before)
    assert author.close(vector(9)).equal(peer.close(vector(9)))
    if name == "masha":
        assert author.listening  # its F_m at the anchor is part of nothing
        return
    assert peer.receive(name_of(0), 2, publish(author, vector(3))) is Taken.APPLIED
    assert author.close(vector(9)).equal(peer.close(vector(9)))


def mutated(data: bytes, rng: random.Random) -> bytes:
    """Return data with some bytes changed, cut off or added."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        changed[rng.randrange(len(changed))] = rng.randrange(256)
    if rng.random() < 0.3:
        changed = changed[: rng.randrange(len(changed))]
    return bytes(changed) + rng.randbytes(rng.choice([0, 0, 3]))


@pytest.mark.parametrize("name", control.names())
def test_damaged_frames_and_keyframes_raise_nothing_unforeseen(name: str) -> None:
    rng = random.Random(name)
    author, x = seated(name, 0), vector(9)
    for t in range(3):
        frame = publish(author, vector(t))
        author.close(x)
    keyframe = author.keyframe()
    for _ in range(150):
        peer = seated(name, 1)
        peer.take(keyframe)
        assert isinstance(peer.receive(name_of(0), 4, mutated(frame, rng)), Taken)
        assert bool(torch.isfinite(peer.close(x)).all())
        fresh = seated(name, 1)
        try:
            fresh.take(mutated(keyframe, rng))
        except PayloadError:
            assert fresh.checksum() == seated(name, 1).checksum()


def test_floats_that_are_not_finite_are_refused_in_anchor_rounds() -> None:
    author, peer = seated("masha", 0), seated("masha", 1)
    payload = bytearray(author.publish(vector(1)))
    payload[1:5] = torch.tensor([math.nan]).numpy().tobytes()
    assert peer.receive(name_of(0), 1, bytes(payload)) is Taken.REFUSED


# ---------------------------------------------------------------- loss, late joiners


@pytest.mark.parametrize("name", SHARING)
def test_lost_frames_are_sent_again_or_a_keyframe_is(name: str) -> None:
    settings = {"keep": 0.01} if name == "masha" else {}
    author, peer = seated(name, 0, **settings), seated(name, 1, **settings)
    who, x = name_of(0), vector(9)
    first = publish(author, vector(1))
    if name == "masha":
        assert author.anchoring
    lost = peer.lose(who, 1)
    assert (lost.remedy, lost.first, lost.last) == (Remedy.RESEND, 1, 1)
    again = author.resend(who, 1)
    assert again == first
    assert peer.receive(who, 1, again) is Taken.APPLIED
    assert torch.equal(author.close(x), peer.close(x))
    publish(author, vector(2))
    author.close(x)
    if name == "masha":
        peer.anchoring = author.anchoring = True
        assert peer.lose(who, 2).remedy is Remedy.RESEND
    else:
        assert peer.lose(who, 2).remedy is Remedy.RESEND
    assert peer.lose(who, 2).remedy is Remedy.KEYFRAME
    peer.take(author.keyframe())
    assert peer.checksum() == author.checksum()
    third = publish(author, vector(3))
    assert peer.receive(who, 3, third) is Taken.APPLIED
    with pytest.raises(ControlError, match="was applied"):
        peer.lose(who, 3)


def test_masha_goes_on_without_a_compressed_frame() -> None:
    trio = [seated("masha", i, keep=0.999999) for i in range(3)]
    x = vector(9)
    play_round(trio, [vector(i) for i in range(3)], x, 0)
    frames = [publish(one, vector(10 + i)) for i, one in enumerate(trio)]
    for one in trio[1:]:
        assert one.receive(name_of(1), 2, frames[1]) in {Taken.APPLIED, Taken.KNOWN}
        assert one.receive(name_of(2), 2, frames[2]) in {Taken.APPLIED, Taken.KNOWN}
        lost = one.lose(name_of(0), 2)
        assert (lost.remedy, lost.last) == (Remedy.REWEIGH, 2)
    assert torch.equal(trio[1].close(x), trio[2].close(x))


def test_ef14_takes_a_frame_back_that_nobody_got() -> None:
    one = exact("ef14", size=SIZE, step=1.0)
    publish(one, vector(1).double())
    assert one.lose(name_of(0), 1).remedy is Remedy.REWEIGH
    torch.testing.assert_close(one.error, vector(1).double(), rtol=0, atol=1e-15)
    assert not one.close(vector(1).double()).any()
    publish(one, vector(2).double())
    one.close(vector(1).double())
    with pytest.raises(ControlError, match="has been used"):
        one.lose(name_of(0), 2)


@pytest.mark.parametrize("name", SHARING)
def test_a_late_joiner_is_bit_identical_from_the_keyframe_on(name: str) -> None:
    pair = [seated(name, i) for i in range(2)]
    x = vector(9)
    for t in range(9):
        play_round(pair, [vector(2 * t + i) for i in range(2)], x, t)
    late = seated(name, 2)
    late.take(pair[1].keyframe())
    assert late.checksum() == pair[0].checksum()
    trio = [*pair, late]
    for t in range(9, 40):
        if late.listening:
            frames = [(name_of(i), publish(one, vector(3 * t + i))) for i, one in enumerate(pair)]
            for one in trio:
                for i, (who, payload) in enumerate(frames):
                    one.receive(who, pair[i].count, payload)
                one.close(x)
        else:
            play_round(trio, [vector(3 * t + i) for i in range(3)], x, t)
    assert late.count
    assert len({one.checksum() for one in trio}) == 1


@pytest.mark.parametrize("name", ["scallion", "scafcom"])
def test_the_average_stays_the_mean_of_the_variates_when_somebody_joins(name: str) -> None:
    pair = [seated(name, i) for i in range(2)]
    x = vector(9)
    for t in range(5):
        play_round(pair, [vector(2 * t + i) for i in range(2)], x, t)
    late = seated(name, 2)
    late.take(pair[0].keyframe())
    trio = [*pair, late]
    for t in range(5, 12):
        play_round(trio, [vector(3 * t + i) for i in range(3)], x, t)
    mean = torch.stack([one.own() for one in trio]).double().mean(0)
    torch.testing.assert_close(late.average.double(), mean, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", SHARING)
def test_a_replica_that_differs_is_found_and_replaced(name: str) -> None:
    author, peer = seated(name, 0), seated(name, 1)
    who, x = name_of(0), vector(9)
    for number in range(1, CHECKED):
        payload = publish(author, vector(number))
        author.close(x)
        assert peer.receive(who, number, payload) is Taken.APPLIED
        peer.close(x)
    shared = peer.replicas[who] if name in STREAMS else next(iter(peer._vectors().values()))
    shared[3] += 1e-3  # a bit flips in memory
    payload = publish(author, vector(0))
    assert peer.receive(who, CHECKED, payload) is Taken.DIVERGED
    assert peer.count == 0
    if name != "masha" or author.anchoring:
        assert peer.lose(who, CHECKED).remedy is Remedy.KEYFRAME
    author.close(x)
    peer.take(author.keyframe())
    assert peer.checksum() == author.checksum()


@pytest.mark.parametrize("name", SHARING)
def test_a_keyframe_that_is_none_changes_nothing(name: str) -> None:
    author, peer = seated(name, 0), seated(name, 1)
    publish(author, vector(1))
    author.close(vector(9))
    good = author.keyframe()
    parts = safetensors.torch.load(good)
    vectors = [k for k, t in parts.items() if t.shape == (SIZE,)]
    broken: list[bytes] = [b"", good[:-1], good[:40], b"\xff" * 100, safetensors.torch.save({})]
    for k in parts:
        broken.append(safetensors.torch.save({n: t for n, t in parts.items() if n != k}))
        broken.append(safetensors.torch.save({**parts, k: parts[k].to(torch.float16)}))
    for k in vectors:
        broken.append(safetensors.torch.save({**parts, k: parts[k][:-1].clone()}))
        broken.append(safetensors.torch.save({**parts, k: torch.full((SIZE,), math.inf)}))
    broken.append(safetensors.torch.save({**parts, "counts": -parts["counts"]}))
    broken.append(safetensors.torch.save({**parts, "more": torch.zeros(1)}))
    before = peer.checksum()
    for data in broken:
        with pytest.raises(PayloadError):
            peer.take(data)
    assert peer.checksum() == before
    peer.take(good)
    assert peer.checksum() == author.checksum()


def test_who_is_gone_counts_no_more() -> None:
    trio = [exact("ef21", i, size=SIZE, codec=Top(0)) for i in range(3)]
    gradients = [vector(i).double() for i in range(3)]
    play_round(trio, gradients, gradients[0], 0)
    for one in trio[:2]:
        one.leave(name_of(2))
        mean = (gradients[0] + gradients[1]) / 2
        torch.testing.assert_close(one.close(gradients[0]), mean, rtol=0, atol=1e-15)


def test_old_frames_are_not_kept_for_ever() -> None:
    one = seated("ef21")
    for t in range(KEPT_FRAMES + 3):
        publish(one, vector(t))
    assert one.resend(name_of(0), 3) is None
    assert one.resend(name_of(0), 4) is not None


def test_an_author_that_lost_its_memory_replays_its_own_frames() -> None:
    for name in control.names():
        author, again = seated(name), seated(name)
        for t in range(4):
            payload = publish(author, vector(t))
            author.close(vector(9))
            assert again.receive(name_of(0), t + 1, payload) is Taken.APPLIED
            again.close(vector(9))
        assert again.checksum() == author.checksum()
        assert again.count == 4
        publish(again, vector(5))


# ---------------------------------------------------------------- the registry


def test_each_says_why_the_ledger_refuses_it() -> None:
    reasons = {name: control.ledger(name) for name in control.names()}
    assert reasons.pop("ef14") == ""
    second = {name for name, reason in reasons.items() if "second shared vector" in reason}
    assert second == {"scallion", "scafcom"}
    assert all("mixing" in reasons[name] for name in reasons.keys() - second)


def test_an_unknown_method_is_answered_with_the_nearest() -> None:
    with pytest.raises(SettingError, match="did you mean 'econtrol'"):
        control.ledger("e-control")
    with pytest.raises(SettingError, match="setting of control"):
        control.filled("ef21", {"decay": 1})


@pytest.mark.parametrize(
    ("name", "settings", "why"),
    [
        ("ef14", {"step": 0.0}, "above 0"),
        ("ef21", {"momentum": 0.0}, "momentum"),
        ("ef21-w", {"smoothness": 0.0}, "smoothness"),
        ("econtrol", {"eta": 1.5}, "eta"),
        ("scallion", {"alpha": 2.0}, "alpha"),
        ("scafcom", {"momentum": 1.1}, "momentum"),
        ("masha", {"keep": 1.0}, "keep"),
    ],
)
def test_settings_out_of_range_are_refused(name: str, settings: dict[str, Any], why: str) -> None:
    with pytest.raises(SettingError, match=why):
        seated(name, **settings)


def test_a_codec_of_the_wrong_law_is_refused() -> None:
    with pytest.raises(SettingError, match="contractive codec"):
        exact("ef21", codec=One())
    with pytest.raises(SettingError, match="unbiased codec"):
        exact("scallion", codec=Top())
    with pytest.raises(SettingError, match="unbiased codec"):
        exact("masha", codec=Top(), memory=False)


# ---------------------------------------------------------------- floats through integer codecs


@pytest.mark.parametrize("magnitude", [1e-30, 1e-9, 1.0, 1e9, 1e18])
def test_a_frame_is_as_exact_for_small_vectors_as_for_large(magnitude: float) -> None:
    codec = scaled("dense", {"bits": 8})
    x = vector(1) * magnitude
    encoded = codec.encode(x)
    again = codec.decode(encoded.payload, SIZE)
    assert torch.equal(encoded.decoded.dense(), again.dense())
    assert float((again.dense() - x).double().norm()) < 0.01 * float(x.double().norm())
    assert len(encoded.payload) <= codec.bound(SIZE)


def test_zeros_are_zeros_and_what_cannot_be_said_is_refused() -> None:
    codec = scaled("dense", {"bits": 8})
    assert not codec.decode(codec.encode(torch.zeros(SIZE)).payload, SIZE).dense().any()
    with pytest.raises(ValueError, match="lower the step"):
        codec.encode(torch.full((SIZE,), 1e25))
    with pytest.raises(ValueError, match="NaN"):
        codec.encode(torch.full((SIZE,), math.nan))
    for payload in (b"", b"\x00" + bytes(70), b"\xff" + bytes(70)):
        with pytest.raises(PayloadError):
            codec.decode(payload, SIZE)
