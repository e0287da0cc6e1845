"""Every public function of `wdmoe.solver` with bad input of every kind: a ValueError that names the argument, never a
crash, a wrong answer or a changed input. And with good input of unusual layout and type: the same answer."""

from __future__ import annotations

import re
from functools import partial
from itertools import product

import numpy as np
import pytest

from wdmoe import solver
from wdmoe.solver.required_bandwidth import needed_hz

RNG = np.random.default_rng(20240623)
TOKENS, EXPERTS, DEVICES, BLOCKS, DRAWS = 12, 8, 4, 3, 2
GATE = RNG.dirichlet(np.ones(EXPERTS), TOKENS)
CHOSEN = np.argsort(-GATE, axis=1)[:, :2].astype(np.int32)
WEIGHTS = np.take_along_axis(GATE, CHOSEN, axis=1)
HOME = (np.arange(EXPERTS) % DEVICES).astype(np.int32)
SECONDS = RNG.uniform(1e-3, 1e-2, EXPERTS)
RATES = {"downlink_snr_hz": 1e9, "uplink_snr_hz": 1e8, "downlink_bits": 65536.0, "uplink_bits": 65536.0}
LINKS = solver.Links(**RATES, compute_s=np.full(DEVICES, 1e-4))

# function, good arguments, and those of them that are arrays of floats
GOOD = {
    "Links": (
        solver.Links,
        {name: np.full(DEVICES, value) for name, value in RATES.items()} | {"compute_s": np.full(DEVICES, 1e-4)},
        ("downlink_snr_hz", "uplink_snr_hz", "downlink_bits", "uplink_bits", "compute_s"),
    ),
    "allocate_bandwidth": (
        solver.allocate_bandwidth,
        {
            "load": RNG.poisson(5, (BLOCKS, DEVICES)) + 1.0,
            "links": LINKS,
            "total_hz": 1e8,
            "fixed_s": np.full((BLOCKS, DEVICES), 1e-3),
            "floor_hz": np.full(DEVICES, 1e5),
            "cap_hz": np.full(DEVICES, 9e7),
        },
        ("load", "fixed_s", "floor_hz", "cap_hz"),
    ),
    "allocate_bandwidth, one block": (
        solver.allocate_bandwidth,
        {"load": np.arange(1.0, 5.0), "links": LINKS, "total_hz": 1e8},
        ("load",),
    ),
    "allocate_bandwidth_many": (
        solver.allocate_bandwidth_many,
        {
            "load": RNG.poisson(5, (DRAWS, BLOCKS, DEVICES)) + 1.0,
            "links": solver.Links(**RATES, compute_s=np.full((DRAWS, DEVICES), 1e-4)),
            "total_hz": 1e8,
        },
        ("load",),
    ),
    "select_experts": (solver.select_experts, {"gate": GATE, "latency_s": SECONDS}, ("gate", "latency_s")),
    "prune_experts": (
        solver.prune_experts,
        {"experts": CHOSEN, "weights": WEIGHTS, "latency_s": SECONDS, "policy": "cosine"},
        ("weights", "latency_s"),
    ),
    "select_within_budget": (
        solver.select_within_budget,
        {"experts": CHOSEN, "weights": WEIGHTS, "device_of": HOME, "links": LINKS, "total_hz": 1e8, "budget_s": 0.01},
        ("weights",),
    ),
    "select_at_most_dropped": (
        solver.select_at_most_dropped,
        {"experts": CHOSEN, "weights": WEIGHTS, "device_of": HOME, "links": LINKS, "total_hz": 1e8, "max_dropped": 0.1},
        ("weights",),
    ),
    "shed_bottleneck": (
        solver.shed_bottleneck,
        {"experts": CHOSEN, "weights": WEIGHTS, "device_of": HOME, "token_s": SECONDS[:DEVICES]},
        ("weights", "token_s"),
    ),
    "choose_copies": (
        solver.choose_copies,
        {"experts": CHOSEN, "holders": np.eye(DEVICES, dtype=bool)[HOME], "token_s": SECONDS[:DEVICES]},
        ("token_s",),
    ),
    "replace_far": (
        solver.replace_far,
        {
            "experts": CHOSEN,
            "weights": WEIGHTS,
            "similarity": GATE[:EXPERTS],
            "seconds": SECONDS,
            "least_similarity": 0.1,
        },
        ("weights", "similarity", "seconds"),
    ),
    "place_experts": (
        solver.place_experts,
        {
            "weight_bytes": np.ones(EXPERTS),
            "load": SECONDS,
            "memory_bytes": np.full(DEVICES, 3.0),
            "speed": np.ones(DEVICES),
            "layer": np.zeros(EXPERTS, np.int32),
        },
        ("weight_bytes", "load", "memory_bytes", "speed"),
    ),
}
FLOATS = [(case, name) for case, (_, _, names) in GOOD.items() for name in names]
INTEGERS = [(case, name) for case, (_, good, _) in GOOD.items() for name in ("experts", "device_of") if name in good]
OTHERS = [
    ("select_experts", "available"),
    ("choose_copies", "holders"),
    ("place_experts", "layer"),
]  # flags, and layers
OTHERS += [("place_experts", "sticky"), ("choose_copies", "busy_s")]
MAY_BE_INFINITE = {"cap_hz", "seconds"}
MAY_BE_NEGATIVE = {"similarity"}
SHAPES = {"too many dimensions", "one too few", "empty"}


