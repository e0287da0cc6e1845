"""Qualities against closed forms, and the hypervolume against counting."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wdmoe.broadcast.quality.metrics import MOST_PSNR_DB, hypervolume, hypervolume_interval, ms_ssim, psnr_db, ssim
from wdmoe.errors import ConfigError

points = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=8)


@pytest.fixture
def pictures():
    return np.random.default_rng(2).integers(0, 256, (3, 32, 32, 3)).astype(np.uint8)


def test_psnr_of_a_known_error(pictures):
    other = pictures.astype(float) + np.array([1, 2, 10]).reshape(3, 1, 1, 1)
    np.testing.assert_allclose(psnr_db(pictures, other), 20 * np.log10(255 / np.array([1, 2, 10])))
    assert psnr_db(pictures, pictures).tolist() == [MOST_PSNR_DB] * 3


def test_one_wrong_value_is_below_an_exact_copy(pictures):
    other = pictures.copy()
    other[:, 0, 0, 0] ^= 1
    np.testing.assert_allclose(psnr_db(pictures, other), 10 * np.log10(255**2 * 32 * 32 * 3))


def test_ssim_of_flat_pictures_is_its_luminance_term():
    one, other = np.full((1, 32, 32, 3), 100.0), np.full((1, 32, 32, 3), 150.0)
    small = (0.01 * 255) ** 2
    expected = (2 * 100 * 150 + small) / (100**2 + 150**2 + small)
    assert ssim(one, other)[0] == pytest.approx(expected, rel=1e-4)
    assert ssim(one, one)[0] == pytest.approx(1)


def test_noise_lowers_ssim(pictures):
    noisy = np.clip(pictures + np.random.default_rng(1).normal(0, 30, pictures.shape), 0, 255)
    assert np.all(ssim(pictures, noisy) < 0.99)
    large = np.tile(pictures[:1], (1, 6, 6, 1))
    assert ms_ssim(large, large)[0] == pytest.approx(1)


@settings(max_examples=60)
@given(points)
def test_hypervolume_counts_cells(reached):
    cells = {(x, y) for right, top in reached for x in range(right) for y in range(top)}
    assert hypervolume(reached, (0, 0)) == len(cells)


@settings(max_examples=60)
@given(points, points)
def test_more_points_never_lower_it_and_users_are_alike(reached, more):
    both = np.array(reached + more)
    assert hypervolume(both, (2, 3)) >= hypervolume(reached, (2, 3))
    assert hypervolume(both, (2, 3)) == hypervolume(both[:, ::-1], (3, 2))


def test_interval_holds_the_value_and_shrinks_with_pairs():
    rng = np.random.default_rng(0)
    fronts = np.stack([np.linspace(20, 30, 5), np.linspace(30, 20, 5)], axis=1)[:, None]
    few, many = (
        hypervolume_interval(fronts + rng.normal(0, 2, (1, pairs, 2)), (10, 10), seed=1) for pairs in (20, 500)
    )
    for interval in (few, many):
        assert interval.low < interval.value < interval.high
    assert many.high - many.low < 0.5 * (few.high - few.low)
    alike = hypervolume_interval(np.repeat(fronts, 10, axis=1), (10, 10), seed=1)
    assert alike.low == pytest.approx(alike.value)


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: psnr_db(np.zeros((2, 2)), np.zeros((2, 2))), "pictures"),
        (lambda: psnr_db(np.zeros((2, 2, 3)), np.zeros((2, 3, 3))), "pictures"),
        (lambda: ssim(np.zeros((1, 8, 8, 3)), np.zeros((1, 8, 8, 3))), "11 or more"),
        (lambda: ms_ssim(np.zeros((1, 32, 32, 3)), np.zeros((1, 32, 32, 3))), "161 or more"),
        (lambda: hypervolume([1, 2], (0, 0)), "point, 2"),
        (lambda: hypervolume([[1, np.nan]], (0, 0)), "finite"),
        (lambda: hypervolume_interval(np.zeros((3, 0, 2)), (0, 0), seed=1), "point, pair, 2"),
    ],
)
def test_input_that_makes_no_sense_is_named(call, named):
    with pytest.raises(ConfigError, match=named):
        call()
