"""A made-up model with many small experts, for fleets that are larger than its layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.lab.families import save_tiny
from wdmoe.backbone.export.export import ExportSettings, export_bundle


def many_experts(folder: Path, layers: int = 4, experts: int = 64) -> tuple[Path, Path]:
    """Checkpoint and bundle of a tiny Mixtral (hidden 32, top 2) with so many layers and experts in each."""
    shape: dict[str, Any] = {"num_hidden_layers": layers, "num_local_experts": experts, "max_position_embeddings": 1024}
    checkpoint = save_tiny("mixtral", folder / "checkpoint", **shape)
    export_bundle(checkpoint, folder / "bundle", ExportSettings())
    return checkpoint, folder / "bundle"
