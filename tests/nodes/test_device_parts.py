"""The parts of a device that need no base station."""

from __future__ import annotations

import asyncio
import dataclasses
import random
import threading
import time

import numpy as np
import psutil
import pytest

from tests.lab.expert_files import ExpertFile, make_expert
from tests.lab.waiting import PATIENCE_S
from wdmoe.config import DeviceSettings, LinkEmulation
from wdmoe.errors import ExpertError, PeerBusyError, ProtocolError, RefusedError
from wdmoe.moe.background_build import BackgroundBuild
from wdmoe.moe.expert import ExpertRunner
from wdmoe.moe.providers import OnnxExpert, cpu_chain
from wdmoe.nodes.device import hardware
from wdmoe.nodes.device.compute_thread import ComputeThread
from wdmoe.nodes.device.expert_fetch import CHUNK_BYTES, OUTSTANDING, ExpertFetcher
from wdmoe.nodes.device.expert_opening import expert_opener
from wdmoe.nodes.device.link_emulation import Lane
from wdmoe.nodes.device.rules import Retries, WantedExpert, changes, retry_delay_s, wanted_experts
from wdmoe.records import ExpertId
from wdmoe.transport.codec.messages import Attach, Attached, Chunk, Failure, Fetch, Place, Result, Run
from wdmoe.transport.memory import MemoryDataLink, MemoryDataStation

HIDDEN = 16


def until(done) -> None:
    end = time.monotonic() + PATIENCE_S
    while not done():
        assert time.monotonic() < end, "never happened"
        time.sleep(0.005)


def on_cpu(file: bytes) -> OnnxExpert:
    return OnnxExpert(file, 1, cpu_chain())


# ---- decisions


def a_place(ids, sizes, generation=1) -> Place:
    return Place(
        generation=generation,
        experts=np.array(ids, np.int32).reshape(-1, 2),
        sha256=np.array([[number] * 32 for number in range(len(ids))], np.uint8).reshape(-1, 32),
        size=np.array(sizes, np.int64),
        hidden=HIDDEN,
    )


def test_reads_a_placement_in_its_order():
    wanted = wanted_experts(a_place([(3, 1), (0, 2)], [10, 20]))
    assert wanted == (
        WantedExpert(ExpertId(3, 1), "00" * 32, 10),
        WantedExpert(ExpertId(0, 2), "01" * 32, 20),
    )
    assert wanted_experts(a_place([], [])) == ()
    with pytest.raises(ProtocolError, match="names an expert twice"):
        wanted_experts(a_place([(0, 1), (0, 1)], [1, 1]))


def test_what_changes_from_one_placement_to_the_next():
    kept, new, other_version, too_big = (
        WantedExpert(ExpertId(0, number), f"sha{number}", size) for number, size in enumerate([10, 20, 30, 50])
    )
    loaded = {kept.expert: "sha0", other_version.expert: "old", ExpertId(9, 9): "gone"}
    found = changes((kept, new, other_version, too_big), loaded, memory_bytes=100)
    assert found.kept == (kept.expert,)
    assert found.load == (new, other_version)
    assert found.unload == (other_version.expert, ExpertId(9, 9))
    assert found.too_much == (too_big.expert,)


def test_retries_slow_down_to_a_limit():
    chance = random.Random(1)
    for refused, longest_s in ((False, 2.0), (True, 60.0)):
        delays = [[retry_delay_s(failures, refused, chance) for _ in range(300)] for failures in (1, 3, 50)]
        assert all(0 <= delay <= longest_s for row in delays for delay in row)
        assert max(delays[0]) <= 0.2
        assert max(delays[0]) < max(delays[1]) < max(delays[2])
        assert max(delays[2]) > 0.9 * longest_s


