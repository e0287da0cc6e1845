"""A split model learns to answer as the dense model that it is cut from; the result is a set of decisions.

What is trained: low-rank changes of the dense matrices, norms, and one factor per neuron. What is not: which neuron
goes where, and the routers, whose scores policies read as predictions of the experts' output norms.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from wdmoe.backbone import text_windows
from wdmoe.backbone.distil.low_rank import eight_bits
from wdmoe.backbone.distil.start import decide_start
from wdmoe.backbone.distil.state import Run, load_run, save_run
from wdmoe.backbone.distil.student import FastLlama, trainable
from wdmoe.backbone.distil.training import Trainee, Trainer, Training, working_copies
from wdmoe.backbone.perplexity import window_perplexity
from wdmoe.backbone.split.calibrate import dense_model
from wdmoe.backbone.split.checkpoint import moe_model
from wdmoe.backbone.split.decided import apply_decisions
from wdmoe.backbone.split.decisions import MATRICES, Decisions
from wdmoe.backbone.split.dense import DenseModel, Weights, read_dense
from wdmoe.backbone.split.settings import Progress, SplitSettings, quiet
from wdmoe.errors import ConfigError

_RUN = 32  # tokens compared between training and held-out text
_RUNS_IN_BOTH = 0.05  # that may be the same
_RANKS = {"gate": 64, "up": 64, "down": 128, "q": 48, "k": 48, "v": 48, "o": 48}
_START = SplitSettings(calibration_tokens=16384, cluster_tokens=4096, refine_rounds=12, refine_tokens=16384)


@dataclass(frozen=True, slots=True, kw_only=True)
class DistilSettings:
    """What is cut and trained, on which text."""

    training: Training = Training()  # noqa: RUF009 - frozen
    split: SplitSettings = _START
    ranks: Mapping[str, int] = field(default_factory=lambda: dict(_RANKS))
    text: tuple[Path, ...] = ()  # (): the shipped calibration text
    held_out: tuple[Path, ...] = ()  # (): the shipped held-out text
    also: Mapping[str, Path] = field(default_factory=dict)  # other text to measure on at the end, by what it is
    tokens: int = 1 << 22  # of text, at most; read again and again if steps need more
    curve_every: int = 100  # steps between measurements on the held-out text
    save_every_s: float = 240.0
    dtype: torch.dtype = torch.bfloat16  # in which matrices are multiplied

    def __post_init__(self) -> None:
        if unknown := self.ranks.keys() - MATRICES.keys():
            raise ConfigError(f"there is no matrix {min(unknown)!r}: give some of {', '.join(MATRICES)}")
        if self.tokens < self.training.window:
            raise ConfigError(f"tokens must be at least one window ({self.training.window}), got {self.tokens}")
        if self.curve_every < 1:
            raise ConfigError(f"curve_every must be at least 1, got {self.curve_every}")
        both = {file.resolve() for file in self.text} & {file.resolve() for file in self.held_out}
        if both:
            raise ConfigError(f"{min(both)} is given to train on and to measure on; held-out text must be other text")


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """Perplexities on some tokens of text that was not trained on, in float32."""

    tokens: int
    dense: float
    split: float

    @property
    def ratio(self) -> float:
        """Split over dense."""
        return self.split / self.dense


@dataclass(frozen=True, slots=True, kw_only=True)
class DistilReport:
    """What distillation did."""

    steps: int
    trained_tokens: int
    seconds: float  # of training
    curve: list[dict[str, Any]]
    measured: dict[str, Measured]  # by text, "held out" first

    def as_json(self) -> dict[str, Any]:
        """Plain types."""
        return asdict(self)


def distil(
    dense: Path,
    state: Path,
    settings: DistilSettings,
    progress: Progress = quiet,
    stop: Callable[[], bool] = lambda: False,
) -> tuple[Decisions, DistilReport] | None:
    """Cut a dense model, train what mends the cut, and put it into 8-bit corrections.

    Args:
        dense: folder of safetensors, or a GGUF file.
        state: file that is written now and then, and that the same call goes on from. While the learning rate is level
            `settings.training.steps` may be another one than before.
        progress: told (stage, fraction done).
        stop: asked after every step; True ends the call with the state saved.
    Returns:
        The decisions and what was measured, or None if stopped.
    Raises:
        BundleError: the model cannot be read or split, or the state cannot be written.
        ConfigError: a text file is unusable or too short, the state is another run's, or training does not converge.
    """
    progress("read", 0.0)
    source = read_dense(dense)
    shipped, window = text_windows.SHIPPED_CALIBRATION, settings.training.window
    texts = _Texts(
        training=_windows(source, settings.text, shipped, window, settings.tokens),
        held_out=_held_out(source, settings, settings.held_out),
    )
    _refuse_overlap(texts.training, texts.held_out)
    fingerprint = _fingerprint(source, settings, texts.training)
    run = load_run(state, fingerprint) or _new_run(source, texts.training, settings, progress)
    if not _Session(source, run, texts, state, settings).train(progress, stop):
        return None
    decisions = _decisions(source, run, settings)
    return decisions, DistilReport(
        steps=run.trainee.step,
        trained_tokens=run.trainee.step * settings.training.batch * settings.training.window,
        seconds=run.trainee.seconds,
        curve=run.curve,
        measured=measure(source, decisions, _measured_on(source, settings, texts), settings.split, progress),
    )


@torch.no_grad()
def measure(
    source: DenseModel,
    decisions: Decisions,
    texts: Mapping[str, torch.Tensor],
    settings: SplitSettings,
    progress: Progress = quiet,
) -> dict[str, Measured]:
    """Perplexities of the dense model and of what the decisions make of it, in float32.

    Args:
        texts: (windows, length) int64 by what it is.
    """
    split = moe_model(*apply_decisions(source, decisions), settings)
    dense = dense_model(source)
    found = {}
    for done, (name, windows) in enumerate(texts.items()):
        progress("measure", done / len(texts))
        found[name] = Measured(
            tokens=windows.numel(), dense=window_perplexity(dense, windows), split=window_perplexity(split, windows)
        )
    progress("measure", 1.0)
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class _Texts:
    """Windows of tokens, (windows, length) int64."""

    training: torch.Tensor
    held_out: torch.Tensor


def _new_run(source: DenseModel, windows: torch.Tensor, settings: DistilSettings, progress: Progress) -> Run:
    count = max(1, settings.split.calibration_tokens // windows.shape[1])
    rank = min(settings.ranks.get("down", 0), source.config.hidden_size)
    start = decide_start(source, windows[:count], settings.split, max(1, rank), progress)
    weights = trainable(source, settings.ranks, settings.training.seed)
    if rank:
        for layer, (inner, outer) in enumerate(start.factors):
            weights[f"{layer}.down.a"], weights[f"{layer}.down.b"] = inner, outer
    return Run(start.cut, Trainee.fresh(weights))


class _Session:
    """One call's part of a run: steps, points of the curve, saves."""

    def __init__(self, source: DenseModel, run: Run, texts: _Texts, state: Path, settings: DistilSettings) -> None:
        self._model = FastLlama(source, settings.dtype)
        self._run, self._texts, self._state, self._settings = run, texts, state, settings
        self._fingerprint = _fingerprint(source, settings, texts.training)
        self._saved = time.monotonic()

    def train(self, progress: Progress, stop: Callable[[], bool]) -> bool:
        """Take the steps that are left; False if stopped before the last."""
        trainee, how, nats = self._run.trainee, self._settings.training, math.nan
        trainer = Trainer(self._model, self._run.cut, self._texts.training, how, trainee)
        if not self._run.curve:
            self._add_point()
        while trainee.step < how.steps and not stop():
            report = trainer.take_step()
            nats = nats if math.isnan(report.divergence) else report.divergence
            progress(f"train, divergence {nats:.3f}, {report.tokens_per_s:.0f} tokens/s", trainee.step / how.steps)
            if trainee.step % self._settings.curve_every == 0 or trainee.step == how.steps:
                self._add_point()
            if time.monotonic() - self._saved > self._settings.save_every_s:
                self.save()
        self.save()
        return trainee.step >= how.steps

    def save(self) -> None:
        save_run(self._state, self._run, self._fingerprint)
        self._saved = time.monotonic()

    @torch.no_grad()
    def _add_point(self) -> None:
        """Perplexity on the held-out text, as the training arithmetic has it."""
        model, run, how, held_out = self._model, self._run, self._settings.training, self._texts.held_out
        changes, nats = working_copies(model, run.trainee.weights), 0.0
        for ids in held_out:
            logits = (model.read(ids[None], changes, run.cut, keep=False).hidden[0, :-1] @ model.head.T).float()
            nats += float(functional.cross_entropy(logits, ids[1:], reduction="sum"))
        step = run.trainee.step
        run.curve.append(
            {
                "step": step,
                "tokens": step * how.batch * how.window,
                "seconds": round(run.trainee.seconds),
                "perplexity": math.exp(nats / (held_out.numel() - len(held_out))),
            }
        )


