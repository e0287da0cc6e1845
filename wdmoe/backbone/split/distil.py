"""A split model learns from the dense model it was cut from: the spine of distillation, and its report."""

from __future__ import annotations

import hashlib
import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer

from wdmoe.backbone import text_windows
from wdmoe.backbone.perplexity import window_perplexity
from wdmoe.backbone.split.calibrate import dense_model
from wdmoe.backbone.split.checkpoint import no_progress_bar, write_checkpoint
from wdmoe.backbone.split.dense import DenseModel, read_dense, sha256_of
from wdmoe.backbone.split.distil_training import Trainer, Training
from wdmoe.backbone.split.settings import Progress, quiet
from wdmoe.errors import BundleError, ConfigError

_FAMILY = "granitemoeshared"
_RUN = 32  # tokens compared between training and held-out text
_RUNS_IN_BOTH = 0.05  # that may be the same


@dataclass(frozen=True, slots=True, kw_only=True)
class DistilSettings:
    """What is trained, on which text_windows, on which processor."""

    training: Training = Training()  # noqa: RUF009 - frozen
    text: tuple[Path, ...] = ()  # (): the shipped calibration text
    held_out: tuple[Path, ...] = ()  # (): the shipped held-out text
    tokens: int = 1 << 20  # of text_windows, at most; read again and again if steps need more
    held_out_tokens: int = 4096
    held_out_window: int = 512
    device: str = "auto"

    def __post_init__(self) -> None:
        if self.tokens < self.training.window:
            raise ConfigError(f"tokens must be at least one window ({self.training.window}), got {self.tokens}")
        if self.held_out_window < 8:
            raise ConfigError(f"held_out_window must be at least 8 tokens, got {self.held_out_window}")
        if self.held_out_tokens < self.held_out_window:
            raise ConfigError(f"held_out_tokens must be at least one window ({self.held_out_window})")
        both = {file.resolve() for file in self.text} & {file.resolve() for file in self.held_out}
        if both:
            raise ConfigError(f"{min(both)} is given to train on and to measure on; held-out text must be other text")


@dataclass(frozen=True, slots=True, kw_only=True)
class DistilReport:
    """What distillation did. Perplexities are over `tokens` held-out tokens, which were not trained on."""

    tokens: int
    dense_perplexity: float
    before_perplexity: float
    after_perplexity: float
    steps: int
    first_loss: float  # nats per token, mean of the first tenth of the steps
    last_loss: float  # the same of the last tenth
    trained_tokens: int
    steps_per_s: float  # of this run, a resumed one counts its own steps only
    device: str

    def as_json(self) -> dict[str, Any]:
        """Plain types, with both ratios to the dense perplexity."""
        before, after = (x / self.dense_perplexity for x in (self.before_perplexity, self.after_perplexity))
        return {**asdict(self), "before_ratio": before, "after_ratio": after}


def distil_checkpoint(
    dense: Path, moe: Path, out: Path, settings: DistilSettings, progress: Progress = quiet
) -> DistilReport:
    """Train the split model `moe` to answer as `dense` does, and write the result to `out`.

    Interrupted, it leaves `OUT.training`; the same call goes on from there. On CPU the same input, settings and thread
    count give the same weights, interrupted or not.

    Args:
        dense: folder of safetensors, or a GGUF file.
        moe: checkpoint folder that `split_checkpoint` made from it.
        out: folder to make; it appears only when complete.
        progress: told (stage, fraction done).
    Raises:
        BundleError: a model cannot be read, the two do not belong together, `out` exists or cannot be written.
        ConfigError: the device is not there, a text file is unusable or too short, or `OUT.training` is another run's.
    """
    if out.exists():
        raise BundleError(f"{out} exists already; give a new folder")
    device = _device(settings.device)
    progress("read", 0.0)
    student = read_split(moe)
    source = read_dense(dense)
    tokenizer = _same_tokenizer(source, student, moe)
    shipped, window = text_windows.SHIPPED_CALIBRATION, settings.training.window
    windows = _windows(settings.text, shipped, tokenizer, window, settings.tokens)
    held_out = _windows(
        settings.held_out, text_windows.SHIPPED_HELD_OUT, tokenizer, settings.held_out_window, settings.held_out_tokens
    )
    _refuse_overlap(windows, held_out)
    teacher = dense_model(source).to(device)
    trainer = Trainer(teacher, student.to(device), windows, settings.training)
    resume_file = out.with_name(f"{out.name}.training")
    trainer.restore(resume_file, _fingerprint(source, moe, windows, held_out))
    progress("read", 1.0)

    dense_perplexity = window_perplexity(teacher, held_out, lambda x: progress("measure dense", x))
    if trainer.before is None:
        trainer.before = window_perplexity(student, held_out, lambda x: progress("measure split", x))
    began, first = time.monotonic(), trainer.step
    trainer.run(resume_file, progress)
    report = DistilReport(
        steps_per_s=(trainer.step - first) / max(time.monotonic() - began, 1e-9),
        tokens=held_out.numel(),
        dense_perplexity=dense_perplexity,
        before_perplexity=trainer.before,
        after_perplexity=window_perplexity(student, held_out, lambda x: progress("measure distilled", x)),
        steps=trainer.step,
        first_loss=_mean(trainer.losses[: _tenth(trainer)]),
        last_loss=_mean(trainer.losses[-_tenth(trainer) :]),
        trained_tokens=trainer.step * settings.training.batch * settings.training.window,
        device=str(device),
    )
    progress("write", 0.0)
    write_checkpoint(student.cpu(), tokenizer, _card(source, moe, settings, report), out)
    resume_file.unlink(missing_ok=True)
    progress("write", 1.0)
    return report


