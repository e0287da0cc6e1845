"""The randomness of one draw: where devices stand, what the air does to them, which tokens are asked.

Everything comes from the draw's own seed, so draws can be computed anywhere in any order, and all variants of a draw
meet the same channel and the same tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from wdmoe.arrays import FloatArray
from wdmoe.simulation.scenario import ChannelSetup, ModelSetup, RadioSetup, Scenario
from wdmoe.solver.layer.radio_state import RadioState
from wdmoe.wireless.channel import Channel, draw_fading
from wdmoe.wireless.compute import expert_bytes, expert_flop
from wdmoe.wireless.doppler import MOST_ORDER, BlockFading
from wdmoe.wireless.fading import power_gain
from wdmoe.wireless.link import Radio, links_of
from wdmoe.wireless.mcs import nr_table, wifi_table
from wdmoe.wireless.pathloss import free_space_db, log_distance_db
from wdmoe.wireless.rates import SHANNON, RateLaw
from wdmoe.wireless.shadowing import draw_shadowing_db
from wdmoe.wireless.tr38901 import SCENARIOS, los_probability, path_loss_db, shadowing_sigma_db


@dataclass(frozen=True, slots=True, eq=False)
class Draw:
    """One realisation; all variants meet the same."""

    mean: RadioState  # without fading: what a placement is made for
    airs: tuple[tuple[RadioState, ...], ...]  # for each pass, for each layer
    starts: tuple[int, ...]  # first token of each pass in the trace


@dataclass(frozen=True, slots=True, eq=False)
class _Place:
    loss_db: FloatArray  # (devices,) path loss and shadowing
    k_factor: FloatArray  # (devices,) plain ratio; infinite: no fading


def make_draw(scenario: Scenario, number: int, layers: int, tokens: int) -> Draw:
    """Draw `number` of a scenario.

    Args:
        layers, tokens: of the trace.
    """
    rng = np.random.default_rng(np.random.SeedSequence(scenario.seed, spawn_key=(number,)))
    place = _draw_place(rng, scenario)
    mean = _air(scenario, Channel(path_loss_db=place.loss_db))
    airs = tuple(_pass_airs(rng, scenario, place, layers) for _ in range(scenario.model.passes))
    starts = tuple(int(start) for start in rng.integers(tokens, size=scenario.model.passes))
    return Draw(mean, airs, starts)


def compute_s(model: ModelSetup, flop_s: FloatArray, memory_bytes_s: FloatArray) -> tuple[FloatArray, FloatArray]:
    """(devices,) seconds of an expert for one token, and the least it takes because it reads its weights."""
    token_s = expert_flop(model.hidden, model.inner) / flop_s
    weights = expert_bytes(model.hidden, model.inner, model.weight_bytes)
    read_s = np.where(memory_bytes_s > 0, weights / np.where(memory_bytes_s > 0, memory_bytes_s, 1.0), 0.0)
    return token_s, read_s


def _draw_place(rng: np.random.Generator, scenario: Scenario) -> _Place:
    devices, channel = scenario.devices, scenario.channel
    near, far = np.array(devices.nearest_m), np.array(devices.farthest_m)
    distance = near + (far - near) * rng.random(devices.count)
    carrier = scenario.radio.carrier_hz
    if channel.path_loss in SCENARIOS:
        scene = SCENARIOS[channel.path_loss]
        los = rng.random(devices.count) < los_probability(scene, distance)
        loss = path_loss_db(scene, distance, carrier, los, extrapolate=True)
        loss = loss + draw_shadowing_db(rng, shadowing_sigma_db(scene, los))
        return _Place(loss, _k_factor(channel, los))
    if channel.path_loss == "free-space":
        loss = free_space_db(distance, carrier)
    else:
        loss = log_distance_db(distance, carrier, channel.exponent)
    loss = loss + draw_shadowing_db(rng, channel.shadowing_db, (devices.count,))
    return _Place(loss, _k_factor(channel, np.ones(devices.count, bool)))


def _k_factor(channel: ChannelSetup, los: npt.NDArray[np.bool_]) -> FloatArray:
    """(devices,) Rician K: only links in sight have a steady path."""
    k = {"rayleigh": 0.0, "none": np.inf, "rician": 10 ** (channel.k_factor_db / 10)}[channel.fading]
    return np.where(los | (channel.fading == "none"), k, 0.0)


def _pass_airs(rng: np.random.Generator, scenario: Scenario, place: _Place, layers: int) -> tuple[RadioState, ...]:
    if scenario.channel.changes == "doppler":
        return _moving(rng, scenario, place, layers)
    if scenario.channel.changes == "layer":
        return tuple(_faded(rng, scenario, place) for _ in range(layers))
    return (_faded(rng, scenario, place),) * layers


def _moving(rng: np.random.Generator, scenario: Scenario, place: _Place, layers: int) -> tuple[RadioState, ...]:
    """Each layer one block; Jakes' correlation at all lags within the pass, up to `MOST_ORDER`."""
    channel = scenario.channel
    shift = np.full(scenario.devices.count, channel.doppler_hz)
    order = min(max(layers - 1, 1), MOST_ORDER)
    fading = BlockFading(rng, shift, channel.block_s, k_factor=place.k_factor, order=order)
    gains = power_gain(fading.track(layers))
    faded = (Channel(path_loss_db=place.loss_db, downlink_fading=gain, uplink_fading=gain) for gain in gains)
    return tuple(_air(scenario, each) for each in faded)


def _faded(rng: np.random.Generator, scenario: Scenario, place: _Place) -> RadioState:
    if np.isinf(place.k_factor).any():
        return _air(scenario, Channel(path_loss_db=place.loss_db))
    return _air(scenario, draw_fading(rng, place.loss_db, place.k_factor))


def _air(scenario: Scenario, channel: Channel) -> RadioState:
    setup, model, devices = scenario.radio, scenario.model, scenario.devices
    radio = Radio(
        carrier_hz=setup.carrier_hz,
        bandwidth_hz=setup.bandwidth_hz,
        station_power_w=setup.station_power_w,
        device_power_w=setup.device_power_w,
        station_noise_w_hz=setup.noise_w_hz,
        device_noise_w_hz=setup.noise_w_hz,
    )
    link = links_of(radio, channel, spending=setup.spending, law=_law(setup))
    token_s, expert_s = compute_s(model, np.array(devices.flop_s), np.array(devices.memory_bytes_s))
    flat = setup.spending == "density"
    whole = np.full(devices.count, setup.bandwidth_hz)
    return RadioState(
        downlink_snr_hz=link.downlink_snr_hz,
        uplink_snr_hz=link.uplink_snr_hz,
        total_hz=setup.bandwidth_hz,
        hidden=model.hidden,
        token_s=token_s,
        expert_s=expert_s,
        downlink_efficiency=link.downlink_efficiency(whole) if flat else None,
        uplink_efficiency=link.uplink_efficiency(whole) if flat else None,
    )


def _law(setup: RadioSetup) -> RateLaw:
    if setup.law == "nr":
        return nr_table()
    return wifi_table() if setup.law == "wifi" else SHANNON
