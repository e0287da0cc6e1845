"""Fading that moves on within a pass, and decisions from a channel that was: what is drawn, what being late costs."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wdmoe.errors import ConfigError
from wdmoe.simulation.channel_draw import make_draw
from wdmoe.simulation.results import draws_text
from wdmoe.simulation.scenario import Scenario
from wdmoe.simulation.scenario_file import parse_scenario
from wdmoe.simulation.study import Study, run_study
from wdmoe.solver.layer.latency import MULTICASTS, Levers
from wdmoe.solver.layer.plan import Policy, carried_out, plan_layer
from wdmoe.solver.layer.radio_state import RadioState
from wdmoe.wireless.doppler import jakes_correlation

EXACT = 1 + 1e-9
MOVING = """
name = "moving"
seed = 3
draws = 3
[channel]
fading_changes = "doppler"
doppler = "30Hz"
block_time = "1ms"
[model]
hidden = 64
inner = 32
tokens = 6
[[variant]]
name = "equal"
bandwidth = "equal"
[[variant]]
name = "equal, late"
bandwidth = "equal"
csi_layers = 0
[[variant]]
name = "fresh"
[[variant]]
name = "one late"
csi_delay = 1
[[variant]]
name = "every third"
csi_layers = 3
[[variant]]
name = "once"
csi_layers = 0
[[variant]]
name = "once, all levers"
csi_layers = 0
policy = "budget"
max_dropped = 0.1
bits = 8
multicast = "superposition"
micro_batches = 2
"""


@pytest.fixture(scope="module")
def moving() -> Scenario:
    return parse_scenario(MOVING)


@pytest.fixture(scope="module")
def study(moving: Scenario) -> Study:
    return run_study(moving, 1)


def test_which_layer_is_known(moving: Scenario) -> None:
    known = {variant.name: [variant.measured(layer) for layer in range(7)] for variant in moving.variants}
    assert known["fresh"] == [0, 1, 2, 3, 4, 5, 6]
    assert known["one late"] == [0, 0, 1, 2, 3, 4, 5]
    assert known["every third"] == [0, 0, 0, 3, 3, 3, 6]
    assert known["once"] == [0] * 7
    assert [replace(moving.variants[4], csi_delay=2).measured(layer) for layer in (0, 3, 6, 8)] == [0, 1, 4, 4]


def test_gains_are_correlated_as_jakes_says(moving: Scenario) -> None:
    """Powers of Rayleigh amplitudes correlate by J0 squared; 150 draws of 8 devices."""
    draws = [make_draw(moving, number, 12, 100) for number in range(150)]
    gain = np.array([[air.downlink_snr_hz / draw.mean.downlink_snr_hz for air in draw.airs[0]] for draw in draws])
    assert gain.mean() == pytest.approx(1, abs=0.08)
    for lag in (1, 4, 11):
        first, later = gain[:, :-lag, :].ravel() - 1, gain[:, lag:, :].ravel() - 1
        expected = float(jakes_correlation(30.0, lag * 1e-3)) ** 2
        assert float((first * later).mean() / gain.var()) == pytest.approx(expected, abs=0.1)


def test_any_number_of_workers_gives_the_same_digits(moving: Scenario, study: Study) -> None:
    assert draws_text(run_study(moving, 2)) == draws_text(study)
    later = run_study(replace(moving, variants=moving.variants[5:6], draws=4), 1)
    assert (later.values[:3, 0] == study.values[:, 5]).all()


def test_late_knowledge_costs_only_who_decides_by_it(study: Study) -> None:
    latency = dict(zip([variant.name for variant in study.scenario.variants], study.of("latency_s").T, strict=True))
    np.testing.assert_array_equal(latency["equal"], latency["equal, late"])
    for late in ("one late", "every third", "once"):
        assert (latency[late] > latency["fresh"]).all()
    assert (latency["one late"] < latency["once"]).all()


def test_a_channel_that_hardly_moves_costs_hardly_anything(moving: Scenario) -> None:
    two = replace(moving, draws=2, variants=(moving.variants[2], moving.variants[5]))
    still = replace(two, channel=replace(moving.channel, doppler_hz=1e-3))
    latency = run_study(still, 1).of("latency_s")
    np.testing.assert_allclose(latency[:, 1], latency[:, 0], rtol=1e-3)
    anew = replace(two, channel=replace(moving.channel, changes="layer", doppler_hz=0.0))
    latency = run_study(anew, 1).of("latency_s")
    assert (latency[:, 1] > 1.05 * latency[:, 0]).all()


def an_air(rng: np.random.Generator) -> RadioState:
    snr_hz = 1e6 * 10 ** rng.uniform(0, 3, (2, 4))
    compute = rng.uniform(1e-6, 1e-4, (2, 4))
    return RadioState(
        downlink_snr_hz=snr_hz[0],
        uplink_snr_hz=snr_hz[1],
        total_hz=20e6,
        hidden=64,
        token_s=compute[0],
        expert_s=compute[1],
    )


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from(MULTICASTS), st.sampled_from([1, 3]), st.booleans())
def test_a_plan_takes_its_own_time_and_more_where_it_is_worse(seed: int, cast: str, parts: int, equal: bool) -> None:
    rng = np.random.default_rng(seed)
    known = an_air(rng)
    experts = np.argsort(rng.random((12, 8)), axis=1)[:, :3].astype(np.int32)
    levers = Levers(multicast=cast, micro_batches=parts, equal_bandwidth=equal)
    policy, holders = Policy(levers=levers), np.repeat(np.eye(4, dtype=bool), 2, axis=0)
    plan = plan_layer(experts, np.full((12, 3), 1 / 3), holders, known, policy)
    assert carried_out(plan, known, known, levers) is plan
    same = carried_out(plan, known, replace(known), levers).time
    np.testing.assert_allclose([same.latency_s, same.multicast_s], [plan.time.latency_s, plan.time.multicast_s], 1e-9)
    down, up = (snr * rng.uniform(0.1, 1, 4) for snr in (known.downlink_snr_hz, known.uplink_snr_hz))
    worse = replace(known, downlink_snr_hz=down, uplink_snr_hz=up)
    late = carried_out(plan, known, worse, levers)
    assert late.time.latency_s >= plan.time.latency_s / EXACT
    assert (late.device == plan.device).all()
    if parts == 1:
        fresh = plan_layer(experts, np.full((12, 3), 1 / 3), holders, worse, policy)
        assert fresh.time.latency_s <= late.time.latency_s * EXACT


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('doppler = "30Hz"\n', "", "needs either doppler or speed_m_s"),
        ('doppler = "30Hz"\n', 'doppler = "30Hz"\nspeed_m_s = 1.0\n', "needs either doppler or speed_m_s"),
        ('"doppler"\n', '"layer"\n', "and nothing else does"),
        ('block_time = "1ms"', 'block_time = "0ms"', "block_time must be above 0"),
        ('block_time = "1ms"', 'fading = "none"', 'needs fading = "rayleigh" or "rician"'),
        ('"doppler"\ndoppler = "30Hz"\nblock_time = "1ms"', '"pass"', "'equal, late': csi_layers and csi_delay need"),
        ("csi_delay = 1", "csi_delay = -1", "csi_delay must be an integer"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(old: str, new: str, message: str) -> None:
    assert old in MOVING
    with pytest.raises(ConfigError, match=message) as caught:
        parse_scenario(MOVING.replace(old, new, 1))
    assert "\n" not in str(caught.value)


def test_a_speed_is_a_shift() -> None:
    text = MOVING.replace('doppler = "30Hz"', "speed_m_s = 3.0").replace(
        "[model]", '[radio]\ncarrier = "6GHz"\n[model]'
    )
    assert parse_scenario(text).channel.doppler_hz == pytest.approx(60.04, abs=0.01)
