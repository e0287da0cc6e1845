"""Records what a model's gates ask for while it runs, locally or with its experts on devices.

    with TraceRecorder(model, "my-model", similarity=True) as recorder:
        model(input_ids=windows)          # (sequences, length), as often as wanted
    recorder.trace().save(Path("gate.npz"))

It stands before the experts and never touches them, so it does not matter where they are computed.
"""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional

from wdmoe.backbone.evaluation.expert_similarity import ExpertSimilarity
from wdmoe.backbone.families import experts_modules, gate_temperature, router_of
from wdmoe.errors import BundleError
from wdmoe.results.gate_trace import GateTrace


@dataclass(slots=True, eq=False)
class _Pass:
    """One forward pass; lists have an entry for each MoE layer that was reached."""

    sequence: npt.NDArray[np.int64]  # (tokens,) which sequence each token belongs to
    position: npt.NDArray[np.int32]
    scores: torch.Tensor | None = None  # of the layer that runs now
    gate: list[npt.NDArray[np.float16]] = field(default_factory=list)
    experts: list[npt.NDArray[np.int16]] = field(default_factory=list)
    weights: list[npt.NDArray[np.float16]] = field(default_factory=list)
    hidden: list[torch.Tensor] = field(default_factory=list)


class TraceRecorder:
    """Listens to all MoE layers of a transformers model between entering and leaving.

    Passes may run in turns with each other, each in a context (`contextvars`) of its own, as a base station's
    requests do; the tokens of a sequence stand together in the trace all the same.
    """

    def __init__(
        self,
        model: Any,
        name: str,
        *,
        similarity: bool = False,
        expert_similarity: bool = False,
        most_tokens: int | None = None,
    ) -> None:
        """Prepare.

        Args:
            model: a transformers MoE model.
            name: written into the trace.
            similarity: also record how alike a token's hidden state is to the one before it.
            expert_similarity: also measure how well experts stand in for each other; every expert computes every
                token for that, so the weights must be here.
            most_tokens: passes that begin after so many tokens are not recorded; None for no limit.
        Raises:
            BundleError: the model has no experts, a layer's router is not found, or weights are not here.
        """
        self._model = model
        self._name = name
        self._similarity = similarity
        self._most_tokens = most_tokens
        self._experts = experts_modules(model)
        self._routers = {layer: router_of(model, layer) for layer in self._experts}
        self._expert_similarity: dict[int, ExpertSimilarity] = {}
        if expert_similarity:
            counts = {layer: int(cast(int, module.num_experts)) for layer, module in self._experts.items()}
            self._expert_similarity = {layer: ExpertSimilarity(self._experts[layer], n) for layer, n in counts.items()}
        self._passes: list[_Pass] = []
        self._current: ContextVar[_Pass | None] = ContextVar("wdmoe_trace_pass", default=None)
        self._tokens = 0
        self._sequences = 0
        self._first_of: dict[int, int] = {}  # cache -> the first of its sequences
        self._hooks: list[Any] = []

    def __enter__(self) -> TraceRecorder:
        self._hooks = [self._model.register_forward_pre_hook(self._hear_pass, with_kwargs=True)]
        self._hooks.append(self._model.register_forward_hook(self._hear_cache))
        for layer, experts in self._experts.items():
            self._hooks.append(self._routers[layer].register_forward_hook(self._hear_scores))
            self._hooks.append(experts.register_forward_pre_hook(self._choice_hook(self._expert_similarity.get(layer))))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def trace(self) -> GateTrace:
        """All that was recorded of whole passes.

        Raises:
            BundleError: nothing was, or the family's router does not give its scores.
        """
        whole = [each for each in self._passes if len(each.gate) == len(self._experts)]
        if not whole:
            raise BundleError("no gate scores were recorded: the model did not run, or its router does not give them")
        order = np.argsort(np.concatenate([each.sequence for each in whole]), kind="stable")
        position = np.concatenate([each.position for each in whole])[order]

        def joined(field_: str) -> npt.NDArray[Any]:
            layers = zip(*(getattr(each, field_) for each in whole), strict=True)
            return np.stack([np.concatenate(layer)[order] for layer in layers])

        matrices = [each.matrix() for each in self._expert_similarity.values()]
        return GateTrace(
            model=self._name,
            temperature=gate_temperature(self._model.config),
            layers=np.array(list(self._experts), np.int32),
            position=position,
            gate=joined("gate"),
            experts=joined("experts"),
            weights=joined("weights"),
            similarity=self._neighbours(whole, order, position) if self._similarity else None,
            expert_similarity=np.stack(matrices) if matrices else None,
        )

    def _hear_pass(self, model: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        ids = named.get("input_ids", arguments[0] if arguments else None)
        cache = named.get("past_key_values")
        if not torch.is_tensor(ids) or ids.ndim != 2:
            raise BundleError("a trace is recorded from input_ids of shape (sequences, length)")
        if self._most_tokens is not None and self._tokens >= self._most_tokens:
            self._current.set(None)
            return
        self._tokens += ids.numel()
        count, length = ids.shape
        begin = 0 if cache is None else int(cache.get_seq_length())
        first = self._first_of.get(id(cache)) if begin else None
        if first is None:
            first, self._sequences = self._sequences, self._sequences + count
        heard = _Pass(
            sequence=np.repeat(np.arange(first, first + count), length),
            position=np.tile(np.arange(begin, begin + length, dtype=np.int32), count),
        )
        self._passes.append(heard)
        self._current.set(heard)

    def _hear_cache(self, model: Any, arguments: object, output: Any) -> None:
        heard, cache = self._current.get(), getattr(output, "past_key_values", None)
        if heard is not None and cache is not None:
            self._first_of[id(cache)] = int(heard.sequence[0])

    def _hear_scores(self, module: Any, arguments: object, output: Any) -> None:
        heard = self._current.get()
        if heard is not None:
            scores = output[0] if isinstance(output, tuple) else output
            heard.scores = scores if torch.is_tensor(scores) and scores.ndim == 2 else None

    def _choice_hook(self, similarity: ExpertSimilarity | None) -> Any:
        def keep(module: Any, arguments: tuple[Any, ...]) -> None:
            heard = self._current.get()
            if heard is None:
                return
            hidden, experts, weights = arguments
            scores, heard.scores = heard.scores, None
            if scores is None or len(scores) != len(experts):
                return  # the pass is not whole, and `trace` leaves it out
            outside = (experts < 0) | (experts >= scores.shape[1])
            heard.gate.append(_numpy(scores, np.float16))
            heard.experts.append(_numpy(experts.masked_fill(outside, -1), np.int16))
            heard.weights.append(_numpy(weights.masked_fill(outside, 0), np.float16))
            if self._similarity:
                heard.hidden.append(hidden.detach().float().cpu())
            if similarity is not None:
                similarity.hear(hidden, experts, weights)

        return keep

    def _neighbours(
        self, passes: list[_Pass], order: npt.NDArray[np.intp], position: npt.NDArray[np.int32]
    ) -> npt.NDArray[np.float16]:
        """(layers, tokens) cosine of each hidden state to the one before it."""
        layers = zip(*(each.hidden for each in passes), strict=True)
        return np.stack([_similarity(torch.cat(layer)[torch.from_numpy(order)], position) for layer in layers])


def _similarity(states: torch.Tensor, position: npt.NDArray[np.int32]) -> npt.NDArray[np.float16]:
    """(tokens,) cosine to the token before, 0 where a sequence begins."""
    cosine = np.zeros(len(states), np.float16)
    cosine[1:] = functional.cosine_similarity(states[1:], states[:-1], dim=1).numpy()
    cosine[position == 0] = 0
    return cosine


def _numpy(tensor: torch.Tensor, dtype: Any) -> npt.NDArray[Any]:
    array: npt.NDArray[Any] = tensor.detach().float().cpu().numpy().astype(dtype)
    return array
