"""From a checkpoint to an answer by the command alone: export, verify, bs, device, status, revoke, stop."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest

from tests.lab.command import fails, run, run_here
from tests.lab.families import save_tiny
from tests.lab.node import Node
from tests.lab.waiting import PATIENCE_S, free_ports
from wdmoe.solver.placement.file import read_placement


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    checkpoint = save_tiny("mixtral", folder / "checkpoint")
    made = run_here("export", str(checkpoint), str(folder / "bundle"), "--name", "tiny")
    assert made.returncode == 0, made.stderr
    assert "tiny, 24 experts in 3 layers" in made.stdout
    return folder / "bundle"


@pytest.fixture
def nodes() -> Iterator[list[Node]]:
    started: list[Node] = []
    yield started
    for node in started:
        node.close()


def _is_ok(url: str) -> bool:
    limit = time.monotonic() + PATIENCE_S
    while time.monotonic() < limit:
        if httpx.get(f"{url}/health").json()["status"] == "ok":
            return True
        time.sleep(0.05)
    return False


def test_a_bundle_is_verified_and_a_tampered_one_refused(bundle, tmp_path):
    assert "is sound: tiny, 24 experts (fp32)" in run_here("verify", str(bundle)).stdout
    told = json.loads(run_here("verify", str(bundle), "--json").stdout)
    assert (told.pop("digest"), told.pop("station_files")) > ("", 0)
    facts = {"folder": str(bundle), "kind": "bundle", "sound": True}
    assert told == {**facts, "model": "tiny", "precision": "fp32", "experts": 24}
    copy = tmp_path / "copy"
    subprocess.run(["cp", "-r", str(bundle), str(copy)], check=True)
    victim = copy / "experts" / "001" / "003.onnx"
    data = bytearray(victim.read_bytes())
    data[-1] ^= 1
    victim.write_bytes(data)
    broken = run_here("verify", str(copy), "--json")
    assert "experts/001/003.onnx" in fails(broken)
    assert not broken.stdout


def test_from_bundle_to_answer_and_again_after_the_base_station_was_killed(bundle, tmp_path, nodes):
    """kill -9: no goodbye, no clean-up. Same state folder and address, so the same key and the same devices."""
    state = ("--state", str(tmp_path / "bs"))
    words = ("bs", str(bundle), "--bind", f"tcp://127.0.0.1:{free_ports(2)}", "--http", "127.0.0.1:0", *state)
    words += (
        "--budget",
        "1000s",
        "--whole-layers",
        "1",
    )  # so much that nothing is dropped: answers are alike
    station = Node(tmp_path, "bs", *words)
    nodes.append(station)
    url = station.wait_for(r"HTTP: (http://\S+)/v1")
    token = holds_a_token_that_no_log_has(station, tmp_path / "bs" / "join-token")
    names = ("kitchen", "attic")
    for name in names:
        join = ("--join", f"@{tmp_path / 'bs' / 'join-token'}", "--name", name, "--state", str(tmp_path / name))
        nodes.append(Node(tmp_path, name, "device", *join, "--cache", str(tmp_path / "cache")))
    assert _is_ok(url)
    text = answers(url)
    shows_the_devices(url, names)
    assert all(name in run("token", "list", *state).stdout for name in names)

    station.close()
    station = Node(tmp_path, "bs again", *words, "--print-token")
    nodes.append(station)
    assert station.wait_for(r"Join token \(a secret\): (\S+)") == token  # it serves on, so no new one was made
    url = station.wait_for(r"HTTP: (http://\S+)/v1")
    assert _is_ok(url)
    assert answers(url) == text
    assert all(node.process.poll() is None for node in nodes[1:3])  # the devices never restarted

    log = nodes[1].stop(signal.SIGTERM)
    assert "ERROR" not in log
    nodes[2].stop(signal.SIGINT)
    station.stop(signal.SIGINT)


def holds_a_token_that_no_log_has(station: Node, file: Path) -> str:
    """Each start printed one for 24 hours and any number of devices, into whatever log there was."""
    token = file.read_text().strip()
    assert token.startswith("wdmoe1.")
    assert file.stat().st_mode & 0o777 == 0o600
    said = station.out.read_text() + station.err.read_text()
    assert f"The join token lies in {file}." in said
    assert "wdmoe1." not in said
    return token


def answers(url: str) -> str:
    """What the official client is told, in one piece and as a stream."""
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        answer = client.completions.create(model="tiny", prompt="hello", max_tokens=5, temperature=0)
        chunks = list(client.completions.create(model="tiny", prompt="hello", max_tokens=5, temperature=0, stream=True))
    assert answer.usage.completion_tokens >= 1
    assert not answer.wdmoe["degraded"]
    assert answer.wdmoe["bytes_down"] > 0
    assert "".join(chunk.choices[0].text for chunk in chunks) == answer.choices[0].text
    return answer.choices[0].text


def shows_the_devices(url: str, names: tuple[str, ...]) -> None:
    shown = run("status", "--url", url)
    assert all(name in shown.stdout for name in names), shown.stderr
    assert "24 of 24 experts are served" in shown.stdout
    told = json.loads(run_here("status", "--url", url, "--json").stdout)
    assert (told["model"], told["policy"], told["rank"], told["whole_layers"]) == ("tiny", "budget", "probability", 1)
    placement = read_placement(run_here("status", "--url", url, "--print-placement").stdout)
    assert [len(placement[name]) for name in names] == [24, 24]  # each expert has its home on one, a copy on the other
    assert "wdmoe_devices 2.0" in httpx.get(f"{url}/metrics").text


def test_ports_that_are_taken(bundle, tmp_path, free_port):
    state = ("--state", str(tmp_path / "bs"))
    with socket.create_server(("127.0.0.1", 0)) as holder:
        taken = f"127.0.0.1:{holder.getsockname()[1]}"
        line = fails(run_here("-q", "bs", str(bundle), "--bind", f"tcp://{taken}", "--http", "off", *state))
        assert taken in line
        bind = f"tcp://127.0.0.1:{free_ports(2)}"
        assert taken in fails(run_here("-q", "bs", str(bundle), "--bind", bind, "--http", taken, *state))


def test_what_is_no_bundle_or_no_token(tmp_path):
    state = ("--state", str(tmp_path / "state"))
    assert "nowhere" in fails(run_here("-q", "bs", str(tmp_path / "nowhere"), "--http", "off", *state))
    cache = ("--cache", str(tmp_path / "cache"))
    assert "token" in fails(run_here("-q", "device", "--join", "wdmoe1.abc", *state, *cache))
    assert "wdmoe1" in fails(run_here("-q", "device", "--join", "letmein", *state, *cache))
