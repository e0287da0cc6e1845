"""Selection: Algorithm 1 by hand, what is known about its ratio, and how it refuses bad input.

Marks of certainty as in docs/solver.md: [S] second hand, [D] derived.
"""

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from wdmoe.solver import prune_experts, select_experts

POSITIVE = st.floats(0.01, 100)


def wlr(weights, latencies, definition, renormalise=False):
    """Of one token, by the definition itself."""
    weights = np.asarray(weights) / (sum(weights) if renormalise else 1)
    ratio = weights / latencies
    return ratio.mean() if definition == "mean" else ratio.sum()


def forced_drop(weights, latencies, definition, renormalise):
    """WLR before and after the lighter of two experts is dropped, as the solver reports it."""
    experts = np.array([[0, 1]])
    kept = prune_experts(experts, [weights], latencies, wlr=definition)
    pruned = prune_experts(experts, [weights], latencies, "cosine", renormalise=renormalise, theta=1.0, wlr=definition)
    assert (pruned.experts == [[0, -1]]).all()
    return kept.wlr, pruned.wlr


@given(st.tuples(POSITIVE, POSITIVE), st.tuples(POSITIVE, POSITIVE))
def test_a_sum_never_rises_by_a_drop(weights, latencies):  # [D]
    before, after = forced_drop(sorted(weights, reverse=True), latencies, "sum", renormalise=False)
    assert after <= before
    assert before == pytest.approx(wlr(sorted(weights, reverse=True), latencies, "sum"))


@given(st.tuples(POSITIVE, POSITIVE), st.tuples(POSITIVE, POSITIVE))
def test_a_mean_rises_exactly_when_the_kept_ratio_is_larger(weights, latencies):  # [D]
    (heavy, light), (first_s, second_s) = sorted(weights, reverse=True), latencies
    assume(abs(heavy / first_s - light / second_s) > 1e-9 * heavy / first_s)
    before, after = forced_drop((heavy, light), latencies, "mean", renormalise=False)
    assert (after > before) == (heavy / first_s > light / second_s)


@given(st.tuples(POSITIVE, POSITIVE), st.tuples(POSITIVE, POSITIVE))
def test_a_renormalised_sum_rises_exactly_when_the_kept_is_faster(weights, latencies):  # [D]
    assume(abs(latencies[0] - latencies[1]) > 1e-6 * latencies[0])
    weights = np.array(sorted(weights, reverse=True)) / sum(weights)
    before, after = forced_drop(weights, latencies, "sum", renormalise=True)
    assert (after > before) == (latencies[0] < latencies[1])


@given(st.tuples(POSITIVE, POSITIVE), st.tuples(POSITIVE, POSITIVE))
def test_a_renormalised_mean_rises_until_the_kept_is_much_slower(weights, latencies):  # [D]
    weights = np.array(sorted(weights, reverse=True)) / sum(weights)
    limit = (1 + weights[1]) / weights[1]
    assume(abs(latencies[0] / latencies[1] - limit) > 1e-6 * limit)
    before, after = forced_drop(weights, latencies, "mean", renormalise=True)
    assert (after > before) == (latencies[0] / latencies[1] < limit)


def test_cosine_by_hand():
    # Token 0: cos((0.8, 0.2), (1, 1)) = 0.857; token 1: cos((0.5, 0.5), (1, 1)) = 1
    gate = [[0.8, 0.2], [0.5, 0.5]]
    choice = select_experts(gate, [1.0, 1.0], "cosine", gamma=1.2)
    # WLR starts at 0.5. theta = 0.9 is the first that drops: token 0 has 1.0, the mean is 0.75 > 1.2 * 0.5
    assert choice.theta == pytest.approx(0.9)
    assert choice.experts.tolist() == [[0, -1], [0, 1]]
    assert choice.weights.tolist() == [[1.0, 0.0], [0.5, 0.5]]
    assert choice.dropped_weight == pytest.approx([0.2, 0.0])
    assert choice.wlr == pytest.approx(0.75)
    kept = select_experts(gate, [1.0, 1.0], "cosine", gamma=1.2, renormalise=False)
    assert kept.weights.tolist() == [[0.8, 0.0], [0.5, 0.5]]


