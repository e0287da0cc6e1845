"""What is simulated: a scenario file (TOML), read into frozen records. docs/simulation.md explains every key."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from wdmoe.config import RANKS
from wdmoe.errors import ConfigError
from wdmoe.simulation.toml_table import Table
from wdmoe.solver.layer.analog_downlink import TRANSFORMS, Analog
from wdmoe.solver.layer.latency import MULTICASTS, Levers
from wdmoe.solver.layer.plan import Policy
from wdmoe.solver.selection import POLICIES
from wdmoe.wireless.doppler import doppler_hz
from wdmoe.wireless.link import SPENDINGS
from wdmoe.wireless.tr38901 import SCENARIOS

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

SHIPPED = ("journal", "wifi-room", "decode", "prefill", "multicast", "moving", "bridge")
PATH_LOSSES = ("free-space", "log-distance", *SCENARIOS)
CHANGES = ("pass", "layer", "doppler")
FADINGS = ("rayleigh", "rician", "none")
LAWS = ("shannon", "nr", "wifi")
PLACEMENTS = ("spread", "greedy", "exact")
MOST_DRAWS = 1_000_000
_MOST_BYTES = 1 << 20
_USUAL = Policy()
_ANALOG = Analog()
_SHIPPED_TRACE = "default_model.npz"


@dataclass(frozen=True, slots=True, kw_only=True)
class RadioSetup:
    """Both ends of all links, in SI units."""

    carrier_hz: float
    bandwidth_hz: float
    station_power_w: float
    device_power_w: float
    noise_w_hz: float  # at every receiver, noise figure included
    spending: str
    law: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ChannelSetup:
    """What is between the antennas."""

    path_loss: str
    exponent: float  # of log-distance
    shadowing_db: float  # standard deviation; the scenarios of TR 38.901 have their own
    fading: str
    k_factor_db: float  # of rician
    changes: str  # fading is one for the whole pass, anew for each layer, or moves on from layer to layer (doppler)
    doppler_hz: float  # largest shift; with "doppler" only
    block_s: float  # from one layer to the next; with "doppler" only


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceSetup:
    """The devices; tuples have one entry each."""

    nearest_m: tuple[float, ...]
    farthest_m: tuple[float, ...]  # drawn uniformly between the two, anew for each draw; equal: it stands there
    flop_s: tuple[float, ...]
    memory_bytes_s: tuple[float, ...]  # 0: compute by FLOP alone
    experts: tuple[int, ...]  # how many it has room for, in each layer

    @property
    def count(self) -> int:
        """How many there are."""
        return len(self.nearest_m)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSetup:
    """The model whose experts travel, and whose gates are replayed."""

    trace: str  # file, or "default": the shipped trace of the default model
    hidden: int
    inner: int  # neurons of an expert
    weight_bytes: float
    tokens: int  # of one pass: 1 is decoding, more is prefill
    passes: int  # for each draw, of other tokens each
    station_s: float  # attention and gate of one layer


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """One way to run the layer, compared with the others on the same draws."""

    name: str
    policy: Policy
    placement: str
    replicas: int  # most devices that hold one expert
    rank: str = "probability"  # what the policy ranks by, see `wdmoe.solver.ranking`
    whole_layers: int = 0  # so many layers from the first on keep all their experts
    csi_layers: int = 1  # the channel is measured every so many layers; 0: at the beginning of a pass
    csi_delay: int = 0  # and a measurement is so many layers old when it is first used

    def policy_of(self, layer: int) -> Policy:
        """The policy of a layer, counted from 0."""
        return replace(self.policy, name="topk") if layer < self.whole_layers else self.policy

    def measured(self, layer: int) -> int:
        """The layer whose channel this one is decided by. A pass begins with a channel that is known."""
        latest = layer // self.csi_layers * self.csi_layers if self.csi_layers else 0
        return max(latest - self.csi_delay, 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """All that decides the figures, but for the draws' number and the seed, which a caller may change."""

    name: str
    about: str
    seed: int
    draws: int
    radio: RadioSetup
    channel: ChannelSetup
    devices: DeviceSetup
    model: ModelSetup
    variants: tuple[Variant, ...]  # the first is the baseline
    backend: str  # where draws are computed: loky (processes of this machine), dask, dask:ADDRESS, ray or ray:ADDRESS
    source: str  # the file's text, kept with the results


