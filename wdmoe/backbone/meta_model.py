"""A transformers model without its weights: from a folder's config, on the meta device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.initialization import no_init_weights

from wdmoe.backbone.families import experts_names
from wdmoe.errors import BundleError


def read_config(folder: Path) -> Any:
    """The config of a model folder; code that a checkpoint may carry is never run.

    Raises:
        BundleError: unreadable, or a model type that this transformers does not know.
    """
    try:
        return transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises OSError, ValueError, KeyError and its own
        raise BundleError(f"cannot read {folder / 'config.json'}: {_one_line(error)}") from error


def meta_model(config: Any) -> Any:
    """The model of a config with every tensor on the meta device, experts in their family's own (eager) code.

    Raises:
        BundleError: not a family that can be served, with its name and the reason.
    """
    family = config.model_type
    if getattr(config, "quantization_config", None):
        raise BundleError(f"{family}: the checkpoint is quantised; dequantise it first (to bf16 or fp32)")
    try:
        with torch.device("meta"), no_init_weights():
            model = transformers.AutoModelForCausalLM.from_config(
                config, dtype=torch.float32, experts_implementation="eager"
            )
    except Exception as error:  # whatever a family's constructor raises
        raise BundleError(f"{family}: transformers makes no text model of it: {_one_line(error)}") from error
    try:
        experts_names(model)
    except BundleError as error:
        raise BundleError(f"{family}: {error}") from error
    return model.eval()


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
