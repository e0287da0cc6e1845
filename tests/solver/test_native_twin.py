"""The native kernels and their NumPy twin give the same answers, to the bit."""

from itertools import product
from types import ModuleType

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wdmoe.solver import _native
from wdmoe.solver.reference import native as reference

BOTH = pytest.mark.parametrize("kernels", [_native, reference], ids=["native", "numpy"])

# Few distinct values, so that ties and zeros are common; and extremes that must not turn into NaN.
WEIGHTS = st.sampled_from([0.0, 0.1, 0.25, 0.5, 1.0, 3.0, 1e-300, 1e-30, 1e100]) | st.floats(0, 10)
LATENCIES = st.sampled_from([1e-100, 1e-3, 0.5, 1.0, 1e100]) | st.floats(1e-6, 10)


def matrix(draw, elements, rows, columns, dtype=np.float64):
    values = draw(st.lists(elements, min_size=rows * columns, max_size=rows * columns))
    return np.array(values, dtype).reshape(rows, columns)


@st.composite
def assignments(draw, most_experts=12):
    """experts (tokens, k) with -1 and duplicates, weights, and the number of experts."""
    tokens, k, n_experts = draw(st.integers(0, 9)), draw(st.integers(1, 6)), draw(st.integers(1, most_experts))
    experts = matrix(draw, st.integers(-1, n_experts - 1), tokens, k, np.int32)
    return experts, matrix(draw, WEIGHTS, tokens, k), n_experts


@st.composite
def availabilities(draw, n_experts):
    if draw(st.booleans()):
        return None
    return np.array(draw(st.lists(st.booleans(), min_size=n_experts, max_size=n_experts)), np.uint8)


@settings(max_examples=100)
@given(st.data())
def test_top_k(data):
    tokens, n_experts = data.draw(st.integers(0, 6)), data.draw(st.integers(1, 20))
    gate = matrix(data.draw, WEIGHTS, tokens, n_experts)
    available = data.draw(availabilities(n_experts))
    k, normalise = data.draw(st.integers(1, n_experts)), data.draw(st.booleans())
    experts, weights = _native.top_k(gate, k, available, normalise)
    twin_experts, twin_weights = reference.top_k(gate, k, available, normalise)
    np.testing.assert_array_equal(experts, twin_experts)
    np.testing.assert_array_equal(weights, twin_weights)
    assert np.isfinite(weights).all()


def _equal_now_and_then(values):
    return np.round(values, 2)


def _in_one_column(values):
    values[:, 3::8] += 1
    return values


SHAPED = [np.copy, _equal_now_and_then, _in_one_column, np.ceil, np.zeros_like]


def test_top_k_of_long_rows():
    """Rows that one way of finding them suits, and rows that it does not."""
    offenders = []
    for shaped, n_experts, k in product(SHAPED, [4, 7, 8, 16, 60, 64, 72, 128, 250], [1, 2, 4, 8]):
        rng = np.random.default_rng(n_experts + k)
        gate = shaped(rng.random((50, n_experts)))
        for available in (None, (rng.random(n_experts) < 0.7).astype(np.uint8), np.zeros(n_experts, np.uint8)):
            native, twin = (each.top_k(gate, min(k, n_experts), available, False) for each in (_native, reference))
            if not all(map(np.array_equal, native, twin)):
                offenders.append(f"{shaped.__name__}, best {k} of {n_experts}, available {available}")
    assert not offenders, "\n".join(offenders)


@settings(max_examples=150)
@given(st.data())
def test_prune(data):
    experts, weights, n_experts = data.draw(assignments())
    rows = data.draw(st.sampled_from([1, len(experts)]))
    latency = matrix(data.draw, LATENCIES, rows, n_experts)
    options = (
        data.draw(availabilities(n_experts)),
        *(data.draw(st.booleans()) for _ in ("cosine", "renormalise", "wlr_sum")),
        data.draw(st.floats(0, 1)),
        data.draw(st.sampled_from([0.05, 0.1, 0.3, 1.0])),
        data.draw(st.sampled_from([0.9, 1.0, 1.01, 1.05, 2.0])),
    )
    twin_experts, twin_weights = experts.copy(), weights.copy()
    dropped, wlr, theta = _native.prune(experts, weights, latency, *options)
    twin_dropped, twin_wlr, twin_theta = reference.prune(twin_experts, twin_weights, latency, *options)
    np.testing.assert_array_equal(experts, twin_experts)
    np.testing.assert_array_equal(weights, twin_weights)
    np.testing.assert_array_equal(dropped, twin_dropped)
    assert (wlr, theta) == (twin_wlr, twin_theta)
    assert np.isfinite(weights).all()
    assert not np.isnan(wlr)
    assert ((dropped >= 0) & (dropped <= 1)).all()


