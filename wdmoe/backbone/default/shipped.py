"""The decisions that ship with wdmoe: those of the default model."""

from __future__ import annotations

import hashlib
from importlib import resources

from wdmoe.backbone.split.decisions import Decisions, parse_decisions
from wdmoe.errors import BundleError

_FILE = "default_model.safetensors"


def shipped_decisions() -> Decisions:
    """The default model's.

    Raises:
        BundleError: the file that is installed with wdmoe is missing or damaged.
    """
    return parse_decisions(_read())


def shipped_digest() -> str:
    """SHA-256 of the file; errors as `shipped_decisions`, but for what is inside."""
    return hashlib.sha256(_read()).hexdigest()


def _read() -> bytes:
    try:
        return resources.files("wdmoe.backbone").joinpath("data", _FILE).read_bytes()
    except OSError as error:
        raise BundleError(f"{_FILE}, which comes with wdmoe, is missing: reinstall wdmoe") from error
