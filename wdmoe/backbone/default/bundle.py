"""The bundle of the default model: made once and kept in the cache."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from wdmoe.backbone.cached_folder import make_once
from wdmoe.backbone.default.model import NAME, default_source, made_name
from wdmoe.backbone.default.shipped import shipped_decisions
from wdmoe.backbone.format.bundle import FORMAT_VERSION, MANIFEST_NAME
from wdmoe.backbone.split.settings import Progress, quiet
from wdmoe.config import cache_home

# Raised whenever the same checkpoint gives another bundle. 2: with the rank in the manifest; 3: and the output norms.
_RECIPE = 3

if TYPE_CHECKING:
    from wdmoe.backbone.export.progress import ExportProgress


def default_bundle(
    precision: str = "fp32", splitting: Progress = quiet, exporting: ExportProgress | None = None
) -> Path:
    """Its folder; made on the first call (seconds), found on later ones.

    Two processes that call this together make it once: the second waits for the first. What was interrupted is
    resumed. No checkpoint folder is needed on the way.

    Args:
        precision: of the experts' weights.
        splitting: told how far the split is.
        exporting: told how far the export is.
    Raises:
        MissingExtraError, BundleError: see `default_checkpoint`.
        BundleError: the cache folder cannot be written.
    """
    folder = cache_home() / "bundles" / f"{made_name()}-{precision}-v{FORMAT_VERSION}.{_RECIPE}"
    manifest = folder / MANIFEST_NAME  # written last
    if manifest.is_file():
        return folder

    def make() -> None:
        splitting("start", 0.0)  # what is imported now takes a second
        from wdmoe.backbone.default.write import write_decided_bundle  # onnx and more: only here needed

        write_decided_bundle(
            default_source(),
            shipped_decisions(),
            folder,
            name=NAME,
            precision=precision,
            progress=splitting,
            exporting=exporting,
        )

    return make_once(folder, manifest.is_file, make)
