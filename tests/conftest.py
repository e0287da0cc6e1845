"""What every test gets: seeds, no network, its own state folder, a check that it left nothing running."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

# Before any test imports torch or transformers: one thread per process (the tests start many), and no hub.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import psutil
import pytest
from hypothesis import settings

from tests.lab.waiting import free_ports

SEED = 20240623
GRACE_S = 5.0  # how long what a test started may take to end after it

# A busy machine is no failure: hypothesis' own deadline off, pytest-timeout still ends what hangs.
settings.register_profile("wdmoe", deadline=None, derandomize=True)
settings.load_profile("wdmoe")


# A shell that starts the tests with & lets them ignore Ctrl-C, and programs inherit that: tests of Ctrl-C would fail.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


# Files that take longest: workers begin with them, so that none is left with one of them at the end.
LONGEST = (
    "backbone/test_default_model.py",
    "docs/test_station_blocks.py",
    "nodes/test_broadcast_live.py",
    "nodes/test_demo.py",
    "nodes/test_alive.py",
    "broadcast/test_front_comparison.py",
    "nodes/test_right.py",
    "cli/test_station_process.py",
    "cli/test_nodes.py",
    "nodes/test_right_default.py",
    "simulation/test_quality.py",
    "solver/test_bandwidth.py",
    "simulation/test_simulation.py",
    "backbone/test_distil.py",
    "nodes/test_device_node.py",
)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put them first; all others keep their order."""
    rank = {Path(__file__).parent / name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path, len(rank)))


@pytest.fixture
def rng() -> np.random.Generator:
    """Random numbers that are the same in every run."""
    return np.random.default_rng(SEED)


@pytest.fixture
def free_port() -> int:
    """A TCP port that nobody listens at."""
    return free_ports(1)


@pytest.fixture(autouse=True)
def _same_seed() -> None:
    random.seed(SEED)
    np.random.seed(SEED)  # libraries under test may use the global one


@pytest.fixture(autouse=True)
def _own_state(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys never touch the home folder. The cache stays there: it holds what takes minutes to make."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path_factory.getbasetemp() / "state"))


@pytest.fixture(autouse=True)
def _nothing_left_running() -> Iterator[None]:
    threads, children = _threads(), _children()
    yield
    limit = time.monotonic() + GRACE_S
    while (_threads() - threads or _children() - children) and time.monotonic() < limit:
        time.sleep(0.02)
    stray = _children() - children
    names = [_describe(child) for child in stray]
    for child in stray:
        child.kill()
    left = [thread.name for thread in _threads() - threads] + names
    if left:
        pytest.fail(f"left running: {', '.join(left)}")


def _threads() -> set[threading.Thread]:
    # The pool of an event loop that a fixture of wider scope runs grows when a test first needs it.
    return {each for each in threading.enumerate() if not each.daemon and not each.name.startswith("asyncio_")}


def _children() -> set[psutil.Process]:
    # multiprocessing's resource tracker lives until this process ends, by design.
    own = psutil.Process().children(recursive=True)
    return {child for child in own if "resource_tracker" not in _describe(child)}


def _describe(child: psutil.Process) -> str:
    try:
        return " ".join([*child.cmdline()[:4], f"({child.pid})"])
    except psutil.Error:
        return f"({child.pid})"


@pytest.fixture(scope="session")
def repository() -> Path:
    """The checkout the tests run from."""
    return Path(__file__).resolve().parents[1]
