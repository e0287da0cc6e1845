"""Channels and links: that the parts come together with the right numbers, shapes and errors."""

import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from wdmoe.errors import ConfigError
from wdmoe.wireless.channel import Channel, draw_channel, draw_fading, draw_surroundings
from wdmoe.wireless.link import Link, Radio, links_of
from wdmoe.wireless.mcs import nr_table
from wdmoe.wireless.pathloss import free_space_db
from wdmoe.wireless.tr38901 import INH_OPEN, UMI, los_probability, path_loss_db

BITS = 65_536
STRENGTHS = st.lists(st.floats(1e3, 1e12), min_size=1, max_size=6)


def links(strengths_hz, **options):
    strength = np.array(strengths_hz, float)
    return Link(downlink_snr_hz=strength, uplink_snr_hz=strength / 50, total_hz=100e6, **options)


def test_a_link_by_hand():
    channel = Channel(path_loss_db=np.array([100.0]), shadowing_db=np.array([-3.0]), downlink_fading=np.array([0.5]))
    link = links_of(Radio(antenna_gain_db=6.0), channel)
    gain = 10 ** (-97 / 10) * 10**0.6
    assert link.downlink_snr_hz == pytest.approx(10 * 0.5 * gain / 10**-20.4)
    assert link.uplink_snr_hz == pytest.approx(0.2 * gain / 10**-20.4)
    snr = link.downlink_snr_hz / 12.5e6
    assert link.downlink_bps(12.5e6) == pytest.approx(12.5e6 * np.log2(1 + snr))
    assert link.downlink_efficiency(12.5e6) == pytest.approx(np.log2(1 + snr))
    assert link.uplink_efficiency(12.5e6) < link.downlink_efficiency(12.5e6)
    by_hand = BITS / link.downlink_bps(12.5e6) + BITS / link.uplink_bps(12.5e6) + 1e-3
    assert link.token_s(12.5e6, BITS, BITS, 1e-3) == pytest.approx(by_hand)


def test_spendings_agree_on_the_whole_band():
    power, density = links([1e10, 1e9]), links([1e10, 1e9], spending="density")
    np.testing.assert_allclose(power.downlink_bps(100e6), density.downlink_bps(100e6))
    assert (power.uplink_bps(10e6) > density.uplink_bps(10e6)).all()


def test_an_mcs_law():
    link = links([1e3, 1e10], law=nr_table())
    assert link.downlink_bps(50e6).tolist()[0] == 0
    assert link.downlink_efficiency(50e6)[1] == pytest.approx(5.5547, abs=1e-4)
    assert np.isinf(link.token_s(50e6, BITS, BITS)).tolist() == [True, False]


def test_without_bits_a_dead_link_costs_nothing():
    assert links([0.0]).token_s(1e6, 0, 0, 2e-3).tolist() == [2e-3]
    assert links([1e9]).token_s(0, [BITS], 0).tolist() == [math.inf]


@given(STRENGTHS, st.floats(1e3, 1e8), st.floats(1, 100), st.sampled_from(["power", "density"]))
def test_more_band_is_never_slower(strengths, band, factor, spending):
    link = links(strengths, spending=spending)
    assert (link.token_s(band * factor, BITS, BITS) <= link.token_s(band, BITS, BITS) * (1 + 1e-12)).all()


@given(STRENGTHS, st.floats(1e3, 1e8), st.randoms(use_true_random=False))
def test_permuting_devices_permutes_rates(strengths, band, random):
    order = list(range(len(strengths)))
    random.shuffle(order)
    np.testing.assert_array_equal(
        links(strengths).downlink_bps(band)[order], links([strengths[each] for each in order]).downlink_bps(band)
    )


def test_rayleigh_channels_of_a_known_loss():
    rng = np.random.default_rng(6)
    channel = draw_fading(rng, free_space_db([50, 100], 3.5e9), draws=(50_000,))
    assert channel.downlink_gain.shape == (50_000, 2)
    assert channel.downlink_gain.mean(0) == pytest.approx(channel.mean_gain, rel=0.02)
    np.testing.assert_array_equal(channel.downlink_gain, channel.uplink_gain)
    apart = draw_fading(rng, np.full(50_000, 80.0), reciprocal=False)
    assert abs(np.corrcoef(apart.downlink_fading, apart.uplink_fading)[0, 1]) < 0.02


