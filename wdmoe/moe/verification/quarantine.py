"""A routing table without the devices that are not asked any more."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

import numpy as np

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
    device_of: dict[int, Int32Array] = {}
    standby_of: dict[int, Int32Array] = {}
    nobody = np.int32(-1)
    for layer, homes in routing.device_of.items():
        standbys = routing.standby_of.get(layer, np.full(len(homes), nobody))
        left = np.where(gone[standbys], nobody, standbys)
        device_of[layer] = np.where(gone[homes], left, homes)
        standby_of[layer] = np.where(gone[homes], nobody, left)
    complete = frozenset(layer for layer in routing.complete if (device_of[layer] >= 0).all())
    return replace(routing, device_of=device_of, standby_of=standby_of, complete=complete)
