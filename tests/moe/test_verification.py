"""Devices that lie, in one process with real model, codec and ONNX Runtime: what is believed, found and said."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.backbone.test_spine import PROMPT, answer, ask, bundle, checkpoint, greedy
from tests.lab.engine_lab import Lab
from tests.lab.liar import KINDS, Liar, Lie
from wdmoe.backbone.format.bundle import Bundle
from wdmoe.errors import NotFiniteError
from wdmoe.moe.health import DeviceHealth
from wdmoe.moe.verification.inspector import PUT_OFF
from wdmoe.moe.verification.trust import PROBATION, WATCH
from wdmoe.transport.codec.messages import Result

__all__ = ["bundle", "checkpoint"]  # fixtures

LAYERS = 2
TOKENS = 100  # on a busy machine samples have to wait, and some are skipped
NEVER, ALWAYS = (lambda: 0.999999), (lambda: 0.0)


@contextmanager
def lying(bundle: Bundle, lie: Lie, **settings: Any) -> Iterator[tuple[Lab, Liar]]:
    """Three devices, of which the first lies; every expert has a copy on another one."""
    lab = Lab(bundle, copies=2, **{"verify": 0.05, **settings})
    first = lab.devices[0]
    liar = first.run = Liar(first.runner, first.runner.run, lie)
    try:
        yield lab, liar
    finally:
        lab.close()


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("1.05", "nan")])
def test_a_device_that_always_lied_is_found_before_it_spoils_anything(
    kind: str, bundle: Bundle, checkpoint: Path
) -> None:
    with lying(bundle, Lie(kind)) as (lab, liar):
        ids, _, receipt = ask(lab)
        assert ids == greedy(checkpoint)
        assert not receipt.suspect
        assert not receipt.degraded
        assert lab.barred == ["device 0"]
        assert liar.lies <= 4  # the second ended it; a stale answer has to grow old first
        asked = liar.answers
        assert ask(lab)[0] == greedy(checkpoint)
        assert liar.answers == asked  # it is not asked any more
        assert lab.layers.observed.inspector.figures()["device 0"].quarantined


@pytest.mark.parametrize("kind", ["nan", "shape"])
def test_what_is_no_answer_at_all_is_a_lie_too(kind: str, bundle: Bundle, checkpoint: Path) -> None:
    """The copy answers in its place; the device has a pause after it, so that its second lie comes later."""
    with lying(bundle, Lie("nan")) as (lab, _):
        if kind == "shape":
            lab.devices[0].run = lambda run: np.ones((len(run.tokens) + 1, run.tokens.shape[1]), np.float32)
        for barred in ([], ["device 0"]):
            ids, _, receipt = ask(lab)
            assert ids == greedy(checkpoint)
            assert not receipt.degraded
            assert lab.barred == barred
            lab.layers.observed.health = DeviceHealth()


@pytest.mark.parametrize("kind", ["1e30", "zeros"])
def test_odd_answers_are_found_without_a_rate_and_after_any_time(kind: str, bundle: Bundle, checkpoint: Path) -> None:
    with lying(bundle, Lie(kind, after=PROBATION + 3), verify=0.0) as (lab, liar):
        assert ask(lab, max_tokens=40)[0] == greedy(checkpoint, tokens=40)
        assert lab.barred == ["device 0"]
        assert liar.lies == 2


@pytest.mark.parametrize("kind", ["stale", "foreign", "noise", "sign", "1.5"])
def test_a_late_liar_is_found_by_a_sample_and_the_receipt_says_suspect(kind: str, bundle: Bundle) -> None:
    with lying(bundle, Lie(kind, after=PROBATION + 4), draw=ALWAYS) as (lab, _):
        receipt = ask(lab, max_tokens=TOKENS)[2]
        assert lab.barred == ["device 0"]
        assert receipt.suspect
        assert 0 < receipt.suspect_answers < TOKENS * LAYERS
        after = ask(lab)[2]
        assert not after.suspect


def test_a_lie_that_no_sample_met_is_believed_and_not_said(bundle: Bundle, checkpoint: Path) -> None:
    """What the documentation says of a chance, at its end."""
    with lying(bundle, Lie("sign", after=PROBATION + PUT_OFF + 2, most=1), draw=NEVER) as (lab, liar):
        receipt = ask(lab, max_tokens=TOKENS)[2]
        assert liar.lies == 1
        assert not receipt.suspect


def test_a_liar_that_no_sample_met_is_found_before_a_short_answer_ends(bundle: Bundle) -> None:
    """Some answers of each device are put off to the end of each request, and computed again then."""
    with lying(bundle, Lie("foreign", after=1 << 30), verify=1e-9, draw=random.Random(3).random) as (lab, liar):
        ask(lab)
        lab.layers.observed.inspector._devices["device 0"].fresh = 1 << 30  # its trust is earned, and hardly sampled
        assert not ask(lab)[2].suspect
        liar.lie = Lie("foreign")
        receipt = ask(lab, max_tokens=4)[2]
        assert receipt.suspect
        assert lab.barred == ["device 0"]
        assert not ask(lab)[2].suspect


def test_what_is_put_off_is_drawn_from_the_whole_answer(bundle: Bundle) -> None:
    with lying(bundle, Lie("sign", after=1 << 30), verify=1e-9, draw=random.Random(3).random) as (lab, liar):
        ask(lab)
        found = 0
        for _ in range(12):
            lab.layers.observed.inspector._devices["device 0"].fresh = 1 << 30
            liar.lie = Lie("sign", after=liar.answers + 12)  # the last half of a short answer, about
            found += ask(lab, max_tokens=12)[2].suspect
            if lab.barred:
                break
        assert found >= 1


def test_a_lie_that_only_the_last_answer_holds_is_found(bundle: Bundle) -> None:
    """Whoever begins to lie near the end of an answer leaves few lies to draw from; the newest is looked at always."""
    with lying(bundle, Lie("sign", after=1 << 30), verify=1e-9, draw=NEVER) as (lab, liar):
        ask(lab)
        lab.layers.observed.inspector._devices["device 0"].fresh = 1 << 30
        before = liar.answers
        assert not ask(lab, max_tokens=TOKENS)[2].suspect
        assert liar.answers - before > 2 * PUT_OFF  # or it would be looked at anyway
        liar.lie = Lie("sign", after=2 * liar.answers - before - 1)
        assert ask(lab, max_tokens=TOKENS)[2].suspect
        assert liar.lies == 1


def test_the_last_samples_are_known_before_the_receipt(bundle: Bundle) -> None:
    """The lie is in the last tokens, where nothing comes after it that could be waited for."""
    with lying(bundle, Lie("sign", after=PROBATION + 4), draw=ALWAYS) as (lab, liar):
        tokens = 1
        while not liar.lies:
            receipt = ask(lab, max_tokens=tokens)[2]
            tokens += 1
        assert receipt.suspect


def test_one_lie_is_watched_and_forgiven(bundle: Bundle, checkpoint: Path) -> None:
    with lying(bundle, Lie("1e30", most=1)) as (lab, _):
        hedges = 0
        for _ in range(3):
            ids, _, receipt = ask(lab, max_tokens=12)
            assert ids == greedy(checkpoint)
            hedges += receipt.hedges
        figures = lab.layers.observed.inspector.figures()["device 0"]
        assert (figures.lies, figures.watched, figures.quarantined) == (1, True, False)
        # Every answer of a watched device that counts is computed again; of a hedge one of two counts.
        assert lab.devices[0].runs - hedges <= figures.verified <= lab.devices[0].runs
        lab.layers.observed.inspector._devices["device 0"].answers += WATCH
        assert not lab.layers.observed.inspector.figures()["device 0"].watched


def test_honest_devices_are_never_called_liars(bundle: Bundle, checkpoint: Path) -> None:
    lab = Lab(bundle, copies=2, verify=1.0)
    try:
        for _ in range(4):
            assert ask(lab, max_tokens=48)[0][:12] == greedy(checkpoint)
        counters = lab.layers.observed.inspector.counters
        assert counters.verified_answers > 200
        assert counters.lies == 0
        assert lab.barred == []
    finally:
        lab.close()


def test_an_honest_outlier_is_computed_again_and_taken(bundle: Bundle, checkpoint: Path) -> None:
    """As if the export's probes had been far too small."""
    lab = Lab(bundle, verify=0.0)
    inspector = lab.layers.observed.inspector
    for layer in inspector._band._high:
        inspector._band._high[layer][:] = 1e-9
    try:
        assert ask(lab)[0] == greedy(checkpoint)
        odd = inspector.counters.odd_answers
        assert odd == inspector.counters.verified_answers > 0
        assert inspector.counters.lies == 0
        ask(lab)
        assert inspector.counters.odd_answers - odd < odd  # the bands have widened
    finally:
        lab.close()


