"""Where copies stand: nobody who joined idles, many may be lost at once, and little is moved or loaded at a time."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from dataclasses import replace

import pytest

from tests.nodes.test_placement import SMALL_FLOP, catalogue, host
from wdmoe.nodes.base_station.catalogue import Arrangement, Catalogue, Holder, Wishes
from wdmoe.nodes.base_station.copies import FILLED_AT_ONCE, MOST_COPIES, to_fill
from wdmoe.nodes.base_station.placement import arrange, holdings, routing, wanted
from wdmoe.records import ExpertId

AUTO = Wishes(copies=0)


def large(layers: int = 4, experts: int = 64) -> Catalogue:
    ids = tuple(ExpertId(layer, expert) for layer in range(layers) for expert in range(experts))
    return replace(
        catalogue(),
        experts=ids,
        weight_bytes=dict.fromkeys(ids, 1000),
        load=dict.fromkeys(ids, SMALL_FLOP / 30),
        experts_per_layer=dict.fromkeys(range(layers), experts),
    )


def fleet(size: int, **more: object) -> list[Holder]:
    return [host(f"d{number}", **more) for number in range(size)]  # type: ignore[arg-type]


def holders(hosts: list[Holder], arrangement: Arrangement) -> dict[ExpertId, set[str]]:
    found: dict[ExpertId, set[str]] = {}
    for device_id, experts in wanted(hosts, arrangement).items():
        for expert in experts:
            found.setdefault(expert, set()).add(device_id)
    return found


def ready(hosts: list[Holder], arrangement: Arrangement) -> list[Holder]:
    """Each device has loaded what it shall hold."""
    hold = {device_id: frozenset(experts) for device_id, experts in wanted(hosts, arrangement).items()}
    return [replace(h, ready=hold[h.device_id], placed=hold[h.device_id], route=h.device_id.encode()) for h in hosts]


@pytest.mark.parametrize(("devices", "experts", "copies"), [(48, 64, 12), (32, 128, 8), (16, 64, 4)])
def test_nobody_idles_in_a_large_fleet(devices: int, experts: int, copies: int) -> None:
    """48 devices and 4 layers of 64 experts: 40 held nothing."""
    model, hosts = large(experts=experts), fleet(devices)
    arrangement = arrange(model, hosts, Arrangement(), AUTO)
    assert all(wanted(hosts, arrangement).values())
    assert {len(who) for who in holders(hosts, arrangement).values()} == {copies}
    homes = Counter(arrangement.targets.values())
    assert len(homes) == 4  # a message a device and layer is what counts: homes stay few
    assert max(len(each) for each in wanted(hosts, arrangement).values()) <= max(homes.values())


@pytest.mark.parametrize("seed", range(20))
def test_any_eight_of_48_may_be_lost_at_once(seed: int) -> None:
    model, hosts = large(), fleet(48)
    arrangement = arrange(model, hosts, Arrangement(), AUTO)
    who = holders(hosts, arrangement)
    # Any eight: no expert stands on eight devices or fewer. The worst eight of one layer, and some at random:
    assert min(map(len, who.values())) > 8
    chance = random.Random(seed)
    lost = set(chance.sample(sorted(h.device_id for h in hosts), 4)) | set(sorted(who[ExpertId(seed % 4, 0)])[:4])
    left = [h for h in ready(hosts, arrangement) if h.device_id not in lost]
    table = routing(model, left, arrangement.targets, arrangement.copies)
    assert len(table.complete) == 4
    after = arrange(model, left, arrangement, AUTO)
    kept = {h.device_id: h.ready for h in left}
    assert all(expert in kept[home] for expert, home in after.targets.items())  # nothing is fetched to serve again


@pytest.mark.parametrize("copies", [0, 1, 2, 3])
def test_the_last_device_may_leave(copies: int) -> None:
    wishes, hosts = Wishes(copies=copies), fleet(3)
    before = arrange(large(), hosts, Arrangement(), wishes)
    nothing = arrange(large(), [], before, wishes)
    assert nothing == Arrangement(unplaced=large().experts)
    assert len(arrange(large(), hosts[:1], nothing, wishes).targets) == 256


@pytest.mark.parametrize("copies", [0, 3])
def test_what_the_user_placed_gets_no_further_copies(copies: int) -> None:
    """Where it stands is the user's business."""
    model, hosts = large(), fleet(12)
    pinned = {"d0": frozenset(e for e in model.experts if e.layer == 0), "gone": frozenset(model.experts)}
    who = holders(hosts, arrange(model, hosts, Arrangement(), Wishes(copies=copies, pinned=pinned)))
    assert {len(each) for expert, each in who.items() if expert.layer == 0} == {1}
    assert min(len(each) for expert, each in who.items() if expert.layer) >= 3


