"""`wdmoe-node demo`: real processes, and what is left of them whenever and however it ends."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from tests.lab.families import save_tiny
from tests.lab.waiting import PATIENCE_S
from wdmoe.backbone.export.export import ExportSettings, export_bundle
from wdmoe.nodes.local.process import Child, ChildError

DEMO = [sys.executable, "-m", "wdmoe", "demo"]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    export_bundle(save_tiny("granitemoeshared", folder / "checkpoint"), folder / "bundle", ExportSettings(name="tiny"))
    return folder / "bundle"


@pytest.fixture
def words(bundle: Path, tmp_path: Path) -> list[str]:
    return [*DEMO, "hello", "--model", str(bundle), "--cache", str(tmp_path / "cache")]


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    (tmp_path / "temporary").mkdir()
    return {**os.environ, "TMPDIR": str(tmp_path / "temporary"), "COLUMNS": "100", "TERM": "xterm"}


def until(true: Callable[[], object]) -> None:
    limit_s = time.monotonic() + PATIENCE_S
    while not true():
        assert time.monotonic() < limit_s, "this takes too long"
        time.sleep(0.05)


@contextmanager
def running(words: list[str], environment: dict[str, str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A demo with its output in a file."""
    with log.open("wb") as file:
        process = subprocess.Popen(words, env=environment, stdout=file, stderr=file)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def family(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


def left_behind(environment: dict[str, str]) -> list[str]:
    return [name for name in os.listdir(environment["TMPDIR"]) if name.startswith("wdmoe")]


def rest(terminal: int) -> Iterator[bytes]:
    with suppress(OSError):  # a terminal that nobody has open any more cannot be read
        while said := os.read(terminal, 65536):
            yield said


def gone(processes: list[psutil.Process]) -> bool:
    return not any(each.is_running() and each.status() != psutil.STATUS_ZOMBIE for each in processes)


def test_figures_as_json(words, environment, tmp_path):
    picture = tmp_path / "pictures" / "demo.svg"
    flags = ["--devices", "2", "--tokens", "6", "--links", "100Mbit/s", "--json", "--picture", str(picture)]
    done = subprocess.run([*words, *flags], env=environment, capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert (document["model"], document["prompt"]) == ("tiny", "hello")
    assert [run["name"] for run in document["runs"]] == ["budget, equal links", "topk, equal links"]
    for run in document["runs"]:
        figures, receipt = run["figures"], run["receipt"]
        assert sum(figures["stages_s"].values()) == pytest.approx(figures["elapsed_s"], rel=0.05)
        assert figures["tokens"] == len(run["token_ids"]) == receipt["completion_tokens"]
        assert 0 < figures["token_latency_p50_s"] <= figures["token_latency_p95_s"]
        assert figures["tokens_per_s"] > 0
        assert figures["first_token_s"] > 0
        computed = receipt["prompt_tokens"] + receipt["completion_tokens"] - 1
        assert figures["bytes_down_per_token"] * computed == pytest.approx(receipt["bytes_down"])
        assert figures["lost_weight"] == 0
        assert sum(device["experts"] for device in run["devices"]) == 24
        assert all(device["layers_served"] > 0 for device in run["devices"])
    assert document["runs"][1]["figures"]["dropped_weight"] == 0
    assert document["agreement"][0]["of"] == document["runs"][0]["figures"]["tokens"]
    assert picture.read_text(encoding="utf-8").startswith("<svg")
    assert "url(http" not in picture.read_text(encoding="utf-8")
    assert left_behind(environment) == []


def test_columns_over_one_radio_share_a_station(words, environment, tmp_path):
    flags = ["--devices", "2", "--tokens", "4", "--bandwidth", "1GHz", "--max-dropped", "20%", "--json"]
    done = subprocess.run([*words, *flags], env=environment, capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    names = ["budget, optimal bandwidth", "topk, optimal bandwidth", "topk, equal bandwidth"]
    assert [run["name"] for run in document["runs"]] == names
    assert [run["receipt"]["policy"] for run in document["runs"]] == ["budget", "topk", "topk"]
    assert done.stderr.count("starting the base station") == 1
    best, plain, equal = (run["figures"] for run in document["runs"])
    assert best["dropped_weight"] > 0 == plain["dropped_weight"] == equal["dropped_weight"]
    assert best["perplexity"] != plain["perplexity"] == equal["perplexity"]
    assert best["perplexity_tokens"] == 512
    assert len(document["runs"][0]["reading"]) == 8
    assert document["phases_s"].keys() > {"the model", "starting base station and devices", "answer 3"}
    assert document["total_s"] == pytest.approx(sum(document["phases_s"].values()))
    assert 0 < document["first_token_in_sight_s"] < document["total_s"]
    assert document["verdict"].startswith("'budget, optimal bandwidth' answered in ")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_default_demo(environment):
    """As a newcomer starts it, with a shorter answer: the default model, policy, radio and question."""
    done = subprocess.run(
        [*DEMO, "--tokens", "3", "--json"], env=environment, capture_output=True, text=True, timeout=800
    )
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    best, plain, equal = document["runs"]
    assert (best["policy"], best["rules"]["max_dropped"], best["rules"]["whole_layers"]) == ("budget", 0.03, 1)
    assert (plain["policy"], plain["allocation"], equal["allocation"]) == ("topk", "optimal", "equal")
    assert {run["bandwidth_hz"] for run in document["runs"]} == {10e6}
    assert len({str(run["devices"][0]["downlink_snr_hz"]) for run in document["runs"]}) == 1
    assert plain["token_ids"] == equal["token_ids"]
    assert 0 < best["figures"]["dropped_weight"] < 0.2
    assert best["figures"]["perplexity"] / plain["figures"]["perplexity"] == pytest.approx(1, abs=0.1)
    assert "on 512 tokens of held-out text." in document["verdict"]
    assert left_behind(environment) == []


def test_a_band_that_devices_share(words, environment):
    flags = ["--devices", "1", "--tokens", "2", "--bandwidth", "20MHz", "--budget", "1h", "--no-compare", "--json"]
    flags += ["--rank", "energy", "--whole-layers", "1"]
    done = subprocess.run([*words, *flags], env=environment, capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 0, done.stderr
    (run,) = json.loads(done.stdout)["runs"]
    assert (run["name"], run["bandwidth_hz"]) == ("budget, optimal bandwidth", 20e6)
    assert run["figures"]["dropped_weight"] == 0
    air_s = run["figures"]["stages_s"]["wire_down"] + run["figures"]["stages_s"]["wire_up"]
    computed = run["receipt"]["prompt_tokens"] + run["receipt"]["completion_tokens"] - 1
    bits = 8 * 4 * 2 * 32 * computed  # of one device that has every token of one layer
    assert air_s > bits / (20e6 * 30)  # no link here carries 30 bit/s/Hz


def test_ctrl_c_in_a_terminal_while_the_answer_streams(words, environment, tmp_path):
    terminal, child_side = pty.openpty()
    flags = ["--devices", "2", "--tokens", "400", "--links", "1Mbit/s"]
    process = subprocess.Popen(
        ["setsid", "--ctty", *words, *flags],
        env=environment,
        stdin=child_side,
        stdout=child_side,
        stderr=child_side,
    )
    os.close(child_side)
    said = b""
    try:
        limit_s = time.monotonic() + PATIENCE_S
        while b"tokens/s" not in said:
            assert time.monotonic() < limit_s, said
            said += os.read(terminal, 65536)
        nodes = family(process)
        assert len(nodes) == 5  # the three of a base station, two devices
        os.write(terminal, b"\x03")
        said += b"".join(rest(terminal))
        assert process.wait(PATIENCE_S) == 130
    finally:
        process.kill()
        process.wait()
        os.close(terminal)
    assert gone(nodes)
    assert left_behind(environment) == []
    assert b"device-2" in said
    assert said.rfind(b"\x1b[?25h") > said.rfind(b"\x1b[?25l")  # the cursor is back
    assert b"Traceback" not in said


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_a_signal_while_it_starts(words, environment, tmp_path, number, code):
    log = tmp_path / "log"
    with running([*words, "--devices", "2"], environment, log) as process:
        until(lambda: b"starting" in log.read_bytes() and family(process))
        nodes = family(process)
        process.send_signal(number)
        assert process.wait(PATIENCE_S) == code
        until(lambda: gone(nodes))
    assert number == signal.SIGKILL or left_behind(environment) == []
    assert b"Traceback" not in log.read_bytes()


@pytest.mark.slow
def test_nothing_outlives_a_killed_demo(words, environment, tmp_path):
    log = tmp_path / "log"
    with running([*words, "--devices", "2", "--tokens", "400", "--links", "1Mbit/s"], environment, log) as process:
        until(lambda: b"the answer begins" in log.read_bytes())
        nodes = family(process)
        assert len(nodes) == 5  # a base station is three processes
        process.kill()
        process.wait()
        until(lambda: gone(nodes))


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--devices", "30"], "30 devices are too many for a model of 24 experts"),
        (["--links", "1Mbit/s,2Mbit/s,3Mbit/s"], "links needs 1, 2 or 8 rates"),
    ],
)
def test_what_does_not_fit_is_one_line(words, environment, flags, says):
    done = subprocess.run([*words, *flags], env=environment, capture_output=True, text=True, timeout=PATIENCE_S)
    assert (done.returncode, done.stdout) == (1, "")
    assert says in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_child_that_ends_says_why(tmp_path):
    child = Child("device-1", ["device", "--join", "nonsense"], tmp_path)
    child.end(PATIENCE_S)
    with pytest.raises(ChildError, match=r"^device-1 ended \(exit code 1\): .*token"):
        child.check()