def test_refusals_slow_down_on_their_own_and_are_told_rarely():
    retries = Retries(random.Random(1))
    for second in range(40):  # a station that is away for long
        assert retries.failed("no answer", False, float(second))[1] == (second == 0)
    delay_s, tell = retries.failed("refused", True, 41.0)  # and comes back without its list
    assert tell
    assert delay_s <= 0.2
    slow = max(retries.failed("refused", True, 42.0 + number)[0] for number in range(50))
    assert 30 < slow <= 60
    assert not retries.failed("refused", True, 600.0)[1]
    assert retries.failed("refused", True, 641.0)[1]
    retries.succeeded()
    assert retries.failed("refused", True, 642.0) == (pytest.approx(0.1, abs=0.1), True)
    assert retries.failures == 1
    told = [retries.failed(f"a reason made up: {number}", True, 700.0)[1] for number in range(1000)]
    assert all(told)
    assert len(retries._told) <= 64


def test_a_lane_carries_one_message_after_the_other():
    lane = Lane(8000.0)  # a kilobyte a second
    assert lane.cross(100.0, 500) == 100.5
    assert lane.cross(100.1, 1000) == 101.5
    assert lane.cross(200.0, 1000) == 201.0
    assert Lane(0.0).cross(100.0, 10**9) == 100.0
    assert Lane(8000.0).cross(100.0, 500, 1e6) == 100.5  # how strong the link is, it was not told


# ---- coroutines


# ---- download


class Air:
    """Carries Fetch to Chunk, with what a test does to it."""

    def __init__(self, file: bytes, patience_s: float = 5.0) -> None:
        self.file = np.frombuffer(file, np.uint8)
        self.lose: set[int] = set()  # asks, counted
        self.busy: set[int] = set()
        self.asked = self.open = self.most = 0
        self.fetcher = ExpertFetcher(self.send, patience_s)

    async def send(self, fetch: Fetch) -> None:
        self.asked += 1
        if self.asked in self.busy:
            raise PeerBusyError("full")
        if self.asked in self.lose:
            return
        self.open += 1
        self.most = max(self.most, self.open)
        asyncio.get_running_loop().call_later(0.002, self.answer, fetch)

    def answer(self, fetch: Fetch) -> None:
        self.open -= 1
        data = self.file[fetch.offset : fetch.offset + fetch.length]
        self.fetcher.accept(Chunk(layer=0, expert=0, offset=fetch.offset, total=len(self.file), data=data))
        self.fetcher.accept(Chunk(layer=9, expert=0, offset=0, total=1, data=data))  # nobody asked

    def fetch(self, **changes) -> bytes:
        import hashlib

        digest = hashlib.sha256(self.file.tobytes()).hexdigest()
        wanted = dataclasses.replace(WantedExpert(ExpertId(0, 0), digest, len(self.file)), **changes)
        return asyncio.run(self.fetcher.fetch(wanted))


