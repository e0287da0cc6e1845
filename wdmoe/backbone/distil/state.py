"""The file that distillation goes on from after an interruption: safetensors, so that reading it runs no code."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from wdmoe.backbone.distil.student import Cut
from wdmoe.backbone.distil.training import Trainee
from wdmoe.backbone.split.dense import Weights
from wdmoe.errors import BundleError, ConfigError

_KINDS = ("weight", "first", "second")


@dataclass(slots=True)
class Run:
    """A distillation under way."""

    cut: Cut
    trainee: Trainee
    curve: list[dict[str, Any]] = field(default_factory=list)  # what was measured on the way


def save_run(file: Path, run: Run, fingerprint: list[str]) -> None:
    """Write the file whole or not at all.

    Args:
        fingerprint: names the model, the text and the settings.
    Raises:
        BundleError: it cannot be written.
    """
    trainee = run.trainee
    tensors: Weights = {"owners": run.cut.owners, "routers": run.cut.routers}
    for kind, values in zip(_KINDS, (trainee.weights, trainee.first, trainee.second), strict=True):
        tensors.update({f"{kind} {name}": value.detach() for name, value in values.items()})
    marks = {"fingerprint": fingerprint, "step": trainee.step, "seconds": trainee.seconds, "curve": run.curve}
    part = file.with_name(f"{file.name}.part")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, part, {"run": json.dumps({**marks, "top_k": run.cut.top_k})})
        os.replace(part, file)
    except (OSError, SafetensorError) as error:
        part.unlink(missing_ok=True)
        raise BundleError(f"cannot write {file}: {error}") from error


def load_run(file: Path, fingerprint: list[str]) -> Run | None:
    """The run to go on with, or None if there is no file.

    Raises:
        ConfigError: the file is of another run, or damaged.
    """
    if not file.exists():
        return None
    kinds: dict[str, Weights] = {kind: {} for kind in _KINDS}
    try:
        with safe_open(file, framework="pt") as state:
            marks = json.loads(state.metadata()["run"])
            if marks["fingerprint"] != fingerprint:
                raise ConfigError(f"{file} is of a run on another model, text or settings; delete it to start anew")
            for key in state.keys():  # noqa: SIM118 - not a mapping
                kind, _, name = key.partition(" ")
                if name:
                    kinds[kind][name] = state.get_tensor(key)
            cut = Cut(state.get_tensor("owners"), state.get_tensor("routers"), marks["top_k"])
        weights, first, second = kinds.values()
        trainee = Trainee(weights, first, second, marks["step"], marks["seconds"])
        return Run(cut, trainee, marks["curve"])
    except OSError as error:  # says nothing about the file
        raise ConfigError(f"{file} cannot be read: {error.strerror or error}") from error
    except (SafetensorError, RuntimeError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{file} cannot be read; delete it to start anew") from error
