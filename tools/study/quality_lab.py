"""What the tools that measure quality share: what is read and asked, of which model, and where it is written down."""

from __future__ import annotations

import argparse
import hashlib
import math
import platform
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from wdmoe.backbone import text_windows as texts
from wdmoe.backbone.default.model import default_checkpoint
from wdmoe.backbone.evaluation.analog_downlink import fit_spectra
from wdmoe.backbone.evaluation.multiple_choice import DELIMITER, Question, read_bigbench, read_questions
from wdmoe.cli.progress import CountProgress, StageProgress
from wdmoe.errors import BundleError, ConfigError
from wdmoe.simulation.quality import Measured, Quality, measure, qualities
from wdmoe.simulation.scenario import Scenario, Variant
from wdmoe.wireless.analog_code import Spectrum

_FEWEST, _MOST = 64, 1024  # tokens that a window may have to be as long as the scenario's pass
_LONG = 512  # else
_FITTED_TOKENS = 6144  # of calibration text, for codes that are fitted to hidden vectors


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Model, text and questions."""
    parser.add_argument("--model", default="default", help="folder of a transformers MoE checkpoint")
    parser.add_argument(
        "--text", type=Path, action="append", default=[], help="text to read (default: the shipped held-out text)"
    )
    parser.add_argument(
        "--tokens", type=int, default=4096, help="tokens of text in all; 0: no perplexity (default 4096)"
    )
    parser.add_argument("--window", type=int, help="tokens in a window (default: the scenario's pass, or 512)")
    asked = parser.add_mutually_exclusive_group()
    asked.add_argument(
        "--questions", type=Path, metavar="JSONL", help="file with a line of query, choices and gold for each question"
    )
    asked.add_argument("--bigbench", metavar="TASK", help="a task of the package bigbench, or its task.json")
    parser.add_argument("--delimiter", default=DELIMITER, help="text between query and choice of --questions")
    parser.add_argument(
        "--most-questions", type=int, default=200, help="largest number of questions; the seed draws them (default 200)"
    )
    parser.add_argument("--seed", type=int, help="seed of draws and questions (default: the scenario's)")


class Subject:
    """The model, what it reads and what it is asked, as the flags say."""

    def __init__(self, flags: argparse.Namespace, scenario: Scenario) -> None:
        if flags.tokens < 0 or flags.most_questions < 0 or (flags.window is not None and flags.window < 2):
            raise ConfigError("--tokens and --most-questions must not be negative, --window must be at least 2")
        self._scenario = scenario
        self._asked = flags.questions or flags.bigbench
        self.questions = _chosen(_questions(flags), flags.most_questions, scenario.seed)
        with StageProgress("default model") as bar:
            self.folder = default_checkpoint(bar.reach) if flags.model == "default" else Path(flags.model)
        self._model, self._tokenizer = _loaded(self.folder)
        self.window = flags.window or _window(scenario)
        self._texts = flags.text
        self._spectra: list[Spectrum] = []
        self.windows = _windows(flags, self._tokenizer, self.window)
        if not len(self.windows) and not self.questions:
            raise ConfigError("nothing to measure: --tokens is 0 and there are no --questions")

    def measure(self, variants: tuple[Variant, ...], scenario: Scenario | None = None) -> Measured:
        """All of it under each variant, of another scenario where one is given."""
        analog = [each.policy.levers.analog for each in variants]
        if not self._spectra and any(each is not None and each.transform == "klt" for each in analog):
            self._spectra = self._fitted()
        with CountProgress("quality", "windows and questions") as bar:
            return measure(
                scenario or self._scenario,
                variants,
                self._model,
                self._tokenizer,
                self.windows,
                self.questions,
                bar.reach,
                self._spectra,
            )

    def _fitted(self) -> list[Spectrum]:
        """To the text that the model was calibrated on, never to what it is tested with."""
        documents = texts.read_documents((), texts.SHIPPED_CALIBRATION)
        read = texts.token_windows(documents, self._tokenizer, self.window, _FITTED_TOKENS // self.window)
        windows = torch.from_numpy(read)
        with StageProgress("principal directions") as bar:
            found = fit_spectra(self._model, windows)
            bar.reach("done", 1.0)
        return found

    def about(self) -> dict[str, Any]:
        """All that the figures depend on, but for the scenario itself."""
        return {
            "model": self.folder.name,
            "text": [_named(file) for file in self._texts] or texts.SHIPPED_HELD_OUT,
            "window": self.window,
            "windows": len(self.windows),
            "questions": _named(Path(self._asked)) if self._asked else None,
            "asked": len(self.questions),
            "seed": self._scenario.seed,
            "versions": {"python": platform.python_version()}
            | {name: version(name) for name in ("wdmoe", "torch", "transformers", "numpy")},
            "machine": platform.machine(),
        }


def as_json(measured: Measured) -> dict[str, Any]:
    """Summaries and every single value; null where a number is not finite or not known."""
    values: dict[str, Any] = _finite(
        {
            "scenario": measured.scenario.name,
            "variants": [asdict(each) for each in qualities(measured)],
            "nats_of_windows": measured.nats.tolist(),
            "latency_s_of_windows": measured.latency_s.tolist(),
            "right": measured.right.astype(int).tolist(),
            "right_normalised": measured.right_normalised.astype(int).tolist(),
        }
    )
    return values


def table(found: list[Quality], questions: bool) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Columns and rows for people."""
    columns: tuple[str, ...] = ("variant", "perplexity", "times baseline", "dropped, %")
    if questions:
        columns += ("right, %", "change", "by bytes, %", "change")
    rows: list[tuple[str, ...]] = []
    for number, each in enumerate(found):
        spread = f"{each.perplexity:.2f} ({each.perplexity_low:.2f} to {each.perplexity_high:.2f})"
        row: tuple[str, ...] = (each.variant, spread)
        row += ("baseline" if not number else f"{each.ratio:.4f} ({each.ratio_low:.4f} to {each.ratio_high:.4f})",)
        row += (f"{100 * each.dropped_weight:.2f}",)
        if questions:
            row += (_percent(each.accuracy, each.accuracy_ci), _percent(each.accuracy_change, each.accuracy_change_ci))
            row += (_percent(each.normalised, each.normalised_ci),)
            row += (_percent(each.normalised_change, each.normalised_change_ci),)
        rows.append(row)
    return columns, rows


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _percent(value: float, half: float) -> str:
    return f"{100 * value:.1f} ± {100 * half:.1f}"


