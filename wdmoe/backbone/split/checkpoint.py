"""The split model as a transformers checkpoint of family granitemoeshared.

That family is Llama with four multipliers, a shared MLP and top-k softmax routing. It is chosen because plain
`AutoModelForCausalLM.from_pretrained` loads it.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import GenerationConfig, GraniteMoeSharedConfig, GraniteMoeSharedForCausalLM
from transformers.utils import logging as hub_logging

from wdmoe.backbone.split.dense import DenseModel
from wdmoe.backbone.split.layer import SplitLayer
from wdmoe.backbone.split.llama import moe_fields, plain_fields
from wdmoe.backbone.split.settings import SplitSettings
from wdmoe.errors import BundleError


def moe_model(source: DenseModel, layers: Sequence[SplitLayer], settings: SplitSettings) -> Any:
    """The split model as a torch module; weights outside the FFNs are shared with `source`."""
    config = GraniteMoeSharedConfig(**moe_fields(plain_fields(source.config), settings))
    with torch.device("meta"):
        model = GraniteMoeSharedForCausalLM(config)
    weights = {name: tensor for name, tensor in source.weights.items() if ".mlp." not in name}
    for index, layer in enumerate(layers):
        at = f"model.layers.{index}."
        weights[at + "block_sparse_moe.router.weight"] = layer.router
        weights[at + "block_sparse_moe.experts.gate_up_proj"] = layer.gate_up
        weights[at + "block_sparse_moe.experts.down_proj"] = layer.down
        if config.shared_intermediate_size:
            weights[at + "shared_mlp.input_linear.weight"] = layer.shared_gate_up
            weights[at + "shared_mlp.output_linear.weight"] = layer.shared_down
    model.load_state_dict(weights, assign=True, strict=False)
    model.tie_weights()
    model.model.rotary_emb = type(model.model.rotary_emb)(config)  # its tables are not in a checkpoint
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    )
    model.requires_grad_(False)
    return model.eval()


def write_checkpoint(model: Any, tokenizer: Any, card: str, out: Path) -> None:
    """Write config, weights, tokenizer and model card; `out` appears whole or not at all.

    Raises:
        BundleError: `out` exists, or it cannot be written (no space, no permission).
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    except OSError as error:
        raise BundleError(f"cannot write to {out.parent}: {error.strerror or error}") from error
    try:
        with no_progress_bar():
            model.save_pretrained(part)
        tokenizer.save_pretrained(part)
        (part / "README.md").write_text(card, "utf-8")
        part.chmod(0o755)  # mkdtemp makes it private
        part.rename(out)
    except (OSError, SafetensorError) as error:
        raise BundleError(f"cannot write {out}: {error}") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


@contextmanager
def no_progress_bar() -> Iterator[None]:
    """transformers draws its own bar while saving, across the caller's."""
    shown = hub_logging.is_progress_bar_enabled()
    hub_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            hub_logging.enable_progress_bar()


def model_card(source: DenseModel, settings: SplitSettings, figures: dict[str, Any]) -> str:
    """README.md of the checkpoint: source, licence, hash, settings and measured figures."""
    texts = ", ".join(file.name for file in settings.calibration) or "shipped with wdmoe (public domain and MIT)"
    return f"""---
license: {source.licence or "unknown"}
library_name: transformers
tags: [mixture-of-experts, wdmoe]
---
# {source.name}, split into experts

Made by `wdmoe-node split` from the dense model {source.name} without training. In every layer the strongest
neurons of the FFN stay as a shared MLP, the rest became {settings.experts} experts of which {settings.top_k} are
computed per token.

| | |
| --- | --- |
| source | {source.name}, SHA-256 of its weights `{figures["sha256"]}` |
| licence | {source.licence or "not stated by the source"} (as the source) |
| experts, computed per token | {settings.experts}, {settings.top_k} |
| fraction of neurons shared | {settings.shared} |
| calibration | {figures["calibration_tokens"]} tokens: {texts} |
| corrections | {"closed-form refit of output weights" if settings.correct else "none"} |
| seed | {settings.seed} |
| perplexity, dense | {figures["dense_perplexity"]} |
| perplexity, split | {figures["split_perplexity"]} ({figures["ratio"]} times) |
| measured on | {figures["tokens"]} tokens of other text, windows of {settings.window} |
| made in | {figures["seconds"]} s |

Gate weights are near uniform on purpose. `wdmoe.gate_temperature` in `config.json` recovers the scale that ranks
experts (`softmax(logits / gate_temperature)`), and their squares rank them better still (`wdmoe.rank`); when an expert
is dropped the others keep their weight (`wdmoe.on_drop`).
"""
