"""Many requests in shared passes: each gets what it would get alone, whatever comes and goes beside it."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest

from tests.lab.engine_lab import Lab
from tests.lab.families import GRAPHS, HEADS, save_tiny
from wdmoe.backbone.export.export import ExportSettings, export_bundle
from wdmoe.backbone.format.bundle import Bundle
from wdmoe.errors import OverloadedError, RequestError
from wdmoe.records import Finished, GenerationRequest, Sampling, TextDelta
from wdmoe.transport.codec.messages import Activations, Run

MIXES = int(os.environ.get("WDMOE_MIXES", "40"))  # the figure in docs/performance.md is of 200
FAMILY = "gpt_oss"  # sliding windows, sinks


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("mixes")
    export_bundle(
        save_tiny(FAMILY, folder / "model", **HEADS, **GRAPHS[FAMILY][0]), folder / "bundle", ExportSettings()
    )
    return Bundle.open(folder / "bundle")


@pytest.fixture(scope="module")
def lab(bundle: Bundle) -> Iterator[Lab]:
    opened = Lab(bundle, engine="graphs", max_active=5)  # further ones wait
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def alone(bundle: Bundle) -> Iterator[Lab]:
    opened = Lab(bundle, engine="graphs", max_active=1)
    yield opened
    opened.close()


@dataclass(frozen=True)
class Asked:
    """A request, when it comes, and after how many of its tokens its client leaves (-1: never)."""

    request: GenerationRequest
    after: int  # tokens that others were told before
    leaves: int = -1


@dataclass
class Told:
    tokens: list[int]
    text: str = ""
    end: Finished | None = None


class Mix:
    """Requests in one lab. What comes when is told in tokens, not in seconds."""

    def __init__(self, lab: Lab) -> None:
        self._lab = lab
        self._told = 0
        self._news = asyncio.Event()

    async def run(self, asked: Sequence[Asked]) -> list[Told]:
        return list(await asyncio.gather(*(self._one(each) for each in asked)))

    async def _one(self, asked: Asked) -> Told:
        while self._told < asked.after:
            self._news.clear()
            await self._news.wait()
        told = Told([])
        events = self._lab.engine.stream(asked.request)
        async for event in events:
            if isinstance(event, Finished):
                told.end = event
            elif isinstance(event, TextDelta):
                told.text += event.text
                if event.token_id >= 0:
                    told.tokens.append(event.token_id)
                    self._told += 1
                    self._news.set()
            if len(told.tokens) == asked.leaves:
                break
        await events.aclose()
        self._told += 1000  # nobody waits for who is gone
        self._news.set()
        return told


def drawn(rng: np.random.Generator, openings: Sequence[Sequence[int]]) -> list[Asked]:
    """Some requests of any kind; some begin as others did, some have begun before."""
    asked = []
    for number in range(int(rng.integers(2, 8))):
        opening = openings[int(rng.integers(len(openings)))] if rng.random() < 0.5 else []
        prompt = (*opening, *rng.integers(30, 250, int(rng.integers(1, 40))).tolist())
        sampling = Sampling(max_tokens=int(rng.integers(1, 25)), ignore_eos=bool(rng.random() < 0.5))
        if rng.random() < 0.5:
            sampling = replace(
                sampling, temperature=1.0, top_p=float(rng.choice((1.0, 0.8))), seed=int(rng.integers(99))
            )
        if rng.random() < 0.3:
            sampling = replace(sampling, stop=(chr(int(rng.integers(97, 123))),))
        request = GenerationRequest(request_id=f"r{number}", prompt=prompt, sampling=sampling)
        leaves = int(rng.integers(1, 12)) if rng.random() < 0.2 else -1
        asked.append(Asked(request, after=int(rng.integers(0, 12)) if number else 0, leaves=leaves))
    return asked


def test_each_gets_what_it_would_get_alone(lab: Lab, alone: Lab, rng: np.random.Generator) -> None:
    openings = [rng.integers(30, 250, size).tolist() for size in (20, 35, 50)]
    shared = reused = cancelled = 0
    for _ in range(MIXES):
        asked = drawn(rng, openings)
        mixed = asyncio.run(Mix(lab).run(asked))
        for each, got in zip(asked, mixed, strict=True):
            alone.station.forget()  # nothing is reused there
            (want,) = asyncio.run(Mix(alone).run([replace(each, after=0, leaves=-1)]))
            if got.end is None:
                assert got.tokens == want.tokens[: len(got.tokens)]
                cancelled += 1
                continue
            assert (got.tokens, got.text, got.end.reason) == (want.tokens, want.text, want.end.reason)
            receipt = got.end.receipt
            assert not receipt.degraded
            assert receipt.completion_tokens == len(got.tokens)
            assert sum(dataclasses.astuple(receipt.stages)) == pytest.approx(receipt.elapsed_s, rel=0.05, abs=1e-3)
            reused += receipt.reused_tokens
        shared += len(asked) > 1
    assert min(shared, reused, cancelled) > MIXES // 10  # or this would prove little


def test_the_receipts_of_a_mix_add_up_to_what_was_sent(
    lab: Lab, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent, send = [0], lab._data.send

    def counted(*words: Any) -> int:
        size = send(*words)
        sent[0] += size
        return size

    monkeypatch.setattr(lab._data, "send", counted)
    asked = [replace(each, leaves=-1) for _ in range(4) for each in drawn(rng, [[]])][:7]
    before = lab.exchange.counters.orders
    told = asyncio.run(Mix(lab).run(asked))
    assert sum(each.end.receipt.bytes_down for each in told if each.end) == sent[0]
    orders = lab.exchange.counters.orders - before
    tokens = sum(each.end.receipt.completion_tokens for each in told if each.end)
    layers, devices = len(lab.station.manifest.moe_layers), len(lab.devices)
    assert orders < 0.7 * tokens * layers * devices  # they shared passes


def test_a_burst_beyond_the_queue_is_refused_and_the_rest_is_answered(bundle: Bundle) -> None:
    lab = Lab(bundle, engine="graphs", max_active=2)  # and two may wait
    request = GenerationRequest(request_id="r", prompt=(40, 50, 60), sampling=Sampling(max_tokens=20, ignore_eos=True))

    async def burst() -> list[Any]:
        mix = Mix(lab)
        return await asyncio.gather(*(mix._one(Asked(request, 0)) for _ in range(9)), return_exceptions=True)

    try:
        told = asyncio.run(burst())
        refused = [each for each in told if isinstance(each, OverloadedError)]
        answers = [each.tokens for each in told if isinstance(each, Told)]
        assert (len(refused), len(answers)) == (5, 4)
        assert all(tokens == answers[0] for tokens in answers)
    finally:
        lab.close()


def test_two_groups_take_turns_where_devices_are_far_and_nothing_changes(bundle: Bundle, alone: Lab) -> None:
    lab = Lab(bundle, engine="graphs", max_active=4, devices=1)
    run, passes = lab.devices[0].run, lab.station._passes

    def far(order: Run) -> Activations:
        time.sleep(0.01 * len(order.tokens))  # the air
        return run(order)

    lab.devices[0].run = far
    asked = [
        Asked(
            GenerationRequest(
                request_id=f"r{n}", prompt=(40 + n, 50), sampling=Sampling(max_tokens=70, ignore_eos=True)
            ),
            0,
        )
        for n in range(4)
    ]
    groups, took = set(), passes._alternation.took

    def seen(*facts: Any) -> None:
        took(*facts)
        groups.add(passes._alternation.groups)

    passes._alternation.took = seen
    try:
        told = asyncio.run(Mix(lab).run(asked))
        assert groups == {1, 2}
        for each, got in zip(asked, told, strict=True):
            alone.station.forget()
            (want,) = asyncio.run(Mix(alone).run([each]))
            assert got.tokens == want.tokens
            assert got.end is not None
            stages = got.end.receipt.stages
            assert sum(dataclasses.astuple(stages)) == pytest.approx(got.end.receipt.elapsed_s, rel=0.05)
    finally:
        lab.close()


def test_who_does_not_fit_into_memory_waits_and_what_never_fits_is_refused(bundle: Bundle) -> None:
    lab = Lab(bundle, engine="graphs", max_active=4)
    request = GenerationRequest(request_id="r", prompt=(40, 50, 60), sampling=Sampling(max_tokens=20, ignore_eos=True))
    long = replace(request, sampling=Sampling(max_tokens=300, ignore_eos=True))
    lab.thread._room_bytes = 2 * lab.station.size_bytes(23)
    active = []
    run = lab.station._passes._through

    def counted(parts: Any, *words: Any) -> None:
        active.append(len(parts))
        run(parts, *words)

    lab.station._passes._through = counted
    try:
        told = asyncio.run(Mix(lab).run([Asked(request, 0)] * 4))
        assert max(active) == 2
        assert all(each.tokens == told[0].tokens for each in told)
        assert lab.station.size_bytes(303) == 2 * lab.station.size_bytes(23)
        assert asyncio.run(Mix(lab).run([Asked(long, 0)]))[0].tokens[:20] == told[0].tokens
        lab.thread._room_bytes -= 1
        with pytest.raises(RequestError, match=r"MiB, and the base station has .* MiB for them: ask for fewer tokens"):
            asyncio.run(Mix(lab).run([Asked(long, 0)]))
    finally:
        lab.close()
