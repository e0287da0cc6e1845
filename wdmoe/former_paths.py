"""Import paths that documents named before the packages had rooms. They still work, with a DeprecationWarning."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

MOVED = {
    "wdmoe.backbone.bundle": "wdmoe.backbone.format.bundle",
    "wdmoe.backbone.default_model": "wdmoe.backbone.default.model",
    "wdmoe.backbone.gate_function": "wdmoe.backbone.export.gate_function",
    "wdmoe.broadcast.aims": "wdmoe.broadcast.quality.operating_point",
    "wdmoe.broadcast.fading": "wdmoe.broadcast.codec.channel",
    "wdmoe.broadcast.law": "wdmoe.broadcast.quality.quality_law",
    "wdmoe.broadcast.losses": "wdmoe.broadcast.training.losses",
    "wdmoe.broadcast.model": "wdmoe.broadcast.codec.model",
    "wdmoe.broadcast.single_user": "wdmoe.broadcast.baselines.single_user",
}


class _FormerPaths(MetaPathFinder, Loader):
    """Finds a module under its former name: the very module, not a copy."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return ModuleSpec(fullname, self) if fullname in MOVED else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        now = MOVED[spec.name]
        warnings.warn(f"{spec.name} is {now} now", DeprecationWarning, stacklevel=2)
        module = importlib.import_module(now)
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        """It ran already. The import system has put the former name's spec into it: that must not stay."""
        if module.__spec__ is not None:
            module.__spec__ = module.__spec__.loader_state


def keep_former_paths() -> None:
    """Let the former paths be imported, behind everything that really stands there."""
    sys.meta_path.append(_FormerPaths())
