"""A base station and devices without encryption, as processes: the same answer, and no device can end the station."""

from __future__ import annotations

from pathlib import Path

from tests.backbone.test_spine import greedy
from tests.lab.families import save_tiny
from tests.lab.fleet import Fleet
from tests.nodes.test_alive import ask
from wdmoe.backbone.export.export import ExportSettings, export_bundle


def test_without_encryption_the_answer_is_the_same(tmp_path: Path) -> None:
    checkpoint = save_tiny("mixtral", tmp_path / "checkpoint")
    export_bundle(checkpoint, tmp_path / "bundle", ExportSettings())
    fleet = Fleet(tmp_path)
    try:
        with fleet.serve(tmp_path / "bundle", devices=0, insecure=True) as station:
            fleet.token = station.join_text
            for _ in range(2):
                fleet.add_device("--insecure")
            fleet.wait(station, devices=2)
            ids, devices, receipt = ask(fleet, station)
        assert ids == greedy(checkpoint)
        assert not receipt.degraded
        assert len(devices) > 0
    finally:
        fleet.close()
