"""How large the outputs of an expert are, measured when it is exported: a base station doubts answers far outside.

What experts take comes out of a norm, so its size is known without any text: random vectors of unit mean square, through
the norm of the experts' own layer, stand for tokens. Real ones differ (docs/bundle.md has the margins), which is why a
base station only looks twice at an answer outside the bounds.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from wdmoe.arrays import Float32Array
from wdmoe.backbone.export.conversion import Conversion

PROBES = 16
_SEED = 20240623
# The norm before the experts, by its name in the decoder layer: the first that there is. Families with a norm on either
# side of attention and experts call the one behind attention "post_attention", so that stands last.
_NAMES = (
    "pre_feedforward_layernorm_2",
    "pre_feedforward_layernorm",
    "pre_mlp_layernorm",
    "ffn_norm",
    "mlp_norm",
    "post_attention_layernorm",
    "post_attention_norm",
)


def probes(skeleton: nn.Module, experts: str, width: int, conversion: Conversion, read: Callable[..., Any]) -> Any:
    """(PROBES, width) float32 inputs for the experts of a layer, the same in every export.

    Args:
        skeleton: the model, on the meta device.
        experts: name of the layer's experts module in it.
        width: of what its experts take.
        conversion: of the checkpoint that `read` reads.
    """
    rng = np.random.default_rng(_SEED)
    tokens = rng.standard_normal((PROBES, width))
    tokens /= np.sqrt(np.mean(np.square(tokens), axis=1, keepdims=True))
    x = torch.from_numpy(tokens.astype(np.float32))
    layer = skeleton.get_submodule(experts.rpartition(".")[0].rpartition(".")[0])
    children = dict(layer.named_children())
    name = next((name for name in _NAMES if name in children), None)
    if name is None:
        return x.numpy()
    prefix = f"{experts.rpartition('.')[0].rpartition('.')[0]}.{name}."
    weights = _weights(prefix, conversion, read)
    if any(len(weight) != width for weight in weights.values()) or weights.keys() != children[name].state_dict().keys():
        return x.numpy()  # experts in a narrower room than the layer's
    return torch.func.functional_call(children[name], weights, (x,)).float().numpy()


def _weights(prefix: str, conversion: Conversion, read: Callable[..., Any]) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for group in conversion.groups.values():
        if group.target.startswith(prefix):
            for name, tensor in conversion.convert(group, read).items():
                found[name.removeprefix(prefix)] = tensor.float()
    return found


def output_norm(outputs: Float32Array) -> tuple[float, float] | None:
    """Least and largest norm of an expert's outputs, rounded outwards to powers of two.

    So the last digits of a product, which differ from machine to machine, do not show in the bundle.

    Args:
        outputs: (probes, width)
    Returns:
        None where they are not finite.
    """
    norms = np.linalg.norm(outputs.astype(np.float64), axis=1)
    if not np.isfinite(norms).all():
        return None
    least, largest = float(norms.min()), float(norms.max())
    low = 2.0 ** math.floor(math.log2(least)) if least > 0 else 0.0
    return low, 2.0 ** math.ceil(math.log2(largest)) if largest > 0 else 0.0
