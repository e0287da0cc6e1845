"""3GPP TR 38.901 path loss and line of sight: UMi street canyon, UMa, indoor office. Losses are positive decibels.

A scenario is data and one hook; the path loss formulas are the same for all. Source throughout: 3GPP TR 38.901 V17.0.0,
tables 7.2-1, 7.2-2, 7.4.1-1, 7.4.2-1 and 7.5-6. Devices are outdoors in UMi and UMa: penetration into buildings is not
modelled.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from wdmoe.arrays import BoolArray, FloatArray
from wdmoe.errors import ConfigError
from wdmoe.wireless.checks import broadcast, flags, one_of, positive, within

ROUNDED_LIGHT_M_S = 3.0e8  # as note 1 of table 7.4.1-1 has it; used for the breakpoint only
CARRIER_HZ = (0.5e9, 100e9)
_LOW_DEVICE_M = 13.0  # UMa devices up to here see the street, not the roofs


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """One column of the report's tables. Pairs are (LOS, NLOS) unless said otherwise."""

    name: str
    los: tuple[float, float, float]  # intercept, slopes of log10(d3D / m) and log10(fc / GHz); before the breakpoint
    nlos: tuple[float, float, float, float]  # the same, and the gain in dB per metre of device height above 1.5 m
    has_breakpoint: bool  # beyond it, line of sight loses 40 dB a decade
    sight: Callable[[FloatArray, FloatArray], FloatArray]  # d2D, device height (m) -> probability of LOS
    station_height_m: float
    device_height_m: float
    device_heights_m: tuple[float, float]  # lowest, highest
    distances_m: tuple[float, float]  # nearest, farthest for which the fits hold
    limits_3d: bool  # these two are of d3D, else of d2D
    sigma_db: tuple[float, float]  # of shadowing
    decorrelation_m: tuple[float, float]  # a device's way after which its shadowing is correlated by 1/e
    k_factor_db: tuple[float, float]  # Rician K of LOS links: mean and standard deviation, in dB


def _street_sight(distance_m: FloatArray, decay_m: float) -> FloatArray:
    near = np.minimum(18 / np.maximum(distance_m, 1e-300), 1.0)
    return np.asarray(near + np.exp(-distance_m / decay_m) * (1 - near))


def _umi_sight(distance_m: FloatArray, height_m: FloatArray) -> FloatArray:
    return np.broadcast_to(_street_sight(distance_m, 36), np.broadcast_shapes(distance_m.shape, height_m.shape))


def _roof_term(distance_m: FloatArray, height_m: FloatArray) -> FloatArray:
    """C'(h_UT) times 5/4 (d/100)^3 exp(-d/150): how much more a high device sees; 0 up to 13 m height or 18 m away."""
    height = (np.maximum(height_m - _LOW_DEVICE_M, 0.0) / 10) ** 1.5
    far = 1.25 * (distance_m / 100) ** 3 * np.exp(-distance_m / 150)
    return np.asarray(height * np.where(distance_m > 18, far, 0.0))


def _uma_sight(distance_m: FloatArray, height_m: FloatArray) -> FloatArray:
    return np.minimum(_street_sight(distance_m, 63) * (1 + _roof_term(distance_m, height_m)), 1.0)


def _office_sight(distance_m: FloatArray, height_m: FloatArray, rooms: tuple[float, ...]) -> FloatArray:
    first, second, near_decay, far_decay, far_share = rooms
    distance = np.broadcast_to(distance_m, np.broadcast_shapes(distance_m.shape, height_m.shape))
    near = np.exp(-np.maximum(distance - first, 0.0) / near_decay)
    far = far_share * np.exp(-np.maximum(distance - second, 0.0) / far_decay)
    return np.where(distance <= second, near, far)


def _open_office_sight(distance_m: FloatArray, height_m: FloatArray) -> FloatArray:
    return _office_sight(distance_m, height_m, (5.0, 49.0, 70.8, 211.7, 0.54))


def _mixed_office_sight(distance_m: FloatArray, height_m: FloatArray) -> FloatArray:
    return _office_sight(distance_m, height_m, (1.2, 6.5, 4.7, 32.6, 0.32))


