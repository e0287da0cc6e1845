"""A whole MoE model in one process whose experts are computed as if devices had been asked over the air.

What is computed, by which expert, and with how many bits each vector travels, is asked of a `Decide`; the model then
really runs that way, so that its likelihoods say what the decisions cost. No packet is sent, no time is spent.

    with PlannedExperts(model, decide):
        model(input_ids=ids)
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol, cast

import numpy as np
import numpy.typing as npt
import torch
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from wdmoe.arrays import Int32Array
from wdmoe.backbone.evaluation.analog_downlink import Broadcast
from wdmoe.backbone.families import experts_modules, gate_temperature, on_drop_of, router_of
from wdmoe.errors import BundleError
from wdmoe.solver.layer.plan import LayerPlan
from wdmoe.solver.ranking import rank_weights

IMPLEMENTATION = "wdmoe-planned"
EXACT = 32  # bits of a vector that is left as it is

_SEATS = "_wdmoe_planned_seat"
_MOST_HALF = 65504.0  # greatest float16


@dataclass(frozen=True, slots=True, eq=False)
class Order:
    """What is done in one layer; all (tokens, top_k)."""

    experts: Int32Array  # -1 where dropped; another than the gate's where it was replaced
    device: Int32Array  # -1 where dropped
    down_bits: Int32Array  # of a value of the hidden state on its way: 4, 8, 16 (float16), or `EXACT`
    up_bits: Int32Array  # of a value of the result
    partial_sums: bool = False  # a device adds up what it computed for a token before it answers
    analog: tuple[Broadcast, ...] = ()  # what listeners hear, in place of what came with `down_bits`

    @staticmethod
    def of(plan: LayerPlan, partial_sums: bool = False) -> Order:
        """As a plan says. One that is sent to all devices at once has the bits of the most exacting one.

        What comes as amplitudes is not rounded; what the air makes of it, `analog`, is not known here.
        """
        bits = plan.time.bits.astype(np.int32)
        down = bits
        if plan.time.analog is not None:
            down = np.where(plan.device >= 0, np.int32(EXACT), 0)
        elif plan.time.multicast_s > 0 and bits.size:
            down = np.where(plan.device >= 0, bits.max(axis=1, keepdims=True), 0)
        return Order(plan.experts, plan.device, down, bits, partial_sums)


class Decide(Protocol):
    """Decides one layer of one forward pass."""

    def __call__(self, layer: int, experts: Int32Array, ranks: npt.NDArray[np.float64]) -> Order:
        """What to compute.

        Args:
            layer: counted from 0 among those that have experts.
            experts: (tokens, top_k) the gate's choice, -1 where there is none.
            ranks: (tokens, top_k) of these, 0 where there is none: what policies rank by.
        """
        ...


@dataclass(slots=True, eq=False)
class _Seat:
    layer: int
    owner: PlannedExperts
    scores: torch.Tensor | None = None


class PlannedExperts:
    """Runs a model's experts as `decide` says, between entering and leaving."""

    def __init__(self, model: Any, decide: Decide) -> None:
        """Prepare.

        Args:
            model: a transformers MoE model with all its weights.
            decide: asked in every layer of every pass; may be set anew in between.
        Raises:
            BundleError: the model has no experts, or a layer's router is not found.
        """
        self.decide = decide
        self._model = model
        self._experts = experts_modules(model)
        self._routers = [router_of(model, layer) for layer in self._experts]
        marks = getattr(model.config, "wdmoe", None)
        rule = marks.get("on_drop") if isinstance(marks, dict) else None
        self.renormalise: bool = (rule or on_drop_of(model, model.config)) == "renormalise"
        self.temperature = gate_temperature(model.config)
        self.rank = "probability"  # what `decide` is given, see `wdmoe.solver.ranking`; may be set anew in between
        self.distortions: list[float] = []  # one for each layer that ran: of vectors on their way down; may be cleared
        self._hooks: list[Any] = []
        self._before: Any = None

    @property
    def layers(self) -> int:
        """How many have experts."""
        return len(self._experts)

    @property
    def expert_count(self) -> int:
        """Experts of a layer."""
        return cast(int, next(iter(self._experts.values())).num_experts)

    def __enter__(self) -> PlannedExperts:
        ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, _experts_forward)
        self._before = self._model.get_experts_implementation()
        for number, (module, router) in enumerate(zip(self._experts.values(), self._routers, strict=True)):
            seat = _Seat(number, self)
            setattr(module, _SEATS, seat)
            self._hooks.append(router.register_forward_hook(_scores_hook(seat)))
        self._model.set_experts_implementation(IMPLEMENTATION)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._model.set_experts_implementation(self._before)
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        for module in self._experts.values():
            delattr(module, _SEATS)

    def ranks(self, scores: torch.Tensor, experts: Int32Array) -> npt.NDArray[np.float64]:
        """(tokens, top_k) what policies rank by, from the router's scores, at the chosen experts."""
        return rank_weights(scores.detach().double().cpu().numpy(), experts, self.temperature, self.rank)


