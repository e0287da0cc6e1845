"""The results folder of the comparison of losses: what it holds, and whether it is still what comes out.

sum, weighted, region                experiment folders of the losses, see `wdmoe.broadcast.training.run_folder`
start                                model.safetensors: what all of them began with
qualities.npz                        of every pair, point, system and setting (float32)
fronts.csv, losses.csv, curves.csv   mean qualities, figures of every system, learning curves
losses.md, losses.png, losses.svg    the same for people
manifest.json                        plan, versions, SHA-256 of every file above and of the models; written last

Without the experiment folders the rest can still be checked, but nothing run again.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from wdmoe.broadcast.codec.model_file import load_model
from wdmoe.broadcast.datasets.pictures import PICTURES_SHA256, SPLIT_SHA256
from wdmoe.broadcast.study.loss_figures import FIGURES, draw_losses
from wdmoe.broadcast.study.loss_plan import SYSTEMS, LossPlan, Pool, known_pool, loss_settings
from wdmoe.broadcast.study.loss_study import run_setting
from wdmoe.broadcast.study.loss_tables import CURVES, LOSSES_CSV, PAGE, Results, curves_text, loss_texts
from wdmoe.broadcast.study.results import ARRAYS, arrays_of, fronts_of, start_folder
from wdmoe.broadcast.study.study import Progress, Setting
from wdmoe.broadcast.study.tables import FRONTS
from wdmoe.broadcast.study.verify import checked_manifest, compare_fronts
from wdmoe.broadcast.training.run_folder import MODEL
from wdmoe.broadcast.training.training import Row
from wdmoe.errors import ConfigError
from wdmoe.results.folder import LOSSES_KIND, MANIFEST, sha256_of, write_manifest

FORMAT = 1
_NEEDED = (ARRAYS, FRONTS, LOSSES_CSV, CURVES, PAGE)
_PACKAGES = ("wdmoe", "torch", "numpy", "pytorch-msssim", "matplotlib", "safetensors")


@dataclass(frozen=True, slots=True)
class CheckedLosses:
    """What was run again."""

    systems: tuple[str, ...]  # whose weights lie in the folder
    settings: int
    pairs: int


def start_losses(folder: Path) -> None:
    """Make the folder, or go on in it; ConfigError if it holds something else or cannot be written."""
    start_folder(folder, LOSSES_KIND, (*SYSTEMS, *_NEEDED, *FIGURES))


def save_losses(
    folder: Path,
    plan: LossPlan,
    models: Mapping[str, Path],
    results: Results,
    curves: Mapping[str, Sequence[Row]],
    facts: Mapping[str, Any],
) -> str:
    """Write everything into a folder of `start_losses`, where the models lie already. Returns the page for people.

    Args:
        folder: of the results.
        plan: what was run.
        models: of all systems.
        results: fronts of all systems by name of the setting.
        curves: learning curves by system.
        facts: more for the manifest.
    """
    (folder / MANIFEST).unlink(missing_ok=True)
    manifest = {**facts, **_manifest(plan, {name: sha256_of(file) for name, file in models.items()})}
    np.savez_compressed(folder / ARRAYS, **arrays_of(results))
    kept = fronts_of(folder / ARRAYS)  # with the digits that were stored
    texts = {**loss_texts(kept, manifest), CURVES: curves_text(curves)}
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    figures = draw_losses(folder, plan.pictures, plan.points, kept, curves)
    manifest["files"] = {name: sha256_of(folder / name) for name in (ARRAYS, *texts, *figures)}
    write_manifest(folder, manifest)
    return texts[PAGE]


def verify_losses(
    folder: Path, pairs: int | None = None, progress: Progress | None = None, pool: Pool | None = None
) -> CheckedLosses:
    """Check hashes, write the texts again from the qualities, and run pairs of every setting again.

    Args:
        folder: of the results.
        pairs: only the first so many of every setting; none: all.
        progress: told what and how far.
        pool: the pictures; the known ones unless given.
    Raises:
        ConfigError: a file was changed, or a figure differs; one line says which.
    """
    manifest = checked_manifest(folder, LOSSES_KIND, FORMAT, "a comparison of losses", _NEEDED)
    kept = fronts_of(folder / ARRAYS)
    settings, weights = _told(folder, manifest, kept)
    there = {name: folder / name / MODEL for name in weights if (folder / name / MODEL).is_file()}
    for name, file in there.items():
        if sha256_of(file) != weights[name]:
            raise ConfigError(f"{file} is not the file that was measured")
    if there:
        _run_again(folder, there, settings, kept, pairs, progress, pool or known_pool())
    most = settings[0].pictures
    return CheckedLosses(tuple(there), len(settings), most if pairs is None else min(pairs, most))


def _told(folder: Path, manifest: Mapping[str, Any], kept: Results) -> tuple[list[Setting], dict[str, str]]:
    """Settings and SHA-256 of the models by system; ConfigError unless qualities and texts go with the manifest."""
    try:
        settings = loss_settings(int(manifest["plan"]["pictures"]), int(manifest["plan"]["points"]))
        weights = {str(name): str(sha256) for name, sha256 in manifest["weights"].items()}
        texts = loss_texts(kept, manifest)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{folder}: the manifest lacks a sound plan: {error}") from error
    whole = [each.name for each in settings] == list(kept) and set(weights) <= set(SYSTEMS)
    if not whole or any(set(fronts) != set(weights) for fronts in kept.values()):
        raise ConfigError(f"{folder / ARRAYS} does not hold the settings and systems of the plan")
    for name, text in texts.items():
        if (folder / name).read_text(encoding="utf-8") != text:
            raise ConfigError(f"{folder / name} does not follow from the figures of every pair in the folder")
    return settings, weights


def _run_again(
    folder: Path,
    models: Mapping[str, Path],
    settings: Sequence[Setting],
    kept: Results,
    pairs: int | None,
    progress: Progress | None,
    pool: Pool,
) -> None:
    for number, (name, file) in enumerate(models.items()):
        codec = load_model(file)
        for place, setting in enumerate(settings):
            if progress is not None:
                progress(f"{name}, {setting.name}", (number + place / len(settings)) / len(models))
            again = {name: run_setting(codec, pool, setting, pairs)}
            compare_fronts(folder, setting.name, kept[setting.name], again, all_systems=False)


def _manifest(plan: LossPlan, weights: Mapping[str, str]) -> dict[str, Any]:
    return {
        "kind": LOSSES_KIND,
        "format": FORMAT,
        "plan": plan.told(),
        "weights": dict(weights),
        "pictures_sha256": PICTURES_SHA256,
        "split_sha256": SPLIT_SHA256,
        "versions": {"python": platform.python_version()} | {name: version(name) for name in _PACKAGES},
        "machine": platform.machine(),
    }