UMI = Scenario(
    name="umi",
    los=(32.4, 21.0, 20.0),
    nlos=(22.4, 35.3, 21.3, 0.3),
    has_breakpoint=True,
    sight=_umi_sight,
    station_height_m=10.0,
    device_height_m=1.5,
    device_heights_m=(1.5, 22.5),
    distances_m=(10.0, 5000.0),
    limits_3d=False,
    sigma_db=(4.0, 7.82),
    decorrelation_m=(10.0, 13.0),
    k_factor_db=(9.0, 5.0),
)
UMA = replace(
    UMI,
    name="uma",
    los=(28.0, 22.0, 20.0),
    nlos=(13.54, 39.08, 20.0, 0.6),
    sight=_uma_sight,
    station_height_m=25.0,
    sigma_db=(4.0, 6.0),
    decorrelation_m=(37.0, 50.0),
    k_factor_db=(9.0, 3.5),
)
INH_OPEN = Scenario(
    name="inh-open",
    los=(32.4, 17.3, 20.0),
    nlos=(17.3, 38.3, 24.9, 0.0),
    has_breakpoint=False,
    sight=_open_office_sight,
    station_height_m=3.0,
    device_height_m=1.0,
    device_heights_m=(0.0, 3.0),
    distances_m=(1.0, 150.0),
    limits_3d=True,
    sigma_db=(3.0, 8.03),
    decorrelation_m=(10.0, 6.0),
    k_factor_db=(7.0, 4.0),
)
INH_MIXED = replace(INH_OPEN, name="inh-mixed", sight=_mixed_office_sight)
SCENARIOS = {each.name: each for each in (UMI, UMA, INH_OPEN, INH_MIXED)}


def scenario_named(name: str) -> Scenario:
    """The scenario called `umi`, `uma`, `inh-open` or `inh-mixed`, else ConfigError."""
    return one_of("scenario", name, SCENARIOS)


def los_probability(
    scenario: Scenario, distance_m: npt.ArrayLike, device_height_m: npt.ArrayLike | None = None
) -> FloatArray:
    """Probability that nothing stands between base station and device.

    In UMi and UMa it is 1 up to 18 m, then `18/d + exp(-d/a) (1 - 18/d)` with a = 36 m in UMi and 63 m in UMa, where
    devices above 13 m see more. In offices it is 1 up to 5 m (open) or 1.2 m (mixed) and falls in two exponentials.

    Args:
        distance_m: (...,) d2D, on the ground, metres, > 0.
        device_height_m: (...,) metres, within what the scenario allows; None: the scenario's own.
    Returns:
        (...,) 0 to 1.
    Raises:
        ConfigError: a value is not as above, or shapes do not fit.
    Source: table 7.4.2-1.
    """
    distance = positive("distance_m", distance_m)
    height = _device_height(scenario, device_height_m)
    broadcast(distance_m=distance, device_height_m=height)
    return np.array(scenario.sight(distance, height))


def breakpoint_m(
    station_height_m: npt.ArrayLike,
    device_height_m: npt.ArrayLike,
    carrier_hz: npt.ArrayLike,
    environment_height_m: npt.ArrayLike = 1.0,
) -> FloatArray:
    """Distance d'BP beyond which the ground's reflection takes hold: `4 (h_BS - h_E) (h_UT - h_E) f / c`.

    Args:
        station_height_m, device_height_m: (...,) metres, above the environment.
        carrier_hz: (...,) hertz, > 0.
        environment_height_m: (...,) h_E, metres, > 0: 1 m in UMi, and in UMa unless drawn higher.
    Returns:
        (...,) metres, d2D.
    Raises:
        ConfigError: a value is not as above, or shapes do not fit.
    Source: note 1 of table 7.4.1-1.
    """
    ground = positive("environment_height_m", environment_height_m)
    station, device = positive("station_height_m", station_height_m), positive("device_height_m", device_height_m)
    carrier = positive("carrier_hz", carrier_hz)
    broadcast(station_height_m=station, device_height_m=device, carrier_hz=carrier, environment_height_m=ground)
    if np.any(station <= ground) or np.any(device <= ground):
        raise ConfigError("environment_height_m must be below base station and device")
    return np.asarray(4 * (station - ground) * (device - ground) * carrier / ROUNDED_LIGHT_M_S)


def draw_environment_height_m(
    rng: np.random.Generator, distance_m: npt.ArrayLike, device_height_m: npt.ArrayLike
) -> FloatArray:
    """Effective environment height h_E of UMa links: 1 m for low devices, else at random up to 1.5 m below the device.

    Args:
        rng: the only source of randomness.
        distance_m: (...,) d2D, metres, > 0.
        device_height_m: (...,) 1.5 to 22.5 m.
    Returns:
        (...,) metres: 1 with probability 1 / (1 + C), else one of 12, 15, ... up to the device's height less 1.5.
    Raises:
        ConfigError: a value is not as above, or shapes do not fit.
    Source: note 1 of table 7.4.1-1.
    """
    distance, height = positive("distance_m", distance_m), _device_height(UMA, device_height_m)
    shape = broadcast(distance_m=distance, device_height_m=height)
    street = rng.random(shape) < 1 / (1 + _roof_term(distance, height))
    # Between 13 and 13.5 m the report's list is empty; its first entry stands for it.
    roofs = np.floor(np.maximum(height - 13.5, 0.0) / 3) + 1
    return np.where(street, 1.0, 12 + 3 * np.floor(rng.random(shape) * roofs))


