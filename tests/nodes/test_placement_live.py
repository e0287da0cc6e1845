"""A base station with devices as processes: experts on two devices each, and a trace of what was served."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from tests.lab.families import save_tiny
from tests.lab.fleet import Fleet
from tests.nodes.test_alive import PROMPT, ask, names, until
from wdmoe.backbone.evaluation.trace_recorder import TraceRecorder
from wdmoe.backbone.export.export import ExportSettings, export_bundle
from wdmoe.results.gate_trace import GateTrace
from wdmoe.solver.placement.file import read_placement, write_placement

TOKENS = 8


def test_copies_take_over_and_what_was_served_is_recorded(tmp_path: Path) -> None:
    checkpoint = save_tiny("mixtral", tmp_path / "checkpoint")
    bundle = tmp_path / "bundle"
    manifest = export_bundle(checkpoint, bundle, ExportSettings())
    every = tuple(sorted(file.id for file in manifest.experts))
    placement, file = tmp_path / "placement.json", tmp_path / "served.npz"
    placement.write_text(write_placement({"device0": every, "device1": every}))
    fleet = Fleet(tmp_path)
    try:
        with fleet.serve(bundle, devices=2, placement=placement, record_trace=file) as station:
            until(fleet, lambda: all(device.ready == set(every) for device in station.control.roster.live()))
            assert read_placement(station.placement_text()) == {"device0": every, "device1": every}
            ids, devices, _ = ask(fleet, station, TOKENS)
            assert devices == {"device0", "device1"}  # both copies have work
            fleet.devices[0].kill()
            until(fleet, lambda: "device0" not in names(station))
            again, devices, receipt = ask(fleet, station, TOKENS)  # nothing had to be fetched first
            assert (again, devices, receipt.degraded) == (ids, {"device1"}, False)
    finally:
        fleet.close()
    served = GateTrace.load(file)
    length = len(PROMPT) + TOKENS - 1  # nothing is computed from the last token
    assert served.position.tolist() == [*range(length)] * 2
    model = AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    with TraceRecorder(model, "local") as recorder, torch.no_grad():
        model(input_ids=torch.tensor([[*PROMPT, *ids[:-1]]]), use_cache=False)
    local = recorder.trace()
    np.testing.assert_allclose(served.gate[:, :length], local.gate, atol=5e-3)
    assert served.temperature == local.temperature
