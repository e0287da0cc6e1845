"""Decides which device holds which expert, and who serves what meanwhile. No I/O: the control plane acts on it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType

import numpy as np

from wdmoe.config import is_hertz
from wdmoe.nodes.base_station.catalogue import (
    Arrangement,
    Catalogue,
    Copies,
    Holder,
    Targets,
    Wishes,
    pinned_copies,
)
from wdmoe.nodes.base_station.copies import choose_standbys, choose_thirds, fill_idle, has_room_for_copies
from wdmoe.records import DeviceReport, ExpertId
from wdmoe.solver.placement.live import place_experts
from wdmoe.transport.routing import DeviceRoute, Routing

MESSAGE_S = 0.3e-3  # what one more device costs a layer, measured with tools/bench/decode
LEAST_SPAN = 2


def arrange(catalogue: Catalogue, hosts: Sequence[Holder], before: Arrangement, wishes: Wishes) -> Arrangement:
    """Homes and copies for all experts on the live devices; little is moved, and the copies of a lost home move up."""
    live = {host.device_id for host in hosts}
    homes = Targets()
    for held in (before.further, before.copies):
        homes |= {expert: device_id for device_id in sorted(held.keys() & live) for expert in held[device_id]}
    homes |= {expert: home for expert, home in before.targets.items() if home in live}
    # With a copy of each expert elsewhere, a layer may stand on one device: its loss takes nothing with it.
    alone = wishes.standbys and not wishes.choosy and has_room_for_copies(catalogue, hosts, 2)
    targets, unplaced = choose_targets(catalogue, hosts, homes, wishes.pinned, 1 if alone else LEAST_SPAN)
    placed, further = pinned_copies(hosts, wishes.pinned), Copies()
    copies = placed
    if wishes.standbys:
        per_layer = span(catalogue, hosts, 1)
        fast_first = sorted(hosts, key=lambda host: -layers_per_s(catalogue, host.report, per_layer))
        copies = choose_standbys(catalogue, fast_first, targets, placed, before.copies)
        if wishes.copies != 2:
            pinned = frozenset[ExpertId]().union(*placed.values())
            ours = {expert: home for expert, home in targets.items() if expert not in pinned}
            choose = choose_thirds if wishes.copies == 3 else fill_idle
            further = choose(catalogue, fast_first, ours, copies, before.further)
    return Arrangement(targets=targets, copies=copies, further=further, unplaced=unplaced)


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
    if not catalogue.experts or not hosts:
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
    for copies in (arrangement.copies, arrangement.further):
        for device_id, experts in copies.items():
            if device_id in hold:
                hold[device_id] |= experts
    return hold


def holdings(
    hosts: Sequence[Holder], arrangement: Arrangement, filled: Collection[str] = ()
) -> dict[str, tuple[ExpertId, ...]]:
    """device_id -> experts to hold now: what it shall, and what it still serves until the new home is ready.

    Args:
        filled: devices that may load their further copies now; the others keep what they have of them.
    """
    ready = {host.device_id: host.ready for host in hosts}
    hold = wanted(hosts, arrangement)
    for host in hosts:
        if host.device_id not in filled:
            hold[host.device_id] -= arrangement.further.get(host.device_id, frozenset()) - host.placed
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


def routing(
    catalogue: Catalogue,
    hosts: Sequence[Holder],
    targets: Mapping[ExpertId, str],
    copies: Mapping[str, frozenset[ExpertId]] = MappingProxyType({}),
) -> Routing:
    """Who serves what: an expert's home where it is ready, else any device that holds it; and who else could.

    Args:
        targets: expert -> home.
        copies: device_id -> experts that it is standby for; these come next.
    """
    attached = [host for host in hosts if host.route is not None]
    holders: dict[ExpertId, list[tuple[int, int]]] = {expert: [] for expert in catalogue.experts}
    for index, host in enumerate(attached):
        standby = copies.get(host.device_id, frozenset())
        for expert in host.ready:
            rank = 0 if targets.get(expert) == host.device_id else 1 if expert in standby else 2
            holders[expert].append((rank, index))
    most = max((len(each) for each in holders.values()), default=0)
    counts = {layer: count for layer, count in catalogue.experts_per_layer.items() if count}
    tables = {layer: np.full((max(most, 2), count), -1, np.int32) for layer, count in counts.items()}
    for expert, each in holders.items():
        for place, (_, index) in enumerate(sorted(each)):
            tables[expert.layer][place, expert.expert] = index
    return Routing(
        devices=tuple(_device_route(host) for host in attached),
        device_of={layer: table[0] for layer, table in tables.items()},
        complete=frozenset(layer for layer, table in tables.items() if (table[0] >= 0).all()),
        standby_of={layer: table[1] for layer, table in tables.items()},
        further_of={layer: tuple(table[2:]) for layer, table in tables.items()},
    )
