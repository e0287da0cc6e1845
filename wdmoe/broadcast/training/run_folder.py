"""The folder of one training run, and the weights that come out of it.

settings.json          of the model, the training and the batches
state.safetensors      to go on from
curve.csv, curves.png  loss, and quality on the 500 pictures to choose by
model.safetensors      the averaged weights, with the model's settings inside
manifest.json          versions, seed, data, SHA-256 of every file; written last, so a folder without it is not finished
"""

from __future__ import annotations

import csv
import json
import platform
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from wdmoe.broadcast.codec.model import BroadcastCodec, ModelSettings
from wdmoe.broadcast.codec.model_file import save_model
from wdmoe.broadcast.training.batches import Draws
from wdmoe.broadcast.training.training import Row, Training
from wdmoe.errors import ConfigError
from wdmoe.results.folder import MANIFEST, sha256_of, write_manifest

FORMAT = 1
STATE, MODEL = "state.safetensors", "model.safetensors"
_FILES = ("settings.json", "curve.csv", "curves.png", MODEL)
_PACKAGES = ("wdmoe", "torch", "numpy", "safetensors", "matplotlib")


def write_settings(folder: Path, model: ModelSettings, training: Training, draws: Draws) -> None:
    """Make the folder and write what will be done in it.

    Raises:
        ConfigError: the folder holds something else, or cannot be written.
    """
    told = {"model": asdict(model), "training": asdict(training), "batches": asdict(draws)}
    try:
        if folder.exists() and any(folder.iterdir()) and not (folder / "settings.json").exists():
            raise ConfigError(f"{folder} holds other files; name an empty or a new folder")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / MANIFEST).unlink(missing_ok=True)
        (folder / "settings.json").write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write to {folder}: {error.strerror or error}") from error


def write_results(folder: Path, codec: BroadcastCodec, curve: Sequence[Row], facts: dict[str, Any]) -> None:
    """Write everything but the settings and the state; the manifest comes last.

    Args:
        codec: the averaged weights.
        curve: at least one row, all with the same columns.
        facts: into the manifest: seed, data, time.
    Raises:
        ConfigError: the folder cannot be written.
    """
    try:
        with (folder / "curve.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(curve[0]))
            writer.writeheader()
            writer.writerows(curve)
        _draw_curves(curve, folder / "curves.png")
        save_model(codec, folder / MODEL)
        versions = {"python": platform.python_version(), **{name: version(name) for name in _PACKAGES}}
        hashes = {name: sha256_of(folder / name) for name in _FILES}
        manifest = {"format": FORMAT, "kind": "broadcast training", "versions": versions, **facts, "files": hashes}
        write_manifest(folder, manifest)
    except OSError as error:
        raise ConfigError(f"cannot write to {folder}: {error.strerror or error}") from error


def read_curve(folder: Path) -> list[Row]:
    """The learning curve of a finished run; ConfigError if it cannot be read."""
    file = folder / "curve.csv"
    try:
        with file.open(newline="", encoding="utf-8") as rows:
            return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(rows)]
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"{file} is not a learning curve that can be read: {error}") from error


def _draw_curves(curve: Sequence[Row], file: Path) -> None:
    """Loss on top, qualities below, over steps."""
    figure = Figure(figsize=(8, 6), dpi=120)
    FigureCanvasAgg(figure)
    top, bottom = figure.subplots(2, 1, sharex=True)
    steps = [row["step"] for row in curve]
    top.plot(steps, [row["loss"] for row in curve], marker=".", color="#4c78a8")
    top.set_ylabel("training loss")
    for name in (name for name in curve[0] if name.startswith("psnr")):
        bottom.plot(steps, [row[name] for row in curve], marker=".", label=name)
    bottom.set_ylabel("mean PSNR, dB")
    bottom.set_xlabel("steps")
    if bottom.lines:
        bottom.legend(fontsize=8)
    for axes in (top, bottom):
        axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(file, metadata={"Software": None})