def load_scenario(name: str) -> Scenario:
    """Read a scenario file, or a shipped one by its name.

    Raises:
        ConfigError: it cannot be read, or says something that cannot be; one line names it.
    """
    file = Path(name)
    if name in SHIPPED and not file.exists():
        file = Path(__file__).with_name("data") / f"{name}.toml"
    try:
        if file.stat().st_size > _MOST_BYTES:
            raise ConfigError(f"scenario {name} is larger than 1 MiB")
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        known = ", ".join(SHIPPED)
        raise ConfigError(f"scenario {name} cannot be read: {error}; shipped ones are {known}") from error
    try:
        return parse_scenario(text)
    except ConfigError as error:
        raise ConfigError(f"scenario {name}: {error}") from error


def parse_scenario(text: str) -> Scenario:
    """A scenario from the text of its file.

    Raises:
        ConfigError: as `load_scenario`.
    """
    try:
        root = Table(tomllib.loads(text), "the file")
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"not TOML: {error}") from error
    radio = _radio(root.table("radio"))
    scenario = Scenario(
        name=root.text("name"),
        about=root.text("about", ""),
        seed=root.integer("seed", 0, 0, 2**63 - 1),
        draws=root.integer("draws", 200, 1, MOST_DRAWS),
        backend=_known_backend(root.text("backend", "loky")),
        radio=radio,
        channel=_channel(root.table("channel"), radio.carrier_hz),
        devices=_devices(root.table("devices")),
        model=_model(root.table("model")),
        variants=tuple(_variant(each) for each in root.tables("variant")),
        source=text,
    )
    root.done()
    names = [variant.name for variant in scenario.variants]
    if len(set(names)) != len(names):
        raise ConfigError("two [[variant]] have the same name")
    for variant in scenario.variants:
        _check_together(scenario, variant)
    return scenario


def _check_together(scenario: Scenario, variant: Variant) -> None:
    """What a variant may ask of this radio and channel."""
    if variant.policy.levers.multicast == "superposition" and scenario.radio.law != "shannon":
        raise ConfigError(
            f'[[variant]] {variant.name!r}: multicast = "superposition" needs [radio] law = "shannon", '
            f"got {scenario.radio.law!r}: its powers are of Gaussian codes, not of an MCS table"
        )
    if (variant.csi_layers, variant.csi_delay) != (1, 0) and scenario.channel.changes == "pass":
        raise ConfigError(
            f"[[variant]] {variant.name!r}: csi_layers and csi_delay need [channel] fading_changes = "
            '"layer" or "doppler": within a pass the channel stays as it is'
        )


def with_changes(scenario: Scenario, *, draws: int | None, seed: int | None, backend: str | None) -> Scenario:
    """The same scenario with another number of draws, seed or backend where one is given.

    Raises:
        ConfigError: the backend is none that is known.
    """
    return replace(
        scenario,
        draws=scenario.draws if draws is None else draws,
        seed=scenario.seed if seed is None else seed,
        backend=scenario.backend if backend is None else _known_backend(backend),
    )


def _known_backend(backend: str) -> str:
    if backend.partition(":")[0] not in ("loky", "threading", "dask", "ray"):
        raise ConfigError(f"backend must be loky, threading, dask, dask:ADDRESS, ray or ray:ADDRESS, got {backend!r}")
    return backend


def _radio(table: Table) -> RadioSetup:
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


def _channel(table: Table, carrier_hz: float) -> ChannelSetup:
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


def _devices(table: Table) -> DeviceSetup:
    count = table.integer("count", 8, 1, 4096)
    nearest = _each(table, "nearest_m", [10.0], count, 1e-3)
    farthest = _each(table, "farthest_m", [100.0], count, 1e-3)
    setup = DeviceSetup(
        nearest_m=nearest,
        farthest_m=farthest,
        flop_s=_each(table, "flop_s", [1e12], count, 1.0),
        memory_bytes_s=_each(table, "memory_bytes_s", [0.0], count, 0.0),
        experts=tuple(int(each) for each in _each(table, "experts", [1.0], count, 1.0)),
    )
    table.done()
    if any(low > high for low, high in zip(nearest, farthest, strict=True)):
        raise ConfigError("[devices] nearest_m must not be above farthest_m")
    return setup


