"""Records what a model's gates ask for while it runs, locally or with its experts on devices.

    with TraceRecorder(model, "my-model", similarity=True) as recorder:
        model(input_ids=windows)          # (sequences, length), as often as wanted
    recorder.trace().save(Path("gate.npz"))

It stands before the experts and never touches them, so it does not matter where they are computed.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional

from wdmoe.backbone.families import experts_modules, gate_temperature, router_of
from wdmoe.errors import BundleError
from wdmoe.gate_trace import GateTrace


@dataclass(slots=True, eq=False)
class _Layer:
    """What one layer said so far; a list entry for each forward pass."""

    scores: torch.Tensor | None = None  # of the pass that runs now
    gate: list[npt.NDArray[np.float16]] = field(default_factory=list)
    experts: list[npt.NDArray[np.int16]] = field(default_factory=list)
    weights: list[npt.NDArray[np.float16]] = field(default_factory=list)
    hidden: list[torch.Tensor] = field(default_factory=list)


class TraceRecorder:
    """Listens to all MoE layers of a transformers model between entering and leaving."""

    def __init__(self, model: Any, name: str, *, similarity: bool = False) -> None:
        """Prepare.

        Args:
            model: a transformers MoE model.
            name: written into the trace.
            similarity: also record how alike a token's hidden state is to the one before it.
        Raises:
            BundleError: the model has no experts, or a layer's router is not found.
        """
        self._model = model
        self._name = name
        self._similarity = similarity
        self._experts = experts_modules(model)
        self._routers = {layer: router_of(model, layer) for layer in self._experts}
        self._layers = {layer: _Layer() for layer in self._experts}
        self._positions: list[npt.NDArray[np.int32]] = []
        self._hooks: list[Any] = []

    def __enter__(self) -> TraceRecorder:
        hear = self._model.register_forward_pre_hook(self._hear_pass, with_kwargs=True)
        self._hooks = [hear]
        for layer, note in self._layers.items():
            self._hooks.append(self._routers[layer].register_forward_hook(_score_hook(note)))
            self._hooks.append(self._experts[layer].register_forward_pre_hook(self._choice_hook(note)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def trace(self) -> GateTrace:
        """All that was recorded.

        Raises:
            BundleError: nothing was, or the family's router does not give its scores.
        """
        notes = list(self._layers.values())
        if not self._positions or any(not note.gate for note in notes):
            raise BundleError("no gate scores were recorded: the model did not run, or its router does not give them")
        position = np.concatenate(self._positions)
        return GateTrace(
            model=self._name,
            temperature=gate_temperature(self._model.config),
            layers=np.array(list(self._layers), np.int32),
            position=position,
            gate=np.stack([np.concatenate(note.gate) for note in notes]),
            experts=np.stack([np.concatenate(note.experts) for note in notes]),
            weights=np.stack([np.concatenate(note.weights) for note in notes]),
            similarity=np.stack([_likeness(note.hidden, position) for note in notes]) if self._similarity else None,
        )

    def _hear_pass(self, model: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        ids = named.get("input_ids", arguments[0] if arguments else None)
        cache = named.get("past_key_values")
        if not torch.is_tensor(ids) or ids.ndim != 2:
            raise BundleError("a trace is recorded from input_ids of shape (sequences, length)")
        begin = 0 if cache is None else int(cache.get_seq_length())
        self._positions.append(np.tile(np.arange(begin, begin + ids.shape[1], dtype=np.int32), len(ids)))

    def _choice_hook(self, note: _Layer) -> Any:
        def keep(module: Any, arguments: tuple[Any, ...]) -> None:
            hidden, experts, weights = arguments
            scores, note.scores = note.scores, None
            if scores is None or len(scores) != len(experts):
                return  # `trace` says so
            outside = (experts < 0) | (experts >= scores.shape[1])
            note.gate.append(_numpy(scores, np.float16))
            note.experts.append(_numpy(experts.masked_fill(outside, -1), np.int16))
            note.weights.append(_numpy(weights.masked_fill(outside, 0), np.float16))
            if self._similarity:
                note.hidden.append(hidden.detach().float().cpu())

        return keep


def _score_hook(note: _Layer) -> Any:
    def keep(module: Any, arguments: object, output: Any) -> None:
        scores = output[0] if isinstance(output, tuple) else output
        note.scores = scores if torch.is_tensor(scores) and scores.ndim == 2 else None

    return keep


def _likeness(hidden: list[torch.Tensor], position: npt.NDArray[np.int32]) -> npt.NDArray[np.float16]:
    """(tokens,) cosine to the token before, 0 where a sequence begins."""
    states = torch.cat(hidden)
    cosine = np.zeros(len(states), np.float16)
    cosine[1:] = functional.cosine_similarity(states[1:], states[:-1], dim=1).numpy()
    cosine[position == 0] = 0
    return cosine


def _numpy(tensor: torch.Tensor, dtype: Any) -> npt.NDArray[Any]:
    array: npt.NDArray[Any] = tensor.detach().float().cpu().numpy().astype(dtype)
    return array
