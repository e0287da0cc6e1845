"""Decides which device holds which expert, and who serves what meanwhile. No I/O: the control plane acts on it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from wdmoe.config import is_hertz
from wdmoe.records import DeviceReport, ExpertId
from wdmoe.solver.placement.live import place_experts
from wdmoe.transport.routing import DeviceRoute, Routing


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
    route: bytes | None = None  # its data connection, None while not attached


MESSAGE_S = 0.3e-3  # what one more device costs a layer, measured with tools/bench/decode
LEAST_SPAN = 2

Targets = dict[ExpertId, str]  # expert -> device_id that shall hold it
Copies = dict[str, frozenset[ExpertId]]  # device_id -> experts it holds besides those it is home to


@dataclass(frozen=True, slots=True, kw_only=True)
class Wishes:
    """What the user wants of the placement."""

    pinned: Mapping[str, frozenset[ExpertId]] = field(default_factory=dict)  # device name -> experts, as in the file
    copies: int = 1  # devices that hold each expert, memory allowing: 1 or 2
    choosy: bool = False  # which experts serve depends on their devices, so a layer must have several


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrangement:
    """Who shall hold what."""

    targets: Targets = field(default_factory=dict)
    copies: Copies = field(default_factory=dict)
    unplaced: tuple[ExpertId, ...] = ()  # fit nowhere


def arrange(catalogue: Catalogue, hosts: Sequence[Holder], before: Arrangement, wishes: Wishes) -> Arrangement:
    """Homes and copies for all experts on the live devices; little is moved, and the copies of a lost home move up."""
    live = {host.device_id for host in hosts}
    homes = {expert: device_id for device_id, experts in before.copies.items() for expert in experts}
    homes |= {expert: home for expert, home in before.targets.items() if home in live}
    # With a copy of each expert elsewhere, a layer may stand on one device: its loss takes nothing with it.
    alone = wishes.copies > 1 and not wishes.choosy and has_room_for_copies(catalogue, hosts, wishes.copies)
    targets, unplaced = choose_targets(catalogue, hosts, homes, wishes.pinned, 1 if alone else LEAST_SPAN)
    copies = pinned_copies(hosts, wishes.pinned)
    if wishes.copies > 1:
        copies = choose_standbys(catalogue, hosts, targets, copies, before.copies)
    return Arrangement(targets=targets, copies=copies, unplaced=unplaced)


def choose_targets(
    catalogue: Catalogue,
    hosts: Sequence[Holder],
    before: Mapping[ExpertId, str],
    pinned: Mapping[str, frozenset[ExpertId]],
    least_span: int = LEAST_SPAN,
) -> tuple[Targets, tuple[ExpertId, ...]]:
    """Give every expert a home.

    Args:
        catalogue: what there is to place.
        hosts: live devices.
        before: the targets until now; little is moved.
        pinned: device name -> experts that the user's placement file puts there, while that device is live. An expert
            on several live devices has one home among them; the other copies wait until that is lost.
        least_span: as for `span`.
    Returns:
        The targets, and the experts that fit nowhere.
    """
    if not hosts:
        return {}, catalogue.experts
    copies = pinned_copies(hosts, pinned)
    fixed = _pinned_homes(copies, before)
    free = tuple(e for e in catalogue.experts if e not in fixed)
    index = {host.device_id: i for i, host in enumerate(hosts)}
    room = [host.report.memory_bytes for host in hosts]
    for device_id, experts in copies.items():
        room[index[device_id]] -= sum(catalogue.weight_bytes[expert] for expert in experts)
    per_layer = span(catalogue, hosts, least_span)
    parcels = _parcels(catalogue, free, per_layer)
    homes = place_experts(
        weight_bytes=np.array([sum(catalogue.weight_bytes[e] for e in p) for p in parcels], np.int64),
        load=np.array([sum(catalogue.load[e] for e in p) for p in parcels], np.float64),
        memory_bytes=np.maximum(np.array(room, np.int64), 0),
        speed=np.array([layers_per_s(catalogue, host.report, per_layer) for host in hosts], np.float64),
        layer=np.array([p[0].layer for p in parcels], np.int32),
        sticky=np.array([_home(p, before, index) for p in parcels], np.int32),
    )
    targets = dict(fixed) | {e: hosts[h].device_id for p, h in zip(parcels, homes, strict=True) for e in p if h >= 0}
    return targets, tuple(e for p, h in zip(parcels, homes, strict=True) for e in p if h < 0)


def span(catalogue: Catalogue, hosts: Sequence[Holder], least: int = LEAST_SPAN) -> int:
    """Over how many devices each layer is spread.

    Every further device computes in parallel, but costs a message each way, with the token's hidden state in it. So a
    layer is cut as often as the arithmetic of a token outweighs a message; and into `least` parts at least, so that no
    device's loss takes a whole layer with it, and that a policy which looks at devices has a choice among some.
    """
    if not catalogue.experts:
        return 1
    speed = sum(_speed(host.report) for host in hosts) / len(hosts)
    worth = math.ceil(catalogue.top_k * _mean_load(catalogue) / speed / MESSAGE_S)
    return min(max(worth, least), len(hosts))


def layers_per_s(catalogue: Catalogue, report: DeviceReport, per_layer: int) -> float:
    """How fast a device answers its part of a layer for one token, where the layer has so many parts.

    A message takes the same time on every device; only the arithmetic goes with the speed that a device measured. So
    experts that are small beside a message are dealt out evenly, also to a device that was busy when it measured.
    """
    return 1 / (MESSAGE_S + catalogue.top_k / per_layer * _mean_load(catalogue) / _speed(report))


def _mean_load(catalogue: Catalogue) -> float:
    """FLOP of one token in one expert."""
    return sum(catalogue.load.values()) / max(len(catalogue.load), 1)


def has_room_for_copies(catalogue: Catalogue, hosts: Sequence[Holder], copies: int) -> bool:
    """Whether every expert fits on so many devices, as far as the sum of their memory tells."""
    largest = max(catalogue.weight_bytes.values(), default=0)
    room = sum(max(host.report.memory_bytes - largest, 0) for host in hosts)
    return len(hosts) >= copies and room >= copies * sum(catalogue.weight_bytes.values())


def choose_standbys(
    catalogue: Catalogue,
    hosts: Sequence[Holder],
    targets: Mapping[ExpertId, str],
    held: Mapping[str, frozenset[ExpertId]],
    before: Mapping[str, frozenset[ExpertId]],
) -> Copies:
    """A second device for each expert that the user's placement file does not place, as far as memory goes.

    Experts of a layer with one home go to one standby together, so that its loss costs one message elsewhere, not
    several. A device that would hold nothing takes the first of these that there is room for: nobody who joined idles.

    Args:
        targets: expert -> home.
        held: device_id -> what the user's placement file puts there.
        before: what this returned last; little is moved.
    Returns:
        `held` with the standbys.
    """
    order = [host.device_id for host in hosts]
    hold = {device_id: set(held.get(device_id, ())) for device_id in order}
    room = {host.device_id: host.report.memory_bytes for host in hosts}
    for device_id in order:
        mine = {e for e, home in targets.items() if home == device_id} | hold[device_id]
        room[device_id] -= sum(catalogue.weight_bytes[e] for e in mine)
    last = {expert: device_id for device_id, experts in before.items() for expert in experts}
    busy = set(targets.values())
    for home, experts in _unpinned(targets, held, order):
        idle = [d for d in order if d not in busy and not hold[d]]
        others = _rotated([d for d in order if d != home], experts[0].layer)
        for expert in experts:
            size = catalogue.weight_bytes[expert]
            choice = (d for d in (*idle, last.get(expert, home), *others) if d != home and room.get(d, -1) >= size)
            if standby := next(choice, None):
                hold[standby].add(expert)
                room[standby] -= size
    return {device_id: frozenset(experts) for device_id, experts in hold.items() if experts}


def _unpinned(
    targets: Mapping[ExpertId, str], held: Mapping[str, frozenset[ExpertId]], live: Sequence[str]
) -> list[tuple[str, list[ExpertId]]]:
    """Home and experts of each layer's part on one device, without those that the user placed, by layer."""
    pinned = frozenset[ExpertId]().union(*held.values())
    groups: dict[tuple[int, str], list[ExpertId]] = {}
    for expert in sorted(targets):
        if expert not in pinned and targets[expert] in live:
            groups.setdefault((expert.layer, targets[expert]), []).append(expert)
    return [(home, experts) for (_, home), experts in groups.items()]