def test_fill_makes_no_one_carry_what_it_has_no_memory_for() -> None:
    model, hosts = large(), [*fleet(8), *fleet(0), host("small", memory=5_500)]
    arrangement = arrange(model, hosts, Arrangement(), AUTO)
    assert len(wanted(hosts, arrangement)["id-small"]) == 5


def test_one_that_comes_back_with_less_memory_keeps_what_fits() -> None:
    model, hosts = large(), fleet(12)
    before = arrange(model, hosts, Arrangement(), AUTO)
    name = min(before.further)
    hosts = [host(h.report.name, memory=9_500) if h.device_id == name else h for h in hosts]
    after = arrange(model, hosts, before, AUTO)
    assert len(after.further[name]) == 9
    assert after.further[name] <= before.further[name]


def test_one_that_idles_holds_one_copy_of_all() -> None:
    model, hosts = large(), fleet(9)
    arrangement = arrange(model, hosts, Arrangement(), AUTO)
    assert {len(who) for who in holders(hosts, arrangement).values()} == {3}


def test_a_newcomer_moves_nothing_that_others_hold() -> None:
    model, hosts = large(), fleet(30)
    before = arrange(model, hosts, Arrangement(), AUTO)
    after = arrange(model, [*hosts, host("new")], before, AUTO)
    assert after.targets == before.targets
    assert after.copies == before.copies
    assert {d: e for d, e in after.further.items() if d != "id-new"} == before.further
    assert after.further["id-new"]


@pytest.mark.parametrize("order", [range(20), reversed(range(20))])
def test_devices_that_join_one_by_one_cause_few_moves(order) -> None:
    """Each newcomer that held nothing took the standby part of the one before it."""
    model, hosts, arrangement, moved = large(), list[Holder](), Arrangement(), 0
    every = fleet(20)
    for number in order:
        hosts.append(every[number])
        held = wanted(hosts, arrangement)
        arrangement = arrange(model, hosts, arrangement, AUTO)
        moved += sum(len(now - held[device_id]) for device_id, now in wanted(hosts, arrangement).items())
    final = sum(map(len, wanted(hosts, arrangement).values()))
    assert moved <= 2.5 * final


def test_a_third_copy_is_spread_where_it_is_asked_for() -> None:
    model, hosts = large(), fleet(8)
    arrangement = arrange(model, hosts, Arrangement(), Wishes(copies=3))
    who = holders(hosts, arrangement)
    assert {len(each) for each in who.values()} == {3}
    for layer in range(4):
        its = [who[ExpertId(layer, e)] for e in range(64)]
        for pair in itertools.combinations([h.device_id for h in hosts], 2):
            assert any(each - set(pair) for each in its)  # no two hold a layer alone
    assert arrange(model, hosts, arrangement, Wishes(copies=3)) == arrangement


@pytest.mark.parametrize(("copies", "most"), [(1, 1), (2, 2), (0, MOST_COPIES)])
def test_as_many_copies_as_wished(copies: int, most: int) -> None:
    hosts = fleet(60)
    who = holders(hosts, arrange(large(), hosts, Arrangement(), Wishes(copies=copies)))
    assert {len(each) for each in who.values()} == {most}


def test_further_copies_are_loaded_last_and_by_few_at_a_time() -> None:
    model, hosts = large(), fleet(12)
    arrangement = arrange(model, hosts, Arrangement(), AUTO)
    assert len(arrangement.further) == 4
    assert to_fill(hosts, arrangement.further, loading=FILLED_AT_ONCE) == frozenset()
    first = to_fill(hosts, arrangement.further, loading=0)
    assert len(first) == FILLED_AT_ONCE
    now = holdings(hosts, arrangement, first)
    assert {d for d in arrangement.further if now[d]} == first
    hosts = [replace(h, placed=frozenset(now[h.device_id])) for h in hosts]
    assert to_fill(hosts, arrangement.further, loading=1).isdisjoint(first)
    assert holdings(hosts, arrangement, ())[min(first)] == now[min(first)]  # what was told is not taken back


def test_a_table_names_every_holder_in_order() -> None:
    expert = ExpertId(0, 0)
    hosts = [host(name, ready=frozenset({expert}), route=name.encode()) for name in "abcd"]
    table = routing(catalogue(), hosts, {expert: "id-c"}, {"id-b": frozenset({expert})})
    rows = (table.device_of[0], table.standby_of[0], *table.further_of[0])
    assert [table.devices[row[0]].name for row in rows] == ["c", "b", "a", "d"]