def with_first(array, value):
    out = np.array(array, np.float64)
    out.flat[0] = value
    return out


BAD = {
    "NaN": lambda a: with_first(a, np.nan),
    "negative": lambda a: with_first(a, -1.0),
    "infinite": lambda a: with_first(a, np.inf),
    "minus infinity": lambda a: with_first(a, -np.inf),
    "too many dimensions": lambda a: a[None, None, None],
    "one too few": lambda a: a[..., :-1],
    "empty": lambda a: a[..., :0],
    "text": lambda a: np.full(a.shape, "x"),
    "numbers as text": lambda a: a.astype(str),
    "complex": lambda a: a.astype(complex),
    "objects": lambda a: np.full(a.shape, None),
    "ragged": lambda a: [[1.0, 2.0], [3.0]],
    "masked": lambda a: np.ma.masked_array(a, mask=np.arange(np.size(a)).reshape(np.shape(a)) == 0),
    "masked in a list": lambda a: [np.ma.masked_array(row, mask=True) for row in a],
}


def calls(case, name, value):
    function, good, _ = GOOD[case]
    return lambda: function(**(good | {name: value}))


def not_refused(call, named):
    """What a call did instead of raising a ValueError that matches `named`; nothing where it did raise it."""
    try:
        answer = call()
    except ValueError as error:
        return "" if re.search(named, str(error)) else f"says {error}"
    except Exception as error:
        return f"raises {error!r}"
    return f"answers {answer}"


def expect_refusals(attempts):
    """Fail with a line for each of (description, call, pattern of the error) that is not refused as it should be."""
    offenders = [f"{what}: {wrong}" for what, call, named in attempts if (wrong := not_refused(call, named))]
    assert not offenders, "\n".join(offenders)


def bad_floats():
    for (case, name), kind in product(FLOATS, BAD):
        if (kind == "infinite" and name in MAY_BE_INFINITE) or (kind == "negative" and name in MAY_BE_NEGATIVE):
            continue
        # of two shapes that differ either may be the wrong one
        named = "|".join([*GOOD[case][1], "links", "top_k"]) if kind in SHAPES else name
        yield f"{case}, {name}, {kind}", calls(case, name, BAD[kind](GOOD[case][1][name])), named


def bad_indices():
    kinds = {
        kind: BAD[kind] for kind in ("NaN", "too many dimensions", "text", "complex", "objects", "ragged", "masked")
    }
    kinds |= {"fractions": lambda a: a + 0.5, "too large": lambda a: a.astype(np.int64) + 2**40}
    for (case, name), kind in product(INTEGERS, kinds):
        yield f"{case}, {name}, {kind}", calls(case, name, kinds[kind](GOOD[case][1][name])), name


def odd_types():
    for (case, name), kind in product(OTHERS, ["text", "complex", "objects", "ragged", "masked"]):
        yield f"{case}, {name}, {kind}", calls(case, name, BAD[kind](np.ones(EXPERTS))), name


