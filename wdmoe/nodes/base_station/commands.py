"""Commands to a base station from the program that started it: other rules, and held-out text to read.

Each is a JSON object on one line. `wdmoe-node demo` compares rules on the same devices this way.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from typing import Any

from wdmoe.config import ServingRules, StationSettings
from wdmoe.errors import ConfigError, WdmoeError
from wdmoe.nodes.base_station.base_station import BaseStation
from wdmoe.nodes.base_station.reading import read_window


async def do_command(station: BaseStation, settings: StationSettings, line: bytes) -> Mapping[str, object]:
    """Do what one line says; `settings` are those of the station. What cannot be done is answered with `error`."""
    try:
        command = json.loads(line)
        if command["command"] == "serve":
            station.serve_by(ServingRules(**command["rules"]).of(settings), rehearsal=bool(command["rehearsal"]))
            return {}
        if command["command"] == "read":
            return await asyncio.to_thread(_read, station, command)
    except (ValueError, KeyError, TypeError) as error:
        return {"error": f"no such command: {error}"}
    except WdmoeError as error:
        return {"error": str(error)}
    return {"error": f"no such command: {command['command']!r}"}


def _read(station: BaseStation, command: Mapping[str, Any]) -> Mapping[str, object]:
    number, length = int(command["window"]), int(command["length"])
    if number < 0 or length < 2:
        raise ConfigError(f"there is no window {number} of {length} tokens")
    reading = read_window(station.engine, number, length)
    return {"nats": reading.nats, "tokens": reading.tokens, "dropped_weight": reading.dropped_weight}
