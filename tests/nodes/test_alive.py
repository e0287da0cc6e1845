"""Devices and base stations that die, freeze and come back, as processes: answers go on and say what they lost."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.backbone.test_spine import greedy
from tests.lab.families import save_tiny
from tests.lab.fleet import Fleet
from tests.lab.waiting import PATIENCE_S
from wdmoe.backbone.export.export import ExportSettings, export_bundle
from wdmoe.errors import ExpertsUnavailableError
from wdmoe.nodes.base_station.base_station import BaseStation
from wdmoe.nodes.device.session import BEATS_PER_LEASE
from wdmoe.receipt import Receipt
from wdmoe.records import Finished, GenerationRequest, Sampling, TextDelta

PROMPT = tuple(range(40, 60))
DEADLINE_S = 20.0  # so long that a slow machine meets it; devices that are gone are not waited for


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("mixtral", tmp_path_factory.mktemp("checkpoint"), max_position_embeddings=1024)


@pytest.fixture(scope="module")
def bundle(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("bundle") / "mixtral"
    export_bundle(checkpoint, out, ExportSettings())
    return out


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Fleet]:
    fleet = Fleet(tmp_path)
    yield fleet
    fleet.close()


def ask(
    fleet: Fleet, station: BaseStation, tokens: int = 12, at_token: dict[int, Callable[[], Any]] | None = None
) -> tuple[list[int], set[str], Receipt]:
    """Ids, devices that worked and receipt of an answer; `at_token` acts while it is being given."""

    async def listen() -> tuple[list[int], set[str], Receipt]:
        sampling = Sampling(max_tokens=tokens, ignore_eos=True)
        ids: list[int] = []
        devices: set[str] = set()
        async for event in station.engine.stream(GenerationRequest(request_id="t", prompt=PROMPT, sampling=sampling)):
            if isinstance(event, Finished):
                return ids, devices, event.receipt
            if isinstance(event, TextDelta) and event.token_id >= 0:
                ids.append(event.token_id)
                devices |= set(event.devices)
                (at_token or {}).get(len(ids), lambda: None)()
        raise AssertionError("an answer without an end")

    return fleet.loop.run(listen())


def until(fleet: Fleet, what: Callable[[], bool]) -> None:
    """Wait for something the station's loop will bring about."""

    async def wait() -> None:
        while not what():
            await asyncio.sleep(0.05)

    fleet.loop.run(wait())


def names(station: BaseStation) -> set[str]:
    return {device.report.name for device in station.control.roster.live()}


def test_a_long_prompt_stops_no_heartbeat(fleet: Fleet, bundle: Path) -> None:
    with fleet.serve(bundle, lease_s=4.0, prefill_chunk=8) as station:
        sessions = {device.key: device.session for device in station.control.roster.live()}
        heard: dict[str, set[float]] = {key: set() for key in sessions}

        async def read_long_prompts() -> None:
            prompt = tuple(range(1, 201)) * 5
            sampling = Sampling(max_tokens=1, ignore_eos=True)
            while min(map(len, heard.values())) < 2 * BEATS_PER_LEASE:  # two leases; short ones end by themselves
                async for event in station.engine.stream(
                    GenerationRequest(request_id="t", prompt=prompt, sampling=sampling)
                ):
                    assert isinstance(event, TextDelta) or not event.receipt.degraded

        async def listen() -> None:
            reading = asyncio.create_task(read_long_prompts())
            while not reading.done():
                for device in station.control.roster.live():
                    heard[device.key].add(device.seen_s)
                await asyncio.sleep(0.05)
            await reading

        fleet.loop.run(listen())
        assert {device.key: device.session for device in station.control.roster.live()} == sessions
        assert [device.said().count("joined ") for device in fleet.devices] == [1, 1, 1]


def test_with_copies_a_device_killed_in_mid_answer_costs_not_even_the_deadline(
    fleet: Fleet, bundle: Path, checkpoint: Path
) -> None:
    """Its kernel ends the connection, and the holders of the copies are asked: `ask` waits no such deadline."""
    with fleet.serve(bundle, deadline_s=4 * PATIENCE_S) as station:
        until(fleet, lambda: station.control.wanted() == {d.device_id: d.ready for d in station.control.roster.live()})
        victim = fleet.devices[1]
        ids, _, receipt = ask(fleet, station, tokens=40, at_token={10: victim.kill})
        assert ids == greedy(checkpoint, tokens=40)
        assert not receipt.degraded
        until(fleet, lambda: victim.name not in names(station))
        victim.start()
        fleet.wait(station, devices=3)
        assert not ask(fleet, station)[2].degraded