def test_surroundings_follow_the_scenario():
    around = draw_surroundings(np.random.default_rng(7), UMI, [30, 100], 3.5e9, draws=(40_000,))
    assert around.los.mean(0) == pytest.approx(los_probability(UMI, [30, 100]), abs=0.012)
    seen = around.los[:, 1]
    assert around.shadowing_db[seen, 1].std() == pytest.approx(4, rel=0.03)
    assert around.shadowing_db[~seen, 1].std() == pytest.approx(7.82, rel=0.03)
    assert np.median(10 * np.log10(around.k_factor[seen, 1])) == pytest.approx(9, abs=0.2)
    assert (around.k_factor[~seen, 1] == 0).all()
    assert np.unique(around.path_loss_db[seen, 1]) == pytest.approx(float(path_loss_db(UMI, 100, 3.5e9, True)))


def test_seeds_repeat_and_batches_fit():
    def gains(seed):
        rng = np.random.default_rng(seed)
        around = draw_surroundings(rng, INH_OPEN, [5, 10, 20], 5e9, draws=(4,))
        return draw_channel(rng, around, reciprocal=False)

    one = gains(1)
    np.testing.assert_array_equal(one.downlink_gain, gains(1).downlink_gain)
    assert not np.array_equal(one.downlink_gain, gains(2).downlink_gain)
    radio = Radio(device_power_w=[0.1, 0.2, 0.2], device_noise_w_hz=1e-20)
    rates = links_of(radio, replace(one, shadowing_db=np.zeros(3))).uplink_bps([1e6, 2e6, 3e6])
    assert rates.shape == (4, 3)


def test_the_guide_s_example_runs_on_numpy_alone():
    guide = (Path(__file__).parents[2] / "docs" / "wireless.md").read_text(encoding="utf-8")
    example = guide.split("```python\n")[1].split("```")[0]
    alone = "import sys\nassert not {'scipy', 'torch', 'zmq'} & set(sys.modules)\n"
    done = subprocess.run([sys.executable, "-c", example + alone], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda: Radio(bandwidth_hz=0), "bandwidth_hz must be positive"),
        (lambda: Radio(device_power_w=[0.1, -1]), "device_power_w must be zero or positive, got -1"),
        (lambda: Radio(antenna_gain_db=math.inf), "antenna_gain_db must be finite"),
        (lambda: Channel(path_loss_db=np.array([math.nan])), "path_loss_db must be finite"),
        (lambda: Channel(path_loss_db=np.array([-1e6])), "path_loss_db must be within -1000 to 1000"),
        (lambda: Channel(path_loss_db=np.zeros(2), shadowing_db=np.zeros(3)), r"path_loss_db \(2,\)"),
        (lambda: links([1.0], spending="water"), "spending must be one of power, density; got 'water'"),
        (lambda: links([-1.0]), "downlink_snr_hz must be zero or positive"),
        (lambda: links([1.0]).downlink_bps(-1), "band_hz must be within"),
        (lambda: links([1.0]).downlink_efficiency(0), "band_hz must be positive"),
        (lambda: links([1.0, 2.0]).downlink_bps([1, 2, 3]), r"band_hz \(3,\), snr_hz \(2,\)"),
        (lambda: links([1.0]).token_s(1, -1, 0), "downlink_bits must be zero or positive"),
        (lambda: links_of(Radio(antenna_gain_db=[1, 2, 3]), Channel(path_loss_db=np.zeros(2))), "shapes must fit"),
        (lambda: draw_surroundings(np.random.default_rng(), UMI, 5, 1e9), "distance_m must be within 10 to 5000"),
    ],
)
def test_bad_input_is_named(call, told):
    with pytest.raises(ConfigError, match=told):
        call()
