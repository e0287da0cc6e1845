"""What is looked at and what a lie costs, without anything that runs; and the parts of verification, one by one."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from wdmoe.errors import ExpertError
from wdmoe.moe.verification.norm_band import NormBand, Oddity
from wdmoe.moe.verification.quarantine import without
from wdmoe.moe.verification.recompute import Recomputer, differs, sample
from wdmoe.moe.verification.trust import PROBATION, WATCH, Look, Standing, look, share
from wdmoe.receipt import Ledger
from wdmoe.records import ExpertId
from wdmoe.transport.exchange import Order
from wdmoe.transport.routing import DeviceRoute, Routing

HIDDEN = 6


def order(tokens=3):
    """Experts 0 and 2 of layer 1: the first for tokens 0 and 1, the second for all."""
    rng = np.random.default_rng(0)
    return Order(
        route=b"r",
        layer=1,
        experts=(0, 2),
        counts=(2, tokens),
        tokens=rng.standard_normal((tokens, HIDDEN)).astype(np.float32),
        rows=np.array([0, 1, *range(tokens)], np.int32),
        weights=np.full(2 + tokens, 0.5, np.float32),
    )


class Doubles:
    """An expert that gives its number plus one times what it takes."""

    def __init__(self, factor):
        self.factor = factor

    def run(self, tokens):
        return tokens * np.float32(self.factor)


def recomputer(most_bytes=1 << 20, opened=None):
    def read(expert):
        if opened is not None:
            opened.append(expert)
        return bytes([expert.expert]) * 1000

    return Recomputer(read, lambda data: Doubles(data[0] + 1), most_bytes)


# ---- trust


def test_new_devices_are_looked_at_closely_and_trusted_ones_by_the_rate():
    assert [share(0.05, n) for n in (0, PROBATION - 1)] == [1, 1]
    assert share(0.05, 2 * PROBATION) == 0.5
    assert share(0.05, 10**6) == 0.05
    assert look(0.05, 0, doubtful=False, draw=0.999) is Look.NOW
    assert look(0.05, 10**6, doubtful=False, draw=0.04) is Look.LATER
    assert look(0.05, 10**6, doubtful=False, draw=0.06) is Look.TAKE


def test_without_a_rate_only_what_is_doubtful_is_looked_at():
    assert all(look(0, n, doubtful=False, draw=0.0) is Look.TAKE for n in (0, 5, 10**6))
    assert look(0, 10**6, doubtful=True, draw=0.99) is Look.NOW


@given(st.floats(0, 1), st.integers(0, 10**7))
def test_a_share_is_one_and_never_grows_with_trust(rate, answers):
    assert 0 <= share(rate, answers) <= 1
    assert share(rate, answers + 1) <= share(rate, answers)
    assert share(rate, answers) >= rate


@given(st.lists(st.integers(0, 3 * WATCH), min_size=1, max_size=6))
def test_two_lies_within_the_watch_and_no_others_are_a_quarantine(gaps):
    standing, at = Standing(), 0
    for gap in gaps:
        at += gap
        standing = standing.lied(at)
    assert standing.lies == len(gaps)
    assert standing.quarantined == any(gap < WATCH for gap in gaps[1:])
    assert standing.watched(at)
    assert not standing.watched(at + WATCH)


# ---- parts


def test_a_sample_of_some_rows_is_computed_as_the_whole():
    given_order = order()
    right = recomputer().run(sample(given_order, given_order.tokens, None)).partial
    np.testing.assert_allclose(right[:2], 2.0 * given_order.tokens[:2], rtol=1e-6)  # (1 + 3) / 2
    np.testing.assert_allclose(right[2], 1.5 * given_order.tokens[2], rtol=1e-6)
    for rows in ([0], [2], [0, 2], [1, 2]):
        at = np.array(rows, np.int32)
        some = recomputer().run(sample(given_order, right, at))
        np.testing.assert_array_equal(some.partial, right[at])


def test_a_sample_of_all_rows_has_its_own_tokens():
    """The next layer may write over those. Orders and answers are written once."""
    given_order = order()
    taken = sample(given_order, given_order.tokens.copy(), None)
    assert not np.shares_memory(taken.tokens, given_order.tokens)


def test_a_sample_of_some_rows_keeps_no_whole_message():
    given_order = order()
    partial = given_order.tokens.copy()
    taken = sample(given_order, partial, np.array([0, 2], np.int32))
    for ours in (taken.tokens, taken.partial, taken.rows, taken.weights):
        for theirs in (given_order.tokens, partial, given_order.rows, given_order.weights):
            assert not np.shares_memory(ours, theirs)


@pytest.mark.parametrize("factor", [1.0, 1.01, 1.5, 0.5, -1.0, 0.0, np.nan])
def test_what_differs(factor):
    given_order = order()
    right = recomputer().run(sample(given_order, given_order.tokens, None))
    for row in range(3):
        answer = right.partial.copy()
        answer[row] *= np.float32(factor)
        assert differs(sample(given_order, answer, None), right) == (factor not in (1.0, 1.01))


def test_experts_that_do_not_fit_are_opened_again_and_one_always_fits():
    given_order, opened = order(), []
    tight, roomy = recomputer(1000, opened), recomputer(1 << 20, opened)
    whole = sample(given_order, given_order.tokens, None)
    for _ in range(3):
        tight.run(whole)
    assert len(opened) == 6
    for _ in range(3):
        roomy.run(whole)
    assert len(opened) == 8


def test_a_right_answer_that_is_not_finite_proves_nothing():
    given_order = order()
    hot = Recomputer(lambda expert: b"x", lambda data: Doubles(np.inf), 1000)
    with pytest.raises(ExpertError, match="not finite"):
        hot.run(sample(given_order, given_order.tokens, None))


def band(low=1.0, high=4.0):
    bounds = {ExpertId(1, expert): (low, high) for expert in range(3)}
    return NormBand({1: 3}, bounds)


def test_a_band_is_wide_and_learns():
    given_order = order()
    ones = np.ones((3, HIDDEN), np.float32)
    assert band().oddity(given_order, ones)[0] is Oddity.NONE
    assert band().oddity(given_order, 0 * ones) == (Oddity.TOO_SMALL, 0)
    assert band().oddity(given_order, 1e30 * ones) == (Oddity.TOO_LARGE, 0)
    assert band().oddity(given_order, np.nan * ones) == (Oddity.NOT_FINITE, 0)
    learnt = band()
    size = np.float32(np.linalg.norm(1e3 * ones[0]))
    assert learnt.oddity(given_order, 1e3 * ones)[0] is Oddity.TOO_LARGE
    learnt.widen(1, {0: np.array([2 * size]), 2: np.array([2 * size])}, 1.0)
    assert learnt.oddity(given_order, 1e3 * ones)[0] is Oddity.NONE


def test_without_bounds_only_nothing_and_what_is_not_finite_are_odd():
    given_order, ones = order(), np.ones((3, HIDDEN), np.float32)
    plain = NormBand({1: 3}, {})
    assert plain.oddity(given_order, 1e30 * ones)[0] is Oddity.NONE
    assert plain.oddity(given_order, 0 * ones)[0] is Oddity.TOO_SMALL
    assert plain.oddity(given_order, np.inf * ones)[0] is Oddity.NOT_FINITE


def test_experts_that_give_nothing_are_odd_once():
    given_order, nothing = order(), np.zeros((3, HIDDEN), np.float32)
    learnt = NormBand({1: 3}, {})
    learnt.widen(1, {0: np.zeros(2), 2: np.zeros(3)}, 0.0)
    assert learnt.oddity(given_order, nothing)[0] is Oddity.NONE


# ---- quarantine


def routing(device_of, standby_of):
    devices = tuple(DeviceRoute(name, name, name.encode()) for name in "abc")
    rows = [{0: np.array(row, np.int32)} for row in (device_of, standby_of)]
    return Routing(devices, rows[0], frozenset({0}), rows[1])


def test_a_barred_device_is_nobody():
    table = routing([0, 0, 1, 2], [1, -1, 0, 1])
    left = without(table, {"a"})
    assert left.device_of[0].tolist() == [1, -1, 1, 2]
    assert left.standby_of[0].tolist() == [-1, -1, -1, 1]
    assert left.complete == frozenset()
    assert without(table, {"z"}) is table
    both = without(table, {"a", "b"})
    assert both.device_of[0].tolist() == [-1, -1, -1, 2]
    assert without(routing([0, 1], [1, 0]), {"a"}).complete == frozenset({0})


def test_a_barred_device_is_nobody_where_no_standbys_are_known():
    table = replace(routing([0, 1], [1, 0]), standby_of={})
    assert without(table, {"a"}).device_of[0].tolist() == [-1, 1]


# ---- receipts


def test_a_receipt_is_suspect_only_for_lies_found_after_it_trusted_the_liar():
    lies = {"a": 1}
    ledger = Ledger()
    ledger.take_unverified("a", lies)
    ledger.take_unverified("a", lies)
    ledger.take_unverified("b", lies)
    assert not ledger.receipt().suspect  # its first lie was known: from then on it was watched
    lies["c"] = 1
    assert not ledger.receipt().suspect  # it had no part in this
    lies["a"] = 2
    receipt = ledger.receipt()
    assert (receipt.suspect, receipt.suspect_answers) == (True, 2)
    late = Ledger()
    late.take_unverified("a", lies)
    assert not late.receipt().suspect
