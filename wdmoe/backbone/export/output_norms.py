"""How large the outputs of an expert are, measured when it is exported: a base station doubts answers far outside.

What experts take comes out of a norm, so its size is known without any text: random vectors of unit mean square stand
for tokens, after the norm of the experts' own layer. Real ones differ (docs/bundle.md has the margins), which is why a
base station only looks twice at an answer outside the bounds.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import nn

from wdmoe.arrays import Float32Array
from wdmoe.backbone.export.conversion import Conversion, ReadTensor

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


def probes(skeleton: nn.Module, experts: str, width: int, conversion: Conversion, read: ReadTensor) -> Float32Array:
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
    layer = experts.rpartition(".")[0].rpartition(".")[0]
    norms = dict(skeleton.get_submodule(layer).named_children())
    name = next((name for name in _NAMES if name in norms), "")
    weights = _weights(f"{layer}.{name}.", conversion, read) if name else {}
    # Some experts work in a narrower room than their layer, behind a projection.
    if not weights or weights.keys() != norms[name].state_dict().keys() or {*map(len, weights.values())} != {width}:
        return np.asarray(x.numpy(), np.float32)
    return np.asarray(torch.func.functional_call(norms[name], weights, (x,)).numpy(), np.float32)


def _weights(prefix: str, conversion: Conversion, read: ReadTensor) -> dict[str, torch.Tensor]:
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
