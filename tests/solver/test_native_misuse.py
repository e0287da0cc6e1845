"""The bridge refuses what C++ would trust, and names it."""

import sys
import threading
import time

import numpy as np
import pytest

from wdmoe.solver import _native

EXPERTS = np.zeros((2, 2), np.int32)
WEIGHTS = np.ones((2, 2), np.float32)
DEVICES = np.zeros(3, np.int32)


def wrong(array, index, value):
    changed = array.copy()
    changed[index] = value
    return changed


@pytest.mark.parametrize(
    ("experts", "weights", "device_of", "named"),
    [
        (EXPERTS, WEIGHTS[:1], DEVICES, "weights"),
        (EXPERTS, WEIGHTS[:, :1].copy(), DEVICES, "weights"),
        (wrong(EXPERTS, (1, 0), 3), WEIGHTS, DEVICES, r"experts\[1, 0\] is 3"),
        (wrong(EXPERTS, (0, 1), -2), WEIGHTS, DEVICES, "experts"),
        (EXPERTS, WEIGHTS, DEVICES[:0], "experts"),
        (EXPERTS, WEIGHTS, wrong(DEVICES, 2, -2), "device_of"),
        (EXPERTS, WEIGHTS, wrong(DEVICES, 2, 2**30), "device_of"),
        (EXPERTS.astype(np.int64), WEIGHTS, DEVICES, "Buffer dtype"),
        (EXPERTS, WEIGHTS.astype(np.float64), DEVICES, "Buffer dtype"),
        (EXPERTS[0], WEIGHTS, DEVICES, "number of dimensions"),
    ],
)
def test_group_by_device(experts, weights, device_of, named):
    with pytest.raises(ValueError, match=named):
        _native.group_by_device(experts, weights, device_of)


@pytest.mark.parametrize("shape", [(0, 2), (2, 0), (0, 0)])
def test_grouping_nothing(shape):
    groups = _native.group_by_device(np.zeros(shape, np.int32), np.zeros(shape, np.float32), DEVICES)
    assert (list(groups), groups.unserved) == ([], 0)


def test_grouping_only_dropped_and_unserved():
    experts = np.array([[-1, 0]], np.int32)
    groups = _native.group_by_device(experts, WEIGHTS[:1], np.array([-1], np.int32))
    assert (len(groups), groups.unserved) == (0, 1)


ONES = np.ones((2, 4), np.float32)
ROWS = np.array([0, 1], np.int32)


@pytest.mark.parametrize(
    ("partial", "rows", "named"),
    [
        (ONES[:, :3], ROWS, r"replies\[1\]: partial"),
        (ONES, ROWS[:1], r"replies\[1\]: rows"),
        (ONES, wrong(ROWS, 0, 3), r"replies\[1\]: rows\[0\] is 3, there are 3 tokens"),
        (ONES, wrong(ROWS, 1, -1), r"replies\[1\]: rows\[1\] is -1"),
    ],
)
def test_combine_names_the_reply(partial, rows, named):
    with pytest.raises(ValueError, match=named):
        _native.combine(3, 4, [(ONES, ROWS), (partial, rows)])


def test_combine_misuse():
    with pytest.raises(ValueError, match="scale"):
        _native.combine(3, 4, [], np.ones(2))
    with pytest.raises(ValueError, match="must not be negative"):
        _native.combine(-1, 4, [])
    with pytest.raises(ValueError, match="there are 0 tokens"):
        _native.combine(0, 4, [(ONES, ROWS)])
    assert _native.combine(0, 4, []).shape == (0, 4)
    assert _native.combine(3, 0, [(ONES[:, :0], ROWS)], np.ones(3)).shape == (3, 0)


def test_combine_partials_leaves_out_alone_when_it_refuses():
    out = np.zeros((2, 4), np.float32)
    with pytest.raises(ValueError, match=r"rows\[1\]"):
        _native.combine_partials(out, ONES, np.array([0, 2], np.int32))
    with pytest.raises(ValueError, match="weights"):
        _native.combine_partials(out, ONES, ROWS, np.ones(3))
    assert not out.any()


