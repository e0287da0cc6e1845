"""Decides which devices hold copies of experts that have their home elsewhere. No I/O.

Every expert has a standby, a second device that takes over at once. In a fleet with more devices than parts of layers
the others would hold nothing: they get further copies, so that it takes many losses at once to lose an expert.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence

from wdmoe.nodes.base_station.catalogue import Catalogue, Copies, Holder
from wdmoe.records import ExpertId

MOST_COPIES = 12  # of an expert, on devices that would else hold nothing: any eleven may be lost at once
GROUPS = 4  # over so many devices a third copy is spread: no two hold a layer alone
FILLED_AT_ONCE = 2  # devices that load further copies at the same time: answers and other devices need the air

Part = tuple[ExpertId, ...]  # a layer's experts with one home


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
    several. Who holds them already comes first, then who would hold nothing, then who holds least. A device that has
    several parts gives one of them to a newcomer; one that has no other does not, or each newcomer would move it.

    Args:
        hosts: live devices, the fastest first among equals.
        targets: expert -> home.
        held: device_id -> what the user's placement file puts there.
        before: what this returned last; little is moved.
    Returns:
        `held` with the standbys.
    """
    board = _Board(catalogue, hosts, targets, held)
    busy, ready = set(targets.values()), {host.device_id: host.ready for host in hosts}
    last = {expert: device_id for device_id, experts in before.items() for expert in experts}
    for home, part in _unpinned(targets, held, board.room):
        kept = last.get(part[0], home)
        idle = [d for d in board.room if d not in busy and not board.hold[d]]
        if kept in board.room and kept not in busy and before[kept] <= set(part):
            idle = []
        have = sorted(idle, key=lambda d: -len(ready[d].intersection(part)))
        others = sorted(board.room, key=lambda d: board.bytes_on(d))
        for expert in part:
            board.put(expert, (d for d in (*have, last.get(expert, home), *others) if d != home))
    return board.copies()


def choose_thirds(
    catalogue: Catalogue,
    hosts: Sequence[Holder],
    targets: Mapping[ExpertId, str],
    copies: Mapping[str, frozenset[ExpertId]],
    before: Mapping[str, frozenset[ExpertId]],
) -> Copies:
    """A third device for each expert, as far as memory goes: each part in groups over several devices.

    Args:
        copies: what `choose_standbys` returned.
        before: what this returned last; little is moved.
    """
    board = _Board(catalogue, hosts, targets, copies)
    last = {expert: device_id for device_id, experts in before.items() for expert in experts}
    for _, part in _parts(targets, board.room):
        others = sorted(board.room, key=lambda d: board.bytes_on(d))
        each = math.ceil(len(part) / GROUPS)
        for number, expert in enumerate(part):
            turn = number // each
            rotated = (*others[turn:], *others[:turn])
            board.put(expert, (last.get(expert, ""), *rotated))
    return _without(board.copies(), copies)


def fill_idle(
    catalogue: Catalogue,
    hosts: Sequence[Holder],
    targets: Mapping[ExpertId, str],
    copies: Mapping[str, frozenset[ExpertId]],
    before: Mapping[str, frozenset[ExpertId]],
) -> Copies:
    """Further copies for devices that would hold nothing.

    Each takes as much as the largest home; more, where it takes that to give every expert one further copy. What has
    fewest copies comes first, by whole parts of layers, so that one message moves the work of a part.

    Args:
        copies: what `choose_standbys` returned.
        before: what this returned last; little is moved.
    """
    homes = Counter(home for home in targets.values())
    idle = [host for host in hosts if host.device_id not in homes and not copies.get(host.device_id)]
    if not idle or not targets:
        return {}
    carried: Counter[str] = Counter()
    for expert, home in targets.items():
        carried[home] += catalogue.weight_bytes[expert]
    quota = max(max(carried.values()), math.ceil(sum(carried.values()) / len(idle)))
    count = Counter(targets.keys()) + Counter(expert for experts in copies.values() for expert in experts)
    parts = [part for _, part in _parts(targets, [host.device_id for host in hosts])]
    further = {host.device_id: set[ExpertId]() for host in idle}
    for host in idle:
        kept = [tuple(e for e in sorted(before.get(host.device_id, ())) if e in targets)]
        _fill(catalogue, host.report.memory_bytes, kept, count, further[host.device_id])
    for host in idle:
        _fill(catalogue, min(host.report.memory_bytes, quota), parts, count, further[host.device_id])
    return {device_id: frozenset(experts) for device_id, experts in further.items() if experts}