@settings(max_examples=100)
@given(assignments(), st.data())
def test_group_by_device(assignment, data):
    experts, weights, n_experts = assignment
    weights = np.minimum(weights, 1e30).astype(np.float32)
    device_of = np.array(data.draw(st.lists(st.integers(-1, 5), min_size=n_experts, max_size=n_experts)), np.int32)
    groups = _native.group_by_device(experts, weights, device_of)
    twin = reference.group_by_device(experts, weights, device_of)
    assert (len(groups), groups.unserved) == (len(twin), twin.unserved)
    for work, other in zip(groups, twin, strict=True):
        assert (work.device, work.experts, work.counts) == (other.device, other.experts, other.counts)
        for name in ("token_rows", "rows", "weights"):
            np.testing.assert_array_equal(getattr(work, name), getattr(other, name))
            assert getattr(work, name).dtype == getattr(other, name).dtype


@settings(max_examples=60)
@given(st.data())
def test_combine(data):
    tokens, hidden = data.draw(st.integers(1, 6)), data.draw(st.integers(0, 9))
    values = st.floats(-1e3, 1e3, width=32)
    replies = []
    for _ in range(data.draw(st.integers(0, 4))):
        n = data.draw(st.integers(0, 8))
        rows = np.array(data.draw(st.lists(st.integers(0, tokens - 1), min_size=n, max_size=n)), np.int32)
        dtype = data.draw(st.sampled_from([np.float32, np.float16]))
        replies.append((matrix(data.draw, values, n, hidden, dtype), rows))
    scale = data.draw(st.none() | st.lists(values, min_size=tokens, max_size=tokens))
    np.testing.assert_array_equal(
        _native.combine(tokens, hidden, replies, scale), reference.combine(tokens, hidden, replies, scale)
    )


@settings(max_examples=100)
@given(st.data())
def test_combine_partials_with_weights(data):
    tokens, n, hidden = data.draw(st.integers(1, 4)), data.draw(st.integers(0, 8)), data.draw(st.integers(1, 9))
    values = st.floats(-1e3, 1e3, width=32)
    partial = matrix(data.draw, values, n, hidden, np.float32)
    rows = np.array(data.draw(st.lists(st.integers(0, tokens - 1), min_size=n, max_size=n)), np.int32)
    weights = matrix(data.draw, values, 1, n, np.float32)[0]
    out = matrix(data.draw, values, tokens, hidden, np.float32)
    twin = out.copy()
    _native.combine_partials(out, partial, rows, weights)
    reference.combine_partials(twin, partial, rows, weights)
    np.testing.assert_array_equal(out, twin)


@settings(max_examples=100)
@given(st.data())
def test_weighted_sum(data):
    n, hidden = data.draw(st.integers(1, 8)), data.draw(st.integers(1, 40))
    outputs = [matrix(data.draw, NUMBERS, 1, hidden, np.float32) for _ in range(n)]
    weights = matrix(data.draw, st.floats(-1e3, 1e3, width=32), 1, n, np.float32)[0]
    with np.errstate(all="ignore"):
        twin = reference.weighted_sum(outputs, weights)
    found = _native.weighted_sum(outputs, weights)
    np.testing.assert_array_equal(found, twin)
    assert not any(np.shares_memory(found, output) for output in outputs)