def _decisions(source: DenseModel, run: Run, settings: DistilSettings) -> Decisions:
    layers, weights = range(source.config.num_hidden_layers), run.trainee.weights
    tensors: Weights = {"assignment": run.cut.owners.to(torch.uint8), "router": run.cut.routers}
    for matrix in settings.ranks:
        pairs = [eight_bits(weights[f"{layer}.{matrix}.a"], weights[f"{layer}.{matrix}.b"]) for layer in layers]
        tensors.update({f"{matrix}.{part}": torch.stack([pair[part] for pair in pairs]) for part in pairs[0]})
    for name in ("input_norm", "ffn_norm", "neuron_scale"):
        tensors[name] = torch.stack([weights[f"{layer}.{name}"] for layer in layers])
    tensors["final_norm"] = weights["final_norm"]
    return Decisions(
        source_sha256=source.sha256,
        experts=settings.split.experts,
        top_k=settings.split.top_k,
        gate_temperature=settings.split.gate_temperature,
        figures={},
        tensors={name: tensor.detach().numpy() for name, tensor in tensors.items()},
    )


def _measured_on(source: DenseModel, settings: DistilSettings, texts: _Texts) -> dict[str, torch.Tensor]:
    also = {name: _held_out(source, settings, (file,)) for name, file in settings.also.items()}
    return {"held out": texts.held_out, **also}