def read_split(folder: Path) -> Any:
    """The split model as a float32 torch module.

    Raises:
        BundleError: it is no checkpoint that `wdmoe-node split` makes, or it cannot be read.
    """
    try:
        family = json.loads((folder / "config.json").read_text("utf-8"))["model_type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BundleError(f"{folder} has no readable config.json with a model_type") from error
    if family != _FAMILY:
        raise BundleError(f"{folder} is a {family!r} model, not the {_FAMILY} that `wdmoe-node split` makes")
    try:
        with no_progress_bar():
            model, loaded = AutoModelForCausalLM.from_pretrained(
                folder, local_files_only=True, dtype=torch.float32, output_loading_info=True
            )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise BundleError(f"{folder} cannot be read: {_first_line(error)}") from error
    if loaded["missing_keys"]:  # transformers would go on with random weights
        raise BundleError(f"{folder} has no tensor {min(loaded['missing_keys'])}")
    return model


def _same_tokenizer(source: DenseModel, student: Any, moe: Path) -> Any:
    """The split model's tokenizer, if both models are of one vocabulary."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(moe, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BundleError(f"{moe} has no readable tokenizer: {_first_line(error)}") from error
    ours, theirs = student.config, source.config
    for name in ("vocab_size", "hidden_size", "num_hidden_layers"):
        if getattr(ours, name) != getattr(theirs, name):
            raise BundleError(
                f"{moe} was not split from {source.name}: "
                f"its {name} is {getattr(ours, name)}, the dense model's {getattr(theirs, name)}"
            )
    if tokenizer.get_vocab() != source.tokenizer.get_vocab():
        raise BundleError(f"{moe} was not split from {source.name}: its tokenizer has another vocabulary")
    return tokenizer


def _windows(files: tuple[Path, ...], shipped: str, tokenizer: Any, length: int, tokens: int) -> torch.Tensor:
    return text_windows.token_windows(text_windows.read_documents(files, shipped), tokenizer, length, tokens // length)


def _refuse_overlap(windows: torch.Tensor, held_out: torch.Tensor) -> None:
    """The same text under two file names. A few runs may be in both: licences and system prompts are."""
    size = min(_RUN, held_out.shape[1])
    measured = held_out.flatten().tolist()
    runs = {tuple(measured[at : at + size]) for at in range(0, len(measured) - size + 1, size)}
    read = windows.flatten().tolist()
    seen = {run for at in range(len(read) - size + 1) if (run := tuple(read[at : at + size])) in runs}
    if len(seen) > _RUNS_IN_BOTH * len(runs):
        raise ConfigError(f"{len(seen)} of {len(runs)} pieces of the held-out text are in the training text")


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name not in ("cpu", "cuda"):
        raise ConfigError(f"device must be auto, cpu or cuda, got {name!r}")
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("there is no CUDA device that torch can use; give --device cpu")
    return torch.device(name)


def _fingerprint(source: DenseModel, moe: Path, *texts: torch.Tensor) -> list[str]:
    """What a run is made of, besides its settings."""
    read = [hashlib.sha256(windows.numpy().tobytes()).hexdigest() for windows in texts]
    return [source.sha256, sha256_of(sorted(moe.glob("*.safetensors"))), *read]


def _tenth(trainer: Trainer) -> int:
    return math.ceil(len(trainer.losses) / 10)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _card(source: DenseModel, moe: Path, settings: DistilSettings, report: DistilReport) -> str:
    """README.md of the checkpoint: where it comes from, how it was trained, figures."""
    texts = ", ".join(file.name for file in settings.text) or "shipped with wdmoe (public domain and MIT)"
    how, figures = settings.training, report.as_json()
    return f"""---
license: {source.licence or "unknown"}
library_name: transformers
tags: [mixture-of-experts, wdmoe]
---
# {source.name}, split into experts and distilled

Made by `tools/study/distil`: {moe.resolve().name}, which `wdmoe-node split` made from the dense model {source.name},
was trained to give the dense model's distribution of the next token (Kullback-Leibler divergence).

| | |
| --- | --- |
| source | {source.name}, SHA-256 of its weights `{source.sha256}` |
| licence | {source.licence or "not stated by the source"} (as the source) |
| trained | {how.train}: {", ".join(how.parts)} |
| steps, windows a step, tokens a window | {report.steps}, {how.batch}, {how.window} |
| text | {texts} |
| optimiser | AdamW, learning rate {how.learning_rate}, warm-up {how.warm_up} of the steps, then cosine |
| seed, device | {how.seed}, {report.device} |
| loss, first and last tenth | {report.first_loss:.4f}, {report.last_loss:.4f} nats a token |
| perplexity, dense | {report.dense_perplexity:.4f} |
| perplexity, split | {report.before_perplexity:.4f} ({figures["before_ratio"]:.4f} times) |
| perplexity, distilled | {report.after_perplexity:.4f} ({figures["after_ratio"]:.4f} times) |
| measured on | {report.tokens} tokens of other text_windows, windows of {settings.held_out_window} |
"""