def travelled(vectors: torch.Tensor, bits: int) -> torch.Tensor:
    """What arrives of vectors that were sent with `bits` a value.

    4 and 8: signed integers and, for each vector, one float16 that the greatest of them stands for. 16: float16.

    Args:
        vectors: (n, width).
        bits: 4, 8, 16 or `EXACT`.
    """
    if bits == EXACT:
        return vectors
    if bits == 16:
        return vectors.clamp(-_MOST_HALF, _MOST_HALF).half().to(vectors.dtype)
    most = 2 ** (bits - 1) - 1
    step = (vectors.abs().amax(dim=1, keepdim=True).float() / most).clamp(max=_MOST_HALF).half().float()
    whole = torch.where(step > 0, vectors.float() / step.clamp_min(1e-30), 0.0).round().clamp(-most, most)
    arrived: torch.Tensor = (whole * step).to(vectors.dtype)
    return arrived


def _scores_hook(seat: _Seat) -> Any:
    def keep(module: object, arguments: object, output: Any) -> None:
        seat.scores = output[0] if isinstance(output, tuple) else output

    return keep


def _experts_forward(
    module: torch.nn.Module, hidden: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """The registry's signature: (tokens, hidden), (tokens, top_k), (tokens, top_k) -> (tokens, hidden)."""
    seat: _Seat = getattr(module, _SEATS)
    owner, scores, seat.scores = seat.owner, seat.scores, None
    if scores is None or scores.ndim != 2 or scores.shape != (len(hidden), owner.expert_count):
        raise BundleError("the model's router does not give its scores, which a policy ranks by")
    outside = (top_k_index < 0) | (top_k_index >= owner.expert_count)  # the families' mark for "masked"
    experts = top_k_index.masked_fill(outside, -1).to("cpu", torch.int32).numpy()
    order = owner.decide(seat.layer, experts, owner.ranks(scores, experts))
    weights = top_k_weights.masked_fill(outside, 0)
    kept = torch.from_numpy(order.experts >= 0).to(hidden.device)
    return _computed(seat, module, hidden, order, _mixing(weights, kept, owner.renormalise))


def _mixing(weights: torch.Tensor, kept: torch.Tensor, renormalise: bool) -> torch.Tensor:
    """(tokens, top_k) the gate weights of what is computed, by the model's rule for dropped experts."""
    left = torch.where(kept, weights, 0)
    if not renormalise or bool(kept.all()):
        return left
    have = left.sum(1, keepdim=True)
    return torch.where(have != 0, left * (weights.sum(1, keepdim=True) / torch.where(have != 0, have, 1)), left)


def _computed(seat: _Seat, module: Any, hidden: torch.Tensor, order: Order, weights: torch.Tensor) -> torch.Tensor:
    """(tokens, hidden) the weighted sum of what comes back."""
    # By slot, then token: the order in which the library's own loop over experts takes rows.
    slot, token = (torch.from_numpy(each).to(hidden.device) for each in np.nonzero(order.experts.T >= 0))
    experts, device, down, up = (
        torch.from_numpy(each.astype(np.int64)).to(hidden.device)[token, slot]
        for each in (order.experts, order.device, order.down_bits, order.up_bits)
    )
    # One row for each assignment, its only expert with weight 1.
    sent = _sent(hidden[token], down)
    for each in order.analog:
        each.replace(sent, hidden, token, device)
    seat.owner.distortions.append(_distortion(sent, hidden[token]))
    alone = inspect.unwrap(type(module).forward)
    outputs = alone(module, sent, experts[:, None], torch.ones_like(sent[:, :1]))
    share = weights[token, slot, None].to(outputs.dtype)
    total = torch.zeros_like(hidden)
    if order.partial_sums and len(token):
        pairs, place = torch.unique(token * (1 + device.max()) + device, return_inverse=True)
        summed = torch.zeros(len(pairs), hidden.shape[1], dtype=outputs.dtype, device=hidden.device)
        summed.index_add_(0, place, outputs * share)
        bits = torch.zeros_like(pairs).scatter_(0, place, up)
        return total.index_add_(0, pairs // (1 + device.max()), _sent(summed, bits).to(total.dtype))
    back = _sent(outputs, up) * share
    ascending = torch.argsort(experts, stable=True)  # as the library adds them up, to the last digit
    return total.index_add_(0, token[ascending], back[ascending].to(total.dtype))


def _distortion(arrived: torch.Tensor, sent: torch.Tensor) -> float:
    """Square error over squares, of all values together; 0 where nothing was sent."""
    power = float(sent.double().square().sum())
    return float((arrived.double() - sent.double()).square().sum()) / power if power else 0.0


def _sent(vectors: torch.Tensor, bits: torch.Tensor) -> torch.Tensor:
    """(n, width) what arrives where vector i is sent with bits[i] a value."""
    used = torch.unique(bits).tolist()
    if len(used) == 1:
        return travelled(vectors, used[0])
    arrived = vectors.clone()
    for each in used:
        arrived[bits == each] = travelled(vectors[bits == each], each)
    return arrived
