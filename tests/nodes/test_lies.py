"""A base station, three devices as processes over CURVE, and one of them lies."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.lab.families import save_tiny
from tests.lab.fleet import Fleet
from tests.lab.liar import Lie
from tests.lab.waiting import PATIENCE_S
from wdmoe.backbone.export.export import ExportSettings, export_bundle
from wdmoe.nodes.base_station.base_station import BaseStation
from wdmoe.receipt import Receipt
from wdmoe.records import Finished, GenerationRequest, Sampling

PROMPT = tuple(range(40, 52))  # few enough that each row of its answers is computed again


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mixtral")
    export_bundle(save_tiny("mixtral", folder / "checkpoint"), folder / "bundle", ExportSettings())
    return folder / "bundle"


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Fleet]:
    fleet = Fleet(tmp_path)
    yield fleet
    fleet.close()


async def _answer(station: BaseStation, tokens: int) -> tuple[list[int], Receipt]:
    ids = []
    sampling = Sampling(max_tokens=tokens, ignore_eos=True)
    async for event in station.engine.stream(GenerationRequest(request_id="t", prompt=PROMPT, sampling=sampling)):
        if isinstance(event, Finished):
            return ids, event.receipt
        ids.append(event.token_id)
    raise AssertionError("no end")


def ask(fleet: Fleet, station: BaseStation, tokens: int = 12) -> tuple[list[int], Receipt]:
    return fleet.loop.run(_answer(station, tokens), PATIENCE_S)


def of(station: BaseStation, name: str) -> dict[str, Any]:
    devices: Any = station.overview()["devices"]
    return next(each for each in devices if each["name"] == name)


def until(fleet: Fleet, done: Any) -> None:
    async def wait() -> None:
        end = time.monotonic() + PATIENCE_S
        while not done():
            assert time.monotonic() < end, "never happened"
            await asyncio.sleep(0.05)

    fleet.loop.run(wait(), PATIENCE_S + 5)


@pytest.mark.parametrize("kind", ["1e30", "zeros", "stale", "foreign", "noise", "1.5"])
def test_a_liar_is_found_and_its_experts_move(kind: str, fleet: Fleet, bundle: Path) -> None:
    with fleet.serve(bundle, devices=0) as station:
        fleet.add_device(lie=Lie(kind, after=0))
        fleet.add_device()
        fleet.wait(station, 2)
        want = _undivided(bundle)
        state: Any = {}
        for _ in range(5):
            ids, receipt = ask(fleet, station)
            assert ids == want
            assert not receipt.degraded
            assert not receipt.suspect
            state = of(station, "device0")
            if state["quarantined"]:
                break
        assert state["quarantined"]
        assert state["lies"] == 2
        until(fleet, lambda: station.overview()["unserved"] == 0)
        overview = station.overview()
        assert overview["devices_quarantined"] == 1
        assert overview["state"] == "degraded"
        ids, receipt = ask(fleet, station)
        assert (ids, receipt.degraded) == (want, False)
        # Its key keeps it out, whatever it does.
        fleet.devices[0].stop()
        fleet.devices[0].start()
        until(fleet, lambda: "device0" in {each["name"] for each in _devices(station)})
        runs = of(station, "device0")["runs"]
        assert of(station, "device0")["quarantined"]
        assert ask(fleet, station)[0] == want
        assert (of(station, "device0")["ready"], of(station, "device0")["runs"]) == (0, runs)


def test_one_flipped_bit_is_no_quarantine(fleet: Fleet, bundle: Path) -> None:
    with fleet.serve(bundle, devices=0) as station:
        fleet.add_device(lie=Lie("1e30", after=1, most=1))
        fleet.wait(station, 1)
        assert ask(fleet, station)[0] == _undivided(bundle)
        state = of(station, "device0")
        assert (state["lies"], state["watched"], state["quarantined"]) == (1, True, False)
        assert station.overview()["state"] == "ok"


def _devices(station: BaseStation) -> list[dict[str, Any]]:
    devices: Any = station.overview()["devices"]
    return list(devices)


def _undivided(bundle: Path) -> list[int]:
    """Greedy tokens of the model in one piece."""
    import torch

    from tests.lab.families import reference

    model = reference(bundle.parent / "checkpoint")
    model.generation_config.eos_token_id = None
    ids = torch.tensor([PROMPT])
    with torch.no_grad():
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, pad_token_id=0
        )
    return np.asarray(out[0, len(PROMPT) :]).tolist()
