"""The placement file, JSON that people read and edit.

    {"format": 1, "devices": {NAME: {LAYERS: [EXPERTS...]}}}

LAYERS is a layer ("004") or a range of layers ("000-029"); an expert is a number or a range ("0-3"). Ranges
include both ends. An expert may stand under several devices. Text in, records out: reading files is the
caller's work.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from wdmoe.errors import ConfigError
from wdmoe.records import ExpertId

FORMAT = 1
MOST_LAYERS = 10_000
MOST_EXPERTS = 65_536
_RANGE = re.compile(r"([0-9]{1,6})(?:-([0-9]{1,6}))?")

Placement = Mapping[str, Sequence[ExpertId]]


def read_placement(text: str) -> dict[str, tuple[ExpertId, ...]]:
    """Experts of each device name, ascending.

    Raises:
        ConfigError: not such a file; says where and what is wrong.
    """
    try:
        document = json.loads(text, object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"placement: not valid JSON: {error}") from error
    if not isinstance(document, dict) or set(document) != {"format", "devices"}:
        raise ConfigError('placement: need exactly the keys "format" and "devices"')
    if document["format"] != FORMAT or isinstance(document["format"], bool):
        raise ConfigError(f"placement: format must be {FORMAT}, got {document['format']!r}")
    if not isinstance(document["devices"], dict):
        raise ConfigError("placement: devices must be an object of device names")
    return {name: _read_device(name, layers) for name, layers in document["devices"].items()}


def write_placement(placement: Placement) -> str:
    """The text that `read_placement` reads back to the same experts, ascending and without repeats.

    Raises:
        ConfigError: a layer or expert is outside what the file can hold.
    """
    devices = [f"    {json.dumps(name)}: {_write_device(name, experts)}" for name, experts in placement.items()]
    body = "{\n" + ",\n".join(devices) + "\n  }" if devices else "{}"
    return f'{{\n  "format": {FORMAT},\n  "devices": {body}\n}}\n'


def placement_of(held: npt.NDArray[np.bool_], names: Sequence[str], layers: Sequence[int]) -> Placement:
    """What `write_placement` writes, from who holds what.

    Args:
        held: (layers, experts, devices), as of a `Plan`.
        names: of the devices.
        layers: decoder layer of each row.
    """
    return {
        name: tuple(ExpertId(int(layers[row]), int(expert)) for row, expert in zip(*np.nonzero(mine), strict=True))
        for name, mine in zip(names, np.moveaxis(held, 2, 0), strict=True)
    }


def check_placement(placement: Placement, experts: Iterable[ExpertId]) -> None:
    """Whether a placement serves exactly the experts of a model, each at least once.

    Raises:
        ConfigError: names the first expert that is unknown or that no device holds.
    """
    wanted = set(experts)
    for name, held in placement.items():
        for expert in held:
            if expert not in wanted:
                raise ConfigError(f"placement: device {name!r}: the model has no {_name(expert)}")
    missing = sorted(wanted.difference(*placement.values()))
    if missing:
        raise ConfigError(f"placement: no device holds {_name(missing[0])} ({len(missing)} such in all)")


def _name(expert: ExpertId) -> str:
    return f"expert {expert.expert} in layer {expert.layer}"


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for index, (key, _) in enumerate(pairs) if key in dict(pairs[:index]))
        raise ConfigError(f"placement: {twice!r} stands twice in one object")
    return found


def _read_device(name: str, layers: object) -> tuple[ExpertId, ...]:
    if not isinstance(layers, dict):
        raise ConfigError(f"placement: device {name!r} must hold an object of layers")
    found: set[ExpertId] = set()
    for key, entries in layers.items():
        where = f"device {name!r}, layer {key!r}"
        if not isinstance(entries, list):
            raise ConfigError(f"placement: {where}: need a list of experts")
        for layer in _read_range(where, key, MOST_LAYERS):
            for entry in entries:
                for expert in _read_range(where, entry, MOST_EXPERTS):
                    held = ExpertId(layer, expert)
                    if held in found:
                        raise ConfigError(f"placement: device {name!r} holds {_name(held)} twice")
                    found.add(held)
    return tuple(sorted(found))


def _read_range(where: str, entry: object, limit: int) -> range:
    """A number, "number" or "first-last" as a range of numbers below `limit`."""
    match = _RANGE.fullmatch(str(entry)) if isinstance(entry, str | int) else None  # "True" never matches
    if match is None:
        raise ConfigError(f'placement: {where}: {entry!r} is neither a number nor a range such as "0-3"')
    first, last = int(match[1]), int(match[2] or match[1])
    if not first <= last < limit:
        raise ConfigError(f"placement: {where}: {entry!r} must rise and stay below {limit}")
    return range(first, last + 1)


def _write_device(name: str, experts: Iterable[ExpertId]) -> str:
    by_layer: dict[int, list[int]] = {}
    for layer, expert in sorted(set(experts)):
        if not (0 <= layer < MOST_LAYERS and 0 <= expert < MOST_EXPERTS):
            raise ConfigError(f"placement: device {name!r}: cannot write expert {expert} in layer {layer}")
        by_layer.setdefault(layer, []).append(expert)
    lines = []
    layers = list(by_layer)
    while layers:
        first = layers[0]
        count = _alike(layers, by_layer)
        key = f"{first:03d}" if count == 1 else f"{first:03d}-{first + count - 1:03d}"
        lines.append(f'      "{key}": [{", ".join(_runs(by_layer[first]))}]')
        layers = layers[count:]
    return "{\n" + ",\n".join(lines) + "\n    }" if lines else "{}"


def _alike(layers: list[int], by_layer: Mapping[int, list[int]]) -> int:
    """How many leading layers follow each other without a gap and hold the same experts."""
    count = 1
    while count < len(layers) and layers[count] == layers[0] + count:
        if by_layer[layers[count]] != by_layer[layers[0]]:
            break
        count += 1
    return count


def _runs(numbers: list[int]) -> list[str]:
    """JSON entries for ascending numbers: runs of three or more as "first-last"."""
    entries: list[str] = []
    start = 0
    for end in range(1, len(numbers) + 1):
        if end < len(numbers) and numbers[end] == numbers[end - 1] + 1:
            continue
        run = numbers[start:end]
        entries += [f'"{run[0]}-{run[-1]}"'] if len(run) > 2 else [str(number) for number in run]
        start = end
    return entries
