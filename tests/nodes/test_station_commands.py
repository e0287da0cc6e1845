"""Commands that a base station takes from the program that started it."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from tests.lab.engine_lab import Lab
from tests.lab.families import save_tiny
from wdmoe.backbone.export.export import ExportSettings, export_bundle
from wdmoe.backbone.format.bundle import Bundle
from wdmoe.config import ServingRules, StationSettings
from wdmoe.errors import ConfigError
from wdmoe.nodes.base_station.commands import do_command
from wdmoe.nodes.base_station.reading import read_window
from wdmoe.nodes.local.process import Child, ChildError
from wdmoe.nodes.supervised.command_lines import MARK, obey


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    folder = tmp_path_factory.mktemp("granite")
    export_bundle(save_tiny("granitemoeshared", folder / "checkpoint"), folder / "bundle", ExportSettings())
    opened = Lab(Bundle.open(folder / "bundle"))
    yield opened
    opened.close()


class Station:
    """What commands need of a base station."""

    def __init__(self, lab: Lab) -> None:
        self.engine = lab.engine
        self.served: list[tuple[StationSettings, bool]] = []

    def serve_by(self, settings: StationSettings, *, rehearsal: bool) -> None:
        self.served.append((settings, rehearsal))


def told(station: Station, monkeypatch: pytest.MonkeyPatch, *lines: str) -> list[dict[str, Any]]:
    """The answers to these lines on standard input."""
    reading, writing = os.pipe()
    os.write(writing, "".join(f"{line}\n" for line in lines).encode())
    os.close(writing)
    answers: list[str] = []
    with os.fdopen(reading) as pipe:
        monkeypatch.setattr(sys, "stdin", pipe)
        settings = StationSettings(bundle=Path("b"), bandwidth_hz=5e6)
        asyncio.run(obey(lambda line: do_command(station, settings, line), answers.append))  # type: ignore[arg-type]
    assert all(answer.startswith(MARK) for answer in answers)
    return [json.loads(answer.removeprefix(MARK)) for answer in answers]


def test_rules_and_text(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    station = Station(lab)
    rules = {"policy": "budget", "max_dropped": 0.1, "allocation": "equal"}
    nothing, reading = told(
        station,
        monkeypatch,
        json.dumps({"command": "serve", "rules": rules, "rehearsal": True}),
        json.dumps({"command": "read", "window": 1, "length": 9}),
    )
    ((settings, rehearsal),) = station.served
    assert nothing == {}
    assert settings == ServingRules(**rules).of(StationSettings(bundle=Path("b"), bandwidth_hz=5e6))
    assert (settings.policy, settings.allocation, settings.bandwidth_hz, rehearsal) == ("budget", "equal", 5e6, True)
    assert (reading["tokens"], reading["dropped_weight"]) == (8, 0.0)
    assert reading["nats"] == read_window(lab.engine, 1, 9).nats > 0


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("nonsense", "no such command"),
        ("[]", "no such command"),
        ('{"command": "sing"}', "no such command: 'sing'"),
        ('{"command": "serve", "rules": {"colour": 1}, "rehearsal": false}', "colour"),
        ('{"command": "serve", "rules": {"policy": "budget"}, "rehearsal": false}', "policy budget needs --budget"),
        ('{"command": "read", "window": -1, "length": 9}', "no window -1"),
        ('{"command": "read", "window": 10000000, "length": 9}', "the held-out text has"),
    ],
)
def test_a_command_that_cannot_be_done_is_answered(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, line: str, says: str
) -> None:
    station = Station(lab)
    wrong, right = told(station, monkeypatch, line, '{"command": "read", "window": 0, "length": 9}')
    assert says in wrong["error"]
    assert np.isfinite(right["nats"])
    assert station.served == []


def test_text_ends_somewhere(lab: Lab) -> None:
    with pytest.raises(ConfigError, match="not 100001"):
        read_window(lab.engine, 100_000, 9)


def test_a_child_that_ended_does_not_listen(tmp_path: Path) -> None:
    child = Child("station", ["no-such-command"], tmp_path, listens=True)
    try:
        while psutil.Process(child.pid).status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.05)  # a test ends after 300 s
        with pytest.raises(ChildError, match=r"^station does not listen any more: .*no-such-command"):
            child.tell("hello")
    finally:
        child.end(60)
