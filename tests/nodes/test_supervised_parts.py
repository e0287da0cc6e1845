"""The parts of a supervised base station, each alone: what travels, what a new engine is asked, when one gives up."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.lab.engine_lab import Lab
from tests.lab.families import save_tiny
from wdmoe.backbone.export.export import ExportSettings, export_bundle
from wdmoe.backbone.format.bundle import Bundle
from wdmoe.config import StationSettings
from wdmoe.errors import EngineLostError, ExpertsUnavailableError, WdmoeError
from wdmoe.nodes.supervised.patience import MOST_SOON, SOON_S, Patience
from wdmoe.nodes.supervised.plain import heard, pack, told, unpacker
from wdmoe.nodes.supervised.resume import Progress
from wdmoe.nodes.supervised.spawner_link import SpawnerLink
from wdmoe.nodes.supervised.supervisor import Supervisor
from wdmoe.receipt import Receipt, StageSeconds
from wdmoe.records import Finished, GenerationRequest, Sampling, TextDelta


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    folder = tmp_path_factory.mktemp("mixtral")
    export_bundle(save_tiny("mixtral", folder / "checkpoint"), folder / "bundle", ExportSettings())
    opened = Lab(Bundle.open(folder / "bundle"))
    yield opened
    opened.close()


def _answer(lab: Lab, request: GenerationRequest) -> list[TextDelta | Finished]:
    async def collect() -> list[TextDelta | Finished]:
        return [event async for event in lab.engine.stream(request)]

    return asyncio.run(collect())


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(max_tokens=12, ignore_eos=True),
        Sampling(max_tokens=12, ignore_eos=True, temperature=1.0, seed=3),
        Sampling(max_tokens=12, ignore_eos=True, temperature=0.7, top_p=0.9, seed=4),
    ],
)
def test_an_answer_goes_on_from_any_of_its_tokens(lab: Lab, sampling: Sampling) -> None:
    """The tokens that are left, their text, what was held back for a stop sequence, and the end."""
    request = GenerationRequest(request_id="r", prompt="hello", sampling=sampling)
    whole = _answer(lab, request)
    text = "".join(each.text for each in whole if isinstance(each, TextDelta))
    for stop in ((), (text[7:10],)):
        asked = replace(request, sampling=replace(sampling, stop=stop))
        calm = _answer(lab, asked)
        deltas = [each for each in calm if isinstance(each, TextDelta) and each.token_id >= 0]
        for cut in {0, 1, 2, len(deltas) - 1, len(deltas)}:
            begun = tuple(each.token_id for each in deltas[:cut])
            rest = _answer(lab, replace(asked, begun=begun))
            told_before = "".join(each.text for each in deltas[:cut])
            assert told_before + _text(rest) == _text(calm)
            assert [each.token_id for each in _made(rest)] == [each.token_id for each in deltas[cut:]]
            assert rest[-1].reason == calm[-1].reason  # type: ignore[union-attr]
            assert rest[-1].receipt.completion_tokens == len(deltas)  # type: ignore[union-attr]


def test_an_answer_may_run_past_the_end_of_text(lab: Lab) -> None:
    sampling = Sampling(max_tokens=40, ignore_eos=True)
    tokens = [
        each.token_id
        for each in _made(_answer(lab, GenerationRequest(request_id="r", prompt="hello", sampling=sampling)))
    ]
    assert len(tokens) == 40
    end = lab.engine._station.model.generation_config.eos_token_id
    assert end in tokens  # or this would prove nothing


def _made(events: list[TextDelta | Finished]) -> list[TextDelta]:
    return [each for each in events if isinstance(each, TextDelta) and each.token_id >= 0]


def _text(events: list[TextDelta | Finished]) -> str:
    return "".join(each.text for each in events if isinstance(each, TextDelta))


def test_records_travel_whole() -> None:
    sampling = Sampling(max_tokens=3, temperature=0.5, seed=2**62, stop=("a", "b"))
    messages = ({"role": "user", "content": "hé"},)
    things = (
        GenerationRequest(request_id="x", messages=messages, sampling=sampling),
        GenerationRequest(request_id="y", prompt=(1, 2), begun=(3,)),
        TextDelta(text="é", token_id=5, devices=("a",), layers=(3,), dropped_weight=0.1, lost_weight=0.05),
        Finished(reason="stop", receipt=Receipt(restarts=1, stages=StageSeconds(wait=2.0))),
        StationSettings(bundle=Path("b"), placement=Path("p"), lease_s=2.5),
    )
    taker = unpacker()
    data = pack(("these", things)) * 2
    for at in range(0, len(data), 7):  # as a socket may cut it
        taker.feed(data[at : at + 7])
    assert list(taker) == [("these", things)] * 2


def test_failures_travel_by_name() -> None:
    stated = heard(*told(ExpertsUnavailableError("none left")))
    assert (type(stated), str(stated)) == (ExpertsUnavailableError, "none left")
    system = heard(*told(FileNotFoundError(2, "No such file", "there")))
    assert isinstance(system, FileNotFoundError)
    assert system.filename == "there"
    for bug in (KeyError("x"), WdmoeError):
        assert type(heard(*told(bug if isinstance(bug, Exception) else bug("y")))) in {RuntimeError, WdmoeError}
    assert isinstance(heard("os", "x"), RuntimeError)  # a name in the module that is no failure


def test_a_receipt_says_what_the_engines_before_lost() -> None:
    now = [100.0]
    progress = Progress(GenerationRequest(request_id="r", prompt=(1,)), clock=lambda: now[0])
    now[0] = 101.0
    progress.take(TextDelta(text="a", token_id=7, lost_weight=0.2, dropped_weight=0.2))
    now[0] = 105.0
    progress.restarted()
    assert progress.rest.begun == (7,)
    now[0] = 108.0
    last = Receipt(completion_tokens=2, elapsed_s=3.0, stages=StageSeconds(bs_compute=2.0, wait=1.0))
    end = progress.take(Finished(reason="length", receipt=last))
    assert isinstance(end, Finished)
    told_ = end.receipt
    assert (told_.restarts, told_.degraded, told_.lost_weight) == (1, True, 0.2)
    assert (told_.first_token_s, told_.elapsed_s, told_.completion_tokens) == (1.0, 8.0, 2)
    assert told_.stages == StageSeconds(bs_compute=2.0, wait=6.0)  # all stages still sum to the elapsed time


def test_an_undisturbed_receipt_is_left_alone() -> None:
    progress = Progress(GenerationRequest(request_id="r", prompt=(1,)))
    end = Finished(reason="stop", receipt=Receipt(elapsed_s=1.0))
    assert progress.take(end) is end


def test_a_sampled_request_has_a_seed_so_that_it_can_go_on() -> None:
    drawn = Progress(GenerationRequest(request_id="r", prompt=(1,), sampling=Sampling(temperature=1.0)))
    assert drawn.rest.sampling.seed is not None
    given = Progress(GenerationRequest(request_id="r", prompt=(1,), sampling=Sampling(temperature=1.0, seed=5)))
    assert given.rest.sampling.seed == 5
    greedy = Progress(GenerationRequest(request_id="r", prompt=(1,)))
    assert greedy.rest.sampling.seed is None


def test_patience_ends_only_with_engines_that_end_soon_in_a_row() -> None:
    patience = Patience()
    assert [patience.ended(100.0) for _ in range(50)] == [0.0] * 50
    assert [patience.ended(0.0) for _ in range(MOST_SOON)] == [0.5, 1.0, 2.0, 4.0, None]
    patience = Patience()
    for _ in range(20):
        assert patience.ended(0.1) == 0.5
        assert patience.ended(SOON_S) == 0.0


def test_the_link_to_an_engine_that_never_opens_is_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its process may hold the other end for a while: nothing here waits for it."""
    ends: list[socket.socket] = []

    async def start(self: SpawnerLink, end: socket.socket, *words: object) -> None:
        ends.append(end.dup())
        raise EngineLostError("no")

    async def open_in_vain() -> list[Any]:
        monkeypatch.setattr(SpawnerLink, "start", start)
        supervisor = Supervisor(StationSettings(bundle=tmp_path), {})
        with pytest.raises(EngineLostError, match="no"):
            await supervisor.__aenter__()
        return [supervisor._link._link._transport.is_closing(), supervisor._spawner._process.returncode]

    try:
        assert asyncio.run(open_in_vain()) == [True, 0]
    finally:
        ends[0].close()


