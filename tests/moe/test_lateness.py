"""When an answer is late and who is slow, by a clock of our own."""

from __future__ import annotations

import math

import numpy as np
import pytest

from wdmoe.moe.hedge_budget import MOST, SHARE, HedgeBudget
from wdmoe.moe.lateness import FIRST_TRIAL_S, LATE_TO_OPEN, LEAST_S, LONGEST_TRIAL_S, Lateness
from wdmoe.transport.exchange import Expected

SLOW, FAST, OTHER = b"slow", b"fast", b"other"


def expect(
    lateness: Lateness, route: bytes = SLOW, copy: bytes = FAST, size: int = 4, owed_s: float = 0.0, air_s: float = 0.0
) -> Expected:
    return lateness.expect(route, copy, size, owed_s=owed_s, air_s=air_s, prompt=False, unknown_s=9.0)


def seen(**seconds: float) -> Lateness:
    """Ten orders of 4 assignments on each connection took about so long."""
    lateness = Lateness()
    for name, each_s in seconds.items():
        for i in range(10):
            lateness.learn(name.encode(), 4, each_s * (1 + 0.1 * (-1) ** i))
    return lateness


def answer(lateness: Lateness, seconds: float, now_s: float, route: bytes = SLOW, copy: bytes = FAST) -> None:
    lateness.answered(route, expect(lateness, route, copy), seconds, now_s)
    lateness.learn(route, 4, seconds)


def test_nothing_is_known_at_first_so_nothing_is_late() -> None:
    expected = expect(Lateness())
    assert (expected.copy_s, expected.late_s) == (9.0, math.inf)


def test_who_is_slow_from_its_first_answer_on_is_found_by_comparison() -> None:
    lateness = seen(slow=0.5, fast=0.003)
    expected = expect(lateness)
    assert expected.copy_s == expected.late_s == LEAST_S
    for i in range(LATE_TO_OPEN):
        assert not lateness.slow
        answer(lateness, 0.5, float(i))
    assert lateness.slow == {(SLOW, False)}
    assert lateness.is_slow(SLOW)
    assert not lateness.is_slow(FAST)


def test_a_copy_that_was_never_measured_counts_as_the_one_in_the_middle() -> None:
    lateness = seen(slow=0.5, other=0.003, third=0.004, fourth=0.1)
    assert expect(lateness).late_s == LEAST_S
    assert expect(seen(slow=0.5)).late_s == math.inf


def test_a_slower_board_is_no_fault_unless_a_copy_is_clearly_faster() -> None:
    lateness = seen(slow=0.06, fast=0.04)
    for i in range(100):
        answer(lateness, 0.06, float(i))
    assert not lateness.slow
    assert expect(lateness).late_s > 0.06


def test_one_answer_late_now_and_then_opens_nothing() -> None:
    lateness = seen(slow=0.003, fast=0.003)
    for i in range(300):
        answer(lateness, 0.5 if i % 4 == 0 else 0.003, float(i))
    assert not lateness.slow


def test_where_all_are_slow_nobody_is() -> None:
    lateness = seen(slow=0.003, fast=0.003)
    for i in range(200):
        answer(lateness, 0.3, float(i))
        answer(lateness, 0.3, float(i), FAST, SLOW)
    circuits = lateness.slow
    assert expect(lateness).late_s > 0.3
    for route, _ in circuits:  # whoever was first to be judged; its trials are in time by now
        for i in range(3):
            lateness.tried(route, expect(lateness, route, FAST if route == SLOW else SLOW), 0.3, 300.0 + i)
    assert not lateness.slow


def test_sizes_are_apart_and_the_nearest_stands_for_one_not_seen() -> None:
    lateness = seen(fast=0.1)
    lateness.learn(FAST, 64, 1.6)
    four, more = expect(lateness), expect(lateness, size=1024)
    assert expect(lateness, size=16).late_s == expect(lateness, size=64).late_s  # of the next larger: not too early
    assert expect(lateness, size=1).late_s == four.late_s
    assert more.late_s == pytest.approx(16 * expect(lateness, size=64).late_s)


def test_what_its_device_has_to_do_before_and_the_air_come_on_top() -> None:
    lateness = seen(slow=0.003, fast=0.003)
    assert expect(lateness, owed_s=0.2, air_s=0.05).late_s == pytest.approx(0.25 + LEAST_S)
    assert expect(lateness, owed_s=0.2, air_s=0.05).copy_s == pytest.approx(0.25 + LEAST_S)


