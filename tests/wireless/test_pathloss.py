"""Path loss against closed forms and values worked out by hand from the formulas of TR 38.901."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from wdmoe.errors import ConfigError
from wdmoe.wireless.pathloss import free_space_db, log_distance_db
from wdmoe.wireless.tr38901 import (
    INH_MIXED,
    INH_OPEN,
    SCENARIOS,
    UMA,
    UMI,
    breakpoint_m,
    decorrelation_m,
    draw_environment_height_m,
    los_probability,
    path_loss_db,
    scenario_named,
    shadowing_sigma_db,
)

HAND = 5e-4  # what a value rounded to three digits may differ
EVERY = pytest.mark.parametrize("scenario", SCENARIOS.values(), ids=list(SCENARIOS))


def test_free_space_is_friis():
    wavelength_m = 299_792_458 / 3.5e9
    received = (wavelength_m / (4 * math.pi * 250)) ** 2  # Friis, isotropic antennas
    assert free_space_db(250, 3.5e9) == pytest.approx(-10 * math.log10(received))
    assert free_space_db(1000, 1e9) == pytest.approx(92.448, abs=HAND)  # the engineers' 92.45 dB of 1 km at 1 GHz


def test_log_distance_by_hand():
    assert log_distance_db(100, 1e9, 3) == pytest.approx(32.448 + 60, abs=HAND)
    assert log_distance_db(50, 2e9, 2) == pytest.approx(float(free_space_db(50, 2e9)))
    np.testing.assert_allclose(log_distance_db([5, 10], 2e9, 4, 10), free_space_db([5, 10], 2e9))


@pytest.mark.parametrize(
    ("scenario", "distance_m", "carrier_hz", "los", "expected_db"),
    [
        # d3D = sqrt(100^2 + 8.5^2) = 100.3606; 32.4 + 21 x 2.001563 + 20 x 0.544068
        (UMI, 100, 3.5e9, True, 85.314),
        # 22.4 + 35.3 x 2.001563 + 21.3 x 0.544068
        (UMI, 100, 3.5e9, False, 104.644),
        # d'BP = 4 x 9 x 0.5 x 3.5e9 / 3e8 = 210 m; d3D = 1000.0361;
        # 32.4 + 40 x 3.0000157 + 10.88136 - 9.5 log10(210^2 + 8.5^2 = 44172.25) = 9.5 x 4.645149
        (UMI, 1000, 3.5e9, True, 119.153),
        # d3D = sqrt(500^2 + 23.5^2) = 500.5519; 28 + 22 x 2.699449 + 20 x log10(2) = 6.0206; d'BP = 4 x 24 x 0.5 x 20/3
        # = 320 m, so: 28 + 40 x 2.699449 + 6.0206 - 9 log10(320^2 + 23.5^2 = 102952.25) = 9 x 5.012636
        (UMA, 500, 2e9, True, 96.885),
        # 13.54 + 39.08 x 2.699449 + 6.0206
        (UMA, 500, 2e9, False, 125.055),
        # d3D = sqrt(20^2 + 2^2) = 20.0998; 32.4 + 17.3 x 1.303191 + 20 x log10(5) = 13.9794
        (INH_OPEN, 20, 5e9, True, 68.925),
        # 17.3 + 38.3 x 1.303191 + 24.9 x 0.69897
        (INH_OPEN, 20, 5e9, False, 84.617),
    ],
)
def test_spot_values(scenario, distance_m, carrier_hz, los, expected_db):
    assert path_loss_db(scenario, distance_m, carrier_hz, los) == pytest.approx(expected_db, abs=HAND)


def test_high_devices_lose_less_behind_walls():
    low, high = path_loss_db(UMA, 300, 6e9, False, device_height_m=np.array([1.5, 11.5]))
    assert 5 < low - high < 7  # 0.6 dB a metre, a little changed by the slant


@pytest.mark.parametrize("scenario", [UMI, UMA])
def test_los_is_continuous_at_the_breakpoint(scenario):
    edge = float(breakpoint_m(scenario.station_height_m, 1.5, 3.5e9))
    before, after = path_loss_db(scenario, np.array([edge * (1 - 1e-9), edge * (1 + 1e-9)]), 3.5e9, True)
    assert after == pytest.approx(before, abs=1e-6)
    assert edge == pytest.approx(4 * (scenario.station_height_m - 1) * 0.5 * 3.5e9 / 3e8)


@EVERY
def test_beyond_the_breakpoint_lies_the_report_s_own_formula(scenario):
    if not scenario.has_breakpoint:
        assert path_loss_db(scenario, 140, 3.5e9, True) < path_loss_db(scenario, 140, 3.5e9, False)
        return
    height = scenario.station_height_m - 1.5
    intercept, slope = scenario.los[:2]
    edge = breakpoint_m(scenario.station_height_m, 1.5, 0.7e9)
    expected = intercept + 40 * math.log10(math.hypot(900, height)) + 20 * math.log10(0.7)
    expected -= (40 - slope) / 2 * math.log10(edge**2 + height**2)
    assert path_loss_db(scenario, 900, 0.7e9, True) == pytest.approx(expected)


@EVERY
@given(st.floats(1, 140), st.floats(1, 140), st.booleans(), st.floats(0.5e9, 100e9))
def test_loss_never_falls_with_distance(scenario, one_m, other_m, los, carrier_hz):
    scale = 30 if scenario.has_breakpoint else 1
    distances = np.sort([one_m, other_m]) * scale
    near, far = path_loss_db(scenario, distances, carrier_hz, los, extrapolate=True)
    assert far >= near


@given(st.floats(0.1, 1e4), st.floats(0.1, 1e4), st.floats(0, 6))
def test_log_distance_never_falls_with_distance(one_m, other_m, exponent):
    near, far = log_distance_db(np.sort([one_m, other_m]), 2.4e9, exponent)
    assert far >= near


@EVERY
def test_blocked_links_are_never_better(scenario):
    distance = np.linspace(10, 140, 50)
    assert (path_loss_db(scenario, distance, 28e9, False) >= path_loss_db(scenario, distance, 28e9, True)).all()


def test_los_probability_by_hand():
    assert los_probability(UMI, [5, 18]).tolist() == [1, 1]
    assert los_probability(UMI, 100) == pytest.approx(0.18 + math.exp(-100 / 36) * 0.82)
    assert los_probability(UMA, 100) == pytest.approx(0.18 + math.exp(-100 / 63) * 0.82)
    roof = 1 + 1.25 * math.exp(-100 / 150) * 0.5**1.5  # h_UT = 18 m
    assert los_probability(UMA, 100, 18) == pytest.approx((0.18 + math.exp(-100 / 63) * 0.82) * roof)
    assert los_probability(INH_OPEN, [4, 27, 100]) == pytest.approx(
        [1, math.exp(-22 / 70.8), 0.54 * math.exp(-51 / 211.7)]
    )
    assert los_probability(INH_MIXED, [1, 5.9, 39.1]) == pytest.approx([1, math.exp(-1), 0.32 * math.exp(-1)])


@EVERY
@given(st.floats(0.01, 1e4), st.floats(1.5, 3))
def test_los_probability_is_a_probability(scenario, distance_m, height_m):
    assert 0 <= los_probability(scenario, distance_m, height_m) <= 1


def test_tables_of_shadowing():
    assert shadowing_sigma_db(UMI, [True, False]).tolist() == [4, 7.82]
    assert shadowing_sigma_db(UMA, [True, False]).tolist() == [4, 6]
    assert shadowing_sigma_db(INH_MIXED, [True, False]).tolist() == [3, 8.03]
    assert decorrelation_m(UMA, [True, False]).tolist() == [37, 50]


def test_environment_heights_of_high_devices():
    rng = np.random.default_rng(3)
    assert (draw_environment_height_m(rng, np.full(100, 200.0), 13) == 1).all()
    drawn = draw_environment_height_m(rng, np.full(20_000, 200.0), 22.5)
    assert set(np.unique(drawn)) == {1, 12, 15, 18, 21}
    roof = 1.25 * 8 * math.exp(-200 / 150) * 0.95**1.5
    assert (drawn == 1).mean() == pytest.approx(1 / (1 + roof), abs=0.012)
    loss = path_loss_db(UMA, np.full(20_000, 200.0), 3.5e9, True, device_height_m=22.5, environment_height_m=drawn)
    assert np.isfinite(loss).all()


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda: free_space_db(0, 1e9), "distance_m must be positive, got 0"),
        (lambda: free_space_db(1, math.nan), "carrier_hz must be finite, got nan"),
        (lambda: free_space_db("far", 1e9), "distance_m must be a number"),
        (lambda: free_space_db([1, 2], [1e9, 1e9, 1e9]), r"distance_m \(2,\), carrier_hz \(3,\)"),
        (lambda: log_distance_db(10, 1e9, -2), "exponent must be zero or positive"),
        (lambda: path_loss_db(UMI, [20, 5001], 3.5e9, True), "distance_m must be within 10 to 5000, where umi holds"),
        (lambda: path_loss_db(INH_OPEN, 200, 3.5e9, True), "3-D distance_m must be within 1 to 150"),
        (lambda: path_loss_db(UMI, 100, 3.5e6, True), "carrier_hz must be within 5e"),
        (lambda: path_loss_db(UMI, 100, 3.5e9, 0.5), "los must be true or false"),
        (lambda: path_loss_db(UMI, 100, 3.5e9, True, device_height_m=0.5), "device_height_m must be within 1.5"),
        (lambda: path_loss_db(UMI, 100, 3.5e9, True, environment_height_m=2), "environment_height_m must be below"),
        (lambda: scenario_named("rural"), "scenario must be one of umi, uma, inh-open, inh-mixed; got 'rural'"),
    ],
)
def test_bad_input_is_named(call, told):
    with pytest.raises(ConfigError, match=told):
        call()
