"""Eleven families over real processes and CURVE: the tokens and logits of the undivided model, from three devices."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.lab.families import FAMILIES, GRAPHS, HEADS, VOCABULARY, reference, save_tiny
from tests.lab.fleet import Fleet
from wdmoe.backbone.export.export import ExportSettings, export_bundle
from wdmoe.nodes.base_station.base_station import BaseStation
from wdmoe.records import Finished, GenerationRequest, Sampling, TextDelta

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
    with fleet.serve(tmp_path / "bundle", devices=3, copies=1, engine="transformers") as station:
        for lengths in (LENGTHS, (LONG,)):
            work = station.engine.call(lambda s, ledger, at=lengths: (generate(s.model, at), ledger.receipt()))
            (tokens, logits), receipt = work.result(60)
            with torch.no_grad():
                want_tokens, want_logits = generate(undivided, lengths)
            assert tokens.tolist() == want_tokens.tolist()
            np.testing.assert_allclose(logits.numpy(), want_logits.numpy(), atol=LOGITS_WITHIN)
            assert not receipt.degraded


@pytest.mark.parametrize("family", GRAPHS)
def test_the_graphs_answer_as_the_undivided_model(family: str, fleet: Fleet, tmp_path: Path) -> None:
    asked = {"max_position_embeddings": 512, **HEADS, **GRAPHS[family][0]}
    checkpoint = save_tiny(family, tmp_path / "checkpoint", **asked)
    export_bundle(checkpoint, tmp_path / "bundle", ExportSettings())
    model = reference(checkpoint)
    with fleet.serve(tmp_path / "bundle", devices=3, copies=1, engine="graphs") as station:
        for length in LENGTHS:
            prompt = tuple(range(30, 30 + length))
            with torch.no_grad():
                want = model.generate(
                    torch.tensor([prompt]), max_new_tokens=24, do_sample=False, eos_token_id=VOCABULARY, pad_token_id=0
                )
            request = GenerationRequest(
                request_id="t", prompt=prompt, sampling=Sampling(max_tokens=24, ignore_eos=True)
            )
            events = fleet.loop.run(events_of(station, request), 60)
            tokens = [e.token_id for e in events if isinstance(e, TextDelta) and e.token_id >= 0]
            assert tokens == want[0, length:].tolist()
            assert isinstance(events[-1], Finished)
            assert not events[-1].receipt.degraded


async def events_of(station: BaseStation, request: GenerationRequest) -> list[Any]:
    return [event async for event in station.engine.stream(request)]
