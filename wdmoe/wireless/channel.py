"""What the air does to each device's signal: path loss, shadowing and fading in one record."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from wdmoe.arrays import BoolArray, FloatArray
from wdmoe.wireless.checks import broadcast, decibels, not_negative, positive
from wdmoe.wireless.fading import draw_rician, power_gain
from wdmoe.wireless.shadowing import draw_shadowing_db
from wdmoe.wireless.tr38901 import Scenario, los_probability, path_loss_db, shadowing_sigma_db


def _none() -> FloatArray:
    return np.zeros(())


def _unity() -> FloatArray:
    return np.ones(())


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Channel:
    """Losses and fading of links, arrays that fit each other: the last axis is the device, those before it are draws.

    Raises:
        ConfigError: a loss is outside -1000 to 1000 dB, a fading negative or not finite, or shapes do not fit.
    """

    path_loss_db: FloatArray  # median, positive decibels
    shadowing_db: FloatArray = field(default_factory=_none)  # adds to the loss
    downlink_fading: FloatArray = field(default_factory=_unity)  # power gains, mean 1
    uplink_fading: FloatArray = field(default_factory=_unity)

    def __post_init__(self) -> None:
        broadcast(
            path_loss_db=decibels("path_loss_db", self.path_loss_db),
            shadowing_db=decibels("shadowing_db", self.shadowing_db),
            downlink_fading=not_negative("downlink_fading", self.downlink_fading),
            uplink_fading=not_negative("uplink_fading", self.uplink_fading),
        )

    @property
    def mean_gain(self) -> FloatArray:
        """Power gain without fading, plain ratio."""
        return np.asarray(10 ** (-(np.asarray(self.path_loss_db) + self.shadowing_db) / 10))

    @property
    def downlink_gain(self) -> FloatArray:
        """Power gain from base station to device, plain ratio."""
        return np.asarray(self.mean_gain * self.downlink_fading)

    @property
    def uplink_gain(self) -> FloatArray:
        """Power gain from device to base station, plain ratio."""
        return np.asarray(self.mean_gain * self.uplink_fading)


def draw_fading(
    rng: np.random.Generator,
    path_loss_db: npt.ArrayLike,
    k_factor: npt.ArrayLike = 0.0,
    *,
    draws: tuple[int, ...] = (),
    reciprocal: bool = True,
) -> Channel:
    """Channels of known path loss with independent fading.

    Args:
        rng: the only source of randomness.
        path_loss_db: (..., device) decibels.
        k_factor: (..., device) Rician K, plain ratio; 0 is Rayleigh.
        draws: axes put in front, each with its own fading.
        reciprocal: uplink and downlink fade alike, as they do on one frequency; otherwise independently.
    Returns:
        Fading of shape (*draws, ..., device).
    Raises:
        ConfigError: a value is not as above, or shapes do not fit.
    """
    loss = decibels("path_loss_db", path_loss_db)
    shape = (*draws, *broadcast(path_loss_db=loss, k_factor=k_factor))
    down = power_gain(draw_rician(rng, k_factor, shape))
    up = down if reciprocal else power_gain(draw_rician(rng, k_factor, shape))
    return Channel(path_loss_db=loss, downlink_fading=down, uplink_fading=up)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Surroundings:
    """What changes only when a device moves far, (..., device)."""

    los: BoolArray
    path_loss_db: FloatArray
    shadowing_db: FloatArray
    k_factor: FloatArray  # plain ratio; 0 without line of sight


def draw_surroundings(
    rng: np.random.Generator,
    scenario: Scenario,
    distance_m: npt.ArrayLike,
    carrier_hz: float,
    *,
    device_height_m: npt.ArrayLike | None = None,
    draws: tuple[int, ...] = (),
    extrapolate: bool = False,
) -> Surroundings:
    """Line of sight, path loss, shadowing and Rician K of devices at these places; all links independent.

    Devices of UMa above 13 m are treated as over a street (environment height 1 m).

    Args:
        rng: the only source of randomness.
        scenario: of TR 38.901.
        distance_m: (..., device) d2D, metres, within what the scenario allows unless `extrapolate`.
        carrier_hz: 0.5 to 100 GHz.
        device_height_m: (..., device) metres; None: the scenario's own.
        draws: axes put in front, each with its own sight, shadowing and K.
        extrapolate: as in `tr38901.path_loss_db`.
    Returns:
        Arrays of shape (*draws, ..., device).
    Raises:
        ConfigError: a value is not as above, or shapes do not fit.
    Source: 3GPP TR 38.901, tables 7.4.1-1, 7.4.2-1, 7.5-6; K is normal in dB.
    """
    distance = positive("distance_m", distance_m)
    height = scenario.device_height_m if device_height_m is None else device_height_m
    shape = (*draws, *broadcast(distance_m=distance, device_height_m=height))
    los = rng.random(shape) < los_probability(scenario, distance, height)
    loss = path_loss_db(scenario, distance, carrier_hz, los, device_height_m=height, extrapolate=extrapolate)
    shadowing = draw_shadowing_db(rng, shadowing_sigma_db(scenario, los))
    mean, deviation = scenario.k_factor_db
    k_factor = np.where(los, 10 ** ((mean + deviation * rng.standard_normal(shape)) / 10), 0.0)
    return Surroundings(los=los, path_loss_db=loss, shadowing_db=shadowing, k_factor=k_factor)


def draw_channel(rng: np.random.Generator, around: Surroundings, *, reciprocal: bool = True) -> Channel:
    """One fading block of links in these surroundings.

    Args:
        rng: the only source of randomness.
        around: (..., device).
        reciprocal: as in `draw_fading`.
    Returns:
        (..., device).
    Raises:
        ConfigError: shapes do not fit.
    """
    faded = draw_fading(rng, around.path_loss_db, around.k_factor, reciprocal=reciprocal)
    return Channel(
        path_loss_db=around.path_loss_db,
        shadowing_db=around.shadowing_db,
        downlink_fading=faded.downlink_fading,
        uplink_fading=faded.uplink_fading,
    )
