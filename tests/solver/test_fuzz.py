"""Random calls of every public function of the solver: refused in one line, or what is promised holds."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.lab.solver_fuzz.__main__ import KINDS, run

TREE = Path(__file__).parents[2]
NO_SANITIZERS = 3  # exit code of tools/sanitize


@pytest.mark.filterwarnings("error")
def test_random_calls_keep_what_is_promised():
    told = []
    assert run(6_000, 20240623, tell=told.append) == 0, "\n".join(told)
    assert all(name in told[-1] for name in KINDS), told[-1]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the sanitizers are loaded the way Linux does it")
def test_nothing_is_found_by_the_sanitizers():
    command = [sys.executable, "tools/sanitize", "--no-tests", "--cases", "4000", "--seed", "1"]
    ran = subprocess.run(command, cwd=TREE, capture_output=True, text=True, timeout=280, check=False)
    if ran.returncode == NO_SANITIZERS:
        pytest.skip(f"NOT CHECKED BY THE SANITIZERS: {ran.stderr.strip()}")
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-3000:]
    assert "4000 cases from seed 1" in ran.stdout