def _questions(flags: argparse.Namespace) -> list[Question]:
    if flags.questions is not None:
        return read_questions(flags.questions, flags.delimiter)
    return read_bigbench(flags.bigbench) if flags.bigbench else []


def _chosen(questions: list[Question], most: int, seed: int) -> list[Question]:
    if len(questions) <= most:
        return questions
    return [questions[i] for i in np.sort(np.random.default_rng(seed).permutation(len(questions))[:most])]


def _loaded(folder: Path) -> tuple[Any, Any]:
    logging.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        return AutoModelForCausalLM.from_pretrained(folder, local_files_only=True).eval(), tokenizer
    except (OSError, ValueError) as error:
        raise BundleError(f"{folder} is no checkpoint that transformers loads: {str(error).splitlines()[0]}") from error


def _window(scenario: Scenario) -> int:
    return scenario.model.tokens if _FEWEST <= scenario.model.tokens <= _MOST else _LONG


def _windows(flags: argparse.Namespace, tokenizer: Any, length: int) -> torch.Tensor:
    if not flags.tokens:
        return torch.zeros(0, length, dtype=torch.long)
    if flags.tokens < length:
        raise ConfigError(f"--tokens {flags.tokens} does not fill a window of {length}")
    documents = texts.read_documents(flags.text, texts.SHIPPED_HELD_OUT)
    return torch.from_numpy(texts.token_windows(documents, tokenizer, length, flags.tokens // length))


def _named(file: Path) -> dict[str, str | None]:
    """A file's name and hash, not where it lies."""
    digest = hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else None
    return {"name": file.name, "sha256": digest}