def _rotated(devices: list[str], by: int) -> list[str]:
    first = by % max(len(devices), 1)
    return devices[first:] + devices[:first]


def _parcels(catalogue: Catalogue, experts: Sequence[ExpertId], per_layer: int) -> tuple[tuple[ExpertId, ...], ...]:
    """Neighbouring experts of a layer, tied together so that the layer falls into about `per_layer` parcels."""
    parcels: dict[tuple[int, int], list[ExpertId]] = {}
    for expert in experts:
        piece = expert.expert * per_layer // catalogue.experts_per_layer[expert.layer]
        parcels.setdefault((expert.layer, piece), []).append(expert)
    return tuple(tuple(parcel) for parcel in parcels.values())


def _home(parcel: Sequence[ExpertId], before: Mapping[ExpertId, str], index: Mapping[str, int]) -> int:
    """The device that has most of a parcel already, -1 where none has any of it."""
    homes = Counter(index[home] for e in parcel if (home := before.get(e, "")) in index)
    return homes.most_common(1)[0][0] if homes else -1


def _speed(report: DeviceReport) -> float:
    """What a device says of itself, as far as it can be true; else the slowest."""
    return report.flops if 1.0 <= report.flops < 1e18 else 1.0


def pinned_copies(hosts: Sequence[Holder], pinned: Mapping[str, frozenset[ExpertId]]) -> dict[str, frozenset[ExpertId]]:
    """device_id of a live device -> experts that the user's placement file puts there."""
    by_name = {host.report.name: host.device_id for host in hosts}
    return {by_name[name]: experts for name, experts in pinned.items() if name in by_name}