def test_only_the_station_can_say_what_is_right_and_it_may_not_know(
    bundle: Bundle, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Its own files are damaged: nobody is called a liar. What is odd is refused all the same, and a copy is asked."""
    monkeypatch.setattr(Bundle, "expert_bytes", _damaged)
    with lying(bundle, Lie("zeros")) as (lab, _):
        assert ask(lab)[0] == greedy(checkpoint)
        assert lab.layers.observed.inspector.counters.lies == 0
        assert lab.barred == []
    assert "could not be verified" in caplog.text


def _damaged(self: Bundle, expert: Any) -> bytes:
    return b"not a graph"


def test_a_request_that_ended_before_is_named_in_the_log(bundle: Bundle, caplog: pytest.LogCaptureFixture) -> None:
    draws = iter([0.999999] * 10_000)
    with (
        lying(bundle, Lie("sign", after=PROBATION + PUT_OFF + 2, most=3), draw=lambda: next(draws)) as (lab, _),
        caplog.at_level(logging.ERROR),
    ):
        assert not ask(lab, max_tokens=TOKENS)[2].suspect
        inspector = lab.layers.observed.inspector
        inspector._draw = ALWAYS
        lab.devices[0].run.lie = Lie("sign")
        ask(lab, max_tokens=24)
    assert "which may be wrong: t" in caplog.text


def test_two_requests_at_once_are_both_told(bundle: Bundle) -> None:
    async def both(lab: Lab) -> list[Any]:
        return await asyncio.gather(*(answer(lab, max_tokens=30) for _ in range(2)))

    with lying(bundle, Lie("sign", after=PROBATION + 8), draw=ALWAYS) as (lab, _):
        receipts = [receipt for _, _, receipt in asyncio.run(both(lab))]
    assert [receipt.suspect for receipt in receipts] == [True, True]


def test_scores_that_are_no_numbers_end_the_answer_with_an_error(bundle: Bundle) -> None:
    lab = Lab(bundle)
    try:
        head = lab.station.model.get_output_embeddings()
        head.register_forward_hook(lambda module, inputs, output: torch.full_like(output, torch.nan))
        for sampling in ({}, {"temperature": 1.0, "seed": 1}):
            with pytest.raises(NotFiniteError, match="not finite"):
                ask(lab, PROMPT, **sampling)
    finally:
        lab.close()


def test_what_was_not_asked_for_does_not_count(bundle: Bundle, checkpoint: Path) -> None:
    """A device that spoils a reply on the wire only: the same."""
    lab = Lab(bundle, copies=2, verify=0.05)
    lab.devices[1].spoil = lambda run, reply: _scaled(reply)
    try:
        assert ask(lab)[0] == greedy(checkpoint)
        assert lab.barred == ["device 1"]
    finally:
        lab.close()


def _scaled(reply: Any) -> Any:
    if not isinstance(reply, Result):
        return reply
    return Result(**{**{name: getattr(reply, name) for name in Result.__slots__}, "partial": reply.partial * 1.5})
