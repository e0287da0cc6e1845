"""The default model on disk: as a bundle, straight from memory, or as a checkpoint folder."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from wdmoe.backbone.default.card import decided_card
from wdmoe.backbone.export.export import ExportProgress, ExportSettings, WeightsInMemory, export_tensors
from wdmoe.backbone.export.station_files import small_files
from wdmoe.backbone.format.bundle import STATION_FOLDER
from wdmoe.backbone.split.checkpoint import moe_fields, moe_model, write_checkpoint
from wdmoe.backbone.split.decided import apply_decisions, split_settings
from wdmoe.backbone.split.decisions import Decisions
from wdmoe.backbone.split.dense import DenseModel, read_dense
from wdmoe.backbone.split.settings import Progress, SplitSettings, quiet

_ARCHITECTURE = "GraniteMoeSharedForCausalLM"
_FAMILY = "granitemoeshared"


@torch.no_grad()
def write_decided_checkpoint(dense: Path, decisions: Decisions, out: Path, progress: Progress = quiet) -> None:
    """Write the checkpoint folder that transformers loads; `out` appears whole or not at all.

    Args:
        dense: the file that the decisions are about.
        progress: told (stage, fraction done).
    Raises:
        BundleError: `dense` is another file or unreadable, or `out` exists or cannot be written.
    """
    progress("read", 0.0)
    source = read_dense(dense)
    settings = split_settings(source.config.intermediate_size, decisions)
    model = moe_model(*apply_decisions(source, decisions, progress), settings)
    progress("write", 0.0)
    write_checkpoint(model, source.tokenizer, decided_card(source, decisions), out)
    progress("write", 1.0)


@torch.no_grad()
def write_decided_bundle(
    dense: Path,
    decisions: Decisions,
    out: Path,
    export: ExportSettings,
    progress: Progress = quiet,
    exporting: ExportProgress | None = None,
) -> None:
    """Write the bundle; one that was interrupted is gone on with.

    Its config is written by us and not by transformers, whose versions write different ones: so the bundle's files are
    the same everywhere, but for the tokenizer's, which the installed tokenizers library writes.

    Args:
        dense: the file that the decisions are about.
        progress: told (stage, fraction done) up to the export.
        exporting: told how far the export is.
    Raises:
        BundleError: `dense` is another file or unreadable, or `out` cannot be written.
    """
    progress("read", 0.0)
    source = read_dense(dense)
    settings = split_settings(source.config.intermediate_size, decisions)
    model = moe_model(*apply_decisions(source, decisions, progress), settings)
    weights = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    tensors = WeightsInMemory(weights, f"{decisions.source_sha256} {decisions.digest}")
    export_tensors(tensors, _small(source, settings), model.config, out, export, exporting)


def _small(source: DenseModel, settings: SplitSettings) -> dict[str, bytes]:
    """Config and tokenizer by their paths in the bundle."""
    fields = moe_fields(source.config, settings)
    ends = {name: fields[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    with tempfile.TemporaryDirectory() as folder:
        source.tokenizer.save_pretrained(folder)
        found = dict(small_files(Path(folder)))
    return {
        **found,
        f"{STATION_FOLDER}/config.json": _json(
            {**fields, "architectures": [_ARCHITECTURE], "model_type": _FAMILY, "dtype": "float32"}
        ),
        f"{STATION_FOLDER}/generation_config.json": _json(ends),
    }


def _json(fields: dict[str, Any]) -> bytes:
    return (json.dumps(fields, indent=2, sort_keys=True) + "\n").encode()
