"""A routing table without the devices that are not asked any more."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from wdmoe.arrays import Int32Array
from wdmoe.transport.routing import Routing


def without(routing: Routing, barred: Collection[str]) -> Routing:
    """The same table, in which other holders stand for the devices of these ids, or nobody.

    Returns:
        `routing` itself where it names none of them.
    """
    gone = np.array([device.device_id in barred for device in routing.devices] + [False])  # index -1: nobody
    if not gone.any():
        return routing
    tables = {layer: _closed_up(_table(routing, layer), gone) for layer in routing.device_of}
    return replace(
        routing,
        device_of={layer: table[0] for layer, table in tables.items()},
        standby_of={layer: table[1] for layer, table in tables.items()},
        further_of={layer: tuple(table[2:]) for layer, table in tables.items()},
        complete=frozenset(layer for layer in routing.complete if (tables[layer][0] >= 0).all()),
    )


def _table(routing: Routing, layer: int) -> Int32Array:
    """(copies, experts) who has each, as an index into the devices; -1: nobody more."""
    homes = routing.device_of[layer]
    standbys = routing.standby_of.get(layer, np.full_like(homes, -1))
    return np.stack([homes, standbys, *routing.further_of.get(layer, ())])


def _closed_up(table: Int32Array, gone: npt.NDArray[np.bool_]) -> Int32Array:
    """The same without devices that are gone: who comes after them moves up."""
    left = np.where(gone[table], np.int32(-1), table)
    order = np.argsort(left < 0, axis=0, kind="stable")
    moved: Int32Array = np.take_along_axis(left, order, axis=0)
    return moved
