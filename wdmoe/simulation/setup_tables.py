"""The tables [radio], [channel], [devices] and [model] of a scenario file -> their records."""

from __future__ import annotations

from typing import Any

from wdmoe.errors import ConfigError
from wdmoe.simulation.scenario import ChannelSetup, DeviceSetup, ModelSetup, RadioSetup
from wdmoe.simulation.toml_table import Table
from wdmoe.simulation.used_keys import CHANNEL_USES, model_uses, refuse_unused
from wdmoe.wireless.doppler import doppler_hz
from wdmoe.wireless.link import SPENDINGS
from wdmoe.wireless.tr38901 import SCENARIOS

PATH_LOSSES = ("free-space", "log-distance", *SCENARIOS)
CHANGES = ("pass", "layer", "doppler")
FADINGS = ("rayleigh", "rician", "none")
LAWS = ("shannon", "nr", "wifi")


def read_radio(table: Table) -> RadioSetup:
    """Both ends of all links."""
    noise = table.quantity("noise_density", "noise density", "-174dBm/Hz")
    figure_db = table.number("noise_figure_db", 0.0, 0.0, 100.0)
    radio = RadioSetup(
        carrier_hz=_positive(table, "carrier", "frequency", "3.5GHz"),
        bandwidth_hz=_positive(table, "bandwidth", "frequency", "100MHz"),
        station_power_w=_positive(table, "station_power", "power", "10W"),
        device_power_w=_positive(table, "device_power", "power", "0.2W"),
        noise_w_hz=noise * 10 ** (figure_db / 10),
        spending=table.text("spending", "power", tuple(SPENDINGS)),
        law=table.text("law", "shannon", LAWS),
    )
    table.done()
    if radio.noise_w_hz <= 0:
        raise ConfigError("[radio] noise_density must be above 0")
    if radio.law != "shannon" and radio.spending != "density":
        raise ConfigError(f'[radio] law = "{radio.law}" needs spending = "density": its steps have no convex power law')
    return radio


def read_channel(table: Table, carrier_hz: float) -> ChannelSetup:
    """What is between the antennas, for a carrier frequency that a speed becomes a Doppler shift by."""
    changes = table.text("fading_changes", "pass", CHANGES)
    channel = ChannelSetup(
        path_loss=table.text("path_loss", "log-distance", PATH_LOSSES),
        exponent=table.number("exponent", 3.0, 0.0, 10.0),
        shadowing_db=table.number("shadowing_db", 0.0, 0.0, 40.0),
        fading=table.text("fading", "rayleigh", FADINGS),
        k_factor_db=table.number("k_factor_db", 6.0, -40.0, 40.0),
        changes=changes,
        doppler_hz=_doppler_hz(table, carrier_hz, changes == "doppler"),
        block_s=table.quantity("block_time", "time", "1ms"),
    )
    table.done()
    if changes == "doppler" and channel.fading == "none":
        raise ConfigError('[channel] fading_changes = "doppler" needs fading = "rayleigh" or "rician", got "none"')
    refuse_unused(table, "[channel]", CHANNEL_USES)
    if channel.block_s <= 0:
        raise ConfigError("[channel] block_time must be above 0")
    return channel


def _doppler_hz(table: Table, carrier_hz: float, moves: bool) -> float:
    """Given as a shift, or as a speed; either, and only where fading is to move."""
    shift, speed = table.quantity("doppler", "frequency", "0Hz"), table.number("speed_m_s", 0.0, 0.0, 1e4)
    if shift < 0 or (shift > 0) + (speed > 0) != moves:
        raise ConfigError(
            '[channel] fading_changes = "doppler" needs either doppler or speed_m_s, above 0, and nothing else does'
        )
    return shift or float(doppler_hz(speed, carrier_hz))


def read_devices(table: Table) -> DeviceSetup:
    """The devices, a number of each."""
    count = table.integer("count", 8, 1, 4096)
    nearest = _each(table, "nearest_m", [10.0], count, 1e-3)
    experts = _each(table, "experts", [1.0], count, 1.0)
    farthest = _each(table, "farthest_m", [100.0], count, 1e-3)
    setup = DeviceSetup(
        nearest_m=nearest,
        farthest_m=farthest,
        flop_s=_each(table, "flop_s", [1e12], count, 1.0),
        memory_bytes_s=_each(table, "memory_bytes_s", [0.0], count, 0.0),
        experts=tuple(map(int, experts)),
    )
    table.done()
    if parts := [each for each in experts if not each.is_integer()]:
        raise ConfigError(f"[devices] experts must be whole numbers, got {parts[0]:g}")
    if any(low > high for low, high in zip(nearest, farthest, strict=True)):
        raise ConfigError("[devices] nearest_m must not be above farthest_m")
    return setup


def read_model(table: Table, devices: DeviceSetup) -> ModelSetup:
    """The model that the devices compute."""
    model = ModelSetup(
        trace=table.text("trace", "default"),
        hidden=table.integer("hidden", None, 1, 1 << 20),
        inner=table.integer("inner", None, 1, 1 << 24),
        weight_bytes=table.number("weight_bytes", 2.0, 0.01, 16.0),
        tokens=table.integer("tokens", None, 1, 1 << 20),
        passes=table.integer("passes", 1, 1, 1 << 20),
        station_s=table.quantity("station_time", "time", "0ms"),
    )
    refuse_unused(table, "[model]", model_uses(any(devices.memory_bytes_s)))
    table.done()
    return model


def _positive(table: Table, key: str, dimension: Any, default: str) -> float:
    value = table.quantity(key, dimension, default)
    if value <= 0:
        raise ConfigError(f"{key} must be above 0")
    return value


def _each(table: Table, key: str, default: list[float], count: int, least: float) -> tuple[float, ...]:
    """One number for all devices, or one for each."""
    values = table.numbers(key, default, least)
    if len(values) not in (1, count):
        raise ConfigError(f"[devices] {key} has {len(values)} numbers for {count} devices")
    return tuple(values) if len(values) == count else tuple(values * count)
