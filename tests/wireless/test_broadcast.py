"""The broadcast channel: noise power by itself, fading and what is known of it, properties of both regions."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wdmoe.errors import ConfigError
from wdmoe.wireless.broadcast import (
    broadcast_awgn,
    broadcast_rayleigh,
    capacity_bits,
    draw_noise,
    noise_power,
    superposition_bits,
    time_division_bits,
)

DRAWS = 40_000
SPREAD = 5 / np.sqrt(DRAWS)  # relative, five standard deviations of a mean of exponential draws

decibels = st.floats(-20, 40)
shares = st.floats(0, 1)


@pytest.fixture
def rng():
    return np.random.default_rng(4)


@pytest.fixture
def symbols(rng):
    return np.exp(2j * np.pi * rng.random((20, DRAWS // 20)))


def test_noise_has_half_its_power_in_each_part(rng):
    noise = draw_noise(rng, 0.1, (DRAWS,))
    assert np.mean(np.abs(noise) ** 2) == pytest.approx(0.1, rel=SPREAD)
    assert noise.real.var() == pytest.approx(0.05, rel=2 * SPREAD)
    assert noise.imag.var() == pytest.approx(0.05, rel=2 * SPREAD)
    assert abs(np.mean(noise**2)) < 0.1 * SPREAD  # circular


def test_noise_power_is_one_over_the_snr():
    np.testing.assert_allclose(noise_power([0, 10, -10, 3]), [1, 0.1, 10, 10**-0.3])


def test_each_user_hears_the_symbols_in_noise_of_its_own_snr(rng, symbols):
    heard = broadcast_awgn(rng, symbols, [10, 5])
    noise = heard.symbols - symbols
    for user, snr_db in enumerate((10, 5)):
        assert np.mean(np.abs(noise[user]) ** 2) == pytest.approx(10 ** (-snr_db / 10), rel=SPREAD)
    assert abs(np.mean(noise[0] * noise[1].conj())) < SPREAD  # independent
    assert np.all(heard.gain == 1)
    assert np.all(heard.known_gain == 1)


@pytest.mark.parametrize("error", [0, 0.1, 1])
def test_fading_has_power_1_and_the_estimate_the_rest(rng, error):
    heard = broadcast_rayleigh(rng, np.ones((DRAWS // 2, 1)), [10, 0], error)
    assert np.mean(np.abs(heard.gain) ** 2) == pytest.approx(1, rel=SPREAD)
    off = heard.gain - heard.known_gain
    assert np.mean(np.abs(off) ** 2) == pytest.approx(error, rel=SPREAD, abs=1e-12)
    assert np.mean(np.abs(heard.known_gain) ** 2) == pytest.approx(1 - error, rel=SPREAD, abs=1e-12)
    assert abs(np.mean(off * heard.known_gain.conj())) < SPREAD


def test_the_same_seed_gives_the_same_digits(symbols):
    first, second = (broadcast_rayleigh(np.random.default_rng(1), symbols, [3, 1], 0.2) for _ in range(2))
    assert np.array_equal(first.symbols, second.symbols)
    assert np.array_equal(first.known_gain, second.known_gain)


def test_capacity_counts_complex_uses():
    assert capacity_bits(0) == pytest.approx(1)
    assert capacity_bits(10 * np.log10(15)) == pytest.approx(4)


@settings(max_examples=60)
@given(decibels, decibels, shares)
def test_superposition_contains_time_division(first_db, second_db, share):
    """At the stronger user's rate of time division, superposition leaves the weaker user at least as much."""
    snr_db = np.array([first_db, second_db])
    strong = int(np.argmax(snr_db))
    turns = time_division_bits(snr_db, share)
    power = np.expm1(turns[strong] * np.log(2)) / 10 ** (snr_db[strong] / 10)  # that buys the same rate
    bits = superposition_bits(snr_db, np.clip(power if strong == 0 else 1 - power, 0, 1))
    assert np.all(bits >= turns - 1e-9 * (1 + turns))


@settings(max_examples=60)
@given(decibels, decibels, shares, shares)
def test_a_larger_share_never_lowers_the_first_rate_nor_raises_the_second(first_db, second_db, one, other):
    low, high = sorted((one, other))
    for bits in (superposition_bits, time_division_bits):
        less, more = bits([first_db, second_db], low), bits([first_db, second_db], high)
        assert more[0] >= less[0] - 1e-12
        assert more[1] <= less[1] + 1e-12


@settings(max_examples=60)
@given(decibels, decibels, shares, st.floats(0, 10))
def test_rates_never_fall_with_an_snr(first_db, second_db, share, more_db):
    """Of two users of unequal SNR, as long as their order stays: SIC is the stronger one's."""
    for bits in (superposition_bits, time_division_bits):
        less = bits([max(first_db, second_db), min(first_db, second_db)], share)
        more = bits([max(first_db, second_db) + more_db, min(first_db, second_db)], share)
        assert np.all(more >= less - 1e-12)


@settings(max_examples=60)
@given(decibels, decibels)
def test_ends_of_both_regions_are_the_capacities(first_db, second_db):
    alone = capacity_bits([first_db, second_db])
    for bits in (superposition_bits, time_division_bits):
        np.testing.assert_allclose(bits([first_db, second_db], 1), [alone[0], 0], atol=1e-12)
        np.testing.assert_allclose(bits([first_db, second_db], 0), [0, alone[1]], atol=1e-12)


@settings(max_examples=60)
@given(decibels, decibels, shares)
def test_the_order_of_the_users_does_not_matter(first_db, second_db, share):
    for bits in (superposition_bits, time_division_bits):
        there, back = bits([first_db, second_db], share), bits([second_db, first_db], 1 - share)
        if abs(first_db - second_db) > 1e-6:  # else either may be the one who cancels
            np.testing.assert_allclose(there, back[::-1], atol=1e-9)


def test_superposition_by_hand():
    bits = superposition_bits([10, 0], [0.3, 0.5])
    np.testing.assert_allclose(bits, [[2, np.log2(1 + 0.7 / 1.3)], [np.log2(6), np.log2(1 + 0.5 / 1.5)]])


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda rng: broadcast_awgn(rng, np.full((2, 3), 2.0), [1, 2]), "mean power 1"),
        (lambda rng: broadcast_awgn(rng, np.full((2, 3), np.nan), [1, 2]), "power of symbols"),
        (lambda rng: broadcast_awgn(rng, np.ones(3), [1, 2]), "block, use"),
        (lambda rng: broadcast_awgn(rng, np.ones((2, 3)), [1, np.inf]), "snr_db"),
        (lambda rng: broadcast_rayleigh(rng, np.ones((2, 3)), [1, 2], 1.5), "csi_error"),
        (lambda rng: draw_noise(rng, -1, (2,)), "power"),
        (lambda rng: draw_noise(rng, [1, 2], ()), "power"),
        (lambda _: time_division_bits([1, 2, 3], 0.5), "two users"),
        (lambda _: superposition_bits([1, 2], 1.1), "share"),
    ],
)
def test_input_that_makes_no_sense_is_named(rng, call, named):
    with pytest.raises(ConfigError, match=named):
        call(rng)
