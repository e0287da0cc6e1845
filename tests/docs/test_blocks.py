"""Every code block of README and docs says its language, and runs, or is parsed, or says why not."""

from __future__ import annotations

import configparser
import json
import subprocess
import sys

import pytest

from tests.docs.pages import LANGUAGES, Block, blocks
from wdmoe.simulation.scenario_file import load_scenario

ALONE = "127.0.0.1:8080"  # a block that asks a base station runs in test_station_blocks.py


def test_every_block_says_its_language():
    assert [str(block) for block in blocks() if block.language not in LANGUAGES] == []


@pytest.mark.parametrize("block", [block for block in blocks() if block.reason], ids=str)
def test_blocks_that_do_not_run(block: Block):
    """Lists them, with their reasons."""
    pytest.skip(block.reason)


@pytest.mark.parametrize("block", [b for b in blocks("python") if not b.reason and ALONE not in b.text], ids=str)
def test_python_runs(block: Block, tmp_path):
    command = [sys.executable, "-W", "error", "-c", block.text]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("block", blocks("toml"), ids=str)
def test_toml_is_a_scenario(block: Block, tmp_path):
    (tmp_path / "mine.toml").write_text(block.text)
    assert load_scenario(str(tmp_path / "mine.toml")).name == "mine"


@pytest.mark.parametrize("block", blocks("json", "ini"), ids=str)
def test_json_and_ini_are_well_formed(block: Block):
    if block.language == "json":
        json.loads(block.text)
    else:
        configparser.ConfigParser(strict=True).read_string(block.text)
