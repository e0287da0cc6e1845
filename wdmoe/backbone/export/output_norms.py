"""What the experts of a layer take when their outputs are measured, by the family's own norm: see `norm_bounds`."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from wdmoe.arrays import Float32Array
from wdmoe.backbone.export.conversion import Conversion, ReadTensor
from wdmoe.backbone.export.norm_bounds import unit_tokens

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
    x = torch.from_numpy(unit_tokens(width))
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
