"""Which device serves which expert right now: a frozen snapshot, made by the control plane, read by the data plane."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from wdmoe.arrays import Int32Array


@dataclass(frozen=True, slots=True)
class DeviceRoute:
    """A live, attached device."""

    device_id: str
    name: str
    route: bytes  # its data connection
    downlink_snr_hz: float = 0.0  # as in its report; 0: unknown
    uplink_snr_hz: float = 0.0


@dataclass(frozen=True, slots=True, eq=False)
class Routing:
    """`device_of[layer]` is (experts,) int32: an index into `devices`, or -1 where no device serves the expert.

    `standby_of[layer]` alike: a second device that could serve it at once, the best of those. `further_of[layer]` has
    rows alike: the third one, the fourth, ...
    """

    devices: tuple[DeviceRoute, ...] = ()
    device_of: Mapping[int, Int32Array] = field(default_factory=dict)
    complete: frozenset[int] = frozenset()  # layers with every expert served
    standby_of: Mapping[int, Int32Array] = field(default_factory=dict)
    was_served: bool = False  # every expert of the model was served at some time, so what is missing was lost
    further_of: Mapping[int, tuple[Int32Array, ...]] = field(default_factory=dict)
