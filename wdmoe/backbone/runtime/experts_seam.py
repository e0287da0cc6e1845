"""Puts remote experts into a transformers model: the one seam between the LLM and the rest of wdmoe.

Since version 5 every MoE family of transformers calls its experts through one registry. Ours is entered there as
"wdmoe"; attention, gate, cache and generation stay the library's own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

import numpy as np
import numpy.typing as npt
import torch
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from wdmoe.arrays import Float32Array
from wdmoe.backbone.runtime.shared_expert import SharedExpert, wrap_shared_expert
from wdmoe.errors import CancelledRequestError
from wdmoe.layer_call import Caller, Callers, Client, Demand, LayerCall
from wdmoe.receipt import Ledger

IMPLEMENTATION = "wdmoe"

# The request whose forward pass runs now. Every greenlet has a context of its own.
CURRENT_LEDGER: ContextVar[Ledger] = ContextVar("wdmoe_ledger")
CURRENT_CLIENT: ContextVar[Client | None] = ContextVar("wdmoe_client", default=None)


RunLayer: TypeAlias = Callable[[LayerCall], Float32Array]  # gives the gate-weighted sum of experts, (tokens, hidden)


@dataclass(slots=True, eq=False)
class _Seat:
    """What one experts module knows of its place."""

    layer: int
    first: bool  # the first MoE layer of the model: a forward pass begins here
    experts: int
    run: RunLayer
    shared: SharedExpert | None
    gate: torch.Tensor | None = None


def attach(
    model: torch.nn.Module,
    experts: Mapping[int, torch.nn.Module],
    routers: Mapping[int, torch.nn.Module],
    run: RunLayer,
) -> None:
    """Let `run` compute the experts of `model`.

    Args:
        model: a transformers model that supports `set_experts_implementation`.
        experts: decoder layer -> its experts module (weights may be on the meta device: they are never touched).
        routers: decoder layer -> its router, whose first output is the gate row, for layers that have one.
        run: called on whatever thread runs the model.
    """
    ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, _experts_forward)
    first = min(experts)
    for layer, module in experts.items():
        shared = wrap_shared_expert(model, module)
        seat = _Seat(layer, layer == first, cast(int, module.num_experts), run, shared)
        module._wdmoe_seat = seat  # type: ignore[assignment]
        if layer in routers:
            routers[layer].register_forward_hook(_gate_hook(seat))
    model.set_experts_implementation(IMPLEMENTATION)  # type: ignore[operator]


def _gate_hook(seat: _Seat) -> Any:
    def keep_gate(module: torch.nn.Module, args: object, output: object) -> None:
        scores = output[0] if isinstance(output, tuple) else output
        known = isinstance(scores, torch.Tensor) and scores.ndim == 2 and scores.shape[-1] == seat.experts
        seat.gate = scores if known else None  # type: ignore[assignment]

    return keep_gate


def _experts_forward(
    module: torch.nn.Module,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    """The registry's signature: (tokens, hidden), (tokens, top_k), (tokens, top_k) -> (tokens, hidden)."""
    seat: _Seat = module._wdmoe_seat  # type: ignore[assignment]
    ledger = CURRENT_LEDGER.get()
    if ledger.cancelled:  # here too: the layers of a pass may each wait for a deadline
        raise CancelledRequestError("the client went away")
    if seat.first:
        ledger.open_pass()
    gate, seat.gate = seat.gate, None
    experts = _to_numpy(top_k_index, torch.int32)
    weights = _to_numpy(top_k_weights, torch.float32)
    outside = experts >= seat.experts  # the families' mark for "masked"
    if outside.any():
        experts, weights = np.where(outside, -1, experts), np.where(outside, 0, weights)
    scores = None if gate is None or len(gate) != len(experts) else _to_numpy(gate, torch.float32)
    tokens = _to_numpy(hidden_states, torch.float32)
    call = LayerCall(
        layer=seat.layer,
        tokens=tokens,
        demand=Demand(experts, weights, scores),
        callers=Callers([Caller(ledger, CURRENT_CLIENT.get())], [len(tokens)]),
        meanwhile=None if seat.shared is None else seat.shared.ahead(),
    )
    out = seat.run(call)
    return torch.from_numpy(out).to(hidden_states.device, hidden_states.dtype)


def _to_numpy(tensor: torch.Tensor, dtype: torch.dtype) -> npt.NDArray[Any]:
    array: npt.NDArray[Any] = tensor.detach().to("cpu", dtype).contiguous().numpy()
    return array
