"""The results folder: what it holds, how it is written, and whether it is still what the scenario gives.

scenario.toml   as it was run, but for seed and draws, which the manifest has
draws.csv       every draw of every variant, with all digits
summary.csv     means and 95 % intervals by variant
*.png, *.svg    figures
manifest.json   versions, seed, draws, SHA-256 of the trace and of every file above
"""

from __future__ import annotations

import csv
import io
import math
import platform
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from wdmoe.errors import ConfigError
from wdmoe.results.folder import (
    MANIFEST,
    SIMULATION_KIND,
    check_files,
    kind_of,
    read_manifest,
    sha256_of,
    write_manifest,
)
from wdmoe.simulation.figures import draw_figures
from wdmoe.simulation.replay import OUTCOMES
from wdmoe.simulation.scenario import Scenario
from wdmoe.simulation.scenario_file import find_trace, parse_scenario
from wdmoe.simulation.statistics import Summary, records_text, summarise
from wdmoe.simulation.study import Progress, Study, run_study

# Writes more files into the folder; gives their names, and what the manifest shall say beside them.
Beside = Callable[[Path, Sequence[Summary]], tuple[list[str], dict[str, Any]]]

FORMAT = 1
_NEEDED = ("scenario.toml", "draws.csv", "summary.csv")
_PACKAGES = ("wdmoe", "numpy", "scipy", "joblib", "matplotlib")
_CLOSE = 1e-9  # relative: what another processor's logarithms may change


def is_results(folder: Path) -> bool:
    """Whether the folder says that it holds results."""
    return kind_of(folder) == SIMULATION_KIND


def save_results(study: Study, folder: Path, beside: Beside | None = None, figures: bool = True) -> list[Summary]:
    """Write everything; the manifest comes last, so a folder without one is not finished.

    Args:
        beside: writes more, before the manifest; the hashes of its files are checked with the others.
        figures: draw them too.
    Raises:
        ConfigError: the folder holds something else, or cannot be written.
    """
    if folder.exists() and any(folder.iterdir()) and not is_results(folder):
        raise ConfigError(f"{folder} holds other files; name an empty or a new folder")
    summaries = summarise(study)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MANIFEST).unlink(missing_ok=True)
    (folder / "scenario.toml").write_text(study.scenario.source, encoding="utf-8")
    (folder / "draws.csv").write_text(draws_text(study), encoding="utf-8")
    (folder / "summary.csv").write_text(records_text(Summary, summaries), encoding="utf-8")
    drawn = draw_figures(study, summaries, folder) if figures else []
    names = ["scenario.toml", "draws.csv", "summary.csv", *(figure.name for figure in drawn)]
    more, about = beside(folder, summaries) if beside is not None else ([], {})
    manifest = about | _manifest(study.scenario, {name: sha256_of(folder / name) for name in (*names, *more)})
    write_manifest(folder, manifest)
    return summaries


def verify_results(
    folder: Path, workers: int = -1, progress: Progress | None = None, draws: int | None = None
) -> tuple[Scenario, int]:
    """Check hashes, run the scenario again and compare every figure.

    Args:
        draws: run only so many again, the first; the summary is still checked against all of draws.csv.
    Returns:
        The scenario, and how many draws were run again.
    Raises:
        ConfigError: a file was changed, the trace is another one, or a figure differs; one line says which.
    """
    manifest = read_manifest(folder)
    if manifest.get("kind") != SIMULATION_KIND or manifest.get("format") != FORMAT:
        raise ConfigError(f"{folder}: not results of this program's format {FORMAT}")
    check_files(folder, manifest, _NEEDED)
    scenario = parse_scenario((folder / "scenario.toml").read_text(encoding="utf-8"))
    try:
        scenario = replace(scenario, seed=int(manifest["seed"]), draws=int(manifest["draws"]))
        trace = str(manifest["trace"])
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{folder}: the manifest lacks a sound {error}") from error
    if sha256_of(find_trace(scenario.model.trace)) != trace:
        raise ConfigError(f"{folder}: trace {scenario.model.trace} is not the one that was used")
    count = scenario.draws if draws is None else min(draws, scenario.draws)
    again = run_study(replace(scenario, draws=count), workers, progress)
    kept = _read_draws(folder / "draws.csv", scenario)
    _compare(folder / "draws.csv", draws_text(kept), draws_text(again), whole=count == scenario.draws)
    summary = (folder / "summary.csv").read_text(encoding="utf-8")
    _compare(folder / "summary.csv", summary, records_text(Summary, summarise(kept)))
    return scenario, count


def draws_text(study: Study) -> str:
    """draws.csv: shortest digits that give each float64 back."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["draw", "variant", *OUTCOMES])
    for draw, row in enumerate(study.values):
        for variant, values in zip(study.scenario.variants, row, strict=True):
            writer.writerow([draw, variant.name, *(repr(float(value)) for value in values)])
    return out.getvalue()


def _manifest(scenario: Scenario, files: dict[str, str]) -> dict[str, Any]:
    return {
        "kind": SIMULATION_KIND,
        "format": FORMAT,
        "scenario": scenario.name,
        "seed": scenario.seed,
        "draws": scenario.draws,
        "trace": sha256_of(find_trace(scenario.model.trace)),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in _PACKAGES},
        "machine": platform.machine(),
        "files": files,
    }


def _read_draws(file: Path, scenario: Scenario) -> Study:
    rows = list(csv.reader(io.StringIO(file.read_text(encoding="utf-8"))))[1:]
    shape = (scenario.draws, len(scenario.variants), len(OUTCOMES))
    try:
        values = np.array([[float(cell) for cell in row[2:]] for row in rows], np.float64).reshape(shape)
    except ValueError as error:
        raise ConfigError(f"{file} does not hold {shape[0]} draws of {shape[1]} variants") from error
    return Study(scenario, values)


def _compare(file: Path, kept: str, again: str, whole: bool = True) -> None:
    """Equal to the digit; or, on another processor, within what its elementary functions may differ by."""
    old, new = list(csv.reader(io.StringIO(kept))), list(csv.reader(io.StringIO(again)))
    if whole and len(old) != len(new):
        raise ConfigError(f"{file} has {len(old)} lines; running it again gives {len(new)}")
    for number, (was, now) in enumerate(zip(old, new, strict=False), 1):
        if len(was) != len(now) or not all(map(_same, was, now)):
            raise ConfigError(f"{file}, line {number}: {','.join(was)}; running it again gives {','.join(now)}")


def _same(was: str, now: str) -> bool:
    if was == now:
        return True
    try:
        first, second = float(was), float(now)
    except ValueError:
        return False
    return math.isclose(first, second, rel_tol=_CLOSE) or (np.isnan(first) and np.isnan(second))
