"""A scenario file (TOML) -> `Scenario`: a shipped one by its name, or a file; and the trace that it names."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

from wdmoe.errors import ConfigError
from wdmoe.simulation.scenario import Scenario, Variant
from wdmoe.simulation.setup_tables import read_channel, read_devices, read_model, read_radio
from wdmoe.simulation.toml_table import Table
from wdmoe.simulation.variant_table import read_variant

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

SHIPPED = ("journal", "wifi-room", "decode", "prefill", "multicast", "moving", "bridge")
MOST_DRAWS = 1_000_000
_MOST_BYTES = 1 << 20
_SHIPPED_TRACE = "default_model.npz"


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
    radio = read_radio(root.table("radio"))
    devices = read_devices(root.table("devices"))
    scenario = Scenario(
        name=root.text("name"),
        about=root.text("about", ""),
        seed=root.integer("seed", 0, 0, 2**63 - 1),
        draws=root.integer("draws", 200, 1, MOST_DRAWS),
        backend=_known_backend(root.text("backend", "loky")),
        radio=radio,
        channel=read_channel(root.table("channel"), radio.carrier_hz),
        devices=devices,
        model=read_model(root.table("model"), devices),
        variants=tuple(read_variant(each) for each in root.tables("variant")),
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


def shipped_trace() -> Path:
    """File of the default model's trace; `GateTrace.load` reads it. `data/README.md` beside it says what it holds."""
    return Path(__file__).with_name("data") / _SHIPPED_TRACE


def find_trace(name: str) -> Path:
    """The file that a scenario names; `default` is the shipped one."""
    return shipped_trace() if name == "default" else Path(name)