@pytest.mark.parametrize(
    ("shapes", "weights"),
    [
        ([], np.ones(0, np.float32)),
        ([(1, 3)], np.ones(2, np.float32)),
        ([(1, 3), (1, 4)], np.ones(2, np.float32)),
        ([(2, 3)], np.ones(1, np.float32)),
        ([(3,)], np.ones(1, np.float32)),
        ([(1, 0)], np.ones(1, np.float32)),
        ([(1, 3)], np.ones((1, 1), np.float32)),
    ],
)
def test_weighted_sum_refuses(shapes, weights):
    for kernels in (_native, reference):
        with pytest.raises(ValueError, match="outputs"):
            kernels.weighted_sum([np.ones(shape, np.float32) for shape in shapes], weights)


def test_is_finite(rng):
    offenders = []
    sizes, poisons = [0, 1, 7, 4095, 4096, 4097, 20000], [np.nan, np.inf, -np.inf, None]
    for size, poison, kernels, dtype in product(sizes, poisons, (_native, reference), (np.float32, np.float16)):
        values = rng.standard_normal(size).astype(dtype)
        if poison is not None and size:
            values[rng.integers(size)] = poison
        if kernels.is_finite(values) != (poison is None or size == 0):
            offenders.append(f"{kernels.__name__}: {poison} among {size} of {dtype.__name__}")
    assert not offenders, "\n".join(offenders)


def test_first_bad():
    offenders = []
    bads, places = [np.nan, -1.0, np.inf, 1e101, 1e-101], [0, 63, 64, 129]
    for bad, at, kernels, positive in product(bads, places, (_native, reference), (True, False)):
        values = np.ones((1, 130))
        values[0, at] = bad
        expected = -1 if bad == 1e-101 and not positive else at
        if (found := kernels.first_bad(values, positive=positive)) != expected:
            offenders.append(f"{kernels.__name__}: {bad} at {at}, positive={positive}: {found}")
    assert not offenders, "\n".join(offenders)


def test_large_batch(rng):
    gate = rng.dirichlet(np.full(64, 0.3), 4096)
    latency = rng.uniform(1e-3, 1e-1, (4096, 64))
    results = []
    for kernels in (_native, reference):
        experts, weights = kernels.top_k(gate, 8, None, True)
        rest = kernels.prune(experts, weights, latency, None, True, True, False, 0.5, 0.05, 1.05)
        results.append((experts, weights, *rest))
    for native, twin in zip(*results, strict=True):
        np.testing.assert_array_equal(native, twin)


@BOTH
def test_groups_by_hand(kernels: ModuleType):
    experts = np.array([[0, 3, -1], [2, 1, 4], [3, 3, 0]], np.int32)
    weights = np.arange(9, dtype=np.float32).reshape(3, 3)
    groups = kernels.group_by_device(experts, weights, np.array([7, 2, 2, 7, -1], np.int32))
    assert groups.unserved == 1
    second, seventh = groups
    assert (second.device, second.experts, second.counts) == (2, (1, 2), (1, 1))
    assert (second.token_rows.tolist(), second.rows.tolist()) == ([1], [0, 0])
    assert second.weights.tolist() == [4, 3]
    assert (seventh.device, seventh.experts, seventh.counts) == (7, (0, 3), (2, 3))
    assert (seventh.token_rows.tolist(), seventh.rows.tolist()) == ([0, 2], [0, 1, 0, 1, 1])
    assert seventh.weights.tolist() == [0, 8, 1, 6, 7]


@BOTH
def test_grouping_and_combining_is_the_weighted_sum(kernels: ModuleType, rng):
    """What the devices do between the two gives sum_k w_k expert_k(x), whatever the placement."""
    tokens, k, n_experts, hidden = 50, 4, 16, 8
    hidden_states = rng.standard_normal((tokens, hidden)).astype(np.float32)
    matrices = rng.standard_normal((n_experts, hidden, hidden)).astype(np.float32)
    experts = np.argsort(rng.random((tokens, n_experts)), axis=1)[:, :k].astype(np.int32)
    weights = rng.random((tokens, k)).astype(np.float32)
    replies = []
    for work in kernels.group_by_device(experts, weights, rng.integers(0, 5, n_experts).astype(np.int32)):
        mine, start = hidden_states[work.token_rows], 0
        partial = np.zeros_like(mine)
        for expert, count in zip(work.experts, work.counts, strict=True):
            part = slice(start, start + count)
            kernels.combine_partials(
                partial, mine[work.rows[part]] @ matrices[expert], work.rows[part], work.weights[part]
            )
            start += count
        replies.append((partial, work.token_rows))
    whole = np.einsum("tk,tkh->th", weights, np.einsum("th,tkhg->tkg", hidden_states, matrices[experts]))
    np.testing.assert_allclose(kernels.combine(tokens, hidden, replies), whole, rtol=2e-4, atol=2e-5)


