"""Commands to a base station from the program that started it: other rules, and held-out text to read.

Each is a JSON object on one line of its standard input, which nobody but the parent can write to; each is answered by
one line. `wdmoe-node demo` compares rules on the same devices this way.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Callable, Mapping
from typing import Any

from wdmoe.config import ServingRules, StationSettings
from wdmoe.errors import ConfigError, WdmoeError
from wdmoe.nodes.base_station.base_station import BaseStation
from wdmoe.nodes.base_station.reading import read_window

MARK = "Done: "  # before each answer on standard output


async def obey(station: BaseStation, settings: StationSettings, answer: Callable[[str], None]) -> None:
    """Do what standard input says until it ends.

    Args:
        settings: those of the station.
        answer: called with one line for each command.
    """
    lines = asyncio.StreamReader()
    transport, _ = await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(lines), sys.stdin
    )
    try:
        while line := await lines.readline():
            answer(MARK + json.dumps(await _done(station, settings, line)))
    finally:
        transport.close()


async def _done(station: BaseStation, settings: StationSettings, line: bytes) -> Mapping[str, object]:
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
