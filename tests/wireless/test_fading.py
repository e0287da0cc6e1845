"""Fading against its distributions and correlations, with fixed seeds."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from wdmoe.errors import ConfigError
from wdmoe.wireless.doppler import BlockFading, bessel_j0, doppler_hz, jakes_correlation
from wdmoe.wireless.fading import draw_rayleigh, draw_rician, power_gain
from wdmoe.wireless.shadowing import draw_shadowing_db, move_shadowing_db

DRAWS = 40_000
KS_1_PERCENT = 1.63  # Kolmogorov's limit times sqrt(draws)


@pytest.fixture
def rng():
    return np.random.default_rng(20)


def ks_distance(sample, cdf):
    """Largest distance between the sample's steps and a distribution."""
    ordered = np.sort(sample)
    wanted = cdf(ordered)
    steps = np.arange(ordered.size + 1) / ordered.size
    return max((steps[1:] - wanted).max(), (wanted - steps[:-1]).max())


def normal_cdf(values):
    return np.array([0.5 * math.erfc(-value / math.sqrt(2)) for value in values])


def test_rayleigh_power_is_exponential(rng):
    power = power_gain(draw_rayleigh(rng, (DRAWS,)))
    assert ks_distance(power, lambda x: -np.expm1(-x)) < KS_1_PERCENT / math.sqrt(DRAWS)
    assert power.mean() == pytest.approx(1, abs=4 / math.sqrt(DRAWS))


def test_rayleigh_phase_is_uniform_and_independent(rng):
    amplitude = draw_rayleigh(rng, (DRAWS,))
    turns = np.angle(amplitude) / (2 * np.pi) + 0.5
    assert ks_distance(turns, lambda x: x) < KS_1_PERCENT / math.sqrt(DRAWS)
    assert abs(np.corrcoef(amplitude.real, amplitude.imag)[0, 1]) < 4 / math.sqrt(DRAWS)


@pytest.mark.parametrize("k", [0, 1, 4, 30])
def test_rician_moments(rng, k):
    power = power_gain(draw_rician(rng, k, (DRAWS,)))
    assert power.mean() == pytest.approx(1, abs=4 / math.sqrt(DRAWS))
    assert power.var() == pytest.approx((1 + 2 * k) / (1 + k) ** 2, rel=0.06)


def test_rician_extremes(rng):
    assert power_gain(draw_rician(rng, math.inf, (5,))) == pytest.approx(np.ones(5))
    power = power_gain(draw_rician(rng, 0, (DRAWS,)))
    assert ks_distance(power, lambda x: -np.expm1(-x)) < KS_1_PERCENT / math.sqrt(DRAWS)
    assert draw_rician(rng, [0, 3], (4, 1)).shape == (4, 2)


def test_bessel_against_tables():
    # Abramowitz and Stegun, table 9.1; zeros of table 9.5
    known = {0: 1, 1: 0.765197686557967, 5: -0.177596771314338, 10: -0.245935764451348, 17.5: -0.103110398228686}
    assert bessel_j0(list(known)) == pytest.approx(list(known.values()), abs=2e-15)
    assert bessel_j0([2.404825557695773, 5.520078110286311, 30.634606468431976]) == pytest.approx([0, 0, 0], abs=1e-14)
    assert bessel_j0([100, 1000]) == pytest.approx([0.019985850304223, 0.024786686152420], abs=1e-14)


def test_bessel_halves_meet():
    below, above = bessel_j0([25, np.nextafter(25, 26)])
    assert above == pytest.approx(below, abs=1e-13)


def test_doppler_by_hand():
    assert doppler_hz(1.5, 3.5e9) == pytest.approx(17.51, abs=0.005)
    assert jakes_correlation(17.5, 0.005) == pytest.approx(float(bessel_j0(2 * math.pi * 17.5 * 0.005)))


def correlation_of(track, lag):
    """Over blocks and links; amplitudes have mean power 1."""
    return (track[lag:] * track[: track.shape[0] - lag].conj()).mean().real


def test_neighbours_are_correlated_by_j0(rng):
    track = BlockFading(rng, np.full(4000, 20.0), 0.01).track(60)
    wanted = float(jakes_correlation(20, 0.01))
    assert correlation_of(track, 0) == pytest.approx(1, abs=0.02)
    assert correlation_of(track, 1) == pytest.approx(wanted, abs=0.02)
    assert correlation_of(track, 3) == pytest.approx(wanted**3, abs=0.02)  # what order 1 gives instead of J0(3 x)


