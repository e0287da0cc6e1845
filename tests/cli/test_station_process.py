"""A base station as people run it: it stops in order, and it survives the end of the process that holds the model."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.lab.command import run_here
from tests.lab.families import save_tiny
from tests.lab.liar import Lie
from tests.lab.node import Station, station, until
from tests.lab.waiting import PATIENCE_S

SLOWLY = ("--downlink", "60kbit/s")  # a token takes some 0.05 s then, and more where several are computed
PATIENT = ("--deadline", "60s", "--wait-for-experts", "200s")  # a busy machine loses nothing by that
LONG, SHORT = 400, 12  # tokens: no drain waits for the first, any for the second


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    checkpoint = save_tiny("mixtral", folder / "checkpoint")
    assert run_here("export", str(checkpoint), str(folder / "bundle"), "--name", "tiny").returncode == 0
    return folder / "bundle"


@pytest.fixture
def served(bundle: Path, tmp_path: Path) -> Iterator[Station]:
    """With two slow devices."""
    with station(tmp_path, bundle, *PATIENT) as made:
        made.add_devices(*SLOWLY)
        yield made


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_on_a_signal_answers_end_in_their_time_and_devices_serve_them_until_then(served: Station, number: int) -> None:
    short = [served.ask(max_tokens=SHORT, stream=stream) for stream in (True, False)]
    long = [served.ask(max_tokens=LONG, stream=stream) for stream in (True, False)]
    for each in (short[0], long[0]):
        each.wait_for_tokens(2)
    served.node.process.send_signal(number)
    until(lambda: served.health() == (503, "stopping"))
    late = httpx.post(f"{served.url}/v1/completions", json={"prompt": "a"}, timeout=PATIENCE_S)
    assert (late.status_code, late.json()["error"]["code"]) == (503, "shutting_down")
    assert int(late.headers["Retry-After"]) > 0
    for each in short:
        answer = each.wait()
        assert answer.done
        assert answer.receipt["completion_tokens"] == SHORT
        assert not answer.receipt["degraded"]
    streamed, whole = (each.wait() for each in long)
    assert (streamed.cut, streamed.status, streamed.error, whole.cut) == ("", 200, "shutting_down", "")
    assert len(streamed.tokens) > SHORT
    assert (whole.status, whole.error) == (503, "shutting_down")
    assert served.node.process.wait(PATIENCE_S) == 0
    log = served.node.err.read_text()
    assert "Traceback" not in log
    assert "ERROR" not in log


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_stops_without_devices_too(bundle: Path, tmp_path: Path, number: int) -> None:
    with station(tmp_path, bundle) as made:
        asking = made.ask(max_tokens=5, stream=True)
        until(lambda: bool(asking.answer.ended_s or made.status()["requests"]))
        family = made.family()
        made.node.stop(signal.Signals(number))
        answer = asking.wait()
        assert answer.status == 503
        assert answer.error in {"experts_unavailable", "shutting_down"}
        assert not _left(family)


def test_answers_outlive_the_process_of_the_model(served: Station) -> None:
    """Streamed and whole, greedy and sampled: each says the same as if nothing had happened."""
    ways: list[dict[str, Any]] = [{"stream": True}, {"stream": False}, {"stream": True, "temperature": 1, "seed": 7}]
    calm = [served.ask(max_tokens=20, **way).wait() for way in ways]
    ends = [(_engine, signal.SIGKILL), (_engine, signal.SIGABRT), (_spawner, signal.SIGKILL)]
    for restarts, (victim, number) in enumerate(ends, 1):
        first = served.engine_pid
        asked = [served.ask(max_tokens=20, **way) for way in ways]
        for each in (asked[0], asked[2]):
            each.wait_for_tokens(3)
        victim(served).send_signal(number)
        until(partial(_is_restarting, served, first))
        assert httpx.get(f"{served.url}/metrics").status_code == 200
        for undisturbed, each in zip(calm, asked, strict=True):
            answer = each.wait()
            assert answer.done, answer
            assert (answer.text, answer.tokens) == (undisturbed.text, undisturbed.tokens)
            assert (answer.receipt["restarts"], undisturbed.receipt["restarts"]) == (1, 0)
            assert not answer.receipt["degraded"]
            assert answer.receipt["completion_tokens"] == 20
        assert served.health() == (200, "ok")
        assert served.engine_pid != first
        assert f"wdmoe_engine_restarts {restarts}.0" in httpx.get(f"{served.url}/metrics").text
    assert all(device.process.poll() is None for device in served.devices)
    assert "ended by signal SIGABRT" in served.node.err.read_text()
    served.node.stop(signal.SIGTERM)


def test_a_quarantine_outlives_the_process_of_the_model(bundle: Path, tmp_path: Path) -> None:
    with station(tmp_path, bundle, *PATIENT) as made:
        made.add_device("liar", command=(sys.executable, "-m", "tests.lab.liar", *Lie("1e30").words()))
        until(lambda: made.is_served(1))
        made.add_devices()
        while not made.status()["devices_quarantined"]:
            assert made.ask(max_tokens=SHORT).wait().done
        first = made.engine_pid
        psutil.Process(first).kill()
        until(lambda: made.engine_pid != first and "liar" in {each["name"] for each in made.status()["devices"]})
        liar = next(each for each in made.status()["devices"] if each["name"] == "liar")
        assert liar["quarantined"]
        answer = made.ask(max_tokens=SHORT).wait()
        assert (answer.receipt["degraded"], answer.receipt["suspect"]) == (False, False)
        after = next(each for each in made.status()["devices"] if each["name"] == "liar")
        assert (after["experts"], after["runs"]) == (0, liar["runs"])


def _is_restarting(served: Station, first: int) -> bool:
    """Whether the end of its first engine was noticed; another one may serve by now."""
    return served.health() == (503, "restarting") or served.engine_pid != first


def _engine(served: Station) -> psutil.Process:
    return psutil.Process(served.engine_pid)


def _spawner(served: Station) -> psutil.Process:
    """Its engine ends with it."""
    return psutil.Process(served.engine_pid).parent()


def test_a_request_that_ends_engine_after_engine_is_given_up(served: Station) -> None:
    asking, ended = served.ask(max_tokens=LONG, stream=True), set()
    for _ in range(4):
        asking.wait_for_tokens(len(asking.answer.tokens) + 2)
        pid = served.engine_pid
        psutil.Process(pid).kill()
        ended.add(pid)
        until(lambda: served.status()["engine"]["pid"] not in ended)
    answer = asking.wait()
    assert (answer.error, answer.cut) == ("engine_lost", "")
    assert served.ask(max_tokens=3).wait().done


def test_engines_that_end_at_once_end_the_command_with_one_line(bundle: Path, tmp_path: Path) -> None:
    with station(tmp_path, bundle, "--http", "127.0.0.1:0") as made:
        ended: set[int] = set()
        while made.node.process.poll() is None:
            try:
                pid = made.engine_pid
            except httpx.HTTPError:  # it ends
                continue
            if pid not in ended:
                ended.add(pid)
                psutil.Process(pid).kill()
        assert made.node.process.returncode == 1
        assert made.node.err.read_text().splitlines()[-1].startswith("Error: the process of the model ended again and")


def test_after_kill_9_nothing_is_left(served: Station) -> None:
    asking = served.ask(max_tokens=LONG, stream=True)
    asking.wait_for_tokens(2)
    family = served.family()
    assert len(family) >= 3
    served.node.process.kill()
    assert asking.wait().cut
    until(lambda: not _left(family))


def _left(family: list[psutil.Process]) -> list[psutil.Process]:
    return [each for each in family if each.is_running() and each.status() != psutil.STATUS_ZOMBIE]
