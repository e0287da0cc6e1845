"""The benches of many devices run, small: they find what is right, and every device ends."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.lab.waiting import PATIENCE_S

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]


def bench(tool: str, *words: str) -> str:
    command = [sys.executable, str(ROOT / "tools" / "bench" / tool), *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_the_worst_are_killed_and_the_answer_is_right(tmp_path: Path) -> None:
    out = tmp_path / "figures.json"
    shape = ("--devices", "4", "--layers", "1", "--experts", "4")
    bench("large_fleet", *shape, "--kill", "2", "--which", "worst", "--tokens", "12", "--json", str(out))
    found = json.loads(out.read_text())
    assert found["start"]["idle_devices"] == 0
    assert found["start"]["fewest_copies"] == 4
    (only,) = found["rounds"]
    assert (only["right"], only["degraded"], only["tokens"], only["next_answer_right"]) == (True, False, 12, True)


def test_devices_that_are_stopped_at_any_moment_end(tmp_path: Path) -> None:
    out = tmp_path / "figures.json"
    bench("start_stop", "--devices", "3", "--rounds", "2", "--longest", "4", "--json", str(out))
    rounds = json.loads(out.read_text())["rounds"]
    assert [each["left"] for each in rounds] == [0, 0]
    assert {int(code) for each in rounds for code in each["codes"]} <= {0, -15}
