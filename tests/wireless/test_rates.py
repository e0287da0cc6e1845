"""Noise, rates, outage, compute and energy: closed forms, standards' tables, and what must hold for any numbers."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from wdmoe.errors import ConfigError
from wdmoe.units import parse_quantity
from wdmoe.wireless.compute import arithmetic_s, expert_bytes, expert_flop, roofline_s
from wdmoe.wireless.energy import PowerUse, token_energy
from wdmoe.wireless.fading import draw_rayleigh, draw_rician, power_gain
from wdmoe.wireless.mcs import Mcs, McsTable, nr_table, wifi_table
from wdmoe.wireless.noise import noise_density_w_hz, noise_power_w, snr_hz
from wdmoe.wireless.outage import rayleigh_outage, rician_outage
from wdmoe.wireless.rates import SHANNON, Shannon, fixed_density_bps, fixed_power_bps, wideband_limit_bps

BANDS = st.floats(1, 1e9)
STRENGTHS = st.floats(1, 1e13)
TABLES = pytest.mark.parametrize("table", [nr_table(), wifi_table()], ids=lambda table: table.name)
DRAWS = 200_000


def test_noise_is_minus_174_dbm():
    assert 10 * math.log10(noise_density_w_hz() / 1e-3) == pytest.approx(-173.975, abs=5e-4)
    assert noise_density_w_hz(7) == pytest.approx(noise_density_w_hz() * 10**0.7)
    assert noise_power_w(20e6, parse_quantity("-174dBm/Hz", "noise density")) == pytest.approx(7.96e-14, rel=1e-3)


def test_noise_of_this_density_has_this_power():
    # The classical 3 dB mistake: N0 B is the power of complex noise, halved between its two parts.
    power = noise_power_w(1e6, noise_density_w_hz())
    noise = math.sqrt(power) * draw_rayleigh(np.random.default_rng(2), (DRAWS,))
    assert power_gain(noise).mean() == pytest.approx(float(power), rel=0.01)
    assert noise.real.var() == pytest.approx(float(power) / 2, rel=0.02)


def test_rates_by_hand():
    strength = snr_hz(10, 1e-10, 4e-21)
    assert strength == pytest.approx(2.5e11)
    assert fixed_power_bps(1e6, 3e6) == pytest.approx(2e6)
    assert fixed_power_bps(1e6, 2 * 7e6, Shannon(gap_db=10 * math.log10(2))) == pytest.approx(3e6)
    assert fixed_density_bps(1e6, 3e7, 1e7) == pytest.approx(2e6)
    assert fixed_power_bps([0, 1e6], [1e9, 0]).tolist() == [0, 0]


def test_both_ways_of_spending_agree_on_the_whole_band():
    assert fixed_power_bps(20e6, 4e9) == pytest.approx(float(fixed_density_bps(20e6, 4e9, 20e6)))
    assert fixed_power_bps(5e6, 4e9) > fixed_density_bps(5e6, 4e9, 20e6)


@pytest.mark.parametrize(("snr_db", "expected_ms"), [(0, 5.2), (10, 1.5), (20, 0.79), (30, 0.53)])
def test_a_mixtral_token_one_way(snr_db, expected_ms):
    rate = fixed_power_bps(12.5e6, 12.5e6 * 10 ** (snr_db / 10))
    assert 65_536 / rate * 1e3 == pytest.approx(expected_ms, rel=0.02)


@given(BANDS, BANDS, STRENGTHS, st.floats(0, 1))
def test_fixed_power_rises_and_is_concave_in_the_band(one, other, strength, share):
    assert (fixed_power_bps(max(one, other), strength) - fixed_power_bps(min(one, other), strength)) >= -1e-6
    between = fixed_power_bps(share * one + (1 - share) * other, strength)
    chord = share * fixed_power_bps(one, strength) + (1 - share) * fixed_power_bps(other, strength)
    assert between >= chord * (1 - 1e-12)
    assert fixed_power_bps(one, strength) <= wideband_limit_bps(strength)


@given(BANDS, STRENGTHS, STRENGTHS, st.floats(0, 1))
def test_rates_rise_and_are_concave_in_snr(band, one, other, share):
    for rate in (fixed_power_bps, lambda band, strength: fixed_density_bps(band, strength, 2e9)):
        low, high = rate(band, np.sort([one, other]))
        assert high >= low
        chord = share * rate(band, one) + (1 - share) * rate(band, other)
        assert rate(band, share * one + (1 - share) * other) >= chord * (1 - 1e-12)


@given(BANDS, BANDS, STRENGTHS)
def test_fixed_density_is_proportional_to_the_band(one, other, strength):
    total = fixed_density_bps(one, strength, 2e9) + fixed_density_bps(other, strength, 2e9)
    assert fixed_density_bps(one + other, strength, 2e9) == pytest.approx(float(total), rel=1e-12)


@given(BANDS, STRENGTHS, st.floats(1e-3, 1e3))
def test_units_do_not_matter(band, strength, scale):
    scaled = fixed_power_bps(band * scale, strength * scale)
    assert scaled == pytest.approx(scale * float(fixed_power_bps(band, strength)), rel=1e-9)


def test_extremes_stay_finite():
    bands, strengths = np.meshgrid([0, 1e-300, 1, 1e100], [0, 1e-300, 1, 1e100])
    assert np.isfinite(fixed_power_bps(bands, strengths)).all()
    assert np.isfinite(fixed_power_bps(bands, strengths, nr_table())).all()


def test_nr_ladder_is_the_standard_s():
    table = nr_table(gap_db=0)
    efficiency = {rung.number: rung.efficiency_bps_hz for rung in table.rungs}
    # Spectral efficiencies as table 5.1.3.1-1 prints them
    printed = {0: 0.2344, 9: 1.3262, 10: 1.3281, 16: 2.5703, 18: 2.7305, 28: 5.5547}
    assert {number: round(efficiency[number], 4) for number in printed} == printed
    assert 17 not in efficiency
    snr = table.thresholds()
    np.testing.assert_allclose(table.efficiency_bps_hz(snr * (1 + 1e-9)), SHANNON.efficiency_bps_hz(snr), rtol=1e-6)


def test_wifi_ladder_is_the_standard_s():
    table = wifi_table()
    mbps = [20 * rung.efficiency_bps_hz for rung in table.rungs]
    # Mbit/s of one stream in 20 MHz at a guard interval of 0.8 us
    printed = [8.6, 17.2, 25.8, 34.4, 51.6, 68.8, 77.4, 86.0, 103.2, 114.7, 129.0, 143.4]
    assert mbps == pytest.approx(printed, abs=0.05)
    # -82 dBm over -174 + 73.01 + 10 + 5 dBm of noise and allowance
    assert table.rungs[0].threshold_db == pytest.approx(-82 + 85.99, abs=0.01)


@TABLES
@given(snr_db=st.floats(-30, 60))
def test_a_ladder_never_beats_shannon_and_never_falls(table, snr_db):
    snr = 10 ** (snr_db / 10)
    assert table.efficiency_bps_hz(snr) <= SHANNON.efficiency_bps_hz(snr)
    assert table.efficiency_bps_hz(snr * 1.1) >= table.efficiency_bps_hz(snr)
    assert (table.number(snr) == -1) == (table.efficiency_bps_hz(snr) == 0)


def test_ladder_by_hand():
    table = McsTable(name="two", rungs=(Mcs(3, 1.0, 0.0), Mcs(5, 2.0, 10.0)), overhead=0.1)
    assert table.number([0.5, 1, 9, 10, 1e9]).tolist() == [-1, 3, 3, 5, 5]
    assert table.efficiency_bps_hz([0.5, 1, 10]).tolist() == [0, 0.9, 1.8]
    # At 1 kHz and S = 10 kHz the SNR is 10; twice the band falls to the lower rung
    assert fixed_power_bps([1e3, 2e3], 1e4, table).tolist() == [1800, 1800]
    assert fixed_density_bps([1e3, 2e3], 1e4, 1e3, table).tolist() == [1800, 3600]


def test_rayleigh_outage_is_the_closed_form():
    rng = np.random.default_rng(4)
    faded = 5 * power_gain(draw_rayleigh(rng, (DRAWS,)))
    assert rayleigh_outage(2, 5) == pytest.approx(1 - math.exp(-0.4))
    assert (faded < 2).mean() == pytest.approx(float(rayleigh_outage(2, 5)), abs=0.004)
    assert rayleigh_outage(1e-20, 1) == pytest.approx(1e-20)


@pytest.mark.parametrize("k", [0.5, 4, 60])
def test_rician_outage_is_what_draws_give(k):
    faded = power_gain(draw_rician(np.random.default_rng(5), k, (DRAWS,)))
    for level in (0.3, 0.9, 1.4):
        assert (faded < level).mean() == pytest.approx(float(rician_outage(level, 1, k)), abs=0.004)


@given(st.floats(1e-12, 1e3))
def test_rician_outage_without_steady_path_is_rayleigh(level):
    for k in (0, 1e-15):
        assert rician_outage(level, 1, k) == pytest.approx(float(rayleigh_outage(level, 1)), rel=1e-11)


@given(st.floats(0, 1e4), st.floats(0, 1e6), st.floats(0, 1e6))
def test_rician_outage_is_a_rising_probability(k, one, other):
    low, high = rician_outage(np.sort([one, other]), 1.0, k)
    assert 0 <= low <= high * (1 + 1e-9)
    assert high <= 1


def test_rician_outage_keeps_small_digits():
    # For x -> 0 the density of |h|^2 at 0 is (1 + K) e^-K
    assert rician_outage(1e-12, 1, 20) == pytest.approx(21 * math.exp(-20) * 1e-12, rel=1e-8)


@TABLES
def test_blind_choice_is_the_best_rung(table):
    choice = table.blind_choice([1.0, 30.0, 1000.0], [0.0, 5.0, 0.0])
    for position, (mean, k) in enumerate([(1.0, 0.0), (30.0, 5.0), (1000.0, 0.0)]):
        arriving = [
            r.efficiency_bps_hz * (1 - rician_outage(10 ** (r.threshold_db / 10), mean, k)) for r in table.rungs
        ]
        best = int(np.argmax(arriving))
        assert choice.number[position] == table.rungs[best].number
        assert choice.efficiency_bps_hz[position] == pytest.approx(arriving[best])
        assert 0 < choice.outage[position] < 1
    assert (choice.efficiency_bps_hz <= table.efficiency_bps_hz(1e6)).all()


def test_mixtral_computes():
    assert expert_flop(4096, 14336) == pytest.approx(352e6, rel=2e-3)
    assert expert_bytes(4096, 14336) == pytest.approx(352e6, rel=2e-3)
    # One token: reading 352 MB at 200 GB/s is 1.76 ms, 352 MFLOP at 10 TFLOP/s are 35 us
    assert roofline_s(1, 352e6, 10e12, 352e6, 200e9) == pytest.approx(1.76e-3)
    assert roofline_s(1000, 352e6, 10e12, 352e6, 200e9) == arithmetic_s(1000, 352e6, 10e12)
    assert roofline_s([0, 2], 1.0, 1.0, 10.0, 1.0, 3.0).tolist() == [0, 16]


@given(st.integers(0, 10_000), st.floats(1, 1e12), st.floats(1, 1e14), st.floats(0, 1e10), st.floats(1, 1e12))
def test_the_roofline_is_never_below_arithmetic(tokens, flop, flop_s, weights, memory):
    time_s = roofline_s(tokens, flop, flop_s, weights, memory)
    assert time_s >= arithmetic_s(tokens, flop, flop_s)
    assert roofline_s(tokens + 1, flop, flop_s, weights, memory) >= time_s


def test_energy_by_hand():
    use = PowerUse(
        station_transmit_w=10, device_transmit_w=[0.2, 0.4], device_receive_w=1, device_compute_w=15,
        amplifier_efficiency=0.5,
    )  # fmt: skip
    energy = token_energy(use, [1e-3, 2e-3], 4e-3, [0, 1e-3])
    assert energy.station_radio_j == pytest.approx([0.02, 0.04])
    assert energy.device_radio_j == pytest.approx([0.0016 + 0.001, 0.0032 + 0.002])
    assert energy.device_compute_j == pytest.approx([0, 0.015])
    assert energy.total_j == pytest.approx([0.0226, 0.0602])


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda: noise_density_w_hz(-1), "noise_figure_db must be within 0 to 1000, got -1"),
        (lambda: snr_hz(-1, 1, 1), "power_w must be zero or positive"),
        (lambda: fixed_power_bps(-1, 1), "band_hz must be within 0 to"),
        (lambda: fixed_power_bps(1, math.inf), "snr_hz must be finite"),
        (lambda: fixed_density_bps(1, 1, 0), "total_hz must be within"),
        (lambda: fixed_power_bps([1, 2], [1, 2, 3]), r"band_hz \(2,\), snr_hz \(3,\)"),
        (lambda: Shannon(gap_db=-1), "gap_db must be zero or positive"),
        (lambda: SHANNON.efficiency_bps_hz(-0.1), "snr must be zero or positive"),
        (lambda: McsTable(name="none", rungs=()), "rungs must not be empty"),
        (lambda: McsTable(name="odd", rungs=(Mcs(0, 1, 3), Mcs(1, 2, 3))), "rungs must rise"),
        (lambda: nr_table(overhead=1), "overhead must be at least 0 and below 1"),
        (lambda: nr_table().blind_choice(0), "mean_snr must be positive"),
        (lambda: rayleigh_outage(1, 0), "mean_snr must be positive"),
        (lambda: rician_outage(1, 1, 1e5), "k_factor must be within 0 to 10000"),
        (lambda: roofline_s(1, 1, 1, 1, 0), "memory_bytes_s must be positive"),
        (lambda: expert_flop(4, 4, -1), "activation_flop must be zero or positive"),
        (lambda: PowerUse(station_transmit_w=1, device_transmit_w=-1), "device_transmit_w must be zero or positive"),
        (lambda: PowerUse(station_transmit_w=1, device_transmit_w=1, amplifier_efficiency=2), "amplifier_efficiency"),
        (lambda: token_energy(PowerUse(station_transmit_w=1, device_transmit_w=1), [1, 2], [1, 2, 3], 0), "shapes"),
    ],
)
def test_bad_input_is_named(call, told):
    with pytest.raises(ConfigError, match=told):
        call()
