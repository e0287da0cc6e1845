"""Placement of experts on devices, and the file that people edit."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from wdmoe.errors import ConfigError
from wdmoe.records import ExpertId
from wdmoe.solver.placement.file import check_placement, read_placement, write_placement
from wdmoe.solver.placement.live import place_experts

PLENTY = 1e12


def place(layers, experts, memory, speed, sticky=None, load=None):
    layer = np.repeat(np.arange(layers), experts)
    load = np.ones(len(layer)) if load is None else load
    return place_experts(np.ones(len(layer)), load, memory, speed, layer, sticky), layer


def per_layer(device, layer, devices):
    return np.array([np.bincount(device[layer == row], minlength=devices) for row in np.unique(layer)])


def test_equal_devices_share_every_layer():
    device, layer = place(30, 8, [PLENTY] * 4, [1] * 4)
    assert (per_layer(device, layer, 4) == 2).all()


@pytest.mark.parametrize("devices", [3, 5, 7])
def test_uneven_numbers_differ_by_one_at_most(devices):
    device, layer = place(30, 8, [PLENTY] * devices, [1] * devices)
    shared = per_layer(device, layer, devices)
    assert (shared.max(axis=1) - shared.min(axis=1) <= 1).all()
    total = np.bincount(device)
    assert total.max() - total.min() <= 2


def test_fast_devices_get_more():
    device, _ = place(16, 8, [PLENTY] * 3, [1, 2, 5])
    total = np.bincount(device)
    assert total[0] < total[1] < total[2]


def test_memory_binds_before_speed():
    device, _ = place(16, 8, [10, PLENTY, PLENTY], [100, 1, 1])
    assert np.bincount(device).tolist()[0] == 10
    assert (device >= 0).all()


def test_what_does_not_fit_is_said():
    device, _ = place(4, 8, [10, 12], [1, 1])
    assert (np.bincount(device[device >= 0]) == [10, 12]).all()
    assert (device == -1).sum() == 10


def test_a_leaving_device_moves_only_its_own():
    before, layer = place(30, 8, [PLENTY] * 4, [1] * 4)
    orphaned = np.where(before == 3, -1, before)
    after, _ = place(30, 8, [PLENTY] * 3, [1] * 3, sticky=orphaned)
    assert (after[before != 3] == before[before != 3]).all()
    assert (per_layer(after, layer, 3).max(axis=1) == 3).all()


def test_a_joining_device_gets_its_share_and_little_else_moves():
    before, _ = place(30, 8, [PLENTY] * 4, [1] * 4)
    after, _ = place(30, 8, [PLENTY] * 5, [1] * 5, sticky=before)
    moved = after != before
    assert (after[moved] == 4).sum() >= moved.sum() - 2
    assert 40 <= moved.sum() <= 50


def test_a_good_placement_is_left_alone():
    before, _ = place(30, 8, [PLENTY] * 3, [1, 2, 3])
    after, _ = place(30, 8, [PLENTY] * 3, [1, 2, 3], sticky=before)
    np.testing.assert_array_equal(before, after)


def test_idle_experts_spread_too():
    load = np.tile([1.0, 0, 0, 0, 0, 0, 0, 0], 10)
    device, layer = place(10, 8, [PLENTY] * 4, [1] * 4, load=load)
    assert ((per_layer(device, layer, 4) > 0).sum(axis=1) >= 3).all()


def test_shrunken_memory_evicts():
    before, _ = place(4, 8, [PLENTY] * 2, [1] * 2)
    after, _ = place(4, 8, [4, PLENTY], [1] * 2, sticky=before)
    assert np.bincount(after).tolist() == [4, 28]


def test_nothing_to_place_and_nowhere_to_go():
    assert place_experts([], [], [1], [1], np.array([], int)).shape == (0,)
    assert place_experts([1.0], [1.0], [], [], [0]).tolist() == [-1]
    assert place_experts([1.0], [1.0], [0.0], [1.0], [0]).tolist() == [-1]


@given(st.data())
def test_never_beyond_memory_and_nothing_left_out_that_fits(data):
    items, devices = data.draw(st.integers(1, 24)), data.draw(st.integers(1, 5))

    def draw(elements, n):
        return data.draw(st.lists(elements, min_size=n, max_size=n))

    size = np.array(draw(st.integers(0, 5), items))
    memory = np.array(draw(st.integers(0, 40), devices))
    arguments = (draw(st.integers(0, 4), items), memory, draw(st.floats(0.1, 100), devices))
    layer = draw(st.integers(0, 3), items)
    sticky = data.draw(st.none() | st.lists(st.integers(-1, devices - 1), min_size=items, max_size=items))
    device = place_experts(size, *arguments, layer, sticky)
    free = memory - np.bincount(device[device >= 0], size[device >= 0], devices)
    assert (free >= 0).all()
    assert all(size[item] > free.max() for item in np.flatnonzero(device == -1))
    np.testing.assert_array_equal(device, place_experts(size, *arguments, layer, sticky))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"weight_bytes": [1.0, -1.0]}, "weight_bytes must be finite"),
        ({"weight_bytes": [[1.0]]}, "weight_bytes must have one dimension"),
        ({"load": [1.0]}, "load must have shape"),
        ({"load": [1.0, np.nan]}, "load must be finite"),
        ({"speed": [0.0]}, "speed must be positive"),
        ({"speed": [1.0, 1.0]}, "speed must have shape"),
        ({"memory_bytes": [np.inf]}, "memory_bytes must be finite"),
        ({"layer": [0.5, 1.0]}, "layer must be integers"),
        ({"layer": [0]}, "layer must be integers"),
        ({"sticky": [0, 1]}, "sticky must be -1 or a device below 1"),
        ({"sticky": [0]}, "sticky must be integers"),
        ({"strategy": "luck"}, "strategy must be one of balance"),
    ],
)
def test_bad_input_is_named(change, named):
    good = {"weight_bytes": [1, 1], "load": [1, 1], "memory_bytes": [9], "speed": [1], "layer": [0, 1]}
    with pytest.raises(ValueError, match=named):
        place_experts(**{**good, **change})


# ---- the file

EXPERTS = st.builds(ExpertId, st.integers(0, 9), st.integers(0, 12))


@given(st.dictionaries(st.text(max_size=8), st.lists(EXPERTS, max_size=40), max_size=4))
def test_what_is_written_is_read_back(placement):
    text = write_placement(placement)
    assert read_placement(text) == {name: tuple(sorted(set(held))) for name, held in placement.items()}
    assert text == write_placement(read_placement(text))


def test_the_file_is_short_and_readable():
    whole = [ExpertId(layer, expert) for layer in range(30) for expert in (0, 1, 2, 5)]
    text = write_placement({"kit": whole})
    assert json.loads(text) == {"format": 1, "devices": {"kit": {"000-029": ["0-2", 5]}}}
    assert len(text.splitlines()) == 8


def document(devices, format_=1):
    return json.dumps({"format": format_, "devices": devices})


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ("[]", "need exactly the keys"),
        ('{"format": 1}', "need exactly the keys"),
        (document({}, 2), "format must be 1, got 2"),
        (document({}, True), "format must be 1, got True"),
        (document([]), "devices must be an object"),
        (document({"kit": []}), "'kit' must hold an object of layers"),
        (document({"kit": {"0": 3}}), "need a list of experts"),
        (document({"kit": {"zero": [1]}}), "'zero' is neither a number nor a range"),
        (document({"kit": {"0": ["3-1"]}}), "'3-1' must rise"),
        (document({"kit": {"0": [-1]}}), "-1 is neither"),
        (document({"kit": {"0": [1.5]}}), "1.5 is neither"),
        (document({"kit": {"0": [True]}}), "True is neither"),
        (document({"kit": {"0": ["0-999999"]}}), "below 65536"),
        (document({"kit": {"0": [1, "0-2"]}}), "holds expert 1 in layer 0 twice"),
        (document({"kit": {"0": [1], "000": [1]}}), "holds expert 1 in layer 0 twice"),
        ('{"format": 1, "devices": {"kit": {}, "kit": {}}}', "'kit' stands twice"),
    ],
)
def test_bad_files_are_refused_in_one_line(text, named):
    with pytest.raises(ConfigError, match=named) as refused:
        read_placement(text)
    assert "\n" not in str(refused.value)


def test_a_placement_must_match_the_model():
    model = [ExpertId(0, 0), ExpertId(0, 1)]
    check_placement({"a": [model[0]], "b": model}, model)  # on two devices: fine
    with pytest.raises(ConfigError, match="device 'a': the model has no expert 7 in layer 0"):
        check_placement({"a": [*model, ExpertId(0, 7)]}, model)
    with pytest.raises(ConfigError, match="no device holds expert 1 in layer 0"):
        check_placement({"a": model[:1]}, model)
    with pytest.raises(ConfigError, match="cannot write"):
        write_placement({"a": [ExpertId(-1, 0)]})