def to_fill(hosts: Sequence[Holder], further: Mapping[str, frozenset[ExpertId]], loading: int) -> frozenset[str]:
    """Devices that may be told of all their further copies now, while so many devices are still loading something."""
    waiting = (host.device_id for host in hosts if not further.get(host.device_id, frozenset()) <= host.placed)
    return frozenset(device_id for _, device_id in zip(range(FILLED_AT_ONCE - loading), waiting, strict=False))


class _Board:
    """What each device holds besides its homes, and the memory that is left."""

    def __init__(
        self,
        catalogue: Catalogue,
        hosts: Sequence[Holder],
        targets: Mapping[ExpertId, str],
        held: Mapping[str, frozenset[ExpertId]],
    ) -> None:
        self._size = catalogue.weight_bytes
        self._memory = {host.device_id: host.report.memory_bytes for host in hosts}
        self._targets = targets
        self.hold = {device_id: set(held.get(device_id, ())) for device_id in self._memory}
        self.room = dict(self._memory)
        for device_id, experts in self.hold.items():
            mine = experts.union(expert for expert, home in targets.items() if home == device_id)
            self.room[device_id] -= sum(self._size[expert] for expert in mine)

    def bytes_on(self, device_id: str) -> int:
        return self._memory[device_id] - self.room[device_id]

    def put(self, expert: ExpertId, choice: Iterable[str]) -> None:
        """On the first of these devices that has room and does not hold it yet."""
        for device_id in choice:
            if self.room.get(device_id, -1) >= self._size[expert] and not self._has(device_id, expert):
                self.hold[device_id].add(expert)
                self.room[device_id] -= self._size[expert]
                return

    def copies(self) -> Copies:
        return {device_id: frozenset(experts) for device_id, experts in self.hold.items() if experts}

    def _has(self, device_id: str, expert: ExpertId) -> bool:
        return expert in self.hold[device_id] or self._targets.get(expert) == device_id


def _fill(
    catalogue: Catalogue, room: int, parts: Sequence[Part], count: Counter[ExpertId], mine: set[ExpertId]
) -> None:
    """Add experts to `mine`, and count them, until the room is full or all have enough copies."""
    left = room - sum(catalogue.weight_bytes[expert] for expert in mine)
    for part in sorted(parts, key=lambda part: min((count[expert] for expert in part), default=0)):
        for expert in part:
            if expert in mine or count[expert] >= MOST_COPIES:
                continue
            if catalogue.weight_bytes[expert] > left:
                return
            left -= catalogue.weight_bytes[expert]
            mine.add(expert)
            count[expert] += 1


def _parts(targets: Mapping[ExpertId, str], live: Collection[str]) -> list[tuple[str, Part]]:
    """Home and experts of each layer's part on one device, by layer."""
    groups: dict[tuple[int, str], list[ExpertId]] = {}
    for expert in sorted(targets):
        if targets[expert] in live:
            groups.setdefault((expert.layer, targets[expert]), []).append(expert)
    return [(home, tuple(experts)) for (_, home), experts in groups.items()]


def _unpinned(
    targets: Mapping[ExpertId, str], held: Mapping[str, frozenset[ExpertId]], live: Collection[str]
) -> list[tuple[str, Part]]:
    """As `_parts`, without those that the user placed."""
    pinned = frozenset[ExpertId]().union(*held.values())
    return _parts({expert: home for expert, home in targets.items() if expert not in pinned}, live)


def _without(all_of: Copies, those: Mapping[str, frozenset[ExpertId]]) -> Copies:
    rest = {device_id: experts - those.get(device_id, frozenset()) for device_id, experts in all_of.items()}
    return {device_id: experts for device_id, experts in rest.items() if experts}
