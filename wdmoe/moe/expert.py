"""The experts a device holds: one message's tokens in, their weighted partial sum out.

No execution provider is named here: how an expert's file becomes something that can be called comes from
outside (`wdmoe.moe.providers`), so that a device swaps CPU for TensorRT without this module noticing.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol, TypeAlias

import numpy as np

from wdmoe.errors import ExpertError
from wdmoe.records import ExpertId
from wdmoe.transport.messages import Activations, Float32Array, Run


class ExpertModel(Protocol):
    """One expert, loaded. One thread at a time calls `run`."""

    @property
    def hidden(self) -> int:
        """Width of a token."""
        ...

    def run(self, tokens: Activations) -> Float32Array:
        """Apply the expert.

        Args:
            tokens: (tokens, hidden) float32 or float16, at least one.
        Returns:
            (tokens, hidden) float32; the next call may overwrite it.
        Raises:
            ExpertError: the runtime failed.
        """
        ...


OpenExpert: TypeAlias = Callable[[bytes, str], ExpertModel]  # file, its SHA-256 in hex; raises ExpertError


class ExpertRunner:
    """Runs the experts of this device.

    `load`, `unload` and `loaded` may be called from any thread while one thread calls `run`: a run that has
    begun keeps the experts it uses alive.
    """

    def __init__(self, open_expert: OpenExpert) -> None:
        self._open = open_expert
        self._models: dict[ExpertId, ExpertModel] = {}
        self._digests: dict[ExpertId, str] = {}

    def load(self, expert: ExpertId, model: bytes, sha256: str, hidden: int) -> None:
        """Make an expert callable, instead of an older one of the same id.

        Args:
            model: a self-contained ONNX file, input `x` and output `y` float32 (tokens, hidden).
            sha256: of these very bytes, in hex, already verified by the caller.
            hidden: width the placement promised.
        Raises:
            ExpertError: the file is no such expert.
        """
        opened = self._open(model, sha256)
        if opened.hidden != hidden:
            raise ExpertError(f"{_named(expert)} is {opened.hidden} wide, its placement says {hidden}")
        self._models[expert] = opened
        self._digests[expert] = sha256

    def unload(self, expert: ExpertId) -> None:
        """Forget an expert; nothing happens if it isn't here."""
        self._digests.pop(expert, None)
        self._models.pop(expert, None)

    def loaded(self) -> dict[ExpertId, str]:
        """What can be run now, with the SHA-256 of its file in hex."""
        return dict(self._digests)

    def run(self, run: Run) -> Activations:
        """Compute `partial[t] = sum_e weight[e, t] * expert_e(tokens[t])` over the experts of the message.

        Returns:
            (tokens, hidden), dtype of the tokens; rows no expert serves are 0.
        Raises:
            ExpertError: an expert isn't loaded or fails, the message contradicts itself, or the sum isn't
                finite.
        """
        models = [self._model(ExpertId(run.layer, expert), run.tokens.shape[1]) for expert in run.experts]
        _check(run)
        with np.errstate(all="ignore"):  # what overflows is found here, and answered
            total = _sum_of_one(models, run) if len(run.tokens) == 1 else _sum_of_many(models, run)
            if not _all_finite(total):
                experts = ", ".join(map(str, run.experts))
                raise ExpertError(f"layer {run.layer}: the sum of experts {experts} isn't finite")
            return total if run.tokens.dtype == np.float32 else _narrowed(total, run)

    def _model(self, expert: ExpertId, hidden: int) -> ExpertModel:
        model = self._models.get(expert)
        if model is None:
            raise ExpertError(f"{_named(expert)} isn't loaded here")
        if model.hidden != hidden:
            raise ExpertError(f"{_named(expert)} takes tokens of width {model.hidden}, got {hidden}")
        return model


def _check(run: Run) -> None:
    """Refuse lists that don't belong together. The codec bounds sizes; here it is about meaning."""
    served = sum(run.counts)
    if not len(run.experts) == len(run.counts) > 0 or not served == len(run.rows) == len(run.weights):
        raise ExpertError(f"layer {run.layer}: experts, counts, rows and weights of the message don't match")
    rows = run.rows.tolist()  # a handful while decoding; two NumPy calls cost more
    if min(run.counts) < 1 or min(rows) < 0 or max(rows) >= len(run.tokens):
        raise ExpertError(f"layer {run.layer}: the message names tokens it doesn't carry")
    start = 0
    for count in run.counts:
        if len(set(rows[start : start + count])) < count:
            raise ExpertError(f"layer {run.layer}: an expert is asked for the same token twice")
        start += count


def _sum_of_one(models: list[ExpertModel], run: Run) -> Float32Array:
    """Decoding: one token. No gathering, no scattering."""
    outputs = np.concatenate([model.run(run.tokens) for model in models])
    total: Float32Array = np.dot(run.weights, outputs).reshape(run.tokens.shape)
    return total


def _sum_of_many(models: list[ExpertModel], run: Run) -> Float32Array:
    """Prefill: gather each expert's tokens, scatter its weighted outputs. Expects no row twice."""
    total = np.zeros(run.tokens.shape, np.float32)
    start = 0
    for model, count in zip(models, run.counts, strict=True):
        rows, weights = run.rows[start : start + count], run.weights[start : start + count]
        total[rows] += weights[:, None] * model.run(run.tokens[rows])
        start += count
    return total


def _all_finite(values: Float32Array) -> bool:
    """The sum of squares is finite only if every value is; where it isn't, values may still just be huge."""
    flat = values.ravel()
    return math.isfinite(np.dot(flat, flat)) or bool(np.isfinite(flat).all())


def _narrowed(total: Float32Array, run: Run) -> Activations:
    """Cast to what the base station speaks, where a finite sum may still be too large."""
    partial = total.astype(run.tokens.dtype)
    if not np.isfinite(partial).all():
        raise ExpertError(f"layer {run.layer}: a sum of {np.abs(total).max():g} doesn't fit {run.tokens.dtype}")
    return partial


def _named(expert: ExpertId) -> str:
    return f"layer {expert.layer} expert {expert.expert}"
