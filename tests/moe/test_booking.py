"""When a layer's exchange is booked: at once, or while the next layer of the same pass is away."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest

from tests.lab.engine_lab import Lab
from tests.lab.families import save_tiny
from tests.lab.waiting import PATIENCE_S
from wdmoe.backbone.export.export import ExportSettings, export_bundle
from wdmoe.backbone.format.bundle import Bundle
from wdmoe.errors import ExpertsUnavailableError
from wdmoe.layer_call import Caller, Callers, Demand, LayerCall
from wdmoe.receipt import Ledger


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("booking")
    export_bundle(save_tiny("mixtral", folder / "checkpoint"), folder / "bundle", ExportSettings())
    return Bundle.open(folder / "bundle")


@pytest.fixture
def lab(bundle: Bundle) -> Iterator[Lab]:
    made = Lab(bundle)
    yield made
    made.close()


def through(lab: Lab, ledger: Ledger, more: Sequence[bool]) -> list[dict[str, Any]]:
    """Run some layers of a token. What was booked after each."""
    hidden, layers = lab.station.manifest.hidden, lab.station.manifest.moe_layers
    token = np.random.default_rng(0).normal(size=(1, hidden)).astype(np.float32)
    demand = Demand(np.array([[0, 1]], np.int32), np.full((1, 2), 0.5, np.float32), None)
    booked: list[dict[str, Any]] = []

    def work(_model: Any, _ledger: Any) -> None:
        for layer, follows in zip(layers, more, strict=False):
            call = LayerCall(layer, token, demand, Callers([Caller(ledger)], [1]), more=follows)
            try:
                lab.layers.run(call)
            finally:
                booked.append(
                    {
                        "bytes": (ledger.bytes_down, ledger.bytes_up),
                        "answers": sum(ledger.step_devices.values()),
                        "unverified": sum(ledger.unverified.values()),
                    }
                )

    lab.engine.call(work).result(PATIENCE_S)
    return booked


def test_a_pass_is_booked_by_its_last_layer(lab: Lab) -> None:
    at_once = through(lab, Ledger(), [False, False])
    late = through(lab, Ledger(), [True, False])
    assert late[0]["bytes"] == (0, 0)
    assert at_once[0]["bytes"] > (0, 0)
    assert late[1] == at_once[1]
    assert at_once[1]["answers"] == 2 * at_once[0]["answers"] > 0


def test_what_counts_is_looked_at_before_that(bundle: Bundle) -> None:
    lab = Lab(bundle, verify=0.01, draw=lambda: 0.999)
    try:
        first, last = through(lab, Ledger(), [True, False])
        assert lab.layers.observed.inspector.counters.verified_answers >= first["answers"] + 2  # at once
    finally:
        lab.close()
    assert last["answers"] == 4


def test_a_layer_that_fails_leaves_nothing_unbooked(lab: Lab) -> None:
    ledger = Ledger()
    through(lab, ledger, [True])
    lab.routing = type(lab.routing)()
    with pytest.raises(ExpertsUnavailableError):
        through(lab, ledger, [True])
    assert ledger.bytes_down > 0
