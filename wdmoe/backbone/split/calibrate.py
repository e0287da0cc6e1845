"""Two streams of calibration activations, layer by layer: the dense model's, and the split model's as it comes to be.

The split stream is what a layer will really see at run time, the dense stream is where it should end up.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.nn import functional
from transformers import LlamaForCausalLM

from wdmoe.backbone.split.dense import DenseModel

_WINDOWS = 4  # pushed through attention at a time: bounds memory, not the result


def dense_model(source: DenseModel) -> Any:
    """The dense model as a torch module in evaluation mode; it shares the weights of `source`."""
    with torch.device("meta"):
        model = LlamaForCausalLM(source.config)
    model.load_state_dict(source.weights, assign=True, strict=False)
    model.tie_weights()
    model.model.rotary_emb = type(model.model.rotary_emb)(source.config)  # its tables are not in a checkpoint
    model.requires_grad_(False)
    return model.eval()


class Streams:
    """Hidden states of all calibration windows, (windows, length, width), in front of one layer after another."""

    def __init__(self, model: Any, windows: torch.Tensor, *, with_dense: bool) -> None:
        self.split: torch.Tensor = model.model.embed_tokens(windows)
        self.dense: torch.Tensor | None = self.split.clone() if with_dense else None
        self._positions = model.model.rotary_emb(self.split[:1], torch.arange(windows.shape[1])[None])

    def attend(self, layer: Any) -> None:
        """Add the layer's attention."""
        for stream in (self.split, self.dense) if self.dense is not None else (self.split,):
            for part in _parts(stream):
                normed = layer.input_layernorm(part)
                part += layer.self_attn(normed, position_embeddings=self._positions, attention_mask=None)[0]

    def step_dense(self, layer: Any) -> None:
        """Add the layer's dense FFN to the dense stream."""
        if self.dense is not None:
            for part in _parts(self.dense):
                part += layer.mlp(layer.post_attention_layernorm(part))

    def add_split(self, output: torch.Tensor) -> None:
        """Add a split FFN's output, (tokens, width), to the split stream."""
        self.split += output.view_as(self.split)


def _parts(stream: torch.Tensor) -> Iterator[torch.Tensor]:
    """Views of a few windows each, to be changed in place."""
    for start in range(0, len(stream), _WINDOWS):
        yield stream[start : start + _WINDOWS]


def activations(layer: Any, hidden: torch.Tensor) -> torch.Tensor:
    """Activations of all neurons of a layer's FFN.

    Args:
        hidden: (tokens, width), after the norm.
    Returns:
        (tokens, neurons): what the down projection multiplies.
    """
    gate = functional.silu(layer.mlp.gate_proj(hidden), inplace=True)
    return gate.mul_(layer.mlp.up_proj(hidden))