def test_cosine_is_scale_free(rng):  # [D]: it cannot see that the whole network is slow
    gate, latency = rng.dirichlet(np.ones(8), 50), rng.uniform(0.5, 2, 8)
    once, slow = (select_experts(gate, latency * scale, "cosine", 3) for scale in (1.0, 1024.0))
    np.testing.assert_array_equal(once.experts, slow.experts)


def test_without_enough_gain_theta_ends_at_one_and_every_token_loses_one(rng):
    gate = rng.dirichlet(np.ones(8), 50)
    choice = select_experts(gate, np.ones(8), "cosine", 3, gamma=1e6)
    assert choice.theta == 1.0
    assert ((choice.experts >= 0).sum(axis=1) == 2).all()


def test_one_expert_is_always_kept(rng):
    choice = select_experts(rng.random((20, 4)), rng.uniform(1, 9, 4), "cosine", 1, theta=1.0)
    assert (choice.experts >= 0).all()
    assert not choice.dropped_weight.any()


def test_per_token_latency_equals_shared_when_rows_repeat(rng):
    gate, latency = rng.random((30, 6)), rng.uniform(1, 9, 6)
    shared = select_experts(gate, latency, "cosine", 3)
    each = select_experts(gate, np.tile(latency, (30, 1)), "cosine", 3)
    np.testing.assert_array_equal(shared.experts, each.experts)
    np.testing.assert_array_equal(shared.weights, each.weights)


def test_permuting_experts_permutes_the_choice(rng):
    gate, latency, order = rng.random((30, 6)), rng.uniform(1, 9, 6), rng.permutation(6)
    plain = select_experts(gate, latency, "cosine", 3)
    turned = select_experts(gate[:, order], latency[order], "cosine", 3)
    np.testing.assert_array_equal(plain.experts, np.where(turned.experts >= 0, order[turned.experts], turned.experts))


def test_tokens_that_lose_nothing_keep_their_weights_to_the_bit(rng):
    weights = rng.random((100, 4)).astype(np.float32)
    experts = np.argsort(rng.random((100, 8)), axis=1)[:, :4]
    choice = prune_experts(experts, weights, np.ones(8), "cosine", theta=0.9, gamma=0.5)
    whole = (choice.experts >= 0).all(axis=1)
    assert 0 < whole.sum() < 100
    np.testing.assert_array_equal(choice.weights[whole], weights[whole].astype(np.float64))
    np.testing.assert_allclose(choice.weights.sum(axis=1), weights.sum(axis=1, dtype=np.float64))


def test_unavailable_experts_are_dropped_first():
    available = np.array([False, True, True, False])
    gate = [[0.4, 0.3, 0.2, 0.1], [0.4, 0.1, 0.1, 0.4]]
    choice = select_experts(gate, np.ones(4), available=available)
    assert choice.experts.tolist() == [[-1, 1], [-1, -1]]
    assert choice.weights.tolist() == [[0, 1], [0, 0]]
    assert choice.dropped_weight == pytest.approx([4 / 7, 1])
    replaced = select_experts(gate, np.ones(4), available=available, substitute=True, renormalise=False)
    assert replaced.experts.tolist() == [[1, 2], [1, 2]]
    assert replaced.weights.tolist() == [[0.3, 0.2], [0.1, 0.1]]
    assert replaced.dropped_weight == pytest.approx([1 - 0.5 / 0.7, 1 - 0.2 / 0.8])
    nobody = select_experts(gate, np.ones(4), available=np.zeros(4, bool), substitute=True)
    assert (nobody.experts == -1).all()
    assert nobody.dropped_weight.tolist() == [1, 1]


def test_input_is_never_changed(rng):
    experts, weights = np.array([[0, 1]], np.int32), np.array([[0.7, 0.3]])
    prune_experts(experts, weights, np.ones(2), "cosine", theta=1.0)
    assert experts.tolist() == [[0, 1]]
    assert weights.tolist() == [[0.7, 0.3]]


