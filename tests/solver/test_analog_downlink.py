"""The analog downlink: its time by hand, who listens, and what devices then compute with."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from tests.lab.families import tiny_config, tiny_model
from wdmoe.backbone.evaluation.analog_downlink import Broadcast, Codes, fit_spectra, record_hidden
from wdmoe.backbone.evaluation.simulated_experts import EXACT, Order, PlannedExperts
from wdmoe.errors import ConfigError
from wdmoe.simulation.quality import measure
from wdmoe.simulation.scenario import Scenario
from wdmoe.simulation.scenario_file import parse_scenario
from wdmoe.simulation.study import run_study
from wdmoe.solver.layer.analog_downlink import Analog, block_symbols, cast
from wdmoe.solver.layer.latency import MULTICASTS, Levers, broadcast_s
from wdmoe.solver.layer.plan import Policy, carried_out, plan_layer
from wdmoe.solver.layer.radio_state import RadioState
from wdmoe.wireless.analog import analog_distortion

ENDLESS = 1e100  # an SNR at which no digit is lost
EXPERTS = np.array([[0, 1], [0, 2], [1, 2]], np.int32)
HOLDERS = np.eye(3, dtype=bool)
WEIGHTS = np.array([[0.6, 0.4], [0.7, 0.3], [0.5, 0.5]])
AIR = RadioState(
    downlink_snr_hz=np.array([600e6, 60e6, 18e6]),  # over 2 MHz: 300, 30 and 9
    uplink_snr_hz=np.array([10e6, 10e6, 10e6]),
    total_hz=2e6,
    hidden=64,
    token_s=np.full(3, 1e-6),
    expert_s=np.zeros(3),
)


def planned(air: RadioState = AIR, policy: str = "topk", **analog: Any) -> Any:
    levers = Levers(bits=8, analog=Analog(**analog))
    return plan_layer(EXPERTS, WEIGHTS, HOLDERS, air, Policy(name=policy, max_dropped=0.2, levers=levers))


def test_the_time_by_hand() -> None:
    """32 symbols a token over the whole band, and 16 bits beside them at the rate of its weakest listener."""
    low = Analog(floor_db=0)
    bits = 16 / np.log2([31, 10, 10])
    sent = cast(AIR, low, EXPERTS)
    assert sent.snr == pytest.approx([300, 30, 9])
    assert sent.repeats.tolist() == [1, 1, 1]
    assert sent.seconds == pytest.approx((3 * 32 + bits.sum()) / 2e6)
    assert cast(AIR, replace(low, ratio=2), EXPERTS).seconds == pytest.approx((3 * 64 + bits.sum()) / 2e6)
    assert cast(AIR, replace(low, share=0.5), EXPERTS).seconds == pytest.approx((2 * 32 + 2 * bits.sum()) / 2e6)
    assert block_symbols(1, 1 / 64) == 1


def test_blocks_are_repeated_until_the_weakest_listener_reaches_the_floor() -> None:
    some = EXPERTS.copy()
    some[1] = -1
    bits = 16 / np.log2([31, 10])
    floor = Analog(floor_db=10 * np.log10(36))  # 9 needs 4 times, 30 needs 2
    sent = cast(AIR, floor, some)
    assert sent.repeats.tolist() == [2, 0, 4]
    assert sent.seconds == pytest.approx((6 * 32 + bits.sum()) / 2e6)
    pair = cast(AIR, replace(floor, share=0.5), some)
    assert pair.repeats.tolist() == [4, 0, 4]
    assert pair.seconds == pytest.approx((4 * 32 + 2 * bits.sum()) / 2e6)
    assert cast(AIR, floor, np.full((3, 2), -1)).seconds == 0
    order = Order.of(planned())
    assert (order.down_bits == EXACT).all()
    assert (order.up_bits == 8).all()


def test_where_no_bit_gets_through_it_is_no_way_down() -> None:
    """An MCS table below its lowest step: the scale beside the symbols would not arrive."""
    air = replace(AIR, downlink_efficiency=np.array([4.0, 1.0, 0.0]), uplink_efficiency=np.full(3, 2.0))
    sent = cast(air, Analog(), EXPERTS)
    assert sent.snr == pytest.approx([300, 30, 0])
    assert sent.seconds == np.inf
    assert planned(air).time.analog is None
    assert cast(air, Analog(), EXPERTS[:1]).seconds < np.inf


@pytest.mark.parametrize("policy", ["topk", "budget"])
def test_it_is_used_where_it_is_faster(policy: str) -> None:
    digital = plan_layer(EXPERTS, WEIGHTS, HOLDERS, AIR, Policy(name=policy, max_dropped=0.2, levers=Levers(bits=8)))
    short, endless = planned(policy=policy), planned(policy=policy, ratio=64)
    assert short.time.latency_s < digital.time.latency_s
    assert short.time.analog is not None
    if policy == "topk":
        assert endless.time.analog is None
        assert endless.time.latency_s == digital.time.latency_s


@pytest.mark.parametrize("multicast", MULTICASTS)
@pytest.mark.parametrize("max_distortion", [0.0, 0.03])
def test_beside_multicast_the_faster_one_is_used(multicast: str, max_distortion: float) -> None:
    """Which is not multicast where the analog blocks are short; bits then travel on the way up only."""
    for ratio, used in ((1.0, True), (64.0, False)):
        usual = {"bits": 8, "multicast": multicast, "max_distortion": max_distortion}
        bits, both = (Levers(analog=each, **usual) for each in (None, Analog(ratio=ratio)))
        plain, plan = (plan_layer(EXPERTS, WEIGHTS, HOLDERS, AIR, Policy(levers=each)) for each in (bits, both))
        assert (plan.time.analog is not None) == used
        assert plan.time.latency_s < plain.time.latency_s or not used
        assert plan.time.up_bits == plan.time.bits.sum()
        if used:
            assert plan.time.down_bits == 0
            assert broadcast_s(AIR, both, plan.device, plan.time.bits) == plan.time.multicast_s
            assert Order.of(plan).up_bits.tolist() == plan.time.bits.tolist()
        else:
            assert plan.time.down_bits > 0


def late(**changes: Any) -> tuple[Any, Any]:
    """A plan for AIR and what becomes of it on another channel."""
    levers = Levers(bits=8, analog=Analog(floor_db=10 * np.log10(36), share=0.25))
    plan = plan_layer(EXPERTS, WEIGHTS, HOLDERS, AIR, Policy(levers=levers))
    air = replace(AIR, **changes)
    return plan, carried_out(plan, AIR, air, levers)


def test_on_another_channel_blocks_go_out_as_often_and_are_heard_as_it_is() -> None:
    plan, real = late(downlink_snr_hz=np.array([60e6, 600e6, 9e6]), uplink_snr_hz=np.full(3, 40e6))
    assert real.time.analog.snr.tolist() == [30, 300, 4.5]
    assert real.time.analog.repeats.tolist() == plan.time.analog.repeats.tolist() == [4, 4, 4]
    assert real.time.analog.weakest == plan.time.analog.weakest == pytest.approx(9)  # what the sender knows
    beside = 2 * (16 / np.log2([31, 5.5, 5.5])).sum()
    assert real.time.multicast_s == real.time.analog.seconds == pytest.approx((8 * 32 + beside) / 2e6)
    assert real.time.bandwidth_hz.tolist() == plan.time.bandwidth_hz.tolist()
    assert real.time.device_s.max() < plan.time.device_s.max()  # the way up is at the real rate
    assert real.time.down_bits == 0
    same = late(hidden=AIR.hidden)[1]
    assert same.time.latency_s == pytest.approx(plan.time.latency_s)


def test_a_listener_that_fades_away_is_waited_for_in_vain() -> None:
    _, real = late(downlink_efficiency=np.array([4.0, 1.0, 0.0]), uplink_efficiency=np.full(3, 2.0))
    assert real.time.latency_s == np.inf
    _, real = late(downlink_efficiency=np.array([4.0, 1.0, 0.5]), uplink_efficiency=np.full(3, 2.0))
    assert real.time.latency_s < np.inf


def test_more_symbols_take_more_time() -> None:
    times = [cast(AIR, Analog(ratio=ratio), EXPERTS).seconds for ratio in (0.25, 0.5, 1, 2)]
    assert (np.diff(times) > 0).all()


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"ratio": 0.0}, "analog_ratio must be 1/64 to 64"),
        ({"floor_db": 1e3}, "analog_floor_db"),
        ({"transform": "dct"}, "none, klt"),
        ({"share": 1.0}, "analog_share"),
    ],
)
def test_a_lever_that_cannot_be_is_refused(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Analog(**wrong)


@pytest.fixture(scope="module")
def model() -> Any:
    made = tiny_model(tiny_config("mixtral"))
    made.set_experts_implementation("eager")
    return made


WINDOWS = torch.arange(48).reshape(2, 24) % 60


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=WINDOWS, use_cache=False).logits


def broadcasting(model: Any, lever: Analog, snr: list[float], seed: int = 1) -> Any:
    codes = Codes(model.config.hidden_size, fit_spectra(model, WINDOWS) if lever.transform == "klt" else ())
    rng = np.random.default_rng(seed)

    def decide(layer: int, experts: np.ndarray, ranks: np.ndarray) -> Order:
        bits = np.full(experts.shape, EXACT, np.int32)
        device = (experts % len(snr)).astype(np.int32)
        heard = np.array(snr)
        code = codes.of(layer, lever, min(snr))
        sent = Broadcast(np.arange(len(experts)), heard, np.ones(len(experts)), code, lever.share, rng)
        return Order(experts, device, bits, bits, False, (sent,))

    return decide


@pytest.mark.parametrize("ratio", [1.0, 2.0])
def test_without_noise_the_model_says_the_same_to_the_last_digit(model: Any, ratio: float) -> None:
    plain = logits(model)
    with PlannedExperts(model, broadcasting(model, Analog(ratio=ratio), [ENDLESS, ENDLESS])):
        assert torch.equal(logits(model), plain)
    with PlannedExperts(model, broadcasting(model, Analog(ratio=ratio), [100.0, ENDLESS])):
        assert not torch.equal(logits(model), plain)


def test_the_same_seed_gives_the_same_digits(model: Any) -> None:
    found = []
    for seed in (1, 1, 2):
        with PlannedExperts(model, broadcasting(model, Analog(transform="klt"), [10.0, 3.0], seed)):
            found.append(logits(model))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_more_snr_or_a_fitted_code_changes_the_model_less(model: Any) -> None:
    plain = logits(model)

    def error(snr: float, **lever: Any) -> float:
        with PlannedExperts(model, broadcasting(model, Analog(**lever), [snr, snr])):
            return float((logits(model) - plain).square().sum())

    assert error(1e4) < error(1e2) < error(1.0)
    assert error(1e2, ratio=0.5, transform="klt") < error(1e2, ratio=0.5)
    assert error(1e2) < error(1e2, share=0.5)


def test_each_device_hears_a_noise_of_its_own_once(model: Any) -> None:
    """Two experts of a token on one device start from the same vector, on two devices from different ones."""
    hidden = torch.randn(6, 32, generator=torch.Generator().manual_seed(1))
    snr = np.array([100.0, 0.0, 10.0])
    code = Codes(32).of(0, Analog(), 10.0)
    sent = Broadcast(np.arange(1, 6), snr, np.ones(5), code, 0.0, np.random.default_rng(1))
    token, device = torch.tensor([0, 1, 1, 1, 1, 5]), torch.tensor([0, 0, 0, 1, 2, 2])
    vectors = hidden[token].clone()
    sent.replace(vectors, hidden, token, device)
    assert torch.equal(vectors[0], hidden[0])  # was not sent
    assert torch.equal(vectors[3], hidden[1])  # does not listen
    assert torch.equal(vectors[1], vectors[2])
    assert not torch.equal(vectors[1], vectors[4])


def test_the_distortion_of_a_replay_is_the_closed_form() -> None:
    """Also of blocks that are sent several times, whose SNRs add up."""
    hidden = torch.randn(6000, 32, generator=torch.Generator().manual_seed(1)) * 3
    snr, repeats = np.array([0.0, 10.0, 1.0]), np.repeat([1.0, 3.0], 3000)
    for ratio in (0.5, 1, 2):
        code = Codes(32).of(0, Analog(ratio=ratio), 1.0)
        sent = Broadcast(np.arange(6000), snr, repeats, code, 0.0, np.random.default_rng(1))
        error = (sent.heard(hidden) - hidden.double().numpy()) ** 2
        for times, part in ((1, slice(3000)), (3, slice(3000, None))):
            found = error[:, part].sum(axis=(1, 2)) / float(hidden[part].double().square().sum())
            np.testing.assert_allclose(
                found, analog_distortion([10 * np.log10(10 * times), 10 * np.log10(times)], ratio), rtol=0.03
            )


def test_hidden_vectors_are_those_of_the_layers(model: Any) -> None:
    found = record_hidden(model, WINDOWS)
    assert [each.shape for each in found] == [(48, 32)] * model.config.num_hidden_layers
    spectrum = fit_spectra(model, WINDOWS)[0]
    np.testing.assert_allclose(spectrum.mean, found[0].double().mean(0).numpy())
    assert (np.diff(spectrum.variances) <= 0).all()
    centred = found[0].double().numpy() - spectrum.mean
    np.testing.assert_allclose((centred @ spectrum.directions.T).var(axis=0), spectrum.variances, atol=1e-9)


SCENARIO = """
name = "tiny"
draws = 2
[radio]
noise_figure_db = 15.0
[devices]
count = 4
experts = 8
[channel]
fading_changes = "layer"
[model]
trace = "default"
hidden = 4096
inner = 512
tokens = 12
[[variant]]
name = "plain"
[[variant]]
name = "analog"
downlink = "analog"
analog_floor_db = 12.0
[[variant]]
name = "pairs"
downlink = "analog"
analog_share = 0.5
[[variant]]
name = "klt"
downlink = "analog"
analog_ratio = 0.5
analog_transform = "klt"
"""


@pytest.fixture(scope="module")
def scenario() -> Scenario:
    return parse_scenario(SCENARIO)


def test_a_scenario_says_it(scenario: Scenario) -> None:
    assert [each.policy.levers.analog for each in scenario.variants] == [
        None,
        Analog(floor_db=12.0),
        Analog(share=0.5),
        Analog(ratio=0.5, transform="klt"),
    ]
    with pytest.raises(ConfigError, match="analog_ratio does nothing here"):
        parse_scenario(SCENARIO.replace('downlink = "analog"\nanalog_ratio', "analog_ratio"))
    with pytest.raises(ConfigError, match="'pairs': analog_share must be"):
        parse_scenario(SCENARIO.replace("analog_share = 0.5", "analog_share = 1.0"))


def test_quality_meets_the_simulators_devices(scenario: Scenario) -> None:
    """The whole way, from a scenario to a model's likelihoods; the same seed gives the same digits."""
    config = tiny_config("mixtral", num_hidden_layers=30, num_experts_per_tok=4)
    made = tiny_model(config)
    made.set_experts_implementation("eager")
    spectra = fit_spectra(made, WINDOWS)
    first, second = (
        measure(scenario, scenario.variants, made, None, WINDOWS[:1], [], spectra=spectra) for _ in range(2)
    )
    assert np.array_equal(first.nats, second.nats)
    simulated = run_study(scenario, workers=1).of("latency_s")
    assert (simulated[:, 1:] < simulated[:, :1]).all()  # there the gates are those of the trace
    assert (first.nats[1:] != first.nats[0]).all()
    lost = first.distortion.mean(axis=1)
    assert lost[0] < 1e-6 < lost[1] < 10**-1.2  # float16; at the floor of 12 dB or above
    assert lost[1] < lost[3] < lost[2]
    with pytest.raises(ConfigError, match="none were given"):
        measure(scenario, scenario.variants, made, None, WINDOWS[:1], [])


def test_decided_by_an_old_channel_it_is_heard_worse() -> None:
    """The distortion follows the channel there is. The band for the way up is of an old one too."""
    head, plain, analog = SCENARIO.replace("draws = 2", "draws = 3").split("[[variant]]")[:3]
    once = analog.replace('"analog"', '"once"', 1) + "csi_layers = 0\n"
    changing = parse_scenario("[[variant]]".join([head, plain, analog, once]))
    made = tiny_model(tiny_config("mixtral", num_hidden_layers=30, num_experts_per_tok=4))
    made.set_experts_implementation("eager")
    fresh, old = measure(changing, changing.variants, made, None, WINDOWS, []).distortion[1:].mean(axis=1)
    assert 1.5 * fresh < old
    latency = run_study(changing, workers=1).of("latency_s")
    assert (latency[:, 2] > latency[:, 1]).all()