def test_trials_come_rarer_while_it_stays_slow_and_three_good_ones_end_it() -> None:
    lateness = seen(slow=0.5, fast=0.003)
    for _ in range(LATE_TO_OPEN):
        answer(lateness, 0.5, 0.0)
    assert not lateness.trial_due(SLOW, False, FIRST_TRIAL_S / 2)
    assert not lateness.trial_due(FAST, False, 1e6)
    now_s, waits = 0.0, []
    for _ in range(10):
        begun_s = now_s
        while not lateness.trial_due(SLOW, False, now_s):
            now_s += 0.01
        assert not lateness.trial_due(SLOW, False, now_s + 1)  # one at a time
        waits.append(now_s - begun_s)
        lateness.tried(SLOW, expect(lateness), 0.5, now_s)
    assert waits == pytest.approx([0.5, 1, 2, 4, 8, 16, *[LONGEST_TRIAL_S] * 4], abs=0.1)
    for seconds in (0.003, 0.003, math.inf, 0.003, 0.003):
        lateness.tried(SLOW, expect(lateness), seconds, now_s)
    assert lateness.slow
    lateness.tried(SLOW, expect(lateness), 0.003, now_s)
    assert not lateness.slow


def test_who_is_slow_again_soon_is_tried_later() -> None:
    lateness = seen(slow=0.5, fast=0.003)
    pauses = []
    for start_s in (0.0, 10.0, 1000.0):
        for _ in range(LATE_TO_OPEN):
            answer(lateness, 0.5, start_s)
        pauses.append(next(t for t in np.arange(0, 5, 0.01) if lateness.trial_due(SLOW, False, start_s + float(t))))
        for _ in range(3):
            lateness.tried(SLOW, expect(lateness), 0.003, start_s + 1)
        assert not lateness.slow
    assert pauses == pytest.approx([FIRST_TRIAL_S, 2 * FIRST_TRIAL_S, FIRST_TRIAL_S], abs=0.02)


def test_a_connection_that_is_gone_leaves_nothing_behind() -> None:
    lateness = seen(slow=0.5, fast=0.003)
    for _ in range(LATE_TO_OPEN):
        answer(lateness, 0.5, 0.0)
    lateness.forget_all_but({FAST})
    assert not lateness.slow
    assert expect(lateness, copy=OTHER).copy_s == LEAST_S  # by the one that is left


@pytest.mark.parametrize("late", [0.0, 0.01, 1.0])
def test_hedges_are_a_small_share_however_many_answers_are_late(late: float, rng: np.random.Generator) -> None:
    budget, orders, hedges = HedgeBudget(), 20_000, 0
    for is_late in rng.random(orders) < late:
        budget.earn(1)
        hedges += bool(is_late) and budget.spend(1)
    assert hedges <= MOST + SHARE * orders
    assert hedges <= 0.05 * orders
    if late == 0.01:
        assert hedges == pytest.approx(late * orders, rel=0.2)  # none refused


def test_a_device_whose_copies_are_on_several_needs_them_all_at_once() -> None:
    budget = HedgeBudget()
    assert not budget.spend(int(MOST) + 1)
    assert budget.spend(int(MOST))
    assert not budget.spend(1)


def test_one_hiccup_of_a_copy_does_not_make_a_slow_device_look_early() -> None:
    lateness = seen(slow=0.003, fast=0.003)
    lateness.learn(FAST, 4, 0.6)
    assert expect(lateness).late_s < 0.5
    for i in range(LATE_TO_OPEN):
        answer(lateness, 0.5, float(i))
    assert lateness.slow == {(SLOW, False)}


def test_what_takes_longer_from_now_on_is_learnt_in_some_answers() -> None:
    lateness = seen(fast=0.003)
    for _ in range(12):
        lateness.learn(FAST, 4, 0.5)
    assert expect(lateness).late_s > 0.5


def test_who_was_slow_once_is_no_measure_for_others_afterwards() -> None:
    """Two devices hold copies of one another's experts; one is slow and recovers, then the other one is slow."""
    lateness = seen(slow=0.003, fast=0.003, other=0.003)
    now_s = 0.0
    while not lateness.slow:
        answer(lateness, 0.5, now_s)
        now_s += 1.0
    while lateness.slow:
        now_s += LONGEST_TRIAL_S
        lateness.learn(SLOW, 4, 0.003)
        lateness.tried(SLOW, expect(lateness), 0.003, now_s)
    assert expect(lateness, FAST, SLOW).late_s < 0.5
