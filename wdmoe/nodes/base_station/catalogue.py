"""What there is to place, on whom, and what came of it: the records that placement decides on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from wdmoe.records import DeviceReport, ExpertId

Targets = dict[ExpertId, str]  # expert -> device_id that shall hold it
Copies = dict[str, frozenset[ExpertId]]  # device_id -> experts it holds besides those it is home to


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Catalogue:
    """The experts of a model, as placement sees them."""

    experts: tuple[ExpertId, ...]
    weight_bytes: Mapping[ExpertId, int]  # in a device's memory
    load: Mapping[ExpertId, float]  # FLOP per token
    experts_per_layer: Mapping[int, int]
    top_k: int  # experts that a token uses in a layer


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Holder:
    """A live device, as placement sees it."""

    device_id: str
    report: DeviceReport
    ready: frozenset[ExpertId] = field(default_factory=frozenset)
    placed: frozenset[ExpertId] = field(default_factory=frozenset)  # what it was told last
    route: bytes | None = None  # its data connection, None while not attached


@dataclass(frozen=True, slots=True, kw_only=True)
class Wishes:
    """What the user wants of the placement."""

    pinned: Mapping[str, frozenset[ExpertId]] = field(default_factory=dict)  # device name -> experts, as in the file
    # Devices that hold each expert, memory allowing: 1, 2, 3, or 0 for 2 and further copies on who would hold nothing.
    copies: int = 1
    choosy: bool = False  # which experts serve depends on their devices, so a layer must have several

    @property
    def standbys(self) -> bool:
        """Every expert shall stand on a second device."""
        return self.copies != 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrangement:
    """Who shall hold what."""

    targets: Targets = field(default_factory=dict)
    copies: Copies = field(default_factory=dict)  # that take over at once: standbys, and what the user placed
    further: Copies = field(default_factory=dict)  # that wait behind those, and are loaded last
    unplaced: tuple[ExpertId, ...] = ()  # fit nowhere


def pinned_copies(hosts: Sequence[Holder], pinned: Mapping[str, frozenset[ExpertId]]) -> Copies:
    """device_id of a live device -> experts that the user's placement file puts there."""
    by_name = {host.report.name: host.device_id for host in hosts}
    return {by_name[name]: experts for name, experts in pinned.items() if name in by_name}