def path_loss_db(
    scenario: Scenario,
    distance_m: npt.ArrayLike,
    carrier_hz: npt.ArrayLike,
    los: npt.ArrayLike,
    *,
    station_height_m: npt.ArrayLike | None = None,
    device_height_m: npt.ArrayLike | None = None,
    environment_height_m: npt.ArrayLike = 1.0,
    extrapolate: bool = False,
) -> FloatArray:
    """Median path loss, without shadowing.

    LOS: `a + b log10(d3D) + 20 log10(fc)` and, where there is a breakpoint and d2D lies beyond it,
    `a + 40 log10(d3D) + 20 log10(fc) - (40 - b)/2 log10(d'BP^2 + (h_BS - h_UT)^2)`, which meets it there.
    NLOS: the larger of LOS and `a' + b' log10(d3D) + c' log10(fc) - e (h_UT - 1.5)`. d in metres, fc in GHz.
    For example UMi at 100 m, 3.5 GHz: d3D = 100.361, LOS 85.314 dB, NLOS 104.644 dB.

    Args:
        scenario: whose fits.
        distance_m: (...,) d2D, on the ground, metres; within 10 m to 5 km in UMi and UMa, d3D 1 to 150 m in offices.
        carrier_hz: (...,) 0.5 to 100 GHz.
        los: (...,) bool, line of sight or not.
        station_height_m: (...,) metres, > 0; None: the scenario's (10, 25 or 3 m), for which the fits were made.
        device_height_m: (...,) 1.5 to 22.5 m (offices: to 3 m); None: the scenario's (1.5 or 1 m).
        environment_height_m: (...,) h_E in metres, for UMa devices above 13 m from `draw_environment_height_m`.
        extrapolate: distances outside the range are computed all the same (> 0 always).
    Returns:
        (...,) decibels.
    Raises:
        ConfigError: a value is not as above, or shapes do not fit.
    Source: table 7.4.1-1.
    """
    sight, distance = flags("los", los), positive("distance_m", distance_m)
    carrier = within("carrier_hz", carrier_hz, *CARRIER_HZ, ", where TR 38.901 holds")
    given_m = scenario.station_height_m if station_height_m is None else station_height_m
    station, device = positive("station_height_m", given_m), _device_height(scenario, device_height_m)
    broadcast(distance_m=distance, carrier_hz=carrier, los=sight, station_height_m=station, device_height_m=device)
    slant = np.hypot(distance, station - device)
    if not extrapolate:
        why = f", where {scenario.name} holds (extrapolate to go beyond)"
        label = "3-D distance_m" if scenario.limits_3d else "distance_m"
        within(label, slant if scenario.limits_3d else distance, *scenario.distances_m, why)
    clear = _los_db(scenario, slant, carrier)
    if scenario.has_breakpoint:
        edge = breakpoint_m(station, device, carrier, environment_height_m)
        broadcast(distance_m=distance, breakpoint_m=edge)
        clear = clear + _beyond_db(scenario, slant, np.hypot(edge, station - device), distance > edge)
    return np.where(sight, clear, np.maximum(clear, _blocked_db(scenario, slant, carrier, device)))


def shadowing_sigma_db(scenario: Scenario, los: npt.ArrayLike) -> FloatArray:
    """Standard deviation of log-normal shadowing, (...,) dB, for (...,) bool `los`; ConfigError if it is not bool.

    Source: table 7.4.1-1.
    """
    return np.where(flags("los", los), *scenario.sigma_db)


def decorrelation_m(scenario: Scenario, los: npt.ArrayLike) -> FloatArray:
    """Way of a device after which its shadowing is correlated by 1/e, (...,) metres; ConfigError if `los` is not bool.

    Source: table 7.5-6.
    """
    return np.where(flags("los", los), *scenario.decorrelation_m)


def _device_height(scenario: Scenario, height_m: npt.ArrayLike | None) -> FloatArray:
    given = scenario.device_height_m if height_m is None else height_m
    return within("device_height_m", given, *scenario.device_heights_m, f" in {scenario.name}")


def _los_db(scenario: Scenario, slant_m: FloatArray, carrier_hz: FloatArray) -> FloatArray:
    intercept, slope, frequency = scenario.los
    return np.asarray(intercept + slope * np.log10(slant_m) + frequency * np.log10(carrier_hz / 1e9))


def _beyond_db(scenario: Scenario, slant_m: FloatArray, edge_slant_m: FloatArray, beyond: BoolArray) -> FloatArray:
    """What the steeper slope adds beyond the breakpoint: the report's second formula less its first."""
    return np.where(beyond, (40 - scenario.los[1]) * np.log10(slant_m / edge_slant_m), 0.0)


def _blocked_db(scenario: Scenario, slant_m: FloatArray, carrier_hz: FloatArray, device_m: FloatArray) -> FloatArray:
    intercept, slope, frequency, height = scenario.nlos
    distance_part = intercept + slope * np.log10(slant_m) + frequency * np.log10(carrier_hz / 1e9)
    return np.asarray(distance_part - height * (device_m - 1.5))