def test_a_higher_order_is_j0_at_every_lag(rng):
    track = BlockFading(rng, np.full(4000, 20.0), 0.01, order=12).track(40)
    wanted = jakes_correlation(20, 0.01 * np.arange(13))
    got = [correlation_of(track, lag) for lag in range(13)]
    assert got == pytest.approx(wanted, abs=0.03)
    power = power_gain(track[-1])
    assert ks_distance(power, lambda x: -np.expm1(-x)) < KS_1_PERCENT / math.sqrt(power.size)


@pytest.mark.parametrize("order", [1, 5, 50])
def test_what_stands_still_does_not_fade(rng, order):
    track = BlockFading(rng, [0.0, 0.01], 1e-4, order=order).track(100)
    assert np.abs(track - track[0]).max() < 2e-3


def test_a_track_is_advance_repeated_and_seeds_repeat():
    def fading():
        return BlockFading(np.random.default_rng(5), [3.0, 30.0], 0.01, k_factor=[0, 2], order=3)

    one, two = fading(), fading()
    np.testing.assert_array_equal(one.track(4), [two.advance() for _ in range(4)])
    np.testing.assert_array_equal(one.amplitude, two.amplitude)


def test_rician_blocks_keep_their_moments(rng):
    power = power_gain(BlockFading(rng, np.full(DRAWS, 40.0), 0.01, k_factor=4).track(3)[-1])
    assert power.mean() == pytest.approx(1, abs=4 / math.sqrt(DRAWS))
    assert power.var() == pytest.approx(9 / 25, rel=0.05)


@given(st.floats(0, 1e4), st.floats(1e-5, 1), st.integers(1, 30))
def test_any_doppler_gives_finite_amplitudes(shift_hz, block_s, order):
    track = BlockFading(np.random.default_rng(1), [shift_hz], block_s, order=order).track(5)
    assert np.isfinite(track).all()


def test_shadowing_is_normal_in_decibels(rng):
    drawn = draw_shadowing_db(rng, 7.82, (DRAWS,))
    assert ks_distance(drawn / 7.82, normal_cdf) < KS_1_PERCENT / math.sqrt(DRAWS)
    assert draw_shadowing_db(rng, [4.0, 6.0], (3, 1)).shape == (3, 2)


def test_shadowing_moves_with_the_device(rng):
    first = draw_shadowing_db(rng, 6.0, (DRAWS,))
    then = move_shadowing_db(rng, first, 6.0, 13.0, 13.0)
    assert np.corrcoef(first, then)[0, 1] == pytest.approx(math.exp(-1), abs=0.02)
    assert then.std() == pytest.approx(6, rel=0.02)
    np.testing.assert_array_equal(move_shadowing_db(rng, first, 6.0, 0.0, 13.0), first)


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda rng: draw_rician(rng, -1), "k_factor must be zero or positive"),
        (lambda rng: draw_rician(rng, "strong"), "k_factor must be a number"),
        (lambda rng: draw_rician(rng, math.nan), "k_factor must be zero or positive"),
        (lambda rng: draw_rician(rng, [1, 2], (3,)), r"k_factor \(2,\), draws \(3,\)"),
        (lambda rng: draw_shadowing_db(rng, -4), "sigma_db must be zero or positive, got -4"),
        (lambda rng: move_shadowing_db(rng, 1, 4, -1, 10), "moved_m must be zero or positive"),
        (lambda rng: BlockFading(rng, 5.0, 0.01), "doppler_hz must have one axis"),
        (lambda rng: BlockFading(rng, [5.0], 0.0), "block_s must be positive, got 0"),
        (lambda rng: BlockFading(rng, [5.0], 0.01, order=0), "order must be within 1 to 200, got 0"),
        (lambda rng: BlockFading(rng, [5.0], 0.01, k_factor=[1, 2]), "k_factor must have one value or one a link"),
        (lambda rng: BlockFading(rng, [5.0], 0.01).track(0), "blocks must be 1 or more"),
        (lambda rng: bessel_j0(math.inf), "argument must be finite"),
    ],
)
def test_bad_input_is_named(rng, call, told):
    with pytest.raises(ConfigError, match=told):
        call(rng)
