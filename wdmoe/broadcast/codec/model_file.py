"""A codec's weights in one safetensors file, with the settings of the model inside."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from wdmoe.broadcast.codec.model import BroadcastCodec, ModelSettings
from wdmoe.errors import BundleError, ConfigError


def save_model(codec: BroadcastCodec, file: Path) -> None:
    """Write the weights with their settings; the same weights give the same bytes."""
    weights = {name: weight.detach().cpu().contiguous() for name, weight in codec.state_dict().items()}
    weights["basis"] = weights["basis"].half()  # the codec keeps it rounded so
    save_file(weights, file, {"settings": json.dumps(asdict(codec.settings), sort_keys=True)})


def load_model(file: Path) -> BroadcastCodec:
    """A codec in evaluation mode.

    Raises:
        BundleError: the file is missing, damaged or not such a model.
    """
    try:
        with safe_open(file, framework="pt") as stored:
            settings = ModelSettings(**json.loads(stored.metadata()["settings"]))
            codec = BroadcastCodec(settings)
            codec.load_state_dict({name: stored.get_tensor(name) for name in stored.keys()})  # noqa: SIM118
    except (OSError, SafetensorError, RuntimeError, ValueError, KeyError, TypeError, ConfigError) as error:
        raise BundleError(f"{file} is not a broadcast model that can be read: {error}") from error
    return codec.eval()
