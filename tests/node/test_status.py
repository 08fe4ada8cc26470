"""The types behind the status port survive their trip as JSON."""

import math

import msgspec
import pytest

from shoal.node.status import (
    Neighbour,
    Sockets,
    State,
    Status,
    Worker,
    compression_ratio,
    headline,
    known,
)

FULL = Status(
    version="0.1.0",
    peer="12D3KooWa",
    run="ab" * 32,
    name="stdlib-bytes",
    join=("/ip4/203.0.113.5/tcp/7464/p2p/12D3KooWa/run/" + "ab" * 32,),
    state=State.DEGRADED,
    why="log full",
    loss=2.25,
    neighbours=(Neighbour(id="12D3KooWb", rtt=0.25),),
    bytes_in={"push": 3},
    sockets=Sockets(bytes_in=5, bytes_out=8),
    agrees=True,
    worker=Worker(pid=7, restarts=1, device="cpu", memory=1 << 28),
    warnings=("libp2p is not installed",),
)


def test_a_status_survives_json() -> None:
    assert msgspec.json.decode(msgspec.json.encode(FULL), type=Status) == FULL


def test_a_field_of_a_newer_daemon_is_ignored_and_an_older_one_keeps_its_default() -> None:
    """`shoal status` of one version must read daemons of the next and of the last."""
    plain = msgspec.json.decode(msgspec.json.encode(FULL))
    plain["tomorrow"] = 1
    del plain["worker"]
    read = msgspec.json.decode(msgspec.json.encode(plain), type=Status)
    assert read == msgspec.structs.replace(FULL, worker=Worker())


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_json_cannot_say_is_unknown(value: float) -> None:
    assert known(value) is None
    assert known(2.5) == 2.5


def test_the_headline_says_why() -> None:
    assert headline(FULL) == "degraded: log full"
    assert headline(msgspec.structs.replace(FULL, state=State.TRAINING, why="")) == "training"


def test_compression_is_float32_gradients_at_every_step_by_what_was_published() -> None:
    assert compression_ratio(parameters=1000, steps=30, published=600) == 200.0
    assert compression_ratio(parameters=1000, steps=30, published=0) is None