NUMBERS = st.sampled_from([0.0, 1e-30, 0.5, -2.0, 1e30, np.inf, -np.inf, np.nan, 3.4e38]) | st.floats(-10, 10, width=32)
BOUNDS = st.sampled_from([0.0, 1e-30, 1.0, 1e100, np.inf]) | st.floats(0, 10)


@st.composite
def answers(draw):
    """A device's answer, its pairs by expert, and the bounds of the layer's experts."""
    tokens, hidden, n_experts = draw(st.integers(0, 5)), draw(st.integers(0, 19)), draw(st.integers(1, 5))
    experts = draw(st.lists(st.integers(0, n_experts - 1), max_size=4 if tokens else 0))
    counts = [draw(st.integers(0, 3)) for _ in experts]
    rows = [draw(st.integers(0, tokens - 1)) for _ in range(sum(counts))]
    weights = [draw(st.sampled_from([0.0, 0.25, 1.0, -0.5])) for _ in rows]
    partial = matrix(draw, NUMBERS, tokens, hidden, np.float32)
    low, high = (np.array([draw(BOUNDS) for _ in range(n_experts)]) for _ in range(2))
    return partial, experts, counts, np.array(rows, np.int32), np.array(weights, np.float32), low, high, 0.5


@settings(max_examples=300)
@given(answers())
@pytest.mark.filterwarnings("ignore:invalid value")  # 0 times infinity, in NumPy
def test_odd_row(answer):
    assert _native.odd_row(*answer) == reference.odd_row(*answer)


@BOTH
def test_odd_row_by_hand(kernels):
    """Two tokens, experts with norms of 1 to 4; the first token has both, the second one alone."""
    rows, weights = np.array([0, 0, 1], np.int32), np.array([0.5, 0.5, 1.0], np.float32)
    low, high = np.ones(3), np.full(3, 4.0)

    def judge(*norms: float) -> tuple[int, int]:
        partial = np.zeros((2, 4), np.float32)
        partial[:, 1] = norms
        return kernels.odd_row(partial, (0, 2), (1, 2), rows, weights, low, high, 0.5)

    assert judge(2.0, 2.0) == (0, 0)
    assert judge(4.0, 4.0) == (0, 0)
    assert judge(4.1, 4.1) == (3, 0)
    assert judge(2.0, 4.1) == (3, 1)
    assert judge(0.36, 0.5) == (0, 0)  # orthogonal and least: sqrt(2) / 2, of which half
    assert judge(0.35, 0.5) == (2, 0)
    assert judge(2.0, 0.0) == (2, 1)
    assert judge(9.0, np.nan) == (1, 1)  # what is not finite comes first


@BOTH
def test_odd_row_misuse(kernels):
    one, ones = np.zeros(1, np.int32), np.ones(1, np.float32)
    good = [np.ones((1, 4), np.float32), (0,), (1,), one, ones, np.ones(2), np.ones(2), 0.5]
    for place, bad in ((1, (2,)), (1, (-1,)), (2, (2,)), (2, (-1,)), (1, (0, 1)), (3, one + 1), (3, one - 1)):
        arguments = [*good]
        arguments[place] = bad
        with pytest.raises(ValueError, match=r"."):
            kernels.odd_row(*arguments)
    with pytest.raises(ValueError, match="alike"):
        kernels.odd_row(*good[:4], np.ones(2, np.float32), *good[5:])
    with pytest.raises(ValueError, match="alike"):
        kernels.odd_row(*good[:6], np.ones(3), 0.5)