@pytest.mark.parametrize("size", [1, CHUNK_BYTES, CHUNK_BYTES + 1, 12 * CHUNK_BYTES])
def test_fetches_files_of_any_size_a_few_chunks_at_a_time(rng, size):
    air = Air(rng.bytes(size))
    assert air.fetch() == air.file.tobytes()
    assert air.asked == -(-size // CHUNK_BYTES)
    assert air.most == min(OUTSTANDING, air.asked)


def test_asks_again_for_what_was_lost_or_could_not_be_sent(rng):
    air = Air(rng.bytes(6 * CHUNK_BYTES), patience_s=0.05)
    air.lose, air.busy = {2, 5}, {3}
    assert air.fetch() == air.file.tobytes()
    assert air.asked >= 9


def test_gives_up_on_what_never_comes(rng):
    air = Air(rng.bytes(10), patience_s=0.01)
    air.lose = set(range(100))
    with pytest.raises(ExpertError, match="layer 0 expert 0 can't be fetched: no answer"):
        air.fetch()


def test_gives_up_on_what_is_always_wrong(rng):
    with pytest.raises(ExpertError, match="arrived damaged every time"):
        Air(rng.bytes(10)).fetch(sha256="00" * 32)
    with pytest.raises(ExpertError, match="got 10 bytes of 10, wanted 12 of 12"):
        Air(rng.bytes(10)).fetch(size=12)


# ---- the computing thread, over memory channels


@pytest.fixture
def crashes():
    return []


@pytest.fixture
def expert(rng) -> ExpertFile:
    return make_expert(rng, HIDDEN)


@pytest.fixture
def compute(expert, crashes):
    runner = ExpertRunner(lambda file, _sha256: on_cpu(file))
    runner.load(ExpertId(0, 0), expert.data, expert.sha256, HIDDEN)
    thread = ComputeThread(runner, LinkEmulation(), crashes.append)
    thread.start()
    yield thread
    thread.stop()
    thread.stop()  # harmless


def a_run(attempt: int, expert: int = 0, remaining_s: float = 10.0) -> Run:
    return Run(
        attempt=attempt,
        layer=0,
        remaining_s=remaining_s,
        experts=(expert,),
        counts=(1,),
        tokens=np.full((1, HIDDEN), attempt, np.float32),
        rows=np.zeros(1, np.int32),
        weights=np.ones(1, np.float32),
    )


def replies(station: MemoryDataStation, count: int):
    found = []
    end = time.monotonic() + PATIENCE_S
    while len(found) < count and time.monotonic() < end:
        envelope = station.receive(0.1)
        if envelope is not None and not isinstance(envelope.message, Attach):
            found.append(envelope.message)
    return found


def test_answers_in_order_and_attaches_until_it_is_heard(compute, expert, crashes):
    station = MemoryDataStation()
    link = station.connect()
    compute.connect(lambda: link, 5)
    attaches = [station.receive(PATIENCE_S) for _ in range(2)]
    assert all(isinstance(e.message, Attach) and e.message.session == 5 for e in attaches if e)
    station.send(link.route, Attached(session=5))
    for attempt in range(1, 9):
        station.send(link.route, a_run(attempt, expert=attempt % 2))
    found = replies(station, 8)
    assert [reply.attempt for reply in found] == list(range(1, 9))
    for reply in found:
        if reply.attempt % 2:
            assert isinstance(reply, Failure)
        else:
            assert isinstance(reply, Result)
            wanted = expert.apply(np.full((1, HIDDEN), reply.attempt))
            np.testing.assert_allclose(reply.partial, wanted, rtol=1e-4, atol=1e-5)
    assert (compute.done, compute.queued, crashes) == (4, 0, [])


def test_a_connection_attaches_again_when_asked_and_from_time_to_time(compute):
    station = MemoryDataStation()
    link = station.connect()
    compute.connect(lambda: link, 5)
    for _ in range(2):
        assert station.receive(PATIENCE_S) is not None
        station.send(link.route, Attached(session=5))
        compute.attach_again()
    assert station.receive(PATIENCE_S) is not None


def test_takes_the_next_connection_and_drops_the_old_one(compute):
    first, second = MemoryDataStation(), MemoryDataStation()
    old, new = first.connect(), second.connect()
    compute.connect(lambda: old, 1)
    assert first.receive(PATIENCE_S) is not None
    compute.connect(lambda: new, 2)
    attach = second.receive(PATIENCE_S)
    assert attach is not None
    assert attach.message.session == 2
    second.send(new.route, a_run(1))
    assert isinstance(replies(second, 1)[0], Result)


def test_a_refused_connection_is_opened_again(compute, monkeypatch, crashes):
    monkeypatch.setattr("wdmoe.nodes.device.compute_thread.REFUSED_RETRY_S", 0.01)
    station, opened = MemoryDataStation(), []

    def open_link() -> MemoryDataLink:
        opened.append(True)
        if len(opened) < 3:
            raise RefusedError("not yet")
        return station.connect()

    compute.connect(open_link, 1)
    assert station.receive(PATIENCE_S) is not None
    assert crashes == []


def test_a_bug_is_reported_and_ends_the_thread(compute, crashes):
    def bug() -> MemoryDataLink:
        raise ZeroDivisionError("a bug")

    compute.connect(bug, 1)
    until(lambda: crashes)
    assert isinstance(crashes[0], ZeroDivisionError)


# ---- engines built behind the scenes, with the CPU provider in both parts


def test_serves_at_once_and_swaps_when_the_engine_is_there(expert, rng):
    may_build, built = threading.Event(), []

    def build(file: bytes, sha256: str, hidden: int) -> OnnxExpert:
        may_build.wait(PATIENCE_S)
        built.append((on_cpu(file), sha256, hidden))
        return built[-1][0]

    builds = BackgroundBuild(on_cpu, build)
    model = builds.open(expert.data, expert.sha256)
    tokens = rng.standard_normal((3, HIDDEN)).astype(np.float32)
    np.testing.assert_allclose(model.run(tokens), expert.apply(tokens), rtol=1e-4, atol=1e-5)
    assert not built
    may_build.set()
    until(lambda: built and model._model is built[0][0])
    assert built[0][1:] == (expert.sha256, HIDDEN)
    np.testing.assert_allclose(model.run(tokens), expert.apply(tokens), rtol=1e-4, atol=1e-5)
    builds.close()
    until(lambda: not builds._thread.is_alive())


def test_an_engine_that_fails_or_lies_is_never_used(expert, rng, caplog):
    other, tried = make_expert(rng, HIDDEN), []

    def build(_file: bytes, _sha256: str, _hidden: int) -> OnnxExpert:
        tried.append(True)
        if len(tried) == 1:
            raise ExpertError("no room on the accelerator")
        return on_cpu(other.data)

    builds = BackgroundBuild(on_cpu, build)
    models = [builds.open(expert.data, expert.sha256) for _ in range(2)]
    builds.open(expert.data, expert.sha256)  # dropped at once: nothing to build for
    until(lambda: "its output is off by" in caplog.text)
    tokens = rng.standard_normal((1, HIDDEN)).astype(np.float32)
    for model in models:
        np.testing.assert_allclose(model.run(tokens), expert.apply(tokens), rtol=1e-4, atol=1e-5)
    assert "no room on the accelerator" in caplog.text
    builds.close()
    until(lambda: not builds._thread.is_alive())
    assert len(tried) == 2


# ---- hardware


def test_the_board_names_itself(tmp_path):
    (tmp_path / "proc" / "device-tree").mkdir(parents=True)
    (tmp_path / "etc").mkdir()
    assert hardware.board_name(tmp_path)  # no cpuinfo: whatever Python knows
    (tmp_path / "proc" / "cpuinfo").write_text("processor\t: 0\nmodel name\t: Some CPU @ 2 GHz\n")
    assert hardware.board_name(tmp_path) == "Some CPU @ 2 GHz"
    board = "NVIDIA Jetson Orin Nano Developer Kit\0"
    (tmp_path / "proc" / "device-tree" / "model").write_text(board)
    assert hardware.board_name(tmp_path) == "NVIDIA Jetson Orin Nano Developer Kit"
    assert hardware.jetpack_release(tmp_path) == ""
    release = "# R36 (release), REVISION: 4.3, GCID: 1, BOARD: generic, EABI: aarch64\n# KERNEL_VARIANT: oot\n"
    (tmp_path / "etc" / "nv_tegra_release").write_text(release)
    assert hardware.jetpack_release(tmp_path).startswith("R36 (release), REVISION: 4.3")


def test_the_probe_measures_this_machine(tmp_path):
    assert len(hardware.probe_expert()) < 100_000
    opener = expert_opener(DeviceSettings(join="", cache=tmp_path))
    assert opener.provider == "cpu"
    assert 1e7 < opener.flops < 1e13
    assert 0 < hardware.resident_bytes() < psutil.virtual_memory().total
    assert hardware.tensorrt_version() is not None
    opener.close()


class Busy:
    """An expert on a machine that does other work meanwhile, and its clock."""

    def __init__(self, *run_s: float) -> None:
        self.now_s = 0.0
        self._run_s = list(run_s)

    def run(self, tokens: np.ndarray) -> np.ndarray:
        self.now_s += self._run_s.pop(0)
        return tokens


def test_speed_is_that_of_the_run_nothing_else_disturbed(monkeypatch):
    busy = Busy(9.0, 0.08, 0.02, 0.12, 0.05)  # the first one warms up
    monkeypatch.setattr("wdmoe.nodes.device.hardware.time.perf_counter", lambda: busy.now_s)
    assert hardware.measure_flops(busy) == pytest.approx(hardware.PROBE_FLOPS / 0.02)
