"""A made-up model of a few kilobytes, and what it says: answers known from the undivided model in this process."""

from __future__ import annotations

import contextlib
import io
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SHAPES: dict[str, dict[str, Any]] = {
    "small": {"max_position_embeddings": 1024},
    "wide": {"max_position_embeddings": 1024, "num_local_experts": 64, "num_hidden_layers": 4},
}
PROMPT_TOKENS = 160
ANSWER_TOKENS = 128  # the longest answer that is compared
QUESTIONS = 3
MOST_QUESTIONS = 20  # tried; of these the clearest
CLEAR = 2e-3  # lead of a token over the next, so that sums in another order cannot turn it; float32 moves by 1e-6
SEED = 20240623  # of the model: a run's own seed is for its faults


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt, and the tokens that greedy decoding gives."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Model:
    """A bundle and questions whose answers are known."""

    name: str
    checkpoint: Path
    bundle: Path
    questions: tuple[Question, ...]


def make_model(name: str, folder: Path) -> Model:
    """Write a checkpoint and its bundle into `folder`, and ask the undivided model. `default`: the default model."""
    checkpoint, bundle = _default() if name == "default" else made_up(name, folder)
    questions = tuple(_questions(checkpoint, random.Random(SEED)))
    return Model(name, checkpoint, bundle, questions)


def made_up(name: str, folder: Path) -> tuple[Path, Path]:
    """Checkpoint and bundle of a random model, whose heads have a size that graphs take: as most users' models."""
    from tests.lab.families import HEADS, save_tiny
    from wdmoe.backbone.export.export import ExportSettings, export_bundle

    with contextlib.redirect_stderr(io.StringIO()):  # progress bars of the exporter
        checkpoint = save_tiny("mixtral", folder / f"{name}-checkpoint", SEED, **HEADS, **SHAPES[name])
        export_bundle(checkpoint, folder / f"{name}-bundle", ExportSettings(name="made-up"))
    return checkpoint, folder / f"{name}-bundle"


def _default() -> tuple[Path, Path]:
    from wdmoe.backbone.default.bundle import default_bundle
    from wdmoe.backbone.default.model import default_checkpoint

    return default_checkpoint(), default_bundle()


def _questions(checkpoint: Path, rng: random.Random) -> list[Question]:
    from tests.lab.families import reference

    model = reference(checkpoint)
    model.generation_config.eos_token_id = None
    found: list[tuple[float, Question]] = []
    while sum(lead >= CLEAR for lead, _ in found) < QUESTIONS and len(found) < MOST_QUESTIONS:
        prompt = tuple(rng.randrange(1, 250) for _ in range(PROMPT_TOKENS))
        answer, lead = _greedy(model, prompt)
        found.append((lead, Question(prompt, answer)))
    found.sort(key=lambda each: -each[0])
    return [question for _, question in found[:QUESTIONS]]


def _greedy(model: Any, prompt: tuple[int, ...]) -> tuple[tuple[int, ...], float]:
    """The answer, and the smallest lead of a chosen token over the second."""
    import torch

    ids = torch.tensor([prompt])
    with torch.no_grad():
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=ANSWER_TOKENS,
            do_sample=False,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_logits=True,
        )
    best = torch.stack(out.logits)[:, 0].topk(2).values
    return tuple(out.sequences[0, len(prompt) :].tolist()), float((best[:, 0] - best[:, 1]).min())
