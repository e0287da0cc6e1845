"""A base station's state folder: its key and its allow list. Only a station makes one; whoever reads makes nothing."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from wdmoe.errors import ConfigError
from wdmoe.transport.security.admission import DEVICES, REVOKED, TOKENS, Admission
from wdmoe.transport.security.keys import KeyPair, station_keys

_KEY = "station.key"


@dataclass(frozen=True, slots=True)
class StationState:
    """Who a base station is, and whom it lets in."""

    keys: KeyPair
    admission: Admission


def make_or_open_state(state: Path) -> StationState:
    """The state of a station that starts. In a new folder a key is made.

    Folders come before the key. So where there is a key but no list, somebody moved the list away: an empty one in its
    place would send every device away. Where there is a list but no key, a new key would.

    Raises:
        ConfigError: a part is missing that was there, or the folder cannot be made, read or written.
    """
    try:
        if (state / _KEY).exists():
            (state / REVOKED).mkdir(mode=0o700, exist_ok=True)  # earlier versions had none
            return open_state(state)
        for name in (DEVICES, TOKENS, REVOKED):
            (state / name).mkdir(mode=0o700, parents=True, exist_ok=True)
        if any((state / DEVICES).glob("*.json")):
            raise ConfigError(
                f"state folder {state} lists devices but has no {_KEY}: restore that, or move the folder away to begin "
                "anew, with new tokens for all devices"
            )
    except OSError as error:
        raise ConfigError(f"state folder {state}: {error.strerror or error}") from error
    return StationState(station_keys(state), Admission(state))


def open_state(state: Path) -> StationState:
    """The state of a station that has run before. Makes nothing.

    Raises:
        ConfigError: there is none, or it cannot be read.
    """
    try:
        if not (state / _KEY).exists():
            raise ConfigError(
                f"{state} is no state folder of a base station: it has no {_KEY}. `wdmoe-node bs` makes one"
            )
        for name in (DEVICES, TOKENS):
            with os.scandir(state / name):
                pass  # it can be listed
    except OSError as error:
        raise ConfigError(f"state folder {error.filename}: {error.strerror or error}") from error
    return StationState(station_keys(state), Admission(state))
