"""The default model as a checkpoint folder, for transformers and for whatever else reads one."""

from __future__ import annotations

from pathlib import Path

import torch

from wdmoe.backbone.default.card import decided_card
from wdmoe.backbone.split.applied import split_settings
from wdmoe.backbone.split.checkpoint import moe_model, write_checkpoint
from wdmoe.backbone.split.decided import apply_decisions
from wdmoe.backbone.split.decisions import Decisions
from wdmoe.backbone.split.dense import read_dense
from wdmoe.backbone.split.settings import Progress, quiet


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
