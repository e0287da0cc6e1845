"""The results folder of the comparison: what it holds, how it is written, and whether it is still what comes out.

codec.safetensors, single.safetensors   the weights that were measured, unless they are the shipped ones
qualities.npz                           of every pair, point, system and setting (float32)
fronts.csv, standings.csv, leads.csv    means, areas and quality at equal quality, lead of the joint codec
results.md                              the same for people
four-users.csv, four-users.md           the experiment with four users
*.png, *.svg                            figures
manifest.json                           versions, data, SHA-256 of every file; written last
"""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from wdmoe.broadcast.baselines.codecs import CODECS
from wdmoe.broadcast.datasets.pictures import PICTURES_SHA256, SPLIT_SHA256
from wdmoe.broadcast.quality.pareto_front import QUALITIES, Front
from wdmoe.broadcast.study.four_tables import PAGE as FOUR_PAGE
from wdmoe.broadcast.study.four_tables import SETS, page_text, sets_text
from wdmoe.broadcast.study.four_users import FourUsers
from wdmoe.broadcast.study.region_figures import draw_all
from wdmoe.broadcast.study.study import Fronts, Setting, all_settings, main_settings
from wdmoe.broadcast.study.tables import FRONTS, LEADS, PAGE, STANDINGS, texts_of
from wdmoe.errors import ConfigError
from wdmoe.results.folder import BROADCAST_KIND, MANIFEST, kind_of, sha256_of, write_manifest

