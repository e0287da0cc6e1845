"""The quality law never falls, and the alphas chosen by it do what was asked for."""

import itertools
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wdmoe.broadcast.quality.front_comparison import FLOOR_DB
from wdmoe.broadcast.quality.operating_point import choose_alpha, parse_aim
from wdmoe.broadcast.quality.quality_law import LAW_FILE, SHAPE, Law, LawError, load_law, save_law
from wdmoe.errors import ConfigError

SNR, RATE, SHARE = st.floats(-5, 30), st.floats(0.05, 0.4), st.floats(0, 1)


def made_up(seed):
    """Any law: coefficients that no codec gave."""
    coefficients = np.random.default_rng(seed).exponential(0.1, SHAPE)
    coefficients[0, 0, 0] += 11
    return Law(coefficients, LawError(10, 0.2, 0.5), "0" * 64)


LAWS = [made_up(1)] + ([load_law(LAW_FILE)] if LAW_FILE.exists() else [])


@pytest.fixture(params=LAWS, ids=["made up", "shipped"][: len(LAWS)], scope="module")
def law(request):
    return request.param


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 50), low=SHARE, high=SHARE, own=SNR, more=st.floats(0, 10), other=SNR, cbr=RATE)
def test_quality_never_falls_with_share_own_snr_or_rate(seed, low, high, own, more, other, cbr):
    law = made_up(seed)
    low, high = sorted((low, high))
    plain = law.psnr_db(low, own, other, cbr)
    assert law.psnr_db(high, own, other, cbr) >= plain - 1e-9
    assert law.psnr_db(low, own + more, other, cbr) >= plain - 1e-9
    assert law.psnr_db(low, own, other, cbr * 1.5) >= plain - 1e-9


@settings(max_examples=40, deadline=None)
@given(alpha=SHARE, first=SNR, second=SNR, cbr=RATE)
def test_a_target_is_reached_with_no_more_than_it_takes(law, alpha, first, second, cbr):
    """The inverse of the law: asked for what an alpha gives, no larger alpha is chosen, and it gives as much."""
    snr_db = (first, second)
    for user in (0, 1):
        wanted = math.floor(100 * float(law.both_db(alpha, snr_db, cbr)[user])) / 100
        chosen = choose_alpha(f"target:{wanted:.2f}dB@{user + 1}", snr_db, cbr, law)
        assert chosen.psnr_db[user] >= wanted - 1e-6
        assert (chosen.alpha <= alpha + 1e-9) if user == 0 else (chosen.alpha >= alpha - 1e-9)


@settings(max_examples=25, deadline=None)
@given(first=SNR, second=SNR, cbr=RATE)
def test_aims_are_the_best_of_all_alphas(law, first, second, cbr):
    every = law.both_db(np.linspace(0, 1, 301), (first, second), cbr)
    worse = choose_alpha("max-min", (first, second), cbr, law)
    assert min(worse.psnr_db) >= every.min(axis=1).max() - 0.05
    equal = choose_alpha("equal", (first, second), cbr, law)
    assert abs(np.subtract(*equal.psnr_db)) <= np.abs(every[:, 0] - every[:, 1]).min() + 0.1
    fair = choose_alpha("fair", (first, second), cbr, law)
    above = np.maximum(every - FLOOR_DB, 1e-3)
    assert np.prod(np.maximum(np.subtract(fair.psnr_db, FLOOR_DB), 1e-3)) >= above.prod(axis=1).max() * 0.99


def test_users_exchanged_exchange_alpha(law):
    for aim in ("max-min", "fair"):
        one, other = (choose_alpha(aim, snr_db, 1 / 6, law) for snr_db in ((10.0, 5.0), (5.0, 10.0)))
        assert one.alpha == pytest.approx(1 - other.alpha, abs=2e-3)
        assert one.psnr_db == pytest.approx(other.psnr_db[::-1], abs=0.05)


def test_targets_rise_with_alpha(law):
    low, high = law.both_db(np.array([0.05, 0.95]), (10.0, 5.0), 1 / 6)[:, 0]
    wanted = np.linspace(low, high, 7)
    alphas = [choose_alpha(f"target:{each:.3f}dB@1", (10.0, 5.0), 1 / 6, law).alpha for each in wanted]
    assert all(b >= a for a, b in itertools.pairwise(alphas))


def test_what_cannot_be_reached_or_read_is_named(law):
    with pytest.raises(ConfigError, match=r"user 2 cannot have 90 dB here; all of the block gives"):
        choose_alpha("target:90dB@2", (10.0, 5.0), 1 / 6, law)
    for wrong in ("best", "target:25@1", "target:25dB@3", "target:dB@1", ""):
        with pytest.raises(ConfigError, match="max-min, equal, fair"):
            parse_aim(wrong)
    with pytest.raises(ConfigError, match="numbers"):
        choose_alpha("fair", (float("nan"), 5.0), 1 / 6, law)


def test_a_law_comes_back_from_its_file(tmp_path):
    law, file = made_up(2), tmp_path / "law.json"
    save_law(law, file)
    again = load_law(file)
    np.testing.assert_allclose(again.coefficients, law.coefficients, atol=1e-6)
    assert (again.error, again.weights_sha256) == (law.error, law.weights_sha256)
    told = json.loads(file.read_text())
    for change in ({"format": 9}, {"coefficients": [[1.0]]}, {"error": {}}):
        file.write_text(json.dumps({**told, **change}))
        with pytest.raises(ConfigError):
            load_law(file)
    file.write_text("no law")
    with pytest.raises(ConfigError, match="fit_quality_law"):
        load_law(file)
    with pytest.raises(ConfigError, match="none negative"):
        Law(-law.coefficients, law.error, "")