def masked_work():
    experts, weights, rows = np.zeros((2, 1), np.int32), np.ones((2, 1), np.float32), np.zeros(2, np.int32)
    good = {"experts": experts, "weights": weights, "device_of": np.zeros(1, np.int32)}
    for name, array in good.items():
        masked = good | {name: np.ma.masked_array(array)}
        yield f"group_by_device, {name}", partial(solver.group_by_device, **masked), name
    partials = {"out": np.zeros((2, 1), np.float32), "partial": weights, "rows": rows, "weights": np.ones(2)}
    for name, array in partials.items():
        masked = partials | {name: np.ma.masked_array(array)}
        yield f"combine_partials, {name}", partial(solver.combine_partials, **masked), name
    for reply in ((np.ma.masked_array(weights), rows), (weights, np.ma.masked_array(rows))):
        yield "combine", partial(solver.combine, 2, 1, [reply]), r"replies\[0\]: (partial|rows)"
    yield "combine, scale", partial(solver.combine, 2, 1, [], np.ma.masked_array(np.ones(2))), "scale"
    yield "is_finite", partial(solver.is_finite, np.ma.masked_array(np.ones(2))), "values"
    yield "needed_hz", partial(needed_hz, LINKS, np.ma.masked_array(np.ones(2))), "token_s"


def rows_beyond_32_bits():
    """Cut to 32 bits each would be row 0."""
    ones = np.ones((1, 1), np.float32)
    for rows in ([2**32], [-(2**32)], [0.4], np.array([1j])):
        yield f"rows {rows}", partial(solver.combine, 2, 1, [(ones, rows)]), "rows"


def bad_numbers():
    takes = {"tolerance": ["allocate_bandwidth", "allocate_bandwidth_many"]}
    for name, value in product(
        ["total_hz", "budget_s", "max_dropped", "tolerance"], [np.nan, -1.0, np.inf, -np.inf, 1e300]
    ):
        if name == "budget_s" and value == 1e300:
            continue  # all the time in the world
        for case in takes.get(name) or [case for case, (_, good, _) in GOOD.items() if name in good]:
            yield f"{case}, {name} = {value}", calls(case, name, value), name


@pytest.mark.parametrize(
    "attempts", [bad_floats, bad_indices, odd_types, bad_numbers, masked_work, rows_beyond_32_bits]
)
def test_what_is_wrong_is_refused_by_its_name(attempts):
    expect_refusals(attempts())


def same(got, expected):
    """Whether two answers are equal, whatever they are made of."""
    if isinstance(expected, (list, tuple)):
        return all(same(a, b) for a, b in zip(got, expected, strict=True))
    names = [n for n in dir(expected) if not n.startswith("_")] if type(expected).__module__.startswith("wdmoe") else []
    if names:
        return all(same(getattr(got, name), getattr(expected, name)) for name in names)
    return np.array_equal(np.asarray(got), np.asarray(expected))


def rounded(good, names):
    """Floats that float32 holds too, so that a type changes no value."""
    return {n: v.astype(np.float32).astype(np.float64) if n in names else v for n, v in good.items()}


LAYOUTS = {
    "float32": lambda a: a.astype(np.float32),
    "big-endian": lambda a: a.astype(a.dtype.newbyteorder(">")),
    "Fortran order": np.asfortranarray,
    "reversed stride": lambda a: a[..., ::-1].copy()[..., ::-1],
    "list": lambda a: a.tolist(),
    "read-only": lambda a: np.frombuffer(a.tobytes(), a.dtype).reshape(a.shape),
}


def test_any_layout_and_float_type_gives_the_same():
    offenders = []
    for (case, (function, good, names)), layout in product(GOOD.items(), LAYOUTS):
        plain = rounded(good, names)
        before = {name: value.copy() for name, value in plain.items() if isinstance(value, np.ndarray)}
        unusual = function(**(plain | {name: LAYOUTS[layout](plain[name]) for name in names}))
        if not same(unusual, function(**plain)):
            offenders.append(f"{case}, {layout}: another answer")
        changed = [name for name, value in before.items() if not np.array_equal(plain[name], value)]
        offenders += [f"{case}, {layout}: {name} was changed" for name in changed]
    assert not offenders, "\n".join(offenders)


def test_huge_arrays_are_answered():
    load = RNG.poisson(5, (2, 5_000)) + 1.0
    answer = solver.allocate_bandwidth(load[0], solver.Links(**RATES, compute_s=np.full(5_000, 1e-4)), 1e9)
    assert (answer.status, answer.bandwidth_hz.shape) == ("optimal", (5_000,))
    gate = RNG.random((4_096, 64))
    assert solver.select_experts(gate, np.ones(64), "cosine", 8).experts.shape == (4_096, 8)


def test_one_device_one_token():
    one = solver.Links(**RATES)
    assert solver.allocate_bandwidth([1.0], one, 1e8).bandwidth_hz == pytest.approx([1e8])
    assert solver.allocate_bandwidth_many([1.0], solver.Links(**RATES, compute_s=np.zeros((0, 1))), 1e8) == []