def test_a_source_tree_in_the_working_folder_is_not_taken_for_wdmoe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After `pip install .` in a clone, which compiles somewhere else: the README's own commands."""
    (tmp_path / "wdmoe").mkdir()
    (tmp_path / "wdmoe" / "__init__.py").write_text("raise ImportError('not compiled')")
    monkeypatch.chdir(tmp_path)

    async def open_and_close() -> None:
        await (await SpawnerLink.open()).close()

    asyncio.run(open_and_close())


def test_what_an_engine_cannot_import_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "zmq.py").write_text("raise ImportError('libzmq is not for this machine')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(RuntimeError, match="ImportError: libzmq is not for this machine"):
        asyncio.run(SpawnerLink.open())


def test_the_front_holds_neither_torch_nor_libzmq() -> None:
    """What can abort is somewhere else."""
    modules = "wdmoe.nodes.supervised.supervisor, wdmoe.nodes.supervised.command_lines, wdmoe.serving.server"
    look = f"import sys, {modules}; print(*{{'torch', 'transformers', 'zmq', 'onnxruntime'}} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", look], capture_output=True, text=True, check=True).stdout == "\n"


def test_the_spawner_forks_from_one_thread() -> None:
    look = "import threading, wdmoe.nodes.supervised.engine_process; print(threading.active_count())"
    assert subprocess.run([sys.executable, "-c", look], capture_output=True, text=True, check=True).stdout == "1\n"
