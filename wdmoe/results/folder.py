"""What all results folders have in common: a manifest with the SHA-256 of every file, written last."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from wdmoe.errors import ConfigError

MANIFEST = "manifest.json"
# What a manifest says that it is of.
SIMULATION_KIND = "wdmoe simulation results"
BROADCAST_KIND = "wdmoe broadcast results"
LOSSES_KIND = "wdmoe broadcast losses"
_MOST_BYTES = 1 << 30


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """With sorted keys, for people too."""
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest; ConfigError if there is none that can be read."""
    file = folder / MANIFEST
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{file} cannot be read: {error}") from error
    if not isinstance(manifest, dict):
        raise ConfigError(f"{file} is not a manifest")
    return manifest


def kind_of(folder: Path) -> str:
    """What a folder's manifest says that it is of; empty where it says nothing or cannot be read."""
    try:
        found = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return ""
    kind = found.get("kind", "") if isinstance(found, dict) else ""
    return kind if isinstance(kind, str) else ""


def check_files(folder: Path, manifest: Mapping[str, Any], needed: Collection[str]) -> None:
    """ConfigError if a file is not the one that the manifest lists, or one that is needed is not listed."""
    files = manifest.get("files")
    if not isinstance(files, dict) or not set(needed) <= set(files):
        raise ConfigError(f"{folder}: the manifest does not list the files")
    for name, expected in files.items():
        if Path(name).name != name:
            raise ConfigError(f"{folder}: {name!r} is not the name of a file in this folder")
        if sha256_of(folder / name) != expected:
            raise ConfigError(f"{folder / name} was changed: its SHA-256 is not the manifest's")


def sha256_of(file: Path) -> str:
    """Of a file of at most 1 GiB; ConfigError if it cannot be read."""
    try:
        if file.stat().st_size > _MOST_BYTES:
            raise ConfigError(f"{file} is larger than 1 GiB")
        return hashlib.sha256(file.read_bytes()).hexdigest()
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error}") from error
