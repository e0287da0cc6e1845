"""A dense Llama-like checkpoint becomes a Mixture-of-Experts checkpoint: the spine."""

from __future__ import annotations

import time
from pathlib import Path

import torch

from wdmoe.backbone import text_windows
from wdmoe.backbone.perplexity import window_perplexity
from wdmoe.backbone.split.calibrate import Streams, dense_model
from wdmoe.backbone.split.checkpoint import model_card, moe_model, write_checkpoint
from wdmoe.backbone.split.dense import DenseModel, read_dense
from wdmoe.backbone.split.layer import SplitLayer, split_layer
from wdmoe.backbone.split.settings import Progress, SplitReport, SplitSettings, quiet
from wdmoe.errors import BundleError


@torch.no_grad()
def split_checkpoint(dense: Path, out: Path, settings: SplitSettings, progress: Progress = quiet) -> SplitReport:
    """Split a dense checkpoint and write the MoE checkpoint folder.

    The same input, settings and thread count give the same weights.

    Args:
        dense: folder of safetensors, or a GGUF file.
        out: folder to make; it appears only when complete.
        progress: told (stage, fraction done).
    Raises:
        BundleError: `dense` cannot be read or split, or `out` exists or cannot be written.
        ConfigError: the settings do not fit the model, or a text file is unusable or too short.
    """
    began = time.monotonic()
    if out.exists():
        raise BundleError(f"{out} exists already; give a new folder")
    progress("read", 0.0)
    source = read_dense(dense)
    settings.expert_size(source.config.intermediate_size)
    calibration = _windows(source, settings, held_out=False)
    held_out = _windows(source, settings, held_out=True)
    progress("read", 1.0)

    layers = _split_layers(source, calibration, settings, progress)
    model = moe_model(source, layers, settings)
    report = SplitReport(
        tokens=held_out.numel(),
        calibration_tokens=calibration.numel(),
        dense_perplexity=window_perplexity(dense_model(source), held_out, lambda x: progress("measure", x / 2)),
        split_perplexity=window_perplexity(model, held_out, lambda x: progress("measure", 0.5 + x / 2)),
        seconds=time.monotonic() - began,
        sha256=source.sha256,
    )
    progress("write", 0.0)
    write_checkpoint(model, source.tokenizer, model_card(source, settings, report.as_json()), out)
    progress("write", 1.0)
    return report


def _windows(source: DenseModel, settings: SplitSettings, *, held_out: bool) -> torch.Tensor:
    files = settings.held_out if held_out else settings.calibration
    count = (settings.held_out_tokens if held_out else settings.calibration_tokens) // settings.window
    shipped = text_windows.SHIPPED_HELD_OUT if held_out else text_windows.SHIPPED_CALIBRATION
    documents = text_windows.read_documents(files, shipped)
    return torch.from_numpy(text_windows.token_windows(documents, source.tokenizer, settings.window, count))


def _split_layers(
    source: DenseModel, windows: torch.Tensor, settings: SplitSettings, progress: Progress
) -> list[SplitLayer]:
    model = dense_model(source)
    streams = Streams(model, windows, with_dense=settings.correct)
    layers: list[SplitLayer] = []
    for index, layer in enumerate(model.model.layers):
        progress("split", index / len(model.model.layers))
        streams.attend(layer)
        layers.append(split_layer(layer, streams, settings))
    progress("split", 1.0)
    return layers
