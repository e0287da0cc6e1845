"""The demo: for each run a fresh base station with fresh devices, one answer, and its figures."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from wdmoe.backbone.format.bundle import Bundle
from wdmoe.errors import RequestError, TransportError
from wdmoe.nodes.demo.figures import Run
from wdmoe.nodes.demo.plan import DemoSettings, RunPlan, deal_experts, device_names, placement_text, plan_runs
from wdmoe.nodes.demo.stage import Stage
from wdmoe.nodes.demo.view import DemoView
from wdmoe.nodes.local.cluster import LAST_WORDS_S, DevicePlan, Fleet, FleetPlan, held_experts
from wdmoe.nodes.local.station_client import End, StationClient, Token

WARM_UP_TOKENS = 4  # so that no figure holds a first time, and the policy knows the links

_CHAT, _TEXT = "/v1/chat/completions", "/v1/completions"

OpenStage = Callable[[DemoView, RunPlan], Stage]


def run_demo(settings: DemoSettings, bundle: Bundle, open_stage: OpenStage) -> tuple[Run, ...]:
    """Do all runs, one after the other. Blocking; call on the main thread, where a signal may end it.

    All answers are as long as the first. Whatever ends this, its processes and its folder are gone then.

    Raises:
        ConfigError: the settings do not fit the model, or each other.
        ChildError: a process ended that should not.
        TransportError: the base station was lost, or nothing moved.
        RequestError: the model refuses the prompt.
    """
    plans = plan_runs(settings)
    runs: list[Run] = []
    with tempfile.TemporaryDirectory(prefix="wdmoe-demo-") as folder:
        for number, plan in enumerate(plans, 1):
            fleet_plan = _fleet_plan(settings, bundle, plan)
            title = f"{number} of {len(plans)}"
            view = DemoView(bundle.manifest.model, settings.prompt, plan, title)
            length = len(runs[0].tokens) if runs else None
            with open_stage(view, plan) as stage, Fleet(fleet_plan, Path(folder) / str(number)) as fleet:
                fleet.start(stage.tell)
                runs.append(_answer(settings, plan, fleet, stage, length))
    return tuple(runs)


def _fleet_plan(settings: DemoSettings, bundle: Bundle, plan: RunPlan) -> FleetPlan:
    dealt = deal_experts(bundle.manifest.experts, device_names(settings.devices))
    return FleetPlan(
        bundle=bundle.root,
        placement=placement_text(dealt),
        policy=plan.policy,
        rank="auto" if plan.policy == "topk" else settings.rank,
        whole_layers=0 if plan.policy == "topk" else settings.whole_layers,
        budget_s=settings.budget_s if plan.policy == "budget" else 0.0,
        budget_per_token_s=settings.budget_per_token_s if plan.policy == "budget" else 0.0,
        bandwidth_hz=plan.bandwidth_hz,
        allocation=plan.allocation,
        cache=settings.cache,
        devices=tuple(
            DevicePlan(name=name, link=link, memory_bytes=sum(file.size for file in files))
            for (name, files), link in zip(dealt.items(), plan.links, strict=True)
        ),
    )


def _answer(settings: DemoSettings, plan: RunPlan, fleet: Fleet, stage: Stage, length: int | None) -> Run:
    """One answer, of exactly `length` tokens if that is given."""
    try:
        stage.tell("warming up", 1.0)
        path, body = _warm_up(fleet.client, settings.prompt)
        experts = held_experts(fleet.client.status())
        stage.streaming(experts)
        body |= {"max_tokens": length or settings.tokens, "ignore_eos": length is not None}
        asked_s = time.monotonic()
        tokens, end = _stream(fleet.client.stream(path, body), stage)
    except TransportError:
        fleet.check(LAST_WORDS_S)
        raise
    text = "".join(token.text for token in tokens) + end.text
    stage.ended(text)
    return Run(
        plan=plan,
        asked_s=asked_s,
        tokens=tokens,
        text=text,
        reason=end.reason,
        receipt=end.receipt,
        experts=experts,
    )


def _warm_up(client: StationClient, prompt: str) -> tuple[str, dict[str, Any]]:
    """Answer a little, unmeasured. Returns how the model is asked: as a chat, if it knows how to."""
    chat = {"messages": [{"role": "user", "content": prompt}], "temperature": 0}
    text = {"prompt": prompt, "temperature": 0}
    try:
        _exhaust(client, _CHAT, chat)
    except RequestError:  # no chat template; if it is something else, it is met again here
        _exhaust(client, _TEXT, text)
        return _TEXT, text
    return _CHAT, chat


def _exhaust(client: StationClient, path: str, body: Mapping[str, Any]) -> None:
    for _ in client.stream(path, {**body, "max_tokens": WARM_UP_TOKENS, "ignore_eos": True}):
        pass


def _stream(events: Iterator[Token | End], stage: Stage) -> tuple[tuple[Token, ...], End]:
    tokens: list[Token] = []
    for event in events:
        if isinstance(event, End):
            return tuple(tokens), event
        tokens.append(event)
        stage.token(event)
    raise TransportError("the answer has no end")
