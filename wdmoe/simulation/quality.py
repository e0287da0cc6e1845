"""What a scenario's decisions cost the model: its likelihoods while it really runs as planned.

Text window i, and question i, meet draw i of the scenario: the same devices and fading as in the simulator's draw i,
so quality is paired with latency, and all variants with each other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from wdmoe.arrays import FloatArray
from wdmoe.backbone.evaluation.analog_downlink import Broadcast, Codes
from wdmoe.backbone.evaluation.multiple_choice import Question, choice_nats, score
from wdmoe.backbone.evaluation.simulated_experts import Order, PlannedExperts
from wdmoe.backbone.perplexity import window_nats
from wdmoe.errors import ConfigError
from wdmoe.results.gate_trace import GateTrace
from wdmoe.simulation.channel_draw import Draw, make_draw
from wdmoe.simulation.placement import Holders, holders_of
from wdmoe.simulation.replay import Replay
from wdmoe.simulation.scenario import Scenario, Variant
from wdmoe.simulation.scenario_file import find_trace
from wdmoe.simulation.statistics import mean_and_interval
from wdmoe.solver.layer.plan import LayerPlan, carried_out, plan_layer
from wdmoe.wireless.analog_code import Spectrum

Progress = Callable[[int, int], None]
_NOISE = 1  # beside a draw's number: the seed of what devices hear of analog broadcasts


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Measured:
    """Everything that was measured; the first variant is the baseline."""

    scenario: Scenario
    variants: tuple[Variant, ...]
    nats: FloatArray  # (variants, windows) mean negative log-likelihood of a token
    latency_s: FloatArray  # (variants, windows) of the plans that these windows ran with, through all layers
    dropped: FloatArray  # (variants, windows) share of the gate weight
    distortion: FloatArray  # (variants, windows) of hidden vectors on their way down: square error over squares
    right: FloatArray  # (variants, questions) 0 or 1
    right_normalised: FloatArray  # (variants, questions) 0 or 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Quality:
    """One variant. Intervals are at 95 %, by Student's t over windows or questions; NaN with fewer than two.

    `ratio` and the `_change`s are against the baseline on the same windows and questions, so their intervals are much
    narrower than those of the values. Accuracies and `dropped_weight` are shares, 0 to 1; `_ci` is a half width.
    """

    variant: str
    perplexity: float
    perplexity_low: float
    perplexity_high: float
    ratio: float
    ratio_low: float
    ratio_high: float
    accuracy: float
    accuracy_ci: float
    accuracy_change: float
    accuracy_change_ci: float
    normalised: float  # accuracy by likelihood for each byte
    normalised_ci: float
    normalised_change: float
    normalised_change_ci: float
    dropped_weight: float  # on the text windows
    distortion: float  # of hidden vectors on their way down, mean over layers and text windows
    text_latency_s: float  # mean over the text windows of what their own plans take


class RadioPlans:
    """Decides as the simulator does, for one variant on one draw at a time; a `Decide`."""

    def __init__(self, scenario: Scenario, variant: Variant, replay: Replay, codes: Codes) -> None:
        self._scenario, self._variant, self._replay, self._codes = scenario, variant, replay, codes
        self._draw: Draw | None = None
        self._held: Holders
        self._real: npt.NDArray[np.bool_] | None = None
        self.latency_s = self.dropped = 0.0

    def meet(self, draw: Draw, number: int) -> None:
        """Begin a pass on this draw, which has that number."""
        seed = np.random.SeedSequence(self._scenario.seed, spawn_key=(number, _NOISE))
        self._rng = np.random.default_rng(seed)
        if draw is not self._draw:  # a window and a question share it
            self._held = holders_of(self._variant, self._scenario.devices, draw.mean, self._replay.frequency)
        self._draw = draw
        self._real = None
        self.latency_s, self.dropped = len(self._replay.experts) * self._scenario.model.station_s, 0.0

    def only(self, real: torch.Tensor) -> None:
        """Which tokens of the pass are real, bool, flattened: no other is sent anywhere."""
        self._real = real.flatten().numpy()

    def __call__(self, layer: int, experts: npt.NDArray[np.int32], ranks: FloatArray) -> Order:
        """As `Decide`. As many tokens are decided at a time as the scenario's pass has."""
        rows = np.arange(len(experts)) if self._real is None else np.flatnonzero(self._real)
        at_once = self._scenario.model.tokens
        shape, parts = experts.shape, -(-len(rows) // at_once)
        found = [np.full(shape, fill, np.int32) for fill in (-1, -1, 0, 0)]
        sums, analog = self._variant.policy.levers.partial_sums, []
        for part in range(parts):
            chosen = rows[part * at_once : (part + 1) * at_once]
            plan = self._part(layer, part, experts[chosen], ranks[chosen], parts)
            analog += self._broadcast(layer, plan, chosen)
            order = Order.of(plan, sums)
            for whole, piece in zip(found, (order.experts, order.device, order.down_bits, order.up_bits), strict=True):
                whole[chosen] = piece
        return Order(found[0], found[1], found[2], found[3], sums, tuple(analog))

    def _part(self, layer: int, part: int, experts: npt.NDArray[np.int32], ranks: FloatArray, parts: int) -> LayerPlan:
        if self._draw is None:
            raise RuntimeError("no draw was met")
        airs = self._draw.airs[part % len(self._draw.airs)]
        alike = None if self._replay.similarity is None else self._replay.similarity[layer]
        policy = self._variant.policy_of(layer)
        known = airs[self._variant.measured(layer)]
        plan = plan_layer(experts, ranks, self._held[layer], known, policy, alike)
        plan = carried_out(plan, known, airs[layer], policy.levers)
        self.latency_s += plan.time.latency_s
        self.dropped += plan.dropped_weight / len(self._replay.experts) / parts
        return plan

    def _broadcast(self, layer: int, plan: LayerPlan, tokens: npt.NDArray[np.int64]) -> list[Broadcast]:
        """What goes out without bits, if anything does; `tokens` are those of the plan."""
        lever, cast = self._variant.policy.levers.analog, plan.time.analog
        if lever is None or cast is None or not cast.repeats.any():
            return []
        sent = cast.repeats > 0
        code = self._codes.of(layer, lever, max(lever.floor, cast.weakest))
        return [Broadcast(tokens[sent], cast.snr, cast.repeats[sent], code, lever.share, self._rng)]


def measure(
    scenario: Scenario,
    variants: Sequence[Variant],
    model: Any,
    tokenizer: Any,
    windows: torch.Tensor,
    questions: Sequence[Question],
    progress: Progress = lambda done, total: None,
    spectra: Sequence[Spectrum] = (),
) -> Measured:
    """Let the model read windows and answer questions under each variant.

    Args:
        variants: of the scenario; the first is the baseline.
        model: a transformers MoE model with all its weights.
        tokenizer: its tokenizer; used for questions only.
        windows: (windows, length) int64 token ids; none is fine.
        questions: none is fine.
        progress: told windows and questions done, and in all.
        spectra: of the model's hidden vectors, from `fit_spectra`; for variants with a fitted analog downlink.
    Raises:
        BundleError: the model has no experts, or its router gives no scores.
        ConfigError: the scenario's trace is of another model, its devices cannot hold it, or spectra are missing.
    """
    replay = Replay.of(GateTrace.load(find_trace(scenario.model.trace)))
    codes = Codes(int(model.config.get_text_config().hidden_size), spectra)
    plans = [RadioPlans(scenario, variant, replay, codes) for variant in variants]
    read = np.zeros((4, len(variants), len(windows)))
    answered = np.zeros((2, len(variants), len(questions)))
    total = len(variants) * (len(windows) + len(questions))
    with PlannedExperts(model, plans[0]) as planned:
        _check_fit(scenario, replay, planned)
        for number in range(max(len(windows), len(questions))):
            draw = make_draw(scenario, number, *replay.experts.shape[:2])
            for place, plan in enumerate(plans):
                planned.decide, planned.rank = plan, variants[place].rank
                if number < len(windows):
                    plan.meet(draw, number)
                    planned.distortions.clear()
                    nats = float(window_nats(model, windows[number : number + 1]).double().mean())
                    lost = float(np.mean(planned.distortions))
                    read[:, place, number] = nats, plan.latency_s, plan.dropped, lost
                if number < len(questions):
                    plan.meet(draw, number)
                    marks = score(questions[number], choice_nats(model, tokenizer, questions[number], plan.only))
                    answered[:, place, number] = marks.right, marks.right_normalised
                progress(_done(number, place + 1, len(variants), len(windows), len(questions)), total)
    return Measured(
        scenario=scenario,
        variants=tuple(variants),
        nats=read[0],
        latency_s=read[1],
        dropped=read[2],
        distortion=read[3],
        right=answered[0],
        right_normalised=answered[1],
    )


def qualities(measured: Measured) -> list[Quality]:
    """One for each variant, in order."""
    return [_quality(measured, index) for index in range(len(measured.variants))]


def with_baseline(scenario: Scenario, names: Sequence[str]) -> tuple[Variant, ...]:
    """The named variants after the scenario's first, which is the baseline; all where no name is given.

    Raises:
        ConfigError: there is none of that name.
    """
    known = {variant.name: variant for variant in scenario.variants}
    for name in names:
        if name not in known:
            raise ConfigError(f"scenario {scenario.name} has no variant {name!r}; it has {', '.join(map(repr, known))}")
    if not names:
        return scenario.variants
    return scenario.variants[:1] + tuple(each for each in scenario.variants[1:] if each.name in names)


def _quality(measured: Measured, index: int) -> Quality:
    nats, half = mean_and_interval(measured.nats[index])
    more, more_half = mean_and_interval(measured.nats[index] - measured.nats[0])
    plain, normalised = measured.right, measured.right_normalised
    accuracy, accuracy_ci = mean_and_interval(plain[index])
    change, change_ci = mean_and_interval(plain[index] - plain[0])
    by_byte, by_byte_ci = mean_and_interval(normalised[index])
    by_byte_change, by_byte_change_ci = mean_and_interval(normalised[index] - normalised[0])
    any_window = measured.nats.shape[1] > 0
    return Quality(
        variant=measured.variants[index].name,
        perplexity=float(np.exp(nats)),
        perplexity_low=float(np.exp(nats - half)),
        perplexity_high=float(np.exp(nats + half)),
        ratio=float(np.exp(more)),
        ratio_low=float(np.exp(more - more_half)),
        ratio_high=float(np.exp(more + more_half)),
        accuracy=accuracy,
        accuracy_ci=accuracy_ci,
        accuracy_change=change,
        accuracy_change_ci=change_ci,
        normalised=by_byte,
        normalised_ci=by_byte_ci,
        normalised_change=by_byte_change,
        normalised_change_ci=by_byte_change_ci,
        dropped_weight=float(measured.dropped[index].mean()) if any_window else float("nan"),
        distortion=float(measured.distortion[index].mean()) if any_window else float("nan"),
        text_latency_s=float(measured.latency_s[index].mean()) if any_window else float("nan"),
    )


def _check_fit(scenario: Scenario, replay: Replay, planned: PlannedExperts) -> None:
    traced, own = replay.frequency.shape, (planned.layers, planned.expert_count)
    if traced != own:
        raise ConfigError(
            f"[model] trace {scenario.model.trace} has {traced[0]} layers of {traced[1]} experts, the model {own[0]} "
            f"of {own[1]}: record one of this model with wdmoe-node trace"
        )


def _done(number: int, variants_done: int, variants: int, windows: int, questions: int) -> int:
    """Windows and questions that were run, when so many variants met draw `number`."""
    before = min(number, windows) + min(number, questions)
    return before * variants + variants_done * ((number < windows) + (number < questions))