def test_a_partial_inside_out_is_refused():
    out = np.ones((4, 4), np.float32)
    for partial in (out, out[:2], out[2:]):
        with pytest.raises(ValueError, match="partial must not share memory with out"):
            _native.combine_partials(out, partial, np.arange(len(partial), dtype=np.int32)[::-1].copy())
    assert (out == 1).all()


def test_read_only_and_strided_input():
    partial = np.ones((2, 8), np.float32)[:, ::2]
    frozen = ROWS.copy()
    frozen.flags.writeable = False
    np.testing.assert_array_equal(_native.combine(2, 4, [(partial, frozen)]), ONES)


def test_top_k_misuse():
    gate = np.ones((2, 3))
    for k in (0, 4, -1):
        with pytest.raises(ValueError, match="top_k must be 1 to 3"):
            _native.top_k(gate, k, None, False)
    with pytest.raises(ValueError, match="available"):
        _native.top_k(gate, 1, np.ones(2, np.uint8), False)
    with pytest.raises(ValueError, match="at token 1, expert 2"):
        _native.top_k(wrong(gate, (1, 2), np.nan), 1, None, False)


def test_prune_misuse():
    options = (None, True, True, False, 0.5, 0.05, 1.05)

    def prune(experts=EXPERTS, weights=ONES[:, :2], latency=(2, 3), options=options):
        return _native.prune(experts.copy(), np.array(weights, np.float64), np.ones(latency), *options)

    with pytest.raises(ValueError, match="weights must have the shape"):
        prune(weights=ONES)
    with pytest.raises(ValueError, match="latency_s must have 1 or 2 rows"):
        prune(latency=(3, 3))
    with pytest.raises(ValueError, match="available"):
        prune(options=(np.ones(2, np.uint8), *options[1:]))
    with pytest.raises(ValueError, match="experts holds 3"):
        prune(experts=wrong(EXPERTS, (0, 0), 3))
    with pytest.raises(ValueError, match="weights must be finite"):
        prune(weights=wrong(WEIGHTS, (0, 0), np.nan))


def test_many_threads_get_the_answers_of_one(rng):
    """The GIL is released inside, so shared state between calls would show as wrong answers here."""
    gate = rng.dirichlet(np.ones(32), 500)
    latency = rng.uniform(0.1, 1, (1, 32))
    device_of = (np.arange(32) % 5).astype(np.int32)

    def work(seed):
        mine = np.roll(gate, seed, axis=0)
        experts, weights = _native.top_k(mine, 4, None, True)
        dropped, wlr, _ = _native.prune(experts, weights, latency, None, True, False, False, 0.5, 0.05, 1.05)
        groups = _native.group_by_device(experts, weights.astype(np.float32), device_of)
        replies = [(np.repeat(w.weights[:1, None], len(w.token_rows), 0), w.token_rows) for w in groups]
        return dropped.sum(), wlr, [w.counts for w in groups], _native.combine(500, 1, replies).sum()

    alone = [work(seed) for seed in range(8)]
    wrongs = []

    def repeat(seed):
        wrongs.extend(True for _ in range(50) if work(seed) != alone[seed])

    switch = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=repeat, args=(seed,)) for seed in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(switch)
    assert not wrongs


def test_other_threads_run_during_a_call(rng):
    """Another thread gets a turn while a long call is inside C++: only possible without the GIL."""
    gate = rng.random((40_000, 128))
    turns, stop = [], threading.Event()

    def take_turns():
        while not stop.is_set():
            turns.append(time.perf_counter())
            time.sleep(0.0005)

    other = threading.Thread(target=take_turns)
    calls = []
    switch = sys.getswitchinterval()
    other.start()
    try:
        for _ in range(5):
            sys.setswitchinterval(100)  # nobody is forced to let go: only a call that does lets the other in
            began = time.perf_counter()
            _native.top_k(gate, 8, None, False)
            calls.append((began, time.perf_counter()))
            sys.setswitchinterval(switch)
            time.sleep(0.001)
    finally:
        stop.set()
        sys.setswitchinterval(switch)
        other.join()
    assert any(began < turn < ended for turn in turns for began, ended in calls)
