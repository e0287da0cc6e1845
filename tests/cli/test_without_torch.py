"""A base station, its devices and the commands beside them in processes that have neither torch nor transformers."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import psutil
import pytest

from tests.lab.command import fails, run, run_here
from tests.lab.families import HEADS, save_tiny
from tests.lab.fleet import ROOT
from tests.lab.node import Station, station
from tests.lab.waiting import PATIENCE_S, free_ports
from wdmoe.backbone.default.model import default_source
from wdmoe.errors import MissingExtraError

# Every Python imports this at its start. What it refuses is missing, and who asked for it is written down.
REFUSE = """
import os, sys, traceback

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"torch", "transformers", "accelerate"}:
            with open(os.environ["WDMOE_TEST_ASKED"], "a") as file:
                file.write(name + "\\n" + "".join(traceback.format_stack()))
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Refuse())
"""


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that says who asked. From here on processes have no torch."""
    site = tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(REFUSE)
    file = tmp_path / "asked"
    file.touch()
    monkeypatch.setenv("WDMOE_TEST_ASKED", str(file))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join((str(site), str(ROOT))))
    return file


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One that has graphs, one that has none, and one of an earlier wdmoe, whose config leaves something out."""
    folder = tmp_path_factory.mktemp("models")
    save_tiny("mixtral", folder / "whole", **HEADS)
    save_tiny("mixtral", folder / "narrow")
    for name in ("whole", "narrow"):
        assert run_here("export", str(folder / name), str(folder / f"{name}-bundle")).returncode == 0
    config = shutil.copytree(folder / "whole-bundle", folder / "silent-bundle") / "station/config.json"
    text = config.read_text()
    kept = {name: value for name, value in json.loads(text).items() if name != "rope_parameters"}
    config.write_text(json.dumps(kept).ljust(len(text)))  # the manifest states its size
    return folder


def test_the_refusal_refuses(asked: Path) -> None:
    failed = subprocess.run([sys.executable, "-c", "import torch"], capture_output=True, text=True, timeout=PATIENCE_S)
    assert "No module named 'torch'" in failed.stderr
    assert asked.read_text().startswith("torch\n")


def test_a_station_with_graphs_answers_and_asks_for_neither(asked: Path, bundles: Path, tmp_path: Path) -> None:
    with station(tmp_path, bundles / "whole-bundle", "--device", "cpu") as served:
        served.add_devices()
        assert served.status()["computed_by"] == "graphs"
        _asks_all(served)
        served.node.stop(signal.SIGTERM)
    assert asked.read_text() == ""


def _asks_all(served: Station) -> None:
    """A text, a chat, and the model's process anew."""
    whole = served.ask(max_tokens=6, temperature=1, seed=3).wait()
    assert whole.receipt["completion_tokens"] == 6
    chat = {"model": "x", "messages": [{"role": "user", "content": "Grüße"}], "max_tokens": 4, "temperature": 0}
    chat["model"] = httpx.get(f"{served.url}/v1/models").json()["data"][0]["id"]
    told = httpx.post(f"{served.url}/v1/chat/completions", json=chat, timeout=PATIENCE_S)
    assert told.status_code == 200, told.text
    streamed = served.ask(max_tokens=60, stream=True)
    streamed.wait_for_tokens(2)
    psutil.Process(served.engine_pid).kill()
    answer = streamed.wait()
    assert (len(answer.tokens), answer.receipt["restarts"]) == (60, 1)


@pytest.mark.usefixtures("asked")
@pytest.mark.parametrize(
    ("name", "flags", "reason"),
    [
        ("narrow", (), "heads of multiples of 16"),
        ("whole", ("--dtype", "bfloat16"), "float32, not bfloat16"),
        ("silent", (), "rope_parameters"),
    ],
)
def test_what_has_no_graphs_says_what_to_install(
    name: str, flags: tuple[str, ...], reason: str, bundles: Path, tmp_path: Path
) -> None:
    where = ("--bind", f"tcp://127.0.0.1:{free_ports(2)}", "--http", "off", "--state", str(tmp_path / "bs"))
    line = fails(run("bs", str(bundles / f"{name}-bundle"), "--device", "cpu", *where, *flags))
    assert reason in line
    assert line.endswith("pip install 'wdmoe[export]'")


def test_a_bundle_is_verified_without_them(asked: Path, bundles: Path) -> None:
    assert run("verify", str(bundles / "whole-bundle")).returncode == 0
    assert asked.read_text() == ""


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_demo_makes_its_model_and_answers(asked: Path, tmp_path: Path) -> None:
    """From nothing to the table: the default model, its station and devices, and the held-out text that it reads."""
    try:
        default_source()
    except MissingExtraError as error:
        pytest.skip(str(error))
    homes = {f"XDG_{kind}_HOME": str(tmp_path / kind.lower()) for kind in ("CACHE", "STATE")}
    command = [sys.executable, "-m", "wdmoe", "demo", "--devices", "2", "--tokens", "4", "--no-view"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=PATIENCE_S, env={**os.environ, **homes}, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert "perplexity, held-out text" in done.stdout
    assert asked.read_text() == ""
