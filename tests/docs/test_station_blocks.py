"""The shell blocks of README and docs, typed as they stand, with a running base station and device."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest

from tests.docs.pages import Block, blocks
from tests.docs.shell import PATIENCE_S, Reader
from tests.lab.families import save_tiny
from tests.lab.waiting import free_ports

RUNS = [block for block in blocks("bash") if not block.reason]
README = [block for block in RUNS if block.page == "README.md"]
STATION, DEVICE, CLIENT, *_ = README
OWN_STATION = [block for block in RUNS if "wdmoe-node bs" in block.text and block != STATION]
IN_CELL = [block for block in RUNS if block not in (*OWN_STATION, STATION, DEVICE, CLIENT)]
SLOW = {"docs/broadcast.md", "docs/simulation.md", "docs/results/README.md"}  # each takes longer than ten seconds


def _named(chosen: list[Block]) -> list[object]:
    marks = {True: [pytest.mark.slow], False: []}
    return [pytest.param(block, id=str(block), marks=marks[block.page in SLOW]) for block in chosen]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from wdmoe.backbone.export.export import ExportSettings, export_bundle

    folder = tmp_path_factory.mktemp("model")
    export_bundle(save_tiny("mixtral", folder / "checkpoint"), folder / "default", ExportSettings(name="tiny"))
    return folder / "default"


def _reader(folder: Path, bundle: Path) -> Iterator[Reader]:
    ports = free_ports(2), free_ports(2)
    reader = Reader(folder, *ports)
    (folder / "default").symlink_to(bundle)
    try:
        yield reader
        reader.stop()
    finally:
        reader.close()


@pytest.fixture(scope="module")
def cell(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reader]:
    """What stands in the README under "On real machines": a base station and a device, ready to answer."""
    for reader in _reader(tmp_path_factory.mktemp("cell") / "reader", bundle):
        reader.run(STATION)
        reader.run(DEVICE)
        _wait_until_ok(reader)
        yield reader


def _wait_until_ok(reader: Reader) -> None:
    until_s = time.monotonic() + PATIENCE_S
    while httpx.get(f"http://{reader.http}/health").json()["status"] != "ok":
        assert time.monotonic() < until_s
        time.sleep(0.1)


def test_the_readme_asks_what_it_started(cell):
    _props(cell.folder, CLIENT)
    printed = cell.run(CLIENT)
    table, _, answer = printed.partition("{")
    assert "24 of 24 experts are served" in table
    assert json.loads("{" + answer)["model"] == "tiny"


@pytest.mark.slow
def test_the_readme_with_the_default_model(tmp_path):
    """Word for word what a newcomer types, but for the ports."""
    reader = Reader(tmp_path / "reader", free_ports(2), free_ports(2), default_model=True)
    _props(reader.folder, CLIENT)
    try:
        reader.run(STATION)
        reader.run(DEVICE)
        _wait_until_ok(reader)
        answer = json.loads("{" + reader.run(CLIENT).partition("{")[2])
        assert answer["choices"][0]["message"]["content"].strip()
        reader.stop()
    finally:
        reader.close()


@pytest.mark.parametrize("block", _named(IN_CELL))
def test_shell_blocks_run(block: Block, cell):
    terminals = len(cell.terminals)
    _props(cell.folder, block)
    try:
        cell.run(block)
    finally:
        cell.stop(terminals)


@pytest.mark.parametrize("block", _named(OWN_STATION))
def test_blocks_that_start_a_station(block: Block, bundle, tmp_path):
    for reader in _reader(tmp_path / "reader", bundle):
        reader.run(block)


@pytest.mark.parametrize("block", _named([b for b in blocks("python") if "127.0.0.1:8080" in b.text and not b.reason]))
def test_python_that_asks_a_station(block: Block, cell):
    code = block.text.replace("127.0.0.1:8080", cell.http)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert done.returncode == 0, done.stderr


def _props(folder: Path, block: Block) -> None:
    """Files that a block takes for granted."""
    if "cat.png" in block.text:
        from PIL import Image

        for name, seed in (("cat.png", 1), ("dog.jpg", 2)):
            pixels = np.random.default_rng(seed).integers(0, 256, (48, 64, 3), np.uint8)
            Image.fromarray(pixels).save(folder / name)
    if "curl" in block.text and shutil.which("curl") is None:
        pytest.skip("curl is not installed")