@pytest.mark.parametrize("convert", [np.asfortranarray, np.float32, lambda a: a[:, ::-1], lambda a: a.tolist()])
def test_any_layout_and_float_type(convert, rng):
    gate = rng.random((9, 5))
    given_ = convert(gate)
    plain = select_experts(np.array(given_, np.float64, order="C"), np.ones(5), "cosine")
    same = select_experts(given_, np.ones(5, np.float32), "cosine")
    np.testing.assert_array_equal(plain.experts, same.experts)
    np.testing.assert_array_equal(plain.weights, same.weights)


@pytest.mark.parametrize("policy", ["topk", "cosine"])
def test_no_tokens(policy):
    choice = select_experts(np.empty((0, 4)), np.ones(4), policy, 3)
    assert (choice.experts.shape, choice.weights.shape, choice.dropped_weight.shape) == ((0, 3), (0, 3), (0,))
    assert choice.wlr == 0


def test_all_zero_gate_rows_are_left_alone():
    choice = select_experts(np.zeros((2, 4)), np.ones(4), "cosine", theta=1.0)
    assert choice.experts.tolist() == [[0, 1], [0, 1]]
    assert not choice.weights.any()
    assert not choice.dropped_weight.any()


GATE, LATENCY = np.full((2, 3), 0.5), np.ones(3)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"gate": np.ones(3)}, "gate must have two dimensions"),
        ({"gate": np.empty((2, 0)), "latency_s": []}, "top_k must be 1 to 0"),
        ({"gate": GATE * np.nan}, "gate must be finite"),
        ({"gate": -GATE}, "gate must be finite and not negative"),
        ({"gate": GATE * np.inf}, "gate must be finite"),
        ({"gate": GATE * 1e200}, "gate must be finite"),
        ({"latency_s": np.ones(4)}, "latency_s must end in the 3 experts"),
        ({"latency_s": 1.0}, "latency_s must end in"),
        ({"latency_s": np.ones((5, 3))}, "latency_s must be"),
        ({"latency_s": LATENCY * 0}, "latency_s must be positive"),
        ({"latency_s": -LATENCY}, "latency_s must be positive"),
        ({"latency_s": LATENCY * np.inf}, "latency_s must be positive and finite, got inf at expert 0"),
        ({"latency_s": LATENCY * np.nan}, "latency_s must be positive"),
        ({"top_k": 0}, "top_k"),
        ({"top_k": 4}, "top_k"),
        ({"policy": "best"}, "policy must be one of topk, cosine"),
        ({"wlr": "median"}, "wlr must be one of mean, sum"),
        ({"theta": np.nan}, "theta must be 0 to 1"),
        ({"theta": 1.1}, "theta must be 0 to 1"),
        ({"theta_step": 0.0}, "theta_step"),
        ({"gamma": 0.0}, "gamma"),
        ({"gamma": np.inf}, "gamma"),
        ({"available": np.ones(2, bool)}, "available must be bool"),
        ({"available": np.ones(3)}, "available must be bool"),
    ],
)
def test_bad_input_is_named(change, named):
    with pytest.raises(ValueError, match=named):
        select_experts(**{"gate": GATE, "latency_s": LATENCY, **change})


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"experts": [0, 1]}, "experts must have two dimensions"),
        ({"experts": [[0.0, 1.0]]}, "experts must be integers"),
        ({"experts": [[0, 2**40]]}, "experts must be within 32 bits"),
        ({"experts": [[0, -2]]}, "experts holds -2"),
        ({"experts": [[0, 3]]}, "experts holds 3"),
        ({"weights": [[1.0]]}, "weights must have the shape"),
        ({"weights": [[1.0, -1.0]]}, "weights must be finite"),
        ({"weights": [[1.0, np.nan]]}, "weights must be finite"),
        ({"latency_s": np.empty(0)}, "latency_s must have at least one expert"),
    ],
)
def test_bad_assignments_are_named(change, named):
    given_ = {"experts": [[0, 1]], "weights": [[0.6, 0.4]], "latency_s": LATENCY, **change}
    with pytest.raises(ValueError, match=named):
        prune_experts(**given_)


def test_the_solver_needs_numpy_only():
    code = """if True:
        import sys
        import wdmoe.solver
        heavy = {"torch", "transformers", "scipy", "zmq", "msgpack", "onnxruntime"} & set(sys.modules)
        sys.exit(f"also imported: {heavy}" if heavy else 0)
    """
    subprocess.run([sys.executable, "-c", code], check=True)