def _model(table: Table) -> ModelSetup:
    model = ModelSetup(
        trace=table.text("trace", "default"),
        hidden=table.integer("hidden", None, 1, 1 << 20),
        inner=table.integer("inner", None, 1, 1 << 24),
        weight_bytes=table.number("weight_bytes", 2.0, 0.01, 16.0),
        tokens=table.integer("tokens", None, 1, 1 << 20),
        passes=table.integer("passes", 1, 1, 1 << 20),
        station_s=table.quantity("station_time", "time", "0ms"),
    )
    table.done()
    return model


def _variant(table: Table) -> Variant:
    name = table.text("name")
    policy, levers, analog = _policy(table), _levers(table), _analog(table)
    rest: dict[str, Any] = {
        "placement": table.text("placement", "spread", PLACEMENTS),
        "replicas": table.integer("replicas", 1, 1, 4096),
        "rank": table.text("rank", "probability", RANKS),
        "whole_layers": table.integer("whole_layers", 0, 0, 4096),
        "csi_layers": table.integer("csi_layers", 1, 0, 4096),
        "csi_delay": table.integer("csi_delay", 0, 0, 4096),
    }
    table.done()
    try:
        lever = None if analog is None else Analog(**analog)
        made = Policy(levers=Levers(analog=lever, **levers), **policy)
    except ValueError as error:
        raise ConfigError(f"[[variant]] {name!r}: {error}") from error
    return Variant(name=name, policy=made, **rest)


def _policy(table: Table) -> dict[str, Any]:
    return {
        "name": table.text("policy", "topk", POLICIES),
        "max_dropped": table.number("max_dropped", 0.0, 0.0, 1.0),
        "budget_s": table.quantity("budget", "time", "0ms"),
        "light": table.number("light", _USUAL.light, 0.0, 1.0),
        "theta": table.number("theta", _USUAL.theta, 0.0, 1.0),
        "theta_step": table.number("theta_step", _USUAL.theta_step, 0.001, 1.0),
        "gamma": table.number("gamma", _USUAL.gamma, 1e-6, 1e6),
        "least_similarity": table.number("least_similarity", _USUAL.least_similarity, -1.0, 2.0),
        "times_faster": table.number("times_faster", _USUAL.times_faster, 1.0, 1e6),
    }


def _levers(table: Table) -> dict[str, Any]:
    return {
        "bits": table.integer("bits", 16, 4, 16),
        "coarse_bits": table.integer("coarse_bits", 0, 0, 16),
        "coarse_share": table.number("coarse_share", _USUAL.levers.coarse_share, 0.0, 1.0),
        "max_distortion": table.number("max_distortion", 0.0, 0.0, 1.0),
        "partial_sums": table.flag("partial_sums"),
        "multicast": table.switch("multicast", MULTICASTS),
        "micro_batches": table.integer("micro_batches", 1, 1, 1024),
        "equal_bandwidth": table.text("bandwidth", "optimal", ("optimal", "equal")) == "equal",
    }


def _analog(table: Table) -> dict[str, Any] | None:
    """How a variant broadcasts hidden vectors without bits; None: it does not, and has no key of it."""
    if table.text("downlink", "digital", ("digital", "analog")) == "digital":
        return None
    return {
        "ratio": table.number("analog_ratio", _ANALOG.ratio),
        "floor_db": table.number("analog_floor_db", _ANALOG.floor_db),
        "transform": table.text("analog_transform", _ANALOG.transform, TRANSFORMS),
        "share": table.number("analog_share", _ANALOG.share),
    }


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


def shipped_trace() -> Path:
    """File of the default model's trace; `GateTrace.load` reads it. `data/README.md` beside it says what it holds."""
    return Path(__file__).with_name("data") / _SHIPPED_TRACE


def find_trace(name: str) -> Path:
    """The file that a scenario names; `default` is the shipped one."""
    return shipped_trace() if name == "default" else Path(name)
