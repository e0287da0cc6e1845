"""Ten families over real processes and CURVE: the tokens and logits of the undivided model, from three devices."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.lab.families import FAMILIES, reference, save_tiny
from tests.lab.fleet import Fleet
from wdmoe.backbone.export.export import ExportSettings, export_bundle

LOGITS_WITHIN = 1e-4
NEW_TOKENS = 32
LENGTHS = (5, 17, 9)
LONG = 310
PAD = 0


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """Three devices that stay while one base station after the other serves another family."""
    folder = tmp_path_factory.mktemp("fleet")
    fleet = Fleet(folder)
    export_bundle(save_tiny("mixtral", folder / "checkpoint"), folder / "bundle", ExportSettings())
    with fleet.serve(folder / "bundle", devices=3, copies=1):
        pass
    yield fleet
    fleet.close()


def prompts(lengths: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """Left-padded random prompts and their mask."""
    rng = np.random.default_rng(3)
    ids = torch.full((len(lengths), max(lengths)), PAD)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        ids[row, -length:] = torch.from_numpy(rng.integers(1, 255, length))
        mask[row, -length:] = 1
    return ids, mask


def generate(model: Any, lengths: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """Greedy tokens (prompts, 32) and the logits they were chosen by (32, prompts, vocabulary)."""
    ids, mask = prompts(lengths)
    model.generation_config.eos_token_id = None
    out = model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        pad_token_id=PAD,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return out.sequences[:, ids.shape[1] :], torch.stack(out.logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_answer_is_the_undivided_models(family: str, fleet: Fleet, tmp_path: Path) -> None:
    checkpoint = save_tiny(family, tmp_path / "checkpoint", max_position_embeddings=512)
    export_bundle(checkpoint, tmp_path / "bundle", ExportSettings())
    undivided = reference(checkpoint)
    with fleet.serve(tmp_path / "bundle", devices=3, copies=1) as station:
        for lengths in (LENGTHS, (LONG,)):
            work = station.engine.call(lambda s, ledger, at=lengths: (generate(s.model, at), ledger.receipt()))
            (tokens, logits), receipt = work.result(60)
            with torch.no_grad():
                want_tokens, want_logits = generate(undivided, lengths)
            assert tokens.tolist() == want_tokens.tolist()
            np.testing.assert_allclose(logits.numpy(), want_logits.numpy(), atol=LOGITS_WITHIN)
            assert not receipt.degraded
