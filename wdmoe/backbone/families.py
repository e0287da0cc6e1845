"""What differs between MoE families, found out from a model itself and not from a list of names."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from wdmoe.backbone.format.bundle import OnDrop
from wdmoe.config import RANKS
from wdmoe.errors import BundleError

_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.")
_ROUTER_NAMES = ("router", "gate")
_PROBE_TOKENS = 16
_PROBE_SCALES = (0.05, 1.0)  # near-equal gate weights, and one that stands out
_SUM_SPREAD = 1e-3  # relative spread of the weights' sum over tokens below which it counts as fixed


def is_experts(module: nn.Module) -> bool:
    """Whether a module's class went through transformers' `use_experts_implementation`."""
    return hasattr(module, "_is_expert_parallel") and hasattr(module, "has_gate")


def experts_names(model: nn.Module) -> dict[int, str]:
    """Where the experts of each MoE layer stand in a model: decoder layer -> module name, ascending.

    Raises:
        BundleError: there are none, or a layer has two sets of them.
    """
    names: dict[int, str] = {}
    for name, module in model.named_modules():
        if not is_experts(module):
            continue
        found = _LAYER.findall(name)
        if len(found) != 1 or int(found[0]) in names:
            raise BundleError(f"the experts {name!r} do not stand alone in one decoder layer")
        names[int(found[0])] = name
    if not names:
        raise BundleError("the model has no experts: make some with wdmoe-node split")
    return dict(sorted(names.items()))


def experts_modules(model: nn.Module) -> dict[int, nn.Module]:
    """The experts modules by decoder layer, ascending; errors as `experts_names`."""
    return {layer: model.get_submodule(name) for layer, name in experts_names(model).items()}


def router_of(model: nn.Module, layer: int) -> nn.Module:
    """The router beside a layer's experts. Its forward gives (logits (tokens, experts), weights, indices,
    ...).

    Raises:
        BundleError: nothing beside the experts looks like a router.
    """
    name = experts_names(model)[layer]
    block = model.get_submodule(name.rpartition(".")[0])
    children = dict(block.named_children())
    for candidate in _ROUTER_NAMES:
        if candidate in children:
            return children[candidate]
    for child in children.values():
        if type(child).__name__.endswith(("Router", "Gate", "Gating")):
            return child
    raise BundleError(f"no router stands beside the experts {name!r}")


@contextmanager
def experts_on_meta(classes: set[type[nn.Module]]) -> Iterator[None]:
    """While open, experts of these classes are made without memory: every tensor of theirs is on the meta
    device.
    """
    originals = {kind: kind.__init__ for kind in classes}

    def without_memory(original: Any) -> Any:
        def make(self: nn.Module, *args: Any, **kwargs: Any) -> None:
            with torch.device("meta"):
                original(self, *args, **kwargs)

        return make

    try:
        for kind, original in originals.items():
            kind.__init__ = without_memory(original)  # type: ignore[method-assign]
        yield
    finally:
        for kind, original in originals.items():
            kind.__init__ = original  # type: ignore[method-assign]


def top_k_of(model: nn.Module, config: Any) -> int:
    """Experts per token.

    Raises:
        BundleError: neither router nor config says a number.
    """
    text = config.get_text_config()
    candidates = [getattr(router_of(model, layer), "top_k", None) for layer in experts_names(model)]
    names = ("num_experts_per_tok", "moe_topk", "moe_k", "num_experts_per_token", "top_k_experts")
    candidates += [getattr(text, name, None) for name in names]
    for value in candidates:
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    raise BundleError("neither the router nor config.json says how many experts serve a token")


def gate_temperature(config: Any) -> float:
    """What a policy divides the router's scores by before their softmax ranks experts; `wdmoe-node split` sets it."""
    marks = getattr(config, "wdmoe", None)
    return float(marks.get("gate_temperature", 1.0)) if isinstance(marks, dict) else 1.0


def rank_of(config: Any) -> str:
    """What a policy should rank experts by (`wdmoe.solver.ranking`); `wdmoe-node split` says it of its routers.

    Raises:
        BundleError: config.json says something else.
    """
    marks = getattr(config, "wdmoe", None)
    rank = marks.get("rank", RANKS[0]) if isinstance(marks, dict) else RANKS[0]
    if rank not in RANKS:
        raise BundleError(f"config.json: 'wdmoe.rank' must be one of {', '.join(RANKS)}")
    return str(rank)


def on_drop_of(model: nn.Module, config: Any) -> OnDrop:
    """What the remaining weights should do when an expert of a token is dropped.

    "renormalise" where the family itself makes the chosen weights sum to the same number for every token (so the
    sum is part of the model), "keep" elsewhere. Found by running the first MoE block, with random weights and up to
    its experts, on random vectors; where it cannot be run alone, by the config's `norm_topk_prob`.
    """
    text = config.get_text_config()
    name = next(iter(experts_names(model).values()))
    block = model.get_submodule(name.rpartition(".")[0])
    sums = [_weight_sums(block, name.rpartition(".")[2], text.hidden_size, scale) for scale in _PROBE_SCALES]
    known = [values for values in sums if values is not None]
    if not known:
        return "renormalise" if getattr(text, "norm_topk_prob", False) else "keep"
    joined = torch.cat(known)
    spread = float((joined.max() - joined.min()) / joined.abs().max().clamp_min(1e-12))
    return "renormalise" if spread < _SUM_SPREAD else "keep"


class _Reached(Exception):
    """The block called its experts, with these arguments."""

    def __init__(self, arguments: tuple[Any, ...]) -> None:
        self.arguments = arguments


def _weight_sums(block: nn.Module, experts: str, hidden: int, scale: float) -> torch.Tensor | None:
    """Sum of each token's gate weights as the experts get them, or None if the block cannot be run alone."""
    generator = torch.Generator().manual_seed(0)
    state = {
        name: torch.randn(tensor.shape, generator=generator) * scale * (tensor.numel() or 1) ** -0.25
        for name, tensor in block.state_dict().items()
        if not name.startswith(f"{experts}.")
    }

    def stop(module: nn.Module, arguments: tuple[Any, ...]) -> None:
        raise _Reached(arguments)

    hook = block.get_submodule(experts).register_forward_pre_hook(stop)
    try:
        with torch.no_grad():
            torch.func.functional_call(block, state, (torch.randn(1, _PROBE_TOKENS, hidden, generator=generator),))
    except _Reached as reached:
        weights = reached.arguments[2] if len(reached.arguments) > 2 else None
    except Exception:  # a block that wants more than hidden states (token ids, the former layer's logits, ...)
        return None
    else:
        return None
    finally:
        hook.remove()
    if not torch.is_tensor(weights) or weights.shape[:-1].numel() != _PROBE_TOKENS:
        return None
    return weights.float().reshape(_PROBE_TOKENS, -1).sum(-1)