FORMAT = 2  # 2: classical codecs on fading channels too
JOINT_FILE, SINGLE_FILE, ARRAYS = "codec.safetensors", "single.safetensors", "qualities.npz"
NEEDED = (ARRAYS, FRONTS, STANDINGS, LEADS, PAGE, SETS, FOUR_PAGE)
DATA = Path(__file__).resolve().parents[1] / "data"  # where the shipped weights lie
_PACKAGES = ("wdmoe", "torch", "numpy", "pillow", "pillow-heif", "pytorch-msssim", "matplotlib", "safetensors")
_SEPARATOR = "|"
_PART = "part-"


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What was asked for: all of it decides the figures."""

    pictures: int = 1000  # of the main comparison
    few: int = 100  # of the sweeps
    points: int = 11
    classical: tuple[str, ...] = tuple(CODECS)
    sweeps: bool = True
    photographs: bool = True

    def __post_init__(self) -> None:
        if unknown := set(self.classical) - set(CODECS):
            raise ConfigError(f"classical codecs must be of {', '.join(CODECS)}; got {', '.join(sorted(unknown))}")
        if self.points < 2:
            raise ConfigError(f"points must be at least 2, got {self.points}")

    def settings(self) -> list[Setting]:
        """All that small pictures are measured in."""
        if not self.sweeps:
            return main_settings(self.pictures, self.points)
        return all_settings(self.pictures, self.few, self.points)

    def main(self) -> list[str]:
        """Names of the settings of the main comparison."""
        return [each.name for each in main_settings(self.pictures)]


def start_folder(folder: Path, kind: str = BROADCAST_KIND, begun: Collection[str] = ()) -> None:
    """Make the folder; ConfigError if it holds something else or cannot be written.

    Args:
        folder: of results.
        kind: of them.
        begun: names that an interrupted run leaves there before the first part.
    """
    try:
        names = [file.name for file in folder.iterdir()] if folder.exists() else []
        begun_here = any(name.startswith(_PART) for name in names)  # parts are cleared when all else is written
        other = any(name not in begun for name in names)
        if other and not begun_here and kind_of(folder) != kind:
            raise ConfigError(f"{folder} holds other files; name an empty or a new folder")
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot write to {folder}: {error.strerror or error}") from error


class Parts:
    """Settings that were measured already, in the folder, so that an interrupted run goes on."""

    def __init__(self, folder: Path, plan: object, models: Mapping[str, Path]) -> None:
        self._folder = folder
        told = [f"format {FORMAT}", repr(plan), *(sha256_of(models[name]) for name in sorted(models))]
        self._key = hashlib.sha256(_SEPARATOR.join(told).encode()).hexdigest()

    def holds(self, name: str) -> bool:
        """Whether it was measured."""
        return self._file(name).exists()

    def measured(self, name: str, measure: Callable[[], Mapping[str, Fronts]]) -> dict[str, Fronts]:
        """What `measure` gives, or gave before."""
        file = self._file(name)
        if not file.exists():
            part = file.with_suffix(".new")
            with part.open("wb") as opened:
                np.savez_compressed(opened, **arrays_of(measure()))
            part.replace(file)
        return fronts_of(file)

    def _file(self, name: str) -> Path:
        mark = hashlib.sha256(f"{self._key}{name}".encode()).hexdigest()[:16]
        return self._folder / f"{_PART}{mark}.npz"

    def clear(self) -> None:
        """Delete them."""
        for file in self._folder.glob(f"{_PART}*"):
            file.unlink()


def save_results(
    folder: Path,
    plan: Plan,
    models: Mapping[str, Path],
    results: Mapping[str, Fronts],
    photographs: Mapping[str, Fronts],
    four: Mapping[str, FourUsers],
    facts: Mapping[str, Any],
) -> str:
    """Write everything into a folder of `start_folder`. Returns the page for people.

    Args:
        plan: what was run.
        models: files of the weights, by `JOINT_FILE` and `SINGLE_FILE`.
        results: of every setting, by its name.
        photographs: the same of the photographs, may be empty.
        four: of four users.
        facts: more for the manifest.
    """
    (folder / MANIFEST).unlink(missing_ok=True)
    weights = {name: sha256_of(file) for name, file in models.items()}
    copied = [name for name in models if _shipped(name, weights[name]) is None]
    for name in copied:
        (folder / name).write_bytes(models[name].read_bytes())
    whole = {**results, **photographs}
    np.savez_compressed(folder / ARRAYS, **arrays_of(whole))
    kept = fronts_of(folder / ARRAYS)  # with the digits that were stored
    texts = texts_of(kept, [*plan.main(), *photographs])
    texts |= {SETS: sets_text(four), FOUR_PAGE: page_text(four)}
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    figures = draw_all(folder, plan.settings(), kept, {name: kept[name] for name in photographs})
    names = [*copied, ARRAYS, *texts, *figures]
    manifest = {**facts, "weights": weights, **_manifest(plan, {name: sha256_of(folder / name) for name in names})}
    write_manifest(folder, manifest)
    return f"{texts[PAGE]}\n{texts[FOUR_PAGE]}"


def weights_of(folder: Path, manifest: Mapping[str, Any], name: str) -> Path:
    """The file of weights that were measured: the shipped one, or a copy in the folder.

    Raises:
        ConfigError: neither is the one that the manifest names.
    """
    told = manifest.get("weights")
    expected = told.get(name, "") if isinstance(told, dict) else ""
    file = _shipped(name, expected) or folder / name
    if not file.is_file() or sha256_of(file) != expected:
        raise ConfigError(f"{folder}: {name} is not the file that was measured, nor are the shipped weights")
    return file


def _shipped(name: str, sha256: str) -> Path | None:
    files = (DATA / name, DATA / JOINT_FILE)  # the joint codec may stand in for another
    return next((file for file in files if file.is_file() and sha256_of(file) == sha256), None)


def arrays_of(results: Mapping[str, Fronts]) -> dict[str, Any]:
    """Shares and qualities (point, pair, user, quality) by setting and system, in order."""
    found: dict[str, Any] = {}
    for setting, fronts in results.items():
        for system, front in fronts.items():
            key = f"{setting}{_SEPARATOR}{system}"
            found[f"{key}{_SEPARATOR}share"] = front.share
            values = np.stack([getattr(front, name) for name in QUALITIES], axis=-1)
            found[f"{key}{_SEPARATOR}quality"] = values.astype(np.float32)
    return found


def fronts_of(file: Path) -> dict[str, Fronts]:
    """The inverse of `arrays_of`.

    Raises:
        ConfigError: the file is not what was written.
    """
    found: dict[str, Fronts] = {}
    try:
        with np.load(file, allow_pickle=False) as arrays:
            for key in arrays.files:
                setting, system, what = key.split(_SEPARATOR)
                if what == "quality":
                    share = arrays[f"{setting}{_SEPARATOR}{system}{_SEPARATOR}share"]
                    front = Front(share, *np.moveaxis(arrays[key], -1, 0))
                    found.setdefault(setting, {})[system] = front
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{file} does not hold qualities: {error}") from error
    return found


def plan_of(folder: Path, manifest: Mapping[str, Any]) -> Plan:
    """What was asked for; ConfigError if the manifest does not say it."""
    try:
        told = dict(manifest["plan"])
        return Plan(
            pictures=int(told["pictures"]),
            few=int(told["few"]),
            points=int(told["points"]),
            classical=tuple(str(name) for name in told["classical"]),
            sweeps=bool(told["sweeps"]),
            photographs=bool(told["photographs"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{folder}: the manifest lacks a sound plan: {error}") from error


def _manifest(plan: Plan, files: dict[str, str]) -> dict[str, Any]:
    return {
        "kind": BROADCAST_KIND,
        "format": FORMAT,
        "plan": {
            "pictures": plan.pictures,
            "few": plan.few,
            "points": plan.points,
            "classical": list(plan.classical),
            "sweeps": plan.sweeps,
            "photographs": plan.photographs,
        },
        "pictures_sha256": PICTURES_SHA256,
        "split_sha256": SPLIT_SHA256,
        "versions": {"python": platform.python_version()} | {name: version(name) for name in _PACKAGES},
        "machine": platform.machine(),
        "files": files,
    }
