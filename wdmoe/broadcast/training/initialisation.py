"""What a training run starts from: the device, sums in a fixed order, and a codec that is not trained."""

from __future__ import annotations

import os

import torch

from wdmoe.arrays import Pixels
from wdmoe.broadcast.codec.model import BroadcastCodec, ModelSettings
from wdmoe.broadcast.codec.principal import fit_principal
from wdmoe.errors import ConfigError

DEVICES = ("auto", "cpu", "cuda")


def device_of(name: str, local_rank: int = 0) -> torch.device:
    """One of `DEVICES` as a device of this process; ConfigError if there is no such one here."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("no CUDA device here; use --device cpu")
    return torch.device(name, local_rank) if name == "cuda" else torch.device(name)


def repeatable() -> None:
    """For the whole process: a run repeats on the same machine; slow kernels where fast ones add in no fixed order."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)


def untrained(settings: ModelSettings, pixels: Pixels, seed: int) -> BroadcastCodec:
    """The linear code for pictures like these (picture, side, side, 3), and networks that add nothing yet."""
    torch.manual_seed(seed)
    codec = BroadcastCodec(settings)
    codec.take(fit_principal(pixels, 2 * settings.tokens * settings.slots))
    return codec