def _pinned_homes(copies: Mapping[str, frozenset[ExpertId]], before: Mapping[ExpertId, str]) -> Targets:
    """One home for each pinned expert: the device that is home to fewest of the layer so far; of such, where it was.

    A home moves between copies for nothing: until the new one is ready, the old one serves.
    """
    places: dict[ExpertId, list[str]] = {}
    for device_id, experts in copies.items():
        for expert in experts:
            places.setdefault(expert, []).append(device_id)
    homes: Targets = {}
    count: Counter[tuple[int, str]] = Counter()
    for expert in sorted(places, key=lambda e: (len(places[e]), e)):  # those that have a choice come last
        kept = before.get(expert, "")
        home = min(places[expert], key=lambda d: (count[expert.layer, d], d != kept))
        homes[expert] = home
        count[expert.layer, home] += 1
    return homes


def wanted(hosts: Sequence[Holder], arrangement: Arrangement) -> dict[str, set[ExpertId]]:
    """device_id -> experts it shall hold in the end: those it is home to, and its copies of others."""
    hold = {host.device_id: set[ExpertId]() for host in hosts}
    for expert, device_id in arrangement.targets.items():
        if device_id in hold:
            hold[device_id].add(expert)
    for device_id, experts in arrangement.copies.items():
        if device_id in hold:
            hold[device_id] |= experts
    return hold


def holdings(hosts: Sequence[Holder], arrangement: Arrangement) -> dict[str, tuple[ExpertId, ...]]:
    """device_id -> experts to hold now: what it shall, and what it still serves until the new home is ready."""
    ready = {host.device_id: host.ready for host in hosts}
    hold = wanted(hosts, arrangement)
    for host in hosts:
        for expert in host.ready:
            target = arrangement.targets.get(expert)
            if target is not None and expert not in ready.get(target, frozenset()):
                hold[host.device_id].add(expert)
    return {device_id: tuple(sorted(experts)) for device_id, experts in hold.items()}


def knows_link(report: DeviceReport) -> bool:
    """Whether hertz can be given out by what it says of its link. A peer wrote it."""
    return is_hertz(report.downlink_snr_hz) and is_hertz(report.uplink_snr_hz)


def _device_route(host: Holder) -> DeviceRoute:
    report = host.report
    return DeviceRoute(host.device_id, report.name, host.route or b"", report.downlink_snr_hz, report.uplink_snr_hz)


def routing(catalogue: Catalogue, hosts: Sequence[Holder], targets: Mapping[ExpertId, str]) -> Routing:
    """Who serves what: an expert's home where it is ready, else any device that holds it; and who else could."""
    attached = [host for host in hosts if host.route is not None]
    devices = tuple(_device_route(h) for h in attached)
    counts = {layer: count for layer, count in catalogue.experts_per_layer.items() if count}
    device_of = {layer: np.full(count, -1, np.int32) for layer, count in counts.items()}
    standby_of = {layer: np.full(count, -1, np.int32) for layer, count in counts.items()}
    for index, host in enumerate(attached):
        for layer, expert in host.ready:
            first = device_of[layer][expert]
            if targets.get(ExpertId(layer, expert)) == host.device_id or first < 0:
                device_of[layer][expert], standby_of[layer][expert] = index, first
            else:
                standby_of[layer][expert] = index
    complete = frozenset(layer for layer, row in device_of.items() if (row >= 0).all())
    return Routing(devices, device_of, complete, standby_of)
