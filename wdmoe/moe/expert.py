"""The experts a device holds: one message's tokens in, their weighted partial sum out.

No execution provider is named here: how an expert's file becomes something that can be called comes from
outside (`wdmoe.moe.providers`), so that a device swaps CPU for TensorRT without this module noticing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeAlias

import numpy as np

from wdmoe.arrays import Float32Array
from wdmoe.errors import ExpertError
from wdmoe.records import ExpertId
from wdmoe.solver.combining import combine_partials, is_finite, weighted_sum
from wdmoe.transport.codec.messages import Activations, Run


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
        total = _weighted_sum(models, run)
        if not is_finite(total):
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
    """Refuse lists that don't belong together, which would read past an array. Rows are checked where used."""
    served = sum(run.counts)
    if not len(run.experts) == len(run.counts) > 0 or not served == len(run.rows) == len(run.weights):
        raise ExpertError(f"layer {run.layer}: experts, counts, rows and weights of the message don't match")
    if min(run.counts) < 1:
        raise ExpertError(f"layer {run.layer}: the message names an expert without tokens")


def _weighted_sum(models: list[ExpertModel], run: Run) -> Float32Array:
    if len(run.tokens) == 1 and len(run.rows) == len(models) and not run.rows.any():  # decoding, as nearly always
        return weighted_sum([model.run(run.tokens) for model in models], run.weights)
    tokens, total, start = run.tokens, np.zeros(run.tokens.shape, np.float32), 0
    try:
        for model, count in zip(models, run.counts, strict=True):
            rows = run.rows[start : start + count]
            mine = tokens if len(tokens) == 1 == count else tokens[rows]  # decoding has nothing to gather
            combine_partials(total, model.run(mine), rows, run.weights[start : start + count])
            start += count
    except (IndexError, ValueError) as error:
        raise ExpertError(f"layer {run.layer}: the message names tokens it doesn't carry: {error}") from error
    return total


def _narrowed(total: Float32Array, run: Run) -> Activations:
    """Cast to what the base station speaks, where a finite sum may still be too large."""
    with np.errstate(over="ignore"):
        partial = total.astype(run.tokens.dtype)
    if not np.isfinite(partial).all():
        largest = float(np.abs(total).max())
        raise ExpertError(f"layer {run.layer}: a sum of {largest:g} doesn't fit {run.tokens.dtype}")
    return partial


def _named(expert: ExpertId) -> str:
    return f"layer {expert.layer} expert {expert.expert}"
