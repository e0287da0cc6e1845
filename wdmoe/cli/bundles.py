"""The bundle that a command line names."""

from __future__ import annotations

from pathlib import Path

DEFAULT = "default"


def alias_of(text: str) -> str:
    """The name that clients may use for the model: the word `default`, or the name of the bundle's folder."""
    return DEFAULT if text == DEFAULT else Path(text).resolve().name


def find_bundle(text: str) -> Path:
    """The folder that `text` names; the word `default` means the default model, made on first use.

    Raises:
        MissingExtraError, BundleError: the default model cannot be made.
    """
    if text != DEFAULT:
        return Path(text)
    from wdmoe.backbone.default.bundle import default_bundle
    from wdmoe.cli.progress import ByteProgress, StageProgress

    with StageProgress("default model") as splitting, ByteProgress("default bundle") as exporting:
        return default_bundle(splitting=splitting.reach, exporting=exporting)
