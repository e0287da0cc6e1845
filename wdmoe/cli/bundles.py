"""The bundle that a command line names."""

from __future__ import annotations

from pathlib import Path


def find_bundle(text: str) -> Path:
    """The folder that `text` names; the word `default` means the default model, made on first use.

    Raises:
        MissingExtraError, BundleError: the default model cannot be made.
    """
    if text != "default":
        return Path(text)
    from wdmoe.backbone.default.bundle import default_bundle
    from wdmoe.cli.progress import ByteProgress, StageProgress

    with StageProgress("default model") as splitting, ByteProgress("default bundle") as exporting:
        return default_bundle(splitting=splitting.reach, exporting=exporting)