def test_without_copies_a_device_killed_in_mid_answer_costs_quality_not_the_answer(fleet: Fleet, bundle: Path) -> None:
    with fleet.serve(bundle, deadline_s=DEADLINE_S, copies=1) as station:
        victim = fleet.devices[1]
        ids, _, receipt = ask(fleet, station, tokens=60, at_token={10: victim.kill})
        assert len(ids) == 60
        assert receipt.degraded
        assert 0 < receipt.degraded_tokens < 60 + len(PROMPT)
        until(fleet, lambda: victim.name not in names(station))
        fleet.wait(station, devices=2)  # its experts found other homes
        assert not ask(fleet, station)[2].degraded
        victim.start()
        fleet.wait(station, devices=3)
        _, devices, receipt = ask(fleet, station, tokens=24)
        assert victim.name in devices
        assert not receipt.degraded
        assert "fetched" not in victim.said() or "0 fetched" in victim.said().splitlines()[-1]


def test_a_frozen_device_is_left_out_until_it_thaws(fleet: Fleet, bundle: Path, checkpoint: Path) -> None:
    with fleet.serve(bundle, deadline_s=DEADLINE_S, lease_s=2.0, copies=1) as station:
        victim = fleet.devices[0]
        ids, _, receipt = ask(fleet, station, tokens=40, at_token={5: lambda: victim.signal(signal.SIGSTOP)})
        assert len(ids) == 40
        assert receipt.degraded
        until(fleet, lambda: victim.name not in names(station))
        victim.signal(signal.SIGCONT)
        until(fleet, lambda: victim.name in names(station))
        fleet.wait(station, devices=3)
        ids, _, receipt = ask(fleet, station)
        assert ids == greedy(checkpoint)
        assert not receipt.degraded


def test_with_no_device_left_a_request_fails_with_a_clear_error(fleet: Fleet, bundle: Path) -> None:
    with fleet.serve(bundle, devices=2, deadline_s=DEADLINE_S, wait_for_experts_s=1.0) as station:
        kill_all = {5: lambda: [device.kill() for device in fleet.devices]}
        with pytest.raises(ExpertsUnavailableError, match="layer"):
            ask(fleet, station, tokens=400, at_token=kill_all)
        assert station.overview()["state"] in ("ok", "degraded", "waiting")


def test_devices_rejoin_a_new_base_station_by_themselves(fleet: Fleet, bundle: Path, checkpoint: Path) -> None:
    with fleet.serve(bundle) as station:
        want = ask(fleet, station)[0]
    with fleet.serve(bundle) as station:
        assert ask(fleet, station)[0] == want == greedy(checkpoint)
    assert all(device.process.poll() is None for device in fleet.devices)


def test_a_restarted_device_replaces_its_ghost(fleet: Fleet, bundle: Path) -> None:
    """Faster than its lease: the base station hears the new session while the old one still counts as alive."""
    with fleet.serve(bundle, lease_s=20.0, deadline_s=DEADLINE_S) as station:
        before = {d.device_id: d.session for d in station.control.roster.live()}
        fleet.devices[2].kill()
        fleet.devices[2].start()
        until(fleet, lambda: {d.device_id: d.session for d in station.control.roster.live()} != before)
        fleet.wait(station, devices=3)
        assert {d.device_id for d in station.control.roster.live()} == set(before)
        assert not ask(fleet, station)[2].degraded


def test_a_revoked_device_is_cut_off_while_the_others_go_on(fleet: Fleet, bundle: Path, checkpoint: Path) -> None:
    with fleet.serve(bundle, deadline_s=DEADLINE_S) as station:
        station.admission.revoke(fleet.devices[0].name)
        until(fleet, lambda: fleet.devices[0].name not in names(station))
        fleet.wait(station, devices=2)
        assert ask(fleet, station)[0] == greedy(checkpoint)
        limit = time.monotonic() + PATIENCE_S
        while "revoked" not in fleet.devices[0].said() and time.monotonic() < limit:
            time.sleep(0.1)
        assert "revoked" in fleet.devices[0].said()
        # The token it still holds opens no door any more, under whatever key.
        fleet.add_device()
        limit = time.monotonic() + PATIENCE_S
        while "refused" not in fleet.devices[-1].said() and time.monotonic() < limit:
            time.sleep(0.1)
        assert "refused" in fleet.devices[-1].said()
        assert names(station) == {device.name for device in fleet.devices[1:3]}
