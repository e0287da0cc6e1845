"""What a run came to: figures from the tokens as they arrived and the receipt that came with the answer."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from wdmoe.nodes.demo.phases import Phases
from wdmoe.nodes.demo.plan import RunPlan, device_names
from wdmoe.nodes.demo.quality import Reading, perplexity, tokens
from wdmoe.nodes.local.station_client import Token
from wdmoe.receipt import Receipt, StageSeconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A finished run."""

    plan: RunPlan
    asked_s: float  # monotonic, when the request was sent
    tokens: tuple[Token, ...]
    text: str
    reason: str  # why the answer ended: "stop" or "length"
    receipt: Receipt
    experts: Mapping[str, int]  # device -> experts it held
    reading: Reading | None = None  # of held-out text under the run's rules

    @property
    def token_ids(self) -> tuple[int, ...]:
        """The answer."""
        return tuple(token.token_id for token in self.tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """One column of the table. Times are seconds as the client saw them, stages as the base station did."""

    tokens: int  # of the answer
    prompt_tokens: int
    tokens_per_s: float | None  # after the first token; None for a single one
    first_token_s: float
    answer_s: float  # from sending the request to the last token
    token_latency_p50_s: float | None
    token_latency_p95_s: float | None
    bytes_down_per_token: float  # of every token computed, prompt included, over all layers and devices
    bytes_up_per_token: float
    dropped_weight: float
    lost_weight: float
    perplexity: float | None  # of held-out text, each token of it decided on alone; None: it was not read
    perplexity_tokens: int
    elapsed_s: float  # at the base station: the sum of the stages
    stages_s: StageSeconds


def figures(run: Run) -> Figures:
    """The figures of a run with at least one token."""
    receipt, times_s = run.receipt, [token.at_s for token in run.tokens]
    gaps_s = sorted(after - before for before, after in itertools.pairwise(times_s))
    computed = receipt.prompt_tokens + receipt.completion_tokens - 1  # the last token is told, not fed back
    return Figures(
        tokens=len(run.tokens),
        prompt_tokens=receipt.prompt_tokens,
        tokens_per_s=len(gaps_s) / sum(gaps_s) if gaps_s and sum(gaps_s) > 0 else None,
        first_token_s=times_s[0] - run.asked_s,
        answer_s=times_s[-1] - run.asked_s,
        token_latency_p50_s=percentile(gaps_s, 50),
        token_latency_p95_s=percentile(gaps_s, 95),
        bytes_down_per_token=receipt.bytes_down / computed,
        bytes_up_per_token=receipt.bytes_up / computed,
        dropped_weight=receipt.dropped_weight,
        lost_weight=receipt.lost_weight,
        perplexity=perplexity(run.reading) if run.reading else None,
        perplexity_tokens=tokens(run.reading) if run.reading else 0,
        elapsed_s=receipt.elapsed_s,
        stages_s=receipt.stages,
    )


def percentile(ordered: Sequence[float], percent: float) -> float | None:
    """The smallest value that at least `percent` % of the values do not exceed; None of nothing."""
    if not ordered:
        return None
    return ordered[max(math.ceil(len(ordered) * percent / 100), 1) - 1]


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """How alike two answers to the same prompt are: a hint on quality, no measure of it."""

    runs: tuple[str, str]
    equal: int  # places where both have the same token
    same_start: int  # tokens before the first difference
    of: int


def agreement(one: Run, other: Run) -> Agreement:
    """Compare two answers token by token."""
    pairs = list(zip(one.token_ids, other.token_ids, strict=False))
    same = [a == b for a, b in pairs]
    return Agreement(
        runs=(one.plan.name, other.plan.name),
        equal=sum(same),
        same_start=same.index(False) if False in same else len(same),
        of=max(len(one.tokens), len(other.tokens)),
    )


def shares_of_work(run: Run) -> dict[str, int]:
    """Device -> (token, layer) pairs it worked on."""
    work: Counter[str] = Counter()
    for token in run.tokens:
        work.update(dict(zip(token.devices, token.layers, strict=True)))
    return dict(work)


def as_document(
    model: str, prompt: str, seed: int, runs: Sequence[Run], phases: Phases | None = None
) -> dict[str, Any]:
    """Everything, in plain types."""
    return {
        "format": 1,
        "model": model,
        "prompt": prompt,
        "seed": seed,
        "runs": [_run(run) for run in runs],
        "agreement": [asdict(agreement(runs[0], other)) for other in runs[1:]],
        "phases_s": dict(phases.spent_s) if phases else {},
        "first_token_in_sight_s": phases.first_token_s if phases else None,
        "total_s": phases.total_s if phases else None,
    }


def _run(run: Run) -> dict[str, Any]:
    found, work = figures(run), shares_of_work(run)
    return {
        "name": run.plan.name,
        "policy": run.plan.policy,
        "links": "equal" if run.plan.equal else "unequal",
        "bandwidth_hz": run.plan.bandwidth_hz,
        "allocation": run.plan.allocation if run.plan.bandwidth_hz else None,
        "rules": asdict(run.plan.rules),
        "figures": {field.name: getattr(found, field.name) for field in fields(found)} | {"stages_s": _stages(found)},
        "devices": [
            {"name": name, **asdict(link), "experts": run.experts.get(name, 0), "layers_served": work.get(name, 0)}
            for name, link in zip(device_names(len(run.plan.links)), run.plan.links, strict=True)
        ],
        "text": run.text,
        "token_ids": list(run.token_ids),
        "finish_reason": run.reason,
        "receipt": asdict(run.receipt),
        "reading": [asdict(window) for window in run.reading or ()],
    }


def _stages(found: Figures) -> dict[str, float]:
    return asdict(found.stages_s)