def _held_out(source: DenseModel, settings: DistilSettings, files: tuple[Path, ...]) -> torch.Tensor:
    return _windows(source, files, text_windows.SHIPPED_HELD_OUT, settings.split.window, settings.split.held_out_tokens)


def _windows(source: DenseModel, files: tuple[Path, ...], shipped: str, length: int, tokens: int) -> torch.Tensor:
    documents = text_windows.read_documents(files, shipped)
    return torch.from_numpy(text_windows.token_windows(documents, source.tokenizer, length, tokens // length))


def _refuse_overlap(windows: torch.Tensor, held_out: torch.Tensor) -> None:
    """The same text under two file names. A few runs may be in both: licences and system prompts are."""
    size = min(_RUN, held_out.shape[1])
    measured = held_out.flatten().tolist()
    runs = {tuple(measured[at : at + size]) for at in range(0, len(measured) - size + 1, size)}
    read = windows.flatten().tolist()
    seen = {run for at in range(len(read) - size + 1) if (run := tuple(read[at : at + size])) in runs}
    if len(seen) > _RUNS_IN_BOTH * len(runs):
        raise ConfigError(f"{len(seen)} of {len(runs)} pieces of the held-out text are in the training text")


def _fingerprint(source: DenseModel, settings: DistilSettings, windows: torch.Tensor) -> list[str]:
    """What decides a run's result, but for the number of steps."""
    training = {name: value for name, value in asdict(settings.training).items() if name != "steps"}
    read = hashlib.sha256(windows.numpy().tobytes()).hexdigest()
    return [source.sha256, read, repr(training), repr(settings.split), repr(dict(settings.ranks)), str(settings.dtype)]
