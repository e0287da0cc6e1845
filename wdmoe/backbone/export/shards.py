"""How the station's weights are dealt out to files. The same weights always stand in the same files. No torch."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

from wdmoe.backbone.format.bundle import STATION_FOLDER

_SHARD_BYTES = 256 << 20  # of weights in one file
T = TypeVar("T")


def station_shards(sized: Iterable[tuple[T, int]]) -> dict[str, list[T]]:
    """Path in the bundle -> what is in it, in order.

    Args:
        sized: what stays at the station, and the bytes of each.
    """
    shards: list[list[T]] = []
    room = 0
    for item, size in sized:
        if size > room:
            shards.append([])
            room = _SHARD_BYTES
        shards[-1].append(item)
        room -= size
    names = ["station"] if len(shards) == 1 else [f"station-{number:05d}" for number in range(1, len(shards) + 1)]
    return {f"{STATION_FOLDER}/{name}.safetensors": items for name, items in zip(names, shards, strict=True)}
