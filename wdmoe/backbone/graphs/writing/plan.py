"""What the station's part of a model consists of, read from its config.json and its tensors' names. No torch, no I/O.

A family that is not listed here, or that asks for something that has no graph here, is refused by name: it is served
by the other engine.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from wdmoe.backbone.graphs.writing.rope import Rope, latent_sharpness, rope_of
from wdmoe.errors import UnsupportedModelError

GATED = "silu"
HEAD_STEP = 16  # of ONNX Runtime's GroupQueryAttention


@dataclass(frozen=True, slots=True, kw_only=True)
class Latent:
    """Keys and values of all heads made of one vector a token, which is all that is kept of it. Sizes of its parts."""

    rotated: int  # is the key of all heads as it is
    rank: int  # from which matrices make the rest of each head's key, and its value
    plain: int  # that rest
    value: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Attention:
    """Grouped-query attention of one decoder layer. Names are of tensors; "" where there is none.

    Latent attention is that too: the matrices of each head are applied to its query and to its output instead, so that
    all heads share one key, which is also the value.
    """

    prefix: str
    heads: int
    kv_heads: int
    head_size: int
    scale: float
    window: int  # how many tokens back it sees; 0: all
    norm: str  # of queries and keys: "" none, "head" for each head, "row" over all of them
    clip: float  # largest magnitude of queries, keys and values; 0: any
    sinks: bool
    interleaved: bool  # its rotation is of neighbours, not of halves
    latent: Latent | None = None

    @property
    def widths(self) -> Mapping[str, int]:
        """What attention takes of a token: queries, keys and values in one, or apart where they are normalised."""
        query, other = self.heads * self.head_size, self.kv_heads * self.head_size
        return {"query": query, "key": other, "value": other} if self.norm else {"query": query + 2 * other}

    @property
    def shape(self) -> Attention:
        """The same for all layers that can share a graph."""
        return replace(self, prefix="", clip=0.0, latent=None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Router:
    """Scores of experts, the best of them, and their weights."""

    prefix: str
    top_k: int
    rule: str  # "softmax" or "sigmoid" of all, then the best; "best": softmax of the best only; "near": see `closeness`
    renormalise: bool
    closeness: float = 0.0  # each choice's weight: its softmax among those that differ by no more of the larger one
    correction: str = ""  # a tensor that is added to the scores for the choice, not for the weights
    groups: int = 1  # the experts stand in so many groups,
    group_k: int = 1  # of which so many are chosen first,
    group_best: int = 2  # by the sum of so many of their best
    factor: float = 1.0  # of the weights, in the end


@dataclass(frozen=True, slots=True, kw_only=True)
class Gated:
    """A feed-forward network with a gate. Names are of modules: a matrix, and maybe a bias."""

    gate: str  # with `up` below it, where that has no name
    up: str
    down: str
    scored: str = ""  # to one score, whose sigmoid multiplies the output


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """One decoder layer. Either `router` (and maybe `shared`), or `dense`."""

    number: int
    prefix: str
    attention: Attention
    router: Router | None
    shared: Gated | None
    dense: Gated | None


@dataclass(frozen=True, slots=True, kw_only=True)
class StationPlan:
    """All that is needed to write the graphs."""

    hidden: int
    vocabulary: int
    epsilon: float
    layers: tuple[Layer, ...]
    rope: Rope
    embedding: str
    head: str
    embedding_multiplier: float
    residual_multiplier: float
    logits_divisor: float

    def has_experts_below(self, number: int) -> bool:
        """Whether the layer before this one ends in experts. `number`: that of the head is the count of layers."""
        return number > 0 and self.layers[number - 1].router is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Names:
    """What a family calls its parts."""

    block: str
    router: str
    rule: str
    renormalise: bool | None = None  # None: as `norm_topk_prob` says
    correction: str = ""
    shared: str = ""
    scored: str = ""
    norm: str = ""  # of queries and keys, where there is one
    sinks: bool = False
    interleaved: bool = False  # rotation of neighbours, not of halves; `rope_interleave` may say otherwise
    latent: bool = False
    group_best: int = 2
    methods: bool = False  # `topk_method` says whether groups matter


_FAMILIES = {
    "mixtral": _Names(block="mlp", router="gate", rule="softmax", renormalise=True),
    "qwen2_moe": _Names(
        block="mlp", router="gate", rule="softmax", shared="mlp.shared_expert", scored="mlp.shared_expert_gate"
    ),
    "qwen3_moe": _Names(block="mlp", router="gate", rule="softmax", norm="head"),
    "olmoe": _Names(block="mlp", router="gate", rule="softmax", norm="row"),
    "granitemoe": _Names(block="block_sparse_moe", router="router", rule="best", renormalise=False),
    "granitemoeshared": _Names(
        block="block_sparse_moe", router="router", rule="best", renormalise=False, shared="shared_mlp"
    ),
    "gpt_oss": _Names(block="mlp", router="router", rule="best", renormalise=False, sinks=True),
    "glm4_moe": _Names(
        block="mlp",
        router="gate",
        rule="sigmoid",
        correction="e_score_correction_bias",
        shared="mlp.shared_experts",
        norm="head",
    ),
    "ernie4_5_moe": _Names(
        block="mlp",
        router="gate",
        rule="softmax",
        renormalise=True,
        correction="moe_statics.e_score_correction_bias",
        shared="mlp.shared_experts",
        interleaved=True,
    ),
    "phimoe": _Names(block="mlp", router="router", rule="near", renormalise=False),
    "deepseek_v2": _Names(
        block="mlp",
        router="gate",
        rule="softmax",
        renormalise=False,
        shared="mlp.shared_experts",
        interleaved=True,
        latent=True,
        group_best=1,
        methods=True,
    ),
    "deepseek_v3": _Names(
        block="mlp",
        router="gate",
        rule="sigmoid",
        correction="e_score_correction_bias",
        shared="mlp.shared_experts",
        interleaved=True,
        latent=True,
    ),
}
SUPPORTED = tuple(_FAMILIES)


def station_plan(config: Mapping[str, Any], tensors: Collection[str], moe_layers: Collection[int]) -> StationPlan:
    """Read a plan.

    Args:
        config: of config.json, which says all that `wdmoe.backbone.format.station_config` lists.
        tensors: names of the station's tensors.
        moe_layers: decoder layers with experts.
    Raises:
        UnsupportedModelError: the family, or something that this config asks for, has no graph here.
    """
    family = str(config.get("model_type", ""))
    names = _FAMILIES.get(family)
    if names is None:
        raise UnsupportedModelError(f"the graphs know {', '.join(SUPPORTED)}, and not {family or 'this family'}")
    if config.get("hidden_act", GATED) != GATED:
        raise UnsupportedModelError(f"the graphs know the activation {GATED}, not {config['hidden_act']}")
    layers = tuple(
        _layer(number, config, names, tensors, number in moe_layers) for number in range(config["num_hidden_layers"])
    )
    part = layers[0].attention
    rope = rope_of(config, part.head_size if part.latent is None else part.latent.rotated)
    for size, what in ((part.head_size, "heads"), (2 * len(rope.frequencies), "rotations")):
        if size % HEAD_STEP:
            raise UnsupportedModelError(f"the graphs know {what} of multiples of {HEAD_STEP}, not of {size}")
    tied = "lm_head.weight" not in tensors
    return StationPlan(
        hidden=int(config["hidden_size"]),
        vocabulary=int(config["vocab_size"]),
        epsilon=float(config.get("rms_norm_eps", 1e-5)),
        layers=layers,
        rope=rope,
        embedding="model.embed_tokens.weight",
        head="model.embed_tokens.weight" if tied else "lm_head.weight",
        embedding_multiplier=float(config.get("embedding_multiplier") or 1.0),
        residual_multiplier=float(config.get("residual_multiplier") or 1.0),
        logits_divisor=float(config.get("logits_scaling") or 1.0),
    )


def _layer(number: int, config: Mapping[str, Any], names: _Names, tensors: Collection[str], moe: bool) -> Layer:
    prefix = f"model.layers.{number}."
    attention = _attention(number, config, names, tensors)
    router = shared = dense = None
    if moe:
        router = _router(prefix, config, names)
        shared = _shared(prefix, names, tensors) if names.shared else None
    else:
        dense = _gated(f"{prefix}mlp")
    return Layer(number=number, prefix=prefix, attention=attention, router=router, shared=shared, dense=dense)


def _attention(number: int, config: Mapping[str, Any], names: _Names, tensors: Collection[str]) -> Attention:
    prefix = f"model.layers.{number}.self_attn."
    heads = int(config["num_attention_heads"])
    latent = _latent(config) if names.latent else None
    if latent is None:
        kv_heads = int(config.get("num_key_value_heads") or heads)
        head_size = int(config.get("head_dim") or config["hidden_size"] // heads)
        scale = head_size**-0.5
    else:
        kv_heads, head_size = 1, latent.rotated + latent.rank
        scale = (latent.rotated + latent.plain) ** -0.5 * latent_sharpness(config)
    return Attention(
        prefix=prefix,
        heads=heads,
        kv_heads=kv_heads,
        head_size=head_size,
        scale=float(config.get("attention_multiplier") or scale),
        window=_window(number, config),
        norm=names.norm if f"{prefix}q_norm.weight" in tensors else "",
        clip=float(config.get("clip_qkv") or 0.0),
        sinks=names.sinks,
        interleaved=names.interleaved and bool(config.get("rope_interleave", True)),
        latent=latent,
    )


def _latent(config: Mapping[str, Any]) -> Latent:
    return Latent(
        rotated=int(config["qk_rope_head_dim"]),
        rank=int(config["kv_lora_rank"]),
        plain=int(config["qk_nope_head_dim"]),
        value=int(config["v_head_dim"]),
    )


def _router(prefix: str, config: Mapping[str, Any], names: _Names) -> Router:
    at = f"{prefix}{names.block}.{names.router}."
    grouped = not names.methods or config.get("topk_method") != "greedy"
    return Router(
        prefix=at,
        top_k=int(config["num_experts_per_tok"] if "num_experts_per_tok" in config else config["moe_k"]),
        rule=names.rule,
        renormalise=bool(config.get("norm_topk_prob")) if names.renormalise is None else names.renormalise,
        closeness=2 * float(config.get("router_jitter_noise") or 0.0),
        correction=f"{at}{names.correction}" if names.correction else "",
        groups=int(config.get("n_group") or 1) if grouped else 1,
        group_k=int(config.get("topk_group") or 1),
        group_best=names.group_best,
        factor=float(config.get("routed_scaling_factor") or 1.0),
    )


def _window(number: int, config: Mapping[str, Any]) -> int:
    """As far back as a layer sees; 0: to the first token."""
    size, kinds = int(config.get("sliding_window") or 0), config.get("layer_types")
    if not size or config.get("use_sliding_window") is False:
        return 0
    if kinds is not None:
        return size if kinds[number] == "sliding_attention" else 0
    return 0 if number < int(config.get("max_window_layers") or 0) else size


def _gated(prefix: str) -> Gated:
    return Gated(gate=f"{prefix}.gate_proj", up=f"{prefix}.up_proj", down=f"{prefix}.down_proj")


def _shared(prefix: str, names: _Names, tensors: Collection[str]) -> Gated | None:
    at = f"{prefix}{names.shared}"
    joined = f"{at}.input_linear"
    if f"{joined}.weight" in tensors:  # gate and up one below the other
        return Gated(gate=joined, up="", down=f"{at}.output_linear")
    if f"{at}.gate_proj.weight" not in tensors:
        return None
    return replace(_gated(at), scored=f"{prefix}{names.scored}" if names.scored else "")
