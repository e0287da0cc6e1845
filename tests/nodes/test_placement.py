"""Where experts live: spread as far as it pays, moved without a hole, pinned where the user says so."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from wdmoe.nodes.base_station.catalogue import Arrangement, Catalogue, Holder, Wishes, pinned_copies
from wdmoe.nodes.base_station.copies import choose_standbys, has_room_for_copies
from wdmoe.nodes.base_station.placement import arrange, choose_targets, holdings, routing, span, wanted
from wdmoe.records import DeviceReport, ExpertId

LAYERS, EXPERTS = 6, 8
SMALL_FLOP, LARGE_FLOP = 0.3e6, 350e6


def catalogue(flop: float = SMALL_FLOP) -> Catalogue:
    experts = tuple(ExpertId(layer, expert) for layer in range(LAYERS) for expert in range(EXPERTS))
    return Catalogue(
        experts=experts,
        weight_bytes=dict.fromkeys(experts, 1000),
        load=dict.fromkeys(experts, flop),
        experts_per_layer=dict.fromkeys(range(LAYERS), EXPERTS),
        top_k=4,
    )


def host(name: str, memory: int = 10**9, flops: float = 30e9, **more: object) -> Holder:
    report = DeviceReport(
        name=name, hardware="", system="", provider="cpu", threads=1, memory_bytes=memory, flops=flops
    )
    return Holder(device_id=f"id-{name}", report=report, **more)  # type: ignore[arg-type]


def devices_of_layer(targets: dict[ExpertId, str], layer: int) -> set[str]:
    return {home for expert, home in targets.items() if expert.layer == layer}


@pytest.mark.parametrize(("flop", "want"), [(SMALL_FLOP, 2), (LARGE_FLOP, 4)])
def test_a_layer_is_spread_as_far_as_it_pays(flop: float, want: int) -> None:
    hosts = [host(name) for name in "abcd"]
    assert span(catalogue(flop), hosts) == want
    targets, unplaced = choose_targets(catalogue(flop), hosts, {}, {})
    assert not unplaced
    assert set(targets) == set(catalogue().experts)
    assert {len(devices_of_layer(targets, layer)) for layer in range(LAYERS)} == {want}
    held = [sum(home == h.device_id for home in targets.values()) for h in hosts]
    assert max(held) - min(held) <= EXPERTS // want


@pytest.mark.parametrize("flops", [0.0, float("nan"), float("inf"), -1.0])
def test_a_device_that_lies_about_its_speed_breaks_nothing(flops: float) -> None:
    targets, unplaced = choose_targets(catalogue(), [host("a"), host("b", flops=flops)], {}, {})
    assert len(targets) == LAYERS * EXPERTS
    assert not unplaced


@pytest.mark.parametrize("measured", [30e9, 3e9, 1e9])
def test_small_experts_are_dealt_out_evenly_whatever_a_busy_device_measured(measured: float) -> None:
    """A device that measured itself on a busy machine was home to nothing, though a message takes it no longer."""
    hosts = [host("a"), host("b"), host("c", flops=measured)]
    small = replace(catalogue(flop=9e3), experts=tuple(e for e in catalogue().experts if e.layer < 3))
    targets, _ = choose_targets(small, hosts, {}, {})
    assert {sum(home == each.device_id for home in targets.values()) for each in hosts} == {EXPERTS}


def test_large_experts_go_to_fast_devices() -> None:
    targets, _ = choose_targets(catalogue(LARGE_FLOP), [host("a"), host("b"), host("c", flops=3e9)], {}, {})
    held = [sum(home == f"id-{name}" for home in targets.values()) for name in "abc"]
    assert held[2] < held[0] / 5


def test_without_devices_nothing_is_placed() -> None:
    assert choose_targets(catalogue(), [], {}, {}) == ({}, catalogue().experts)


def test_what_fits_nowhere_is_named() -> None:
    targets, unplaced = choose_targets(catalogue(), [host("a", memory=8000), host("b", memory=8000)], {}, {})
    assert len(targets) + len(unplaced) == LAYERS * EXPERTS
    assert len(targets) == 16


def test_the_users_placement_comes_first_while_its_device_lives() -> None:
    pinned = {"b": frozenset(ExpertId(0, e) for e in range(EXPERTS)), "gone": frozenset({ExpertId(1, 0)})}
    targets, unplaced = choose_targets(catalogue(), [host("a"), host("b")], {}, pinned)
    assert devices_of_layer(targets, 0) == {"id-b"}
    assert ExpertId(1, 0) in targets
    assert not unplaced


def test_a_copy_takes_over_at_once_and_the_homes_are_shared_out() -> None:
    layer = frozenset(ExpertId(0, e) for e in range(EXPERTS))
    pinned = {"a": layer, "b": layer, "gone": layer}
    hosts = [host(name, ready=layer, route=name.encode()) for name in "ab"]
    targets, unplaced = choose_targets(catalogue(), hosts, {}, pinned)
    assert not unplaced
    homes = [targets[expert] for expert in sorted(layer)]
    assert homes.count("id-a") == homes.count("id-b") == EXPERTS // 2
    held = holdings(hosts, Arrangement(targets=targets, copies=pinned_copies(hosts, pinned)))
    assert layer <= set(held["id-a"]) & set(held["id-b"])
    assert choose_targets(catalogue(), hosts, targets, pinned)[0] == targets  # nothing moves without need
    alone, _ = choose_targets(catalogue(), hosts[:1], {}, pinned)  # the other one comes later, and gets its part
    homes = [choose_targets(catalogue(), hosts, alone, pinned)[0][expert] for expert in sorted(layer)]
    assert homes.count("id-a") == homes.count("id-b") == EXPERTS // 2
    left = routing(catalogue(), hosts[1:], targets)  # before new homes are chosen
    assert 0 in left.complete
    assert {targets[e] for e in choose_targets(catalogue(), hosts[1:], targets, pinned)[0]} <= {"id-a", "id-b"}


def test_copies_take_room() -> None:
    every = frozenset(catalogue().experts)
    pinned = {"a": every, "b": frozenset(sorted(every)[:8])}
    hosts = [host("a", memory=48_000), host("b", memory=8_000), host("c")]
    targets, unplaced = choose_targets(catalogue(), hosts, {}, pinned)
    assert not unplaced
    assert set(targets.values()) <= {"id-a", "id-b"}


def test_a_newcomer_takes_its_share_and_nothing_else_moves() -> None:
    before, _ = choose_targets(catalogue(), [host("a"), host("b")], {}, {})
    after, _ = choose_targets(catalogue(), [host("a"), host("b"), host("c")], before, {})
    moved = {expert for expert in before if before[expert] != after[expert]}
    assert {after[expert] for expert in moved} == {"id-c"}
    assert EXPERTS <= len(moved) <= LAYERS * EXPERTS // 3  # parcels of four, and none moves for little


def test_the_old_home_serves_until_the_new_one_is_ready() -> None:
    expert = ExpertId(0, 0)
    targets = {expert: "id-b"}
    old, new = host("a", ready=frozenset({expert}), route=b"a"), host("b", route=b"b")
    assert holdings([old, new], Arrangement(targets=targets)) == {"id-a": (expert,), "id-b": (expert,)}
    table = routing(catalogue(), [old, new], targets)
    assert table.devices[table.device_of[0][0]].device_id == "id-a"
    new = host("b", ready=frozenset({expert}), route=b"b")
    assert holdings([old, new], Arrangement(targets=targets)) == {"id-a": (), "id-b": (expert,)}
    table = routing(catalogue(), [old, new], targets)
    assert table.devices[table.device_of[0][0]].device_id == "id-b"


def test_only_attached_devices_are_routed_to() -> None:
    everything = frozenset(catalogue().experts)
    table = routing(catalogue(), [host("a", ready=everything)], {})
    assert table.devices == ()
    assert not table.complete
    table = routing(catalogue(), [host("a", ready=everything, route=b"a")], {})
    assert table.complete == frozenset(range(LAYERS))
    assert all(np.all(row == 0) for row in table.device_of.values())


def test_every_expert_has_a_standby_elsewhere_and_a_layer_keeps_together() -> None:
    hosts = [host(name) for name in "abcd"]
    targets, _ = choose_targets(catalogue(), hosts, {}, {}, least_span=1)
    assert {len(devices_of_layer(targets, layer)) for layer in range(LAYERS)} == {1}
    copies = choose_standbys(catalogue(), hosts, targets, {}, {})
    standby_of = {expert: device for device, experts in copies.items() for expert in experts}
    assert set(standby_of) == set(targets)
    assert all(standby_of[expert] != targets[expert] for expert in targets)
    assert {len({standby_of[e] for e in targets if e.layer == layer}) for layer in range(LAYERS)} == {1}
    assert choose_standbys(catalogue(), hosts, targets, {}, copies) == copies


def test_a_newcomer_takes_one_part_and_no_more() -> None:
    hosts = [host(name) for name in "abcd"]
    targets, _ = choose_targets(catalogue(), hosts, {}, {}, least_span=1)
    copies = choose_standbys(catalogue(), hosts, targets, {}, {})
    more = choose_standbys(catalogue(), [*hosts, host("e")], targets, {}, copies)
    assert len(more.pop("id-e")) == EXPERTS
    assert all(experts <= copies[device] for device, experts in more.items())


@pytest.mark.parametrize("flops", [(18e9, 11.2e9, 16.6e9), (30e9, 1e9, 30e9)])
@pytest.mark.parametrize("joining", [("abc",), ("ac", "abc"), ("a", "ac", "abc")])
def test_nobody_who_joined_idles(joining: tuple[str, ...], flops: tuple[float, ...]) -> None:
    """Two devices once held both copies of all experts of a small model, and the third, a slower one, none."""
    small = replace(catalogue(), experts=tuple(e for e in catalogue().experts if e.layer < 3))
    hosts = {name: host(name, flops=speed) for name, speed in zip("abc", flops, strict=True)}
    arrangement = Arrangement()
    for names in joining:
        arrangement = arrange(small, [hosts[name] for name in names], arrangement, Wishes(copies=2))
    assert all(wanted(list(hosts.values()), arrangement).values())


def test_the_copies_of_a_lost_home_move_up_and_nothing_else_moves() -> None:
    hosts, wishes = [host(name) for name in "abcd"], Wishes(copies=2)
    before = arrange(catalogue(), hosts, Arrangement(), wishes)
    after = arrange(catalogue(), hosts[1:], before, wishes)
    standby_of = {expert: device for device, experts in before.copies.items() for expert in experts}
    lost = [expert for expert, home in before.targets.items() if home == "id-a"]
    assert lost
    moved = [expert for expert in lost if after.targets[expert] != standby_of[expert]]
    assert len(moved) <= len(lost) // 2  # only to balance the load
    assert all(after.targets[e] == home for e, home in before.targets.items() if home != "id-a")


@pytest.mark.parametrize("wishes", [Wishes(copies=2, choosy=True), Wishes(copies=1)])
def test_a_layer_has_several_devices_where_a_policy_chooses_or_nothing_is_copied(wishes: Wishes) -> None:
    arrangement = arrange(catalogue(), [host(name) for name in "abcd"], Arrangement(), wishes)
    assert {len(devices_of_layer(arrangement.targets, layer)) for layer in range(LAYERS)} == {2}


def test_standbys_take_only_the_room_that_is_left() -> None:
    hosts = [host("a", memory=48_000), host("b", memory=8_000)]
    assert not has_room_for_copies(catalogue(), hosts, 2)
    assert has_room_for_copies(catalogue(), [host("a"), host("b")], 2)
    assert not has_room_for_copies(catalogue(), [host("a")], 2)
    targets = dict.fromkeys(catalogue().experts, "id-a")
    copies = choose_standbys(catalogue(), hosts, targets, {}, {})
    assert {device: len(experts) for device, experts in copies.items()} == {"id-b": 8}


def test_what_the_user_placed_gets_no_standby() -> None:
    expert = ExpertId(0, 0)
    hosts, held = [host("a"), host("b")], {"id-a": frozenset({expert})}
    copies = choose_standbys(catalogue(), hosts, {expert: "id-a", ExpertId(0, 1): "id-a"}, held, {})
    assert copies == {"id-a": frozenset({expert}), "id-b": frozenset({ExpertId(0, 1)})}


def test_a_table_names_home_and_standby_whatever_the_order() -> None:
    expert = ExpertId(0, 0)
    pair = [host(name, ready=frozenset({expert}), route=name.encode()) for name in "ab"]
    for hosts in (pair, pair[::-1]):
        table = routing(catalogue(), hosts, {expert: "id-b"})
        first, second = (table.devices[of[0][0]].device_id for of in (table.device_of, table.standby_of))
        assert (first, second) == ("id-b", "id-a")
    assert routing(catalogue(), pair[:1], {}).standby_of[0][0] == -1
