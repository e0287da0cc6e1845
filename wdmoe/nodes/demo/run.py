"""The demo: a base station with devices, an answer for each run, what it cost in quality, and its figures."""

from __future__ import annotations

import itertools
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from wdmoe.backbone.format.bundle import Bundle
from wdmoe.config import ServingRules
from wdmoe.errors import RequestError, TransportError
from wdmoe.nodes.demo.figures import Run
from wdmoe.nodes.demo.phases import Phases
from wdmoe.nodes.demo.plan import DemoSettings, RunPlan, deal_experts, device_names, placement_text, plan_runs
from wdmoe.nodes.demo.quality import Reading, read_all
from wdmoe.nodes.demo.stage import Stage
from wdmoe.nodes.demo.view import DemoView
from wdmoe.nodes.local.cluster import LAST_WORDS_S, DevicePlan, Fleet, FleetPlan, held_experts
from wdmoe.nodes.local.station_client import End, StationClient, Token

WARM_UP_TOKENS = 4  # so that no figure holds a first time, and the policy knows the devices

_CHAT, _TEXT = "/v1/chat/completions", "/v1/completions"

OpenStage = Callable[[DemoView, RunPlan], Stage]


def run_demo(
    settings: DemoSettings, bundle: Bundle, open_stage: OpenStage, phases: Phases | None = None
) -> tuple[Run, ...]:
    """Do all runs, one after the other. Blocking; call on the main thread, where a signal may end it.

    Runs over the same radio have the same base station and devices, which change their rules in between. All answers
    are as long as the first. Whatever ends this, its processes and its folder are gone then.

    Args:
        phases: told what took how long.
    Raises:
        ConfigError: the settings do not fit the model, or each other.
        ChildError: a process ended that should not.
        TransportError: the base station was lost, or nothing moved.
        RequestError: the model refuses the prompt.
    """
    with tempfile.TemporaryDirectory(prefix="wdmoe-demo-") as folder:
        demo = _Demo(settings, bundle, open_stage, phases or Phases())
        for number, (_, plans) in enumerate(itertools.groupby(demo.plans, lambda plan: plan.radio)):
            demo.show(tuple(plans), Path(folder) / str(number))
    return tuple(demo.runs)


class _Demo:
    """What one run leaves to the next."""

    def __init__(self, settings: DemoSettings, bundle: Bundle, open_stage: OpenStage, phases: Phases) -> None:
        self.plans = plan_runs(settings)
        self.runs: list[Run] = []
        self._settings, self._bundle, self._open_stage, self._phases = settings, bundle, open_stage, phases
        self._readings: dict[ServingRules, Reading] = {}
        self._way: tuple[str, Mapping[str, Any]] = _CHAT, {}

    def show(self, plans: tuple[RunPlan, ...], folder: Path) -> None:
        """Runs over one radio, with a base station and devices of their own."""
        with Fleet(_fleet_plan(self._settings, self._bundle, plans[0]), folder) as fleet:
            for plan in plans:
                view = DemoView(self._bundle.manifest.model, self._settings.prompt, plan, self._title())
                with self._open_stage(view, plan) as stage:
                    self.runs.append(self._run(plan, fleet, stage, new=plan is plans[0]))

    def _title(self) -> str:
        return f"{len(self.runs) + 1} of {len(self.plans)}"

    def _run(self, plan: RunPlan, fleet: Fleet, stage: Stage, *, new: bool) -> Run:
        if new:
            fleet.start(stage.tell)
            self._phases.end("starting base station and devices")
        try:
            return self._answer(plan, fleet, stage, new=new)
        except TransportError:
            fleet.check(LAST_WORDS_S)
            raise

    def _answer(self, plan: RunPlan, fleet: Fleet, stage: Stage, *, new: bool) -> Run:
        if new:
            self._warm_up(plan, fleet, stage)
        fleet.serve_by(plan.rules)
        experts = held_experts(fleet.client.status())
        stage.streaming(experts)
        asked_s = time.monotonic()
        tokens, end = self._stream(fleet.client, stage)
        text = "".join(token.text for token in tokens) + end.text
        stage.ended(text)
        self._phases.end(f"answer {len(self.runs) + 1}")
        return Run(
            plan=plan,
            asked_s=asked_s,
            tokens=tokens,
            text=text,
            reason=end.reason,
            receipt=end.receipt,
            experts=experts,
            reading=self._read(plan, fleet, stage),
        )

    def _warm_up(self, plan: RunPlan, fleet: Fleet, stage: Stage) -> None:
        """Answer a little, unmeasured, and find out how the model is asked: as a chat, if it knows how to."""
        stage.tell("warming up", 1.0)
        fleet.serve_by(plan.rules, rehearsal=plan.bandwidth_hz > 0)
        chat = {"messages": [{"role": "user", "content": self._settings.prompt}], "temperature": 0}
        text = {"prompt": self._settings.prompt, "temperature": 0}
        try:
            self._way = _CHAT, chat
            _exhaust(fleet.client, *self._way)
        except RequestError:  # no chat template; if it is something else, it is met again here
            self._way = _TEXT, text
            _exhaust(fleet.client, *self._way)
        self._phases.end("warming up")

    def _stream(self, client: StationClient, stage: Stage) -> tuple[tuple[Token, ...], End]:
        """An answer; one that is as long as the first, if there was one."""
        path, body = self._way
        length = len(self.runs[0].tokens) if self.runs else None
        tokens: list[Token] = []
        more = {"max_tokens": length or self._settings.tokens, "ignore_eos": length is not None}
        for event in client.stream(path, {**body, **more}):
            if isinstance(event, End):
                return tuple(tokens), event
            tokens.append(event)
            stage.token(event)
            self._phases.token()
        raise TransportError("the answer has no end")

    def _read(self, plan: RunPlan, fleet: Fleet, stage: Stage) -> Reading | None:
        """What the run's decisions cost in quality; None where links have rates of their own, which would all wait."""
        if not plan.bandwidth_hz or not self._settings.compare:
            return None
        if plan.decides_as not in self._readings:
            fleet.serve_by(plan.rules, rehearsal=True)
            self._readings[plan.decides_as] = read_all(fleet.read, stage.reading)
            self._phases.end("reading held-out text")
        return self._readings[plan.decides_as]


def _fleet_plan(settings: DemoSettings, bundle: Bundle, plan: RunPlan) -> FleetPlan:
    dealt = deal_experts(bundle.manifest.experts, device_names(settings.devices))
    return FleetPlan(
        bundle=bundle.root,
        placement=placement_text(dealt),
        rules=plan.rules,
        bandwidth_hz=plan.bandwidth_hz,
        cache=settings.cache,
        devices=tuple(
            DevicePlan(name=name, link=link, memory_bytes=sum(file.size for file in files))
            for (name, files), link in zip(dealt.items(), plan.links, strict=True)
        ),
    )


def _exhaust(client: StationClient, path: str, body: Mapping[str, Any]) -> None:
    for _ in client.stream(path, {**body, "max_tokens": WARM_UP_TOKENS, "ignore_eos": True}):
        pass
