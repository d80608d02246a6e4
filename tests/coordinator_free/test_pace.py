from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator_free.pace import LEAST_STEPS, MARGIN, MOST_STEPS, LocalConfig, Pace

AUTO = LocalConfig(local_steps=0, delay_steps=5)
WAITING = LocalConfig(local_steps=0, delay_steps=0, communication=0.05)


def measured(config: LocalConfig, fragments: int, step_s: float, exchange_s: float) -> Pace:
    pace = Pace(config, fragments)
    for _ in range(30):
        pace.stepped(step_s)
        pace.exchanged(exchange_s)
    return pace


@given(st.integers(1, 500), st.integers(1, 64))
def test_the_rounds_of_a_cycle_have_all_steps_between_them(steps: int, fragments: int) -> None:
    fragments = min(steps, fragments)
    pace = Pace(LocalConfig(local_steps=steps), fragments)
    each = [pace.steps(round) for round in range(fragments)]
    assert sum(each) == steps
    assert max(each) - min(each) <= 1
    assert [pace.steps(round + fragments) for round in range(fragments)] == each


def test_before_anything_is_measured_it_is_the_least() -> None:
    pace = Pace(AUTO, 6)
    assert [pace.steps(n) for n in range(6)] == [LEAST_STEPS // 6] * 6
    assert pace.delay(0) == 5
    assert "nothing is measured" in pace.reason


def test_configured_steps_are_kept_whatever_the_link() -> None:
    pace = measured(LocalConfig(local_steps=60, delay_steps=7), 6, 0.1, 100.0)
    assert (pace.steps(0), pace.delay(0)) == (10, 7)
    assert pace.reason == "60: as configured"


def test_a_fast_link_leaves_the_least_and_the_shortest_delay() -> None:
    pace = measured(AUTO, 6, step_s=0.1, exchange_s=0.05)
    assert sum(pace.steps(n) for n in range(6)) == LEAST_STEPS
    assert pace.delay(0) == 1


def test_a_slow_link_is_hidden_behind_the_steps_of_a_round() -> None:
    pace = measured(AUTO, 6, step_s=0.1, exchange_s=0.8)
    steps, delay = pace.steps(0), pace.delay(0)
    assert delay * 0.1 >= 0.8 * MARGIN - 1e-9
    assert delay == steps == 10
    assert "0.0% of the time" in pace.reason


@pytest.mark.parametrize("exchange_s", [0.1, 0.3])
def test_without_a_delay_waiting_has_its_share(exchange_s: float) -> None:
    pace = measured(WAITING, 1, step_s=0.1, exchange_s=exchange_s)
    work_s = pace.steps(0) * 0.1
    assert exchange_s / (exchange_s + work_s) <= 0.05 + 1e-9


def test_no_link_makes_rounds_longer_than_the_most() -> None:
    pace = measured(AUTO, 6, step_s=0.01, exchange_s=1000.0)
    assert sum(pace.steps(n) for n in range(6)) == MOST_STEPS
    assert pace.delay(0) <= pace.steps(0)


def test_one_slow_exchange_does_not_change_everything() -> None:
    pace = measured(AUTO, 6, step_s=0.3, exchange_s=0.5)
    usual = pace.steps(0)
    pace.exchanged(60.0)
    assert pace.steps(0) == usual
    # A link that has become slow does.
    for _ in range(3):
        pace.exchanged(6.0)
    assert pace.steps(0) == 25


def test_the_first_exchange_compiles_kernels_and_tells_nothing_of_the_link() -> None:
    pace = Pace(AUTO, 6)
    pace.stepped(0.1)
    pace.exchanged(12.0)
    assert not pace.measured
    assert pace.steps(0) == LEAST_STEPS // 6
    pace.exchanged(0.1)
    assert pace.measured
    assert "an exchange 0.1 s" in pace.reason


def test_where_the_most_steps_are_not_enough_it_says_so() -> None:
    pace = measured(AUTO, 6, step_s=0.1, exchange_s=100.0)
    assert "500, the most there may be: a step takes 0.1 s" in pace.reason


def test_no_delay_is_longer_than_a_round() -> None:
    pace = Pace(LocalConfig(local_steps=10, delay_steps=5), 6)
    assert [pace.delay(n) for n in range(6)] == [pace.steps(n) for n in range(6)]


@given(
    st.floats(1e-4, 10), st.floats(1e-3, 1e3), st.integers(1, 12), st.sampled_from([AUTO, WAITING])
)
def test_there_is_always_a_step_and_never_too_many(
    step_s: float, exchange_s: float, fragments: int, config: LocalConfig
) -> None:
    pace = measured(config, fragments, step_s, exchange_s)
    each = [pace.steps(round) for round in range(fragments)]
    assert min(each) >= 1
    assert LEAST_STEPS <= sum(each) <= MOST_STEPS
    for round, steps in zip(itertools.count(), each):
        assert 0 <= pace.delay(round) <= steps
