"""Policies on the live node: real model, codec and experts, the decisions taken from what the devices showed."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from tests.lab.engine_lab import Lab
from tests.lab.families import save_tiny
from wdmoe.backbone.export.export import ExportSettings, export_bundle
from wdmoe.backbone.format.bundle import Bundle
from wdmoe.cli.main import cli
from wdmoe.config import POLICIES, RANKS, StationSettings
from wdmoe.errors import BundleError, ConfigError
from wdmoe.layer_call import Caller, Callers, Demand, LayerCall
from wdmoe.moe.health import DeviceHealth
from wdmoe.moe.select import Costs, choose
from wdmoe.nodes.base_station.layer_rules import layer_rules
from wdmoe.receipt import Ledger, Receipt
from wdmoe.records import GenerationRequest, Sampling, TextDelta
from wdmoe.solver import select_experts, shed_bottleneck
from wdmoe.solver.bandwidth import Links, with_compute
from wdmoe.solver.layer.plan import Policy, plan_layer
from wdmoe.solver.layer.quantization import vector_bits
from wdmoe.solver.layer.radio_state import RadioState
from wdmoe.solver.ranking import rank_weights
from wdmoe.transport.codec.messages import Message, Run
from wdmoe.transport.routing import DeviceRoute

PROMPT = tuple(range(40, 60))
HUGE_S = 1e6


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("granite")
    export_bundle(save_tiny("granitemoeshared", folder / "checkpoint"), folder / "bundle", ExportSettings())
    return Bundle.open(folder / "bundle")


@contextmanager
def opened(bundle: Bundle, **rules: Any) -> Iterator[Lab]:
    lab = Lab(bundle, rules=rules)
    try:
        yield lab
    finally:
        lab.close()


def ask(lab: Lab) -> tuple[list[int], Receipt]:
    async def answer() -> tuple[list[int], Receipt]:
        sampling = Sampling(max_tokens=8, ignore_eos=True)
        ids, receipt = [], None
        async for event in lab.engine.stream(GenerationRequest(request_id="t", prompt=PROMPT, sampling=sampling)):
            if isinstance(event, TextDelta):
                ids += [event.token_id] if event.token_id >= 0 else []
            else:
                receipt = event.receipt
        assert receipt is not None
        return ids, receipt

    return asyncio.run(answer())


class Watched:
    """What every layer demanded, and what the devices were asked."""

    def __init__(self, lab: Lab) -> None:
        self.calls: list[LayerCall] = []
        self.wanted: list[float] = []  # sum over tokens of the share of the gate weight that was not asked for
        self.runs: list[Run] = []
        self.layers: list[list[Run]] = []  # the runs of each layer of each pass
        self._lab, self._run = lab, lab.layers.run
        lab.layers.run = self._layer  # type: ignore[method-assign]
        for device in lab.devices:
            device.spoil = self._answer

    def _answer(self, run: Run, reply: Message) -> Message:
        self.runs.append(run)
        return reply

    def _layer(self, call: LayerCall) -> Any:
        tokens, demand = call.tokens, call.demand
        before = len(self.runs)
        out = self._run(call)
        asked = np.zeros(len(tokens))
        self.layers.append(self.runs[before:])
        self.calls.append(call)
        for row, expert in pairs(tokens, self.layers[-1]):
            asked[row] += demand.weights[row][demand.experts[row] == expert][0]
        self.wanted.append(float((1 - asked / demand.weights.sum(axis=1)).sum()))
        return out


def pairs(tokens: Any, runs: list[Run]) -> Iterator[tuple[int, int]]:
    """(row of `tokens`, expert) that was asked."""
    for run in runs:
        rows = [int(np.flatnonzero((tokens == run.tokens[row]).all(axis=1))[0]) for row in run.rows]
        yield from zip(rows, np.repeat(run.experts, run.counts).tolist(), strict=True)


@pytest.mark.parametrize("policy", POLICIES)
def test_what_is_not_asked_for_is_what_the_receipt_says(bundle: Bundle, policy: str) -> None:
    with opened(bundle, policy=policy, budget_s=1e-4 if policy == "budget" else 0.0) as lab:
        ask(lab)  # so that the devices' pace is known
        watched = Watched(lab)
        _, receipt = ask(lab)
    layers = lab.station.manifest.moe_layers
    dropped = sum(watched.wanted) / (len(layers) * (len(PROMPT) + 7))
    assert receipt.dropped_weight == pytest.approx(dropped, abs=1e-5)
    assert receipt.lost_weight == 0
    assert not receipt.degraded
    assert receipt.policy == policy
    if policy == "topk":
        assert receipt.dropped_weight == 0
    if policy == "budget":  # nothing fits, so each token keeps one expert
        assert all(len(run.rows) == len(run.tokens) for run in watched.runs)
        assert dropped > 0.1


def test_a_budget_that_is_never_short_changes_nothing(bundle: Bundle) -> None:
    with opened(bundle) as lab:
        plain, _ = ask(lab)
    with opened(bundle, policy="budget", budget_s=HUGE_S) as lab:
        for _ in range(2):
            ids, receipt = ask(lab)
            assert (ids, receipt.dropped_weight) == (plain, 0.0)


@pytest.mark.parametrize("rank", RANKS)
def test_a_bound_on_what_is_dropped_holds_over_a_request(bundle: Bundle, rank: str) -> None:
    """In each layer of a prompt; in an answer over all layers, since a single token has no light experts."""
    with opened(bundle, policy="budget", max_dropped=0.1, rank=rank) as lab:
        ask(lab)
        watched = Watched(lab)
        _, receipt = ask(lab)
        layers = len(lab.station.manifest.moe_layers)
    asked, dropped = np.zeros(2), np.zeros(2)  # in the prompt, in the answer
    for call, chosen in zip(watched.calls, watched.layers, strict=True):
        energy = rank_weights(call.demand.gate, call.demand.experts, 1.0, "energy")
        ranks = energy if rank == "energy" else call.demand.weights.astype(np.float64)
        kept = sum(
            float(ranks[row][call.demand.experts[row] == expert][0]) for row, expert in pairs(call.tokens, chosen)
        )
        answer = int(len(call.tokens) == 1)
        asked[answer] += ranks.sum()
        dropped[answer] += ranks.sum() - kept
        assert answer or ranks.sum() - kept <= 0.1 * ranks.sum() * (1 + 1e-6)
    if rank == "probability":  # where every token is worth as much
        assert dropped.sum() <= 0.1 * asked.sum() * (1 + 1e-6)
    assert (dropped > 0).all()
    assert sum(watched.wanted[2 * layers :]) > 0  # of the answer, whose tokens come one by one
    assert receipt.dropped_weight > 0


def test_a_rehearsal_decides_as_in_an_answer(bundle: Bundle) -> None:
    with opened(bundle, policy="budget", max_dropped=0.1) as lab:
        ask(lab)
        lab.layers.observed.health.answered = lambda *seen: None  # type: ignore[assignment]  # what was measured stays
        lab.layers.rules = replace(lab.layers.rules, rehearsal=True)
        together, alone = Ledger(), Ledger()
        tokens = np.random.default_rng(0).normal(size=(12, lab.station.manifest.hidden)).astype(np.float32)
        gate = np.random.default_rng(1).normal(size=(12, 8)).astype(np.float32)
        experts = np.argsort(-gate, axis=1)[:, :2].astype(np.int32)
        layer = lab.station.manifest.moe_layers[0]
        demand = Demand(experts, np.full((12, 2), 0.5, np.float32), gate)
        whole = LayerCall(layer, tokens, demand, Callers([Caller(together)], [12]))
        one = Callers([Caller(alone)], [1])
        parts = [replace(whole.of(np.array([row])), callers=one) for row in range(12)]
        price = copy.deepcopy(lab.layers._price)
        chosen = lab.layers._choose(lab.routing, whole).experts
        lab.layers._price = price
        by_one = [lab.layers._choose(lab.routing, part).experts for part in parts]
    assert (chosen < 0).any()
    np.testing.assert_array_equal(chosen, np.concatenate(by_one))
    assert together.unspent == alone.unspent


def test_a_prompt_may_have_more_time_than_a_token(bundle: Bundle) -> None:
    with opened(bundle, policy="budget", budget_s=1e-9, budget_per_token_s=HUGE_S) as lab:
        ask(lab)
        watched = Watched(lab)
        ask(lab)
    layers = len(lab.station.manifest.moe_layers)
    chunks = -(-len(PROMPT) // lab.prefill_chunk)
    assert max(map(abs, watched.wanted[: layers * chunks])) < 1e-5
    assert min(watched.wanted[layers * chunks :]) > 0.1


def costs(token_s: list[float], device_of: list[int]) -> Costs:
    none = np.zeros(len(token_s))
    links = Links(downlink_snr_hz=none, uplink_snr_hz=none, downlink_bits=none, uplink_bits=none)
    pace = np.array(token_s)
    return Costs(np.array(device_of, np.int32), pace, with_compute(links, pace))


def decide(
    policy: str, experts: list[list[int]], weights: list[list[float]], known: Costs | None, **changes: Any
) -> Any:
    demand = Demand(np.array(experts, np.int32), np.array(weights, np.float32), None)
    rules = {"budget_s": 0.0, "available": None, "renormalise": False, "gate_temperature": 1.0, "rank": "probability"}
    return choose(demand, policy=policy, costs=known, **{**rules, **changes})


def test_budget_counts_what_each_device_gets() -> None:
    known = costs([1e-3, 1e-3], [0, 0, 1, 1])
    experts, weights = [[0, 2], [1, 3]], [[0.6, 0.4], [0.7, 0.3]]
    fits = decide("budget", experts, weights, known, budget_s=2.1e-3)
    assert fits.experts.tolist() == experts
    assert fits.dropped is None
    short = decide("budget", experts, weights, known, budget_s=1.1e-3)  # one for each device
    assert np.bincount(short.experts[short.experts >= 0] // 2).tolist() == [1, 1]
    assert short.dropped == pytest.approx([0.6, 0.3])  # the first token leaves device 0 to the second


def test_bottleneck_sheds_light_work_of_the_slow_device() -> None:
    known = costs([1e-3, 9e-3], [0, 1, 1])
    chosen = decide("bottleneck", [[0, 1], [0, 2]], [[0.8, 0.2], [0.5, 0.5]], known)
    assert chosen.experts.tolist() == [[0, -1], [0, 2]]
    assert chosen.weights == pytest.approx(np.array([[0.8, 0], [0.5, 0.5]]))
    grown = decide("bottleneck", [[0, 1], [0, 2]], [[0.8, 0.2], [0.5, 0.5]], known, renormalise=True)
    assert grown.weights == pytest.approx(np.array([[1.0, 0], [0.5, 0.5]]))
    assert grown.dropped == pytest.approx([0.2, 0])


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("policy", POLICIES)
def test_the_live_node_keeps_what_the_simulators_plan_keeps(policy: str, rank: str, rng: np.random.Generator) -> None:
    tokens, count, top_k, temperature = 24, 8, 3, 0.3
    snr_hz = 1e6 * 10 ** rng.uniform(0, 3, (2, count))
    air = RadioState(
        downlink_snr_hz=snr_hz[0],
        uplink_snr_hz=snr_hz[1],
        total_hz=20e6,
        hidden=64,
        token_s=rng.uniform(1e-6, 1e-4, count),
        expert_s=np.zeros(count),
    )
    scores = (rng.normal(1.0, 1.0, (tokens, count)) * rng.uniform(0.3, 3.0, (tokens, 1))).astype(np.float32)
    experts = np.argsort(-scores, axis=1)[:, :top_k].astype(np.int32)
    bits = np.full(count, 16.0)
    links = air.links(vector_bits(air.hidden, bits), compute_s=air.token_s)
    known = Costs(np.arange(count, dtype=np.int32), air.assignment_s(bits), links, 20e6)
    near_uniform = np.full((tokens, top_k), 1 / top_k, np.float32)  # as a split model mixes: nothing to rank by
    holders = np.eye(count, dtype=bool)
    ranks = {each: rank_weights(scores, experts, temperature, each) for each in RANKS}
    budget_s = plan_layer(experts, ranks[rank], holders, air, Policy()).time.latency_s / 2
    plans = {
        each: plan_layer(experts, weights, holders, air, Policy(name=policy, budget_s=budget_s))
        for each, weights in ranks.items()
    }
    chosen = choose(
        Demand(experts, near_uniform, scores),
        policy=policy,
        costs=known,
        budget_s=budget_s,
        available=None,
        renormalise=False,
        gate_temperature=temperature,
        rank=rank,
    )
    np.testing.assert_array_equal(chosen.experts, plans[rank].experts)
    if policy != "topk":
        assert 0 < (chosen.experts < 0).sum() < chosen.experts.size
        assert (plans["energy"].experts != plans["probability"].experts).any()


def test_energy_without_scores_is_refused() -> None:
    known = costs([1e-3, 1e-3], [0, 1])
    with pytest.raises(BundleError, match="does not give its scores"):
        decide("budget", [[0, 1]], [[0.9, 0.1]], known, budget_s=1e-3, rank="energy")
    assert decide("topk", [[0, 1]], [[0.9, 0.1]], known, rank="energy").dropped is None


def test_whole_layers_keep_all(bundle: Bundle) -> None:
    layers = bundle.manifest.moe_layers
    whole = frozenset(layers[:1])
    with opened(bundle, policy="budget", budget_s=1e-9, rank="energy", whole_layers=whole) as lab:
        ask(lab)
        watched = Watched(lab)
        ask(lab)
    of_layer = np.array(watched.wanted).reshape(-1, len(layers))
    assert np.abs(of_layer[:, 0]).max() < 1e-5
    assert of_layer[:, 1:].min() > 0.1


@pytest.mark.parametrize("policy", POLICIES)
def test_nothing_is_dropped_before_anything_is_known(policy: str) -> None:
    chosen = decide(policy, [[0, 1]], [[0.9, 0.1]], None, budget_s=1e-9)
    assert chosen.experts.tolist() == [[0, 1]]
    assert chosen.dropped is None


def test_a_device_is_known_by_orders_of_that_size_or_by_the_others() -> None:
    health = DeviceHealth()
    devices = tuple(DeviceRoute(name, name, name.encode()) for name in "abc")
    assert health.token_s(devices, [1, 1, 1]) is None
    assert health.seen_s(b"a") is None
    health.answered(b"a", 4e-3, 4, 1e-3)
    health.answered(b"c", 3e-3, 1, 9.0)  # a device may say anything of its link
    assert health.token_s(devices, [4, 4, 4]) == pytest.approx([1e-3, 2e-3, 3e-3])
    assert health.other_s(devices, [4, 4, 4]) == pytest.approx([0.75e-3] * 3)
    health.answered(b"a", 2e-3, 1)
    assert health.token_s(devices, [1, 1, 1]) == pytest.approx([2e-3, 2.5e-3, 3e-3])
    assert health.token_s(devices, [5, 1, 99]) == pytest.approx([1e-3, 2e-3, 3e-3])
    health.answered(b"a", 12e-3, 1)
    assert health.token_s(devices[:1], [1]) == pytest.approx([3e-3])  # a tenth of the way
    health.forget_all_but(devices[1:])
    assert health.token_s(devices[:1], [1]) is None


def test_links_take_another_compute_time() -> None:
    links = Links(downlink_snr_hz=[1e6, 1e7], uplink_snr_hz=1e6, downlink_bits=8.0, uplink_bits=8.0, compute_s=1e-3)
    other = with_compute(links, np.array([2e-3, 0.0]))
    assert other.table[4].tolist() == [2e-3, 0.0]
    assert (other.table[:4] == links.table[:4]).all()
    assert links.table[4].tolist() == [1e-3, 1e-3]
    for wrong in (np.zeros(3), np.array([1.0, -1.0]), np.array([1.0, np.nan]), np.array([1.0, np.inf])):
        with pytest.raises(ValueError, match="compute_s"):
            with_compute(links, wrong)


def test_policy_and_budget_go_together(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="needs --budget"):
        StationSettings(bundle=tmp_path, policy="budget")
    with pytest.raises(ConfigError, match="does not look at it"):
        StationSettings(bundle=tmp_path, policy="cosine", budget_s=0.1)
    with pytest.raises(ConfigError, match="budget must be positive"):
        StationSettings(bundle=tmp_path, policy="budget", budget_s=float("nan"))
    with pytest.raises(ConfigError, match="rank must be one of auto, probability, energy"):
        StationSettings(bundle=tmp_path, policy="cosine", rank="luck")
    with pytest.raises(ConfigError, match="must not be negative"):
        StationSettings(bundle=tmp_path, policy="cosine", whole_layers=-1)


@pytest.mark.parametrize("said", RANKS)
def test_auto_ranks_as_the_bundle_says(
    bundle: Bundle, tmp_path: Path, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    manifest = replace(bundle.manifest, rank=said)
    for asked in ("auto", *RANKS):
        caplog.clear()
        rules = layer_rules(StationSettings(bundle=tmp_path, policy="cosine", rank=asked, whole_layers=1), manifest)
        assert rules.rank == (said if asked == "auto" else asked)
        assert rules.whole_layers == {manifest.moe_layers[0]}
        assert bool(caplog.records) == (asked == "energy" != said)
    with pytest.raises(ConfigError, match=f"leaves policy cosine nothing to do.* {len(manifest.moe_layers)} layers"):
        layer_rules(StationSettings(bundle=tmp_path, policy="cosine", whole_layers=9), manifest)


@pytest.mark.parametrize("command", [["bs", "nowhere"], ["demo"]])
@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--policy", "bottleneck", "--max-dropped", "5%"], "does not look at it"),
        (["--budget", "150ms", "--max-dropped", "5%"], "give --budget or --max-dropped"),
        (["--max-dropped", "100%"], "max_dropped must be above 0 and below 1"),
        (["--max-dropped", "-1%"], "a share is from 0 to 1"),
        (["--max-dropped", "some"], "give a share, as in 5% or 0.05"),
        (["--policy", "bottleneck", "--budget", "150ms"], "does not look at it"),
        (["--policy", "budget", "--budget", "150"], "the unit is missing"),
        (["--policy", "budget", "--budget-per-token", "1ms"], "policy budget needs --budget"),
        (["--policy", "luck"], "'luck' is not one of"),
        (["--policy", "topk", "--rank", "energy"], "policy topk drops none"),
        (["--policy", "topk", "--whole-layers", "1"], "policy topk drops none"),
        (["--policy", "cosine", "--rank", "weight"], "'weight' is not one of"),
        (["--bandwidth", "20"], "the unit is missing"),
    ],
)
def test_flags_that_do_not_go_together(command: list[str], flags: list[str], said: str) -> None:
    done = CliRunner().invoke(cli, [*command, *flags])
    assert done.exit_code == 2
    assert said in done.output


@pytest.mark.parametrize(
    ("flags", "said"),
    [(["--policy", "budget"], "policy budget needs --budget"), (["--budget-per-token", "1ms"], "does not look at it")],
)
def test_a_base_station_is_told_its_budget(flags: list[str], said: str) -> None:
    done = CliRunner().invoke(cli, ["bs", "nowhere", *flags])
    assert (done.exit_code, said in done.output) == (2, True)


@pytest.mark.parametrize("renormalise", [False, True])
def test_the_embedded_face_has_every_policy(rng: np.random.Generator, renormalise: bool) -> None:
    gate, latency_s, home = rng.dirichlet(np.ones(6), 40), rng.uniform(1e-3, 4e-3, 6), np.array([0, 0, 1, 1, 2, 2])
    slowest = np.maximum.reduceat(latency_s, [0, 2, 4])
    plain = select_experts(gate, latency_s, "topk", 3, renormalise)
    for policy in ("bottleneck", "budget"):
        choice = select_experts(gate, latency_s, policy, 3, renormalise, device_of=home, budget_s=0.06)
        kept = choice.experts >= 0
        if policy == "bottleneck":
            np.testing.assert_array_equal(kept, shed_bottleneck(plain.experts, plain.weights, home, slowest))
        else:
            assert (np.bincount(home[choice.experts[kept]], minlength=3) * slowest <= 0.06).all()
        assert 0 < choice.dropped_weight.mean() < 0.7
        assert kept.any(axis=1).all()
        share = np.where(kept, plain.weights, 0).sum(axis=1) / plain.weights.sum(axis=1)
        np.testing.assert_allclose(choice.dropped_weight, 1 - share, atol=1e-12)
        total = plain.weights.sum(axis=1) * (1 if renormalise else share)
        np.testing.assert_allclose(choice.weights.sum(axis=1), total)
    alone = select_experts(gate, latency_s, "budget", 3, budget_s=1e3)
    np.testing.assert_array_equal(alone.experts, plain.experts)
    for wrong, said in (
        ({"policy": "budget"}, "budget_s"),
        ({"policy": "bottleneck", "device_of": [0, 1]}, "device_of"),
        ({"policy": "bottleneck", "latency_s": np.ones((40, 6))}, "latency_s"),
    ):
        with pytest.raises(ValueError, match=said):
            select_experts(**{"gate": gate, "latency_s": latency_s, **wrong})  # type: ignore[arg-type]
