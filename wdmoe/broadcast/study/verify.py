"""Whether a results folder is still what its weights and this program give."""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from wdmoe.broadcast.codec.model_file import load_model
from wdmoe.broadcast.datasets.pictures import PICTURES_SHA256, SPLIT_SHA256
from wdmoe.broadcast.quality.pareto_front import QUALITIES, Front
from wdmoe.broadcast.study.four_tables import PAGE as FOUR_PAGE
from wdmoe.broadcast.study.four_tables import SETS, page_text, read_sets
from wdmoe.broadcast.study.four_users import measure_four
from wdmoe.broadcast.study.photo_study import run_photographs
from wdmoe.broadcast.study.results import (
    ARRAYS,
    FORMAT,
    JOINT_FILE,
    NEEDED,
    SINGLE_FILE,
    fronts_of,
    plan_of,
    weights_of,
)
from wdmoe.broadcast.study.study import Fronts, Material, Progress, Study, known_material
from wdmoe.broadcast.study.tables import texts_of
from wdmoe.errors import ConfigError
from wdmoe.results.folder import BROADCAST_KIND, check_files, read_manifest

# A sum in another order may move a few pixels by one level: far below what the tables show.
_CLOSE = {"psnr_db": 0.02, "ssim": 2e-3, "ms_ssim": 2e-3}


@dataclass(frozen=True, slots=True)
class Checked:
    """What was run again."""

    settings: int
    pairs: int
    photographs: bool


def checked_manifest(folder: Path, kind: str, number: int, what: str, needed: Collection[str]) -> dict[str, Any]:
    """The manifest of a folder whose files are what it lists.

    Args:
        folder: of results.
        kind: of them.
        number: of their format.
        what: they are called in an error.
        needed: names that must be listed.
    Raises:
        ConfigError: other results, another format, a changed file, or made from other pictures.
    """
    manifest = read_manifest(folder)
    if manifest.get("kind") != kind or manifest.get("format") != number:
        raise ConfigError(f"{folder}: not {what} of this program's format {number}")
    check_files(folder, manifest, needed)
    if (manifest.get("pictures_sha256"), manifest.get("split_sha256")) != (PICTURES_SHA256, SPLIT_SHA256):
        raise ConfigError(f"{folder}: made from other pictures, or another division of them")
    return manifest


def verify_results(
    folder: Path, pairs: int | None = None, progress: Progress | None = None, material: Material | None = None
) -> Checked:
    """Check hashes, write all texts again from the qualities, and run pairs of every setting again.

    Args:
        pairs: only the first so many of every setting, and of photographs without classical codecs; none: all.
        progress: told what and how far.
        material: the pictures; the known ones unless given.
    Raises:
        ConfigError: a file was changed, or a figure differs; one line says which.
    """
    manifest = checked_manifest(folder, BROADCAST_KIND, FORMAT, "broadcast results", NEEDED)
    plan = plan_of(folder, manifest)
    kept = fronts_of(folder / ARRAYS)
    names = [each.name for each in plan.settings()]
    photographs = [name for name in kept if name not in names]
    if not set(names) <= set(kept) or bool(photographs) != plan.photographs:
        raise ConfigError(f"{folder / ARRAYS} does not hold the settings of the plan")
    _check_texts(folder, kept, [*plan.main(), *photographs])
    _run_again(folder, manifest, kept, pairs, progress, material)
    return Checked(len(names), plan.pictures if pairs is None else min(pairs, plan.pictures), plan.photographs)


def _check_texts(folder: Path, kept: Mapping[str, Fronts], shown: list[str]) -> None:
    four = page_text(read_sets((folder / SETS).read_text(encoding="utf-8")))
    for name, text in {**texts_of(kept, shown), FOUR_PAGE: four}.items():
        if (folder / name).read_text(encoding="utf-8") != text:
            raise ConfigError(f"{folder / name} does not follow from the figures of every pair in the folder")


def _run_again(
    folder: Path,
    manifest: Mapping[str, Any],
    kept: Mapping[str, Fronts],
    pairs: int | None,
    progress: Progress | None,
    material: Material | None,
) -> None:
    plan = plan_of(folder, manifest)
    with tempfile.TemporaryDirectory() as cache:  # ladders are built again too
        study = Study(
            material=material or known_material(),
            joint=load_model(weights_of(folder, manifest, JOINT_FILE)),
            single=load_model(weights_of(folder, manifest, SINGLE_FILE)),
            classical=plan.classical,
            cache=Path(cache),
        )
        settings = plan.settings()
        for place, setting in enumerate(settings):
            compare_fronts(folder, setting.name, kept[setting.name], study.run(setting, pairs))
            if progress is not None:
                progress(setting.name, (place + 1) / (len(settings) + 1))
        if plan.photographs:
            classical = plan.classical if pairs is None else ()
            for name, fronts in run_photographs(study, classical, pairs).items():
                compare_fronts(folder, name, kept[name], fronts, all_systems=pairs is None)
        _four_again(folder, study, plan.few, pairs)


def _four_again(folder: Path, study: Study, pictures: int, sets: int | None) -> None:
    for system, each in read_sets((folder / SETS).read_text(encoding="utf-8")).items():
        now = measure_four(study, pictures, system, each.chosen, sets)
        if not np.all(np.abs(each.psnr_db[: len(now)] - now) <= _CLOSE["psnr_db"]):
            raise ConfigError(f"{folder / SETS}: running {system} again gives other figures")


def compare_fronts(folder: Path, setting: str, kept: Fronts, again: Fronts, all_systems: bool = True) -> None:
    """ConfigError where `again`, of the first pairs, has other figures; or other systems, unless some are enough."""
    if all_systems and set(kept) != set(again):
        raise ConfigError(f"{folder}: {setting} was measured with other systems")
    for system, now in again.items():
        if system not in kept:
            raise ConfigError(f"{folder}: {setting} lacks {system}")
        was = kept[system].of(slice(0, now.psnr_db.shape[1]))
        for name in QUALITIES:
            _compare_quality(f"{folder}: {setting}, {system}", name, was, now)


def _compare_quality(where: str, name: str, was: Front, now: Front) -> None:
    old, new = (np.asarray(getattr(each, name), dtype=np.float64) for each in (was, now))
    if old.shape != new.shape:
        raise ConfigError(f"{where} has {old.shape} points, pairs and users; running it again gives {new.shape}")
    off = np.abs(old - new)
    off[np.isnan(old) & np.isnan(new)] = 0
    if not np.all(off <= _CLOSE[name]):  # also refuses a NaN on one side
        point, pair, user = np.unravel_index(int(np.argmax(np.nan_to_num(off, nan=np.inf))), off.shape)
        raise ConfigError(
            f"{where}, point {point}, pair {pair}, user {user + 1}: {name} is {old[point, pair, user]:.4f}; running it "
            f"again gives {new[point, pair, user]:.4f}"
        )
