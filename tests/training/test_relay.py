"""Two calls that take turns: the order, how they end, and that nobody is left behind."""

import threading
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.training.relay import Relay, StoppedError


@pytest.fixture(autouse=True)
def _nobody_is_left_behind() -> Iterator[None]:
    before = threading.active_count()
    yield
    assert threading.active_count() == before


def call(relay: Relay, log: list[tuple[int, int]], role: int, steps: int) -> Callable[[], str]:
    def walk() -> str:
        for step in range(steps):
            assert relay.role() == relay.running == role
            log.append((role, step))
            relay.hand_over(role)
        return f"{role} took {steps}"

    return walk


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 9), st.integers(0, 9))
def test_they_alternate_until_one_ends_and_then_the_other_goes_on(first: int, second: int) -> None:
    relay, log = Relay(), list[tuple[int, int]]()
    said = relay.run(call(relay, log, 0, first), call(relay, log, 1, second))
    assert said == (f"0 took {first}", f"1 took {second}")
    both = [(role, step) for step in range(min(first, second)) for role in (0, 1)]
    longer = 0 if first > second else 1
    rest = [(longer, step) for step in range(min(first, second), max(first, second))]
    assert log == both + rest
    assert relay.role() is None


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 1),
    st.integers(0, 5),
    st.sampled_from([KeyError("k"), KeyboardInterrupt(), SystemExit(3), StopIteration()]),
    st.booleans(),
)
def test_what_one_raises_comes_out_and_the_other_is_stopped(
    role: int, at: int, error: BaseException, swallow: bool
) -> None:
    relay, stopped, began = Relay(), list[int](), list[int]()

    def broken() -> None:
        for _ in range(at):
            relay.hand_over(role)
        raise error

    def other() -> None:
        began.append(1)
        for _ in range(20):
            try:
                relay.hand_over(1 - role)
            except StoppedError:
                stopped.append(1)
                if not swallow:
                    raise

    calls = (broken, other) if role == 0 else (other, broken)
    with pytest.raises(type(error)) as caught:
        relay.run(*calls)
    assert caught.value is error
    assert bool(began) == bool(stopped) == (role == 1 or at > 0)


def test_both_may_fail() -> None:
    relay = Relay()

    def first() -> None:
        try:
            relay.hand_over(0)
        except StoppedError:
            raise ValueError("on the way out") from None

    def second() -> None:
        raise KeyError("labels")

    with pytest.raises(ValueError, match="on the way out"):
        relay.run(first, second)


def test_threads_that_a_call_starts_are_neither_of_the_two() -> None:
    relay, roles = Relay(), list[int | None]()

    def call() -> None:
        thread = threading.Thread(target=lambda: roles.append(relay.role()))
        thread.start()
        thread.join()

    relay.run(call, call)
    assert roles == [None, None]
