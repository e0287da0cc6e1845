"""Dropping a single token's experts at a price: against every choice there is."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from wdmoe.solver.bandwidth import Links, allocate_bandwidth
from wdmoe.solver.priced_drop import drop_at_price

DEVICES, BAND_HZ = 6, 10e6


def made_links(rng: np.random.Generator) -> Links:
    snr_hz = 10 ** rng.uniform(7, 10, DEVICES)
    return Links(
        downlink_snr_hz=snr_hz,
        uplink_snr_hz=snr_hz / 10,
        downlink_bits=18e3,
        uplink_bits=18e3,
        compute_s=rng.uniform(0, 3e-3, DEVICES),
    )


def cost_s(device: np.ndarray, worth: np.ndarray, kept: np.ndarray, links: Links, price_s: float) -> float:
    load = np.bincount(device[kept], minlength=DEVICES).astype(float)
    return float(allocate_bandwidth(load, links, BAND_HZ).latency_s) + price_s * float(worth[~kept].sum())


def test_near_the_best_of_all_choices() -> None:
    rng, excess = np.random.default_rng(7), []
    for _ in range(200):
        links, device = made_links(rng), rng.integers(0, DEVICES, 4)
        worth, price_s = rng.dirichlet(np.ones(4)), float(10 ** rng.uniform(-3, -1))
        kept = drop_at_price(device, worth, links, BAND_HZ, price_s, 1.0)
        choices = (np.array(choice) for choice in itertools.product((False, True), repeat=4) if any(choice))
        best_s = min(cost_s(device, worth, choice, links, price_s) for choice in choices)
        found_s = cost_s(device, worth, kept, links, price_s)
        assert found_s <= cost_s(device, worth, np.ones(4, bool), links, price_s) + 1e-12
        excess.append(found_s / best_s - 1)
    assert np.mean(np.array(excess) < 1e-6) > 0.9
    assert np.mean(excess) < 0.01


@pytest.mark.parametrize("may_drop", [0.0, 0.2, 0.5])
def test_no_more_than_may_be_dropped(may_drop: float) -> None:
    rng = np.random.default_rng(3)
    for _ in range(50):
        worth = rng.dirichlet(np.ones(4))
        kept = drop_at_price(rng.integers(0, DEVICES, 4), worth, made_links(rng), BAND_HZ, 1e-9, may_drop)
        assert worth[~kept].sum() <= may_drop
        assert may_drop or kept.all()


def test_one_stays_whatever_it_costs() -> None:
    rng = np.random.default_rng(5)
    kept = drop_at_price(np.array([0, 1, 2, 3]), np.full(4, 0.25), made_links(rng), BAND_HZ, 1e-12, 9.0)
    assert kept.sum() == 1


def test_what_nobody_serves_costs_nothing() -> None:
    links = made_links(np.random.default_rng(1))
    assert drop_at_price(np.array([-1, -1]), np.ones(2), links, BAND_HZ, 1e-9, 9.0).all()
    assert drop_at_price(np.array([-1, 2]), np.ones(2), links, BAND_HZ, 1e9, 9.0).all()
