"""A Llama-like model that computes fast on a CPU, dense or split, with low-rank changes that can be trained.

A split FFN is computed as one dense SwiGLU whose neurons are multiplied by what the family's gate gives their expert
(1 where they are shared): no gather, no loop over experts, and the same result. The dense weights are frozen, so that
backward needs no gradient of theirs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch.nn import functional
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from wdmoe.backbone.split.decisions import MATRICES
from wdmoe.backbone.split.dense import DenseModel, Weights
from wdmoe.backbone.split.router import kept_weights


@dataclass(frozen=True, slots=True)
class Cut:
    """Which neuron goes where, and who chooses: fixed while the rest is trained."""

    owners: torch.Tensor  # (layers, neurons) int64: the expert of each neuron, or `experts` where it is shared
    routers: torch.Tensor  # (layers, experts, width) float32
    top_k: int

    def neuron_weights(self, layer: int, hidden: torch.Tensor) -> torch.Tensor:
        """(..., neurons) float32: what the gate multiplies each neuron by, for `hidden` (..., width) float32."""
        logits = functional.linear(hidden, self.routers[layer]).flatten(0, -2)
        gates = torch.cat([kept_weights(logits, self.top_k), logits.new_ones(len(logits), 1)], dim=1)
        return gates[:, self.owners[layer]].view(*hidden.shape[:-1], -1)


@dataclass(frozen=True, slots=True)
class Read:
    """What a model made of some windows."""

    hidden: torch.Tensor  # (windows, length, width) after the last norm: times the head, the logits
    streams: list[torch.Tensor]  # the same in front of each next layer, float32; empty unless asked for


def trainable(source: DenseModel, ranks: Mapping[str, int], seed: int) -> Weights:
    """What is trained, as it begins: changes nothing yet.

    Per layer and matrix in `ranks`: `LAYER.MATRIX.a` (rank, in), random, and `.b` (out, rank), zero; per layer
    `LAYER.input_norm`, `LAYER.ffn_norm` and `LAYER.neuron_scale`; and `final_norm`. All float32.
    """
    chooser = torch.Generator().manual_seed(seed)
    found: Weights = {"final_norm": source.weights["model.norm.weight"].clone()}
    for layer in range(source.config.num_hidden_layers):
        at = f"model.layers.{layer}."
        for matrix, wanted in ranks.items():
            rows, columns = source.weights[f"{at}{MATRICES[matrix]}.weight"].shape
            rank = min(wanted, rows, columns)
            found[f"{layer}.{matrix}.a"] = torch.randn(rank, columns, generator=chooser) * columns**-0.5
            found[f"{layer}.{matrix}.b"] = torch.zeros(rows, rank)
        found[f"{layer}.input_norm"] = source.weights[f"{at}input_layernorm.weight"].clone()
        found[f"{layer}.ffn_norm"] = source.weights[f"{at}post_attention_layernorm.weight"].clone()
        found[f"{layer}.neuron_scale"] = torch.ones(source.config.intermediate_size)
    return found


class FastLlama:
    """The frozen weights, in the dtype that matrices are multiplied in; hidden states stay float32 between layers."""

    def __init__(self, source: DenseModel, dtype: torch.dtype) -> None:
        weights, config = source.weights, source.config
        self.head = weights.get("lm_head.weight", weights["model.embed_tokens.weight"]).to(dtype)
        self._embedding = weights["model.embed_tokens.weight"]
        self._norms = {name: weight for name, weight in weights.items() if "norm" in name}
        self._matrices = {
            f"{layer}.{matrix}": weights[f"model.layers.{layer}.{module}.weight"].to(dtype)
            for layer in range(config.num_hidden_layers)
            for matrix, module in MATRICES.items()
        }
        self._config, self._dtype, self._rotary = config, dtype, LlamaRotaryEmbedding(config)

    def read(self, ids: torch.Tensor, changes: Mapping[str, torch.Tensor], cut: Cut | None, *, keep: bool) -> Read:
        """Read windows of tokens.

        Args:
            ids: (windows, length) int64.
            changes: under the names of `trainable`, factors in the model's dtype; empty: the dense weights.
            cut: None: all neurons of all tokens.
            keep: also give the streams.
        """
        streams = []
        hidden = self._embedding[ids]
        tables = self._rotary(hidden, torch.arange(ids.shape[1])[None])
        for layer in range(self._config.num_hidden_layers):
            hidden = self._attend(layer, hidden, tables, changes)
            hidden = self._feed_forward(layer, hidden, changes, cut)
            if keep:
                streams.append(hidden)
        last = self._normed(hidden, changes.get("final_norm", self._norms["model.norm.weight"]))
        return Read(last.to(self._dtype), streams)

    def _attend(
        self, layer: int, hidden: torch.Tensor, tables: tuple[torch.Tensor, ...], changes: Mapping[str, torch.Tensor]
    ) -> torch.Tensor:
        windows, length, _ = hidden.shape
        heads, size = self._config.num_key_value_heads, self._config.head_dim
        dense = self._norms[f"model.layers.{layer}.input_layernorm.weight"]
        normed = self._normed(hidden, changes.get(f"{layer}.input_norm", dense)).to(self._dtype)
        query, key, value = (
            self._linear(f"{layer}.{name}", normed, changes).view(windows, length, -1, size).transpose(1, 2)
            for name in ("q", "k", "v")
        )
        query, key = (_rotated(part, tables) for part in (query * size**-0.5, key))
        key = key - key.mean(2, keepdim=True)  # the softmax does not see it, bfloat16 does
        shared = query.reshape(windows, heads, -1, size)  # heads that share keys: more rows of one product
        scores = (shared @ key.transpose(2, 3)).view(windows, heads, -1, length, length)
        later = torch.full((length, length), -torch.inf, dtype=scores.dtype).triu(1)
        seen = (scores + later).softmax(-1).view(windows, heads, -1, length) @ value
        joined = seen.view(windows, -1, length, size).transpose(1, 2).flatten(2)
        return hidden + self._linear(f"{layer}.o", joined, changes)

    def _feed_forward(
        self, layer: int, hidden: torch.Tensor, changes: Mapping[str, torch.Tensor], cut: Cut | None
    ) -> torch.Tensor:
        dense = self._norms[f"model.layers.{layer}.post_attention_layernorm.weight"]
        normed = self._normed(hidden, changes.get(f"{layer}.ffn_norm", dense))
        given = normed.to(self._dtype)
        gate, up = (self._linear(f"{layer}.{name}", given, changes) for name in ("gate", "up"))
        neurons = functional.silu(gate) * up
        if cut is not None:
            weights = cut.neuron_weights(layer, normed.detach())  # the choice has no gradient
            neurons = neurons * (weights * changes.get(f"{layer}.neuron_scale", 1.0)).to(self._dtype)
        return hidden + self._linear(f"{layer}.down", neurons, changes)

    def _linear(self, matrix: str, x: torch.Tensor, changes: Mapping[str, torch.Tensor]) -> torch.Tensor:
        y = functional.linear(x, self._matrices[matrix])
        if f"{matrix}.a" in changes:
            y = y + functional.linear(functional.linear(x, changes[f"{matrix}.a"]), changes[f"{matrix}.b"])
        return y

    def _normed(self, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        scale = torch.rsqrt(hidden.square().mean(-1, keepdim=True) + self._config.rms_norm_eps)
        return hidden * scale * weight


def _rotated(x: torch.Tensor, tables: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Rotary positions on (windows, heads, length, size)."""
    cos, sin = (table[:, None].to(x.dtype) for table in tables)
    first, second = x.chunk(2, dim=-1)
    turned = torch.cat([-second, first], dim=-1)
    return x * cos + turned * sin
