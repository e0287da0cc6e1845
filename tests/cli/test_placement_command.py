"""`wdmoe-node place`: a placement file from a trace, and what is said of wrong input."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from tests.lab.command import fails, run, run_here
from wdmoe.cli.main import cli
from wdmoe.errors import WdmoeError
from wdmoe.records import ExpertId
from wdmoe.simulation.scenario_file import shipped_trace
from wdmoe.solver.placement.file import check_placement, read_placement

TRACE = str(shipped_trace())
EVERY = [ExpertId(layer, expert) for layer in range(30) for expert in range(8)]
SIZE = ["--expert-size", "1MiB"]


def test_a_plan_is_a_placement_file():
    result = run("place", TRACE, "--device", "kit=100MiB,2ms", "--device", "a=b=1GiB,1ms", *SIZE)
    assert result.returncode == 0, result.stderr
    placement = read_placement(result.stdout)
    check_placement(placement, EVERY)
    assert len(placement["kit"]) <= 100
    assert len(placement["a=b"]) == 240 - len(placement["kit"])
    assert "240 experts placed" in result.stderr


def test_copies_and_the_exact_way_from_a_file(tmp_path):
    devices = tmp_path / "devices.json"
    rows = {"kit": ("100MiB", "2ms"), "desk": ("120MiB", "1ms"), "old": ("100MiB", "5ms")}
    devices.write_text(json.dumps({name: {"memory": size, "token": time} for name, (size, time) in rows.items()}))
    words = ["place", TRACE, "--devices", str(devices), *SIZE, "--replicas", "2"]
    result = CliRunner().invoke(cli, [*words, "--exact", "--time-limit", "1s"])
    assert result.exit_code == 0, result.output
    placement = read_placement(result.stdout)
    check_placement(placement, EVERY)
    assert sum(map(len, placement.values())) > 240
    assert "of them copies" in result.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "state each device"),
        (["--device", "kit"], "kitchen=8GiB,2ms"),
        (["--device", "kit=8,2ms"], "the unit is missing"),
        (["--device", "kit=8GiB,0s"], "must be positive"),
        (["--device", "kit=8GiB,2ms", "--devices", "d.json"], "state each device"),
        (["--device", "kit=8GiB,2ms", "--device", "kit=8GiB,2ms"], "'kit' is stated twice"),
        (["--device", "kit=8MiB,2ms"], "240 experts of 240 MiB together do not fit on devices of 8 MiB"),
        (["--devices", "/no/such"], "cannot be read"),
        (["--device", "kit=8GiB,2ms", "--exact", "--time-limit", "0s"], "--time-limit must be positive"),
    ],
)
def test_wrong_words_are_named(words, said):
    result = CliRunner().invoke(cli, ["place", TRACE, *SIZE, *words])
    assert result.exit_code != 0
    if result.exit_code == 1:
        assert isinstance(result.exception, WdmoeError)
    assert said in result.output + str(result.exception)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[", "cannot be read"),
        ("[]", "object of devices"),
        ('{"kit": {"memory": "8GiB"}}', "needs exactly"),
        ('{"kit": {"memory": 8, "token": "2ms"}}', "the unit is missing"),
    ],
)
def test_wrong_device_files_are_named(tmp_path, text, said):
    (tmp_path / "d.json").write_text(text)
    result = CliRunner().invoke(cli, ["place", TRACE, *SIZE, "--devices", str(tmp_path / "d.json")])
    assert isinstance(result.exception, WdmoeError)
    assert said in str(result.exception)


def test_a_failure_is_one_line():
    assert "gate trace pyproject.toml" in fails(run_here("place", "pyproject.toml", "--device", "kit=8GiB,2ms", *SIZE))
