"""Documented import paths outlive a move, and lead to the very module."""

from __future__ import annotations

import importlib
import sys

import pytest

from wdmoe.former_paths import MOVED


@pytest.mark.parametrize("former", MOVED)
def test_a_former_path_is_the_module_itself(former: str) -> None:
    now = importlib.import_module(MOVED[former])
    spec = now.__spec__
    with pytest.warns(DeprecationWarning, match=f"{former} is {MOVED[former]} now"):
        assert importlib.import_module(former) is now
    assert now.__spec__ is spec
    del sys.modules[former]


def test_other_paths_are_missing_as_ever() -> None:
    with pytest.raises(ModuleNotFoundError, match="no_such"):
        importlib.import_module("wdmoe.no_such")
