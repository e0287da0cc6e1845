"""The price that dropping must earn: learnt from what accounts hold."""

from __future__ import annotations

import numpy as np
import pytest

from wdmoe.moe.drop_price import DAMPING, FIRST, STEP, DropPrice


def test_a_price_begins_with_what_a_layer_takes():
    price = DropPrice()
    assert price.seconds(1.0, 1.0) == 0
    price.spent(unspent=1.0, allowance=1.0, layer_s=0.01)
    assert price.seconds(1.0, 1.0) == pytest.approx(FIRST * 0.01)


def test_an_empty_account_makes_dropping_dearer_and_a_full_one_cheaper():
    price = DropPrice()
    price.spent(0.0, 1.0, layer_s=0.01)
    assert price.seconds(1.0, 1.0) == pytest.approx(FIRST * 0.01 * np.exp(STEP))
    assert price.seconds(0.0, 1.0) == pytest.approx(FIRST * 0.01 * np.exp(STEP + DAMPING))
    price.spent(40.0, 1.0, layer_s=5.0)  # however full, one step; and what a layer takes counts once
    assert price.seconds(1.0, 1.0) == pytest.approx(FIRST * 0.01)
    assert price.seconds(40.0, 1.0) == pytest.approx(FIRST * 0.01 * np.exp(-DAMPING))


def test_requests_spend_what_they_may():
    """Gains of all sizes are on offer: the price settles where one in five is taken, as many as the account pays."""
    rng, price, unspent, spent, prices = np.random.default_rng(2), DropPrice(), 0.0, 0.0, []
    for _ in range(20_000):
        unspent = min(unspent + 0.05, 6.0)
        price_s = price.seconds(unspent, 1.5)
        if price_s and rng.exponential(0.01) > price_s * 0.25 and unspent >= 0.25:
            unspent, spent = unspent - 0.25, spent + 0.25
        price.spent(unspent, 1.5, layer_s=0.01)
        prices.append(price_s)
    assert spent == pytest.approx(0.05 * 20_000, rel=0.02)
    assert np.median(prices[10_000:]) == pytest.approx(0.04 * np.log(5), rel=0.15)


def test_a_mean_worth_follows_and_counts_tokens():
    price = DropPrice()
    assert price.mean_worth(3) == 0
    price.saw(3, 8.0, tokens=4)
    assert price.mean_worth(3) == 2.0
    price.saw(3, 300.0, tokens=100)
    assert price.mean_worth(3) == pytest.approx(3.0, rel=0.01)
    assert price.mean_worth(4) == 0
