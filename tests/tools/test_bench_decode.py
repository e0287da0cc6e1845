"""The benchmark's own parts, as far as they can be wrong."""

from __future__ import annotations

import sys
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from types import ModuleType

import pytest
import zmq


@pytest.fixture
def bench(repository: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    file = next(
        path for path in (repository / "tools/bench/decode", repository / "tools/bench_decode") if path.exists()
    )
    monkeypatch.syspath_prepend(str(file.parent))
    spec = spec_from_loader("bench_decode", SourceFileLoader("bench_decode", str(file)))
    module = module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "bench_decode", module)
    spec.loader.exec_module(module)
    return module


def test_the_echo_takes_any_key(bench, monkeypatch):
    """One key in forty begins with a dash in one half or the other; argparse read that as an option."""
    keys = next(pair for pair in iter(zmq.curve_keypair, None) if pair[1].startswith(b"-"))
    monkeypatch.setattr(zmq, "curve_keypair", lambda: keys)
    echo = bench.Echo(1024)
    try:
        assert echo.once() > 0
    finally:
        echo.close()
