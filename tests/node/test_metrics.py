"""Counters: named, labelled, bounded."""

import pytest

from shoal.node.metrics import LABELS, Counters


def test_counters_add_up_by_label() -> None:
    counters = Counters()
    counters.add("dropped", "bad signature")
    counters.add("dropped", "bad signature", 4)
    counters.add("dropped", "oversize")
    assert counters.of("dropped") == {"bad signature": 5, "oversize": 1}
    assert counters.total("dropped") == 6


def test_a_counter_that_does_not_exist_is_our_bug() -> None:
    with pytest.raises(KeyError):
        Counters().add("droped", "oversize")


def test_labels_are_bounded_and_nothing_is_lost() -> None:
    counters = Counters()
    for number in range(3 * LABELS):
        counters.add("events", f"event {number}")
    assert len(counters.of("events")) == LABELS + 1
    assert counters.total("events") == 3 * LABELS


def test_what_is_returned_is_a_copy() -> None:
    counters = Counters()
    counters.of("dropped")["oversize"] = 9
    assert counters.of("dropped") == {}
