"""More devices than parts of layers, as processes: all hold something, and a layer outlives home and standby."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.backbone.test_spine import greedy
from tests.lab.fleet import Fleet
from tests.lab.many_experts import many_experts
from tests.lab.waiting import PATIENCE_S
from tests.nodes.test_alive import ask, names, until
from wdmoe.nodes.base_station.base_station import BaseStation


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return many_experts(tmp_path_factory.mktemp("many"), layers=2, experts=8)


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Fleet]:
    fleet = Fleet(tmp_path)
    yield fleet
    fleet.close()


def settled(station: BaseStation) -> bool:
    return station.control.wanted() == {d.device_id: set(d.ready) for d in station.control.roster.live()}


def first_two(station: BaseStation, layer: int) -> set[str]:
    """Names of the devices that come first and second for a layer."""
    table = station.control.routing
    rows = (table.device_of[layer], table.standby_of[layer])
    return {table.devices[index].name for row in rows for index in set(row.tolist())}


def test_home_and_standby_of_a_layer_killed_at_once_cost_no_answer(fleet: Fleet, made: tuple[Path, Path]) -> None:
    checkpoint, bundle = made
    with fleet.serve(bundle, devices=6, deadline_s=4 * PATIENCE_S) as station:
        until(fleet, lambda: settled(station))
        assert all(station.control.wanted().values())
        doomed = first_two(station, 0)
        assert len(doomed) == 2

        def kill() -> None:
            for device in fleet.devices:
                if device.name in doomed:
                    device.process.kill()

        ids, _, receipt = ask(fleet, station, tokens=40, at_token={10: kill})
        assert ids == greedy(checkpoint, tokens=40)
        assert not receipt.degraded
        until(fleet, lambda: not doomed & names(station))
        assert ask(fleet, station)[0] == greedy(checkpoint)


def test_a_slow_device_is_home_to_nothing_after_some_tokens(fleet: Fleet, made: tuple[Path, Path]) -> None:
    """Its link takes tenths of a second for what others answer in milliseconds; the copies are elsewhere already."""
    checkpoint, bundle = made
    with fleet.serve(bundle, devices=0, deadline_s=PATIENCE_S) as station:
        fleet.token = station.join_text
        fleet.add_device("--downlink", "10kbit/s")
        fleet.wait(station, devices=1)
        for _ in range(2):
            fleet.add_device()
        fleet.wait(station, devices=3)
        until(fleet, lambda: settled(station))
        slow = fleet.devices[0].name
        homes = set(station.control.arrangement.targets.values())
        assert any(d.device_id in homes for d in station.control.roster.live() if d.report.name == slow)
        placed = {d.device_id: d.placed for d in station.control.roster.live()}
        want = greedy(checkpoint)
        while slow in (answered := ask(fleet, station, tokens=12))[1]:
            assert answered[0] == want
        assert answered[0] == want
        assert {d.device_id: d.placed for d in station.control.roster.live()} == placed  # no bytes moved
