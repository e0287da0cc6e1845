"""Values sent as amplitudes: closed forms against the channel itself, and what can never be."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wdmoe.errors import ConfigError
from wdmoe.wireless.analog import (
    allocate_energy,
    analog_distortion,
    component_distortion,
    separate_distortion,
    superposed_distortion,
    unbiased_distortion,
)
from wdmoe.wireless.analog_code import AnalogCode, Spectrum, fitted_code, plain_code, superpose
from wdmoe.wireless.broadcast import broadcast_awgn

VALUES, BLOCKS = 48, 4000
SPREAD = 0.02  # relative, of a mean over BLOCKS x VALUES squares
SNRS_DB = (-5.0, 5.0, 20.0)

decibels = st.floats(-30, 60)
ratios = st.floats(0.05, 8)


def heard(code: AnalogCode, vectors: np.ndarray, snr_db: tuple[float, ...]) -> np.ndarray:
    """(users, blocks, values) through the real channel."""
    symbols, scale = code.encode(vectors)
    received = broadcast_awgn(np.random.default_rng(3), symbols, snr_db).symbols
    return np.stack([code.decode(each, scale, 10 ** (db / 10)) for each, db in zip(received, snr_db, strict=True)])


def measured(code: AnalogCode, vectors: np.ndarray, snr_db: tuple[float, ...] = SNRS_DB) -> np.ndarray:
    """(users,) square errors over squares of what varies."""
    error = heard(code, vectors, snr_db) - vectors
    return (error**2).sum(axis=(1, 2)) / ((vectors - code.mean) ** 2).sum()


def white() -> np.ndarray:
    return np.random.default_rng(1).standard_normal((BLOCKS, VALUES)) * 7.0


def a_spectrum() -> tuple[Spectrum, np.ndarray]:
    """A spectrum over four decades, its mean not zero, and vectors that have it."""
    rng = np.random.default_rng(2)
    turned = np.linalg.qr(rng.standard_normal((VALUES, VALUES)))[0]
    variances, mean = np.logspace(2, -2, VALUES), rng.standard_normal(VALUES) * 5
    vectors = mean + (rng.standard_normal((BLOCKS, VALUES)) * np.sqrt(variances)) @ turned
    return Spectrum.of(mean, turned.T @ np.diag(variances) @ turned), vectors


@pytest.mark.parametrize("ratio", [0.25, 0.5, 1, 1.5, 2, 3])
def test_white_values_arrive_as_the_closed_form_says(ratio: float) -> None:
    code = plain_code(VALUES, round(ratio * VALUES / 2))
    np.testing.assert_allclose(measured(code, white()), analog_distortion(SNRS_DB, ratio), rtol=SPREAD)


def test_least_square_error_beats_plain_scaling() -> None:
    code, vectors = plain_code(VALUES, VALUES // 2), white()
    symbols, scale = code.encode(vectors)
    received = broadcast_awgn(np.random.default_rng(3), symbols, SNRS_DB).symbols
    uses = np.stack([received.real, received.imag], axis=-1).reshape(len(SNRS_DB), BLOCKS, -1) * np.sqrt(2)
    scaled = ((uses * scale[:, None] - vectors) ** 2).sum(axis=(1, 2)) / (vectors**2).sum()
    np.testing.assert_allclose(scaled, unbiased_distortion(SNRS_DB), rtol=SPREAD)
    assert (measured(code, vectors) < scaled).all()


@pytest.mark.parametrize("ratio", [0.25, 1, 2])
@pytest.mark.parametrize("design_db", [0.0, 15.0])
def test_fitted_codes_arrive_as_the_closed_form_says(ratio: float, design_db: float) -> None:
    spectrum, vectors = a_spectrum()
    code = fitted_code(spectrum, round(ratio * VALUES / 2), 10 ** (design_db / 10))
    energy = np.zeros(VALUES)
    energy[: len(code.energy)] = code.energy
    wanted = component_distortion(spectrum.variances, energy, 10 ** (np.array(SNRS_DB) / 10))
    # The closed form has one scale for all blocks; here each block's own power is 1.
    np.testing.assert_allclose(measured(code, vectors), wanted, rtol=0.12)


@pytest.mark.parametrize("snr_db", SNRS_DB)
def test_fitting_pays_where_values_are_not_alike(snr_db: float) -> None:
    spectrum, vectors = a_spectrum()
    symbols = VALUES // 4  # half as many
    plain, fitted = plain_code(VALUES, symbols), fitted_code(spectrum, symbols, 10 ** (snr_db / 10))
    squares = ((vectors - spectrum.mean) ** 2).sum()
    errors = [((heard(code, vectors, (snr_db,)) - vectors) ** 2).sum() / squares for code in (plain, fitted)]
    assert errors[1] < errors[0] / 2


@settings(max_examples=100)
@given(st.lists(st.floats(1e-6, 1e3), min_size=1, max_size=12), st.floats(0.1, 100), st.floats(1e-3, 1e4))
def test_energy_is_spent_where_it_helps_most(variances: list[float], energy: float, snr: float) -> None:
    """The optimum's own conditions: equal marginal gain where something is sent, no greater one where nothing is."""
    spread = np.array(variances)
    found = allocate_energy(spread, energy, snr)
    assert (found >= 0).all()
    assert found.sum() == pytest.approx(energy, rel=1e-9)
    gain = spread * snr / (1 + found * snr) ** 2
    best = gain[found > 0]
    np.testing.assert_allclose(best, best[0], rtol=1e-6)
    assert (gain[found == 0] <= best[0] * (1 + 1e-6)).all()


