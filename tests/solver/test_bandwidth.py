"""Bandwidth allocation: exact against general solvers, certified always, never a crash or NaN."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.lab.bandwidth_judges import BITS, TOTAL_HZ, clarabel, draw_case, slsqp
from wdmoe.solver import Links, allocate_bandwidth, allocate_bandwidth_many
from wdmoe.solver.reference import bandwidth as reference

JUDGE_RTOL = 1e-6  # what the general solvers are asked to agree within
GAP = 1e-8


def check(answer, load, links, floor=0.0, cap=np.inf):
    """What holds for every feasible answer."""
    assert answer.status == "optimal", answer
    assert np.isfinite(answer.bandwidth_hz).all()
    assert answer.bandwidth_hz.sum() <= TOTAL_HZ * (1 + 1e-12)
    assert (answer.bandwidth_hz >= floor).all()
    assert (answer.bandwidth_hz <= cap).all()
    assert answer.lower_bound_s <= answer.latency_s
    assert answer.latency_s - answer.lower_bound_s <= GAP * answer.latency_s
    assert answer.latency_s == pytest.approx(answer.block_latency_s.sum())
    assert answer.latency_s == pytest.approx(
        reference.latency(load, links.table, links.flat, np.maximum(answer.bandwidth_hz, 1e-300)), rel=1e-12
    )
    busy = load.any(axis=1)
    np.testing.assert_allclose(answer.weight[busy].sum(axis=1), 1)
    assert (answer.weight[load == 0] == 0).all()
    assert (answer.weight >= 0).all()


@pytest.mark.parametrize("first", range(1000, 1120, 20))
def test_against_clarabel(first):
    """120 of the instances of tools/study/check_bandwidth."""
    for seed in range(first, first + 20):
        load, links = draw_case(np.random.default_rng(seed))
        answer = allocate_bandwidth(load, links, TOTAL_HZ)
        check(answer, load, links)
        value, feasible, _ = clarabel(load, links)
        assert answer.latency_s == pytest.approx(value, rel=JUDGE_RTOL), seed
        assert answer.lower_bound_s <= feasible, seed
        assert answer.latency_s <= feasible * (1 + GAP), seed


@pytest.mark.parametrize("first", range(1000, 1060, 20))
def test_against_slsqp(first):
    """60 of the instances of tools/study/check_bandwidth."""
    for seed in range(first, first + 20):
        load, links = draw_case(np.random.default_rng(seed))
        other, done = slsqp(load, links)
        answer = allocate_bandwidth(load, links, TOTAL_HZ)
        assert done, seed
        assert answer.latency_s == pytest.approx(other, rel=JUDGE_RTOL), seed
        assert answer.lower_bound_s <= other, seed


@pytest.mark.parametrize("seed", range(12))
def test_slsqp_needs_few_constraints(seed):
    """What makes it a judge of large problems leaves its answer what it is."""
    load, links = draw_case(np.random.default_rng(seed), 1 + seed, 8)
    few, few_done = slsqp(load, links)
    full, full_done = slsqp(load, links, few=False)
    assert (few_done, full_done) == (True, True)
    assert few == pytest.approx(full, rel=1e-8)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 12), st.booleans())
def test_one_block_against_bisection(seed, devices, flat):
    rng = np.random.default_rng(seed)
    _, links = draw_case(rng, 1, devices, flat)
    load = rng.uniform(0.1, 50, devices)
    load[(links.table[2:4] == 0).any(axis=0)] = 0
    answer = allocate_bandwidth(load, links, TOTAL_HZ)
    used = load > 0
    if not used.any():
        assert answer.latency_s == 0
        return
    bands, finish = reference.one_block(load[used], links.table[:, used], flat, TOTAL_HZ)
    assert answer.latency_s == pytest.approx(finish, rel=1e-9)
    np.testing.assert_allclose(answer.bandwidth_hz[used], bands, rtol=1e-6, atol=1e-9 * TOTAL_HZ)
    check(answer, load[None], links)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 10), st.integers(1, 10))
def test_certificate_holds_by_direct_search(seed, blocks, devices):
    load, links = draw_case(np.random.default_rng(seed), blocks, devices)
    answer = allocate_bandwidth(load, links, TOTAL_HZ)
    proven = reference.lower_bound(load, links.table, links.flat, TOTAL_HZ, answer.weight, answer.price_s_per_hz)
    assert answer.lower_bound_s <= proven * (1 + 1e-12) + 1e-300
    assert proven <= answer.latency_s * (1 + 1e-12)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32))
def test_floors_and_caps(seed):
    rng = np.random.default_rng(seed)
    load, links = draw_case(rng)
    devices = load.shape[1]
    floor = rng.uniform(0, 1, devices) * rng.integers(0, 2, devices) * TOTAL_HZ / devices
    cap = floor + rng.uniform(0.02, 3, devices) * TOTAL_HZ / devices
    answer = allocate_bandwidth(load, links, TOTAL_HZ, floor_hz=floor, cap_hz=cap)
    check(answer, load, links, floor, cap)
    free = allocate_bandwidth(load, links, TOTAL_HZ)
    assert answer.latency_s >= free.lower_bound_s


def flat_links(devices, efficiency=2.0, bits=1000.0, **more):
    both = {"downlink_efficiency": np.full(devices, efficiency), "uplink_efficiency": np.full(devices, efficiency)}
    return Links(downlink_bits=bits, uplink_bits=0.0, **both, **more)


def test_equal_devices_share_equally():
    answer = allocate_bandwidth(np.full((3, 5), 7.0), flat_links(5), 1e6)
    np.testing.assert_allclose(answer.bandwidth_hz, 2e5, rtol=1e-6)
    assert answer.latency_s == pytest.approx(3 * 7 * 1000 / (2 * 2e5))


def test_one_block_shares_by_what_each_needs():
    load = np.array([1.0, 2.0, 5.0])
    answer = allocate_bandwidth(load, flat_links(3), 1e6)
    np.testing.assert_allclose(answer.bandwidth_hz, load / 8 * 1e6)
    assert answer.latency_s == pytest.approx(8 * 1000 / 2e6)
    assert answer.price_s_per_hz == pytest.approx(answer.latency_s / 1e6)


def test_one_device_a_block_follows_the_square_root_rule():
    load = np.diag([1.0, 4.0, 9.0])
    answer = allocate_bandwidth(load, flat_links(3), 6e6)
    np.testing.assert_allclose(answer.bandwidth_hz, [1e6, 2e6, 3e6], rtol=1e-4)
    assert answer.latency_s == pytest.approx((1 + 2 + 3) ** 2 * 500 / 6e6)
    np.testing.assert_allclose(answer.weight, np.eye(3), atol=1e-6)


def test_price_is_what_one_more_hertz_saves(rng):
    load, links = draw_case(rng, 6, 5, False)
    one, two = (allocate_bandwidth(load, links, hertz, tolerance=1e-11) for hertz in (TOTAL_HZ, TOTAL_HZ * 1.001))
    assert (one.latency_s - two.latency_s) / (TOTAL_HZ * 0.001) == pytest.approx(one.price_s_per_hz, rel=0.01)


def test_a_cap_that_decides_leaves_band_over():
    answer = allocate_bandwidth([10.0, 1.0], flat_links(2), 1e6, cap_hz=[1e5, 1e6])
    assert answer.latency_s == pytest.approx(10 * 1000 / 2e5)
    np.testing.assert_allclose(answer.bandwidth_hz, [1e5, 1e4])
    assert (answer.status, answer.price_s_per_hz) == ("optimal", 0)


def test_floors_that_take_everything():
    answer = allocate_bandwidth(np.ones((2, 2)), flat_links(2), 1e6, floor_hz=[4e5, 6e5])
    np.testing.assert_allclose(answer.bandwidth_hz, [4e5, 6e5])
    assert answer.status == "optimal"


def test_fixed_seconds_and_a_device_that_needs_no_band():
    answer = allocate_bandwidth([[1.0, 1.0]], flat_links(2, bits=np.array([1000.0, 0.0])), 1e6, fixed_s=[[0.0, 0.25]])
    assert answer.latency_s == 0.25
    assert answer.status == "optimal"


def hopeless(load, **options):
    links = Links(downlink_snr_hz=[0.0, 1e8], uplink_snr_hz=1e8, downlink_bits=BITS, uplink_bits=BITS)
    return allocate_bandwidth(load, links, TOTAL_HZ, **options)


def test_infeasible_is_an_outcome():
    for answer in (
        hopeless([1.0, 1.0]),
        hopeless([0.0, 1.0], floor_hz=TOTAL_HZ),
        hopeless([0.0, 1.0], cap_hz=0.0),
        hopeless([0.0, 1.0], floor_hz=[TOTAL_HZ, 0.0]),
    ):
        assert (answer.status, answer.latency_s, answer.lower_bound_s) == ("infeasible", np.inf, np.inf)
        assert not answer.bandwidth_hz.any()
    fine = hopeless([[0.0, 1.0], [0.0, 0.0]])
    assert fine.status == "optimal"
    np.testing.assert_allclose(fine.bandwidth_hz, [0, TOTAL_HZ])


def test_nothing_to_do():
    answer = hopeless(np.zeros((3, 2)), floor_hz=[0.0, 5.0])
    assert (answer.status, answer.latency_s, answer.lower_bound_s) == ("optimal", 0, 0)
    np.testing.assert_array_equal(answer.bandwidth_hz, [0, 5])


def test_iteration_limit_keeps_a_feasible_answer_and_its_bound(rng):
    load, links = draw_case(rng, 20, 20, False)
    answer = allocate_bandwidth(load, links, TOTAL_HZ, iterations=1)
    best = allocate_bandwidth(load, links, TOTAL_HZ)
    assert answer.status == "iteration_limit"
    assert answer.lower_bound_s <= best.latency_s <= answer.latency_s < 3 * best.latency_s


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_extremes_never_crash(data):
    devices, blocks = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 4))
    numbers = st.sampled_from([0.0, 1e-30, 1e-9, 1.0, 3.0, 1e12, 1e30])

    def row(elements, n):
        return np.array(data.draw(st.lists(elements, min_size=n, max_size=n)))

    links = Links(
        downlink_snr_hz=row(numbers, devices),
        uplink_snr_hz=row(numbers, devices),
        downlink_bits=row(numbers, devices),
        uplink_bits=row(numbers, devices),
        compute_s=row(numbers, devices),
    )
    load = row(st.sampled_from([0.0, 1e-300, 1e-20, 1.0, 7.0, 1e20, 1e100]), blocks * devices).reshape(blocks, devices)
    answer = allocate_bandwidth(load, links, data.draw(st.sampled_from([1e-30, 1.0, 1e30])))
    assert not np.isnan(answer.bandwidth_hz).any()
    assert not np.isnan(answer.weight).any()
    assert not np.isnan([answer.latency_s, answer.lower_bound_s, answer.price_s_per_hz]).any()
    assert 0 <= answer.lower_bound_s <= answer.latency_s


def test_a_start_saves_iterations_and_changes_nothing(rng):
    load, links = draw_case(rng, 32, 8, False)
    cold = allocate_bandwidth(load, links, TOTAL_HZ)
    assert allocate_bandwidth(load, links, TOTAL_HZ, start=cold).iterations < cold.iterations
    near = allocate_bandwidth(load * rng.uniform(0.99, 1.01, load.shape), links, TOTAL_HZ, start=cold)
    assert near.status == "optimal"


def test_many_draws_are_the_single_ones(rng):
    load = rng.poisson(8, (4, 5)).astype(float)
    snr = TOTAL_HZ * 10 ** rng.uniform(-1, 3, (2, 6, 5))
    links = Links(downlink_snr_hz=snr[0], uplink_snr_hz=snr[1], downlink_bits=BITS, uplink_bits=BITS)
    for warm in (False, True):
        answers = allocate_bandwidth_many(load, links, TOTAL_HZ, warm=warm)
        for k, answer in enumerate(answers):
            one = Links(downlink_snr_hz=snr[0, k], uplink_snr_hz=snr[1, k], downlink_bits=BITS, uplink_bits=BITS)
            single = allocate_bandwidth(load, one, TOTAL_HZ)
            assert answer.latency_s == pytest.approx(single.latency_s, rel=2 * GAP)


def test_any_layout_and_float_type(rng):
    load, links = draw_case(rng, 3, 4, False)
    wide = np.zeros((6, 8))
    wide[::2, ::2] = load
    assert (
        allocate_bandwidth(wide[::2, ::2].astype(np.float32), links, TOTAL_HZ).latency_s
        == allocate_bandwidth(load, links, TOTAL_HZ).latency_s
    )


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"load": np.ones((2, 3))}, "load must have one column for each of the 2 links"),
        ({"load": np.ones((0, 2))}, "load must have at least one block"),
        ({"load": np.ones((1, 2, 2))}, "load must be"),
        ({"load": [1.0, np.nan]}, "load must be finite and not negative, got nan at block 0, device 1"),
        ({"load": [-1.0, 1.0]}, "load"),
        ({"load": [np.inf, 1.0]}, "load"),
        ({"total_hz": 0.0}, "total_hz"),
        ({"total_hz": np.nan}, "total_hz"),
        ({"total_hz": np.inf}, "total_hz"),
        ({"floor_hz": [1.0]}, "floor_hz"),
        ({"floor_hz": np.inf}, "floor_hz"),
        ({"cap_hz": np.nan}, "cap_hz"),
        ({"floor_hz": 2.0, "cap_hz": 1.0}, "cap_hz must be at least floor_hz"),
        ({"fixed_s": [[1.0]]}, "fixed_s"),
        ({"fixed_s": [[-1.0, 1.0]]}, "fixed_s"),
        ({"tolerance": 0.0}, "tolerance"),
        ({"iterations": 0}, "iterations"),
    ],
)
def test_misuse_names_the_argument(change, named):
    arguments = {"load": [1.0, 2.0], "links": flat_links(2), "total_hz": 1e6} | change
    with pytest.raises(ValueError, match=named):
        allocate_bandwidth(**arguments)


def test_misuse_of_links_and_starts():
    with pytest.raises(ValueError, match="links need"):
        Links(downlink_bits=1.0, uplink_bits=1.0)
    with pytest.raises(ValueError, match="one shape"):
        Links(downlink_snr_hz=[1.0, 2.0], uplink_snr_hz=[1.0, 2.0, 3.0], downlink_bits=1.0, uplink_bits=1.0)
    for bad in (np.nan, -1.0, np.inf, 1e31):
        with pytest.raises(ValueError, match="uplink_bits"):
            flat_links(2, bits=1.0) and Links(downlink_snr_hz=1.0, uplink_snr_hz=1.0, downlink_bits=1, uplink_bits=bad)
    with pytest.raises(ValueError, match="start"):
        allocate_bandwidth([1.0, 2.0, 3.0], flat_links(3), 1e6, start=hopeless([0.0, 1.0]))
    with pytest.raises(ValueError, match="links must be"):
        allocate_bandwidth_many([1.0, 2.0], flat_links(2), 1e6)
