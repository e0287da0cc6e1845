"""Experts that every device lost: requests wait for them, others go on, and the wait has an end."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.backbone.test_spine import PROMPT, bundle, checkpoint, greedy
from tests.lab.engine_lab import Lab
from wdmoe.backbone.format.bundle import Bundle
from wdmoe.errors import ExpertsUnavailableError, WdmoeError
from wdmoe.records import Finished, GenerationRequest, Sampling, TextDelta, Waiting

__all__ = ["bundle", "checkpoint"]  # fixtures

NEVER_S = 1000.0  # the test would end before


class Served:
    """A lab whose devices can be taken away and brought back, all at once."""

    def __init__(self, bundle: Bundle, wait_s: float) -> None:
        self.lab = Lab(bundle, rules={"wait_for_experts_s": wait_s})
        self.back()

    def back(self, but: int = 0) -> None:
        """All devices but some are there."""
        self.lab.route(without=frozenset(device.name for device in self.lab.devices[:but]))
        self.lab.routing = replace(self.lab.routing, was_served=True)

    def gone(self) -> None:
        self.back(but=len(self.lab.devices))

    async def ask(
        self, told: Callable[[TextDelta | Waiting], object] = lambda event: None
    ) -> tuple[list[int], Finished]:
        sampling = Sampling(max_tokens=12, ignore_eos=True)
        ids: list[int] = []
        async for event in self.lab.engine.stream(GenerationRequest(request_id="t", prompt=PROMPT, sampling=sampling)):
            if isinstance(event, Finished):
                return ids, event
            if isinstance(event, TextDelta) and event.token_id >= 0:
                ids.append(event.token_id)
            told(event)
        raise AssertionError("an answer without an end")


@pytest.fixture
def served(bundle: Bundle) -> Iterator[Served]:
    served = Served(bundle, NEVER_S)
    yield served
    served.lab.close()


def test_an_answer_goes_on_when_the_experts_are_back(served: Served, checkpoint: Path) -> None:
    said: list[str] = []

    def told(event: TextDelta | Waiting) -> None:
        if isinstance(event, Waiting):
            said.append(event.text)
            served.back(but=1)  # a third of the experts is still missing: not yet
            asyncio.get_running_loop().call_later(0.3, served.back)
        elif event.token_id >= 0 and not said and event.devices:
            served.gone()

    ids, end = asyncio.run(served.ask(told))
    assert ids == greedy(checkpoint)
    assert said
    assert "waiting for experts" in said[0]
    receipt = end.receipt
    assert not receipt.degraded
    assert 0.3 <= receipt.waited_s <= receipt.stages.wait
    stages = receipt.stages
    assert sum((stages.bs_compute, stages.wire_down, stages.device_compute, stages.wire_up, stages.wait)) == (
        pytest.approx(receipt.elapsed_s, rel=0.01)
    )


def test_new_requests_wait_too_and_all_go_on_together(served: Served, checkpoint: Path) -> None:
    async def crowd() -> list[list[int]]:
        served.gone()
        asyncio.get_running_loop().call_later(0.5, served.back)
        return [ids for ids, _ in await asyncio.gather(*(served.ask() for _ in range(4)))]

    assert asyncio.run(crowd()) == [greedy(checkpoint)] * 4


def test_a_client_that_goes_away_meanwhile_frees_its_place(served: Served) -> None:
    async def leave() -> None:
        served.gone()
        stream = served.lab.engine.stream(
            GenerationRequest(request_id="t", prompt=PROMPT, sampling=Sampling(max_tokens=5))
        )
        assert isinstance(await stream.__anext__(), Waiting)
        assert served.lab.thread.load == 1
        await stream.aclose()
        while served.lab.thread.load:
            await asyncio.sleep(0.01)

    asyncio.run(asyncio.wait_for(leave(), 30))


def test_the_end_of_the_base_station_ends_the_wait(bundle: Bundle) -> None:
    served = Served(bundle, NEVER_S)

    async def stop() -> None:
        served.gone()
        waiting = asyncio.Event()
        asking = asyncio.create_task(served.ask(lambda event: waiting.set()))
        await waiting.wait()
        await asyncio.to_thread(served.lab.close)
        with pytest.raises(WdmoeError):
            await asking

    asyncio.run(asyncio.wait_for(stop(), 30))


@pytest.mark.parametrize("wait_s", [0.0, 0.4])
def test_when_the_time_is_over_the_error_says_so(bundle: Bundle, wait_s: float) -> None:
    served = Served(bundle, wait_s)
    try:
        served.gone()
        said: list[object] = []
        with pytest.raises(ExpertsUnavailableError, match="layer 0.*for 0.4 s" if wait_s else "layer 0"):
            asyncio.run(served.ask(said.append))
        assert bool(said) == bool(wait_s)
        served.back()
        assert len(asyncio.run(served.ask())[0]) == 12
    finally:
        served.lab.close()


def test_when_the_time_is_over_what_came_back_must_do(bundle: Bundle) -> None:
    served = Served(bundle, 0.4)
    try:
        served.gone()
        ids, end = asyncio.run(served.ask(lambda event: served.back(but=1)))
        assert len(ids) == 12
        assert end.receipt.degraded
        assert 0.4 <= end.receipt.waited_s < 30
    finally:
        served.lab.close()


def test_a_base_station_that_never_served_them_all_says_so_at_once(served: Served) -> None:
    served.lab.route(without=frozenset(device.name for device in served.lab.devices))
    with pytest.raises(ExpertsUnavailableError, match="layer 0"):
        asyncio.run(asyncio.wait_for(served.ask(), 60))