def test_at_high_snr_amplitudes_go_as_the_fourth_root() -> None:
    variances = np.array([16.0, 1.0, 1 / 16])
    energy = allocate_energy(variances, 3.0, 1e9)
    np.testing.assert_allclose(np.sqrt(energy / variances) * variances**0.25, np.sqrt(3 / 5.25), rtol=1e-6)


@settings(max_examples=100)
@given(decibels, decibels, ratios, ratios)
def test_more_snr_or_more_symbols_is_never_worse(one: float, other: float, few: float, many: float) -> None:
    low, high = sorted((one, other))
    short, long = sorted((few, many))
    least = 1 + 1e-12
    assert analog_distortion(high, short) <= analog_distortion(low, short) * least
    assert analog_distortion(low, long) <= analog_distortion(low, short) * least
    assert separate_distortion(low, short) <= analog_distortion(low, short) * least  # no linear code beats the bound
    assert 0 <= analog_distortion(low, short) <= 1


@settings(max_examples=60)
@given(st.integers(0, 2**32 - 1), decibels, decibels)
def test_a_fitted_code_is_never_worse_with_more(seed: int, one: float, other: float) -> None:
    variances = np.random.default_rng(seed).exponential(size=10) ** 3 + 1e-9
    low, high = sorted((10 ** (one / 10), 10 ** (other / 10)))
    few, many = (allocate_energy(variances, energy, low) for energy in (10.0, 14.0))
    at_low = component_distortion(variances, few, low)
    assert component_distortion(variances, few, high) <= at_low * (1 + 1e-12)
    assert component_distortion(variances, many, low) <= at_low * (1 + 1e-12)
    assert at_low <= component_distortion(variances, np.full(10, 1.0), low) * (1 + 1e-9)  # than all alike


@pytest.mark.parametrize(("share", "correlation"), [(0.5, 0.0), (0.8, 0.0), (0.3, 0.6), (0.5, 1.0), (0.9, -0.5)])
def test_two_in_one_arrive_as_the_closed_form_says(share: float, correlation: float) -> None:
    common, own = white(), np.random.default_rng(5).standard_normal((BLOCKS, VALUES)) * 7.0
    pair = (common, correlation * common + np.sqrt(1 - correlation**2) * own)
    code = plain_code(VALUES, VALUES // 2)
    (first, one), (second, two) = (code.encode(each) for each in pair)
    both, agreement = superpose(first, second, share)
    received = broadcast_awgn(np.random.default_rng(3), both, SNRS_DB).symbols
    for user, snr_db in enumerate(SNRS_DB):
        wanted = superposed_distortion(snr_db, share, correlation)
        for vectors, scale, part, least in zip(pair, (one, two), agreement, wanted, strict=True):
            found = code.decode(received[user], scale, 10 ** (snr_db / 10), part) - vectors
            # Each block's own agreement is known, which is a little better than their mean.
            assert (found**2).sum() / (vectors**2).sum() == pytest.approx(least, rel=3 * SPREAD, abs=SPREAD / 2)


def test_a_pair_of_one_vector_is_its_multicast_and_strangers_lose_half() -> None:
    np.testing.assert_allclose(superposed_distortion(10.0, 0.5, 1.0), [1 / 11, 1 / 11])
    np.testing.assert_allclose(superposed_distortion(300.0, 0.5), [0.5, 0.5])
    np.testing.assert_allclose(superposed_distortion(10.0, 1.0), [1 / 11, 1])


@pytest.mark.parametrize("times", [1, 2, 3])
def test_without_noise_every_digit_arrives(times: int) -> None:
    vectors = white().astype(np.float32)
    found = heard(plain_code(VALUES, times * VALUES // 2), vectors.astype(np.float64), (1000.0,))[0]
    assert np.array_equal(found.astype(np.float32), vectors)


def test_blocks_have_power_1_whatever_they_hold() -> None:
    """Also of values of any size, and of none: `broadcast_awgn` refuses any other power."""
    vectors = white() * np.logspace(-8, 8, BLOCKS)[:, None]
    vectors[7] = 0.0
    code = plain_code(VALUES, VALUES // 2)
    symbols, scale = code.encode(vectors)
    np.testing.assert_allclose((np.abs(symbols) ** 2).mean(axis=1), 1, atol=1e-3)
    assert scale[7] == 0
    assert not heard(code, vectors, (0.0,))[0, 7].any()


def test_what_makes_no_sense_is_said() -> None:
    with pytest.raises(ConfigError, match="ratio must be positive"):
        analog_distortion(0.0, 0.0)
    with pytest.raises(ConfigError, match="share must be within 0 to 1"):
        superposed_distortion(0.0, 1.5)
    with pytest.raises(ConfigError, match="opposite vectors are nothing"):
        superposed_distortion(0.0, 0.5, -1.0)
    with pytest.raises(ConfigError, match="variances"):
        allocate_energy([0.0, 0.0], 1.0, 1.0)
    with pytest.raises(ConfigError, match=r"got shapes \(2,\) and \(3,\)"):
        component_distortion([1.0, 2.0], [1.0, 1.0, 1.0], 1.0)
    with pytest.raises(ConfigError, match="got 4 and 0"):
        plain_code(4, 0)
